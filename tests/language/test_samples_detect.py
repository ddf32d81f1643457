"""Which schema the columns make, what a person says about them, and what is no language data."""

import re
from pathlib import Path
from typing import Any

import pytest
from tests.language.rows import parsed, table, write_rows

from deltaw.errors import DataError
from deltaw.language.data.detect import detect, find, given, is_language
from deltaw.language.data.schema import Tags
from deltaw.train.data.table import read_data

TURNS = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "kind", "columns"),
    [
        ({"instruction": "a", "output": "b"}, "instruction", "prompt response"),
        (
            {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": []},
            "instruction",
            "prompt query history response system",
        ),
        ({"input": "a", "instruction": "b", "answer": "c"}, "instruction", "prompt query response"),
        ({"question": "a", "context": "b", "answer": "c"}, "instruction", "prompt response"),
        ({"instruction": "a", "instances": []}, "instances", "prompt instances"),
        ({"messages": TURNS, "prompt": "a", "text": "b"}, "dialogue", "messages"),
        (
            {"conversations": TURNS, "tools": "[]", "images": []},
            "dialogue",
            "messages tools images",
        ),
        ({"messages": TURNS, "label": "sport"}, "dialogue", "messages"),
        ({"messages": TURNS, "label": False}, "rating", "messages kto_tag"),
        ({"prompt": "a", "completion": "b"}, "completion", "prompt completion"),
        ({"prompt": "a", "completion": "b", "label": 1}, "rating", "prompt completion kto_tag"),
        ({"prompt": "a", "output": "b"}, "instruction", "prompt response"),
        ({"input": "a", "prompt": "b", "output": "c"}, "instruction", "prompt query response"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "prompt chosen rejected"),
        ({"chosen": TURNS, "rejected": TURNS}, "preference", "chosen rejected"),
        ({"mr": "a", "ref": "b"}, "completion", "prompt completion"),
        ({"text": "a", "title": "b"}, "text", "text"),
        ({"text": "a", "query": "b"}, "instruction", "prompt response"),
        ({"content": "a", "prompt": "b"}, "instruction", "prompt response"),
        ({"text": "a", "question": "b", "answer": "c"}, "instruction", "prompt response"),
        ({"text": "a", "question": "b", "label": "yes"}, "text", "text"),
    ],
)
def test_the_names_of_columns_decide(tmp_path: Path, row: Any, kind: str, columns: str) -> None:
    schema = detect(table(tmp_path, [row]))
    assert (schema.kind, [*schema.columns]) == (kind, columns.split())


def test_a_label_judges_only_if_all_of_it_does(tmp_path: Path) -> None:
    rows = [{"messages": TURNS, "label": label} for label in (True, None, "sport")]
    assert detect(table(tmp_path, rows)).kind == "dialogue"
    assert detect(table(tmp_path, rows[:2])).kind == "rating"


@pytest.mark.parametrize(
    "row",
    [
        {"sentence": "a", "label": 1},
        {"messages": "spam", "label": 1},
        {"chosen": "a", "rejected": "b"},
        {"question": "a", "sentence": "b"},
        {"data": [1]},
    ],
)
def test_other_columns_make_nothing(tmp_path: Path, row: Any) -> None:
    found = table(tmp_path, [row])
    assert find(found) is None
    with pytest.raises(DataError) as caught:
        detect(found)
    message = str(caught.value)
    assert all(f'"{name}"' in message for name in row)
    assert message.startswith(found.path) and "\nFix: name them as" in message


def test_rows_of_another_schema_are_problems(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": said},
        {"instruction": "a", "output": "b"},
        {"text": "a"},
        {"messages": [], "note": "a"},
        {"messages": said, "text": "a"},
    ]
    found = parsed(tmp_path, rows)
    assert len(found.samples) == 2
    assert [(p.line, p.reason) for p in found.problems] == [
        (
            2,
            'no message in "messages"; its own columns are of another kind, instructions: '
            'prompt "instruction", response "output" (by their names)',
        ),
        (
            3,
            'no message in "messages"; its own columns are of another kind, text: '
            'text "text" (by their names)',
        ),
    ]
    assert [(s.line, s.reason) for s in found.skipped] == [(4, 'no message in "messages"')]


def test_the_reasons_are_a_sentence(tmp_path: Path) -> None:
    found = table(tmp_path, [{"question": "a", "reply\x1b": "b", "answer": "c"}])
    assert detect(found).reasons == (
        'instructions: prompt "question", response "answer" (by their names)'
    )
    schema = given(found, {"prompt": "question", "response": "reply\x1b"}, Tags())
    assert schema.reasons == 'instructions: prompt "question", response "reply\\x1b" (as given)'


@pytest.mark.parametrize(
    ("columns", "kind", "plain"),
    [
        ({"prompt": "a", "response": "b"}, "instruction", False),
        ({"prompt": "a", "completion": "b"}, "completion", True),
        ({"prompt": "a"}, "text", False),
        ({"text": "a"}, "text", False),
        ({"messages": "a", "system": "b"}, "dialogue", False),
        ({"messages": "a", "kto_tag": "b"}, "rating", False),
        ({"prompt": "a", "response": "b", "kto_tag": "c"}, "rating", False),
        ({"prompt": "a", "completion": "b", "kto_tag": "c"}, "rating", True),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", False),
        ({"messages": "a", "images": "no such column"}, "dialogue", False),
    ],
)
def test_roles_decide_when_they_are_given(
    tmp_path: Path, columns: Any, kind: str, plain: bool
) -> None:
    found = table(tmp_path, [{"a": "1", "b": "2", "c": "3"}])
    schema = given(found, columns, Tags())
    assert (schema.kind, schema.plain) == (kind, plain)


def test_all_problems_of_given_columns_come_together(tmp_path: Path) -> None:
    found = table(tmp_path, [{"question": "1", "reply": "2"}])
    with pytest.raises(DataError) as caught:
        given(found, {"promt": "question", "response": "replay"}, Tags())
    message = str(caught.value)
    assert 'unknown role "promt"; did you mean "prompt"?' in message
    assert 'no column "replay" for response; did you mean "reply"?' in message
    assert 'The file\'s columns are "question", "reply".' in message
    with pytest.raises(DataError, match="the roles response do not make a sample"):
        given(found, {"response": "reply"}, Tags())
    with pytest.raises(DataError, match="a ranking needs the roles chosen and rejected"):
        given(found, {"prompt": "question", "response": "reply"}, Tags(), ranking=True)


WORDS = "the cat sat on the mat"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": f"{WORDS} {n}"} for n in range(9)], True),
        ([{"text": f"{WORDS} {n}", "id": n, "title": f"t{n}"} for n in range(9)], True),
        ([{"text": f"{WORDS} {n}", "label": n % 2} for n in range(9)], False),
        ([{"text": f"{WORDS} {n}", "labels": n} for n in range(9)], False),
        ([{"text": f"{WORDS} {n}", "mood": "ab"[n % 2]} for n in range(9)], False),
        ([{"text": f"{WORDS} {n}", "category": "ab"[n % 2]} for n in range(9)], False),
        ([{"instruction": "a", "response": "b", "category": "c"}], True),
        ([{"question": "a", "answer": "b"}], True),
        ([{"question": "a", "answer": "b", "label": "x"}], False),
        ([{"instruction": "a", "output": "b", "label": "x"}], True),
        ([{"messages": TURNS, "label": "x"}], True),
        ([{"messages": TURNS}], True),
        ([{"prompt": "a", "completion": "b", "label": True}], True),
        ([{"sentence": "a b c", "label": 1}], False),
        ([{"sentence1": "a b", "sentence2": "b c", "score": 1.5}], False),
    ],
)
def test_labelled_rows_are_no_language_data(tmp_path: Path, rows: Any, expected: bool) -> None:
    for name in ("data.jsonl", "data.json"):
        assert is_language(read_data(write_rows(tmp_path / name, rows), prose=True)) is expected


def test_a_text_file_is_language_data(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Once upon a time.\n")
    assert is_language(read_data(tmp_path / "book.txt", prose=True))


def test_real_labelled_data_is_no_language_data(shared: Path) -> None:
    names = ("sst2", "snips_nlu", "banking77", "glue_rte", "glue_mrpc")
    assert not any(is_language(read_data(shared / "data" / name, prose=True)) for name in names)


def test_the_error_for_a_folder_is_readable(tmp_path: Path) -> None:
    found = table(tmp_path, [{f"column {n}": "x" for n in range(40)}])
    with pytest.raises(DataError) as caught:
        detect(found)
    assert len(re.findall("column ", str(caught.value))) == 30
