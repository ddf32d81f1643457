"""Tables for a trained model: the labels it knows, or none at all."""

import shutil
from pathlib import Path

import pytest
from tests.train.conftest import Command

from deltaw.errors import DataError
from deltaw.train.data.detect import Schema
from deltaw.train.data.evaluation import build_evaluation, build_texts
from deltaw.train.data.examples import Example
from deltaw.train.data.rows import Row, Table, Value

SCHEMA = Schema(("text",), "label", "classification", "")


def table(*rows: tuple[Value, ...]) -> Table:
    numbered = tuple(Row("new.csv", line, row) for line, row in enumerate(rows, 2))
    return Table("new.csv", ("text", "label")[: len(rows[0])], numbered, (), "")


def test_labels_keep_the_numbers_of_the_trained_model() -> None:
    part = build_evaluation(table(("x", "b"), ("", "a"), ("y", "b ")), SCHEMA, ("c", "b", "a"))
    assert part.examples == (
        Example("x", None, 1, "new.csv", 2),
        Example("y", None, 1, "new.csv", 4),
    )
    assert [str(skip) for skip in part.skipped] == ['new.csv:3: no text in "text"']
    assert part.warnings == ('label "b" unites 1 row with "b ", 1 row with "b"',)


def test_a_regression_needs_no_labels() -> None:
    schema = Schema(("text",), "label", "regression", "")
    assert build_evaluation(table(("x", "2.5")), schema, ()).examples[0].label == 2.5


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([("x", "d"), ("y", "a")], '"d": 1 row, first new.csv:2'),
        ([("x",)], 'new.csv: no column "label"'),
        ([(3, "a")], "new.csv:2: column"),
        ([("", "a")], "skipped: 1 row"),
    ],
)
def test_bad_tables(rows: list[tuple[Value, ...]], problem: str) -> None:
    with pytest.raises(DataError, match="Fix: ") as caught:
        build_evaluation(table(*rows), SCHEMA, ("a", "b"))
    assert problem in str(caught.value)
    assert "name the columns to use" not in str(caught.value)
    assert "name other columns" not in str(caught.value)


def test_a_missing_column_is_asked_for_by_the_name_it_had() -> None:
    with pytest.raises(DataError, match=r'Fix: name its columns as in .*: "text", "label"'):
        build_evaluation(table(("x",)), SCHEMA, ("a", "b"))


def test_texts_need_no_labels() -> None:
    part = build_texts(table(("x",), (None,), ("y",)), ("text",))
    assert [example.text for example in part.examples] == ["x", "y"]
    assert {example.label for example in part.examples} == {None}
    assert len(part.skipped) == 1
    with pytest.raises(DataError, match='no column "body"'):
        build_texts(table(("x",)), ("body",))


def test_a_run_whose_data_are_gone_says_how_to_score_it(
    deltaw_command: Command, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    recipe = run / "recipe.yaml"
    lines = recipe.read_text("utf-8").splitlines()
    moved = [f"data: {tmp_path}/gone" if line.startswith("data: ") else line for line in lines]
    recipe.write_text("\n".join(moved) + "\n", encoding="utf-8")
    code, _, err = deltaw_command("eval", run)
    assert code == 1
    assert err == (
        f"error: The run's own data are no longer at {tmp_path}/gone.\n"
        "Fix: give the rows to score: deltaw eval RUN DATA\n"
    )


def test_a_text_that_begins_with_a_dash_goes_behind_two(
    deltaw_command: Command, finished: Path
) -> None:
    code, out, _ = deltaw_command("predict", finished, "--", "-5 stars")
    assert code == 0
    assert len(out.splitlines()) == 3
    _, out, _ = deltaw_command("predict", "--help")
    assert "text like -5 write --" in " ".join(out.replace("│", "").split())
