"""csv and tsv come back exactly, with the line every row begins on."""

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltaw.errors import DataError
from deltaw.train.data.delimited import read_delimited
from deltaw.train.data.rows import Value
from deltaw.train.data.table import read_rows

# NUL is refused, and half surrogates cannot be in a UTF-8 file.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))
LINE_END = re.compile(r"\r\n|\r|\n")


def values(text: str, delimiter: str = ",") -> list[tuple[Value, ...]]:
    _, rows, _ = read_delimited(text, "file", delimiter)
    return [row.values for row in rows]


def error(text: str, delimiter: str = ",") -> str:
    with pytest.raises(DataError) as caught:
        read_delimited(text, "data.csv", delimiter)
    return str(caught.value)


@given(
    rows=st.lists(st.tuples(TEXT, TEXT).filter(lambda row: row != ("text", "label")), min_size=1),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    mark=st.sampled_from(["", "\ufeff"]),
)
@example(rows=[("", ""), ("a\r\nb\rc\nd", '"'), ("\v\f\x1c\u2028", "x")], quoting=0, mark="")
def test_what_a_csv_writer_wrote_is_read_exactly(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], quoting: int, mark: str
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, quoting=quoting)
    writer.writerow(["text", "label"])
    lines = []
    for row in rows:
        lines.append(len(LINE_END.findall(file.getvalue())) + 1)
        writer.writerow(row)
    path = tmp_path_factory.getbasetemp() / "round.csv"
    path.write_bytes((mark + file.getvalue()).encode())
    table = read_rows(path)
    assert table.columns == ("text", "label")
    assert [row.values for row in table.rows] == rows
    assert [row.line for row in table.rows] == lines
    assert {row.file for row in table.rows} == {str(path)}


@given(st.lists(st.tuples(TEXT, st.sampled_from("01")), min_size=1))
def test_a_tsv_without_tabs_or_breaks_keeps_its_quotes(rows: list[tuple[str, str]]) -> None:
    """Only a file in which every quoted field is quoted as csv writers do may lose quotes."""
    rows = [(re.sub(r"[\t\r\n]", " ", f"{text}."), label) for text, label in rows]
    text = "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *rows])
    assert values(text, "\t") == rows


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1), st.sampled_from(["\r\n", "\n"]))
def test_what_a_tsv_writer_quoted_everywhere_is_read_exactly(
    rows: list[tuple[str, str]], end: str
) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator=end)
    writer.writerows([("text", "label"), *rows])
    read = values(file.getvalue(), "\t")
    assert read == [row for row in rows if row != ("text", "label")]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('text\tlabel\n"Hello."\t1\n', ('"Hello."', "1")),
        ('text\tlabel\n"unbalanced\t1\n', ('"unbalanced', "1")),
        ('text\tlabel\n5" disk\t1\n', ('5" disk', "1")),
        ('text\tlabel\n"say ""hi"""\t1\n', ('say "hi"', "1")),
        ('text\tlabel\n"a\tb"\t1\n', ("a\tb", "1")),
        ('text\tlabel\n"a\nb"\t1\n', ("a\nb", "1")),
        ('"text"\t"label"\n"Hello."\t1\n', ("Hello.", "1")),
        # Read as quoted, the next two lines would silently become one.
        ('text\tlabel\n"opens here\t1\ncloses here"\t0\n', ('"opens here', "1")),
    ],
)
def test_the_rule_for_quotes_in_tsv(text: str, row: tuple[str, str]) -> None:
    assert values(text, "\t")[0] == row


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_blank_lines(end: str) -> None:
    text = end.join(["text,label", "", "one,1", "", '"two', 'lines",2', "three,3", "", ""])
    _, rows, _ = read_delimited(text, "file", ",")
    assert [row.line for row in rows] == [3, 5, 7]
    assert rows[1].values == (f"two{end}lines", "2")


def test_a_large_value_is_read_and_the_limit_put_back() -> None:
    before = csv.field_size_limit()
    assert values(f"text,label\n{'x' * 200_000},1\n") == [("x" * 200_000, "1")]
    assert csv.field_size_limit() == before


def test_ragged_rows_are_all_listed() -> None:
    message = error('text,label\na,b\nc\n"d\ne",f,g\n')
    assert "data.csv:3: 1 value\n" in message
    assert "data.csv:4: 3 values" in message
    assert "data.csv:2" not in message
    many = error("text,label\n" + "x\n" * 30)
    assert "data.csv:21: 1 value\n" in many
    assert "data.csv:22:" not in many
    assert "10 more" in many


def test_an_unclosed_quote_names_the_row_it_opens_in() -> None:
    assert error('text,label\na,1\n"b,1\nc,1\n').startswith("data.csv:3: ")
    assert error('text,label\n"a" b,1\n').startswith("data.csv:2: ")


@pytest.mark.parametrize("header", ["text,,label,x", "text,label,text,x", "text, ,label ,label"])
def test_missing_and_repeated_names(header: str) -> None:
    message = error(f"{header}\na,b,c,d\n")
    assert message.startswith("data.csv:1: ")
    assert ("column 2 has no name" in message) == (",label,text" not in header)
    assert ("both named" in message) == (not header.startswith("text,,"))


def test_names_lose_their_blanks_but_values_do_not() -> None:
    columns, rows, _ = read_delimited("text , label\n a , b\n", "file", ",")
    assert columns == ("text", "label")
    assert rows[0].values == (" a ", " b")


@pytest.mark.parametrize(
    "text",
    [
        "fine product,1\nbad product,0\n",
        "This product is really not good at all.,bad\nok,good\n",
        "what is it,ask\nhow,ask\nwho,ask\nhere,answer\n",
    ],
)
def test_a_file_without_a_header_is_refused(text: str) -> None:
    message = error(text)
    assert "data.csv:1: the first line looks like data" in message
    assert "Fix: put a line with 2 column names first" in message


def test_a_known_name_makes_a_header() -> None:
    header = "text,What did you like best about this product of ours?"
    assert values(f"{header}\ntext,a\ntext,b\n") == [("text", "a"), ("text", "b")]


def test_a_repeated_header_is_skipped_with_its_line() -> None:
    _, rows, skipped = read_delimited("text,label\na,1\ntext,label\nb,2\n", "f", ",")
    assert [row.line for row in rows] == [2, 4]
    assert [str(skip) for skip in skipped] == ["f:3: repeats the header"]


def test_another_separator_is_named() -> None:
    assert "separated by ';'" in error("text;label\na;1\n")


def test_glue_files(shared: Path) -> None:
    table = read_rows(shared / "data/sst2/train.tsv")
    lines = (shared / "data/sst2/train.tsv").read_text("utf-8").split("\n")
    assert len(table.rows) == 67349
    assert ["\t".join(map(str, row.values)) for row in table.rows] == lines[1:-1]
    pairs = read_rows(shared / "data/glue_mrpc/msr_paraphrase_train.txt")
    assert len(pairs.rows) == 4076
    assert pairs.columns == ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    with pytest.raises(DataError, match="the first line looks like data"):
        read_rows(shared / "data/glue_cola/train.tsv")


def test_an_empty_row_of_a_lone_column_is_a_row() -> None:
    _, rows, _ = read_delimited('text\n"one"\n""\n\n  \ntwo\n', "file", ",")
    assert [(row.line, row.values) for row in rows] == [
        (2, ("one",)),
        (3, ("",)),
        (5, ("  ",)),
        (6, ("two",)),
    ]
