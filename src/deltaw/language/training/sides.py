"""How long judged answers are, side by side."""

from statistics import median

from deltaw.errors import printable
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.training.judged import Judged
from deltaw.language.training.receipt import left_out
from deltaw.train.data.wording import counted


def lines(judged: Judged, encoder: Encoder) -> list[str]:
    """Return how many tokens the answers of each side have, and how they end."""
    sides = judged.sides()
    rows = [row for side in sides.values() for row in side]
    total = sum(len(row.input_ids) for row in rows)
    learnt = sum(row.learnt for row in rows)
    found = [f"{learnt:,} of {total:,} compared: the last answer of each row"]
    for name, side in sides.items():
        sizes = [row.learnt for row in side] or [0]
        span = f"{min(sizes):,} to {max(sizes):,} tokens, median {median(sizes):,.0f}"
        found.append(f"{name:<9}{sum(sizes):,} in {counted(len(side), 'answer')}; {span}")
    ended = sum(encoder.learns_end(row) for row in rows)
    ends = " or ".join(printable(end) for end in encoder.ends)
    every = "every answer ends" if ended == len(rows) else f"{ended:,} of {len(rows):,} answers end"
    found.append(f"{every} with {ends}, which counts")
    longest = max(len(row.input_ids) for row in rows)
    cut = f"{counted(judged.cut, 'answer')} cut" if judged.cut else "none cut"
    found.append(f"longest {longest:,} of {encoder.max_length:,}; {cut}")
    return [*found, *([left_out(judged.unsaid, "answer")] if judged.unsaid else [])]
