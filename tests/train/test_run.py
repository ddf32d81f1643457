"""Runs: what each method writes, who may write where, and what stops a run."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tests.train.models import events, make_model, messages, write_csv
from transformers import TrainingArguments

import deltaw
from deltaw.errors import DataError, DeltawError, RunError
from deltaw.train import prepare as job
from deltaw.train import run as running
from deltaw.train import staging
from deltaw.train.data import wording
from deltaw.train.export import merge_run
from deltaw.train.interrupt import Interrupt
from deltaw.train.loop import CHECKPOINTING, arguments
from deltaw.train.opened import open_run
from deltaw.train.rates import Shape, planned
from deltaw.train.reading import read
from deltaw.train.recipe import load, parse
from deltaw.train.run import train
from deltaw.train.runfolder import RunFolder, read_recipe, read_results

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def values(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny / "model"),
        "data": str(tiny / "data.csv"),
        "output": str(tmp_path / "run"),
        "max_steps": 4,
        "eval_every": 2,
        "learning_rate": 0.01,
    }


def start(values: dict[str, Any], **more: Any) -> Path:
    options = {key: more.pop(key) for key in ("overwrite", "dry_run") if key in more}
    return train(parse(values | more), silent=True, **options)


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_does_not(
    values: dict[str, Any], tmp_path: Path
) -> None:
    first = start(values)
    torch.rand(7)
    again = start(values, output=str(tmp_path / "again"))
    other = start(values, output=str(tmp_path / "other"), seed=1)
    assert (first / ADAPTER).read_bytes() == (again / ADAPTER).read_bytes()
    assert (first / ADAPTER).read_bytes() != (other / ADAPTER).read_bytes()


@pytest.mark.parametrize("method", ["head", "bitfit"])
def test_head_and_bitfit_are_adapters_without_a_low_rank(
    values: dict[str, Any], method: str
) -> None:
    run = start(values, method=method)
    names = set(safetensors.torch.load_file(run / ADAPTER))
    assert not any("lora" in name for name in names)
    assert any("classifier" in name for name in names)
    assert any(name.endswith("dense.bias") for name in names) == (method == "bitfit")
    assert read_results(run)["trainable_parameters"] == (51 if method == "head" else 355)
    open_run(run)


def test_tuning_of_normalisations_moves_them_and_the_head_alone(values: dict[str, Any]) -> None:
    run = start(values, method="layernorm")
    tensors = safetensors.torch.load_file(run / ADAPTER)
    assert {name.split(".")[-2] for name in tensors} == {"LayerNorm", "classifier"}
    base = transformers.AutoModel.from_pretrained(values["model"]).state_dict()
    norms = {name for name in base if "LayerNorm" in name}
    kept = {name.removeprefix("base_model.model.bert."): tensors[name] for name in tensors}
    assert norms == kept.keys() & base.keys()
    assert any(not torch.equal(base[name], kept[name]) for name in norms)
    assert read_results(run)["trainable_parameters"] == 51 + sum(base[n].numel() for n in norms)
    open_run(run)


def test_one_split_for_all_seeds_where_it_has_a_seed_of_its_own(values: dict[str, Any]) -> None:
    held = {
        (seed, split): read(parse(values | {"seed": seed, "split_seed": split})).validation
        for seed in (0, 1)
        for split in (None, 0, 1)
    }
    assert held[0, 0] == held[1, 0] == held[0, None] != held[1, None] == held[0, 1] == held[1, 1]


def test_only_the_scores_that_are_asked_for_are_taken(values: dict[str, Any]) -> None:
    run = train(parse(values), silent=True, scored=())
    found = read_results(run)
    assert found["before"] is None and found["after"] is None
    assert found["best_validation"] is not None and 0 < found["seconds_per_step"] < 60


def test_full_fine_tuning_writes_a_plain_model(values: dict[str, Any]) -> None:
    run = start(values, method="full")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run)
    base = transformers.AutoModel.from_pretrained(values["model"])
    assert not torch.equal(
        model.bert.embeddings.word_embeddings.weight, base.embeddings.word_embeddings.weight
    )
    assert not (run / ADAPTER).exists()
    opened = open_run(run)
    for name, tensor in opened.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_freeze_moves_the_last_blocks_and_the_head_alone(values: dict[str, Any]) -> None:
    run = start(values, method="freeze", last_layers=1)
    after = transformers.AutoModelForSequenceClassification.from_pretrained(run).bert.state_dict()
    before = transformers.AutoModel.from_pretrained(values["model"]).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("encoder.layer.1.", "pooler.")) for name in moved)


def test_the_base_is_untouched_and_no_checkpoint_holds_it(values: dict[str, Any]) -> None:
    run = start(values)
    names = safetensors.torch.load_file(run / ADAPTER)
    assert not any("embeddings" in name for name in names)
    size = sum(t.numel() for t in names.values())
    assert size == read_results(run)["trainable_parameters"]


def test_a_pair_and_real_labels_make_a_regression(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"sentence1": text, "sentence2": text[::-1], "score": len(text) / 7}
        for text, _ in messages(40)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = start(values, data=str(data), gradient_accumulation=2, batch_size=4)
    results = read_results(run)
    assert set(results["after"]["values"]) == {"pearson", "spearman"}
    opened = open_run(run)
    assert (opened.task, opened.labels) == ("regression", ())
    assert opened.model.config.num_labels == 1


def test_accumulated_steps_equal_one_large_batch(values: dict[str, Any], tmp_path: Path) -> None:
    plain = make_model(tmp_path / "model", dropout=0)
    values = values | {"model": str(plain), "group_by_length": False, "validation_share": 0}
    runs = [
        start(values, output=str(tmp_path / f"{rows}"), batch_size=rows, gradient_accumulation=n)
        for rows, n in ((16, 1), (4, 4))
    ]
    one, four = ([e["loss"] for e in events(run) if "loss" in e] for run in runs)
    assert len(one) == 4
    assert one == pytest.approx(four, abs=1e-5)


def test_a_finished_run_is_refused_then_overwritten(values: dict[str, Any]) -> None:
    run = start(values)
    before = (run / ADAPTER).read_bytes()
    with pytest.raises(RunError, match="holds a finished run"):
        start(values)
    with pytest.raises(DeltawError):
        start(values, overwrite=True, target_modules=["nope"])
    assert (run / ADAPTER).read_bytes() == before, "a recipe that cannot run deleted a run"
    start(values, overwrite=True, seed=5)
    assert (run / ADAPTER).read_bytes() != before


def interrupted(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that broke after its first checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(running, "restore", _broken)
        with pytest.raises(KeyboardInterrupt):
            start(values)
    return Path(values["output"])


def _broken(*_: object) -> None:
    raise KeyboardInterrupt


def test_resuming_from_another_recipe_or_other_data_is_refused(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = write_csv(tmp_path / "data.csv", messages(60))
    values = values | {"data": str(data)}
    run = interrupted(values, monkeypatch)
    left = sorted(path.name for path in run.iterdir())
    with pytest.raises(RunError) as caught:
        start(values, r=4, seed=3)
    assert "r was 8, is now 4" in str(caught.value)
    assert "seed was 0, is now 3" in str(caught.value)
    write_csv(data, messages(61)[1:])
    with pytest.raises(RunError, match="the data changed"):
        start(values)
    write_csv(data, messages(60))
    assert sorted(path.name for path in run.iterdir()) == left
    start(values)
    assert read_results(run)


class Rude:
    """An object that would run code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:70]),
    "rude": lambda file: torch.save(Rude(), file),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_error_and_the_run_goes_on_without_it(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    whole = start(values, output=str(tmp_path / "whole"))
    run = interrupted(values, monkeypatch)
    shutil.rmtree(run / "checkpoint-4")
    intact = shutil.copytree(run / "checkpoint-2", tmp_path / "intact")
    for file in FILES:
        shutil.copytree(intact, run / "checkpoint-2", dirs_exist_ok=True)
        DAMAGES[damage](run / "checkpoint-2" / file)
        with pytest.raises(RunError, match=r"checkpoint-2 (lacks|is damaged)") as caught:
            start(values)
        assert "Fix: delete this checkpoint and any newer one" in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert damage != "missing" or file in str(caught.value)
    assert not Path("ran").exists()
    shutil.rmtree(run / "checkpoint-2")
    start(values)
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


FILES = (
    "trained.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def test_a_second_process_is_refused_and_a_stale_lock_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder(path), pytest.raises(RunError, match=f"process .id {os.getpid()}. writes to"):
        RunFolder(path).__enter__()
    path.mkdir()
    (path / ".lock").write_text("4242")
    with RunFolder(path) as folder:
        assert not folder.started


def test_a_folder_with_other_files_is_refused_and_left_alone(values: dict[str, Any]) -> None:
    folder = Path(values["output"])
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"other files .thesis\.txt."):
            start(values, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_an_output_that_cannot_be_written_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        start(values, output=str(tmp_path / "file" / "run"))


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(values["output"])
    real = torch.save

    def full(what: object, path: str, *rest: object) -> None:
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(what, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunError, match=r"checkpoint-4 cannot be written: No space left"):
            start(values)
    assert [path.name for path in run.glob("*checkpoint*")] == ["checkpoint-2"]
    start(values)
    assert read_results(run)


def test_a_full_disk_while_saving_the_adapter_leaves_no_half_adapter(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(deltaw, "save", full)
        with pytest.raises(RunError, match="No space left"):
            start(values)
    run = Path(values["output"])
    assert not (run / ADAPTER).exists()
    assert not list(run.glob(f"{staging.PARTIAL}*"))
    start(values)


def test_a_full_disk_while_saving_the_tokenizer_is_one_error(
    values: dict[str, Any], finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise Exception("File too large (os error 27)")  # as tokenizers does

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(RunError, match=r"cannot be written: .*File too large"):
            start(values)
        with pytest.raises(RunError, match=r"cannot be written: .*File too large"):
            merge_run(finished, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    assert not (Path(values["output"]) / ADAPTER).exists()
    start(values)


def test_a_loss_that_is_no_number_stops_the_run(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = job.loss

    def third_is_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        if torch.is_grad_enabled():
            calls += 1
        return real(*args, **kwargs) * (float("nan") if calls == 3 else 1.0)

    monkeypatch.setattr(job, "loss", third_is_nan)
    with pytest.raises(RunError) as caught:
        start(values)
    message = str(caught.value)
    assert "The loss became nan in step 3" in message
    assert "checkpoint-2" in message
    assert "a third of the learning rate (0.003)" in message
    kept = safetensors.torch.load_file(
        Path(values["output"]) / "checkpoint-2" / "trained.safetensors"
    )
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in kept.values())


@pytest.mark.parametrize("share", [0.1, 0])
def test_weights_ruined_by_the_last_step_are_not_saved(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", _ruin)
    with pytest.raises(RunError, match="became nan in step 1\\.\nThe run was stopped") as caught:
        start(values, validation_share=share, max_steps=1, max_grad_norm=0)
    assert "or max_grad_norm=1, with --overwrite" in str(caught.value)
    assert not list(Path(values["output"]).glob("checkpoint-*"))
    assert not read_results(Path(values["output"]))
    assert "NaN" not in (Path(values["output"]) / "log.jsonl").read_text("utf-8")


def _ruin(optimizer: torch.optim.Optimizer, *_: object) -> None:
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].fill_(float("nan"))


@pytest.mark.parametrize("setting", ["bf16", "gradient_checkpointing"])
def test_settings_of_the_trainer_are_handed_on(values: dict[str, Any], setting: str) -> None:
    recipe = parse(values | {setting: True})
    plan = planned(recipe, 16, Shape(16, "bert", causal=False), "accuracy")
    args = arguments(TrainingArguments, recipe, Path(values["output"]), plan, None)
    assert getattr(args, CHECKPOINTING if setting == "gradient_checkpointing" else setting) is True
    plain = start(values, validation_share=0)
    other = start(values | {setting: True}, output=values["output"] + "2", validation_share=0)
    losses = [[e["loss"] for e in events(run) if "loss" in e] for run in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-2 if setting == "bf16" else 1e-5)
    assert (losses[0] == losses[1]) == (setting != "bf16")


def test_early_stopping_ends_before_the_last_step(values: dict[str, Any]) -> None:
    run = start(values, max_steps=40, eval_every=1, early_stopping=2, learning_rate=1e-7)
    evaluated = [e["step"] for e in events(run) if "eval_accuracy" in e]
    assert evaluated[-1] < 40


def test_the_recipe_beside_the_adapter_says_everything(values: dict[str, Any]) -> None:
    run = start(values, trust_remote_code=True)
    text = (run / "recipe.yaml").read_text("utf-8")
    assert "trust_remote_code" not in text
    recipe = read_recipe(run)
    assert recipe.record is not None
    assert recipe.record["labels"] == ["cancel", "refund", "ship"]
    assert set(recipe.record["data"]) == {"data.csv"}
    assert recipe.record["versions"]["torch"] == version("torch")
    assert recipe.record["before"]["values"] == read_results(run)["before"]["values"]
    assert read(recipe).labels == ("cancel", "refund", "ship")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_models_size_is_that_of_the_base(values: dict[str, Any], method: str) -> None:
    run = start(values, method=method)
    base = open_run(run).model
    if method == "lora":
        deltaw.detach(base)
    size = sum(p.numel() * p.element_size() for p in base.parameters())
    assert read_results(run)["model_bytes"] == size
    assert f" {wording.size(size)} in float32" in json.dumps(events(run))


def test_a_runs_own_recipe_gives_the_same_run(tiny: Path, tmp_path: Path) -> None:
    """Nothing but model, data and length was asked for, so that all else is chosen."""
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.csv"), "epochs": 1}
    first = train(parse(values | {"output": str(tmp_path / "first")}), silent=True)
    again = train(load(first / "recipe.yaml", [f"output={tmp_path / 'again'}"]), silent=True)
    assert (first / ADAPTER).read_bytes() == (again / ADAPTER).read_bytes()
    recipes = [read_recipe(run).model_dump(exclude={"output"}) for run in (first, again)]
    assert recipes[0] == recipes[1]
    assert recipes[0]["learning_rate"] is not None


def test_training_without_held_out_rows_takes_the_last_state(values: dict[str, Any]) -> None:
    run = start(values, validation_share=0)
    assert read_results(run)["after"] is None


def test_bad_data_leaves_no_folder(values: dict[str, Any], tmp_path: Path) -> None:
    one_class = write_csv(tmp_path / "one.csv", [("a b c", "x"), ("d e f", "x")])
    with pytest.raises(DataError):
        start(values, data=str(one_class))
    assert not Path(values["output"]).exists()


def test_adapters_are_tried_on_the_shortest_rows_and_no_more_than_a_batch(
    tiny: Path, tmp_path: Path
) -> None:
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.csv"), "batch_size": 3}
    made = job.prepare(parse(values), job.Console(silent=True))
    lengths = sorted(len(row["input_ids"]) for row in made.train)
    with Interrupt() as interrupt:
        bar = running.make_progress(made, job.Console(silent=True))
        trainer = made.trainer(tmp_path, interrupt, bar)
    assert made.probe(trainer)["input_ids"].shape == (3, lengths[2])
