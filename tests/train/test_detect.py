"""Columns and task are found by names, then by values, or asked for."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from deltaw.errors import DataError
from deltaw.train.data.detect import Task, detect
from deltaw.train.data.rows import Row, Table, Value
from deltaw.train.data.table import read_data


def table(columns: dict[str, Sequence[Value]]) -> Table:
    values = zip(*columns.values(), strict=True)
    rows = tuple(Row("t.csv", line, row) for line, row in enumerate(values, 2))
    return Table("t.csv", tuple(columns), rows, (), "")


TEXTS = [f"this is message number {n}" for n in range(8)]
OTHERS = [f"and that is the other text {n}" for n in range(8)]
CLASSES = ["a", "b"] * 4
IDS = [str(n) for n in range(8)]


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ({"text": TEXTS, "label": CLASSES}, ("text",), "label"),
        ({" Text": IDS, "CLASS ": CLASSES}, (" Text",), "CLASS "),
        ({"review": TEXTS, "title": OTHERS, "stars": CLASSES}, ("review",), "stars"),
        (
            {"sentence2": OTHERS, "sentence1": TEXTS, "label": CLASSES},
            ("sentence1", "sentence2"),
            "label",
        ),
        (
            {"question": TEXTS, "sentence": OTHERS, "label": CLASSES},
            ("question", "sentence"),
            "label",
        ),
        ({"id": IDS, "kind": CLASSES, "what was said": TEXTS}, ("what was said",), "kind"),
        (
            {"#1 ID": IDS, "#2 ID": IDS, "#1 String": TEXTS, "#2 String": OTHERS, "same": CLASSES},
            ("#1 String", "#2 String"),
            "same",
        ),
        ({"part a": TEXTS, "part b": OTHERS, "label": CLASSES}, ("part a", "part b"), "label"),
        ({"text": TEXTS, "id": IDS, "number": [0, 1] * 4}, ("text",), "number"),
    ],
)
def test_columns(columns: dict[str, Sequence[Value]], text: tuple[str, ...], label: str) -> None:
    schema = detect(table(columns))
    assert (schema.text, schema.label, schema.task) == (text, label, "classification")
    assert all(f'"{name}"' in schema.reasons for name in (*text, label))


def test_options_override_names() -> None:
    columns = {"text": TEXTS, "label": CLASSES, "note": OTHERS, "kind": CLASSES}
    schema = detect(table(columns), text=("note", "text"), label="kind", task="regression")
    assert (schema.text, schema.label, schema.task) == (("note", "text"), "kind", "regression")
    assert detect(table(columns), text="note").text == ("note",)
    assert schema.reasons.count("as given") == 3


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        ([1, 0] * 4, "classification"),
        (["1.0", "0.0"] * 4, "classification"),
        (["1", "2", "3", "4", "5", "5", "5", "5"], "classification"),
        (["5.000", "3.8", *("1.0",) * 6], "regression"),
        ([0.5, 1.0, None, 2, 3, 4, 5, 6], "regression"),
        (["0.5", "high", *("1.0",) * 6], "classification"),
        ([True, False] * 4, "classification"),
    ],
)
def test_task(labels: list[Value], task: Task) -> None:
    assert detect(table({"text": TEXTS, "label": labels})).task == task


def test_many_whole_numbers_that_differ_are_a_regression() -> None:
    texts = [f"some words {n}" for n in range(60)]
    assert detect(table({"text": texts, "label": list(range(60))})).task == "regression"
    classes = [n % 29 for n in range(60)]
    assert detect(table({"text": texts, "label": classes})).task == "classification"


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"text": TEXTS, "x": CLASSES, "y": CLASSES}, ["label=COLUMN", '"x": 2 different values']),
        ({"text": TEXTS, "id": IDS}, ["cannot tell which column is the label", '"0", "1", "2"']),
        ({"this": TEXTS, "that": OTHERS, "label": CLASSES}, ["text=COLUMN", '"that": 8']),
        ({"id": IDS, "label": CLASSES}, ["cannot tell which column is the text"]),
    ],
)
def test_doubt_is_an_error_that_describes_the_columns(
    columns: dict[str, Sequence[Value]], parts: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        detect(table(columns))
    assert all(part in str(caught.value) for part in parts)


def test_options_that_do_not_fit_are_all_listed() -> None:
    with pytest.raises(DataError) as caught:
        detect(table({"text": TEXTS, "label": CLASSES}), text=("txt", "a", "a"), label="lable")
    message = str(caught.value)
    assert 'no column "txt"; did you mean "text"?' in message
    assert 'no column "lable"; did you mean "label"?' in message
    assert 'column "a" is named more than once' in message
    assert "3 text columns" in message
    assert "t.csv" in message


@pytest.mark.parametrize(
    ("name", "text", "label", "task"),
    [
        ("sst2", ("sentence",), "label", "classification"),
        ("snips_nlu", ("text",), "label", "classification"),
        ("banking77", ("text",), "category", "classification"),
        ("glue_rte", ("sentence1", "sentence2"), "label", "classification"),
        ("glue_mrpc", ("#1 String", "#2 String"), "Quality", "classification"),
        ("glue_stsb/train.tsv", ("sentence1", "sentence2"), "score", "regression"),
    ],
)
def test_real_data(shared: Path, name: str, text: tuple[str, ...], label: str, task: Task) -> None:
    schema = detect(read_data(shared / "data" / name).train)
    assert (schema.text, schema.label, schema.task) == (text, label, task)
