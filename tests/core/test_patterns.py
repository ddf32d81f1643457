"""Names and expressions match as PEFT's do, and no expression runs away."""

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw import patterns
from deltaw.errors import ConfigError
from deltaw.patterns import ends_with, full_matches, key_matches, pattern_value, within

PATHS = ["q", "model.q", "model.layers.0.q", "model.layers.10.q", "model.layers.0.mq", "qq.k"]


def test_a_name_matches_at_a_dot_only() -> None:
    assert [ends_with(path, "q") for path in PATHS] == [True, True, True, True, False, False]
    assert not ends_with("lm_head", "head")


def test_within_is_the_module_or_what_lies_inside() -> None:
    assert within("a.b", ["a"]) and within("a", ["a"])
    assert not within("ab", ["a"]) and not within("a", ["a.b"])


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.q",
        r"model\.layers\.\d+\.q",
        r".*\.(q|k)",
        r"(model\.)?q",
        r"(?!.*10).*\.q",
        r"[a-z]+",
        r"model\.(layers\.(0|10)\.)?q",
    ],
)
def test_an_expression_matches_the_whole_path(pattern: str) -> None:
    assert full_matches(pattern, PATHS) == [re.fullmatch(pattern, p) is not None for p in PATHS]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.text(alphabet="abq_-.", max_size=8),
    st.lists(st.text(alphabet="abq_-.", max_size=12), max_size=5),
    st.booleans(),
)
def test_a_plain_key_is_what_peft_would_match(name: str, paths: list[str], pinned: bool) -> None:
    """PEFT evaluates `re.match(rf"(.*\\.)?({key})$", path)`; a plain dot means itself here."""
    key = "^" * pinned + re.escape(name)
    expected = [re.match(rf"(.*\.)?({key})$", path) is not None for path in paths]
    assert key_matches(key, paths) == expected


def test_the_first_pattern_in_order_wins() -> None:
    patterns_ = {"0.q": 1, "q": 2, r".*k": 3}
    assert [pattern_value(patterns_, path, 9) for path in PATHS] == [2, 2, 1, 2, 9, 3]
    assert pattern_value({"q": 2, "0.q": 1}, "model.layers.0.q", 9) == 2


def test_a_caret_pins_the_start() -> None:
    assert pattern_value({"^q": 1}, "q", 9) == 1
    assert pattern_value({"^q": 1}, "model.q", 9) == 9
    assert pattern_value({r"^model\.q": 1}, "model.q", 9) == 1


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+$b", "(.*a){20}b"])
def test_a_runaway_expression_is_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    with pytest.raises(ConfigError, match="took more than"):
        full_matches(pattern, ["a" * 60 + "c"])


@pytest.mark.parametrize("pattern", ["(", "[", "a{2,1}", "*a", "(?P<1>a)"])
def test_an_invalid_expression_is_named(pattern: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(pattern))):
        full_matches(pattern, PATHS)


def test_a_long_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match="1001 characters"):
        full_matches("a" * 1001, PATHS)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(alphabet=string.ascii_letters + ".*+[]\\", max_size=10))
def test_simple_expressions_have_two_quantifiers_at_most(pattern: str) -> None:
    bare = re.sub(r"\[(?:\\.|[^\]\\])*\]|\\.", "a", pattern)
    if patterns._is_simple(pattern):
        assert sum(bare.count(c) for c in "*+?{") <= 2
