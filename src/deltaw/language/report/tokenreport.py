"""What a model would read and learn of a data set: tokens, ends, long rows, marked samples."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.errors import printable
from deltaw.language.data.corpus import Corpus
from deltaw.language.encoding.batches import as_data, packed
from deltaw.language.encoding.encoder import Encoder, Row, Rows
from deltaw.language.encoding.seq2seq import Seq2SeqEncoder
from deltaw.language.encoding.specials import unknown_id
from deltaw.language.loading import outline
from deltaw.language.reading import encoder_of, require_rows, template_of
from deltaw.language.report import colouring
from deltaw.language.report.listing import listed
from deltaw.language.report.vocabulary import control_tokens, unknown_characters
from deltaw.language.training.receipt import Encoded, tokens_of
from deltaw.train.batches import padded_tokens
from deltaw.train.console import INDENT, Console
from deltaw.train.data.rows import place
from deltaw.train.data.wording import counted
from deltaw.train.order import order_of
from deltaw.train.recipe import Recipe

LONGEST = 3
"""Long rows that are named."""
CHARACTERS = 10
"""Unknown characters that are named."""


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
    found = encoder.encode(corpus.train)  # type: ignore[arg-type]
    if every and not found.rows:
        _show_empty(console, found, every)
    require_rows(found, corpus)
    held = {
        "validation": encoder.encode(corpus.validation),  # type: ignore[arg-type]
        "test": encoder.encode(corpus.test),  # type: ignore[arg-type]
    }
    data = packed(found.rows, encoder.max_length) if recipe.packing else as_data(found.rows)
    apart = isinstance(encoder, Seq2SeqEncoder)
    sides = [[len(ids) for ids in data[side]] for side in ("input_ids", "labels")[: 1 + apart]]
    tokens = tokens_of(found, encoder, len(sides[0]) if recipe.packing else None)
    console.field("tokens", "\n".join(tokens.lines()))
    console.field("longest", "\n".join(_longest(found, encoder, every)))
    if found.skipped:
        _show_empty(console, found, every)
    show_held(console, held, every)
    console.field("ends", tokens.ending())
    console.field("unknown", unknown(tokenizer, found.rows))
    console.field("epoch", _epoch(recipe, sides))
    _show_samples(console, found.rows, tokenizer, samples, apart=apart)


def control(tokenizer: Any, samples: Sequence[Any], every: bool) -> list[str]:
    """Say which samples hold special tokens in their own text."""
    found = control_tokens(tokenizer, samples)
    if not found:
        return ["none: no special token of the model stands in the rows' own text"]
    places = []
    for one in found:
        words = ", ".join(f"{printable(word)} x {n}" for word, n in one.tokens.items())
        places.append(f"{place(one.sample.file, one.sample.line)}: {words}")
    return [
        f"{counted(len(found), 'sample')} with special tokens of the model in their own text,",
        "which are read as control tokens, not as words:",
        *listed(places, every=every),
        "Fix: take them out of the rows, or write them otherwise",
    ]


def _show_empty(console: Console, found: Rows, every: bool) -> None:
    lines = listed([str(skip) for skip in found.skipped], every=every)
    title = f"{counted(len(found.skipped), 'sample')} of which nothing can be learnt, left out:"
    console.field("empty", "\n".join([title, *lines]))


def show_held(console: Console, parts: Mapping[str, Encoded], every: bool) -> None:
    """Say what is cut and what is left out of held-out parts, by their names."""
    for name, part in parts.items():
        lines = [f"{name}: {part.cut:,} cut"] if part.cut else []
        if part.skipped:
            lines.append(f"{name}: {counted(len(part.skipped), 'sample')} left out:")
            lines += listed([str(skip) for skip in part.skipped], every=every)
        if lines:
            console.field("held out", "\n".join(lines))


def _longest(found: Rows, encoder: Encoder, every: bool) -> list[str]:
    fitting = [(row.sample, max(len(row.input_ids), len(row.labels))) for row in found.rows]
    pieces = {id(sample) for sample, _ in found.long}
    all_sizes = [*found.long, *(pair for pair in fitting if id(pair[0]) not in pieces)]
    all_sizes.sort(key=lambda pair: -pair[1])
    shown = max(LONGEST, len(found.long) if every else 0)
    lines = [
        f"{place(sample.file, sample.line)}: {counted(size, 'token')}"
        for sample, size in all_sizes[:shown]
    ]
    count = len(found.long)
    over = f"{counted(count, 'sample')} longer than {encoder.max_length:,} tokens"
    return [*lines, f"{over}{' (--bad lists all)' if count > shown else ''}"]


def unknown(tokenizer: Any, rows: Sequence[Row]) -> str:
    """Say which characters of the rows the tokenizer does not know."""
    number = unknown_id(tokenizer)
    if number is None:
        return "none: the tokenizer can write every character"
    some = {id(row.sample): row.sample for row in rows if row.holds(number)}
    if not some:
        return "none: the tokenizer knows every character"
    characters = unknown_characters(tokenizer, list(some.values())).most_common()
    named = ", ".join(f"{printable(c)} x {n:,}" for c, n in characters[:CHARACTERS])
    more = f" and {len(characters) - CHARACTERS:,} others" if len(characters) > CHARACTERS else ""
    return f"in {counted(len(some), 'sample')}: {named}{more}"


def _epoch(recipe: Recipe, sides: Sequence[Sequence[int]]) -> str:
    lengths = [sum(sizes) for sizes in zip(*sides, strict=True)]
    order = order_of(recipe, lengths, longest_first=True)
    total = sum(sum(padded_tokens(order, side)) for side in sides)
    padding = total - sum(lengths)
    return (
        f"{total:,} tokens go through the model, {padding / total:.0%} of them padding, "
        f"in batches of {recipe.batch_size}"
    )


def _show_samples(
    console: Console, rows: Sequence[Row], tokenizer: Any, count: int, *, apart: bool
) -> None:
    count = min(count, len(rows))
    if not count:
        return
    console.line()
    console.field("marks", f"what is learnt is {colouring.legend()}")
    for number in range(count):
        row = rows[round(number * (len(rows) - 1) / max(1, count - 1))]
        size, sample = len(row.input_ids), row.sample
        what = f"{row.learnt:,} of {size:,} tokens learnt"
        if apart:
            what = f"a prompt of {size:,} tokens, an answer of {row.learnt:,}"
        console.field(f"sample {number + 1}", f"{place(sample.file, sample.line)}: {what}")
        marked = colouring.sides if apart else colouring.stretches
        colouring.show(colouring.shortened(marked(row, tokenizer)), INDENT)
