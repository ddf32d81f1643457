"""What samples ask: prompts, each with every answer that the data give to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.language.data.samples import Conversation, Passage
from deltaw.language.encoding.encoder import Encoder, Sample

OPENING = 40
"""Characters of a passage that are given to be continued."""


@dataclass(frozen=True, slots=True)
class Question:
    """A rendered prompt, and the answers that are right."""

    prompt: str
    references: tuple[str, ...]


def questions(encoder: Encoder, samples: Sequence[Sample]) -> list[Question]:
    """Return what conversations and completions ask last; equal prompts are one question.

    An answer without words, which calls a tool, has nothing that another could be compared with.
    """
    found: dict[str, list[str]] = {}
    for sample in samples:
        if not isinstance(sample, Passage):
            prompt, _, answer = asked(encoder, sample)
            if answer.strip():
                found.setdefault(prompt, []).append(answer)
    return [Question(prompt, tuple(dict.fromkeys(texts))) for prompt, texts in found.items()]


def asked(encoder: Encoder, sample: Sample) -> tuple[str, str, str]:
    """Return the rendered prompt of a sample, the question in it, and the answer it has."""
    if isinstance(sample, Conversation):
        before, last = sample.messages[:-1], sample.messages[-1]
        question = before[-1].content if before else ""
        return encoder.prompted(before, sample.tools), question, last.content
    if isinstance(sample, Passage):
        start, rest = sample.text[:OPENING], sample.text[OPENING:]
        return encoder.opening(start), start, rest
    return encoder.opening(encoder.joined(sample.prompt, sample.completion)), *(
        sample.prompt,
        sample.completion,
    )
