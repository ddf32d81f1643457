"""Direct preference optimisation and its kin through `trl.DPOTrainer`.

Source: arXiv 2305.18290.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from deltaw.errors import DataError
from deltaw.language.data.corpus import Corpus
from deltaw.language.data.samples import Preference
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.labelling import MASKED
from deltaw.language.memory.weighing import Weigh, weigh
from deltaw.language.training.judging import JudgedJob, JudgedTrainer, prepare_judged
from deltaw.language.training.losses import PairLoss
from deltaw.language.training.pairs import Pairs
from deltaw.language.training.pairs import encode as encode_pairs
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.distributed.shares import WEIGHT
from deltaw.train.loop import arguments
from deltaw.train.recipe import Recipe

FARTHEST = 1.0
"""The most that SimPO's gamma / β usually is."""


class PreferenceTrainer(JudgedTrainer, DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` by a recipe, over pairs whose reference is known or not needed."""

    loss_over = "rows"
    pair_loss: PairLoss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the mean loss of the pairs."""
        if not self.pair_loss.alone:
            return super().compute_loss(model, inputs, *args, **kwargs)
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        if self.aux_loss_enabled:
            asked["output_router_logits"] = True
        answers = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(answers == 0, MASKED)
        out = model(**asked, labels=labels, use_cache=False, fused_lm_head=True)
        said, sizes = out.log_probs.sum(1), answers.sum(1)
        loss = self.pair_loss.of_tokens(*(torch.stack(n.chunk(2), -1) for n in (said, sizes)))
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * out.aux_loss
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
    job = prepare_judged(recipe, console, _encode, PreferenceJob, weigh)
    return replace(job, warnings=(*job.warnings, *unreachable(recipe)))


def unreachable(recipe: Recipe) -> list[str]:
    """Return a warning where SimPO's margin is far beyond those of its paper.

    gamma / β is by how much answers are to differ in log p per token. Source: arXiv 2405.14734,
    table 7, where it is at most 0.8.
    """
    ratio = recipe.simpo_gamma / recipe.pref_beta
    if recipe.pref_loss != "simpo" or ratio <= FARTHEST:
        return []
    return [
        f"simpo_gamma={recipe.simpo_gamma:g} with pref_beta={recipe.pref_beta:g} asks for better "
        f"answers that are ahead by {ratio:g} in log p per token; arXiv 2405.14734 has 0.1 to 0.8."
        "\nFix: pref_beta=2, or 2.5"
    ]


def _encode(encoder: Encoder, samples: Sequence[Any], corpus: Corpus) -> Pairs:
    if not all(isinstance(sample, Preference) for sample in samples):
        raise DataError(
            f"{corpus.origins[0].schema.reasons}\ntask=dpo learns from pairs of a better and a "
            "worse answer.\nFix: name their columns (columns.chosen, columns.rejected), or leave "
            "task out (task=kto learns from answers called good or bad)."
        )
    return encode_pairs(encoder, samples)
