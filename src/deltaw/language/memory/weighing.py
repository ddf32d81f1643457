"""What is said of a run's memory before its weights are read, and when it is refused."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import cuda, nn

from deltaw.analysis.memory.estimate import Estimate, size
from deltaw.analysis.memory.machine import Machine, available
from deltaw.errors import DeltawError, RunError, printable
from deltaw.language.memory import table
from deltaw.language.memory.fixes import fixes
from deltaw.language.memory.outlook import Outlook, device, text_outlook
from deltaw.train.console import Console
from deltaw.train.distributed.processes import count
from deltaw.train.distributed.shares import most
from deltaw.train.prepare import WeighTexts
from deltaw.train.recipe import Recipe

OVER = 1.15
"""The estimate's error: beyond so many times the machine's memory a run is refused."""

Weigh = Callable[[Console, Outlook], None]


def weigh(console: Console, outlook: Outlook) -> None:
    """Say what the run will take, roughly where that is surely enough.

    Raises:
        RunError: if the machine surely has too little memory, unless `allow_overcommit`.
    """
    machine = _machine(outlook)
    bound = outlook.ceiling()
    if bound <= machine.free:
        console.field("memory", f"below {size(bound)} by a rough bound, {_has(machine)}")
        return
    try:
        own = outlook.estimate()
    except DeltawError as error:
        _say_why_not(console, error)
        return
    console.field("memory", f"about {size(own.total)} at most, estimated, {_has(machine)}")
    _judge(console, outlook, own, machine)


def of_texts(say: Weigh) -> WeighTexts:
    """Return what says the same of labelled texts."""

    def said(
        console: Console,
        recipe: Recipe,
        model: nn.Module,
        trained: Sequence[int],
        scored: Sequence[int],
    ) -> None:
        say(console, text_outlook(recipe, model, trained, scored))

    return said


def compare(console: Console, outlook: Outlook) -> None:
    """Show what the recipe would take by full fine-tuning, LoRA, QLoRA, GaLore and as it is.

    Raises:
        RunError: if the machine surely has too little memory, unless `allow_overcommit`.
    """
    if count() == 1:  # as `deltaw train` will be started where there are several GPUs
        outlook = replace(outlook, processes=most(outlook.recipe, max(1, cuda.device_count())))
    machine = _machine(outlook)
    found, own = [], None
    for name, one, mine in table.variants(outlook):
        estimated = _attempt(one)
        found.append((name, estimated, mine))
        if mine and isinstance(estimated, Estimate):
            own = estimated
    errors = [estimated for _, estimated, _ in found if isinstance(estimated, DeltawError)]
    if len(errors) == len(found):
        _say_why_not(console, errors[0])
        return
    recipe = outlook.recipe
    batch = str(outlook.trained)
    with_it = ", gradient checkpointing" * recipe.gradient_checkpointing + ", bf16" * recipe.bf16
    title = f"estimated before loading; largest batch {batch}{with_it}:"
    verdict = "" if own is None else "fits: " if own.fits(machine) else "does not fit: "
    lines = [title, *table.lines(found), table.LEGEND, f"{verdict}{_has(machine)}"]
    console.field("memory", "\n".join(lines), whole=True)
    if own is not None:
        _judge(console, outlook, own, machine)


def _say_why_not(console: Console, error: DeltawError) -> None:
    console.field("memory", f"not estimated: {printable(str(error).splitlines()[0], 200)}")


def _attempt(outlook: Outlook) -> Estimate | DeltawError:
    try:
        return outlook.estimate()
    except DeltawError as error:
        return error


def _judge(console: Console, outlook: Outlook, own: Estimate, machine: Machine) -> None:
    """Warn of, or refuse, a run that is larger than what is free."""
    if own.fits(machine):
        return
    refused = own.total > OVER * (machine.total + machine.swap)
    text = f"memory estimate above the machine's: about {size(own.total)}, and {_has(machine)}"
    ways = [f"  - {way}" for way in fixes(outlook, machine.free)]
    if not refused or outlook.recipe.allow_overcommit:
        console.field("warning", "\n".join([f"{text}.", "Fix: one of", *ways]))
        return
    raise RunError(
        "\n".join(
            [
                f"{text[0].upper()}{text[1:]}, so it would be killed.",
                "Fix: one of",
                *ways,
                "  - allow_overcommit=true tries it all the same",
            ]
        )
    )


def _machine(outlook: Outlook) -> Machine:
    """Return the memory that one process has: a GPU of its own, or its part of the host's."""
    machine = available(device())
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", outlook.processes))
    if device() != "cpu" or beside == 1:
        return machine
    limited = f"{machine.limited}, " * bool(machine.limited) + f"for each of {beside} processes"
    parts = (part // beside for part in (machine.total, machine.free))
    return Machine(*parts, limited, machine.swap // beside)


def _has(machine: Machine) -> str:
    kind = "RAM" if device() == "cpu" else "GPU memory"
    limited = f" ({machine.limited})" if machine.limited else ""
    swap = f" and {size(machine.swap)} swap" if machine.swap else ""
    return f"{size(machine.free)} of {size(machine.total)} {kind}{limited} are free{swap}"
