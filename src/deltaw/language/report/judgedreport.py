"""What a model would read of judged answers: tokens of both sides, marked samples of both."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.errors import DataError
from deltaw.language.data.corpus import Corpus
from deltaw.language.encoding.encoder import Row
from deltaw.language.loading import outline
from deltaw.language.reading import encoder_of, template_of
from deltaw.language.report import colouring
from deltaw.language.report.listing import listed
from deltaw.language.report.tokenreport import control, show_held, unknown
from deltaw.language.training.judgements import encode
from deltaw.language.training.sides import lines
from deltaw.train.console import INDENT, Console
from deltaw.train.data.rows import place
from deltaw.train.data.wording import counted
from deltaw.train.recipe import Recipe


def show(console: Console, recipe: Recipe, corpus: Corpus, *, every: bool, samples: int) -> None:
    """Say what the recipe's model would read, of which only tokenizer and configuration are read.

    Raises:
        DataError: for samples that its training could not use.
    """
    loaded = outline(recipe)
    tokenizer = loaded.tokenizer
    template = template_of(recipe, tokenizer, loaded.model, corpus)
    encoder = encoder_of(recipe, tokenizer, template, loaded.model)
    everything = [*corpus.train, *corpus.validation, *corpus.test]
    console.field("template", template.origin)
    console.field("control", "\n".join(control(tokenizer, everything, every)))
    judged = encode(encoder, corpus.train)
    held = {
        "validation": encode(encoder, corpus.validation),
        "test": encode(encoder, corpus.test),
    }
    left = listed([str(skip) for skip in judged.skipped], every=every)
    if not len(judged):
        raise DataError("\n".join(["Nothing can be trained on:", *left]))
    console.field("tokens", "\n".join(lines(judged, encoder)))
    if left:
        title = f"{counted(len(judged.skipped), 'sample')} without an answer that fits, left out:"
        console.field("empty", "\n".join([title, *left]))
    show_held(console, held, every)
    rows = [row for side in judged.sides().values() for row in side]
    console.field("unknown", unknown(tokenizer, rows))
    _show_samples(console, judged.sides(), tokenizer, samples)


def _show_samples(
    console: Console, sides: Mapping[str, Sequence[Row]], tokenizer: Any, count: int
) -> None:
    """Show a few samples of every side; those of pairs belong together."""
    if not count:
        return
    console.line()
    console.field("marks", f"what is compared is {colouring.legend()}")
    for number in range(count):
        for name, side in sides.items():
            if number >= len(side):
                continue
            row = side[round(number * (len(side) - 1) / max(1, min(count, len(side)) - 1))]
            where = place(row.sample.file, row.sample.line)
            tokens = f"{row.learnt:,} of {len(row.input_ids):,} tokens"
            console.field(f"sample {number + 1}", f"{where}: {name}, {tokens}")
            colouring.show(colouring.shortened(colouring.stretches(row, tokenizer)), INDENT)
