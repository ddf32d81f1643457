"""Labels for texts: a person's one text, or every row of a file."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.errors import DataError
from deltaw.train import staging
from deltaw.train.batches import Collator
from deltaw.train.data.evaluation import build_texts
from deltaw.train.data.examples import Example
from deltaw.train.data.table import read_rows
from deltaw.train.escape import printable
from deltaw.train.evaluate import logits
from deltaw.train.opened import Opened, open_run
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
    """Print the likeliest labels of a text, or JSON lines for a file (to `output` if given)."""
    opened = open_run(folder, model=model, trust_remote_code=trust_remote_code)
    if merge:
        opened.merge()
    columns = opened.recipe.text or ["text"]
    if len(texts) == 1 and Path(texts[0]).is_file():
        table = read_rows(texts[0], encoding=opened.recipe.encoding)
        part = build_texts(table, columns)
        for skip in part.skipped:
            print(f"skipped {skip}", file=sys.stderr)
        found = predict(opened, part.examples)
        lines = "".join(json.dumps(row) + "\n" for row in found)
        if output is None:
            print(lines, end="")
        else:
            staging.write_text(output, lines)
            print(f"{len(found):,} predictions in {printable(str(output), 300)}")
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
