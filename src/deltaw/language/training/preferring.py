"""Direct preference optimisation and its kin through `trl.DPOTrainer`.

Source: arXiv 2305.18290.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from deltaw.errors import DataError
from deltaw.language.data.corpus import Corpus
from deltaw.language.data.samples import Preference
from deltaw.language.encoding.encoder import MASKED, Encoder
from deltaw.language.memory.weighing import Weigh, weigh
from deltaw.language.training.judging import JudgedJob, JudgedTrainer, prepare_judged
from deltaw.language.training.losses import PairLoss, odds_ratio
from deltaw.language.training.pairs import Pairs
from deltaw.language.training.pairs import encode as encode_pairs
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.distributed.shares import WEIGHT
from deltaw.train.loop import arguments
from deltaw.train.recipe import Recipe


class PreferenceTrainer(JudgedTrainer, DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` by a recipe, over pairs whose reference is known or not needed."""

    loss_over = "rows"
    pair_loss: PairLoss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the mean loss of the pairs."""
        sizes = torch.stack(inputs["completion_mask"].sum(1).chunk(2), -1)
        if self.pair_loss.name == "simpo":
            chosen, rejected = self.pair_loss.instead(sizes).unbind(-1)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        if self.pair_loss.name != "orpo":
            return super().compute_loss(model, inputs, *args, **kwargs)
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = batch["input_ids"].masked_fill(inputs["completion_mask"] == 0, MASKED)
        said = model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(1)
        loss = odds_ratio(torch.stack(said.chunk(2), -1), sizes, self.pair_loss.beta)
        return inputs.get(WEIGHT, 1.0) * loss

    def _lengths(self) -> list[int]:
        columns = [self.train_dataset[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]
        sizes = [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
        return [2 * size for size in sizes]  # both answers are padded to the longer one


@dataclass(frozen=True)
class PreferenceJob(JudgedJob):
    """Prompts with a better and a worse answer each."""

    metrics = ("loss", "accuracy")

    @property
    def counted(self) -> tuple[str, str]:
        """The name of the judgements and how many there are, in words."""
        return "pairs", counted(self.rows, "pair")

    def build(self, folder: Path, metric: str | None) -> JudgedTrainer:
        """Return TRL's trainer for these pairs; `metric` names the validation score."""
        args = arguments(DPOConfig, self.recipe, folder, self.plan, metric)
        collator = DataCollatorForPreference(self.padding.pad)
        trainer = PreferenceTrainer(**self.parts(args), data_collator=collator)
        trainer.pair_loss = PairLoss.of(self.recipe)
        trainer.pair_loss.set(trainer)
        return trainer


def prepare(recipe: Recipe, console: Console, *, weigh: Weigh = weigh) -> PreferenceJob:
    """Read, load and adapt all that the recipe names; say what the data are as soon as known.

    `weigh` says what memory it takes, before any weight is read.

    Raises:
        ConfigError, DataError, TargetError, RunError: whatever is wrong with its part.
    """
    return prepare_judged(recipe, console, _encode, PreferenceJob, weigh)


def _encode(encoder: Encoder, samples: Sequence[Any], corpus: Corpus) -> Pairs:
    if not all(isinstance(sample, Preference) for sample in samples):
        raise DataError(
            f"{corpus.origins[0].schema.reasons}\ntask=dpo learns from pairs of a better and a "
            "worse answer.\nFix: name their columns (columns.chosen, columns.rejected), or leave "
            "task out (task=kto learns from answers called good or bad)."
        )
    return encode_pairs(encoder, samples)
