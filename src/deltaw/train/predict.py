"""Labels for texts: a person's one text, or every row of a file."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.errors import DataError, raise_all
from deltaw.train import staging
from deltaw.train.batches import Collator
from deltaw.train.data.evaluation import build_texts
from deltaw.train.data.examples import Example
from deltaw.train.data.folder import ENDINGS
from deltaw.train.data.table import read_rows
from deltaw.train.escape import printable
from deltaw.train.opened import Opened, open_run
from deltaw.train.scores import logits
from deltaw.train.tokens import encode

BEST = 3


def predict_run(
    folder: Path,
    texts: Sequence[str],
    output: Path | None = None,
    *,
    merge: bool = True,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Print the likeliest labels of a text, or JSON lines for a file (to `output` if given).

    Raises:
        DataError: if a text is blank or names what cannot be read, the run takes another number of
            texts, or `output` would replace the file that is read.
        RunError, FormatError: if the run cannot be opened.
    """
    file = Path(texts[0]) if len(texts) == 1 and os.path.isfile(texts[0]) else None
    _check_output(output, file)
    if file is None:
        _check_texts(texts)
    opened = open_run(folder, model=model, trust_remote_code=trust_remote_code)
    if merge:
        opened.merge()
    columns = opened.recipe.text or ["text"]
    if file is not None:
        _predict_file(opened, file, columns, output)
        return
    if len(texts) != len(columns):
        raise DataError(
            f"The run takes {len(columns)} text{'s' * (len(columns) > 1)} "
            f"({', '.join(map(printable, columns))}), {len(texts)} given, and there is no file "
            f"{printable(texts[0])!r}."
        )
    pair = texts[1] if len(texts) == 2 else None
    example = Example(texts[0], pair, None, "the command line", 1)
    for line in _shown(opened, _outputs(opened, [example])[0]):
        print(line)


def _check_output(output: Path | None, file: Path | None) -> None:
    if output is None:
        return
    if file is None:
        raise DataError(
            "Only the rows of a file are written with --output, and no file is given.\n"
            "Fix: leave --output out, or give a file of rows."
        )
    if output.exists() and output.samefile(file):
        raise DataError(
            f"{printable(str(output), 300)} is read, and --output would replace it.\n"
            "Fix: give --output another name."
        )


def _check_texts(texts: Sequence[str]) -> None:
    raise_all(DataError, "These cannot be labelled:", [why for t in texts if (why := _no_text(t))])


def _no_text(text: str) -> str | None:
    """Return why `text` is none: it is blank, a folder, or the name of a file of rows."""
    shown = repr(printable(text))
    meant = "if it is a text, add a blank behind it"
    if not text.strip():
        return f"{shown} is blank; give a text"
    if os.path.isdir(text):
        return f"{shown} is a folder; give one file of rows, or {meant}"
    if os.path.splitext(text)[1].lower() not in ENDINGS:
        return None
    if os.path.isfile(text):
        return f"{shown} is a file; give it alone, or {meant}"
    return f"there is no file {shown}; check the path, or {meant}"


def _predict_file(opened: Opened, file: Path, columns: Sequence[str], output: Path | None) -> None:
    part = build_texts(read_rows(file, encoding=opened.recipe.encoding), columns)
    for skip in part.skipped:
        print(f"skipped {skip}", file=sys.stderr)
    found = predict(opened, part.examples)
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in found)
    if output is None:
        print(lines, end="")
    else:
        staging.write_text(output, lines)
        print(f"{len(found):,} predictions in {printable(str(output), 300)}")


def predict(opened: Opened, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return file, line, texts and the label with its probability (or the value) for each."""
    outputs = _outputs(opened, examples)
    rows = []
    for example, row in zip(examples, outputs, strict=True):
        texts = {"text": example.text} | ({"pair": example.pair} if example.pair else {})
        rows.append({"line": example.line, **texts, **_answer(opened, row)})
    return rows


def _outputs(opened: Opened, examples: Sequence[Example]) -> Tensor:
    rows, _ = encode(opened.tokenizer, examples, opened.recipe.max_length)
    return logits(opened.model, rows, Collator(opened.tokenizer))


def _answer(opened: Opened, row: Tensor) -> dict[str, Any]:
    if opened.task == "regression":
        return {"value": row[0].item()}
    shares = row.softmax(-1)
    best = int(shares.argmax())
    return {"label": opened.labels[best], "probability": round(shares[best].item(), 4)}


def _shown(opened: Opened, row: Tensor) -> list[str]:
    if opened.task == "regression":
        return [f"{row[0].item():.4f}"]
    shares, indices = row.softmax(-1).topk(min(BEST, len(opened.labels)))
    names = [printable(opened.labels[index]) for index in indices.tolist()]
    width = max(map(len, names))
    return [
        f"{name:<{width}}  {share:.3f}" for name, share in zip(names, shares.tolist(), strict=True)
    ]
