"""Scores of answers: the published values of their scripts, sacrebleu's, and laws of every one."""

import json
import random
from collections.abc import Sequence
from math import exp, log, log2
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from deltaw.language.metrics.bleu import bleu
from deltaw.language.metrics.chrf import chrf
from deltaw.language.metrics.exact import exact_match
from deltaw.language.metrics.nist import nist
from deltaw.language.metrics.rouge import common, rouge_l
from deltaw.language.metrics.scoring import METRICS, differences, score, tallies
from deltaw.language.metrics.words import Words, choose, plain

CHINESE = Path(__file__).parent / "data" / "chinese.json"
TEMPLATE = "devset (547 MRs): hypothesis = dev_template_baseline.txt, references = all"
FIRST = "devset: hypothesis = first reference, references = the others (MRs with >=2 refs)"
EXAMPLE = "example-inputs: baseline-output.txt vs devel-conc.txt"
WORDS = "the a cat dog sat on mat near family-friendly Pub, 5 out_of 20. It's £30"

Rows = tuple[list[str], list[list[str]]]


def groups(file: Path) -> list[list[str]]:
    return [block.split("\n") for block in file.read_text("utf-8").strip("\n").split("\n\n")]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    [EXAMPLE, pytest.param(TEMPLATE, marks=SLOW), pytest.param(FIRST, marks=SLOW)],
    ids=["example", "template", "first"],
)
def test_bleu_and_nist_are_those_of_the_e2e_challenge(shared: Path, case: str) -> None:
    folder = shared / "data" / "e2e_nlg" / "eval"
    if case == EXAMPLE:
        references = groups(folder / "e2e-metrics_devel-conc.txt")
        answers = (folder / "e2e-metrics_baseline-output.txt").read_text("utf-8").splitlines()
    else:
        references = groups(folder / "dev_refs.txt")
        answers = (folder / "dev_template_baseline.txt").read_text("utf-8").splitlines()
    if case == FIRST:
        several = [texts for texts in references if len(texts) > 1]
        answers, references = [texts[0] for texts in several], [texts[1:] for texts in several]
    wanted = json.loads((folder / "golden_scores_dev.json").read_text())["values"][case]
    words = choose(references)
    assert words.tokenizer == "13a"
    found = bleu(answers, references, words, lowercase=True).value / 100
    assert found == pytest.approx(wanted["BLEU"], abs=1e-6)
    assert nist(answers, references, words).value == pytest.approx(wanted["NIST"], abs=1e-6)


def some(rows: int = 40, seed: int = 0) -> Rows:
    """Random answers, each with one to four references."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(1, 14)))

    return [text() for _ in range(rows)], [
        [text() for _ in range(draw.randint(1, 4))] for _ in range(rows)
    ]


def by_column(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The references as sacrebleu takes them: all first ones, all second ones, ..."""
    most = max(map(len, references))
    return [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]


@pytest.mark.parametrize("seed", range(3))
def test_bleu_and_chrf_are_those_of_sacrebleu(seed: int) -> None:
    answers, references = some(seed=seed)
    columns = by_column(references)
    found = tallies(answers, references, Words())
    assert found["bleu"].value == pytest.approx(BLEU().corpus_score(answers, columns).score)
    assert found["chrf"].value == pytest.approx(CHRF().corpus_score(answers, columns).score)


def test_rouge_is_that_of_the_package_rouge_score() -> None:
    for answer, reference, wanted in (
        (
            "The Vaults pub near Café Adriatic has a 5 star rating.",
            "Near the Adriatic, The Vaults has a family-friendly pub; 5 stars.",
            0.43478260869565216,
        ),
        ("a b c d e f g", "g f e d c b a", 0.14285714285714285),
        ("It's out_of the 20.", "it s out of 20", 0.9090909090909091),
    ):
        assert rouge_l([answer], [[reference]]).value == pytest.approx(wanted, abs=1e-12)
        assert rouge_l([answer], [["never", reference]]).value == pytest.approx(wanted, abs=1e-12)


def test_common_words_are_those_of_the_table_of_lengths() -> None:
    draw = random.Random(0)
    for _ in range(200):
        one, other = (draw.choices("abcd", k=draw.randint(0, 90)) for _ in range(2))
        table = np.zeros((len(one) + 1, len(other) + 1), int)
        for i, a in enumerate(one, 1):
            for j, b in enumerate(other, 1):
                longer = max(table[i - 1, j], table[i, j - 1])
                table[i, j] = table[i - 1, j - 1] + 1 if a == b else longer
        assert common(one, other) == table[-1, -1]


def test_nist_by_hand() -> None:
    # References: "a b", "a c c"; information: a log2(5/2), b log2(5/1), a b log2(2/1).
    found = nist(["A b"], [["a b", "a c c"]], Words()).value
    gained = (log2(5 / 2) + log2(5)) / 2 + log2(2)
    assert found == pytest.approx(gained * exp(log(0.5) / log(1.5) ** 2 * log(2 / 2.5) ** 2))


def test_what_is_right_scores_all_and_what_is_empty_nothing() -> None:
    _, references = some()
    right = tallies([texts[-1] for texts in references], references, Words())
    wanted = {"exact_match": 1.0, "bleu": 100.0, "rouge_l": 1.0, "chrf": 100.0}
    assert {name: right[name].value for name in wanted} == pytest.approx(wanted)
    empty = tallies(["" for _ in references], references, Words())
    assert {name: tally.value for name, tally in empty.items()} == dict.fromkeys(METRICS, 0.0)


def test_exact_match_leaves_the_width_of_blanks_aside() -> None:
    answers = [" a  b\n", "a B", "c"]
    assert exact_match(answers, [["x", "a b"], ["a b"], ["c"]]).value == pytest.approx(2 / 3)


def test_intervals_hold_the_score_and_a_pair_shares_its_rows() -> None:
    answers, references = some()
    better = [texts[0] if row % 2 else said for row, (texts, said) in
              enumerate(zip(references, answers, strict=True))]  # fmt: skip
    before, after = (tallies(said, references, Words()) for said in (answers, better))
    found = score("bleu", before)
    assert found.primary == "bleu" and found.rows == 40 and tuple(found.values) == METRICS
    assert all(low <= found.values[name] <= high for name, (low, high) in found.intervals.items())
    for name, (value, (low, high)) in differences(before, after).items():
        assert value == pytest.approx(after[name].value - before[name].value)
        assert 0 < low < value < high, name
    same = differences(before, before)
    assert set(same.values()) == {(0.0, (0.0, 0.0))}


def test_resampled_scores_are_those_of_the_rows_drawn() -> None:
    answers, references = some()
    drawn = np.random.default_rng(5).integers(0, 40, 40)
    few = [answers[i] for i in drawn], [references[i] for i in drawn]
    for whole, part in ((bleu, bleu), (chrf, chrf), (rouge_l, rouge_l)):
        more = (Words(),) if whole is bleu else ()
        tally = whole(answers, references, *more)
        assert tally.score(tally.counts[drawn].sum(0)) == pytest.approx(part(*few, *more).value)


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("The sky is blue.", "13a"),
        ("Der Himmel ist blau, 天 heißt er auf Chinesisch.", "13a"),
        ("", "13a"),
        ("12 + 3 = 15", "13a"),
        ("하늘은 파랗다", "13a"),
        ("呼出的气里含有温暖的水蒸气。", "zh"),
        ("用 Python 写的程序", "zh"),
        ("空は青いです。", "char"),
        ("コーヒーを飲みます", "char"),
    ],
)
def test_how_texts_are_cut_is_chosen_by_their_letters(text: str, tokenizer: str) -> None:
    assert choose([[text], []]).tokenizer == tokenizer


def test_chinese_is_scored_by_characters() -> None:
    references = [[row["output"]] for row in json.loads(CHINESE.read_text("utf-8"))]
    words = choose(references)
    assert str(words) == "characters, as sacrebleu's tokenizer zh has them"
    near = [texts[0].replace("的", "").replace("是", "乃") for texts in references]
    columns = by_column(references)
    found = tallies(near, references, words)
    wanted = BLEU(tokenize="zh").corpus_score(near, columns).score
    assert found["bleu"].value == pytest.approx(wanted) and wanted > 60
    one = (["小明被老师夸奖了。"], [["小明被老师表扬了。"]])
    assert bleu(*one, Words("13a")).value == 0 and bleu(*one, words).value > 40
    assert 0.9 < found["rouge_l"].value < 1 and found["nist"].value > 5
    assert plain("用Python写、café 3") == ["用", "python", "写", "café", "3"]
    assert plain("ｶﾅとかなー") == list("ｶﾅとかなー")
