"""How the rate goes over a run: the schedules of transformers that go by the step alone."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from deltaw.errors import ConfigError
from deltaw.train.escape import printable

if TYPE_CHECKING:
    from deltaw.train.recipe import Recipe

BY_SCORE = ("reduce_lr_on_plateau", "greedy")
KWARGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_stable_steps",
        "num_decay_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
"""What each schedule reads of `scheduler_kwargs`, by the names of transformers."""
STABLE = 3
"""Of the steps behind the warm-up one in so many is at the full rate where nothing else is said."""


def _without_score(value: object) -> object:
    if value in BY_SCORE:
        raise ValueError("it goes by a score; here the rate goes by the step alone")
    return value


Schedule = Annotated[
    Literal[*KWARGS],  # type: ignore[valid-type]
    BeforeValidator(_without_score),
]


def unread(recipe: "Recipe", changed: set[str]) -> Iterator[str]:
    """Yield what the recipe's schedule does not read."""
    name, known = recipe.scheduler, KWARGS[recipe.scheduler]
    strange = [key for key in recipe.scheduler_kwargs if key not in known]
    if strange:
        yield (
            f"scheduler_kwargs={printable(repr(recipe.scheduler_kwargs))}: {name} reads "
            f"{', '.join(known) or 'none'}, and not {printable(', '.join(strange))}"
        )
    if name == "constant" and "warmup" in changed:
        yield (
            f"warmup={recipe.warmup:g} has no effect with scheduler=constant; leave it out, or did "
            "you mean scheduler=constant_with_warmup?"
        )


def settled(recipe: "Recipe", steps: int, warmup: int, rate: float) -> dict[str, Any]:
    """Return the settings of the recipe's schedule, once it was gone through from end to end.

    Raises:
        ConfigError: if transformers cannot make a schedule of them.
    """
    import torch  # late, for a recipe alone needs neither
    from transformers import get_scheduler

    try:
        settings = _settings(recipe, max(0, steps - warmup))
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
        schedule = get_scheduler(recipe.scheduler, optimizer, warmup, steps, settings)
        factors = {float(schedule.lr_lambdas[0](step)) for step in {0, warmup, steps // 2, steps}}
        wrong = [factor for factor in factors if not (math.isfinite(factor) and factor >= 0)]
        if wrong:
            raise ValueError(f"the rate would be multiplied by {wrong[0]}")
    except (ValueError, TypeError, ArithmeticError) as error:
        given = dict(recipe.scheduler_kwargs)
        raise ConfigError(
            f"scheduler={recipe.scheduler} with scheduler_kwargs={printable(repr(given), 200)} "
            f"cannot be followed: {printable(str(error), 200)}.\nFix: correct scheduler_kwargs; "
            f"{recipe.scheduler} reads {', '.join(KWARGS[recipe.scheduler]) or 'none'}."
        ) from error
    return settings


def _settings(recipe: "Recipe", left: int) -> dict[str, Any]:
    """Return `scheduler_kwargs` for `left` steps behind the warm-up, the stable ones left open."""
    found = dict(recipe.scheduler_kwargs)
    if recipe.scheduler != "warmup_stable_decay":
        return found
    stable = found.pop("num_stable_steps", None)
    decay = found.setdefault(
        "num_decay_steps", left - (left // STABLE if stable is None else stable)
    )
    if decay < 0 or decay > left or stable not in (None, left - decay):
        raise ValueError(f"num_stable_steps and num_decay_steps must be {left} together")
    return found


def named(schedule: str, settings: Mapping[str, Any]) -> str:
    """Return the name of a schedule with its settings."""
    told = ", ".join(f"{key}={printable(str(value))}" for key, value in settings.items())
    return f"{schedule} ({told})" if told else schedule
