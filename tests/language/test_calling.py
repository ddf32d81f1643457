"""Calls of tools in the ways of real templates: ids, arguments as text, no content."""

from pathlib import Path
from typing import Any

import pytest
from tests.language.models import write_json
from tests.language.rows import only

from deltaw.language.data.samples import Conversation, Message
from deltaw.language.encoding import naming
from deltaw.language.encoding.answers import answers
from deltaw.language.encoding.calling import Dialect, dialect_of, spoken
from deltaw.language.training import opening
from deltaw.train.console import Console
from deltaw.train.recipe import parse
from deltaw.train.rendering import Template

LONG = "call_9pw1qnYScqvGrCH58HWCvFH6"
NINE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- if tools and m == asked[-1] %}[TOOLS]{{ tools | tojson }}{% endif %}"
    "[INST]{{ m.content }}[/INST]"
    "{%- elif m.tool_calls is defined -%}{%- for c in m.tool_calls -%}"
    "{%- if c.id is not defined or c.id | length != 9 %}{{ raise_exception('nine') }}{% endif -%}"
    "[CALLS]{{ c.function | tojson }}{{ c.id }}{%- endfor -%}</s>"
    "{%- elif m.role == 'tool' -%}"
    "{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('nine') }}{% endif -%}"
    "[RESULT]{{ m.content }}{{ m.tool_call_id }}[/RESULT]"
    "{%- else %}{{ m.content }}</s>{% endif -%}{%- endfor -%}"
)
TEXT = (
    "{%- for m in messages -%}<{{ m.role }}>{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}"
    "{{ c.function.name + ':' + c.function.arguments }}{%- endfor -%}</s>{%- endif -%}"
    "{%- if m.content is not none %}{{ m.content }}</s>{% endif -%}{%- endfor -%}"
)
BARE = (
    "{%- for m in messages -%}<{{ m.role }}>{{ m.content }}{%- for c in m.tool_calls or () -%}"
    "{{ c.function.name }}{{ c.function.arguments }}{%- endfor -%}</s>{%- endfor -%}"
)


def openai(id_: str | None, city: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": f'{{"c": "{city}"}}'}}
    return call if id_ is None else {"id": id_, **call}


def row(first: str | None, second: str | None) -> dict[str, Any]:
    told = [{"tool_call_id": second} if second else {}, {"tool_call_id": first} if first else {}]
    return {
        "messages": [
            {"role": "user", "content": "w"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [openai(first, "P"), openai(second, "R")],
            },
            {"role": "tool", "content": "1", **told[0]},
            {"role": "tool", "name": "f", "content": "2", **told[1]},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "v"},
            {"role": "assistant", "content": "y"},
        ],
        "tools": [{"name": "f"}],
    }


def template(source: str) -> Template:
    return Template(source, {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("source", "dialect"),
    [
        (NINE, Dialect("made")),
        (TEXT, Dialect(text=True, none=True)),
        (BARE, Dialect(text=True)),
        (naming.source("chatml"), Dialect()),
        (naming.source("phi3"), Dialect()),
        ("{{ raise_exception('no') }}", Dialect()),
    ],
)
def test_a_template_shows_how_it_wants_calls(source: str, dialect: Dialect) -> None:
    assert dialect_of(template(source)) == dialect


def test_ids_of_rows_are_kept_and_answers_find_their_call(tmp_path: Path) -> None:
    sample = only(tmp_path, row(LONG, "other"))
    assert isinstance(sample, Conversation)
    data = spoken(sample.messages, Dialect())
    assert [call["id"] for call in data[1]["tool_calls"]] == [LONG, "other"]
    assert data[2] == {"role": "tool", "content": "1", "tool_call_id": "other"}
    assert data[3] == {"role": "tool", "content": "2", "tool_call_id": LONG, "name": "f"}
    assert only(tmp_path, row(None, None)).messages == sample.messages  # type: ignore[union-attr]


@pytest.mark.parametrize("ids", [(LONG, "other"), (None, None)])
def test_ids_that_do_not_fit_are_made(tmp_path: Path, ids: Any) -> None:
    sample = only(tmp_path, row(*ids))
    assert isinstance(sample, Conversation)
    text, spans = answers(template(NINE), sample.messages, sample.tools, ("</s>",))
    assert [text[a:b] for a, b in spans] == [
        '[CALLS]{"name": "f", "arguments": {"c": "P"}}call00001'
        '[CALLS]{"name": "f", "arguments": {"c": "R"}}call00002</s>',
        "x</s>",
        "y</s>",
    ]
    first, second = ("call00002", "call00001") if ids[0] else ("call00001", "call00002")
    assert f"[RESULT]1{first}[/RESULT][RESULT]2{second}[/RESULT]" in text


def test_calls_of_one_id_are_answered_in_turn(tmp_path: Path) -> None:
    sample = only(tmp_path, row("same", "same"))
    assert isinstance(sample, Conversation)
    data = spoken(sample.messages, Dialect("made"))
    assert [turn.get("tool_call_id") for turn in data[2:4]] == ["call00001", "call00002"]


def test_ids_of_nine_letters_stay(tmp_path: Path) -> None:
    sample = only(tmp_path, row("VvvODy9mT", "AbC123xyz"))
    assert isinstance(sample, Conversation)
    data = spoken(sample.messages, Dialect("made"))
    assert [turn.get("tool_call_id") for turn in data[2:4]] == ["AbC123xyz", "VvvODy9mT"]


def test_arguments_are_text_where_that_is_wanted() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"c": "巴黎"}}}
    turns = (Message("user", "w"), Message("assistant", "", (call,)))
    for source in (TEXT, BARE):
        text, ((a, b),) = answers(template(source), turns, (), ("</s>",))
        assert text[a:b].endswith('{"c": "巴黎"}</s>')
        assert text.count("</s>") == 2  # none of an empty answer behind the call


def test_a_resume_knows_how_calls_were_written(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is part of what is noted only where samples have calls that are not written plainly."""
    data = write_json(tmp_path / "calls.json", [row(None, None)])
    (tmp_path / "text.jinja").write_text(TEXT)

    def noted(**more: Any) -> str:
        values = {"model": str(talker / "model"), "validation_share": 0, **more}
        return opening.begin(parse(values), Console(), ("loss",))._reading()

    calls, text = str(data), str(tmp_path / "text.jinja")
    asked = (
        {"data": calls, "template": text},
        {"data": calls, "template": "chatml"},
        {"data": str(talker / "data.json"), "template": text},
    )
    now = [noted(**one) for one in asked]
    monkeypatch.setattr(opening, "dialect_of", lambda template: Dialect())
    assert [noted(**one) == known for one, known in zip(asked, now, strict=True)] == [
        False,
        True,
        True,
    ]
