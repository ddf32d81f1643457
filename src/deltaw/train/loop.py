"""The training loop: `transformers.Trainer` with our order of rows, loss, rates and stops."""

import statistics
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from deltaw.train.batches import EpochSampler, padded_tokens
from deltaw.train.distributed import processes
from deltaw.train.distributed.shared import SharedTraining
from deltaw.train.distributed.shares import WEIGHT
from deltaw.train.interrupt import Interrupt
from deltaw.train.noise import noisy_embeddings
from deltaw.train.optimizer import galore_optimizer, optimizer_groups
from deltaw.train.order import order_of
from deltaw.train.rates import TrainingPlan
from deltaw.train.recipe import Recipe

LOGS = 100
"""Losses logged over a whole run, at most every step."""

_FIELDS = TrainingArguments.__dataclass_fields__
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in _NAMES if name in _FIELDS)
"""What this release of transformers calls it; the second name is the older one."""


class RecipeTrainer(SharedTraining):
    """A Trainer with the optimiser, the order of rows and the best state of a recipe."""

    recipe: Recipe
    longest_first = False

    def made_for(self, recipe: Recipe, interrupt: Interrupt, progress: TrainerCallback) -> None:
        """Follow this recipe: its stops, its progress and its optimiser."""
        self.recipe = recipe
        if processes.count() > 1:
            self.share()
        self.remove_callback(PrinterCallback)
        self.add_callback(Flow(interrupt, recipe.early_stopping))
        self.add_callback(progress)
        if recipe.watchdog:
            self.guard()
        self.create_optimizer()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimiser that the recipe asks for."""
        if self.optimizer is None:
            groups = optimizer_groups(self.model, self.recipe, self.args.learning_rate)
            if self.recipe.uses_galore:
                self.optimizer = galore_optimizer(groups, self.recipe, self.args)
            else:
                chosen, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = chosen(groups, **options)
            self.rates = tuple(group["lr"] for group in self.optimizer.param_groups)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass, on noisy embeddings if the recipe asks for them."""
        with noisy_embeddings(self.model, self.recipe.neftune_noise_alpha):
            return super().training_step(*args, **kwargs)

    def order(self) -> EpochSampler:
        """Return what orders the rows of every epoch."""
        return order_of(self.recipe, self._lengths(), longest_first=self.longest_first)

    def padded(self) -> list[int]:
        """Return how many tokens each batch of an epoch has, with its padding."""
        return padded_tokens(self.order())

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.order()

    def _lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self.train_dataset]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Tell whether this is the best state so far; of equal scores the lower loss is better."""
        best = self.state.best_global_step
        if best and metrics[f"eval_{self.args.metric_for_best_model}"] == self.state.best_metric:
            losses = {e["step"]: e["eval_loss"] for e in self.state.log_history if "eval_loss" in e}
            if metrics["eval_loss"] < losses[best]:
                self.state.best_global_step = self.state.global_step
                return True
        return bool(super()._determine_best_metric(metrics, trial))


class TextTrainer(RecipeTrainer):
    """A Trainer for sequence classification and regression."""

    loss_over = "items"

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        rows = sum(len(batch["labels"]) for batch in batch_samples if batch.get(WEIGHT, 1))
        return int(processes.summed(rows))


def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: int | None = None) -> torch.Tensor:
    """Return the mean cross-entropy, or squared error of real labels, over the whole step's rows.

    `num_items_in_batch` counts the rows of all micro-batches, so that accumulation equals one
    large batch.
    """
    logits = outputs["logits"].float()
    rows = num_items_in_batch or len(labels)
    if labels.is_floating_point():
        return nn.functional.mse_loss(logits.squeeze(-1), labels, reduction="sum") / rows
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / rows


class Pace(TrainerCallback):  # type: ignore[misc]
    """Times every step by itself, without evaluations and checkpoints between steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._began)

    @property
    def median(self) -> float | None:
        """The median time of a step in seconds, `None` before the first one."""
        return statistics.median(self.seconds) if self.seconds else None


class Flow(TrainerCallback):  # type: ignore[misc]
    """Ends the loop on a signal, or when the score has not risen for `patience` evaluations."""

    def __init__(self, interrupt: Interrupt, patience: int | None) -> None:
        self.interrupt = interrupt
        self.patience = patience

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop when a signal came to any of the processes."""
        self.interrupt.number = max(processes.gathered(self.interrupt.number or 0)) or None
        if self.interrupt.number is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop early after the checkpoint that makes it known."""
        if is_stale(state, self.patience, args.metric_for_best_model):
            control.should_training_stop = True


def is_stale(state: TrainerState, patience: int | None, metric: str | None) -> bool:
    """Tell whether `patience` evaluations in a row brought no better score; an equal one is none.

    The state that is kept may be a later one of the same score.
    """
    if patience is None or not state.best_global_step:
        return False
    name = f"eval_{metric}"
    scores = {entry["step"]: entry[name] for entry in state.log_history if name in entry}
    first = min(step for step, score in scores.items() if score == state.best_metric)
    return sum(step > first for step in scores) >= patience


def is_done(state: TrainerState, total: int, patience: int | None, metric: str | None) -> bool:
    """Tell whether a checkpoint of this state needs no further training."""
    return bool(state.global_step >= total) or is_stale(state, patience, metric)


Arguments = TypeVar("Arguments", bound=TrainingArguments)


def arguments(
    kind: type[Arguments], recipe: Recipe, folder: Path, plan: TrainingPlan, metric: str | None
) -> Arguments:
    """Return the Trainer's arguments; `metric` names the validation score, if there is one."""
    args = kind(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=max(32, recipe.batch_size),
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=plan.rate.value,
        lr_scheduler_type=recipe.scheduler,
        lr_scheduler_kwargs=plan.scheduler_kwargs,
        warmup_steps=plan.warmup,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1,
        adam_beta2=recipe.adam_beta2,
        adam_epsilon=recipe.adam_epsilon,
        max_grad_norm=0.0 if recipe.updates_in_backward else recipe.max_grad_norm,
        bf16=recipe.bf16,
        # else bf16 is refused on a CPU, and processes there do not find each other
        use_cpu=not torch.cuda.is_available() and (recipe.bf16 or processes.count() > 1),
        seed=recipe.seed,
        eval_strategy="steps" if metric else "no",
        eval_steps=plan.every,
        save_strategy="steps",
        save_steps=plan.every,
        save_total_limit=2,
        load_best_model_at_end=False,
        metric_for_best_model=metric,
        greater_is_better=metric != "loss",
        logging_steps=max(1, min(10, plan.steps // LOGS)),
        logging_nan_inf_filter=False,
        report_to=recipe.report_to,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        label_names=["labels"],
        log_level_replica="passive",
        **{CHECKPOINTING: recipe.gradient_checkpointing},
    )
    args._n_gpu = min(1, args.n_gpu)  # DataParallel would run adapters on copies of the model
    return args
