"""What every training of a language model begins with, and what it records of that."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from deltaw.language.data.corpus import Corpus, load
from deltaw.language.data.samples import Sample, messages_of
from deltaw.language.encoding.calling import PLAIN, dialect_of
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.templating import Chosen, defaulting
from deltaw.language.loading import outline
from deltaw.language.reading import (
    encoder_of,
    request,
    require_metric,
    require_validation,
    template_of,
)
from deltaw.language.training.receipt import show_corpus
from deltaw.train import methods
from deltaw.train.choices import check_reports, chosen, recorded_recipe
from deltaw.train.console import Console
from deltaw.train.continuing import Adapted, require_adapters
from deltaw.train.identity import tokenizer_digest
from deltaw.train.rates import TrainingPlan
from deltaw.train.recipe import Recipe


@dataclass(frozen=True)
class Opening:
    """The data of a recipe, its model of which no weight is read, and how texts become tokens."""

    recipe: Recipe
    corpus: Corpus
    model: nn.Module
    tokenizer: Any
    template: Chosen
    encoder: Encoder

    def recorded(self, plan: TrainingPlan, base: str, adapted: Adapted) -> Recipe:
        """Return the recipe with what was chosen, and the digests of what it began from."""
        values = {"task": self.recipe.task or "sft", "max_length": self.encoder.max_length}
        return recorded_recipe(
            self.recipe,
            values | chosen(self.recipe, plan, adapted),
            self.corpus.hashes,
            base=base,
            tokenizer=tokenizer_digest(self.tokenizer),
            adapters=adapted.began,
            reading=self._reading(),
        )

    def _reading(self) -> str:
        """Return a digest of the template, of which columns are read as what, and of the dialect.

        The last is only part of it where samples have calls, which it is for. That thoughts are
        left out is part of it where there were some.
        """
        roles = [
            (s.kind, sorted(s.columns.items()), s.plain, repr(s.tags))
            for s in (origin.schema for origin in self.corpus.origins)
        ]
        parts: list[object] = [self.template.template.source, roles]
        dialect = dialect_of(self.template.template)
        if dialect != PLAIN and any(m.tool_calls for s in self._samples() for m in messages_of(s)):
            parts.append(dialect)
        if self.corpus.thoughtless:
            parts.append("without thoughts")
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _samples(self) -> Iterator[Sample]:
        return chain(self.corpus.train, self.corpus.validation, self.corpus.test)


def begin(recipe: Recipe, console: Console, metrics: Sequence[str]) -> Opening:
    """Read all that a recipe names but the weights; say what the data are as soon as known.

    Raises:
        ConfigError, DataError, RunError: whatever is wrong with its part, or with the recipe's
            metric, which must be one of `metrics`.
    """
    methods.lora_config(recipe)
    check_reports(recipe)
    require_adapters(recipe)
    require_metric(recipe, metrics)
    corpus = load(request(recipe))
    show_corpus(console, corpus)
    require_validation(recipe, corpus)
    seen = outline(recipe)
    template = template_of(recipe, seen.tokenizer, seen.model, corpus)
    line = defaulting(recipe.default_system)
    seen.tokenizer.chat_template = line + template.template.source
    encoder = encoder_of(recipe, seen.tokenizer, template, seen.model)
    return Opening(recipe, corpus, seen.model, seen.tokenizer, template, encoder)
