"""From data sets to a corpus: limits, held-out parts, leaks, bad rows, counts, and what is said."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.language.rows import turns, write_rows

from deltaw.errors import ConfigError, DataError
from deltaw.language.data.corpus import Request, load
from deltaw.language.data.findings import facts, findings
from deltaw.language.data.holding import hold_out
from deltaw.language.data.keys import prompt_key
from deltaw.language.data.samples import Completion, Passage, Sample

CHINESE = Path(__file__).parent / "data" / "chinese.json"


def say(numbers: Any) -> list[dict[str, str]]:
    return [{"instruction": f"Say {n}.", "output": f"{n}!"} for n in numbers]


def file(folder: Path, name: str, rows: Any) -> str:
    return str(write_rows(folder / name, rows))


def lines(samples: Any) -> list[int]:
    return [sample.line for sample in samples]


def refusal(request: Request, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        load(request)
    return str(caught.value)


def test_all_of_a_file_and_where_it_came_from(tmp_path: Path) -> None:
    rows = [*say(range(3)), {"instruction": "x", "output": ""}, *say([9])]
    path = file(tmp_path, "a.jsonl", rows)
    corpus = load(Request(path, val_size=0))
    assert lines(corpus.train) == [1, 2, 3, 5]
    assert [str(skip) for skip in corpus.skipped] == [f'{path}:4: nothing in "output"']
    (origin,) = corpus.origins
    assert (origin.name, origin.rows, origin.train, origin.validation) == (path, 5, 4, 0)
    assert [*corpus.hashes] == [path] and len(corpus.hashes[path]) == 64
    assert corpus.warnings == () and corpus.validation == () and corpus.test == ()


def test_a_tenth_of_the_prompts_is_held_out_by_seed(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", [*say(range(50)), *say(range(50))])
    first, again, other = (load(Request(path, seed=seed)) for seed in (0, 0, 1))
    assert len(first.validation) == 10
    assert first == again
    assert lines(first.validation) != lines(other.validation)
    assert not {*map(prompt_key, first.train)} & {*map(prompt_key, first.validation)}
    assert sorted(lines(first.train) + lines(first.validation)) == list(range(1, 101))
    assert lines(first.train) == sorted(lines(first.train))
    assert len(load(Request(path, val_size=6)).validation) == 6
    assert len(load(Request(path, val_size=5)).validation) == 6


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=12), min_size=1, max_size=3),
    st.sampled_from([0.1, 0.5, 0.9, 1, 3]),
    st.integers(0, 3),
)
def test_what_holding_out_promises(sets: list[list[int]], size: float, seed: int) -> None:
    samples: list[list[Sample]] = [
        [Completion(str(n), str(at), f"f{number}", at) for at, n in enumerate(numbers)]
        for number, numbers in enumerate(sets)
    ]
    try:
        kept, held = hold_out(samples, size, seed)
    except DataError as error:
        assert "too few to hold so many out" in str(error)
        return
    assert all(kept)
    for whole, left, out in zip(samples, kept, held, strict=True):
        assert sorted([*left, *out], key=lambda s: s.line) == whole
        assert lines(left) == sorted(lines(left)) and lines(out) == sorted(lines(out))
    prompts = [{prompt_key(s) for part in parts for s in part} for parts in (kept, held)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    if size >= 1:
        assert sum(map(len, held)) >= size
    else:
        assert len(prompts[1]) == max(1, round(size * len(prompts[0] | prompts[1])))


def test_no_data_set_is_held_out_as_a_whole(tmp_path: Path) -> None:
    many = file(tmp_path, "many.jsonl", [{"text": f"text {n}"} for n in range(20)])
    (tmp_path / "one.txt").write_text("One long text.\n")
    for seed in range(10):
        corpus = load(Request(f"{many},{tmp_path / 'one.txt'}", val_size=0.9, seed=seed))
        assert [origin.train for origin in corpus.origins] == [1, 1]


def test_of_a_single_text_the_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    text = "".join(f"Line {n} of the play.\n" for n in range(100)).rstrip("\n")
    path.write_text(text)
    corpus = load(Request(str(path)))
    (kept,), (held,) = corpus.train, corpus.validation
    assert isinstance(kept, Passage) and isinstance(held, Passage)
    assert kept.text + held.text == text
    assert held.text.startswith(f"Line {held.line - 1} of")
    assert 0.09 < len(held.text) / len(text) < 0.12
    path.write_text("word")
    assert "too short to hold any of it out" in refusal(Request(str(path)))


@pytest.mark.parametrize("size", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_size_that_is_neither_share_nor_count(tmp_path: Path, size: float) -> None:
    request = Request(file(tmp_path, "a.jsonl", say(range(3))), val_size=size)
    assert "give a share from 0 to below 1" in refusal(request, ConfigError)


def test_more_than_can_be_held_out(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", say([1, 1, 2]))
    assert "3 samples with 2 different prompts: too few" in refusal(Request(path, val_size=5))
    single = file(tmp_path, "b.jsonl", say([1]))
    assert "set validation_share=0" in refusal(Request(single))


def test_limits_draw_without_replacement_and_keep_the_order(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", say(range(40)))
    for request in (Request(f"{path}#7", val_size=0), Request(path, max_samples=7, val_size=0)):
        found = lines(load(request).train)
        assert len(set(found)) == 7 and found == sorted(found) and found != list(range(1, 8))
    corpus = load(Request(f"{path}#500", val_size=0))
    assert len(corpus.train) == 40
    (said,) = corpus.warnings
    assert said.endswith(": all 40 samples are used, 500 were asked for")
    for exact in (Request(f"{path}#40", val_size=0), Request(path, max_samples=500, val_size=0)):
        assert load(exact).warnings == () and len(load(exact).train) == 40
    assert len(load(Request(f"{path}#9", max_samples=5, val_size=0)).train) == 5
    assert "max_samples is 0" in refusal(Request(path, max_samples=0), ConfigError)


def test_a_mixture_counts_what_each_gave(tmp_path: Path) -> None:
    first, second = (
        file(tmp_path, "a.jsonl", say(range(3))),
        file(tmp_path, "b.jsonl", say(range(9, 15))),
    )
    over = load(Request([first, second], mix_strategy="interleave_over", val_size=0))
    assert [origin.train for origin in over.origins] == [6, 6]
    assert [Path(sample.file).name[0] for sample in over.train] == list("ab" * 6)
    assert over.warnings == ()
    message = refusal(Request([first, second], interleave_probs=[1, 2]), ConfigError)
    assert "interleave_probs are given, and mix_strategy is concat" in message


def test_parts_of_a_folder(tmp_path: Path) -> None:
    file(tmp_path, "train.jsonl", say(range(10)))
    file(tmp_path, "valid.jsonl", say(range(10, 13)))
    file(tmp_path, "test.jsonl", say(range(13, 15)))
    corpus = load(Request(str(tmp_path)))
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.test)] == [10, 3, 2]
    assert (corpus.origins[0].rows, corpus.origins[0].validation, corpus.origins[0].test) == (
        15,
        3,
        2,
    )
    assert len(corpus.hashes) == 3
    other = file(tmp_path.parent, f"{tmp_path.name}.jsonl", say(range(20, 30)))
    assert len(load(Request(other, eval_dataset=str(tmp_path))).validation) == 3
    file(tmp_path, "test.jsonl", [{"instruction": "Say 1."}])
    blind = load(Request(str(tmp_path)))
    assert blind.test == ()
    assert blind.warnings == (f"{tmp_path}/test.jsonl: no answers, so the test part is not used",)
    file(tmp_path, "valid.jsonl", [{"instruction": "Say 1."}])
    message = refusal(Request(str(tmp_path)))
    assert (
        'valid.jsonl: columns that the training part has are missing\n  - no column "output"'
        in message
    )


def test_samples_held_out_too_are_an_error_or_dropped(tmp_path: Path) -> None:
    train = file(tmp_path, "a.jsonl", [*say(range(10)), {"instruction": "Say 20.", "output": "no"}])
    held = file(tmp_path, "b.jsonl", say([3, 20]))
    message = refusal(Request(train, eval_dataset=held))
    assert (
        f"evaluation would flatter: 1 training sample\n  - {train}:4: held out too: {held}:1"
        in message
    )
    corpus = load(Request(train, eval_dataset=held, allow_leakage=True))
    assert lines(corpus.train) == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert len(corpus.validation) == 2
    assert [skip.line for skip in corpus.skipped] == [4]
    assert corpus.warnings == (
        "1 training sample dropped because held out too",
        f"1 held-out sample with a prompt that training has too, and another answer: {held}:2",
    )
    assert [(o.name, o.train, o.validation) for o in corpus.origins] == [
        (train, 10, 0),
        (held, 0, 2),
    ]
    gone = Request(train, eval_dataset=train, allow_leakage=True)
    assert "every sample is held out" in refusal(gone)


def test_repetitions_are_said(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", say([1, 2, 1, 1]))
    (said,) = load(Request(path, val_size=0)).warnings
    copies = f"{path}:3 repeats {path}:1; {path}:4 repeats {path}:1"
    assert said == f"2 repeated training samples, all kept: {copies}"


def test_problems_of_all_sets_are_one_error(tmp_path: Path) -> None:
    first = file(tmp_path, "a.jsonl", [{"instruction": "a", "output": 5}, *say(range(9))])
    turn = {"role": "narrator", "content": "x"}
    second = file(tmp_path, "b.jsonl", [{"messages": [turn]}, {"messages": [turn]}])
    message = refusal(Request([first, second]))
    assert message.splitlines() == [
        "rows that cannot be used",
        f'  - {first}:1: "output" holds the value 5, not text',
        f'  - {second}:1: turn 1 has the unknown role "narrator"',
        f'  - {second}:2: turn 1 has the unknown role "narrator"',
        "Fix: correct or remove these rows; skip_bad_rows=true leaves them out and lists them.",
    ]
    corpus = load(Request(first, skip_bad_rows=True, val_size=0))
    assert len(corpus.train) == 9 and [skip.line for skip in corpus.skipped] == [1]
    assert f"{second}: 2 rows skipped: {second}:1: turn 1" in refusal(
        Request([first, second], skip_bad_rows=True)
    )


def test_files_that_cannot_be_read_come_together(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    odd = file(tmp_path, "odd.jsonl", [{"x": 1}])
    message = refusal(Request([str(tmp_path / "bad.jsonl"), odd]))
    assert re.search(r"bad\.jsonl:2: invalid JSON", message)
    assert 'odd.jsonl: columns that fit no kind of language data: "x"' in message


def test_kinds_that_cannot_be_trained_on_together(tmp_path: Path) -> None:
    texts = file(tmp_path, "a.jsonl", [{"text": "a"}, {"text": "b"}])
    pairs = file(tmp_path, "b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    asked = file(tmp_path, "c.jsonl", say(range(4)))
    message = refusal(Request([texts, pairs]))
    assert f"  - {texts}: text\n  - {pairs}: preferences" in message
    assert len(load(Request([texts, asked], val_size=0)).train) == 6


def test_tags_are_checked(tmp_path: Path) -> None:
    request = Request(file(tmp_path, "a.jsonl", say(range(4))), tags={"roll_tag": "x"})
    assert 'unknown tag "roll_tag"; did you mean "role_tag"?' in refusal(request, ConfigError)


def test_chinese_is_read_as_anything_else(tmp_path: Path) -> None:
    corpus = load(Request(str(CHINESE), val_size=0))
    assert len(corpus.train) == 30 and not corpus.skipped and not corpus.warnings
    assert corpus.train[0].messages == turns(  # type: ignore[union-attr]
        ("user", "把下面的句子改写成被动句。\n老师表扬了小明。"),
        ("assistant", "小明被老师表扬了。"),
    )
    assert len({prompt_key(sample) for sample in corpus.train}) == 30


def test_findings(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "four"}, {"role": "assistant", "content": "sixsix"}]
    rows = [
        {"messages": chat},
        {"messages": [*chat, *chat]},
        {"messages": chat, "tools": [{"name": "f"}]},
    ]
    corpus = load(Request(file(tmp_path, "a.jsonl", [*rows, rows[0]]), val_size=0))
    found = findings(corpus)
    assert found.roles == {"user": 5, "assistant": 5}
    assert found.turns is not None and found.asked is not None
    assert (found.turns.least, found.turns.middle, found.turns.most) == (2, 2, 4)
    assert (found.asked.least, found.asked.most) == (4, 14)
    assert (found.answered.least, found.answered.most) == (6, 6)
    assert (found.with_tools, found.repeated, found.shared_prompts) == (1, 1, 0)
    why = 'messages "messages", tools "tools" (by their names)'
    assert facts(corpus) == [
        ("data", f"{tmp_path}/a.jsonl: 4 rows\ndialogues: {why}"),
        ("samples", "4 training"),
        ("turns", "2 to 4, median 2 (user 5, assistant 5)"),
        ("tools", "1 sample with functions to call"),
        ("prompts", "4 to 14, median 4 characters"),
        ("answers", "6 characters"),
    ]


def test_columns_that_play_no_role_are_said(tmp_path: Path) -> None:
    rows = [row | {"id": 1, "extra": "x"} for row in say(range(4))]
    (origin,) = load(Request(file(tmp_path, "a.jsonl", rows), val_size=0)).origins
    assert origin.schema.reasons.endswith('; not read: "id", "extra"')
    rows = [row | {f"c{n}": 1 for n in range(7)} for row in say(range(4))]
    (origin,) = load(Request(file(tmp_path, "b.jsonl", rows), val_size=0)).origins
    assert origin.schema.reasons.endswith('"c4" and 2 more')
    (origin,) = load(Request(file(tmp_path, "c.jsonl", say(range(4))), val_size=0)).origins
    assert "not read" not in origin.schema.reasons
