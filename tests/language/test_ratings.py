"""Kahneman-Tversky optimisation: rated answers, their loss, and training against the base."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.language.models import COLOURS, write_json
from tests.language.test_preferences import encoder
from tests.language.tokenizers_ import byte_level
from tests.train.conftest import Command
from transformers import AutoModelForCausalLM

from deltaw.errors import ConfigError, DataError
from deltaw.language.choosing import settle, train
from deltaw.language.data.samples import Message, Rated
from deltaw.language.training.rating import RatingJob, prepare, unbalanced
from deltaw.language.training.ratings import Ratings, encode, score
from deltaw.train import run as running
from deltaw.train.console import Console
from deltaw.train.interrupt import Interrupt
from deltaw.train.recipe import Recipe, parse
from deltaw.train.run import make_progress

ADAPTER = "adapter_model.safetensors"


def ratings(rows: int) -> list[dict[str, Any]]:
    """Prompts with a good or a bad answer, three good ones to two bad ones."""
    things = list(COLOURS)
    return [
        {
            "prompt": f"The colour of the {things[n % 5]} number {n}? ",
            "completion": f"It is {COLOURS[things[n % 5]]}." if n % 5 < 3 else "No idea at all.",
            "label": n % 5 < 3,
        }
        for n in range(rows)
    ]


@pytest.fixture(scope="module")
def values(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = write_json(tmp_path_factory.mktemp("ratings") / "ratings.json", ratings(25))
    return {
        "model": str(talker / "model"),
        "data": str(data),
        "max_steps": 6,
        "eval_every": 3,
        "validation_share": 5,
        "batch_size": 6,
        "learning_rate": 2e-2,
        "pref_beta": 0.3,
    }


def job_of(values: dict[str, Any]) -> RatingJob:
    return prepare(settle(parse(values)), Console(silent=True))


def batches(recipe: Recipe, job: RatingJob, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The trainer of a job, and what it is given in its first epoch."""
    with Interrupt() as interrupt:
        trainer = job.trainer(folder, interrupt, make_progress(job, Console(silent=True)))
    return trainer, list(trainer.get_train_dataloader())


def exact(folder: str, adapted: torch.nn.Module | None = None) -> torch.nn.Module:
    """The base in float64, with W + 2 B A of the adapted model where there is one."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    factors = {} if adapted is None else dict(adapted.named_parameters())
    for name, B in factors.items():
        if name.endswith("lora_B"):
            A = factors[name.replace("lora_B", "lora_A")]
            weight = model.get_submodule(name.split(".adapter.")[0]).weight
            weight.data += 2 * B.detach().double() @ A.detach().double()
    return model


def log_p(model: torch.nn.Module, ids: list[int], begin: int) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logits[n - 1, ids[n]] for n in range(begin, len(ids))))


@pytest.mark.parametrize(("seed", "above"), [(1, False), (6, True)])
def test_the_loss_is_the_papers(
    values: dict[str, Any], tmp_path: Path, seed: int, above: bool
) -> None:
    """Against float64 from plain logits, the batch's own answers one place on as mismatches."""
    more = {"kto_chosen_weight": 1.5, "kto_rejected_weight": 0.7, "validation_share": 1}
    job = job_of(values | more)
    trainer, epoch = batches(job.recipe, job, tmp_path)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    base, own = exact(values["model"]), exact(values["model"], trainer.model)
    baselines = []
    for batch in epoch:
        masks = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        rows = [ids[mask.bool()].tolist() for ids, mask in masks]
        starts = [int(mask.int().argmax()) for mask in batch["completion_mask"]]
        lent = [rows[n - 1][starts[n - 1] :] for n in range(len(rows))]
        others = [row[:at] + tail for row, at, tail in zip(rows, starts, lent, strict=True)]

        def gains(which: list[list[int]], starts: list[int] = starts) -> list[float]:
            rows = zip(which, starts, strict=True)
            return [log_p(own, ids, at) - log_p(base, ids, at) for ids, at in rows]

        z = max(0.0, sum(gains(others)) / len(others))
        baselines.append(z)
        each = [
            1.5 / (1 + math.exp(0.3 * (g - z))) if good else 0.7 / (1 + math.exp(0.3 * (z - g)))
            for g, good in zip(gains(rows), batch["label"].tolist(), strict=True)
        ]
        found = trainer.compute_loss(trainer.model, batch).detach()
        assert float(found) == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert any(baselines) == above


def test_a_batch_stays_and_its_order_is_new_in_every_epoch(
    values: dict[str, Any], tmp_path: Path
) -> None:
    job = job_of(values | {"validation_share": 0, "batch_size": 4})
    trainer, first = batches(job.recipe, job, tmp_path)
    trainer.order()
    loader = trainer.get_train_dataloader()
    loader.set_epoch(1)
    second = list(loader)

    def contents(epoch: list[dict[str, Any]]) -> list[tuple[tuple[int, ...], ...]]:
        return [tuple(tuple(row.tolist()) for row in batch["input_ids"]) for batch in epoch]

    assert [len(batch["label"]) for batch in first] == [4] * 6 + [1]
    assert sorted(contents(first)) == sorted(contents(second)) != contents(second)
    lengths = [batch["input_ids"].shape[1] for batch in first]
    assert lengths[0] == max(lengths)


def rated(prompt: str, answer: str, good: bool = True) -> Rated:
    return Rated((Message("user", prompt),), (Message("assistant", answer),), good, "f", 1)


def lent(found: Ratings) -> list[list[int]]:
    """The answers at the mismatched prompts."""
    prompts = [len(answer.prompt) for answer in found.answers]
    return [row.input_ids[n:] for row, n in zip(found.mismatched(), prompts, strict=True)]


def test_mismatches_are_answers_to_other_prompts() -> None:
    made = encoder(byte_level())
    samples = [rated("a?", "one"), rated("a?", "two"), rated("b?", "three"), rated("c?", "four")]
    found = encode(made, samples)
    own = [answer.completion for answer in found.answers]
    assert lent(found) == [own[3], own[3], own[1], own[2]]
    found.size = 3
    assert lent(found) == [own[2], own[2], own[1], own[2]]
    for row, answer in zip(found.mismatched(), found.answers, strict=True):
        assert row.learnt == len(row.input_ids) - len(answer.prompt)
    alone = encode(made, samples[:1])
    assert lent(alone) == own[:1]
    assert score(np.array([[0.5, 0.5]]), np.array([True]), 1.0).values == {
        "loss": pytest.approx(1 / (1 + math.exp(0.5))),
        "kl": 0.0,
    }
    same = encode(made, samples[:2])
    assert lent(same) == [own[1], own[0]]


def test_what_does_not_fit_is_cut_or_skipped() -> None:
    tokenizer = byte_level()
    room = len(encode(encoder(tokenizer), [rated("a?", "one")]).answers[0].row.input_ids)
    found = encode(encoder(tokenizer, room), [rated("a?", "one"), rated("b?", "Coal." * 9)])
    assert found.cut == 1 and all(len(a.row.input_ids) == room for a in found.answers)
    assert all(len(row.input_ids) <= room for row in found.mismatched())
    dropping = replace(encoder(tokenizer, room), too_long="drop")
    left = encode(dropping, [rated("a?", "one"), rated("b?", "Coal." * 9)])
    assert (len(left), left.cut, len(left.skipped)) == (1, 0, 1)
    with pytest.raises(ConfigError, match="too_long=split: an answer is judged as a whole"):
        encode(replace(dropping, too_long="split"), [rated("a?", "one")])
    found = encode(encoder(tokenizer, 10), [rated("a?", "one")])
    assert not len(found) and "10 fit, and the answer lies beyond" in str(found.skipped[0])


def test_scores_of_gains() -> None:
    gained = np.array([[2.0, 0.5], [-1.0, 1.5], [0.5, -0.5], [0.5, 0.5]])
    good = np.array([True, True, False, False])
    found = score(gained, good, 0.5, (2.0, 1.0))
    sides = [2 / (1 + math.exp(0.75)), 2 / (1 + math.exp(-0.75)), *[1 / (1 + math.exp(0.0))] * 2]
    assert found.values["kl"] == 0.5
    assert found.values["loss"] == pytest.approx(np.mean(sides))
    assert found.values["auc"] == 0.5
    assert found.values["margin"] == pytest.approx(0.5 * (0.5 - 0.5))
    for name, (low, high) in found.intervals.items():
        assert low <= found.values[name] <= high
    assert found.intervals["auc"] == (0.0, 1.0)
    better = score(np.array([[1.0, -3.0], [0.0, 1.0]]), np.array([True, False]), 1.0)
    assert (better.values["auc"], better.values["margin"], better.values["kl"]) == (1.0, 1.0, 0.0)


def test_a_run_learns_which_answers_are_good(
    values: dict[str, Any],
    tmp_path: Path,
    deltaw_command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("hash_module", "create_model_from_path"):  # the base is neither read nor loaded
        monkeypatch.delattr(f"trl.trainer.kto_trainer.{name}")
    folder = tmp_path / "run"
    data = {k: v for k, v in values.items() if k not in ("model", "data")}
    words = [f"{key}={value}" for key, value in data.items()]
    code, out, err = deltaw_command("train", values["model"], values["data"], *words, "-o", folder)
    assert (code, err) == (0, "")
    assert "20 answers, 13 good and 7 bad; the reference is the model with its adapters off" in out
    assert "verify    passed" in out and "good" in out
    assert "all good ones together weigh 1.86 times as much as all bad ones" in out
    assert "Fix: kto_rejected_weight between 1.39 and 1.86" in " ".join(out.split())
    results = json.loads((folder / "results.json").read_text())
    before, after = results["before"]["values"], results["after"]["values"]
    assert before == {"loss": 0.5, "kl": 0.0, "auc": 0.5, "margin": 0.0}
    assert after["loss"] < 0.48 and after["auc"] == 1.0 and after["margin"] > 0.1
    for step in (0, 3, 6):
        assert out.count(f"step     {step}  answer  ") == 1
    assert "wanted  It is " in out, "what is wanted is a good answer"
    recipe = (folder / "recipe.yaml").read_text()
    assert "task: kto" in recipe and "pref_beta: 0.3" in recipe


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    more = values | {"eval_every": 1, "max_steps": 2, "validation_share": 0, "batch_size": 16}
    whole = train(parse(more | {"output": str(tmp_path / "whole")}))
    with monkeypatch.context() as patch:
        patch.setattr(running, "restore", broken)
        with pytest.raises(KeyboardInterrupt):
            train(parse(more | {"output": str(tmp_path / "run")}))
    for path in (tmp_path / "run" / "checkpoint-2").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-2").rmdir()
    run = train(parse(more | {"output": str(tmp_path / "run")}))
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("more", "good", "bad", "fix"),
    [
        ({}, 10, 10, None),
        ({}, 4, 3, None),
        ({}, 1, 10, "kto_chosen_weight between 10 and 13.3"),
        ({}, 10, 1, "kto_rejected_weight between 7.5 and 10"),
        ({"kto_chosen_weight": 10}, 1, 10, None),
        ({"kto_rejected_weight": 7.5}, 10, 1, None),
        ({"kto_rejected_weight": 7}, 10, 1, "kto_rejected_weight between 7.5 and 10"),
        ({"kto_chosen_weight": 2, "kto_rejected_weight": 2}, 5, 10, "weight between 4 and 5.33"),
    ],
)
def test_unbalanced_answers_are_said(
    more: dict[str, float], good: int, bad: int, fix: str | None
) -> None:
    recipe = parse({"model": "m", "data": "d", "task": "kto"} | more)
    found = unbalanced(recipe, good, bad)
    assert (found == []) if fix is None else found[0].endswith(fix)
    if fix is not None:  # what is advised is in order
        key, _, low, _, high = found[0].split("Fix: ")[1].split()
        for value in (float(low) * 1.01, float(high) * 0.99):
            assert not unbalanced(recipe.model_copy(update={key: value}), good, bad)


def test_pairs_are_good_and_bad_answers_too(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}? ", "chosen": f"Yes {n}.", "rejected": "No."} for n in range(6)]
    data = str(write_json(tmp_path / "pairs.json", rows))  # type: ignore[arg-type]
    job = job_of(values | {"data": data, "task": "kto", "validation_share": 0})
    judged = job.train.judged
    assert isinstance(judged, Ratings)
    assert job.counted == ("answers", "12 answers, 6 good and 6 bad")
    for answer, row in zip(judged.answers, judged.mismatched(), strict=True):
        assert row.input_ids[: len(answer.prompt)] == answer.prompt
    assert not job.warnings


def test_what_rated_answers_cannot_do_is_said(
    values: dict[str, Any], talker: Path, tmp_path: Path
) -> None:
    assert settle(parse({k: v for k, v in values.items() if k != "pref_beta"})).task == "kto"
    rated = {"prompt": "prompt", "response": "completion", "kto_tag": "label"}
    assert settle(parse(values | {"columns": rated})).task == "kto"
    with pytest.raises(ConfigError, match=r"batch_size=1: task=kto .*\n.*Fix: give 2 or more"):
        train(parse(values | {"batch_size": 1, "output": "x"}))
    asked = {"data": str(talker / "data.json"), "output": "x", "kto_chosen_weight": 2}
    with pytest.raises(DataError, match="task=kto learns from answers called good or bad"):
        train(parse(values | asked))
    with pytest.raises(DataError, match=r"task=dpo learns .*\n.*\n?.*task=kto"):
        train(parse(values | {"task": "dpo", "output": "x"}))
    with pytest.raises(DataError, match=r"(?s)task=sft learns answers as they are.*task=kto"):
        train(parse({k: v for k, v in values.items() if k != "pref_beta"} | {"task": "sft"}))
    with pytest.raises(ConfigError, match=r"metric=accuracy is no score of task=kto.\nFix: choose"):
        train(parse(values | {"metric": "accuracy", "output": "x"}))
    for good, word in ((True, "good"), (False, "bad")):
        rows = [row | {"label": good} for row in ratings(5)]
        data = str(write_json(tmp_path / "one.json", rows))
        more = {"data": data, "output": "x", "init_lora_weights": "eva", "validation_share": 1}
        with pytest.raises(DataError, match=f"All 4 training answers are {word}, and task=kto"):
            train(parse(values | more))
    with pytest.raises(ConfigError, match="reads past an adapter on the output head"):
        train(parse(values | {"target_modules": ["lm_head"], "output": "x"}))
    with pytest.raises(ConfigError, match=r"pref_loss='ipo' has no effect with task=kto"):
        parse(values | {"task": "kto", "pref_loss": "ipo"})
    with pytest.raises(ConfigError, match=r"kto_chosen_weight=2.0 has no effect with task=dpo"):
        parse(values | {"task": "dpo", "kto_chosen_weight": 2})
