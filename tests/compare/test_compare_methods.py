"""Which methods are compared: names, files of titles, and what of a recipe each one reads."""

from pathlib import Path

import pytest

from deltaw.compare.methods import NAMED, choose, recipes
from deltaw.errors import ConfigError
from deltaw.inits import names

SHARED = {"model": "m", "data": "d.csv"}


def test_every_name_makes_a_recipe_of_its_own() -> None:
    made = recipes(SHARED, dict(NAMED))
    assert len({recipe.model_dump_json() for recipe in made.values()}) == len(NAMED)


def test_every_start_that_is_a_method_has_a_name() -> None:
    named = {changes.get("init_lora_weights") for changes in NAMED.values()}
    assert set(names()) - {"kaiming", "gaussian", "_random"} <= named


def test_names_synonyms_and_spaces() -> None:
    assert list(choose(" LoRA , loraplus,lora_ga,")) == ["lora", "lora+", "lora-ga"]


def test_titles_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("LoRA | q: {target_modules: [query], r: 4}\nplain: {}\n")
    chosen = choose(f"dora,{file}")
    assert list(chosen) == ["dora", "LoRA | q", "plain"]
    made = recipes(SHARED | {"r": 16}, chosen)
    assert (made["LoRA | q"].r, made["plain"].r, made["dora"].use_dora) == (4, 16, True)


def test_all_problems_at_once(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("lora: {}\nbad: 3\n'" + "x" * 70 + "': {}\n")
    empty = tmp_path / "empty.yml"
    empty.write_text("{}\n")
    with pytest.raises(ConfigError) as error:
        choose(f"lora,lroa,{file},{empty}")
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    assert "lroa is unknown; known are full, head" in lines[1]
    assert "must be a mapping" in str(error.value) and "60 characters" in str(error.value)
    assert "lora is given twice" in str(error.value) and "holds no methods" in str(error.value)


def test_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="none is named"):
        choose(" , ")


def test_a_method_is_not_given_what_it_would_refuse() -> None:
    shared = SHARED | {
        "r": 4,
        "lora_alpha": 12.0,
        "target_modules": ["query"],
        "galore_rank": 8,
        "quantization_type": "fp4",
        "loraplus_lr_embedding": 1e-5,
        "last_layers": 1,
        "epochs": 2,
    }
    made = recipes(shared, dict(NAMED))
    assert (made["lora"].r, made["lora"].galore_rank, made["galore"].galore_rank) == (4, 128, 8)
    assert (made["qlora"].quantization_type, made["lora"].quantization_type) == ("fp4", "nf4")
    assert made["lora+"].loraplus_lr_embedding == 1e-5
    assert made["freeze"].last_layers == 1 and made["full"].last_layers == 2
    assert {recipe.epochs for recipe in made.values()} == {2}


def test_what_no_method_reads_is_refused_and_defaults_written_out_are_not() -> None:
    written_out = {"galore_rank": 128, "rank_pattern": {}, "r": 8, "quantization_type": "nf4"}
    methods = {name: NAMED[name] for name in ("full", "head")}
    assert recipes(SHARED | written_out, methods).keys() == methods.keys()
    with pytest.raises(ConfigError) as error:
        recipes(SHARED | written_out | {"r": 4, "use_rslora": True, "last_layers": 3}, methods)
    for shown in ("last_layers=3", "r=4", "use_rslora=True"):
        assert f"{shown} has no effect with any of the methods" in str(error.value)
    assert "galore_rank" not in str(error.value)


def test_settings_of_the_recipe_that_combine_are_kept() -> None:
    made = recipes(SHARED | {"use_rslora": True}, {"dora": NAMED["dora"], "full": NAMED["full"]})
    assert made["dora"].use_rslora and made["dora"].use_dora and not made["full"].use_rslora


def test_what_must_be_shared_cannot_be_a_methods_own() -> None:
    with pytest.raises(ConfigError) as error:
        recipes(SHARED, {"a": {"test_share": 0.5, "seed": 3}, "b": {"learning_rate": 1.0}})
    for key in ("a: test_share", "a: seed", "b: learning_rate"):
        assert f"{key} is shared by all methods" in str(error.value)


def test_a_start_that_there_is_none_of_is_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)a: init_lora_weights='pisa' is not known"):
        recipes(SHARED, {"a": {"init_lora_weights": "pisa"}, "b": {}})


def test_other_spellings_of_galore() -> None:
    shared = SHARED | {"galore_rank": 4}
    made = recipes(shared, {"a": {"method": "full", "use_galore": True}, "b": {"method": "full"}})
    assert (made["a"].optim, made["a"].galore_rank) == ("galore_adamw", 4)
    assert made["b"].optim == "adamw"
    made = recipes(shared | {"use_galore": True}, {"a": {"method": "full"}, "c": {}})
    assert (made["a"].galore_rank, made["c"].optim) == (4, "adamw")


def test_what_is_wrong_with_each_method_is_listed() -> None:
    with pytest.raises(ConfigError) as error:
        recipes(SHARED, {"a": {"rank_": 3}, "b": {"method": "full", "r": 4}, "c": {}})
    text = str(error.value)
    assert "a: unknown key rank_" in text and "b: r=4 has no effect with method=full" in text
    assert "c:" not in text
