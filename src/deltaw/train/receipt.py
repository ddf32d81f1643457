"""The receipt: what will be trained, on what and how, before the first step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

import deltaw
from deltaw.train import schedules, yamlfile
from deltaw.train.advice import advice
from deltaw.train.console import Console
from deltaw.train.data.dataset import Data
from deltaw.train.data.examples import distribution
from deltaw.train.data.rows import Skip
from deltaw.train.data.wording import counted, size
from deltaw.train.escape import printable
from deltaw.train.methods import lora_config
from deltaw.train.model import size_on_disk
from deltaw.train.packing import packing
from deltaw.train.recipe import Recipe

if TYPE_CHECKING:
    from deltaw.train.job import Job

SHOWN_SKIPS = 5
SHOWN_LABELS = 20
LINE = 68


def show_data(console: Console, data: Data) -> None:
    """Say which rows are used, which are not and why, and how the labels are spread."""
    parts = [f"{len(data.train):,} training"]
    parts += [f"{len(part):,} {name}" for name, part in _held_out(data) if part]
    if data.spare:
        parts.append(f"{data.spare:,} beyond max_train_rows")
    used = len(data.train) + sum(len(part) for _, part in _held_out(data))
    rows = counted(used + data.spare + len(data.skipped), "row")
    lines = [f"{rows} read: {', '.join(parts)}, {len(data.skipped):,} skipped"]
    lines += [*skips(data.skipped), data.schema.reasons, *data.warnings]
    console.field("data", "\n".join(lines))
    for skip in data.skipped:
        console.record("skipped", file=skip.file, line=skip.line, reason=skip.reason)
    console.field("labels", _labels(data))


def skips(skipped: Sequence[Skip]) -> list[str]:
    """Return the first of what was left out, and how many more a run's log has."""
    lines = all_skips(skipped[:SHOWN_SKIPS])
    if len(skipped) > SHOWN_SKIPS:
        more = len(skipped) - SHOWN_SKIPS
        lines.append(f"skipped {more:,} more; a run lists all in its log.jsonl")
    return lines


def all_skips(skipped: Sequence[Skip]) -> list[str]:
    """Return all that was left out, for where no log is written."""
    return [f"skipped {skip}" for skip in skipped]


def show_job(console: Console, job: "Job", where: str, verified: str) -> None:
    """Say what is trained, for how long and how fast, with advice where a setting is unusual."""
    recipe, plan = job.recipe, job.plan
    job.show_rows(console)
    name = printable("/".join(recipe.model.rstrip("/").split("/")[-2:]))
    config = job.model.config
    console.field(
        "model",
        f"{name}: {type(job.model).__name__.removeprefix('Adapted')}, {config.model_type}, "
        f"{size(size_on_disk(job.model))} in {packing(recipe) or _dtypes(job.model)}",
    )
    summary = deltaw.summary(job.model)
    console.field("method", f"{recipe.method}: {job.adapted.said}")
    console.field(
        "trained",
        f"{summary.trainable:,} of {summary.total:,} parameters ({summary.percentage:.2f}%)",
    )
    console.field("verify", verified)
    per_step = recipe.batch_size * recipe.gradient_accumulation
    pace = f"evaluated every {plan.every}"
    if not job.validated:
        pace = f"saved every {plan.every}, not evaluated for want of validation rows"
    console.field(
        "steps",
        f"{plan.steps:,} of {counted(per_step, 'row')}, {pace}; "
        f"{plan.epochs.value:g} epoch{'s' * (plan.epochs.value != 1)} ({plan.epochs.origin})",
    )
    console.field(
        "rate",
        f"{plan.rate.value:g}, {schedules.named(recipe.scheduler, plan.scheduler_kwargs)} after "
        f"{counted(plan.warmup, 'warm-up step')}\n"
        f"({plan.rate.origin})",
    )
    unusual = advice(recipe, job.rows, plan.rate.value, plan.usual_rate, partial=_is_partial(job))
    for line in job.warnings:
        console.field("warning", line)
    for line in unusual:
        console.field("advice", line)
    job.foresee(console)
    console.field("folder", where)


def show_recipe(recipe: Recipe, console: Console) -> None:
    """Show a recipe that could be saved as a file, and what was chosen for it."""
    values = recipe.model_dump(exclude={"record", "trust_remote_code"}, exclude_none=True)
    console.line()
    console.line(yamlfile.write(values, "The recipe.").rstrip())
    assert recipe.record is not None
    if chosen := recipe.record["chosen"]:
        lines = yamlfile.write(chosen, "Chosen for it; a line without its # is fixed:")
        console.line(lines.rstrip().replace("\n", "\n# "))


def _dtypes(model: nn.Module) -> str:
    """Return what numbers the model's frozen weights are, or all where all are trained."""
    every = [p for p in model.parameters() if p.is_floating_point()]
    frozen = [p for p in every if not p.requires_grad] or every
    return " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in frozen}))


def _is_partial(job: "Job") -> bool:
    """Tell whether the recipe names some of the linear layers and leaves others out."""
    if job.recipe.method != "lora" or job.recipe.target_modules == "all-linear":
        return False
    config = lora_config(job.recipe)
    every = deltaw.plan(job.model, replace(config, target_modules="all-linear"))
    named = {target.path for target in deltaw.plan(job.model, config).targets}
    return bool(named) and named < {target.path for target in every.targets}


def _held_out(data: Data) -> list[tuple[str, tuple[object, ...]]]:
    return [("validation", data.validation), ("test", data.test)]


def _labels(data: Data) -> str:
    if not data.labels:
        values = [float(e.label) for e in data.train if e.label is not None]
        return f"real numbers from {min(values):g} to {max(values):g}"
    counts = sorted(distribution(data.train, data.labels).items(), key=lambda pair: -pair[1])
    shown = [f"{printable(label, 40)} {count}" for label, count in counts[:SHOWN_LABELS]]
    more = f", and {len(counts) - SHOWN_LABELS} more" if len(counts) > SHOWN_LABELS else ""
    lines = [f"{len(counts)} classes: "]
    for part in shown:
        if len(lines[-1]) + len(part) > LINE:
            lines.append("")
        lines[-1] += part + ", "
    return "\n".join(line.rstrip() for line in lines).rstrip(",") + more
