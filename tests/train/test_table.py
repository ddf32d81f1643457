"""Files of every kind, folders and hub data sets: read exactly, or refused with place and fix."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from deltaw.errors import DataError
from deltaw.train.data.hub import read_hub
from deltaw.train.data.rows import Opaque
from deltaw.train.data.table import read_data, read_rows


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error(path: str | Path, encoding: str = "utf-8") -> str:
    with pytest.raises(DataError) as caught:
        read_data(path, encoding=encoding)
    message = str(caught.value)
    assert "Fix: " in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", b"", "a.csv: the file is empty"),
        ("a.csv", b" \r\n\n", "a.csv: the file holds only blanks"),
        ("a.csv", b"\xef\xbb\xbf", "a.csv: the file holds only blanks"),
        ("a.csv", b"text,label\n", "a.csv: no rows"),
        ("a.json", b"[]", "a.json: no rows"),
        ("a.csv", b"text,label\nok,1\nna\xefve,0\n", "a.csv:3: byte 18 is 0xef"),
        ("a.csv", b"text,label\r\x80,1\rok,1\r\x81,0\r", "a.csv:4: byte 20 is 0x81"),
        ("a.csv", b"text,label\nok,1\nn\0,0\n", "a.csv:3: NUL byte"),
        ("a.csv", "text,label\nok,1\n".encode("utf-16"), "the file is UTF-16"),
        ("a.csv", "text,label\nok,1\n".encode("utf-32"), "the file is UTF-32"),
        ("a.csv", "text,label\nok,1\n".encode("utf-16-be"), "a.csv:1: NUL byte"),
        ("a.xlsx", b"PK", "cannot read .xlsx"),
        ("a", b"x", "a file without an ending"),
        ("a.txt", b"just words\nand more\n", "a .txt file without tabs"),
        ("a.parquet", b"PAR1 and nothing", "not a readable parquet file"),
        ("a.arrow", b"ARROW1 and nothing", "not a readable arrow file"),
        ("b.arrow", b"nothing", "not a readable arrow file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    assert part in error(write(tmp_path / name, content))


@pytest.mark.parametrize(
    "name", ["absent.csv", "csv", "json:x", "./absent", "ab/sent/data", "absent\x1b[2J"]
)
def test_a_missing_file_is_not_looked_up_on_the_hub(name: str) -> None:
    message = error(name)
    assert "no such file" in message
    assert "\x1b" not in message
    assert "the hub gives" not in message


BYTES = st.one_of(
    st.binary(max_size=200),
    st.text('ab1,"\t\r\n {}[]:\\u0\0\ufeff', max_size=80).map(str.encode),
    st.tuples(
        st.sampled_from(["text,label\n", "text\tlabel\n", '[{"text": "', '{"text": "a"}\n', ""]),
        st.text(max_size=60),
    ).map(lambda parts: "".join(parts).encode(errors="replace")),
)


@given(BYTES, st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet", ".arrow"]))
def test_any_bytes_are_a_table_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    path = write(tmp_path_factory.getbasetemp() / f"fuzz{ending}", content)
    try:
        table = read_rows(path)
    except DataError as error:
        assert f"fuzz{ending}" in str(error)
        assert "Fix: " in str(error)
        assert str(error).replace("\n", "").isprintable()
    else:
        assert table.rows
        assert {len(row.values) for row in table.rows} == {len(table.columns)}
        assert len(set(table.columns)) == len(table.columns)


@pytest.mark.parametrize("name", ["a/b", "owner/no-such-set", "owner/set:part"])
def test_a_name_that_nothing_answers_to_is_one_error(name: str) -> None:
    assert f"{name}: no such file or folder, and the hub" in error(name)


def test_another_encoding_is_read_when_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nnaïve,1\n".encode("cp1252"))
    assert read_rows(path, encoding="cp1252").rows[0].values == ("naïve", "1")
    wide = write(tmp_path / "b.csv", "text,label\nnaïve,1\n".encode("utf-16"))
    assert read_rows(wide, encoding="utf-16").columns == ("text", "label")
    assert "unknown encoding" in error(path, "klingon")
    assert "position 13" in error(path, "ascii")


@pytest.mark.parametrize("encoding", ["rot13", "hex", "a\0b", "undefined", "nonsense"])
def test_what_is_no_encoding_of_text_is_one_error(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,label\nx,a\n", encoding="utf-8")
    assert "unknown encoding" in error(path, encoding)


def test_an_encoding_that_fails_in_its_own_way_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"text,label\nxn--a\xff,a\n")
    assert "not valid idna" in error(path, "idna")


@pytest.mark.parametrize("made", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow_files_and_the_streams_that_datasets_keeps(tmp_path: Path, made: Any) -> None:
    columns = pyarrow.table({"text": ["a", None], "tags": [["x"], []]})
    with made(tmp_path / "train.arrow", columns.schema) as out:
        out.write_table(columns)
    table = read_data(tmp_path).train
    assert table.columns == ("text", "tags") and [row.line for row in table.rows] == [1, 2]
    assert table.rows[0].values == ("a", Opaque("a value of type list"))


def test_a_table_carries_the_digest_of_its_bytes(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbftext\tlabel\r\nok\t1\r\n"
    table = read_rows(write(tmp_path / "a.txt", content))
    assert table.columns == ("text", "label")
    assert table.sha256 == hashlib.sha256(content).hexdigest()


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {
        "text": ["a\r\n", None, "c"],
        "label": [1, None, 3],
        "at": [None, None, pyarrow.scalar(0, pyarrow.timestamp("s"))],
        "tags": [["x"], [], None],
    }
    parquet.write_table(pyarrow.table(columns), path)
    table = read_rows(path)
    assert table.columns == ("text", "label", "at", "tags")
    assert [row.line for row in table.rows] == [1, 2, 3]
    assert table.rows[0].values == ("a\r\n", 1, None, Opaque("a value of type list"))
    assert table.rows[2].values[2] == Opaque("a value of type datetime")
    twice = pyarrow.Table.from_arrays([[1], [2]], names=["text", "text"])
    parquet.write_table(twice, path)
    assert "columns 1 and 2 are both named" in error(path)


CSV = "text,label\nok,1\n"


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["train.csv"], ["train.csv", None, None]),
        (["training.csv", "val.csv", "eval.csv"], ["training.csv", "val.csv", "eval.csv"]),
        (["Train.CSV", "dev.csv"], ["Train.CSV", "dev.csv", None]),
        (["x_train.csv", "x-test.csv", "x.csv"], ["x_train.csv", None, "x-test.csv"]),
        (["train.csv", "old_train.csv", "README.md"], ["train.csv", None, None]),
        (["train.csv", "train.tsv", "test.csv"], ["train.csv", None, "test.csv"]),
    ],
)
def test_the_parts_of_a_folder(tmp_path: Path, files: list[str], parts: list[str | None]) -> None:
    for name in files:
        write(tmp_path / name, CSV)
    splits = read_data(tmp_path)
    tables = (splits.train, splits.validation, splits.test)
    assert [table and Path(table.path).name for table in tables] == parts
    chosen = "train.tsv" in files
    assert splits.notes == (("read the .csv files and not train.tsv",) if chosen else ())


def test_bad_folders(tmp_path: Path) -> None:
    assert "holds no data files" in error(tmp_path)
    write(tmp_path / "dev.csv", CSV)
    write(tmp_path / "val.csv", CSV)
    write(tmp_path / "train.csv", CSV)
    assert "validation: dev.csv, val.csv" in error(tmp_path)
    (tmp_path / "train.csv").unlink()
    (tmp_path / "val.csv").unlink()
    assert "no training file; the folder holds dev.csv" in error(tmp_path)


def test_the_problems_of_all_parts_come_together(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\nragged\n")
    write(tmp_path / "test.csv", b"text,label\n\xff,1\n")
    message = error(tmp_path)
    assert "train.csv:2: 1 value\n" in message
    assert "test.csv:2: byte 11" in message


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    blind = datasets.Dataset.from_dict({"text": ["c"], "label": [-1]}, features)
    asked = []

    def load(path: str, name: str | None, data_dir: str | None) -> datasets.DatasetDict:
        asked.append((path, name, data_dir))
        return datasets.DatasetDict({"train": part, "dev": part, "test": blind})

    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = read_data("owner/set:english")
    assert asked == [("owner/set", "english", None)]
    assert [row.values for row in splits.train.rows] == [("a", "yes"), ("b", "no")]
    assert splits.train.rows[1].place == "owner/set:english/train:2"
    assert splits.test is not None
    assert splits.test.rows[0].values == ("c", None)
    assert splits.validation is not None
    assert splits.validation.sha256 == splits.train.sha256 != splits.test.sha256
    one = read_hub("owner/set", split="test", folder="files")
    assert asked[1] == ("owner/set", None, "files")
    assert (one["validation"], one["test"]) == (None, None)
    assert one["train"] is not None and one["train"].path == "owner/set/test"
    with pytest.raises(DataError, match='no part "full"; the data set has train, dev, test'):
        read_hub("owner/set", split="full")


def test_text_is_documents_when_prose_is_wanted(tmp_path: Path) -> None:
    text = "\n\n  One.\nmore\n<|endoftext|>\n<|endoftext|>\r\n\r\nTwo.\r\n"
    table = read_rows(write(tmp_path / "a.txt", text), prose=True)
    assert table.columns == ("text",)
    assert [(row.line, row.values) for row in table.rows] == [
        (3, ("  One.\nmore",)),
        (8, ("Two.",)),
    ]
    indented = read_rows(write(tmp_path / "b.txt", "\tChapter one\nIt was"), prose=True)
    assert indented.rows[0].values == ("\tChapter one\nIt was",)
    assert read_data(
        write(tmp_path / "c.txt", "text\tlabel\na\tb\n"), prose=True
    ).train.columns == (
        "text",
        "label",
    )


def test_a_row_keeps_what_it_cannot_show(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    lines = json.dumps({"messages": turns}) + "\n"
    tables = [read_rows(write(tmp_path / "a.json", lines))]
    tables.append(read_rows(write(tmp_path / "a.jsonl", lines)))
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    tables.append(read_rows(tmp_path / "a.parquet"))
    for table in tables:
        value = table.rows[0].values[0]
        assert isinstance(value, Opaque) and value.raw == turns


def test_real_folders(shared: Path) -> None:
    counts = {}
    for name in ("sst2", "snips_nlu", "banking77", "glue_rte", "glue_mrpc"):
        splits = read_data(shared / "data" / name)
        tables = (splits.train, splits.validation, splits.test)
        counts[name] = tuple(0 if table is None else len(table.rows) for table in tables)
    assert counts == {
        "sst2": (67349, 872, 0),
        "snips_nlu": (13784, 0, 700),
        "banking77": (10003, 0, 3080),
        "glue_rte": (2490, 277, 0),
        "glue_mrpc": (4076, 0, 1725),
    }


def test_keys_that_arrow_adds_to_objects_are_taken_out(tmp_path: Path) -> None:
    calls = [
        {"name": "weather", "arguments": {"city": "Paris"}},
        {"name": "add", "arguments": {"a": 1, "b": [{"c": 2}, {"d": 3}]}},
    ]
    rows = [{"calls": [call], "call": call} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_rows(tmp_path / "a.parquet")
    assert [[value.raw for value in row.values] for row in found.rows] == [
        [[call], call] for call in calls
    ]
