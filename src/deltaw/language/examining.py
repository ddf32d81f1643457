"""A model answers held-out questions, and its answers are scored beside those of the data."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.errors import DataError
from deltaw.language.encoding.encoder import Sample
from deltaw.language.generating import Sampling, Speaker, answers
from deltaw.language.merged import merged
from deltaw.language.metrics.scoring import tallies
from deltaw.language.metrics.tally import Tally
from deltaw.language.metrics.words import Words, choose
from deltaw.language.questions import Question, questions
from deltaw.train.data.wording import counted
from deltaw.train.recipe import Recipe

LONGER = 1.5
"""How much longer than the longest answer of the data one may be, where the recipe does not say."""


@dataclass(frozen=True)
class Examination:
    """Questions, how they are answered, and what counts as a word in the answers."""

    speaker: Speaker
    recipe: Recipe
    questions: Sequence[Question]
    sampling: Sampling
    words: Words

    def __str__(self) -> str:
        way = f"by {self.sampling.num_beams} beams" if self.sampling.num_beams > 1 else "greedily"
        right = sum(len(question.references) for question in self.questions)
        return (
            f"{counted(len(self.questions), 'prompt')}, {counted(right, 'reference')}; answered "
            f"{way} in at most {counted(self.sampling.max_new_tokens, 'token')}\n"
            f"BLEU and NIST count {self.words}"
        )

    def answers(self) -> list[str]:
        """Return what the model answers as it is now."""
        return answers(self.speaker, [one.prompt for one in self.questions], self.sampling)

    def scored(self, said: Sequence[str]) -> dict[str, Tally]:
        """Return what every metric counts in answers to the questions."""
        return tallies(said, [one.references for one in self.questions], self.words)

    def sit(self) -> dict[str, Tally]:
        """Return what every metric counts in the model's answers, its adapter in the weights."""
        with merged(self.speaker.model, self.recipe):
            return self.scored(self.answers())


def examination(speaker: Speaker, recipe: Recipe, samples: Sequence[Sample]) -> Examination:
    """Return the examination on what these samples ask.

    Raises:
        DataError: if they ask nothing that is answered in words, as plain texts do.
    """
    asked = questions(speaker.encoder, samples)
    if not asked:
        raise DataError(
            "Plain texts ask nothing, and calls of tools have no words, so there are no answers to "
            "score.\nFix: give rows with prompts and answers, or leave out what scores them "
            "(metric, --generate)."
        )
    return Examination(
        speaker,
        recipe,
        asked,
        _sampling(speaker, recipe, asked),
        choose(q.references for q in asked),
    )


def _sampling(speaker: Speaker, recipe: Recipe, asked: Sequence[Question]) -> Sampling:
    most = recipe.max_new_tokens
    if most is None:
        texts = [text for question in asked for text in question.references]
        encoded = speaker.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        most = min(int(LONGER * max(map(len, encoded))) + 1, speaker.encoder.max_length)
    return Sampling(
        max_new_tokens=most,
        num_beams=recipe.num_beams,
        length_penalty=recipe.length_penalty,
        repetition_penalty=recipe.repetition_penalty,
        no_repeat_ngram_size=recipe.no_repeat_ngram_size,
    )
