"""JSON lines and arrays come back exactly, with the line every object begins on."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import DataError
from deltaw.train.data.jsonrows import read_json, read_jsonl
from deltaw.train.data.rows import Opaque

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
OBJECTS = st.lists(
    st.builds(lambda text, label: {"text": text, "label": label}, TEXT, SCALAR), min_size=1
)


def error(text: str, ending: str = "jsonl") -> str:
    read = read_jsonl if ending == "jsonl" else read_json
    with pytest.raises(DataError) as caught:
        read(text, f"data.{ending}")
    return str(caught.value)


@given(OBJECTS, st.booleans(), st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
def test_json_lines_are_read_exactly(
    objects: list[dict[str, object]], ascii_only: bool, end: str
) -> None:
    text = "".join(json.dumps(value, ensure_ascii=ascii_only) + end for value in objects)
    step = 2 if end == "\n\n" else 1
    for read in (read_jsonl, read_json):
        columns, rows = read(text, "f")
        assert columns == ("text", "label")
        assert [row.values for row in rows] == [(v["text"], v["label"]) for v in objects]
        assert [type(row.values[1]) for row in rows] == [type(v["label"]) for v in objects]
        assert [row.line for row in rows] == [1 + step * index for index in range(len(objects))]


@given(OBJECTS, st.sampled_from([None, 0, 2]))
def test_a_json_array_is_read_exactly(objects: list[dict[str, object]], indent: int | None) -> None:
    _, rows = read_json(json.dumps(objects, indent=indent), "f")
    assert [row.values for row in rows] == [(v["text"], v["label"]) for v in objects]
    first, step = (1, 1) if indent is None else (2, 4)
    assert [row.line for row in rows] == [first + step * index for index in range(len(objects))]


def test_missing_keys_are_null_and_nested_values_opaque() -> None:
    columns, rows = read_jsonl('{"b": 1}\n{"a": [1], "c": {"x": 1}}\n{"a": NaN}\n', "f")
    assert columns == ("b", "a", "c")
    assert rows[0].values == (1, None, None)
    assert rows[1].values == (None, Opaque("a list"), Opaque("an object"))
    assert math.isnan(rows[2].values[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ['{"data": [{"text": "a", "label": 1}]}', '{"version": 1, "data": {"0": {}}}\n']
)
def test_an_object_around_the_rows_is_refused(text: str) -> None:
    with pytest.raises(
        DataError, match=r'"data" holds (a list|an object)\nFix: make the file an ar'
    ):
        read_json(text, "d.json")
    assert read_jsonl(text, "d.jsonl")[1]


def test_every_bad_line_is_listed() -> None:
    message = error(
        '{"text": "a"}\n{"text": }\n[1, 2]\n"x"\n{"text": "a", "text": "b"}\n'
        f'{{"text": "\\ud83d"}}\n{{"n": {"9" * 5000}}}\n' + '{"text": ' + "[" * 100_000 + "\n"
    )
    for line, part in [
        (2, "invalid JSON: Expecting value (column 10)"),
        (3, "not an object: [1, 2]"),
        (4, 'not an object: "x"'),
        (5, 'the key "text" occurs twice'),
        (6, "'text' holds half of a surrogate pair"),
        (7, "Exceeds the limit"),
        (8, "nested too deeply"),
    ]:
        assert f"data.jsonl:{line}: {part}" in message
    assert "data.jsonl:1:" not in message
    assert message.splitlines()[-1] == (
        'Fix: write one object per line, {"COLUMN": "value", ...}, its texts in double quotes.'
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', "data.json:3: invalid JSON"),
        ('[\n{"a": 1}\n{"a": 2}\n]', "data.json:3: expected a comma"),
        ('[\n{"a": 1}', "data.json:2: expected a comma or the end"),
        ('[{"a": 1}]\nx', "data.json:2: text after the end"),
        ('[{"a": 1},\n 5]', "data.json:2: not an object: 5"),
        ('{\n"a": 1\n}', "data.json:1: invalid JSON"),
    ],
)
def test_damaged_arrays_name_the_line(text: str, problem: str) -> None:
    assert problem in error(text, "json")
