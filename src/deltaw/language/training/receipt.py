"""What is said of the data before the first step: samples, tokens, what is learnt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from deltaw.language.data.corpus import Corpus
from deltaw.language.encoding.encoder import Encoder, Rows
from deltaw.language.encoding.seq2seq import Seq2SeqEncoder
from deltaw.train.console import Console
from deltaw.train.data.rows import Skip
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable
from deltaw.train.receipt import skips
from deltaw.train.tokens import Lengths, histogram

LEARNT = {
    "answers": "every answer",
    "last": "the last answer of each",
    "all": "everything, questions too",
}


def show_corpus(console: Console, corpus: Corpus) -> None:
    """Say what each data set is, how many samples it gave, and which rows were left out."""
    lines = []
    for origin in corpus.origins:
        parts = [f"{origin.train:,} training"] if origin.train else []
        parts += [f"{origin.validation:,} validation"] if origin.validation else []
        parts += [f"{origin.test:,} test"] if origin.test else []
        lines.append(f"{printable(origin.name, 200)}: {origin.rows:,} rows, {', '.join(parts)}")
        lines.append(origin.schema.reasons)
    lines += skips(corpus.skipped)
    console.field("data", "\n".join([*lines, *corpus.notes]))
    record_skips(console, corpus.skipped)


def record_skips(console: Console, skipped: Sequence[Skip]) -> None:
    """Write everything that was left out to the log."""
    for skip in skipped:
        console.record("skipped", file=skip.file, line=skip.line, reason=skip.reason)


class Encoded(Protocol):
    """What one part of the data became: `cut` counts what was too long."""

    skipped: list[Skip]
    cut: int


def held_out_lines(parts: Mapping[str, Encoded]) -> list[str]:
    """Return what was cut and what was left out of held-out parts, by their names."""
    lines = []
    for name, part in parts.items():
        cut = [f"{part.cut:,} cut"] if part.cut else []
        lines += [f"{name}: {line}" for line in (*cut, *skips(part.skipped))]
    return lines


def left_out(count: int, what: str = "sample") -> str:
    """Say that samples are read without something that they have."""
    return (
        f"{counted(count, what)} with a system text, a question or a tool that the template leaves "
        "out"
    )


@dataclass(frozen=True, slots=True)
class Tokens:
    """How many tokens training sees and learns; `packed` counts rows of several samples."""

    found: Rows
    encoder: Encoder
    packed: int | None = None

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *skips(self.found.skipped)])

    def lines(self) -> list[str]:
        """Return what is said of the rows, without those that were left out."""
        lines = self._sizes()
        if self.packed is not None:
            lines.append(f"packed into {counted(self.packed, 'row')}, which do not see each other")
        if self.found.joined:
            lines.append(
                f"{counted(self.found.joined, 'sample')}: the first token of the answer holds the "
                "end of the prompt too"
            )
        if self.found.unknown:
            lines.append(
                f"{counted(self.found.unknown, 'sample')} with characters that the tokenizer does "
                "not know"
            )
        if self.found.unsaid:
            lines.append(left_out(self.found.unsaid))
        return lines

    def _sizes(self) -> list[str]:
        """Return how many tokens are learnt, and how long the rows are."""
        rows = self.found.rows
        total = sum(len(row.input_ids) for row in rows)
        learnt = sum(row.learnt for row in rows)
        return [
            f"{learnt:,} of {total:,} learnt: {self._what()}",
            *self._drawn([len(row.input_ids) for row in rows]),
            f"longest {self._longest():,} of {self.encoder.max_length:,}; {self._long()}",
        ]

    def _what(self) -> str:
        ends = " or ".join(printable(end) for end in self.encoder.ends)
        return f"{LEARNT[self.encoder.learnt]}, with its end {ends}"

    def _drawn(self, lengths: list[int]) -> list[str]:
        drawn = Lengths(self.encoder.max_length, max(lengths), 0.0, histogram(lengths))
        return str(drawn).splitlines()[:-1]

    def ending(self) -> str:
        """Say how many rows teach the model to stop, and what became of the others."""
        rows = self.found.rows
        ended = sum(self.encoder.learns_end(row) for row in rows)
        ends = " or ".join(printable(end) for end in self.encoder.ends)
        if ended == len(rows):
            return f"every row ends with {ends}, which is learnt"
        cut = self.found.cut or self.found.split
        why = "the others are cut before it" if cut else "the template does not end the others"
        return f"{ended:,} of {counted(len(rows), 'row')} end with {ends}, which is learnt; {why}"

    def _longest(self) -> int:
        found = self.found
        return max([len(row.input_ids) for row in found.rows] + [size for _, size in found.long])

    def _long(self) -> str:
        found = self.found
        parts = [f"{counted(found.cut, 'sample')} cut"] if found.cut else []
        parts += [f"{counted(found.split, 'sample')} split"] if found.split else []
        return " and ".join(parts) or "none cut"


class TokensApart(Tokens):
    """How many tokens a sequence-to-sequence model reads of prompts and learns of answers."""

    def _sizes(self) -> list[str]:
        prompts = [len(row.input_ids) for row in self.found.rows]
        answers = [len(row.labels) for row in self.found.rows]
        return [
            f"{sum(answers):,} of answers learnt: {self._what()}",
            f"{sum(prompts):,} of prompts read",
            "prompts",
            *self._drawn(prompts),
            "answers",
            *self._drawn(answers),
            f"longest {max(prompts):,} and {max(answers):,}, {self.encoder.max_length:,} fit each; "
            f"{self._long()}",
        ]


def tokens_of(found: Rows, encoder: Encoder, packed: int | None = None) -> Tokens:
    """Return what is said of rows by this encoder."""
    kind = TokensApart if isinstance(encoder, Seq2SeqEncoder) else Tokens
    return kind(found, encoder, packed)
