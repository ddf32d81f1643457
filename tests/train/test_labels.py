"""One spelling per label, whatever form the file has it in."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.train.data.labels import (
    class_name,
    in_order,
    is_missing,
    number,
    spelling_warnings,
    spelt,
)
from deltaw.train.data.rows import Opaque, Value


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0", " 1 ", "1.", "+1", "1.000"])
def test_whole_numbers_are_one_class(value: str | int | float) -> None:
    assert class_name(value) == "1"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("yes ", "yes"),
        ("Yes", "Yes"),
        ("01", "01"),
        ("-0", "0"),
        (-0.0, "0"),
        ("-3.0", "-3"),
        (2.5, "2.5"),
        ("1e3", "1e3"),
        (True, "true"),
        ("\u00a0x\t", "x"),
        (10**30, "1" + "0" * 30),
    ],
)
def test_other_labels_keep_their_spelling(value: str | int | float | bool, name: str) -> None:
    assert class_name(value) == name


@given(st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_class_name_is_its_own_class_name(value: str | int | float) -> None:
    assert class_name(class_name(value)) == class_name(value)


@pytest.mark.parametrize("value", [None, "", "  ", math.nan, "nan", " NaN "])
def test_missing(value: Value) -> None:
    assert is_missing(value)


@pytest.mark.parametrize("value", ["none", "null", "0", 0, False, Opaque("a list")])
def test_not_missing(value: Value) -> None:
    assert not is_missing(value)


@pytest.mark.parametrize(
    ("value", "real"),
    [
        ("3.5", 3.5),
        (" -1e-2 ", -0.01),
        (".5", 0.5),
        (2, 2.0),
        ("inf", math.inf),
        (10**400, math.inf),
        (-(10**400), -math.inf),
        ("1_000", None),
        ("3,5", None),
        ("٣", None),
        (True, None),
        (Opaque("a list"), None),
    ],
)
def test_numbers(value: Value, real: float | None) -> None:
    assert number(value) == real


def test_order_is_by_value_for_numbers_only() -> None:
    assert in_order(["10", "9", "-1", "9"]) == ("-1", "9", "10")
    assert in_order(["10", "9", "x"]) == ("10", "9", "x")


def test_what_is_unified_and_what_only_looks_alike_is_said() -> None:
    raws: list[Value] = [1, 1.0, "1", "1", "Yes", "yes", "yes ", "no", "e\u0301", "é"]
    counts = Counter((class_name(raw), spelt(raw)) for raw in raws)  # type: ignore[arg-type]
    unified, stripped, *apart = spelling_warnings(counts)
    assert unified == 'label "1" unites 2 rows with "1", 1 row with 1, 1 row with 1.0'
    assert stripped == 'label "yes" unites 1 row with "yes ", 1 row with "yes"'
    assert len(apart) == 2
    assert any('"yes" in 2 rows, "Yes" in 1 row' in warning for warning in apart)
    assert spelling_warnings(Counter({("a", '"a"'): 3, ("b", '"b"'): 1})) == []


def test_a_nested_value_is_spelt_by_its_kind() -> None:
    assert spelt(Opaque("a list")) == "a list"
