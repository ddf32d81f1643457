"""Read plain text: one row for each document."""

from deltaw.train.data.rows import Row

END = "<|endoftext|>"


def read_prose(text: str, file: str) -> tuple[tuple[str, ...], list[Row]]:
    """Return the one column `text` and a row per document; `<|endoftext|>` stands between two.

    Without this mark the whole file is one document. A row's line is the first that is not blank;
    the blank lines before and after a document are not part of it.
    """
    rows, line = [], 1
    for part in text.split(END):
        document = part.strip("\r\n")
        blank = part[: len(part) - len(part.lstrip("\r\n"))]
        if document.strip():
            rows.append(Row(file, line + len(blank.splitlines()), (document,)))
        line += part.replace("\r\n", "\n").replace("\r", "\n").count("\n")
    return ("text",), rows
