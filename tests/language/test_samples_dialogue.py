"""Messages in the spellings of OpenAI, ShareGPT and their kin, and the order of turns."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.language.rows import only, problem_of, skip_of, turns

from deltaw.language.data.info import read_tags
from deltaw.language.data.samples import Conversation, Message

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
FUNCTION = {"name": "sum", "description": "Adds.", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def turn(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


@pytest.mark.parametrize(
    "row",
    [
        chat(USER, ANSWER),
        {"conversations": [turn("human", "hi"), turn("gpt", "hello")]},
        {"conversations": [turn("Human", "hi"), turn("gpt ", "hello")], "system": ""},
        {"conversation": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [USER, ANSWER], "prompt": "hi", "text": "rendered", "tools": None},
        chat({"role": "system", "content": " "}, USER, ANSWER),
        chat(
            {
                "role": "user",
                "content": [{"type": "text", "text": "h"}, {"type": "text", "value": "i"}],
            },
            {**ANSWER, "tool_calls": None, "name": "x"},
        ),
    ],
)
def test_two_turns_in_many_spellings(tmp_path: Path, row: dict[str, Any]) -> None:
    sample = only(tmp_path, row)
    expected = turns(("user", "hi"), ("assistant", "hello"))
    assert sample == Conversation(expected, sample.file, 1)


def test_the_system_text_is_a_column_or_a_turn(tmp_path: Path) -> None:
    expected = turns(("system", "Be kind."), ("user", "hi"), ("assistant", "hello"))
    system = {"role": "system", "content": "Be kind."}
    for row in (
        {**chat(USER, ANSWER), "system": "Be kind."},
        chat(system, USER, ANSWER),
        {**chat(system, USER, ANSWER), "system": "Be kind. "},
        chat({**system, "role": "developer"}, USER, ANSWER),
    ):
        assert only(tmp_path, row).messages == expected


@pytest.mark.parametrize(
    ("called", "tools"),
    [
        (turn("function_call", '{"name": "sum", "arguments": {"a": 1}}'), json.dumps([FUNCTION])),
        (turn("function_call", '[{"name": "sum", "arguments": "{\\"a\\": 1}"}]'), [FUNCTION]),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "7", **CALL}]},
            [{"type": "function", "function": FUNCTION}],
        ),
        (
            {"role": "assistant", "function_call": {"name": "sum", "arguments": '{"a": 1}'}},
            [FUNCTION],
        ),
    ],
)
def test_calls_and_tools_take_one_form(tmp_path: Path, called: Any, tools: Any) -> None:
    row = {"conversations": [USER, called, turn("observation", "1"), ANSWER], "tools": tools}
    assert only(tmp_path, row) == Conversation(
        (
            Message("user", "hi"),
            Message("assistant", "", (CALL,)),
            Message("tool", "1"),
            Message("assistant", "hello"),
        ),
        str(tmp_path / "rows.jsonl"),
        1,
        ({"type": "function", "function": FUNCTION},),
    )


CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_content_beside_calls_and_several_answers_of_tools(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
    tool = {"role": "tool", "tool_call_id": "7", "content": ""}
    sample = only(tmp_path, {**chat(USER, called, tool, tool, ANSWER), "tools": "[]"})
    assert sample.messages[1] == Message("assistant", "Let me see.", (CALL, CALL))
    assert [message.role for message in sample.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert sample.tools == ()


def test_a_call_without_arguments_has_none(tmp_path: Path) -> None:
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]}
    (call,) = only(tmp_path, chat(USER, called)).messages[1].tool_calls
    assert call == {"type": "function", "function": {"name": "now", "arguments": {}}}


@pytest.mark.parametrize("key", ["loss", "loss_weight", "weight", "train"])
def test_what_is_trained_comes_from_the_row(tmp_path: Path, key: str) -> None:
    for yes, no in ((True, False), (1, 0), (1.0, 0.0)):
        row = chat({**USER, key: no}, {**ANSWER, key: no}, USER, {**ANSWER, key: yes}, USER, ANSWER)
        trained = [message.trained for message in only(tmp_path, row).messages]
        assert trained == [False, False, None, True, None, None]
        assert all(flag is None or isinstance(flag, bool) for flag in trained)


def test_tags_name_keys_and_speakers(tmp_path: Path) -> None:
    names = {
        "role_tag": "who",
        "content_tag": "says",
        "user_tag": "Ann",
        "assistant_tag": "Bot",
        "observation_tag": "Result",
        "function_tag": "Call",
        "system_tag": "Rule",
    }
    said = [
        ("Rule", "Be kind."),
        ("Ann", "hi"),
        ("Call", '{"name": "f"}'),
        ("Result", "1"),
        ("Bot", "ok"),
    ]
    row = {"talk": [{"who": who, "says": says} for who, says in said]}
    sample = only(tmp_path, row, columns={"messages": "talk"}, tags=read_tags(names))
    assert [message.role for message in sample.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


NO_KEY = "no valid JSON: Expecting property name enclosed in double quotes"
EMPTY = {"role": "assistant", "content": " "}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "1"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(USER, EMPTY), "turn 2 is empty (assistant)"),
        (chat(USER, {"role": "assistant", "content": None}), "turn 2 is empty (assistant)"),
        (chat(USER, EMPTY, USER, ANSWER), "turn 2 is empty (assistant)"),
        (chat({"role": "user", "content": ""}, ANSWER), "turn 1 is empty (user)"),
        (chat(USER, ANSWER, USER), "the last turn is a user turn, so nothing answers it"),
        (chat(USER, ANSWER, TOOL), "the last turn is a tool turn, so nothing answers it"),
        (chat(SYSTEM), "the last turn is a system turn, so nothing answers it"),
        (chat(SYSTEM, ANSWER), "no user turn"),
        ({"messages": []}, 'no message in "messages"'),
        ({"conversations": None, "messages": [], "x": 1}, 'no message in "messages"'),
        (chat({"role": "system", "content": ""}), 'no message in "messages"'),
        (
            chat(USER, {**ANSWER, "weight": 0}),
            'no turn is trained: its marks ("loss", "weight", "train") leave every answer out',
        ),
        (chat(USER, turn("function_call", "")), "turn 2 calls nothing"),
    ],
)
def test_dialogues_without_an_answer_are_skipped(tmp_path: Path, row: Any, reason: str) -> None:
    assert skip_of(tmp_path, row) == reason


def calls(value: Any) -> dict[str, Any]:
    return chat(USER, {"role": "assistant", "tool_calls": value})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (chat({"content": "hi"}, ANSWER), "turn 1 has no role (role or from)"),
        (chat({"role": None, "content": "hi"}, ANSWER), "turn 1 has no role (role or from)"),
        (chat({"role": 3, "content": "hi"}), "the role of turn 1 holds the value 3, not text"),
        (chat(USER, {**ANSWER, "role": "narrator"}), 'turn 2 has the unknown role "narrator"'),
        (
            chat(USER, {**ANSWER, "role": "asistant"}),
            'turn 2 has the unknown role "asistant"; did you mean "assistant"?',
        ),
        (chat(USER, {**ANSWER, "role": "a\x1b[31m"}), 'turn 2 has the unknown role "a\\x1b[31m"'),
        (
            {**chat(SYSTEM, USER, ANSWER), "system": "another"},
            "two system turns: the system column and the first turn differ",
        ),
        (
            chat(SYSTEM, SYSTEM, USER, ANSWER),
            "turn 2 is a system turn, which is possible once and first only",
        ),
        (
            chat(USER, SYSTEM, ANSWER),
            "turn 2 is a system turn, which is possible once and first only",
        ),
        (chat(USER, USER, ANSWER), "turns 1 and 2 are both user turns"),
        (chat(USER, ANSWER, ANSWER), "turns 2 and 3 are both assistant turns"),
        (
            chat(USER, TOOL, ANSWER),
            "turn 2 is a tool turn, and the assistant called nothing before",
        ),
        (
            chat(USER, {"role": "assistant", "content": 5}),
            "the content of turn 2 holds the value 5, not text",
        ),
        (chat(USER, "hello"), 'turn 2 is the value "hello", not an object'),
        ({"messages": "[{1"}, f'"messages": {NO_KEY} (character 3)'),
        (
            chat(USER, {"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}),
            'turn 2 has a part that is not text: "image_url"',
        ),
        (
            chat(USER, {"role": "assistant", "content": ["x"]}),
            'turn 2 has a part that is not text: the value "x"',
        ),
        (
            chat(USER, {"role": "assistant", "content": [{"type": "text", "text": 1}]}),
            "a part of turn 2 holds the value 1, not text",
        ),
        (
            chat(USER, {**ANSWER, "weight": 0.5}),
            'turn 2 has "weight": the value 0.5; only 0 and 1 (false, true) are possible',
        ),
        (
            chat(USER, {**ANSWER, "loss": "yes"}),
            'turn 2 has "loss": the value "yes"; only 0 and 1 (false, true) are possible',
        ),
        (
            chat(USER, {**ANSWER, "loss": True, "weight": 0}),
            "turn 2 is to be trained and not to be: loss, weight contradict",
        ),
        (
            chat(USER, {**ANSWER, "reasoning_content": "so"}),
            'turn 2 has "reasoning_content" apart from its content; '
            "write it into the content: <think>...</think>answer",
        ),
        (
            chat({**USER, "tool_calls": [CALL]}, ANSWER),
            "turn 1 calls functions, and only the assistant can",
        ),
        (
            chat(USER, CALLED, {"role": "tool", "content": "1", "tool_calls": [CALL]}, ANSWER),
            "turn 3 calls functions, and only the assistant can",
        ),
        (calls(["x"]), 'call 1 of the calls of turn 2 is the value "x", not an object'),
        (
            calls([{"function": {"arguments": {}}}]),
            "the name of call 1 of the calls of turn 2 holds the value null, not text",
        ),
        (
            calls([{"function": {"name": "f", "arguments": [1]}}]),
            "the arguments of call 1 of the calls of turn 2 are a list, not an object",
        ),
        (
            calls([{"function": {"name": "f", "arguments": "{a"}}]),
            f"the arguments of call 1 of the calls of turn 2: {NO_KEY} (character 2)",
        ),
        (
            {**chat(USER, ANSWER), "tools": "{"},
            f'"tools": {NO_KEY} (character 2)',
        ),
        ({**chat(USER, ANSWER), "tools": {"x": 1}}, '"tools" holds an object, not a list of tools'),
        (
            {**chat(USER, ANSWER), "tools": [{"description": "x"}]},
            'the name of tool 1 of "tools" holds the value null, not text',
        ),
        (
            {**chat(USER, ANSWER), "images": ["a.png"]},
            '"images" holds something, and training is on text only',
        ),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}),
            '"messages" holds half of a surrogate pair',
        ),
    ],
)
def test_dialogues_that_make_no_sense_are_problems(tmp_path: Path, row: Any, problem: str) -> None:
    if "surrogate" in problem:
        row = {"messages": json.dumps(row["messages"])}
    assert problem_of(tmp_path, row) == problem
