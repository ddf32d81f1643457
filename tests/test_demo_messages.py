"""The demo's messages: valid, without near duplicates, and out of reach of a bag of words."""

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest

import deltaw

MESSAGES = Path(deltaw.__file__).parent / "demo" / "messages"
SPLITS = ("train", "validation", "test")
LABELS = {
    "cancel_order",
    "change_order",
    "item_damaged",
    "item_wrong",
    "parcel_late",
    "parcel_missing",
    "payment_failed",
    "refund_request",
    "refund_status",
    "subscription_end",
    "subscription_pause",
    "wrong_charge",
}


class Row(NamedTuple):
    text: str
    label: str


def read(split: str) -> list[Row]:
    with (MESSAGES / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    assert header == ["text", "label"]
    return [Row(*row) for row in rows]


ROWS = {split: read(split) for split in SPLITS}
TEXTS = [row.text for rows in ROWS.values() for row in rows]


def words(text: str) -> list[str]:
    """The lower-cased words of a text without punctuation."""
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def shared_sequences(texts: list[str], length: int = 5) -> dict[str, set[str]]:
    """Each sequence of `length` words that two or more texts share, with those texts."""
    owners = defaultdict(set)
    for text in texts:
        spoken = words(text)
        for start in range(len(spoken) - length + 1):
            owners[" ".join(spoken[start : start + length])].add(text)
    return {sequence: found for sequence, found in owners.items() if len(found) > 1}


def similar_pairs(texts: list[str], limit: float = 0.5) -> list[tuple[str, str]]:
    """The pairs whose sets of character 5-grams have a Jaccard similarity above `limit`."""
    grams = []
    for text in texts:
        spoken = " ".join(words(text))
        grams.append({spoken[start : start + 5] for start in range(max(1, len(spoken) - 4))})
    return [
        (texts[i], texts[j])
        for i, j in combinations(range(len(texts)), 2)
        if (common := len(grams[i] & grams[j])) > limit * (len(grams[i]) + len(grams[j]) - common)
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_files_are_plain(split: str) -> None:
    content = (MESSAGES / f"{split}.csv").read_bytes()
    assert not content.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in content and b"\0" not in content
    assert content.endswith(b"\n")


@pytest.mark.parametrize("split", SPLITS)
def test_every_intent_is_in_every_split_equally(split: str) -> None:
    counts = Counter(row.label for row in ROWS[split])
    assert set(counts) == LABELS
    assert len(set(counts.values())) == 1


def test_sizes() -> None:
    total = len(TEXTS)
    assert 850 <= total <= 950
    for split, share in zip(SPLITS, (6 / 9, 1 / 9, 2 / 9), strict=True):
        assert len(ROWS[split]) / total == pytest.approx(share, abs=0.02)


def test_messages_are_trimmed_lines() -> None:
    assert [text for text in TEXTS if text != " ".join(text.split())] == []


def test_the_datasheet_counts_right() -> None:
    sheet = " ".join((MESSAGES / "DATASHEET.md").read_text(encoding="utf-8").split())
    lengths = [len(text.split()) for text in TEXTS]
    parts = " / ".join(str(len(ROWS[split]) // len(LABELS)) for split in SPLITS)
    each = len(TEXTS) // len(LABELS)
    assert f"{len(TEXTS)} short English messages" in sheet
    assert f"{min(lengths)} to {max(lengths)} words" in sheet
    assert f"{each} messages an intent, split {parts}." in sheet


def test_no_message_is_written_twice() -> None:
    counts = Counter(" ".join(words(text)) for text in TEXTS)
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_two_messages_share_five_words_in_a_row() -> None:
    assert shared_sequences(TEXTS) == {}


def test_no_two_messages_are_alike() -> None:
    assert similar_pairs(TEXTS) == []


@pytest.mark.parametrize(
    "check, limit_kept, limit_broken",
    [
        (
            shared_sequences,
            ["one two three four", "One, two: three four!"],
            ["a b c d e", "A, b c d e?"],
        ),
        (similar_pairs, ["abcdef", "abcdeg"], ["abcdefghij", "abcdefghijk"]),
    ],
)
def test_the_checks_see_what_they_are_for(
    check: Callable[[list[str]], object], limit_kept: list[str], limit_broken: list[str]
) -> None:
    assert not check(limit_kept)
    assert check(limit_broken)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"ngram_range": (1, 2)}, id="words"),
        pytest.param({"analyzer": "char_wb", "ngram_range": (2, 5)}, id="characters"),
    ],
)
@pytest.mark.parametrize("classifier", ["logistic", "svm"])
def test_a_bag_of_words_stays_below_three_quarters(
    settings: dict[str, object], classifier: str
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn absent")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    model = LogisticRegression(C=10, max_iter=1000) if classifier == "logistic" else LinearSVC()
    seen = ROWS["train"] + ROWS["validation"]
    bag = make_pipeline(TfidfVectorizer(sublinear_tf=True, **settings), model)
    bag.fit([row.text for row in seen], [row.label for row in seen])
    accuracy = bag.score(*zip(*ROWS["test"], strict=True))
    assert 3 / len(LABELS) < accuracy <= 0.75
