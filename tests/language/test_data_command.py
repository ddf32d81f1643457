"""`deltaw data`: every line of the report, and nothing but tokenizer and configuration read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.language.models import make_model
from tests.language.rows import write_rows
from tests.train.conftest import Command
from tests.train.models import messages, write_csv

CHINESE = Path(__file__).parent / "data" / "chinese.json"


def ask(number: int, answer: str = "") -> dict[str, str]:
    return {"instruction": f"Question {number}?", "output": answer or f"Answer {number}."}


@pytest.fixture(scope="module")
def outline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which the weights are gone."""
    folder = make_model(tmp_path_factory.mktemp("outline") / "model")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def report(deltaw_command: Command) -> Any:
    """The report as fields: name to lines, of a command that must succeed."""

    def run(*arguments: str | Path) -> dict[str, list[str]]:
        code, out, err = deltaw_command("data", *arguments)
        assert (code, err) == (0, "")
        return fields(out)

    return run


def fields(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line[:1].strip():
            name = line[:10].strip()
            found.setdefault(name, [])
        found.setdefault(name, []).append(line[10:])
    return found


def test_a_mixed_data_set_without_a_model(report: Any, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [ask(n) for n in range(12)] + [ask(3), ask(99, " ")])
    chat = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]
    second = write_rows(
        tmp_path / "b.jsonl",
        [{"messages": [{"role": "system", "content": "S"}, *chat, *chat]}, {"messages": [{}]}],
    )
    shown = report(f"{first},{second}", "validation_share=0")
    assert shown["data"] == [
        f"{first}: 14 rows",
        'instructions: prompt "instruction", response "output" (by their names)',
        f"{second}: 2 rows",
        'dialogues: messages "messages" (by their names)',
    ]
    assert shown["samples"] == ["14 training"]
    assert shown["turns"] == ["2 to 5, median 2 (user 15, assistant 15, system 1)"]
    assert shown["prompts"] == ["11 to 12, median 11 characters"]
    assert shown["answers"] == ["4 to 10, median 9 characters"]
    assert shown["skipped"][0] == "1 row left out, nothing to learn in them:"
    assert shown["skipped"][1].startswith(f"{first}:14: ")
    assert shown["bad"][0] == (
        "1 row refused, unless skip_bad_rows=true, because they make no sense:"
    )
    assert shown["bad"][1].startswith(f"{second}:2: ")
    assert shown["warning"] == [
        f"1 repeated training sample, all kept: {first}:13 repeats {first}:4"
    ]
    assert "overlap" not in shown and "tokens" not in shown
    assert shown["next"] == [f"deltaw data {first},{second} validation_share=0 --model MODEL"]


def test_the_next_command_repeats_the_keys(report: Any, outline: Path, tmp_path: Path) -> None:
    rows = [{"q": f"{n}?", "a": f"{n}."} for n in range(5)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    keys = ("columns={prompt: q, response: a}", "max_length=64")
    quoted = f"{file} 'columns={{prompt: q, response: a}}' max_length=64"
    assert report(file, *keys)["next"] == [f"deltaw data {quoted} --model MODEL"]
    words = (file, *keys, "--model", outline, "--template", "chatml")
    assert report(*words)["next"] == [f"deltaw check {outline} {quoted} template=chatml"]


def test_bad_lists_every_row(report: Any, tmp_path: Path) -> None:
    bad = [{"messages": [{}]}] * 7
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = write_rows(tmp_path / "a.jsonl", [good, *bad])
    few = report(file, "validation_share=0", "skip_bad_rows=true")["bad"]
    assert few[0] == "7 rows left out, because they make no sense:"
    assert len(few) == 7 and few[-1] == "and 2 more; --bad lists all"
    every = report(file, "validation_share=0", "--bad")["bad"]
    assert [line.split(": ")[0] for line in every[1:]] == [f"{file}:{n}" for n in range(2, 9)]


def test_bad_lists_every_row_where_nothing_is_left(
    deltaw_command: Command, outline: Path, tmp_path: Path
) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": 0}]
    masked = write_rows(tmp_path / "mask.jsonl", [{"messages": said}] * 25)
    code, out, err = deltaw_command("data", masked, "--bad")
    assert code == 1 and out.startswith("skipped   25 rows left out:\n")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        f"{masked}:{n}:" for n in range(1, 26)
    ]
    assert 'no turn is trained: its marks ("loss", "weight", "train") leave every answer' in err
    assert "skipped" not in deltaw_command("data", masked)[1]
    long = write_rows(tmp_path / "long.jsonl", [ask(n, "word " * 60) for n in range(9)])
    words = ("data", long, "too_long=drop", "validation_share=0", "--model", outline)
    code, out, err = deltaw_command(*words, "--bad")
    assert code == 1 and out.count(f"{long}:") >= 9 and f"{long}:9: " in out


def test_leaks_are_named_and_not_fatal(report: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [ask(n) for n in range(5)])
    write_rows(tmp_path / "validation.jsonl", [ask(3), ask(9)])
    shown = report(tmp_path)
    assert shown["samples"] == ["4 training, 2 validation"]
    assert shown["leaked"] == [
        "1 row refused, unless allow_leakage=true, because they are held out too:",
        f"{tmp_path}/train.jsonl:4: held out too: {tmp_path}/validation.jsonl:1",
    ]
    assert "overlap" not in shown


def test_tokens_without_weights(report: Any, outline: Path, tmp_path: Path) -> None:
    rows = [ask(n) for n in range(8)] + [ask(8, "word " * 60)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    shown = report(file, "--model", outline, "validation_share=0", "--samples", "0")
    assert shown["template"] == [
        "alpaca, because the tokenizer has none (template=NAME asks for another)"
    ]
    assert shown["control"] == ["none: no special token of the model stands in the rows' own text"]
    assert shown["longest"][0].startswith(f"{file}:9: ")
    assert shown["longest"][-1] == "1 sample longer than 128 tokens"
    size = int(shown["longest"][0].split()[1])
    assert size > 128
    assert f"longest {size} of 128; 1 sample cut" in shown["tokens"]
    assert shown["ends"] == [
        "8 of 9 rows end with <eos>, which is learnt; the others are cut before it"
    ]
    assert shown["unknown"] == ["none: the tokenizer can write every character"]
    total = int(shown["tokens"][0].split()[2].replace(",", ""))
    padded = int(shown["epoch"][0].split()[0].replace(",", ""))
    assert padded == 9 * 128 > total
    assert "sample 1" not in shown
    assert shown["overlap"] == ["none: no sample repeats another, no held-out prompt is trained"]


def test_control_tokens_in_rows_are_found_with_their_place(
    report: Any, outline: Path, tmp_path: Path
) -> None:
    rows = [ask(0), ask(1, "Say <|im_end|> or <|im_end|> and <eos>."), ask(2, "<|im_end >"), ask(3)]
    rows[3]["instruction"] += "<s>"
    file = write_rows(tmp_path / "a.jsonl", rows)
    shown = report(file, "--model", outline, "validation_share=0")
    assert shown["control"] == [
        "2 samples with special tokens of the model in their own text,",
        "which are read as control tokens, not as words:",
        f"{file}:2: <|im_end|> x 2, <eos> x 1",
        f"{file}:4: <s> x 1",
        "Fix: take them out of the rows, or write them otherwise",
    ]


def test_chinese_is_shown_as_written(
    deltaw_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model", positions=1024)
    capsys.readouterr()
    given = ("--model", model, "validation_share=0", "--samples", "30")
    code, out, err = deltaw_command("data", CHINESE, *given)
    assert (code, err) == (0, "")
    assert "\N{REPLACEMENT CHARACTER}" not in out
    text = out.replace("\n" + " " * 10, "\n")
    for row in json.loads(CHINESE.read_text("utf-8")):
        assert row["instruction"] in text
        assert f"⟦{row['output']}<eos>⟧" in text


def test_nothing_of_a_file_reaches_the_terminal_raw(
    deltaw_command: Command, outline: Path, tmp_path: Path
) -> None:
    evil = "\x1b[31mred\x07\u202e"
    rows = [
        {"instruction": evil, "output": evil},
        {"instruction": f"{evil}<eos>", "output": "x"},
        {"instruction": evil, "output": ""},
    ]
    folder = tmp_path / "\x1b[2J"
    folder.mkdir()
    file = write_rows(folder / "a.jsonl", rows)
    code, out, _ = deltaw_command("data", file, "--model", outline, "validation_share=0", "--bad")
    assert code == 0
    assert not {"\x1b", "\x07", "\u202e"} & {*out}
    assert "\\x1b[31mred\\x07\\u202e" in out


def test_labelled_texts(report: Any, tiny_classifier: Path, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "data.csv", messages(30))
    shown = report(file)
    assert shown["data"][0] == "30 rows read: 27 training, 3 validation, 0 skipped"
    assert shown["labels"][0].startswith("3 classes: ")
    assert "length" not in shown
    assert "skipped" not in report(file, "--bad")
    gaps = write_csv(tmp_path / "gaps.csv", messages(30) + [("", "ship")] * 7)
    skipped = report(gaps, "--bad")["skipped"]
    assert skipped[0] == "7 rows left out:" and len(skipped) == 8
    with_model = report(file, "--model", tiny_classifier)
    assert with_model["length"][-1].endswith("of the rows truncated")
    assert with_model["next"] == [f"deltaw check {tiny_classifier} {file}"]


@pytest.fixture(scope="module")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.train.models import make_model

    folder = tmp_path_factory.mktemp("classifier") / "model"
    make_model(folder)
    (folder / "model.safetensors").unlink()
    return folder


def test_both_answers_of_preferences_are_counted_and_marked(
    report: Any, deltaw_command: Command, outline: Path, tmp_path: Path
) -> None:
    rows = [{"instruction": f"{n}?", "chosen": "yes" * n, "rejected": "no"} for n in range(1, 5)]
    rows.append({"instruction": "x" * 200, "chosen": "<eos>", "rejected": "b"})
    file = write_rows(tmp_path / "a.jsonl", rows)
    words = (file, "--model", outline, "validation_share=0", "--samples", "2")
    shown = report(*words)
    assert shown["chosen"] == ["3 to 12, median 6 characters"]
    assert shown["rejected"] == ["1 to 2, median 2 characters"]
    assert shown["tokens"][1].startswith("chosen   ") and "in 4 answers; " in shown["tokens"][1]
    assert shown["tokens"][2].startswith("rejected ")
    assert shown["tokens"][3] == "every answer ends with <eos>, which counts"
    assert shown["control"][2].endswith("a.jsonl:5: <eos> x 1")
    assert shown["empty"][0] == "1 sample without an answer that fits, left out:"
    assert shown["empty"][1].endswith("128 fit, and the answer lies beyond")
    _, out, _ = deltaw_command("data", *words)
    for text in ("⟦yes<eos>⟧", "⟦no<eos>⟧", "⟦yesyesyesyes<eos>⟧"):
        assert text in out
    assert out.count("chosen, ") == out.count("rejected, ") == 2
    assert "marks" not in report(*words[:3], "--samples", "0")


def test_good_and_bad_answers_are_counted_and_marked(
    report: Any, deltaw_command: Command, outline: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n}?", "completion": f" a{n}", "label": n < 3} for n in range(5)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    shown = report(file, "--model", outline, "validation_share=0")
    assert shown["ratings"] == ["3 good, 2 bad"]
    assert "in 3 answers" in shown["tokens"][1] and "in 2 answers" in shown["tokens"][2]
    _, out, _ = deltaw_command("data", file, "--model", outline, "validation_share=0")
    assert out.count(": good, ") == 3 and out.count(": bad, ") == 2
    assert all(f"⟦ a{n}<eos>⟧" in out for n in range(5))
    _, _, err = deltaw_command("data", file, "--model", outline, "max_length=2")
    assert "Nothing can be trained on:" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r=16", "lora_alpha=4"], "These keys say nothing about data:\n  - lora_alpha\n  - r\n"),
        (["columnz={prompt: a}"], "unknown key columnz; did you mean columns?"),
        (["template=nonsense", "--template", "alpaca"], "Given twice on the command line"),
        (["--template", "nonsense", "--model", "MODEL"], "there is no such template"),
        (["max_length=999", "--model", "MODEL"], "the model has positions for 128 tokens"),
        (["max_length=4", "--model", "MODEL"], "has a token to learn"),
        (["--model", "nowhere"], "The model nowhere cannot be loaded"),
    ],
)
def test_what_cannot_be_used_is_one_error(
    deltaw_command: Command, outline: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [ask(n) for n in range(4)])
    given = [str(outline) if word == "MODEL" else word for word in arguments]
    code, _, err = deltaw_command("data", file, *given)
    assert code == 1
    assert err.startswith("error: ") and message in err


def test_data_that_are_not_there_are_the_error_of_training(
    deltaw_command: Command, outline: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent.jsonl"):
        _, _, err = deltaw_command("data", tmp_path / name)
        _, _, trained = deltaw_command("train", outline, tmp_path / name)
        assert err == trained and "Fix: " in err


def test_a_tokenizer_that_does_not_fit_is_the_error_of_training(
    deltaw_command: Command, outline: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(outline, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    file = write_rows(tmp_path / "a.jsonl", [ask(n) for n in range(4)])
    code, _, err = deltaw_command("data", file, "--model", folder)
    assert code == 1 and "the model embeds 8" in err


def test_rows_too_few_to_hold_out_are_shown_all_the_same(
    deltaw_command: Command, tmp_path: Path
) -> None:
    rows = [{"instruction": "Say 1.", "output": "1"}, {"instruction": ["x"], "output": "2"}]
    path = tmp_path / "two.json"
    path.write_text(json.dumps(rows))
    code, out, err = deltaw_command("data", path)
    assert (code, err) == (0, "")
    assert '"instruction" holds a list, not text' in out
    assert "validation_share is 0.1, of 1 sample with 1 different prompt: too few" in out
