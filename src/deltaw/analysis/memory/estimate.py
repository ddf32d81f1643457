"""The peak memory of a training run, from the configuration and the headers of the weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from deltaw.analysis.memory.depth import rehearse_deep
from deltaw.analysis.memory.fakes import empty, require_fit
from deltaw.analysis.memory.headers import Weights, read_headers
from deltaw.analysis.memory.machine import Machine
from deltaw.analysis.memory.peak import most, peak
from deltaw.analysis.memory.runs import Run, TrainerRun
from deltaw.analysis.memory.training import DTYPES, Training
from deltaw.errors import ConfigError

ABOUT = {
    "weights": "the model's own",
    "adapters": "trained beside frozen weights",
    "gradients": "of what is trained",
    "optimiser": "two moments of what is trained",
    "buckets": "of gradients that processes exchange",
    "activations": "kept for the backward pass",
    "logits": "and their gradients",
    "temporaries": "of the largest moment",
    "allocator": "holes in the heap",
    "runtime": "of torch, once",
}


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part at the moment when they are the most, above the imported process."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """The bytes of all parts."""
        return sum(self.parts.values())

    def fits(self, machine: Machine) -> bool:
        """Tell whether the machine has so much memory free."""
        return self.total <= machine.free

    def text(self, machine: Machine | None = None) -> str:
        """Return a table of the parts above a thousandth, and what the machine has."""
        large = {name: n for name, n in self.parts.items() if n * 1000 > self.total}
        rows = sorted(large.items(), key=lambda row: -row[1])
        lines = [f"{name:<12} {size(n):>8}  {ABOUT[name]}" for name, n in rows]
        total = f"{'in all':<12} {size(self.total):>8}"
        if machine is not None:
            verdict = "fits" if self.fits(machine) else "does not fit"
            where = f" ({machine.limited})" if machine.limited else ""
            total += f"  {verdict} into {size(machine.free)} free of {size(machine.total)}{where}"
        return "\n".join([*lines, total])


def estimate(model: str | os.PathLike[str] | nn.Module, training: Training) -> Estimate:
    """Return the peak memory of training on a CPU, above the process that has imported everything.

    Only `config.json` and the headers of safetensors files are read; nothing is downloaded but
    these. A step is rehearsed on tensors without memory, and what it allocates is put into a model
    of the heap. It stands for a long run on batches of this size, in which every weight is read.
    Weights that are mapped from their file count too, though the system could drop them.

    Args:
        model: a folder or a hub's name, or a model of transformers on the meta device.
        training: what is trained, and how.

    Raises:
        ConfigError: for a model that has memory already, or where a package is missing.
        RunError, FormatError: if configuration or headers cannot be read or contradict each other.
        TargetError: if the adapters fit nothing in the model.
    """
    if isinstance(model, nn.Module):
        return estimate_run(model, TrainerRun(training), None)
    name = os.fspath(model)
    weights = read_headers(name)
    dtype = weights.dtype if training.dtype is None else DTYPES[training.dtype]
    made = empty(name, training, dtype)
    return estimate_run(made, TrainerRun(training), weights)


def estimate_run(
    model: nn.Module, run: Run, weights: Weights | None, device: str = "cpu"
) -> Estimate:
    """Return the peak memory of any run of training a model, which is on the meta device.

    On a GPU the tensors are counted that there would be on a CPU, without any heap.

    Raises:
        ConfigError: for a model that has memory already.
        FormatError: if the weights have other shapes than the model's own.
    """
    _require_empty(model)
    if weights is not None:
        require_fit(model, weights)
    record = rehearse_deep(model, run, weights)
    if device != "cpu":
        return Estimate(most(record))
    return Estimate(peak(record) | {"runtime": run.runtime})


def _require_empty(model: nn.Module) -> None:
    full = [name for name, p in model.named_parameters() if not p.is_meta]
    if full:
        raise ConfigError(
            f"{len(full)} weights of this {type(model).__name__} have memory, as {full[0]} does.\n"
            "Fix: build it under torch.device('meta'), or give its folder."
        )


def size(number: int) -> str:
    """Return bytes in three digits: 352 MB, 1.53 GB."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= 0.9995 * factor:
            return f"{number / factor:#.3g}".rstrip(".") + f" {unit}"
    return f"{number} B"
