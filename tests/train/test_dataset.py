"""From parts to clean examples: nothing is lost without a word, nothing leaks."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import DataError
from deltaw.train.data.dataset import Data, build
from deltaw.train.data.detect import Schema, Task
from deltaw.train.data.examples import Example, distribution
from deltaw.train.data.rows import Opaque, Row, Table, Value
from deltaw.train.data.table import Splits, read_data

Rows = list[tuple[Value, Value]]


def table(rows: Rows, name: str = "train") -> Table:
    numbered = tuple(Row(name, line, row) for line, row in enumerate(rows, 2))
    return Table(name, ("text", "label"), numbered, (), f"digest of {name}")


def data(
    train: Rows,
    validation: Rows | None = None,
    test: Rows | None = None,
    *,
    task: Task = "classification",
    seed: int = 0,
    share: float = 0.1,
    tested: float = 0.0,
    allow_leakage: bool = False,
    max_train_rows: int | None = None,
) -> Data:
    splits = Splits(
        table(train),
        None if validation is None else table(validation, "valid"),
        None if test is None else table(test, "test"),
    )
    return build(
        splits,
        Schema(("text",), "label", task, ""),
        seed=seed,
        validation_share=share,
        test_share=tested,
        allow_leakage=allow_leakage,
        max_train_rows=max_train_rows,
    )


def error(
    train: Rows,
    validation: Rows | None = None,
    test: Rows | None = None,
    task: Task = "classification",
) -> str:
    with pytest.raises(DataError) as caught:
        data(train, validation, test, task=task)
    assert "Fix: " in str(caught.value)
    return str(caught.value)


GOOD: Rows = [(f"{label} text {n}", label) for n in range(10) for label in ("b", "a")]
HELD: Rows = [("held a", "a"), ("held b", "b")]


def test_examples_carry_text_class_and_place() -> None:
    found = data([*GOOD, (" kept\r\nas is ", "a ")], HELD, [("tested", "b")])
    assert found.labels == ("a", "b")
    assert found.train[0] == Example("b text 0", None, 1, "train", 2)
    assert found.train[-1] == Example(" kept\r\nas is ", None, 0, "train", 22)
    assert found.validation == (
        Example("held a", None, 0, "valid", 2),
        Example("held b", None, 1, "valid", 3),
    )
    assert found.test == (Example("tested", None, 1, "test", 2),)
    assert distribution(found.train, found.labels) == {"a": 11, "b": 10}
    assert found.hashes == {name: f"digest of {name}" for name in ("train", "valid", "test")}
    assert found.warnings == ('label "a" unites 11 rows with "a", 1 row with "a "',)


def test_a_test_part_is_held_out_where_there_is_none() -> None:
    found = data(GOOD, tested=0.3, share=0.2)
    parts = (found.train, found.validation, found.test)
    assert [len(part) for part in parts] == [12, 2, 6]
    assert len({example.text for part in parts for example in part}) == len(GOOD)
    assert distribution(found.test, found.labels) == {"a": 3, "b": 3}
    assert data(GOOD, tested=0.3, share=0.2, seed=1).test != found.test
    given = data(GOOD, test=HELD, tested=0.3)
    assert [example.text for example in given.test] == ["held a", "held b"]
    unlabelled = data(GOOD, test=[("x", ""), ("y", None)], tested=0.3)
    assert len(unlabelled.test) == 6
    for share in (-0.1, 1.0):
        with pytest.raises(DataError, match="the test share is"):
            data(GOOD, tested=share)


def test_pairs_and_numbers() -> None:
    rows = tuple(Row("t", n, (f"one {n}", f"two {n}", str(n / 2))) for n in range(20))
    splits = Splits(Table("t", ("a", "b", "score"), rows, (), ""))
    found = build(splits, Schema(("a", "b"), "score", "regression", ""), validation_share=0.25)
    assert found.labels == ()
    assert len(found.validation) == 5
    assert all(e.pair == f"two {e.line}" and e.label == e.line / 2 for e in found.train)


def test_rows_without_text_or_label_are_skipped_with_their_line() -> None:
    bad: Rows = [("", "a"), (" \t", "a"), (None, "a"), ("x", ""), ("y", "NaN"), ("z", float("nan"))]
    found = data([*bad, *GOOD], [("", "a"), *HELD])
    assert [str(skip) for skip in found.skipped] == [
        *(f'train:{line}: no text in "text"' for line in (2, 3, 4)),
        *(f'train:{line}: no label in "label"' for line in (5, 6, 7)),
        'valid:2: no text in "text"',
    ]
    assert len(found.train) == len(GOOD)


def test_all_rows_skipped() -> None:
    message = error([("", "a"), ("x", None), (None, "b")])
    assert "train: nothing is left, skipped: 3 rows" in message
    assert '2 rows: no text in "text"; first train:2' in message
    assert '1 row: no label in "label"; first train:3' in message
    assert "valid: nothing is left, skipped: 1 row" in error(GOOD, [("", "a")])


def test_nonsense_of_all_parts_is_listed_together() -> None:
    message = error(
        [(Opaque("a list"), "a"), (7, "b"), *GOOD],
        [("x", Opaque("an object")), *HELD],
        [(True, "a")],
    )
    for part in (
        'train:2: column "text" holds a list, not text',
        'train:3: column "text" holds the value 7, not text',
        'valid:2: label column "label" holds an object',
        'test:2: column "text" holds the value True, not text',
    ):
        assert part in message


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        ("high", '"high", not a number'),
        ("inf", '"inf", not a finite number'),
        (float("-inf"), "-inf, not a finite number"),
        (True, "True, not a number"),
    ],
)
def test_regression_labels_are_finite_numbers(label: Value, complaint: str) -> None:
    rows: Rows = [("one", 1.5), ("two", 2.5), ("three", label)]
    assert f'train:4: label column "label" holds {complaint}' in error(rows, task="regression")


def test_mixed_spellings_are_one_class_and_said() -> None:
    rows: Rows = [("p", 1), ("q", "1"), ("r", 1.0), ("s", "yes "), ("t", "yes"), ("u", "Yes")]
    found = data(rows, share=0)
    assert found.labels == ("1", "Yes", "yes")
    unified, stripped, case = found.warnings
    assert unified == 'label "1" unites 1 row with "1", 1 row with 1, 1 row with 1.0'
    assert '"yes "' in stripped
    assert case.endswith('"yes" in 2 rows, "Yes" in 1 row')


def test_labels_that_are_no_classes() -> None:
    assert 'only "a" in 2 usable' in error([("x", "a"), ("y", "a ")])
    assert 'only "1.0"' in error([("x", 1), ("y", "1.0")], task="regression")
    many: Rows = [(f"t{n}", f"id{n}") for n in range(40)]
    assert "40 different labels in 40 rows" in error(many)


def test_unseen_labels_are_all_listed() -> None:
    message = error(GOOD, [("x", "c"), ("y", "c"), *HELD], [("z", "B")])
    assert '"c": 2 rows, first valid:2' in message
    assert '"B": 1 row, first test:2' in message
    assert 'training has "a", "b"' in message


def test_leaks_are_refused_or_dropped_from_training() -> None:
    train: Rows = [("leak\x1b", "a"), *GOOD, (" leak\x1b ", "b")]
    test: Rows = [("leak\x1b", "a"), ("x", "b"), ("leak\x1b", "b")]
    message = error(train, HELD, test)
    assert message.startswith("held out too, so evaluation would flatter: 2 training rows\n")
    assert 'train:2 "leak\\x1b" is also test:2' in message
    assert "train:23" in message
    assert "allow_leakage=true" in message
    found = data(train, HELD, test, allow_leakage=True)
    assert len(found.train) == len(GOOD)
    assert len(found.test) == 3
    assert [str(s) for s in found.skipped] == [
        "train:2: held out too: test:2",
        "train:23: held out too: test:2",
    ]
    assert "2 training rows dropped because held out too" in found.warnings


def test_a_text_in_validation_and_test_is_said() -> None:
    assert data(GOOD, HELD, HELD).warnings == ("in the test part too: 2 validation rows",)


def test_contradictions_and_repetitions_are_kept_and_said() -> None:
    found = data([("same", "a"), *GOOD, ("same", "b"), ("same", "a"), ("b text 0", "b")], HELD)
    conflict, copies = found.warnings
    assert conflict == (
        '1 text with different labels, all kept: "same" is "a" at train:2, "b" at train:23'
    )
    assert copies == (
        "2 repeated training rows, all kept: train:24 repeats train:2; train:25 repeats train:3"
    )
    assert len(found.train) == len(GOOD) + 4


def test_a_test_part_without_labels_is_left_out() -> None:
    blind = Table("test", ("text",), (Row("test", 2, ("x",)),), (), "")
    schema = Schema(("text",), "label", "classification", "")
    found = build(Splits(table(GOOD), table(HELD, "valid"), blind), schema)
    assert found.test == ()
    assert found.warnings == ("test: no labels, so the test part is not used",)
    assert data(GOOD, HELD, [("x", None)]).warnings == found.warnings
    with pytest.raises(DataError, match='valid: no column "label"'):
        build(Splits(table(GOOD), Table("valid", ("text",), (), (), "")), schema)


def test_too_few_rows_to_hold_out() -> None:
    assert "too few rows" in error([("x", "a"), ("y", "b")])
    found = data([*GOOD, ("alone", "c")])
    assert found.warnings == (
        'not evaluated, because only two different texts or more can be split: "c"',
    )
    assert distribution(found.validation, found.labels) == {"a": 1, "b": 1, "c": 0}


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_impossible_shares(share: float) -> None:
    with pytest.raises(DataError, match="validation share"):
        data(GOOD, share=share)


LABELLED = st.lists(
    st.tuples(st.sampled_from([f"text {n}" for n in range(30)]), st.sampled_from("abc")),
    min_size=10,
    max_size=80,
).map(lambda rows: [("one", "a"), ("two", "a"), ("three", "b"), ("four", "b"), *rows])


@given(LABELLED, st.integers(0, 5), st.floats(0.05, 0.9))
def test_held_out_rows_partition_training_and_share_no_text(
    rows: Rows, seed: int, share: float
) -> None:
    found = data(rows, seed=seed, share=share)
    train, held = ({e.text for e in part} for part in (found.train, found.validation))
    assert not train & held
    assert held
    lines = [e.line for e in (*found.train, *found.validation)]
    assert sorted(lines) == list(range(2, 2 + len(rows)))
    assert [e.line for e in found.train] == sorted(e.line for e in found.train)
    assert {e.label for e in found.train} == set(range(len(found.labels)))
    assert found == data(rows, seed=seed, share=share)


def test_the_split_is_stratified_and_seeded() -> None:
    rows: Rows = [
        (f"{label}{n}", label)
        for label, count in (("a", 100), ("b", 37), ("c", 3))
        for n in range(count)
    ]
    found = data(rows)
    assert distribution(found.validation, found.labels) == {"a": 10, "b": 4, "c": 1}
    assert data(rows, seed=1).validation != found.validation
    assert data(rows, share=0).validation == ()


@given(st.integers(2, 139), st.integers(0, 3))
def test_a_sample_keeps_proportions_and_the_validation_part(count: int, seed: int) -> None:
    rows: Rows = [
        (f"{label}{n}", label) for label, size in (("a", 100), ("b", 39)) for n in range(size)
    ]
    found = data(rows, HELD, max_train_rows=count, seed=seed)
    counts = distribution(found.train, found.labels)
    assert sum(counts.values()) == len(found.train) == count
    assert abs(counts["a"] - count * 100 / 139) < 1
    assert len(found.validation) == 2


@given(st.integers(2, 102), st.integers(0, 3))
def test_a_sample_empties_no_class(count: int, seed: int) -> None:
    rows: Rows = [(f"{n}", "b" if n % 34 == 0 else "a") for n in range(102)]
    found = data(rows, HELD, max_train_rows=count, seed=seed)
    assert len(found.train) == count
    assert min(distribution(found.train, found.labels).values()) >= 1


def test_fewer_rows_than_classes_are_refused() -> None:
    rows: Rows = [(f"{label}{n}", label) for label in "abcde" for n in range(9)]
    with pytest.raises(DataError, match=r"is 4, and there are 5 classes\nFix: give at least 5"):
        data(rows, max_train_rows=4)
    with pytest.raises(DataError, match=r"max_train_rows is 1\nFix: give at least 2"):
        data(rows, max_train_rows=1)


@pytest.mark.parametrize("seed", range(8))
def test_a_class_of_one_text_that_has_another_label_too_stays_in_training(seed: int) -> None:
    found = data([*GOOD, ("a text 3", "c")], seed=seed, share=0.5)
    assert distribution(found.train, found.labels)["c"] == 1


def test_real_data(shared: Path, tmp_path: Path) -> None:
    from deltaw.train.data.detect import detect

    splits = read_data(shared / "data/banking77")
    schema = detect(splits.train)
    with pytest.raises(DataError, match="flatter: 6 training rows"):
        build(splits, schema)
    found = build(splits, schema, allow_leakage=True, max_train_rows=3000)
    assert (len(found.train), len(found.test), len(found.labels)) == (3000, 3080, 77)
    assert {e.label for e in found.validation} == set(range(77))
    names = json.loads((shared / "data/banking77/categories.json").read_text("utf-8"))
    assert set(found.labels) == set(names)
