"""Thoughts in answers are left out where the model is not to think, and that is said."""

from pathlib import Path
from typing import Any

import pytest
from tests.language.rows import turns, write_rows
from tests.language.tokenizers_ import byte_level
from tests.train.conftest import Command

from deltaw.errors import DataError
from deltaw.language.choosing import train
from deltaw.language.data.corpus import Corpus, Request, load
from deltaw.language.data.thoughts import spoken
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.templating import choose, ends
from deltaw.language.encoding.thinking import told
from deltaw.language.questions import questions
from deltaw.train.recipe import parse

THOUGHT = "<think>\nHm.\n</think>\n\n"
SAID = "the thoughts in {} are left out (enable_thinking=false)"
CALL = {"type": "function", "function": {"name": "search", "arguments": "{}"}}


def read(folder: Path, rows: Any, thinks: bool | None = False, **more: Any) -> Corpus:
    path = str(write_rows(folder / "rows.jsonl", rows))
    return load(Request(path, val_size=0, enable_thinking=thinks, **more))


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"{THOUGHT}The sea.", "The sea."),
        ("Hm.\n</think>\n\nThe sea.", "The sea."),
        ("<think>\n\n</think>\n\n", ""),
        ("Hm.\n</think>The sea.", "The sea."),
        ("Hm.</think>\nThe <think>b</think>sea.", "The sea."),
        ("Close it with `</think>` and go on.", "Close it with `</think>` and go on."),
        ("<think>a</think>Use `</think>` to end it.", "Use `</think>` to end it."),
        ("<think>a</think>The <think>b</think>sea.", "The sea."),
        ("\nThe sea, <think> in words.", "\nThe sea, <think> in words."),
    ],
)
def test_what_is_left_of_an_answer(text: str, left: str) -> None:
    assert spoken(text) == left


@pytest.mark.parametrize("thinks", [None, True])
def test_thoughts_stay_unless_they_are_not_wanted(tmp_path: Path, thinks: bool | None) -> None:
    corpus = read(tmp_path, [{"instruction": "x", "output": f"{THOUGHT}The sea."}], thinks)
    assert corpus.train[0].messages[-1].content == f"{THOUGHT}The sea."  # type: ignore[union-attr]
    assert not corpus.thoughtless and corpus.notes == ()


def test_every_answer_loses_its_thoughts_and_a_question_does_not(tmp_path: Path) -> None:
    asked = f"{THOUGHT}What is that?"
    texts = (asked, f"{THOUGHT}The sea.", "y", f"{THOUGHT}The sky.")
    corpus = read(tmp_path, [{"messages": messages(*texts)}])
    (sample,) = corpus.train
    assert [m.content for m in sample.messages] == [asked, "The sea.", "y", "The sky."]  # type: ignore[union-attr]
    assert corpus.notes == (SAID.format("2 answers"),)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "x", "output": f"{THOUGHT}The sea."},
        {"prompt": messages("x"), "completion": messages("x", f"{THOUGHT}The sea.")[1:]},
    ],
)
def test_training_and_scores_take_what_is_left(tmp_path: Path, row: Any) -> None:
    tokenizer = byte_level()
    template = told(choose(tokenizer, "qwen3"), {"enable_thinking": False}, tokenizer).template
    encoder = Encoder(tokenizer, template, 200, ends(tokenizer, None, template))
    corpus = read(tmp_path, [row])
    (learnt,) = encoder.encode(corpus.train).rows  # type: ignore[arg-type]
    text = tokenizer.decode(learnt.input_ids)
    assert text.count("<think>") == 1 and "Hm." not in text and "The sea." in text
    assert questions(encoder, corpus.train)[0].references == ("The sea.",)  # type: ignore[arg-type]


def test_prompt_and_completion_as_plain_texts(tmp_path: Path) -> None:
    corpus = read(tmp_path, [{"prompt": f"{THOUGHT}x", "completion": f"{THOUGHT}The sea."}])
    (sample,) = corpus.train
    assert sample.prompt == f"{THOUGHT}x"  # type: ignore[union-attr]
    assert sample.completion == "The sea."  # type: ignore[union-attr]
    assert corpus.thoughtless == 1


def test_pairs_and_ratings_lose_thoughts_on_all_sides(tmp_path: Path) -> None:
    before = messages("x", f"{THOUGHT}The sea.", "y")
    row: dict[str, Any] = {"prompt": before, "chosen": f"{THOUGHT}a", "rejected": f"{THOUGHT}b"}
    corpus = read(tmp_path, [row, row | {"rejected": "a"}])
    (pair,) = corpus.train
    asked = turns(("user", "x"), ("assistant", "The sea."), ("user", "y"))
    assert (pair.prompt, pair.chosen, pair.rejected) == (  # type: ignore[union-attr]
        asked,
        turns(("assistant", "a")),
        turns(("assistant", "b")),
    )
    assert corpus.thoughtless == 3
    assert corpus.skipped[0].reason == "chosen and rejected are the same but for their thoughts"
    plain = {"prompt": "x", "chosen": f"{THOUGHT}a", "rejected": "b"}
    assert read(tmp_path, [plain]).train[0].chosen == "a"  # type: ignore[union-attr]
    rated = {"prompt": "x", "completion": f"{THOUGHT}a", "label": True}
    assert read(tmp_path, [rated]).train[0].completion == "a"  # type: ignore[union-attr]


def test_an_answer_of_thoughts_alone_is_empty_unless_it_calls(tmp_path: Path) -> None:
    said = messages("x", THOUGHT)
    calling = [said[0], {**said[1], "tool_calls": [CALL]}]
    corpus = read(tmp_path, [{"messages": calling}, {"messages": said}])
    assert corpus.train[0].messages[-1].content == ""  # type: ignore[union-attr]
    (skip,) = corpus.skipped
    assert (skip.line, skip.reason) == (
        2,
        "an answer is nothing but thoughts, which enable_thinking=false leaves out",
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: an answer is nothing but thoughts"):
        read(tmp_path, [{"messages": said}])


def test_a_run_says_it_once_and_so_does_the_report(
    talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], deltaw_command: Command
) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"{THOUGHT}{n}!"} for n in range(12)]
    data = str(write_rows(tmp_path / "a.jsonl", rows))
    asked = {"template": "qwen3", "enable_thinking": False, "max_steps": 1}
    values = {"model": str(talker / "model"), "data": data, "output": str(tmp_path / "run")}
    run = train(parse(values | asked))
    shown = capsys.readouterr().out
    assert shown.count(SAID.format("12 answers")) == 1 and "Hm." not in shown
    words = ("data", data, "enable_thinking=false", "template=qwen3")
    code, out, err = deltaw_command(*words, "--model", talker / "model")
    assert (code, err) == (0, "")
    assert out.count(SAID.format("12 answers")) == 1 and "Hm." not in out
    code, out, err = deltaw_command("eval", run, data)
    assert (code, err) == (0, "") and out.count(SAID.format("12 answers")) == 1
