"""Better and worse answers, and answers called good or bad."""

from pathlib import Path
from typing import Any

import pytest
from tests.language.rows import only, parsed, problem_of, skip_of, turns

from deltaw.language.data.samples import Preference, Rated

ASKED = turns(("user", "hi"))
GOOD, BAD = turns(("assistant", "hello")), turns(("assistant", "go away"))
USER = {"role": "user", "content": "hi"}
BETTER, WORSE = ({"role": "assistant", "content": text} for text in ("hello", "go away"))
SHARED = [USER, BETTER, USER]
SHAREGPT = {
    "conversations": [{"from": "human", "value": "hi"}],
    "chosen": {"from": "gpt", "value": "hello"},
    "rejected": {"from": "gpt", "value": "go away"},
}


@pytest.mark.parametrize(
    "row",
    [
        SHAREGPT,
        {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go away", "output": "x"},
        {"question": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": "hi", "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": "hi", "chosen": [USER, BETTER], "rejected": [USER, WORSE]},
        {"chosen": [USER, BETTER], "rejected": [USER, WORSE], "score": 1},
        {"messages": [USER], "chosen": "hello", "rejected": "go away"},
    ],
)
def test_a_prompt_with_two_answers(tmp_path: Path, row: dict[str, Any]) -> None:
    sample = only(tmp_path, row)
    assert sample == Preference(ASKED, GOOD, BAD, sample.file, 1)


def test_plain_texts_stay_plain(tmp_path: Path) -> None:
    row = {"prompt": "hi ", "chosen": " hello", "rejected": " go away"}
    assert only(tmp_path, row) == Preference(
        "hi ", " hello", " go away", str(tmp_path / "rows.jsonl"), 1
    )
    chat = only(
        tmp_path, row, columns={"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    )
    assert chat.prompt == turns(("user", "hi "))
    assert chat.rejected == turns(("assistant", " go away"))


@pytest.mark.parametrize(
    "answer", [{"chosen": "hello", "rejected": "go away"}, {"completion": "hello", "label": True}]
)
def test_plain_texts_with_something_beside_become_turns(tmp_path: Path, answer: Any) -> None:
    row = {"prompt": "hi", "system": "S", "tools": [{"name": "f"}], **answer}
    sample = only(tmp_path, row)
    assert sample.prompt == turns(("system", "S"), ("user", "hi")) and len(sample.tools) == 1
    assert only(tmp_path, row | {"system": "", "tools": []}).prompt == "hi"
    found = parsed(tmp_path, [{**row, "tools": None}, {**row, "system": None, "tools": None}])
    assert [len(sample.prompt) for sample in found.samples] == [2, 1]


def test_request_and_history_of_pairs_come_along(tmp_path: Path) -> None:
    row = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
    more = {"input": "you", "history": [["a", "b"]]}
    sample = only(tmp_path, row | more)
    assert sample.prompt == turns(("user", "a"), ("assistant", "b"), ("user", "hi\nyou"))


@pytest.mark.parametrize(
    "answers", [{"chosen": "hello", "rejected": "go away"}, {"completion": [BETTER], "kto_tag": 1}]
)
def test_system_and_history_come_before_a_prompt_of_messages(tmp_path: Path, answers: Any) -> None:
    names = ("prompt", "system", "history", *answers)
    columns = {name: name for name in names} | {"query": "input"}
    rules = {"role": "system", "content": "S"}
    expected = turns(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "hi"))
    for row in ({"prompt": [USER], "system": "S"}, {"prompt": [rules, USER], "system": ""}):
        row |= {"input": "", "history": [["a", "b"]], **answers}
        assert only(tmp_path, row, columns=columns).prompt == expected
    row |= {"input": "you"}
    assert problem_of(tmp_path, row, columns=columns) == (
        '"input" holds an input, and "prompt" holds messages; write it into the last of them, or '
        "name the columns without it"
    )


def test_the_shared_beginning_is_the_prompt(tmp_path: Path) -> None:
    longer = [*SHARED, WORSE, USER, BETTER]
    sample = only(tmp_path, {"system": "S", "chosen": [*SHARED, BETTER], "rejected": longer})
    assert sample.prompt == turns(
        ("system", "S"), ("user", "hi"), ("assistant", "hello"), ("user", "hi")
    )
    assert sample.chosen == GOOD
    assert sample.rejected == turns(
        ("assistant", "go away"), ("user", "hi"), ("assistant", "hello")
    )


def test_system_and_tools_come_along(tmp_path: Path) -> None:
    tools = [{"name": "f"}]
    sample = only(tmp_path, {**SHAREGPT, "system": "S", "tools": tools})
    assert sample.prompt == turns(("system", "S"), ("user", "hi"))
    assert sample.tools == ({"type": "function", "function": {"name": "f"}},)
    row = {"question": "hi", "chosen": "hello", "rejected": "go away", "system": "S"}
    assert only(tmp_path, row).prompt == sample.prompt


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, 'nothing in "rejected"'),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, 'nothing in "chosen"'),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, 'nothing in "chosen"'),
        ({"question": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"question": "a", "chosen": "b", "rejected": ""}, "turn 2 is empty (assistant)"),
        ({"question": "", "chosen": "b", "rejected": "c"}, 'nothing in "question"'),
        (
            {"chosen": [USER, BETTER], "rejected": [USER, BETTER]},
            "chosen and rejected are the same",
        ),
    ],
)
def test_pairs_that_teach_nothing_are_skipped(tmp_path: Path, row: Any, reason: str) -> None:
    assert skip_of(tmp_path, row) == reason


OTHER = {"role": "user", "content": "ho"}
DIFFER = "chosen and rejected differ in more than the answer"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"prompt": "a", "chosen": 1, "rejected": "c"},
            '"chosen" holds the value 1, not text or messages',
        ),
        ({"chosen": [USER, BETTER], "rejected": [OTHER, WORSE]}, DIFFER),
        ({"chosen": [USER, BETTER], "rejected": [USER, BETTER, USER, WORSE]}, DIFFER),
        (
            {"conversations": [USER, BETTER], "chosen": WORSE, "rejected": BETTER},
            "turns 2 and 3 are both assistant turns",
        ),
        (
            {"chosen": [BETTER], "rejected": [WORSE]},
            "chosen and rejected are no whole conversations, and there is no prompt",
        ),
        (
            {"prompt": "a", "chosen": {"from": "gtp", "value": "b"}, "rejected": "c"},
            '"chosen" has the unknown role "gtp"; did you mean "gpt"?',
        ),
        ({**SHAREGPT, "images": ["a"]}, '"images" holds something, and training is on text only'),
    ],
)
def test_pairs_that_make_no_sense_are_problems(tmp_path: Path, row: Any, problem: str) -> None:
    assert problem_of(tmp_path, row) == problem


def test_texts_among_whole_conversations_are_a_problem(tmp_path: Path) -> None:
    whole = {"chosen": [USER, BETTER], "rejected": [USER, WORSE]}
    found = parsed(tmp_path, [whole, {"chosen": "a", "rejected": "b"}])
    assert len(found.samples) == 1
    (problem,) = found.problems
    assert problem.line == 2 and "there is no prompt" in problem.reason


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, BETTER], "label": True},
        {"conversations": [USER, BETTER], "kto_tag": "true"},
        {"instruction": "hi", "output": "hello", "kto_tag": 1},
        {"question": "hi", "answer": "hello", "label": True},
        {"prompt": [USER], "completion": [BETTER], "label": True},
        {"prompt": "hi", "completion": [BETTER], "label": True},
    ],
)
def test_an_answer_with_a_judgement(tmp_path: Path, row: dict[str, Any]) -> None:
    assert only(tmp_path, row) == Rated(ASKED, GOOD, True, str(tmp_path / "rows.jsonl"), 1)


def test_a_bad_answer_and_plain_texts(tmp_path: Path) -> None:
    row = {"prompt": "hi ", "completion": " no", "label": False}
    plain = only(tmp_path, row)
    assert plain == Rated("hi ", " no", False, plain.file, 1)
    asked = {"prompt": "prompt", "response": "completion", "kto_tag": "label"}
    assert only(tmp_path, row, columns=asked).prompt == turns(("user", "hi "))
    history = {"messages": [*SHARED, WORSE], "kto_tag": 0, "system": "S", "tools": [{"name": "f"}]}
    sample = only(tmp_path, history)
    assert (len(sample.prompt), sample.completion, sample.good) == (4, BAD, False)
    assert sample.tools


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [USER, BETTER], "kto_tag": None}, 'no judgement in "kto_tag"'),
        ({"prompt": "a", "completion": "", "kto_tag": True}, 'nothing in "completion"'),
        (
            {"messages": [USER], "kto_tag": True},
            "the last turn is a user turn, so nothing answers it",
        ),
    ],
)
def test_judgements_of_nothing_are_skipped(tmp_path: Path, row: Any, reason: str) -> None:
    assert skip_of(tmp_path, row) == reason


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": [USER, BETTER], "kto_tag": 0.5},
            '"kto_tag" holds the value 0.5, not true or false',
        ),
        (
            {"messages": [USER, BETTER], "kto_tag": "y"},
            '"kto_tag" holds the value "y", not true or false',
        ),
        ({"messages": [USER, BETTER], "kto_tag": [1]}, '"kto_tag" holds a list, not true or false'),
    ],
)
def test_what_is_no_judgement_is_a_problem(tmp_path: Path, row: Any, problem: str) -> None:
    assert problem_of(tmp_path, row) == problem
