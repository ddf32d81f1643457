"""Runs that begin with adapters: the last is trained on, those before it are merged."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.language.models import make_model, write_json
from tests.language.test_language_use import SHORT, talk
from tests.language.test_ratings import ratings
from tests.train.conftest import Command
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.errors import ConfigError, FormatError, RunError
from deltaw.language.choosing import preparation, settle, train
from deltaw.language.generating import generate
from deltaw.language.use.chatting import escaped
from deltaw.language.use.opened import open_language
from deltaw.train import continuing
from deltaw.train import run as running
from deltaw.train.console import Console
from deltaw.train.job import Job
from deltaw.train.recipe import parse

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.arange(3, 15)[None]


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS.to(model.device)).logits
    return found.float().cpu()


def base_of(values: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(values["model"], dtype=torch.float32)


def in_peft(values: dict[str, Any], folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel.from_pretrained(base_of(values), folder)


def moved(model: nn.Module, seed: int) -> None:
    """Give every B numbers of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def adapter_in(folder: Path, values: dict[str, Any], seed: int, **settings: Any) -> Path:
    model = base_of(values)
    config = deltaw.LoraConfig(**{"target_modules": ["q_proj", "down_proj"], **settings})
    deltaw.attach(model, config)
    moved(model, seed)
    deltaw.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def values(talker: Path) -> dict[str, Any]:
    return {
        "model": str(talker / "model"),
        "data": str(talker / "data.json"),
        "max_steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "samples": 0,
        "keep": "last",
    }


@pytest.fixture(scope="module")
def two(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters of other ranks, scales and layers."""
    folder = tmp_path_factory.mktemp("adapters")
    first = adapter_in(folder / "first", values, 1, r=3, lora_alpha=6, lora_dropout=0.25)
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]}
    return [str(first), str(adapter_in(folder / "second", values, 2, **settings))]


def start(values: dict[str, Any], output: Path, **more: Any) -> Path:
    return train(parse(values | {"output": str(output)} | more))


def job_of(values: dict[str, Any], **more: Any) -> Job:
    recipe = settle(parse(values | more))
    return preparation(recipe)(recipe, Console(silent=True))


def added(values: dict[str, Any], adapters: list[str]) -> Any:
    """The base with all of the adapters in its weights."""
    model = base_of(values)
    for path in adapters:
        deltaw.load(model, path, check_base=False)
        deltaw.merge(model, original="none")
        deltaw.detach(model)
    return model


def test_training_begins_with_the_outputs_of_the_adapter(
    values: dict[str, Any], two: list[str]
) -> None:
    job = job_of(values, adapter=two[0])
    there = base_of(values)
    deltaw.load(there, two[0])
    assert torch.equal(logits(job.model), logits(there))
    assert (logits(there) - logits(base_of(values))).abs().max() > 0.05
    assert deltaw.configs(job.model)["default"].lora_dropout == 0.25


def test_an_adapter_is_trained_on_and_stays_one_of_the_base(
    values: dict[str, Any], two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(values, tmp_path / "run", adapter=two[0])
    assert f"method    lora: 4 x linear at r=3, going on from {two[0]}" in capsys.readouterr().out
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.25)
    now, then = load_file(run / WEIGHTS), load_file(Path(two[0], WEIGHTS))
    assert now.keys() == then.keys()
    assert all(0 < (now[name] - then[name]).abs().max() < 0.1 for name in now)
    torch.testing.assert_close(logits(in_peft(values, run)), logits(open_language(run).model))
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["values"]["loss"] < results["before"]["values"]["loss"]


def test_a_run_is_an_adapter_too(values: dict[str, Any], two: list[str], tmp_path: Path) -> None:
    run = start(values, tmp_path / "run", adapter=two[1])
    more = start(values, tmp_path / "more", adapter=str(run))
    before = json.loads((more / "results.json").read_text())["before"]
    assert before == json.loads((run / "results.json").read_text())["after"]


@pytest.mark.parametrize("new", [False, True])
def test_adapters_before_the_last_are_merged_and_saved_with_it(
    values: dict[str, Any], two: list[str], tmp_path: Path, new: bool
) -> None:
    job = job_of(values, adapter=two, create_new_adapter=new, **({"r": 5} if new else {}))
    torch.testing.assert_close(logits(job.model), logits(added(values, two)))
    moved(job.model, 3)
    continuing.save(job.model, tmp_path / "saved", job.adapted.merged)
    torch.testing.assert_close(logits(in_peft(values, tmp_path / "saved")), logits(job.model))
    loaded = base_of(values)
    deltaw.load(loaded, tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(job.model))
    rank = load_file(tmp_path / "saved" / WEIGHTS)
    ranks = {name: len(t) for name, t in rank.items() if "lora_A" in name and ".0." in name}
    q = next(r for name, r in ranks.items() if "q_proj" in name)
    assert q == (3 + 2 + 5 if new else 3 + 2)


def test_a_run_of_a_new_adapter_needs_only_the_base(
    values: dict[str, Any], two: list[str], tmp_path: Path, deltaw_command: Command
) -> None:
    more = {"adapter": two[0], "create_new_adapter": True, "init_lora_weights": "pissa", "r": 2}
    run = start(values, tmp_path / "run", **more)
    opened = open_language(run)
    torch.testing.assert_close(logits(in_peft(values, run)), logits(opened.model))
    with deltaw.disabled(opened.model):
        assert torch.equal(logits(opened.model), logits(base_of(values)))
    code, out, err = deltaw_command("eval", run)
    assert code == 0, err
    after = json.loads((run / "results.json").read_text())["after"]["values"]["loss"]
    assert f"{after:.3f}" in out
    code, _, err = deltaw_command("merge", run, tmp_path / "plain")
    assert code == 0, err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(opened.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"create_new_adapter": True}])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    values: dict[str, Any],
    two: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    own = adapter_in(tmp_path / "own", values, 5)
    more = {"adapter": [two[0], str(own)], "eval_every": 1, **more}
    whole = start(values, tmp_path / "whole", **more)
    with monkeypatch.context() as patch:
        patch.setattr(running, "restore", broken)
        with pytest.raises(KeyboardInterrupt):
            start(values, tmp_path / "run", **more)
    for path in (tmp_path / "run" / "checkpoint-2").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-2").rmdir()
    kept = (own / WEIGHTS).read_bytes()
    adapter_in(own, values, 6)
    with pytest.raises(RunError, match="the adapters that the run began with changed since"):
        start(values, tmp_path / "run", **more)
    (own / WEIGHTS).write_bytes(kept)
    run = start(values, tmp_path / "run", **more)
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_full_training_begins_with_the_adapters_merged(
    values: dict[str, Any], two: list[str], tmp_path: Path, method: str
) -> None:
    job = job_of(values, adapter=two, method=method)
    torch.testing.assert_close(logits(job.model), logits(added(values, two)))
    assert "with 2 adapters merged into the weights first" in job.adapted.said
    if method == "full":
        run = start(values, tmp_path / "run", adapter=two, method=method, learning_rate=1e-6)
        torch.testing.assert_close(
            logits(open_language(run).model), logits(job.model), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("new", [False, True])
def test_the_reference_of_preferences_is_the_model_with_its_adapters_off(
    values: dict[str, Any],
    two: list[str],
    tmp_path: Path,
    new: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(8)]
    data = str(write_json(tmp_path / "pairs.json", rows))
    more = {"data": data, "adapter": two[0], "create_new_adapter": new, "max_steps": 1}
    run = start({k: v for k, v in values.items() if k != "samples"}, tmp_path / "run", **more)
    said = "off and the given ones merged" if new else "off\n"
    assert f"the reference is the model with its adapters {said}" in capsys.readouterr().out
    before = json.loads((run / "results.json").read_text())["before"]["values"]["loss"]
    assert (abs(before - np.log(2)) < 1e-5) == new


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_rated_answers_begin_with_adapters_too(
    values: dict[str, Any],
    two: list[str],
    tmp_path: Path,
    new: bool,
    several: bool,
    deltaw_command: Command,
) -> None:
    data = str(write_json(tmp_path / "ratings.json", ratings(25)))
    more = {"data": data, "validation_share": 5, "create_new_adapter": new, "max_steps": 1}
    adapters = two if several else two[:1]
    kept = {key: value for key, value in values.items() if key != "samples"}
    run = start(kept, tmp_path / "run", adapter=adapters, **more)
    before = json.loads((run / "results.json").read_text())["before"]["values"]
    assert (before["kl"] == before["margin"] == 0 and before["auc"] == 0.5) == new
    torch.testing.assert_close(logits(in_peft(values, run)), logits(open_language(run).model))
    for flags in ([], ["--no-merge"]):
        code, out, err = deltaw_command("eval", run, *flags)
        assert code == 0 and "without the adapters that the run began with" in out, err
        *_, losses = (line.split() for line in out.splitlines() if line.startswith("loss "))
        assert losses[1] == "0.500"


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("new", [False, True])
def test_a_conversation_with_a_run_that_began_from_adapters_knows_the_base(
    values: dict[str, Any],
    two: list[str],
    tmp_path: Path,
    new: bool,
    merge: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = start(values, tmp_path / "run", adapter=two, create_new_adapter=new)
    capsys.readouterr()
    talk(["What?", "/base"], run, merge=merge)
    _, answer, base, *_ = capsys.readouterr().out.splitlines()
    opened = open_language(run)
    asked = [{"role": "user", "content": "What?"}]
    prompt = opened.template.template.render(asked, prompt=True)[0]
    assert escaped(generate(opened.speaker, [prompt], SHORT)[0]) in answer
    plain = replace(opened.speaker, model=base_of(values).eval())
    assert escaped(generate(plain, [prompt], SHORT)[0]) in base and base != answer


def test_a_packed_base_takes_one_adapter(
    values: dict[str, Any], two: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    whole = adapter_in(tmp_path / "own", values, 4, modules_to_save=["up_proj"])
    run = start(values, tmp_path / "run", adapter=str(whole), quantization_bit=4)
    opened = open_language(run)
    weights = {n: p.dtype for n, p in opened.model.named_parameters() if n.endswith("weight")}
    assert weights["model.layers.0.mlp.up_proj.weight"] == torch.float32
    assert weights["model.layers.0.mlp.gate_proj.weight"] == torch.uint8
    before = json.loads((run / "results.json").read_text())["before"]["values"]["loss"]
    plain = job_of(values, adapter=str(whole)).score()
    assert plain is not None and before == pytest.approx(plain.values["loss"], abs=0.3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"r": 4}, "r=4 has no effect with adapter, whose own settings hold"),
        ({"target_modules": ["q_proj"], "lora_alpha": 3}, "lora_alpha=3.0 has no effect with ada"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] has no effect"),
        ({"method": "bitfit"}, "adapter=.* has no effect with method=bitfit, only with lora or"),
        ({"adapter": None, "create_new_adapter": True}, "no effect without adapter"),
        ({"adapter": []}, "adapter=.*at least 1"),
        ({"adapter": ["a", "b"], "quantization_bit": 4}, "quantization_bit does not go with adap"),
        (
            {"create_new_adapter": True, "absorb": True, "init_lora_weights": "pissa"},
            "absorb does not go with adapters that are merged first",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_said(
    values: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(values | {"adapter": "there"} | more)


def test_what_is_no_adapter_of_the_model_is_said_before_training(
    values: dict[str, Any], two: list[str], tmp_path: Path, deltaw_command: Command
) -> None:
    (tmp_path / "empty").mkdir()
    files = values["model"], values["data"], f"--output={tmp_path / 'run'}"
    bad = f"adapter=[{tmp_path / 'absent'}, {tmp_path / 'empty'}, {two[0]}]"
    for command in (("train", "--dry-run"), ("check",), ("train",)):
        given = files if command[0] == "train" else files[:2]
        code, _, err = deltaw_command(*command, *given, bad)
        assert code == 1 and "There is no adapter at" in err and "is no adapter in a known" in err
        assert str(two[0]) not in err and err.count("Fix:") == 1
    other = make_model(tmp_path / "model", positions=64)
    config = json.loads((other / "config.json").read_text())
    wide = AutoModelForCausalLM.from_config(
        type(base_of(values).config)(**{**config, "intermediate_size": 32})
    )
    deltaw.attach(wide, deltaw.LoraConfig(target_modules=["down_proj", "q_proj"]))
    deltaw.save(wide, tmp_path / "wide")
    for command in (("train", "--dry-run"), ("train",)):
        code, _, err = deltaw_command(*command, *files, f"adapter={tmp_path / 'wide'}")
        assert code == 1 and err.count("down_proj") == 2 and str(tmp_path / "wide") in err
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    with pytest.raises(FormatError, match="other weights"):
        job_of(values | {"model": str(moved_base(values, tmp_path / "moved"))}, adapter=two[0])


def moved_base(values: dict[str, Any], folder: Path) -> Path:
    """The same model with other weights."""
    make_model(folder)
    model = base_of(values)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.1
    model.save_pretrained(folder)
    return folder


def test_adapters_that_cannot_be_saved_as_one_are_refused(
    values: dict[str, Any], two: list[str], tmp_path: Path
) -> None:
    turned = adapter_in(tmp_path / "dora", values, 7, use_dora=True)
    with pytest.raises(RunError, match=r"cannot be saved with it as one:\n[^$]*DoRA") as caught:
        job_of(values, adapter=[str(turned), two[0]])
    assert "deltaw export RUN OUT --to hf" in str(caught.value)
    job = job_of(values, adapter=str(turned))
    there = base_of(values)
    deltaw.load(there, turned)
    assert torch.equal(logits(job.model), logits(there))


def test_a_run_never_overwrites_its_adapter(
    values: dict[str, Any], two: list[str], tmp_path: Path
) -> None:
    run = start(values, tmp_path / "run", adapter=two[0])
    with pytest.raises(RunError, match=r"what it is made from lies in there:\n.*adapter"):
        train(parse(values | {"adapter": str(run), "output": str(run)}), overwrite=True)
    assert (run / WEIGHTS).is_file()


def test_a_file_of_llama_factory_goes_on_too(
    values: dict[str, Any], two: list[str], tmp_path: Path, deltaw_command: Command
) -> None:
    file = tmp_path / "factory.yaml"
    lines = {
        "model_name_or_path": values["model"],
        "adapter_name_or_path": ",".join(two),
        "dataset": values["data"],
        "dataset_dir": "ONLINE",
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_rank": 64,
        "max_steps": 2,
        "output_dir": tmp_path / "run",
    }
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    code, out, _ = deltaw_command("train", file, "--dry-run")
    assert code == 0 and "lora_rank: without effect" in out
    assert f"4 x linear at r=2, going on from {two[1]}" in out
    code, out, _ = deltaw_command("train", file, "--dry-run", "create_new_adapter=true")
    assert code == 0 and "14 x linear at r=64" in out and "with 2 adapters merged" in out


def test_a_classifier_goes_on_with_its_head(
    tiny: Path, tmp_path: Path, deltaw_command: Command
) -> None:
    files = tiny / "model", tiny / "data.csv", "--max-steps", "2"
    code, _, err = deltaw_command("train", *files, "-o", tmp_path / "one", "--r", "3")
    assert code == 0, err
    code, out, err = deltaw_command(
        "train", *files, "-o", tmp_path / "two", f"adapter={tmp_path / 'one'}"
    )
    assert code == 0 and "at r=3, going on from" in out, err
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    assert results[1]["before"] == results[0]["after"]
    assert deltaw_command("eval", tmp_path / "two")[0] == 0
    code, _, err = deltaw_command(
        "train",
        *files,
        "-o",
        tmp_path / "no",
        f"adapter={tmp_path / 'one'}",
        "--r",
        "3",
        "create_new_adapter=true",
    )
    assert code == 1 and "cannot be saved with it as one" in err
