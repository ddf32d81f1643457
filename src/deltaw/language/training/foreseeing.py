"""What a check says of language data and their model before the first step."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import deltaw
from deltaw.errors import printable
from deltaw.language import scores
from deltaw.language.encoding.encoder import Row
from deltaw.language.training.capacity import Capacity
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.model import shape

if TYPE_CHECKING:
    from deltaw.language.training.prepare import LanguageJob

SCORED = 32
"""Rows on which the loss of the untrained model is taken."""
FAR = 1.2
"""Times the loss of guessing by chance, above which something is wrong."""


def foresee(console: Console, job: "LanguageJob") -> None:
    """Say how answers end, how well the base foretells them, and whether the adapter has room."""
    tokenizer = job.tokenizer
    lines = [job.tokens.ending()]
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        lines.append(
            f"{printable(tokenizer.eos_token)} pads as well, which does no harm here: padding is "
            "left out of the loss by its place, not by its token, so the end is still learnt"
        )
    console.field("ends", "\n".join(lines))
    some = _spaced(job.train)
    found = scores.ratios(scores.measured(job.model, some, job.padding).sum(0))
    console.field(
        "base",
        f"loss {found['loss']:.3f} per learnt token before training, perplexity "
        f"{found['perplexity']:,.1f}, on {counted(len(some), 'training row')}",
    )
    uniform = math.log(len(tokenizer))
    if found["loss"] > FAR * uniform:
        console.field(
            "warning",
            f"the model foretells these answers worse than by chance (loss {uniform:.3f}), so the "
            "template or the tokenizer may not be its own.\n"
            "Fix: look at the samples of deltaw data",
        )
    if job.recipe.method == "lora" and not job.recipe.goes_on:
        _show_room(console, job, min(float(found["loss"]), uniform))


def _show_room(console: Console, job: "LanguageJob", loss: float) -> None:
    seen = job.plan.steps * job.recipe.batch_size * job.recipe.gradient_accumulation
    learnt = sum(row.learnt for row in job.train) * min(1.0, seen / job.rows)
    r = job.recipe.r
    room = Capacity(math.ceil(learnt), loss, deltaw.summary(job.model).trainable, r)
    console.field("capacity", str(room))
    if room.enough:
        return
    fix = f"r={room.rank}, or fewer rows"
    if room.rank > shape(job.model.config).width:
        fix = "adapt more layers, or method=full: no rank has so much room here"
    console.field(
        "warning",
        f"r={r} cannot hold all that the answers say (2 bits a parameter; LoRA Without Regret, "
        f"2025), which matters for facts, less for manner and form.\nFix: {fix}",
    )


def _spaced(rows: Sequence[Row]) -> list[Row]:
    """Return some rows, evenly spaced over all."""
    count = min(SCORED, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]
