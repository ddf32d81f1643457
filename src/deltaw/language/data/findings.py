"""What a data set is like: counts, roles, turns, lengths, repetitions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from deltaw.errors import printable
from deltaw.language.data.corpus import Corpus
from deltaw.language.data.holding import repeated, shared_prompts
from deltaw.language.data.samples import (
    Completion,
    Conversation,
    Message,
    Passage,
    Preference,
    Rated,
    Sample,
    Turns,
    has_tools,
)
from deltaw.train.data.wording import counted


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, middle and largest of some counts."""

    least: int
    middle: int
    most: int

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.most:,}"
        return f"{self.least:,} to {self.most:,}, median {self.middle:,}"


@dataclass(frozen=True, slots=True)
class Findings:
    """What the training samples of a corpus are like; lengths are in characters.

    `turns` and `roles` count messages and are empty for plain texts; `repeated` counts samples that
    repeat an earlier one, `shared_prompts` held-out samples whose prompt training has too.
    `answered` is of the better answers where two are compared, `rejected` of the worse; `good` and
    `bad` count rated answers.
    """

    roles: Mapping[str, int]
    turns: Spread | None
    asked: Spread | None
    answered: Spread
    with_tools: int
    repeated: int
    shared_prompts: int
    rejected: Spread | None
    good: int
    bad: int


def findings(corpus: Corpus) -> Findings:
    """Return what the training part of `corpus` is like."""
    parts = [_parts(sample) for sample in corpus.train]
    messages = [_messages(sample) for sample in corpus.train]
    turns = [len(found) for found in messages if found]
    asked = [_length(prompt) for prompt, _ in parts if prompt]
    held = (*corpus.validation, *corpus.test)
    worse = [_length(s.rejected) for s in corpus.train if isinstance(s, Preference)]
    rated = Counter(sample.good for sample in corpus.train if isinstance(sample, Rated))
    return Findings(
        roles=Counter(message.role for found in messages for message in found),
        turns=_spread(turns) if turns else None,
        asked=_spread(asked) if asked else None,
        answered=_spread([_length(answer) for _, answer in parts]),
        with_tools=sum(has_tools(sample) for sample in corpus.train),
        repeated=len(repeated(corpus.train)),
        shared_prompts=len(shared_prompts(corpus.train, held)),
        rejected=_spread(worse) if worse else None,
        good=rated[True],
        bad=rated[False],
    )


def facts(corpus: Corpus) -> list[tuple[str, str]]:
    """Return the findings as names and lines to show: the data sets, then what they hold."""
    found = findings(corpus)
    origins = [
        f"{printable(origin.name, 200)}: {counted(origin.rows, 'row')}\n{origin.schema.reasons}"
        for origin in corpus.origins
    ]
    parts = {"training": corpus.train, "validation": corpus.validation, "test": corpus.test}
    sizes = ", ".join(f"{len(samples):,} {name}" for name, samples in parts.items() if samples)
    lines = [("data", "\n".join(origins)), ("samples", sizes)]
    if found.turns:
        roles = ", ".join(f"{role} {count:,}" for role, count in found.roles.items())
        lines.append(("turns", f"{found.turns} ({roles})"))
    if found.with_tools:
        lines.append(("tools", f"{counted(found.with_tools, 'sample')} with functions to call"))
    if found.asked:
        lines.append(("prompts", f"{found.asked} characters"))
    name = "chosen" if found.rejected else "answers" if found.asked else "texts"
    lines.append((name, f"{found.answered} characters"))
    if found.rejected:
        lines.append(("rejected", f"{found.rejected} characters"))
    if found.good or found.bad:
        lines.append(("ratings", f"{found.good:,} good, {found.bad:,} bad"))
    if not (found.repeated or found.shared_prompts or corpus.leaked):
        lines.append(("overlap", "none: no sample repeats another, no held-out prompt is trained"))
    return lines


def _parts(sample: Sample) -> tuple[Turns, Turns]:
    """Return what is asked and what follows; of a preference the better answer."""
    match sample:
        case Conversation():
            return sample.messages[:-1], sample.messages[-1:]
        case Completion():
            return sample.prompt, sample.completion
        case Passage():
            return "", sample.text
        case Preference():
            return sample.prompt, sample.chosen
        case Rated():
            return sample.prompt, sample.completion


def _messages(sample: Sample) -> tuple[Message, ...]:
    return tuple(turn for part in _parts(sample) if not isinstance(part, str) for turn in part)


def _length(part: Turns) -> int:
    return len(part) if isinstance(part, str) else sum(len(turn.content) for turn in part)


def _spread(counts: Sequence[int]) -> Spread:
    return Spread(min(counts), int(median(counts)), max(counts))
