"""`deltaw check`: the receipt of the run, its own first steps, and no file left behind."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.language.models import conversations, make_model, write_json
from tests.language.rows import write_rows
from tests.train.conftest import Command

from deltaw.analysis.memory import Machine
from deltaw.errors import DivergedError
from deltaw.language import scores
from deltaw.language.encoding.batches import Padding
from deltaw.language.memory import weighing
from deltaw.language.report.checking import check as run_check
from deltaw.language.training.capacity import Capacity
from deltaw.language.training.capacity import shown as bits
from deltaw.language.training.prepare import prepare
from deltaw.train.console import Console
from deltaw.train.probing import Probed
from deltaw.train.recipe import parse


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose free memory does not change, and no table of methods, which takes time."""
    monkeypatch.setattr(weighing, "available", lambda _: Machine(10**12, 10**12))
    monkeypatch.setattr(weighing, "compare", weighing.weigh)


def losses(log: Path) -> list[float]:
    events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [event["loss"] for event in events if event["event"] == "step" and "loss" in event]


def test_its_numbers_are_those_of_the_run_and_nothing_is_written(
    deltaw_command: Command, talker: Path, here: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in talker.rglob("*")}
    words = (
        *(talker / "model", talker / "data.json", "batch_size=4", "max_steps=6"),
        *("learning_rate=0.1", "lora_dropout=0.5", "eval_every=1"),
    )
    code, out, err = deltaw_command("check", *words)
    assert (code, err) == (0, "")
    assert not list(here.iterdir())
    assert {path: path.stat().st_mtime_ns for path in talker.rglob("*")} == before
    code, trained, _ = deltaw_command("train", *words)
    assert code == 0
    receipt = out[: out.index("\nfolder ")]
    assert trained.startswith(receipt) and "verify    passed" in receipt
    (log,) = here.glob("runs/*/log.jsonl")
    first = ", ".join(f"{loss:.3f}" for loss in losses(log)[:3])
    assert f"first     loss {first} in the first steps, as the run will have them" in out
    assert "ends      21 of 22 rows end with <eos>, which is learnt; the others are cut" in out
    assert "<eos> pads as well, which does no harm here" in out
    assert "nothing was written" in out and "examples/s" not in out


def test_the_bases_loss_is_that_before_training(
    deltaw_command: Command, talker: Path, here: Path
) -> None:
    words = (talker / "model", talker / "data.json", "max_steps=2", "learning_rate=0.1")
    code, out, _ = deltaw_command("check", *words)
    assert code == 0
    recipe = parse({"model": str(words[0]), "data": str(words[1]), "task": "sft", "method": "full"})
    job = prepare(recipe, Console(silent=True))
    found = scores.measured(job.model, job.train, Padding(job.tokenizer.pad_token_id)).sum(0)
    assert f"base      loss {found[0] / found[1]:.3f} per learnt token before training" in out
    assert "on 22 training rows" in out


def test_too_little_room_is_a_warning_with_a_rank_that_has_it(
    deltaw_command: Command, talker: Path, here: Path
) -> None:
    words = ("check", talker / "model", talker / "data.json", "batch_size=4")
    _, small, _ = deltaw_command(*words, "r=1", 'target_modules=["q_proj"]')
    assert "warning   r=1 cannot hold all that the answers say" in small
    assert "Fix: adapt more layers, or method=full: no rank has so much room here" in small
    _, some, _ = deltaw_command(*words, "r=1")
    advised = int(some.split("Fix: r=")[1].split(",")[0])
    _, half, _ = deltaw_command(*words, f"r={advised // 2}")
    assert f"r={advised // 2} cannot hold" in half
    _, large, _ = deltaw_command(*words, f"r={advised}")
    assert "cannot hold" not in large and "capacity  the answers hold " in large
    _, full, _ = deltaw_command(*words, "method=full")
    assert "capacity" not in full
    _, short, _ = deltaw_command(*words, f"r={advised}", "max_steps=1")
    told = [text.split("hold ")[1].split()[:2] for text in (large, short)]
    whole, part = (float(n) * {"bits": 1, "kbit": 1000}[unit] for n, unit in told)
    assert part / whole == pytest.approx(4 / 22, rel=0.02)


def test_a_dry_run_and_the_training_say_what_a_check_says(
    deltaw_command: Command, talker: Path, here: Path
) -> None:
    words = (talker / "model", talker / "data.json", "batch_size=4", "max_steps=3", "r=1")
    words = (*words, 'target_modules=["q_proj"]', "validation_share=0", "bf16=true")
    _, checked, _ = deltaw_command("check", *words)
    code, dry, _ = deltaw_command("train", *words, "--dry-run")
    assert code == 0
    _, trained, _ = deltaw_command("train", *words)
    receipt = checked[: checked.index("\nfolder ")]
    assert dry.startswith(receipt) and trained.startswith(receipt)
    for told in ("cannot hold all", "pads as well", "no rows are held out", " kB in bfloat16"):
        assert receipt.count(told) == 1


def test_warnings_have_their_fix(deltaw_command: Command, talker: Path, here: Path) -> None:
    words = (talker / "model", talker / "data.json", "max_steps=2")
    _, out, _ = deltaw_command("check", *words, "validation_share=0", "learning_rate=3e-5")
    assert "no rows are held out" in out and "Fix: validation_share=0.1" in out
    assert "learning_rate=3e-05 is far from the usual" in out
    _, out, _ = deltaw_command("check", *words)
    assert "no rows are held out" not in out and "far from the usual" not in out


def test_a_model_that_is_worse_than_chance_is_told(
    deltaw_command: Command, here: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    folder = make_model(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.lm_head.weight, std=8.0)
    model.save_pretrained(folder)
    data = write_json(tmp_path / "data.json", conversations(8))
    _, out, _ = deltaw_command("check", folder, data, "max_steps=1")
    assert "worse than by chance" in out and "Fix: look at the samples of deltaw data" in out


def test_labelled_texts_are_checked_too(deltaw_command: Command, tiny: Path, here: Path) -> None:
    code, out, err = deltaw_command(
        "check", tiny / "model", tiny / "data.csv", "gradient_accumulation=2", "report_to=none"
    )
    assert (code, err) == (0, "")
    assert "labels    3 classes" in out and "time      about " in out
    assert not list(here.iterdir())


def test_nothing_is_reported_anywhere(
    talker: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    from deltaw.language.training import prepare as preparing

    real = preparing.arguments

    def spy(*args: Any) -> Any:
        asked.append(args[1].report_to)
        return real(*args)

    monkeypatch.setattr(preparing, "arguments", spy)
    values = {"model": str(talker / "model"), "data": str(talker / "data.json"), "max_steps": 1}
    run_check(parse(values | {"report_to": ["all"]}))
    assert asked == [[]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report_to=nonsense"], "report_to=nonsense: not installed"),
        (["max_length=999"], "the model has positions for 128 tokens"),
        (["r=0"], "r"),
        (["rank=8"], "unknown key rank"),
    ],
)
def test_what_is_wrong_is_one_error_and_code_1(
    deltaw_command: Command, talker: Path, here: Path, words: list[str], message: str
) -> None:
    code, _, err = deltaw_command("check", talker / "model", talker / "data.json", *words)
    assert code == 1 and err.startswith("error: ") and message in err
    assert not list(here.iterdir())


def test_the_error_of_bad_rows_is_that_of_training(
    deltaw_command: Command, talker: Path, here: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"messages": [{}]}])
    checked = deltaw_command("check", talker / "model", data)
    trained = deltaw_command("train", talker / "model", data)
    assert checked[0] == trained[0] == 1 and checked[2] == trained[2]


def test_a_first_step_that_diverges_is_an_error(talker: Path, here: Path) -> None:
    values = {"model": str(talker / "model"), "data": str(talker / "data.json")}
    recipe = parse({**values, "task": "sft", "warmup": 0, "max_grad_norm": 0})
    huge = recipe.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(DivergedError, match="Fix: "):
        run_check(huge)
    assert not list(here.iterdir())


def test_the_longest_batch_is_the_first_of_those_timed(talker: Path, here: Path) -> None:
    values = {"model": str(talker / "model"), "data": str(talker / "data.json"), "batch_size": 4}
    probed = run_check(parse({**values, "max_steps": 10, "validation_share": 0}))
    assert len(probed.losses) == len(probed.seconds) == len(probed.tokens) == 3
    assert probed.tokens[0] == max(probed.tokens)
    two = run_check(parse({**values, "max_steps": 10, "gradient_accumulation": 2}))
    assert two.tokens[0] > probed.tokens[0] * 1.2
    assert len(run_check(parse({**values, "max_steps": 1})).seconds) == 1


def test_the_estimate_is_the_pace_times_all_tokens() -> None:
    probed = Probed([1.0] * 3, [12.0, 2.0, 4.0], [300, 100, 100], total=1000.0, longest_first=True)
    assert probed.estimate == pytest.approx(30.0)
    assert probed.spread == (pytest.approx(20.0), pytest.approx(40.0))
    assert str(probed).startswith("about 30 s, between 20 s and 40 s; evaluations come on top")
    assert Probed([1.0], [9.0], [300], 600.0, longest_first=True).estimate == pytest.approx(18.0)


def test_room_is_two_bits_a_parameter() -> None:
    room = Capacity(learnt=1000, loss=math.log(8), parameters=500, r=4)
    assert room.needed == pytest.approx(3000) and room.room == 1000 and not room.enough
    assert room.rank == 16
    assert Capacity(1000, math.log(2), 500, 4).enough
    assert [bits(n) for n in (12, 21_300, 9e7)] == ["12 bits", "21.3 kbit", "90.0 Mbit"]
