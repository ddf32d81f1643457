"""Samples to tokens, and which of these are learnt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deltaw.errors import DataError, raise_all
from deltaw.language.data.samples import Completion, Conversation, Message, Passage
from deltaw.language.encoding.answers import answers, everything
from deltaw.language.encoding.calling import as_data
from deltaw.language.encoding.labelling import MASKED, labelled
from deltaw.language.encoding.leaving import gathered, unsaid
from deltaw.language.encoding.specials import begun, unknown_id
from deltaw.train.data.rows import Skip, place
from deltaw.train.rendering import Span, Template
from deltaw.train.sandbox import Refused, RunsAway

Learnt = Literal["answers", "last", "all"]
"""Which tokens are learnt: of every answer, of the last answer, or of everything."""
TooLong = Literal["truncate", "drop", "split", "raise"]
"""What becomes of a sample that is longer than the model may see."""
BATCH = 1000

Sample = Conversation | Completion | Passage


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence of tokens; a label is the token itself where it is learnt, -100 elsewhere.

    For a sequence-to-sequence model `input_ids` is the prompt, and `labels` is the answer.
    """

    input_ids: list[int]
    labels: list[int]
    sample: Sample

    @property
    def learnt(self) -> int:
        """How many tokens are learnt."""
        return sum(label != MASKED for label in self.labels)

    def holds(self, token: int) -> bool:
        """Tell whether a token is read or learnt."""
        return token in self.input_ids or token in self.labels


def samples_of(rows: Sequence[Row]) -> list[Sample]:
    """Return the samples that rows are from, once each though a long one became several rows."""
    return list({id(row.sample): row.sample for row in rows}.values())


@dataclass(slots=True)
class Rows:
    """What samples became: rows, samples without one, and what happened to the long ones."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    refused: list[Skip] = field(default_factory=list)
    """Samples that the template refuses, or leaves without an end."""
    long: list[tuple[Sample, int]] = field(default_factory=list)
    """Samples that are longer than fits, with their tokens, whatever became of them."""
    cut: int = 0
    split: int = 0
    joined: int = 0
    """Samples of which one token spans the end of a prompt and the beginning of its answer."""
    unknown: int = 0
    """Samples with characters that the vocabulary does not have."""
    unsaid: int = 0
    """Samples of which the template leaves out a turn that is no answer, or a tool."""


@dataclass(frozen=True)
class Encoder:
    """How samples become tokens.

    `ends` are the words that end a turn, the tokenizer's EOS first; `separator` goes between the
    prompt and the completion of plain texts that leave no blank there; `too_long` of None splits
    passages and cuts everything else; `system` begins the conversations that have no such turn;
    `skip_bad` leaves out what the template refuses.
    """

    tokenizer: Any
    template: Template
    max_length: int
    ends: tuple[str, ...]
    learnt: Learnt = "answers"
    too_long: TooLong | None = None
    separator: str = "\n"
    system: str | None = None
    skip_bad: bool = False

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end a turn."""
        return [self.tokenizer.convert_tokens_to_ids(end) for end in self.ends]

    def encode(self, samples: Sequence[Sample]) -> Rows:
        """Return the rows of all samples, in their order.

        Raises:
            RunsAway: at the first sample of which the template makes no end.
            DataError: listing the samples that the template refuses or leaves without an end, if
                these are not skipped, and those that are too long where that is an error.
        """
        found = Rows()
        problems: list[Skip] = []
        unknown = unknown_id(self.tokenizer)
        for start in range(0, len(samples), BATCH):
            some = samples[start : start + BATCH]
            for sample, row in self._rows(some, found):
                found.unknown += unknown is not None and row.holds(unknown)
                self._add(found, sample, row, problems)
        if self.skip_bad:
            found.skipped += found.refused
        else:
            problems = [*found.refused, *problems]
        raise_all(
            DataError,
            "samples that cannot be trained on as they are:",
            gathered(problems, len({(s.file, s.line) for s in samples})),
            "correct or remove these rows, or choose another template, max_length or too_long; "
            "skip_bad_rows=true leaves those out that the template refuses, and lists them.",
        )
        return found

    def _text(self, sample: Sample) -> tuple[str, list[Span]]:
        """Return the text of a sample and the spans of it that are learnt."""
        if isinstance(sample, Passage):
            return sample.text, [(0, len(sample.text))]
        if isinstance(sample, Completion):
            prompt = self.joined(sample.prompt, sample.completion)
            text = prompt + sample.completion
            return text, [(0 if self.learnt == "all" else len(prompt), len(text))]
        messages = self._with_system(sample.messages)
        if self.learnt == "all":
            return everything(self.template, messages, sample.tools)
        last = self.learnt == "last"
        return answers(self.template, messages, sample.tools, self.ends, last=last)

    def joined(self, prompt: str, completion: str) -> str:
        """Return a plain prompt with what parts it from its completion."""
        return prompt + parting(prompt, completion, self.separator)

    def prompted(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return the text of turns that the model is to answer."""
        data = as_data(self._with_system(messages), self.template)
        text, _ = self.template.render(data, tools, prompt=True)
        return text

    def opening(self, text: str) -> str:
        """Return a plain text that the model is to go on with, BOS where training has it."""
        before, _ = self._around()
        return "".join(self.tokenizer.convert_ids_to_tokens(before)) + text

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.system is None or (messages and messages[0].role == "system"):
            return messages
        return (Message("system", self.system), *messages)

    def prompt_ids(self, prompts: Sequence[str], answer: int) -> list[list[int]]:
        """Return the tokens of rendered prompts; `answer` tokens fit behind each.

        A prompt that leaves no room for them, or for half the length, loses its beginning.
        """
        room = self.max_length - min(answer, self.max_length // 2)
        return [ids[-room:] for ids in self._prompts(prompts)]

    def fits(self, prompt: str, answer: int) -> bool:
        """Tell whether `prompt_ids` keeps all of a rendered prompt."""
        return self._prompts([prompt]) == self.prompt_ids([prompt], answer)

    def _prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of rendered prompts, however many they are."""
        found = (self.tokenizer(p, add_special_tokens=False, verbose=False) for p in prompts)
        return [encoded["input_ids"] for encoded in found]

    def room(self, prompt: int) -> int:
        """Return how many tokens an answer may have behind a prompt of so many."""
        return max(1, self.max_length - prompt)

    def _rows(self, samples: Sequence[Sample], found: Rows) -> Iterator[tuple[Sample, Row]]:
        """Yield each sample with its row; count what is said of samples."""
        kept, texts = [], []
        for sample in samples:
            try:
                texts.append(self._text(sample))
                kept.append(sample)
            except Refused as error:
                found.refused.append(Skip(sample.file, sample.line, str(error)))
            except RunsAway as error:
                raise RunsAway(f"{error.why}, at {place(sample.file, sample.line)}") from error
        if not kept:
            return
        before, after = self._around()
        encoded = self.tokenizer(
            [text for text, _ in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        parts = zip(kept, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for sample, (text, spans), ids, offsets in parts:
            labels, joined = labelled(ids, offsets, spans)
            found.joined += joined
            if isinstance(sample, Conversation):
                found.unsaid += unsaid(text, self._with_system(sample.messages), sample.tools)
            else:
                ids = [*before, *ids, *after]
                labels = [*(MASKED for _ in before), *labels, *after]
            yield sample, _row(ids, labels, sample)

    def _around(self) -> tuple[list[int], list[int]]:
        """Return the tokens before and after a plain text: BOS where the tokenizer adds it, EOS."""
        eos = self.tokenizer.eos_token_id
        return begun(self.tokenizer), [] if eos is None else [eos]

    def _add(self, found: Rows, sample: Sample, row: Row, problems: list[Skip]) -> None:
        where = (sample.file, sample.line)
        if not row.learnt:
            found.skipped.append(Skip(*where, "no token of it is learnt"))
            return
        if isinstance(sample, Conversation) and not self._is_ended(row):
            reason = (
                f"the template does not end the answer with {' or '.join(self.ends)}, so the "
                "model would never learn to stop"
            )
            found.refused.append(Skip(*where, reason))
            return
        length = len(row.input_ids)
        if length <= self.max_length:
            found.rows.append(row)
            return
        found.long.append((sample, length))
        way = self.too_long or ("split" if isinstance(sample, Passage) else "truncate")
        reason = f"{length:,} tokens, {self.max_length:,} fit"
        if way == "raise":
            problems.append(Skip(*where, reason))
        elif way == "drop":
            found.skipped.append(Skip(*where, reason))
        else:
            pieces = self._pieces(row)
            kept = [piece for piece in (pieces if way == "split" else pieces[:1]) if piece.learnt]
            if not kept:
                found.skipped.append(Skip(*where, f"{reason}, and the answer lies beyond"))
                return
            found.rows += kept
            found.split += way == "split"
            found.cut += way == "truncate"

    def _pieces(self, row: Row) -> list[Row]:
        return [
            _row(row.input_ids[start:end], row.labels[start:end], row.sample)
            for start in range(0, len(row.input_ids), self.max_length)
            for end in [start + self.max_length]
        ]

    def _is_ended(self, row: Row) -> bool:
        return self.learnt == "all" or self.learns_end(row)

    def learns_end(self, row: Row) -> bool:
        """Tell whether the last token that is learnt ends a turn; blanks may follow it."""
        learnt = [label for label in row.labels if label != MASKED]
        words = self.tokenizer.convert_ids_to_tokens(learnt[-2:])
        return words[-1] in self.ends or (self.learnt == "all" and words[0] in self.ends)


def parting(prompt: str, completion: str, separator: str) -> str:
    """Return what goes between a plain prompt and its completion: nothing where a blank is."""
    blank = prompt[-1:].isspace() or completion[:1].isspace()
    return "" if blank or not prompt else separator


def _row(ids: list[int], labels: list[int], sample: Sample) -> Row:
    """Return a row; nothing comes before its first token, so that is never learnt."""
    return Row(ids, [MASKED, *labels[1:]], sample)
