"""Samples as prompt and answer apart, as sequence-to-sequence models read and learn them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deltaw.errors import DataError
from deltaw.language.data.samples import Completion, Conversation, Passage
from deltaw.language.encoding.answers import trained
from deltaw.language.encoding.encoder import Encoder, Row, Rows, Sample
from deltaw.language.encoding.leaving import unsaid
from deltaw.train.data.rows import Skip, place
from deltaw.train.sandbox import Refused, RunsAway


@dataclass(frozen=True)
class Seq2SeqEncoder(Encoder):
    """How prompts become tokens that are read, and answers tokens that are learnt.

    Both are as the tokenizer makes them, with its special tokens, and an answer ends with EOS. Each
    answer of a conversation is a sample of its own, whose prompt is all that comes before; only the
    last one is with `learnt="last"`. `max_length` holds for prompt and answer each: a prompt is cut
    before its special tokens, an answer before its end.
    """

    def joined(self, prompt: str, completion: str) -> str:
        """Return the prompt: nothing need part it from an answer that stands apart."""
        return prompt

    def opening(self, text: str) -> str:
        """Return a plain prompt as it is: the tokenizer adds what is around it."""
        return text

    def prompt_ids(self, prompts: Sequence[str], answer: int) -> list[list[int]]:
        """Return the tokens of rendered prompts, cut as in training; answers take no room."""
        _, after = self._around()
        return [self._cut(ids, after) for ids in self._prompts(prompts)]

    def room(self, prompt: int) -> int:
        """Return how many tokens an answer may have, whatever its prompt."""
        return self.max_length

    def _rows(self, samples: Sequence[Sample], found: Rows) -> Iterator[tuple[Sample, Row]]:
        kept, prompts, answers = [], [], []
        for sample in samples:
            try:
                parts = self._parts(sample)
            except Refused as error:
                found.refused.append(Skip(sample.file, sample.line, str(error)))
                continue
            except RunsAway as error:
                raise RunsAway(f"{error.why}, at {place(sample.file, sample.line)}") from error
            if not parts:
                yield sample, Row([], [], sample)
            found.unsaid += any(self._unsaid(part, prompt) for part, prompt, _ in parts)
            for part, prompt, answer in parts:
                kept.append(part)
                prompts.append(prompt)
                answers.append(answer)
        if not kept:
            return
        eos = self.tokenizer.eos_token_id
        targets = self.tokenizer(text_target=answers, verbose=False)["input_ids"]
        for part, source, target in zip(kept, self._prompts(prompts), targets, strict=True):
            ended = target if eos in target[-2:] else [*target, eos]
            yield part, Row(source, ended, part)

    def _unsaid(self, part: Sample, prompt: str) -> bool:
        if not isinstance(part, Conversation):
            return False
        return unsaid(prompt, self._with_system(part.messages[:-1]), part.tools)

    def _parts(self, sample: Sample) -> list[tuple[Sample, str, str]]:
        """Return what is learnt of a sample, each with its prompt and answer."""
        if isinstance(sample, Passage):
            raise DataError(
                f"{place(sample.file, sample.line)} is plain text, and a sequence-to-sequence "
                "model learns answers to prompts.\nFix: give rows with a prompt and a completion "
                "(columns.prompt, columns.response), or train a causal model on texts."
            )
        if isinstance(sample, Completion):
            return [(sample, sample.prompt, sample.completion)]
        return [
            (part, self.prompted(part.messages[:-1], part.tools), part.messages[-1].content)
            for part in self._answered(sample)
        ]

    def _answered(self, sample: Conversation) -> list[Conversation]:
        """Return the conversation up to each answer that is learnt."""
        for index, message in enumerate(sample.messages):
            if message.role != "assistant" and message.trained:
                raise Refused(
                    f"turn {index + 1} is to be learnt by its row and is no answer; a "
                    "sequence-to-sequence model learns answers alone"
                )
        ends = [index + 1 for index, message in enumerate(sample.messages) if trained(message)]
        if self.learnt == "last":
            ends = ends[-1:]
        for end in ends:
            if sample.messages[end - 1].tool_calls:
                raise Refused(f"turn {end} calls a tool, for which an answer apart has no form")
        return [replace(sample, messages=sample.messages[:end]) for end in ends]

    def _prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        return found

    def _around(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer puts before and after a prompt."""
        before, _ = super()._around()
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return before, self.tokenizer("a")["input_ids"][len(before) + len(bare) :]

    def _add(self, found: Rows, sample: Sample, row: Row, problems: list[Skip]) -> None:
        where = (sample.file, sample.line)
        if not row.learnt:
            found.skipped.append(Skip(*where, "no answer of it is learnt"))
            return
        sizes = len(row.input_ids), len(row.labels)
        if max(sizes) <= self.max_length:
            found.rows.append(row)
            return
        found.long.append((sample, max(sizes)))
        reason = (
            f"a prompt of {sizes[0]:,} tokens and an answer of {sizes[1]:,}, "
            f"{self.max_length:,} fit each"
        )
        if self.too_long == "raise":
            problems.append(Skip(*where, reason))
        elif self.too_long == "drop":
            found.skipped.append(Skip(*where, reason))
        else:
            _, after = self._around()
            source = self._cut(row.input_ids, after)
            found.rows.append(Row(source, row.labels[: self.max_length], sample))
            found.cut += 1

    def _cut(self, ids: list[int], after: list[int]) -> list[int]:
        """Return a prompt without what is too much of it before its last special tokens."""
        if len(ids) <= self.max_length:
            return ids
        return ids[: max(0, self.max_length - len(after))] + after
