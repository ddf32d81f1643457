"""What a finished run of a language model can be asked: scores, answers, its base's too."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.language.models import conversations, write_json
from tests.language.rows import write_rows
from tests.train.conftest import Command
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.errors import RunError
from deltaw.language.choosing import train
from deltaw.language.generating import Sampling, generate
from deltaw.language.use import opened
from deltaw.language.use.chatting import Chat, chat, escaped
from deltaw.language.use.opened import open_language
from deltaw.train.recipe import parse

SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def runs(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one base."""
    folder = tmp_path_factory.mktemp("runs")
    values = {
        "model": str(talker / "model"),
        "data": str(talker / "data.json"),
        "max_steps": 16,
        "learning_rate": 0.05,
        "batch_size": 8,
    }
    first, second = (
        train(parse(values | {"output": str(folder / name), "seed": seed}))
        for seed, name in enumerate(("first", "second"))
    )
    return first, second


def test_scores_are_those_of_the_end_of_training(
    runs: tuple[Path, Path], deltaw_command: Command
) -> None:
    results = json.loads((runs[0] / "results.json").read_text())
    for more in ([], ["--no-merge"]):
        code, out, err = deltaw_command("eval", runs[0], *more)
        assert (code, err) == (0, "")
        assert "adapter beside" in out if more else "adapter merged into the weights" in out
        row = next(line.split() for line in out.splitlines() if line.startswith("loss "))
        for moment, shown in (("before", row[1]), ("after", row[2])):
            assert float(shown) == pytest.approx(results[moment]["values"]["loss"], abs=6e-4)
    assert "2 rows of the validation part that were not trained on" in out
    assert "loss of the run less the base's: -" in out


def test_other_rows_are_scored_and_known_ones_said(
    runs: tuple[Path, Path], deltaw_command: Command, talker: Path, tmp_path: Path
) -> None:
    fresh = write_json(tmp_path / "fresh.json", conversations(40)[30:])
    code, out, _ = deltaw_command("eval", runs[0], fresh)
    assert code == 0 and "10 rows" in out and "WARNING" not in out
    code, out, _ = deltaw_command("eval", runs[0], talker / "data.json")
    assert code == 0
    assert "WARNING   22 of these rows were trained on; the score flatters the run" in out


def test_every_row_that_is_left_out_is_listed(
    runs: tuple[Path, Path], deltaw_command: Command, tmp_path: Path
) -> None:
    long = [{"instruction": "Why? " * 99, "output": "So."}] * 6
    bare = [{"instruction": f"What is {n}?", "output": ""} for n in range(6)]
    data = write_rows(tmp_path / "some.jsonl", [*conversations(2), *long, *bare])
    code, out, err = deltaw_command("eval", runs[0], data)
    assert (code, err) == (0, "") and "2 rows, " in out and "log.jsonl" not in out
    for line in range(3, 9):
        assert re.search(rf"skipped {re.escape(str(data))}:{line}: .* the answer lies beyond", out)
    for line in range(9, 15):
        assert f'skipped {data}:{line}: nothing in "output"' in out
    code, _, err = deltaw_command("eval", runs[0], write_rows(tmp_path / "long.jsonl", long))
    assert code == 1 and "There is nothing to score." in err and "log.jsonl" not in err
    assert "long.jsonl:6: " in err


def test_answers_are_the_models_own_and_padding_changes_none(runs: tuple[Path, Path]) -> None:
    opened = open_language(runs[0])
    prompts = ["### Instruction:\nWhat is the sea?\n\n### Response:\n", "Is it?"]
    together = generate(opened.speaker, prompts, SHORT)
    assert together == [generate(opened.speaker, [prompt], SHORT)[0] for prompt in prompts]
    ids = opened.tokenizer(prompts[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    for _ in range(SHORT.max_new_tokens):
        with torch.no_grad():
            best = opened.model(ids).logits[0, -1].argmax()
        if best == opened.tokenizer.eos_token_id:
            break
        ids = torch.cat((ids, best[None, None]), 1)
    greedy = opened.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert greedy.removeprefix(prompts[0]).strip() == together[0]


def talk(lines: list[str], *folders: Path, merge: bool = True) -> None:
    waiting: Iterator[str] = iter(lines)

    def ask() -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    chat(list(folders), ask, sampling=SHORT, merge=merge)


@pytest.mark.parametrize("merge", [True, False])
def test_a_conversation_compares_with_the_base(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], merge: bool
) -> None:
    talk(["What is the sky?", "/base", "/base", "again", "/nothing"], runs[0], merge=merge)
    _, first, base, again, *_ = capsys.readouterr().out.splitlines()
    opened = open_language(runs[0])
    prompt = opened.template.template.render(
        [{"role": "user", "content": "What is the sky?"}], prompt=True
    )[0]
    assert escaped(generate(opened.speaker, [prompt], SHORT)[0]) in first
    with deltaw.disabled(opened.model):
        plain = escaped(generate(opened.speaker, [prompt], SHORT)[0])
    assert plain in base and base == again


@pytest.mark.parametrize(
    ("merge", "how"),
    [(True, "adapter merged into the weights"), (False, "adapter beside the weights")],
)
def test_a_conversation_switches_between_runs(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], merge: bool, how: str
) -> None:
    lines = [
        "x?",
        "/reset",
        "/adapter second",
        "x?",
        "/base",
        "/reset",
        "/adapter first",
        "x?",
        "/adapter y",
        "/adapter first",
    ]
    talk(lines, *runs, merge=merge)
    head, one, second, two, base, first, three, names, same, *_ = (
        capsys.readouterr().out.splitlines()
    )
    assert f"adapters first, second, {how}; /help" in head and names == "Adapters: first, second."
    assert second == f"second answers from now on, {how}."
    assert first == f"first answers from now on, {how}." and same == "first answers already."
    assert one == three != two != base


def test_a_lone_adapter_answers_already_and_a_full_run_has_none(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    talk(["/adapter first"], runs[0])
    assert "\nfirst answers already.\n" in capsys.readouterr().out
    opened = open_language(runs[0])
    full = replace(opened, recipe=opened.recipe.model_copy(update={"method": "full"}))
    Chat(full, {"first": "default"}, SHORT, merge=True).say("/adapter first")
    assert "no adapter to switch" in capsys.readouterr().out


def test_what_cannot_be_answered_is_said(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    talk(["/base", "", "/help", "/system Be kind.", "x?", "/exit", "never asked"], runs[0])
    out = capsys.readouterr().out
    assert "There is no question yet." in out and "/adapter NAME" in out
    with pytest.raises(RunError, match="Two adapters would be called first"):
        talk([], runs[0], runs[0])


def test_control_characters_are_spelt_out() -> None:
    assert escaped("a\x1b[31m\nb\r\u202e世") == "a\\x1b[31m\nb\\r\\u202e世"


def test_a_classifier_cannot_be_talked_with(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    values: dict[str, Any] = {"model": "m", "data": "d.csv", "record": {}}
    from deltaw.train.runfolder import RunFolder

    RunFolder(tmp_path).write_recipe(parse(values).model_copy(update={"record": {}}))
    with pytest.raises(RunError, match="no language model's"):
        open_language(tmp_path)


def test_merging_writes_a_plain_model_with_the_same_answers(
    runs: tuple[Path, Path], deltaw_command: Command, tmp_path: Path
) -> None:
    code, out, err = deltaw_command("merge", runs[0], tmp_path / "plain")
    assert (code, err) == (0, "")
    assert "largest difference of answers" in out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    opened = open_language(runs[0])
    ids = opened.tokenizer("The sky is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, opened.model(ids).logits)


def test_what_needs_a_classifier_says_so(
    runs: tuple[Path, Path], deltaw_command: Command, talker: Path, tmp_path: Path
) -> None:
    code, _, err = deltaw_command("predict", runs[0], "a text")
    assert code == 1 and "a language model's, which labels nothing" in err
    code, _, err = deltaw_command(
        "compare", talker / "model", talker / "data.json", "task=sft", "--methods", "lora",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 1 and "only classification and regression can be compared" in err


def test_a_run_is_opened_on_the_gpu_where_there_is_one(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[Any] = []
    monkeypatch.setattr(opened, "place", lambda model: placed.append(model) or model)
    assert opened.open_language(runs[0]).model is placed[0]
