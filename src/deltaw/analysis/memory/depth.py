"""The record of a deep model, grown from those of a few of its layers.

Layers of one kind allocate and free alike, so that a record has the same events more for every
layer more. Where in it they lie is seen by comparing two depths; a third one must be what these
foretell, or the whole model is rehearsed.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from deltaw.analysis.memory.headers import Weights
from deltaw.analysis.memory.heap import SMALL
from deltaw.analysis.memory.rehearsal import load, rehearse
from deltaw.analysis.memory.runs import Run
from deltaw.analysis.memory.trace import Block, Event, Record

FEW = (3, 4, 5)
"""The depths that are rehearsed; the last one is foretold by the others."""
DEEP = 16
"""From how many layers on that takes less time than rehearsing all of them."""


class Kind(NamedTuple):
    """What blocks that cannot be told apart have in common."""

    phase: str
    size: int
    untouched: int
    part: str
    mapped: bool


class Step(NamedTuple):
    """An event without numbers.

    A block that dies is told by its `place` among those of its kind that are in use: 0 is the
    youngest, -1 the oldest.
    """

    phase: str
    born: bool
    kind: Kind
    place: int


def rehearse_deep(model: nn.Module, run: Run, weights: Weights | None) -> Record:
    """Return `rehearse`'s record of a model on the meta device, which stays as it is.

    Only a few layers are rehearsed where there are many of one kind.
    """
    path = stack_of(model)
    depth = 0 if path is None else len(model.get_submodule(path))  # type: ignore[arg-type]
    if path is not None and depth >= DEEP and _adapted_alike(model, path, run, weights):
        found = _foretold(model, path, depth, run, weights)
        if found is not None:
            return found
    return rehearse(copy.deepcopy(model), run, weights)


def stack_of(model: nn.Module) -> str | None:
    """Return the path of the longest list of layers that are alike, or None without any."""
    found = {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _alike(module)
    }
    return max(found, key=lambda path: found[path], default=None)


def _alike(layers: nn.ModuleList) -> bool:
    first, *others = map(_signature, layers)
    return all(other == first for other in others)


def _signature(layer: nn.Module) -> list[Any]:
    modules = [(name, type(module)) for name, module in layer.named_modules()]
    weights = [(n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()]
    return [*modules, *weights]


def _adapted_alike(model: nn.Module, path: str, run: Run, weights: Weights | None) -> bool:
    """Tell whether the run adapts every layer of a list in the same way."""
    whole = copy.deepcopy(model)
    load(whole, run, weights)
    layers: Any = whole.get_submodule(path)
    return _alike(layers)


def _foretold(
    model: nn.Module, path: str, depth: int, run: Run, weights: Weights | None
) -> Record | None:
    """Return the record that follows from those of few layers, or None if they are irregular."""
    try:
        records = [rehearse(_cut(model, path, size), copy.copy(run), weights) for size in FEW]
    except Exception:  # what is not due to the missing layers comes again when all are rehearsed
        return None
    least, less, few = map(steps, records)
    if grown(least, less, 1) != few:
        return None
    all_steps = grown(less, few, depth - FEW[-1])
    return None if all_steps is None else record_of(all_steps)


def _cut(model: nn.Module, path: str, size: int) -> nn.Module:
    short = copy.deepcopy(model)
    layers: Any = short.get_submodule(path)
    del layers[size:]
    return short


def steps(record: Record) -> list[Step]:
    """Return the events of a record without numbers, but for small blocks that are soon gone.

    Of these some depend on the depth, as the norms of all gradients do, which take no room.
    """
    found, kinds = list[Step](), dict[int, Kind]()
    alive: dict[Kind, list[int]] = defaultdict(list)
    for number, born, phase in ((e.number, e.born, e.phase) for e in record.events):
        block = record.blocks[number]
        if block.part == "temporaries" and block.size <= SMALL:
            continue
        if born:
            kind = Kind(phase, block.size, block.untouched, block.part, block.mapped)
            kinds[number], place = kind, 0
            alive[kind].append(number)
        else:
            kind = kinds[number]
            older = alive[kind].index(number)
            younger = len(alive[kind]) - 1 - older
            place = younger if younger <= older else -1 - older
            del alive[kind][older]
        found.append(Step(phase, born, kind, place))
    return found


def record_of(found: Sequence[Step]) -> Record | None:
    """Return the record that has these steps, or None if one of them frees what is not there."""
    blocks, events = list[Block](), list[Event]()
    alive: dict[Kind, list[int]] = defaultdict(list)
    for phase, born, kind, place in found:
        held = alive[kind]
        if born:
            number = len(blocks)
            blocks.append(Block(kind.size, kind.part, kind.mapped, kind.untouched))
            held.append(number)
        elif len(held) > (place if place >= 0 else -1 - place):
            number = held.pop(-1 - place)
        else:
            return None
        events.append(Event(number, born, phase))
    return Record(tuple(blocks), tuple(events))


def grown(few: Sequence[Step], more: Sequence[Step], times: int) -> list[Step] | None:
    """Return `more`, grown by so many `times` what it has beyond `few`; None if that is no growth.

    Blocks of a size that depends on the depth grow evenly too.
    """
    cut = [[(name, list(held)) for name, held in groupby(s, _phase)] for s in (few, more)]
    if [name for name, _ in cut[0]] != [name for name, _ in cut[1]]:
        return None
    found = list[Step]()
    for (_, short), (_, long) in zip(*cut, strict=True):
        part = _grown(short, long, times)
        if part is None:
            return None
        found += part
    return found


def _phase(step: Step) -> str:
    return step.phase


def _grown(few: list[Step], more: list[Step], times: int) -> list[Step] | None:
    """Return the same of one phase."""
    head = _common(few, more)
    tail = _common(few[head:][::-1], more[head:][::-1])
    short, long = few[head : len(few) - tail], more[head : len(more) - tail]
    found = more[:head]
    for name, a, b, c, d in SequenceMatcher(None, short, long, autojunk=False).get_opcodes():
        if name == "insert":
            found += _repeated(more[: head + c], long[c:d], more[head + d :], times)
            continue
        part = _resized(short[a:b], long[c:d], times)
        if part is None:
            return None
        found += part
    return found + more[len(more) - tail :]


def _repeated(before: list[Step], new: list[Step], after: list[Step], times: int) -> list[Step]:
    """Return `new` once and more: it repeats what is before it, or after it, or a part of each."""
    size = len(new)
    for cut in (size, *range(size)):
        if before[len(before) - cut :] == new[:cut] and after[: size - cut] == new[cut:]:
            return new[:cut] * (1 + times) + new[cut:] * (1 + times)
    return new * (1 + times)


def _resized(old: list[Step], new: list[Step], times: int) -> list[Step] | None:
    """Return `old` with its sizes grown, and what `new` has before or behind it once and more."""
    size, beyond = len(old), len(new) - len(old)
    if beyond < 0:
        return None
    if _sizeless(new[:size]) == _sizeless(old):
        return _sized(old, new[:size], times) + new[size:] * (1 + times)
    if _sizeless(new[beyond:]) == _sizeless(old):
        return new[:beyond] * (1 + times) + _sized(old, new[beyond:], times)
    return None


def _sizeless(found: list[Step]) -> list[Step]:
    return [step._replace(kind=step.kind._replace(size=0, untouched=0)) for step in found]


def _sized(old: list[Step], new: list[Step], times: int) -> list[Step]:
    found = []
    for less, step in zip(old, new, strict=True):
        size = step.kind.size + times * (step.kind.size - less.kind.size)
        untouched = step.kind.untouched + times * (step.kind.untouched - less.kind.untouched)
        found.append(step._replace(kind=step.kind._replace(size=size, untouched=untouched)))
    return found


def _common(some: list[Step], others: list[Step]) -> int:
    """Return how many steps are the same from the start."""
    size = 0
    for a, b in zip(some, others, strict=False):
        if a != b:
            break
        size += 1
    return size
