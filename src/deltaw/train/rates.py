"""What deltaw chooses where a recipe says nothing: learning rate, length of training, evaluations.

The full fine-tuning rate of a language model is 5e-5 (2000 / width)^p, with p = 0.0775 for Qwen and
0.781 for Llama (the rule of Thinking Machines' Tinker cookbook, 2025), which others take too. At
width 64 it gives 7.4e-4, and 7.4e-3 for LoRA; the best of the rates tried on stories260K were 1e-3
and, at r = 8, 1e-2. For other models it is 5e-5 at width 768, the upper end of BERT's own grid
(arXiv 1810.04805, appendix A.3), times (768 / width)². Adam's rate is inverse to the width (arXiv
2203.03466, table 3); the second factor stands for the depth, since narrow encoders are shallow too,
and agrees with what was measured on MiniLM. An adapter takes 10 times the rate of full fine-tuning,
15 times below 100 steps, whatever its rank (Thinking Machines, "LoRA Without Regret", 2025; the
higher rate also in arXiv 2405.09673).
A new head alone is a convex problem and takes 50 times the rate (measured). LoRA+ divides the rate
of A by the root of its ratio, so that the product of the rates of A and B stays.
"""

import math
from dataclasses import dataclass
from typing import Any

from deltaw.train import schedules
from deltaw.train.recipe import Recipe

FULL_RATE = 5e-5
FULL_WIDTH, NARROWEST = 768, 384
"""Of encoders; one that is narrower counts as this wide."""
LANGUAGE_WIDTH, QWEN, LLAMA = 2000, 0.0775, 0.781
"""Of language models, and the exponents of the width."""
SHORT = 100
PREFERENCES = 0.1
"""How much slower judgements are learnt than answers: arXiv 2305.18290, appendix B, and TRL."""
STEPS = 400
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20
EVALUATIONS, LONGEST_WAIT = 10, 500


@dataclass(frozen=True)
class Choice:
    """A number and where it comes from."""

    value: float
    origin: str


@dataclass(frozen=True)
class Shape:
    """How wide a model is, its `model_type`, and whether it is known as a causal model alone."""

    width: int
    family: str
    causal: bool


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast a run trains, and by what it is judged."""

    steps: int
    warmup: int
    every: int
    epochs: Choice
    rate: Choice
    usual_rate: float
    metric: str
    scheduler_kwargs: dict[str, Any]


def planned(recipe: Recipe, rows: int, shape: Shape, metric: str) -> TrainingPlan:
    """Return how long and how fast `rows` rows are trained on by a model of this shape.

    Raises:
        ConfigError: if the recipe's schedule cannot be followed.
    """
    total = steps(recipe, rows)
    rate, warmup = learning_rate(recipe, shape, total), warmup_steps(recipe, total)
    return TrainingPlan(
        steps=total,
        warmup=warmup,
        every=evaluate_every(recipe, rows, total),
        epochs=epochs(recipe, rows),
        rate=rate,
        usual_rate=learning_rate(
            recipe.model_copy(update={"learning_rate": None}), shape, total
        ).value,
        metric=metric,
        scheduler_kwargs=schedules.settled(recipe, total, warmup, rate.value),
    )


def epochs(recipe: Recipe, rows: int) -> Choice:
    """Return how often the rows are seen: about 400 steps, between 3 and 20 epochs."""
    if recipe.epochs is not None:
        whole = recipe.epochs * steps_per_epoch(recipe, rows)
        capped = recipe.max_steps is not None and recipe.max_steps < math.ceil(whole)
        return Choice(
            recipe.epochs,
            f"as asked, but ended by max_steps={recipe.max_steps}" if capped else "as asked",
        )
    if recipe.max_steps is not None:
        per_epoch = steps_per_epoch(recipe, rows)
        return Choice(math.ceil(recipe.max_steps / per_epoch), "what max_steps makes")
    wanted = round(STEPS / steps_per_epoch(recipe, rows))
    chosen = min(MOST_EPOCHS, max(FEWEST_EPOCHS, wanted))
    return Choice(chosen, f"default: about {STEPS} steps, {FEWEST_EPOCHS} to {MOST_EPOCHS} epochs")


def steps_per_epoch(recipe: Recipe, rows: int) -> int:
    """Return how many optimiser steps one pass over the rows takes."""
    return math.ceil(math.ceil(rows / recipe.batch_size) / recipe.gradient_accumulation)


def steps(recipe: Recipe, rows: int) -> int:
    """Return the number of optimiser steps of the whole run."""
    whole = math.ceil(epochs(recipe, rows).value * steps_per_epoch(recipe, rows))
    return min(whole, recipe.max_steps or whole)


def warmup_steps(recipe: Recipe, total: int) -> int:
    """Return the number of steps in which the rate rises to its peak."""
    if recipe.scheduler == "constant":
        return 0
    return round(recipe.warmup * total) if recipe.warmup < 1 else int(recipe.warmup)


def evaluate_every(recipe: Recipe, rows: int, total: int) -> int:
    """Return the steps between evaluations: ten in a run, at most 500 steps apart, or an epoch."""
    if recipe.eval_each_epoch:
        return steps_per_epoch(recipe, rows)
    return recipe.eval_every or max(1, min(LONGEST_WAIT, math.ceil(total / EVALUATIONS)))


def learning_rate(recipe: Recipe, shape: Shape, total: int) -> Choice:
    """Return the peak learning rate for a model of this shape."""
    if recipe.learning_rate is not None:
        return Choice(recipe.learning_rate, "as asked")
    full, rule, source = _full_rate(recipe, shape)
    if recipe.task in ("dpo", "kto"):
        full *= PREFERENCES
        rule = f"{PREFERENCES:g} x {rule}"
    if recipe.method in ("full", "freeze"):
        return Choice(_rounded(full), f"default: {rule}, {source}")
    if recipe.method == "head":
        return Choice(_rounded(50 * full), f"default for a head alone: 50 x {rule}")
    factor, why = (15, f"under {SHORT} steps") if total < SHORT else (10, "adapters")
    origin = f"default: {factor} x {rule}, {why}; LoRA Without Regret, 2025"
    if recipe.loraplus_lr_ratio is None:
        return Choice(_rounded(factor * full), origin)
    ratio = recipe.loraplus_lr_ratio
    return Choice(
        _rounded(factor * full / math.sqrt(ratio)), f"{origin}; / sqrt({ratio:g}) for LoRA+"
    )


def _full_rate(recipe: Recipe, shape: Shape) -> tuple[float, str, str]:
    """Return the rate of full fine-tuning, its formula, and where that is from."""
    if shape.causal or recipe.is_language:
        qwen, llama = "qwen" in shape.family, "llama" in shape.family
        power = QWEN if qwen else LLAMA
        rate = FULL_RATE * (LANGUAGE_WIDTH / shape.width) ** power
        rule = f"5e-5 x ({LANGUAGE_WIDTH}/{shape.width})^{power}"
        named = "" if qwen or llama else " as for Llama"
        return rate, rule + named, "Tinker cookbook, 2025"
    width = max(shape.width, NARROWEST)
    floor = f" (width {shape.width} counts as {NARROWEST})" if shape.width < NARROWEST else ""
    rate = FULL_RATE * (FULL_WIDTH / width) ** 2
    rule = f"5e-5 x ({FULL_WIDTH}/{width})²{floor}"
    return rate, rule, "arXiv 1810.04805 and 2203.03466"


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")
