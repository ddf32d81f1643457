"""Recipes: what is accepted, what is refused, and that all problems are named at once."""

import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import ConfigError
from deltaw.train import yamlfile
from deltaw.train.recipe import Method, Recipe, check_segment, filled, load, parse, parse_overrides

LEAST = {"model": "m", "data": "d"}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\ndata: d\nlearning_rate: 1e-4\nr: 4\n")
    recipe = load(path, ["r=16", "text=[a, b]", "name=x"])
    assert (recipe.learning_rate, recipe.r, recipe.text, recipe.name) == (1e-4, 16, ["a", "b"], "x")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "1.0e-4", ".1e-3"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert yamlfile.value(text) == 1e-4


@pytest.mark.parametrize("text", ["0e244abc", "1e-4x", "e5", "12e5 f"])
def test_what_only_begins_like_a_number_is_text(text: str) -> None:
    assert yamlfile.value(text) == text


def test_duplicate_keys_are_named_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\ndata: d\nr: 4\nrank_pattern: {a: 1, a: 2}\nr: 8\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml:4: a\n.*recipe\.yaml:5: r"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b", "no `key: value` is found"),
        ("", "no `key: value` is found"),
        ("model: !!python/object/apply:os.system [id]\ndata: d", "not valid YAML"),
        ("a: &a [*a]\n", "aliases"),
        ("? [a]\n: 1", r"recipe\.yaml:1.*a key must be"),
        ("b: 1\n? {a: 1}\n: 1", r"recipe\.yaml:2.*a key must be"),
        ("r: " + "1" * 5000, "not valid YAML: Exceeds the limit"),
        ("r: " + "[" * 5000, "nested too deeply"),
        ("when: !!timestamp x", "tags"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(written(tmp_path, text))
    assert "\nFix: write one `key: value` in a line; " in str(caught.value)


def test_a_recipe_that_is_not_there_has_a_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: [^§]*\nFix: give the path"):
        load(tmp_path / "none.yaml")


def test_arguments_that_are_none_have_a_fix() -> None:
    with pytest.raises(ConfigError, match=r"'template' is not `key=value`\nFix: .*such as r=16"):
        parse_overrides(["template"])


def test_a_list_written_as_text_says_how_to_write_one() -> None:
    values = (
        LEAST | {"mix_strategy": "interleave_under"} | parse_overrides(["interleave_probs=0.5,0.5"])
    )
    with pytest.raises(ConfigError, match=r"valid list, such as \[0\.5,0\.5\]"):
        parse(values)


@pytest.mark.parametrize(
    "text",
    ["!!int x", "!!float x", "!!bool x", "!!timestamp x", "9" * 5000, "[" * 5000, "{[a]: 1}"],
)
def test_a_value_that_is_no_yaml_is_one_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the value [^§]*\nFix: put quotes"):
        parse_overrides([f"label={text}"])


@pytest.mark.parametrize(
    "text",
    ["1:30", "1:30.5", "on", "Off", "yes", "n", "010", "0x1F", "1_000", "+7", "2024-13-45", "="],
)
def test_what_only_yaml_of_old_takes_for_a_value_is_text(text: str, tmp_path: Path) -> None:
    assert parse(LEAST | parse_overrides([f"label={text}"])).label == text
    path = tmp_path / "recipe.yaml"
    path.write_text(yamlfile.write(LEAST | {"label": text}, "comment"), encoding="utf-8")
    assert load(path).label == text


@pytest.mark.parametrize("text", ["08", "+8", "8", "8.0"])
def test_a_setting_takes_its_number_from_text(text: str) -> None:
    assert parse(LEAST | parse_overrides([f"max_steps={text}"])).max_steps == 8


@pytest.mark.parametrize("key", ["epochs", "weight_decay", "max_grad_norm", "lora_alpha"])
@pytest.mark.parametrize("number", [".inf", ".nan", "1e999"])
def test_numbers_that_are_not_finite_are_refused(key: str, number: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=(inf|nan): Input should be (a finite|less|gr)"):
        parse(LEAST | parse_overrides([f"{key}={number}"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": []}, r"text=\[\]: .*at least 1 item"),
        ({"output": "a\0b"}, r"output='a\\x00b': must not hold a NUL"),
        ({"data": "a\0b", "model": "\0"}, r"model=(.|\n)*data="),
        ({"output": ""}, "output=''"),
        ({"epochs": 1e300}, "epochs=1e\\+300"),
        ({"max_steps": 10**400}, "max_steps=1000"),
    ],
)
def test_values_that_would_break_later_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(LEAST | values)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"labels": 5}, "labels=5: Input should be a valid list"),
        ({"labels": [1, {"x": 2}]}, r"labels\.0=1: .*; labels\.1={'x': 2}: "),
        ({"versions": ["1"]}, "versions="),
        ({"before": {"primary": "accuracy"}}, r"before\.values is missing; "),
    ],
)
def test_a_record_of_another_form_is_refused(record: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(LEAST | {"record": record})


def test_the_shortest_length_is_left_to_the_tokenizer() -> None:
    assert parse(LEAST | {"max_length": 3}).max_length == 3


def test_all_problems_come_in_one_error() -> None:
    values = LEAST | {"lerning_rate": 1, "lr": 2, "r": "eight", "lora_dropout": [], "seed": True}
    with pytest.raises(ConfigError) as caught:
        parse(values)
    message = str(caught.value)
    assert "lerning_rate; did you mean learning_rate?" in message
    assert "unknown key lr; did you mean learning_rate?" in message
    assert "r='eight'" in message
    assert "lora_dropout=[]" in message
    assert "seed=True: must be a whole number" in message


def test_keys_that_the_method_does_not_read_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(LEAST | {"method": "head", "r": 64, "lora_dropout": 0.5, "last_layers": 3})
    message = str(caught.value)
    assert "r=64 has no effect with method=head, only with lora" in message
    assert "lora_dropout=0.5 has no effect" in message
    assert "last_layers=3 has no effect with method=head, only with freeze" in message
    assert "did you mean method=freeze?" in message
    with pytest.raises(ConfigError, match="only with lora or head or bitfit or layernorm"):
        parse(LEAST | {"method": "full", "modules_to_save": ["classifier"]})


@pytest.mark.parametrize("method", typing.get_args(Method))
def test_every_method_accepts_all_defaults_written_out(method: str) -> None:
    values = parse(LEAST | {"method": method}).model_dump(exclude_none=True)
    assert parse(values).method == method


def test_what_was_chosen_fills_what_was_left_open_alone() -> None:
    record = {"chosen": {"epochs": 3.0, "learning_rate": 0.5}}
    recipe = filled(parse(LEAST | {"epochs": 7, "record": record}))
    assert (recipe.epochs, recipe.learning_rate) == (7, 0.5)


@pytest.mark.parametrize("chosen", [{"epochs": -1}, {"nonsense": 1}, ["epochs"], 3])
def test_a_damaged_record_is_one_error(chosen: object) -> None:
    with pytest.raises(ConfigError, match=r"epochs=-1|nonsense|chosen=.*valid dictionary"):
        filled(parse(LEAST | {"record": {"chosen": chosen}}))


def test_a_record_cannot_change_what_the_recipe_says() -> None:
    chosen = {"trust_remote_code": True, "seed": 5}
    recipe = filled(parse(LEAST | {"record": {"chosen": chosen}}))
    assert (recipe.trust_remote_code, recipe.seed) == (False, 0)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ConfigError, match="model is missing"):
        parse({"data": "d"})


@pytest.mark.parametrize("pair", ["r", "=4", "r=4 r=5"])
def test_arguments_that_are_no_pairs_are_refused(pair: str) -> None:
    with pytest.raises(ConfigError):
        parse(LEAST | parse_overrides([*pair.split(), "r=1"] if pair == "r=4 r=5" else [pair]))


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\\b", ".hidden", "a\x1b[2J", "x" * 101, " a"])
def test_a_run_name_is_one_plain_segment(name: str) -> None:
    with pytest.raises(ConfigError, match="one plain folder name"):
        parse(LEAST | {"name": name})
    with pytest.raises(ValueError, match="one plain folder name"):
        check_segment(name)


def test_hostile_text_is_escaped_in_the_error() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(LEAST | {"\x1b[31mred": 1, "method": "\x1b]0;title\x07"})
    assert "\x1b" not in str(caught.value)
    assert "\x07" not in str(caught.value)


plain_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(labels=st.lists(plain_text, max_size=4), column=plain_text, rate=st.floats(1e-9, 1))
def test_what_is_written_is_read_back(labels: list[str], column: str, rate: float) -> None:
    values = {"label": column, "learning_rate": rate, "record": {"labels": labels}}
    text = yamlfile.write(values, "comment")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert yamlfile.value(text) == values


def test_the_recipe_cannot_be_changed_in_place() -> None:
    recipe: Recipe = parse(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        recipe.r = 3  # type: ignore[misc]
