"""Data sets by name: paths, hub names, dataset_info.json, limits, and folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.language.rows import write_rows

from deltaw.errors import DataError
from deltaw.language.data.corpus import Request, load
from deltaw.language.data.info import Entry, entry
from deltaw.language.data.reading import read_splits
from deltaw.language.data.sources import resolve

ROWS = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "numbers.jsonl", ROWS)
    write_rows(tmp_path / "talk,ed#3", ROWS[:3])
    return tmp_path


def info(folder: Path, **entries: Any) -> Path:
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder


def refusal(asked: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        resolve(asked, **options)
    return str(caught.value)


def test_names_lead_to_entries_paths_and_the_hub(folder: Path) -> None:
    info(folder, numbers={"file_name": "numbers.jsonl"}, far={"hf_hub_url": "a/b", "subset": "en"})
    path = str(folder / "numbers.jsonl")
    found = resolve(f"numbers#5, numbers.jsonl ,{path}#7,far,owner/set:de", dataset_dir=folder)
    assert [(s.name, s.limit, s.entry.location, s.entry.hub) for s in found] == [
        ("numbers#5", 5, path, False),
        ("numbers.jsonl", None, path, False),
        (f"{path}#7", 7, path, False),
        ("far", None, "a/b:en", True),
        ("owner/set:de", None, "owner/set:de", True),
    ]


def test_a_path_that_exists_is_taken_as_it_is(folder: Path) -> None:
    odd = str(folder / "talk,ed#3")
    for asked in (odd, [odd]):
        assert [(s.entry.location, s.limit) for s in resolve(asked)] == [(odd, None)]


def test_all_names_that_lead_nowhere_are_listed(folder: Path) -> None:
    info(folder, numbers={"file_name": "numbers.jsonl"}, bad={"filename": "x"})
    message = refusal("number,gone.jsonl,numbers#0,bad", dataset_dir=folder)
    assert '"number": no such file or folder; did you mean "numbers"?' in message
    assert '"gone.jsonl": no such file or folder' in message
    assert '"numbers#0" asks for no samples' in message
    assert 'unknown key "filename"; did you mean "file_name"?' in message
    assert refusal(" , ").startswith("no data set is named")
    assert "Fix: give a path, or a hub data set as owner/name." in refusal(["nowhere"])


def test_every_key_of_an_entry_is_read(tmp_path: Path) -> None:
    found = entry(
        "x",
        {
            "hf_hub_url": "a/b",
            "ms_hub_url": "c/d",
            "file_name": "e.json",
            "formatting": "sharegpt",
            "ranking": True,
            "subset": "en",
            "split": "train_sft",
            "folder": "python",
            "num_samples": 7,
            "columns": {"chosen": "good", "rejected": "bad"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "Ann"},
        },
        tmp_path,
    )
    assert (found.location, found.hub, found.ranking) == ("a/b:en", True, True)
    assert (found.split, found.folder, found.limit) == ("train_sft", "python", 7)
    assert found.columns == {"messages": "conversations", "chosen": "good", "rejected": "bad"}
    assert (found.tags.role, found.tags.content) == ("who", "says")
    assert (found.tags.speakers["Ann"], found.tags.speakers["gpt"]) == ("user", "assistant")
    plain = entry("x", {"file_name": "a.json"}, tmp_path)
    assert plain == Entry(str(tmp_path / "a.json"), False, None, plain.tags)
    assert entry("x", {"file_name": "a", "formatting": "openai"}, tmp_path).columns == {
        "messages": "messages"
    }


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (
            {"file_name": "a", "format": "sharegpt"},
            'unknown key "format"; did you mean "formatting"?',
        ),
        (
            {"file_name": "a", "formatting": "chatml"},
            'formatting "chatml" is none of alpaca, sharegpt',
        ),
        ({"file_name": "a", "formatting": 1}, 'key "formatting" must be text'),
        (
            {"file_name": "a", "columns": {"promt": "x"}},
            'unknown column "promt"; did you mean "prompt"?',
        ),
        ({"file_name": "a", "columns": {"prompt": 1}}, 'column "prompt" must be text'),
        ({"file_name": "a", "columns": []}, 'key "columns" must be an object'),
        ({"file_name": "a", "tags": {"role": "x"}}, 'unknown tag "role"; did you mean "role_tag"?'),
        ({"file_name": "a", "ranking": "yes"}, 'key "ranking" must be true or false'),
        ({"file_name": "a", "num_samples": 0}, 'key "num_samples" must be a whole number'),
        ({"file_name": "a", "num_samples": True}, 'key "num_samples" must be a whole number'),
        ({"file_name": 5}, 'key "file_name" must be text'),
        ({}, "no file_name and no hf_hub_url"),
        ({"script_url": "run_me"}, "script_url cannot be read from: give hf_hub_url or file_name"),
        ({"ms_hub_url": "a/b", "om_hub_url": "c"}, "ms_hub_url and om_hub_url cannot be read from"),
        ({"cloud_file_name": "s3://x"}, "cloud_file_name cannot be read from"),
        ("a.json", "is not an object"),
    ],
)
def test_bad_entries(tmp_path: Path, value: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        entry("mine", value, tmp_path)
    message = str(caught.value)
    assert message.startswith(f'{tmp_path / "dataset_info.json"}: data set "mine"')
    assert problem in message and "\nFix: " in message


@pytest.mark.parametrize(("text", "problem"), [("{", "invalid JSON"), ("[]", "not an object")])
def test_a_bad_dataset_info(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    assert problem in refusal("x", dataset_dir=tmp_path)


def test_columns_and_tags_of_an_entry_are_used(folder: Path) -> None:
    said = [{"who": "Ann", "says": "hi"}, {"who": "gpt", "says": "ho"}]
    write_rows(
        folder / "talk.jsonl", [{"talk": said, "good": True}, {"talk": said[:1], "good": False}]
    )
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "Ann"}
    columns = {"messages": "talk", "kto_tag": "good"}
    value = {"file_name": "talk.jsonl", "formatting": "sharegpt", "columns": columns, "tags": tags}
    asked = Request("talk", dataset_dir=info(folder, talk=value), val_size=0)
    corpus = load(asked)
    assert [sample.good for sample in corpus.train] == [True]  # type: ignore[union-attr]
    given = Request(str(folder / "talk.jsonl"), columns=columns, tags=tags, val_size=0)
    assert [sample.prompt for sample in load(given).train] == [  # type: ignore[union-attr]
        sample.prompt
        for sample in corpus.train  # type: ignore[union-attr]
    ]


def test_files_of_a_folder_without_parts_are_one_set(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"Book {name}.\n")
    splits = read_splits(Entry(str(tmp_path), False))
    assert [row.values for row in splits.train.rows] == [("Book a.",), ("Book b.",)]
    assert [Path(row.file).name for row in splits.train.rows] == ["a.txt", "b.txt"]
    assert splits.notes == (f"{tmp_path.name}: 2 files read as one data set",)


def test_columns_in_another_order_are_put_right(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\n1,2\n")
    (tmp_path / "b.csv").write_text("answer,question\n4,3\n")
    rows = read_splits(Entry(str(tmp_path), False)).train.rows
    assert [row.values for row in rows] == [("1", "2"), ("3", "4")]
    (tmp_path / "c.csv").write_text("text,label\n4,3\n")
    with pytest.raises(DataError, match=r'c\.csv: "text", "label"'):
        read_splits(Entry(str(tmp_path), False))


@pytest.mark.parametrize("names", [("train_1", "dev_1"), ("trainset", "devset"), ("a", "test-b")])
def test_files_that_speak_of_parts_are_never_put_together(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        write_rows(tmp_path / f"{name}.jsonl", ROWS[:2])
    try:
        splits = read_splits(Entry(str(tmp_path), False))
    except DataError as error:
        assert "no training file" in str(error)
    else:
        assert splits.validation is not None


def test_a_hub_set_is_read_with_its_subset_split_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def fake(path: str, name: str | None, data_dir: str | None) -> datasets.DatasetDict:
        asked.append((path, name, data_dir))
        turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
        return datasets.DatasetDict({"train_sft": datasets.Dataset.from_dict({"messages": turns})})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    value = {"hf_hub_url": "a/b", "subset": "en", "split": "train_sft", "folder": "python"}
    corpus = load(Request("chat", dataset_dir=info(tmp_path, chat=value), val_size=0))
    assert asked == [("a/b", "en", "python")]
    (sample,) = corpus.train
    assert (sample.file, sample.line) == ("a/b:en/train_sft", 1)
