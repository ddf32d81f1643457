"""Whatever JSON a row holds, it gives samples, a skip or a problem, and never anything else."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import DataError
from deltaw.language.data.detect import find
from deltaw.language.data.keys import content_key, prompt_key
from deltaw.language.data.parse import parse
from deltaw.language.data.samples import Message
from deltaw.train.data.jsonrows import read_jsonl
from deltaw.train.data.rows import Table

TEXT = st.text(max_size=8) | st.sampled_from(
    ["", " ", "user", "[{", '[{"role": "user"}]', '"\\ud83d"']
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
KEYS = st.sampled_from(
    ["role", "from", "content", "value", "function", "name", "arguments", "type", "text", "loss"]
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "function_call"])
ANYTHING = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=4),
)
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE | ANYTHING, "content": TEXT | ANYTHING},
    optional={"tool_calls": ANYTHING, "loss": SCALAR},
)
TALK = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4).map(
    lambda texts: [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]
)
VALUE = TEXT | TALK | TALK.map(json.dumps) | st.lists(MESSAGE, max_size=5) | ANYTHING
SHAPES = (
    ("instruction", "input", "output", "history", "system"),
    ("instruction", "instances"),
    ("question", "answer", "images"),
    ("messages", "system", "tools"),
    ("conversations", "kto_tag"),
    ("prompt", "completion", "label"),
    ("prompt", "chosen", "rejected"),
    ("conversations", "chosen", "rejected", "system"),
    ("text", "audios"),
)


def rows_of(names: Sequence[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    row = st.fixed_dictionaries({names[0]: VALUE}, optional=dict.fromkeys(names[1:], VALUE))
    return st.lists(row, min_size=1, max_size=3)


ROWS = st.sampled_from(SHAPES).flatmap(rows_of)


@given(ROWS)
def test_any_row_is_a_sample_a_skip_or_a_problem(rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        columns, read = read_jsonl(text, "f")
    except DataError:
        return
    table = Table("f", columns, tuple(read), (), "")
    schema = find(table)
    if schema is None:
        return
    found = parse(table, schema)
    places = [s.line for s in found.samples] + [s.line for s in found.skipped + found.problems]
    assert {*places} == {*range(1, len(rows) + 1)}
    if schema.kind != "instances":
        assert len(places) == len(rows)
    for sample in found.samples:
        hash((content_key(sample), prompt_key(sample)))
        repr(sample).encode()
        for message in getattr(sample, "messages", ()):
            assert isinstance(message, Message) and isinstance(message.content, str)
            message.content.encode()
    for skip in found.skipped + found.problems:
        assert str(skip).isprintable()
