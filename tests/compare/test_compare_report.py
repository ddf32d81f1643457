"""Table, pictures and page: right numbers, escaped text, nothing from outside."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deltaw.compare import record as records
from deltaw.compare import report, table
from deltaw.compare.record import Record
from deltaw.compare.search import DIVERGED, Trial, rungs
from deltaw.compare.summary import summarize
from deltaw.errors import RunError
from deltaw.train.recipe import Recipe

EVIL = '<script>alert("1")</script> $\\frac$ |'
RATES = [1e-3, 4e-3, 1.6e-2]
SEEDS = [0, 1, 2]


def entry(score: float, trainable: int, *, full: bool) -> dict[str, Any]:
    """One run's results."""
    return {
        "diverged": None,
        "validation": score,
        "validation_loss": 1 - score,
        "test": {"values": {"accuracy": score}, "rows": 50} if full else None,
        "trainable": trainable,
        "file_bytes": 4 * trainable,
        "seconds": 9.0,
        "seconds_per_step": 0.01 * score,
        "peak_bytes": 1000 * trainable,
        "loss": [[step, 1 / step] for step in range(1, 9)],
        "scores": [[8, score]],
    }


def make(titles: dict[str, float], **changes: Any) -> Record:
    """A record in which each title's best rate is the last one, and the score depends on seeds."""
    record = Record(
        shared={"model": EVIL, "data": "d.csv"},
        data={"d.csv": "0" * 64},
        methods={title: {"r": 4} for title in titles},
        compared=list(titles),
        machine={"torch": "2.13"},
        examined={
            title: {"metric": "accuracy", "parameters": 10_000, "adapted": "all", "steps": 8}
            for title in titles
        },
        rates=dict.fromkeys(titles, RATES),
        seeds=SEEDS,
    )
    for index, (title, score) in enumerate(titles.items()):
        for _, share in rungs(3):
            for rate in RATES:
                trial = Trial(title, rate, share, 0)
                record.runs[trial.key] = entry(score * rate, 100, full=False)
        for seed in SEEDS:
            varied = score + 0.01 * (seed - 1) * (-1) ** index * (1 + index / 8)
            record.runs[Trial(title, RATES[-1], 1.0, seed).key] = entry(
                varied, 100 * (index + 1), full=True
            )
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def test_a_score_is_that_of_validation_and_then_the_loss() -> None:
    record = make({"a": 0.5})
    assert record.score(Trial("a", RATES[0], 1.0, 9)) is None
    found = record.score(Trial("a", RATES[-1], 1.0, 1))
    assert found == pytest.approx((0.5, -0.5))


def test_ties_are_marked_in_the_file() -> None:
    rows = summarize(make({"a": 0.5, "b": 0.8, "c": 0.795})).as_data()["rows"]
    assert [row["is_tie"] for row in rows] == [None, True, False]


def test_rows_come_from_the_full_runs_best_first() -> None:
    found = summarize(make({"a": 0.7, "b": 0.8, "c": 0.795}))
    assert [row.title for row in found.rows] == ["b", "c", "a"]
    best, like, worst = found.rows
    assert best.against_best is None and best.score.value == pytest.approx(0.8)
    assert like.against_best is not None and like.against_best.is_tie
    assert worst.against_best is not None and not worst.against_best.is_tie
    assert worst.against_best.mean == pytest.approx(-0.1)
    assert best.rate == RATES[-1] and best.at_edge and best.trainable == 200
    assert best.scores == pytest.approx({0: 0.81125, 1: 0.8, 2: 0.78875})


def test_the_table_says_what_is_a_tie_and_what_is_proven() -> None:
    text = table.write(summarize(make({"a": 0.5, "b": 0.8, "c": 0.795})), 50)
    lines = text.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1, text
    assert "0.8000 ± 0.0065" in lines[2] and "best" in lines[2] and "200 (2.00%)" in lines[2]
    assert ", tie" in lines[3] and ", tie" not in lines[4] and "0.016 *" in lines[2]
    assert "on 50 test rows: mean over 3 seeds" in text
    assert "b than a" in text and "c than a" in text and "b than c" not in text


def test_a_narrow_terminal_does_without_costs() -> None:
    found = summarize(make({"a": 0.5, "b": 0.8}))
    whole = table.write(found, 50).splitlines()
    assert table.write(found, 50, len(whole[0])).splitlines() == whole
    narrow = table.write(found, 50, 70).splitlines()
    assert max(map(len, narrow[:4])) <= 70 and narrow[0].endswith("| rate    |")
    assert "peak" not in narrow[0] and "peak" in narrow[4] and "file" in narrow[4]
    assert "b " in narrow[2] and "0.016 *" in narrow[2]


def test_one_seed_is_called_one_seed() -> None:
    text = table.write(summarize(make({"a": 0.5, "b": 0.8}, seeds=[0])), None)
    assert "One seed: no error is known" in text and "tie" not in text and "proven" not in text


def test_methods_that_are_not_done_or_failed_have_no_row() -> None:
    record = make({"a": 0.5, "b": 0.6, "c": 0.7})
    del record.runs[Trial("a", RATES[-1], 1.0, 2).key]
    for run in [key for key in record.runs if key.startswith("b |")]:
        record.runs[run] = {"diverged": "The loss became nan"}
    found = summarize(record)
    assert [row.title for row in found.rows] == ["c"] and found.failed == [("b", "at every rate")]
    assert record.score(Trial("b", RATES[0], 0.25, 0)) == DIVERGED
    assert "b: diverged at every rate." in table.write(found, 50)
    assert table.write(summarize(make({"a": 0.5}, rates={})), 50) == "No method has finished."


def test_a_seed_that_diverged_is_counted() -> None:
    record = make({"a": 0.5, "b": 0.6})
    record.runs[Trial("b", RATES[-1], 1.0, 1).key] = {"diverged": "The loss became nan"}
    row = summarize(record).rows[1]
    assert (row.title, row.diverged, row.score.count) == ("b", 1, 2)
    assert row.score.value > summarize(record).rows[0].score.value
    assert "(1 diverged)" in table.score_of(row)
    assert ">diverged</td>" in report.write(record, summarize(record), 50)


def test_nothing_is_proven_of_a_method_of_which_a_seed_diverged() -> None:
    record = make({"a": 0.9, "b": 0.895, "c": 0.5})
    found = summarize(record)
    assert [row.is_tie for row in found.rows] == [None, True, False]
    assert {("a", "c"), ("b", "c")} <= {pair[:2] for pair in found.proven}
    record.runs[Trial("b", RATES[-1], 1.0, 1).key] = {"diverged": "The loss became nan"}
    for seed in (0, 2):
        worse, better = (record.runs[Trial(t, RATES[-1], 1.0, seed).key] for t in "cb")
        like = worse["test"]["values"]["accuracy"] + 0.3 + 1e-6 * seed
        better["test"]["values"]["accuracy"] = like
    found = summarize(record)
    assert [(row.title, row.is_tie) for row in found.rows] == [
        ("a", None),
        ("c", False),
        ("b", False),
    ]
    assert {pair[:2] for pair in found.proven} == {("a", "c")}
    text = table.write(found, 50)
    assert "b: a seed diverged, so it is no tie" in text and ", tie" not in text


def test_full_runs_that_all_diverged_are_told_from_a_search_that_did() -> None:
    record = make({"a": 0.5, "b": 0.6})
    for seed in SEEDS:
        record.runs[Trial("b", RATES[-1], 1.0, seed).key] = {"diverged": "The loss became nan"}
    found = summarize(record)
    assert found.failed == [("b", "in every full run at 0.016")]
    assert "b: diverged in every full run at 0.016." in table.write(found, 50)
    assert "share 1 | seed 2" not in report.write(record, found, 50)


def test_runs_of_different_machines_are_told() -> None:
    record = make({"a": 0.5, "b": 0.6})
    for run in record.runs.values():
        run["machine"] = {"cores": "2"}
    assert "do not compare their seconds" not in table.write(summarize(record), 50)
    record.runs[Trial("b", RATES[-1], 1.0, 0).key]["machine"] = {"cores": "4"}
    assert "do not compare their seconds" in table.write(summarize(record), 50)


class Page(HTMLParser):
    """Checks that tags nest, and keeps them with their attributes and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    record = make({EVIL: 0.5, "_hidden": 0.8, "c": 0.79})
    text = report.write(record, summarize(record), 50)
    page = Page()
    page.feed(text)
    assert page.open == [] and EVIL in page.text
    kinds = {tag for tag, _ in page.tags}
    assert kinds.isdisjoint({"script", "link", "img", "iframe", "image", "object"})
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "xlink:href", "src") or str(value).startswith("#")
    assert "url(http" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    assert used <= set(ids)
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


def test_the_page_of_the_same_runs_is_the_same() -> None:
    record = make({"a": 0.5, "b": 0.8})
    found = summarize(record)
    first, second = (report.write(record, found, 50) for _ in range(2))
    assert re.sub(r"p\d-\w+", "", first) == re.sub(r"p\d-\w+", "", second)


def test_without_costs_or_a_search_two_pictures_are_left_out() -> None:
    record = make({"a": 0.5}, rates={"a": [RATES[-1]]})
    for run in record.runs.values():
        run["peak_bytes"] = None
    text = report.write(record, summarize(record), None)
    assert text.count("<svg") == 2 and "Learning rates tried" not in text


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = make({EVIL: 0.5, "b": 0.8})
    records.write(tmp_path, record, summarize(record).as_data())
    assert records.read(tmp_path) == record


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "other"}', "{" * 9999, '"x"'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / records.FILE).write_text(text)
    with pytest.raises(RunError, match="is damaged"):
        records.read(tmp_path)


def test_another_comparison_is_told_apart() -> None:
    old = make({"a": 0.5, "b": 0.8})
    new = make({"a": 0.5}, shared={"model": "m", "data": "d.csv", "r": 3}, data={"d.csv": "1"})
    new.methods["a"] = {"r": 8}
    with pytest.raises(RunError) as error:
        records.joined(old, new, Path("out"))
    text = str(error.value)
    assert "model was" in text and "r was 8, is now 3" in text
    assert "the data changed" in text and "a: r was 4, is now 8" in text


def test_a_default_may_be_written_out() -> None:
    old = make({"a": 0.5})
    shared = old.shared | {"r": 8, "warmup": Recipe.model_fields["warmup"].default}
    new = make({"a": 0.5}, shared=shared, methods={"a": {"r": 4, "use_dora": False}}, runs={})
    assert records.joined(old, new, Path("out")).runs == old.runs


def test_methods_and_seeds_may_be_added() -> None:
    old = make({"a": 0.5, "b": 0.8})
    new = make({"a": 0.5, "c": 0.6}, seeds=[0, 1, 2, 3], runs={}, examined={})
    found = records.joined(old, new, Path("out"))
    assert found.compared == ["a", "c"] and list(found.methods) == ["a", "b", "c"]
    assert found.runs == old.runs and found.seeds == [0, 1, 2, 3] and "a" in found.examined
    assert records.joined(None, new, Path("out")) is new
