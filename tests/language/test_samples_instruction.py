"""Requests with answers: every column of Alpaca's schema and the names of its kin."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.language.rows import only, parsed, problem_of, skip_of, turns, write_rows

from deltaw.language.data.detect import detect
from deltaw.language.data.parse import parse
from deltaw.language.data.samples import Completion, Conversation, Passage
from deltaw.train.data.table import read_rows

PLAIN = turns(("user", "Add 2 and 3."), ("assistant", "5"))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add 2 and 3.", "output": "5"},
        {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
        {"instruction": "Add 2 and 3.", "input": " \n", "output": "5", "system": "", "history": []},
        {"instruction": "Add 2 and 3.", "input": None, "output": "5", "history": None},
        {"instruction": "", "input": "Add 2 and 3.", "output": "5"},
        {"instruction": "Add 2 and 3.", "response": "5", "category": "sums"},
        {"question": "Add 2 and 3.", "answer": "5"},
        {"query": "Add 2 and 3.", "response": "5"},
        {"problem": "Add 2 and 3.", "solution": "5"},
        {"Instruction": "Add 2 and 3.", "Output": "5"},
        {"input": "Add 2 and 3.", "output": "5"},
        {"instruction": "Add 2 and 3.", "output": "5", "images": [], "videos": None, "audios": ""},
        {"instruction": "Add 2 and 3.", "instances": [{"input": "", "output": "5"}]},
    ],
)
def test_one_request_one_answer(tmp_path: Path, row: dict[str, Any]) -> None:
    sample = only(tmp_path, row)
    assert sample == Conversation(PLAIN, sample.file, 1)


def test_system_and_tools_come_along(tmp_path: Path) -> None:
    beside = {"system": "Be brief.", "tools": [{"name": "f", "parameters": {}}]}
    for row in (
        {"instruction": "Add 2 and 3.", "output": "5", **beside},
        {"instruction": "Add 2 and 3.", "instances": [{"input": "", "output": "5"}], **beside},
    ):
        sample = only(tmp_path, row)
        assert sample.messages == (*turns(("system", "Be brief.")), *PLAIN)
        assert [tool["function"]["name"] for tool in sample.tools] == ["f"]
    columns = {"prompt": "p", "response": "r", "tools": "t"}
    row = {"p": "Add 2 and 3.", "r": "5", "t": json.dumps(beside["tools"])}
    assert len(only(tmp_path, row, columns=columns).tools) == 1


def test_a_plain_prompt_with_a_system_text_becomes_turns(tmp_path: Path) -> None:
    columns = {"prompt": "p", "completion": "c", "system": "s"}
    sample = only(tmp_path, {"p": "Add 2 and 3.", "c": "5", "s": "Be brief."}, columns=columns)
    assert sample.messages == (*turns(("system", "Be brief.")), *PLAIN)
    sample = only(tmp_path, {"p": "Add 2 and 3.", "c": "5", "s": " "}, columns=columns)
    assert isinstance(sample, Completion)


def test_system_history_and_input(tmp_path: Path) -> None:
    row = {
        "instruction": " Translate: ",
        "input": "pão\n",
        "output": " bread ",
        "system": "Be brief.",
        "history": [["hi", "hello"], ["and?", "so"]],
    }
    assert only(tmp_path, row).messages == turns(
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "and?"),
        ("assistant", "so"),
        ("user", " Translate: \npão\n"),
        ("assistant", " bread "),
    )


def test_the_context_of_dolly_is_an_input(tmp_path: Path) -> None:
    row = {"instruction": "Who?", "context": "Ann came.", "response": "Ann"}
    assert only(tmp_path, row).messages[0].content == "Who?\nAnn came."


def test_each_instance_is_a_conversation(tmp_path: Path) -> None:
    instances = [{"input": "", "output": "a"}, {"input": "x", "output": "b"}]
    found = parsed(tmp_path, [{"instruction": "Do.", "instances": instances}])
    assert [sample.messages for sample in found.samples] == [  # type: ignore[union-attr]
        turns(("user", "Do."), ("assistant", "a")),
        turns(("user", "Do.\nx"), ("assistant", "b")),
    ]


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            {"a": "Q", "b": "A"},
            {"prompt": "a", "response": "b"},
            turns(("user", "Q"), ("assistant", "A")),
        ),
        (
            {"a": "Q", "b": "A", "c": "I", "d": "S"},
            {"prompt": "a", "response": "b", "query": "c", "system": "d"},
            turns(("system", "S"), ("user", "Q\nI"), ("assistant", "A")),
        ),
    ],
)
def test_columns_say_what_is_what(tmp_path: Path, row: Any, columns: Any, expected: Any) -> None:
    assert only(tmp_path, row, columns=columns).messages == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "P ", "completion": " C"},
        {"prompt": "P ", "response": " C"},
        {"mr": "P ", "ref": " C"},
    ],
)
def test_prompts_and_completions_stay_plain(tmp_path: Path, row: dict[str, str]) -> None:
    assert only(tmp_path, row) == Completion("P ", " C", str(tmp_path / "rows.jsonl"), 1)


def test_a_prompt_may_be_empty_but_not_missing(tmp_path: Path) -> None:
    assert only(tmp_path, {"prompt": "", "completion": "C"}).prompt == ""
    assert skip_of(tmp_path, {"prompt": None, "completion": "C"}) == 'nothing in "prompt"'


def test_of_messages_the_completion_alone_is_trained(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt += [{"role": "user", "content": "c"}]
    sample = only(
        tmp_path, {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    )
    assert [(turn.content, turn.learnt) for turn in sample.messages] == [
        ("a", False),
        ("b", False),
        ("c", False),
        ("d", True),
    ]
    columns = {name: name for name in ("prompt", "completion", "history")}
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    earlier = only(tmp_path, row | {"history": [["x", "y"]]}, columns=columns)
    assert [(turn.content, turn.learnt) for turn in earlier.messages] == [
        ("x", False),
        ("y", False),
        *((turn.content, turn.learnt) for turn in sample.messages),
    ]
    mixed = {"prompt": prompt, "completion": "d"}
    assert problem_of(tmp_path, mixed).startswith("prompt and completion must both be texts")


def test_text_is_kept_to_the_letter(tmp_path: Path) -> None:
    row = {"text": " One.\n\n\tTwo. ", "title": "T"}
    assert only(tmp_path, row) == Passage(" One.\n\n\tTwo. ", str(tmp_path / "rows.jsonl"), 1)
    assert only(tmp_path, {"body": "x"}, columns={"prompt": "body"}).text == "x"
    assert only(tmp_path, {"body": "x"}, columns={"text": "body"}).text == "x"


def test_csv_and_json_say_the_same(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f'{n}, "{n}"'} for n in range(3)]
    csv = tmp_path / "rows.csv"
    csv.write_text(
        "instruction,input,output\n" + "".join(f'Say {n}.,,"{n}, ""{n}"""\n' for n in range(3))
    )
    tables = [read_rows(csv), read_rows(write_rows(tmp_path / "rows.jsonl", rows))]
    first, second = (parse(table, detect(table)).samples for table in tables)
    assert [(s.messages, s.line) for s in first] == [  # type: ignore[union-attr]
        (s.messages, s.line + 1)
        for s in second  # type: ignore[union-attr]
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": " \n"}, 'nothing in "output"'),
        ({"instruction": "a", "output": None}, 'nothing in "output"'),
        ({"instruction": "a", "output": float("nan")}, 'nothing in "output"'),
        ({"instruction": "", "input": " ", "output": "b"}, 'nothing in "instruction"'),
        (
            {"instruction": "a", "output": "b", "history": [["", "x"]]},
            'round 1 of "history" is empty',
        ),
        ({"instruction": "a", "instances": []}, "no instances"),
        ({"instruction": "", "instances": [{"output": "x"}]}, 'nothing in "instruction"'),
        (
            {"instruction": "a", "instances": [{"output": "x"}, {"input": "y", "output": ""}]},
            "instance 2 has no output",
        ),
        ({"prompt": "a", "completion": ""}, 'nothing in "completion"'),
        ({"text": "\n \t"}, 'nothing in "text"'),
    ],
)
def test_rows_that_hold_nothing_are_skipped(tmp_path: Path, row: Any, reason: str) -> None:
    assert skip_of(tmp_path, row) == reason


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "a", "output": 5}, '"output" holds the value 5, not text'),
        ({"instruction": True, "output": "b"}, '"instruction" holds the value true, not text'),
        ({"instruction": "a", "input": ["x"], "output": "b"}, '"input" holds a list, not text'),
        ({"instruction": "a", "output": {"x": 1}}, '"output" holds an object, not text'),
        (
            {"instruction": "a", "output": "b", "history": [["x"]]},
            'round 1 of "history" is not a pair of request and answer',
        ),
        (
            {"instruction": "a", "output": "b", "history": [["x", 1]]},
            'round 1 of "history" holds the value 1, not text',
        ),
        (
            {"instruction": "a", "output": "b", "history": {"x": 1}},
            '"history" holds an object, not a list of rounds',
        ),
        ({"instruction": "a", "instances": {"x": 1}}, '"instances" holds an object, not a list'),
        ({"instruction": "a", "instances": ["x"]}, 'instance 1 is the value "x", not an object'),
        ({"prompt": "a", "completion": 1}, '"completion" holds the value 1, not text or messages'),
        ({"text": 7}, '"text" holds the value 7, not text'),
        (
            {"instruction": "a", "output": "b", "images": ["cat.png"]},
            '"images" holds something, and training is on text only',
        ),
        (
            {"text": "a", "audios": ["cat.wav"]},
            '"audios" holds something, and training is on text only',
        ),
    ],
)
def test_rows_that_make_no_sense_are_problems(tmp_path: Path, row: Any, problem: str) -> None:
    assert problem_of(tmp_path, row) == problem


def test_half_a_surrogate_pair_within_json_text_is_a_problem(tmp_path: Path) -> None:
    text = '[["\\ud83d", "x"]]'
    row = {"instruction": "a", "output": "b", "history": text}
    assert problem_of(tmp_path, row) == '"history" holds half of a surrogate pair'
