"""Nothing from a file reaches a terminal unescaped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.train.escape import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ä 漢字 🙂", "plain, ä 漢字 🙂"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\r\nlines\tand\0", "two\\r\\nlines\\tand\\x00"),
        ("abc\u202edcba", "abc\\u202edcba"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_invisible_characters_are_spelt_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_long_text_is_cut_with_an_ellipsis() -> None:
    assert printable("x" * 80) == "x" * 80
    assert printable("x" * 81) == "x" * 79 + "…"
    assert printable("\0" * 10, 10) == "\\x00\\x00\\…"


@given(st.text(), st.integers(1, 100))
def test_everything_shown_is_printable_and_short(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    shown.encode()
