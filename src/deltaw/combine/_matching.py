"""Which tensor of one checkpoint is which of another, and which layer each belongs to."""

import re
from collections.abc import Mapping, Sequence

from deltaw.combine._checkpoint import Checkpoint, shown
from deltaw.combine._places import ATTENTION, WEIGHT, Place, Slot, attention_slots
from deltaw.errors import ConfigError, FormatError, printable, raise_all
from deltaw.patterns import ends_with, full_matches

LINEAR = ("linear", "conv1d", ATTENTION)
_EMBEDDING = re.compile(r"emb(?!ed_out)|wte|wpe|shared$", re.IGNORECASE)


def names_in_both(base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """Return tuned name -> base name, where one model may lie inside the other (`bert.`)."""
    inside = {f"{name.partition('.')[0]}." for name in tuned.shapes}
    around = {f"{name.partition('.')[0]}." for name in base.shapes}
    found = [{name: name for name in tuned.shapes}]
    found += [{name: name.removeprefix(p) for name in tuned.shapes} for p in sorted(inside)]
    found += [{name: p + name for name in tuned.shapes} for p in sorted(around)]
    pairs = [{t: b for t, b in names.items() if b in base.shapes} for names in found]
    return max(pairs, key=len)


def check_match(
    base: Checkpoint, tuned: Checkpoint, pairs: Mapping[str, str], left_out: Sequence[str]
) -> None:
    """Raise a FormatError that lists what the tuned checkpoint lacks or holds in another shape."""
    paired = set(pairs.values())
    problems = [
        f"{printable(name, 300)} is missing in the tuned one"
        for name in sorted(base.shapes.keys() - paired)
        if not _is_named(name, left_out)
    ]
    problems += [
        f"{printable(name, 300)} is {base.shapes[pairs[name]]} in the base and "
        f"{tuned.shapes[name]} in the tuned one"
        for name in sorted(pairs)
        if base.shapes[pairs[name]] != tuned.shapes[name] and not _is_named(name, left_out)
    ]
    if not pairs:
        more = [f"{printable(name, 300)} is only in the tuned one" for name in sorted(tuned.shapes)]
        problems += more
    raise_all(
        FormatError,
        f"{shown(tuned.path)} is no fine-tune of {shown(base.path)}:",
        problems,
        "give the base that the model was tuned from; or name in `exclude` the parts that the "
        "tuned model has given up or replaced.",
    )


def guessed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return the layers that names and shapes tell of; stacks of experts are not among them.

    Raises:
        FormatError: where a bias says that a weight lies as in GPT-2's Conv1D, since square ones
            cannot be told apart then.
    """
    places, turned = _attentions(shapes), []
    inside = {f"{path}.out_proj" for path in places}
    for name, shape in shapes.items():
        path, _, last = name.rpartition(".")
        if last != WEIGHT or not path or path in inside or not 2 <= len(shape) <= 5:
            continue
        bias = shapes.get(f"{path}.bias", shape[:1])
        if bias != shape[:1] and (len(shape) > 2 or bias == shape[1:]):
            turned.append(f"{printable(name, 300)} {shape} beside a bias {bias}")
        embeds = _EMBEDDING.search(path.rpartition(".")[2]) and f"{path}.bias" not in shapes
        kind = "conv" if len(shape) > 2 else "embedding" if embeds else "linear"
        places[path] = Place(kind, {WEIGHT: Slot((name,))})
    raise_all(
        FormatError,
        "Weights that lie as (in, out) need to be told apart from those of linear layers:",
        turned,
        "pass places=deltaw.analysis.places.places(model) with the empty model.",
    )
    return places


def _attentions(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """Return each `nn.MultiheadAttention`: what has an `out_proj` beside weights of its inputs."""
    found = {}
    for name in shapes:
        path, _, own = name.rpartition(".")
        if own in ("in_proj_weight", "q_proj_weight") and f"{path}.out_proj.weight" in shapes:
            found[path] = Place(ATTENTION, attention_slots(path, own == "in_proj_weight"))
    return found


def chosen(
    places: Mapping[str, Place], targets: str | Sequence[str] | None, left_out: Sequence[str]
) -> dict[str, Place]:
    """Return the layers that are targets.

    Raises:
        ConfigError: listing the names that match nothing.
    """
    paths = [path for path in places if not _is_named(path, left_out)]
    if targets == "all-linear":
        paths = [path for path in paths if places[path].kind in LINEAR]
    elif isinstance(targets, str):
        hits = full_matches(targets, paths)
        paths = [path for path, hit in zip(paths, hits, strict=True) if hit]
    elif targets is not None:
        raise_all(
            ConfigError,
            "These targets are no layer of the checkpoint:",
            [repr(name) for name in targets if not any(ends_with(path, name) for path in paths)],
            f"use names such as {', '.join(sorted(paths)[:3])}.",
        )
        paths = [path for path in paths if any(ends_with(path, name) for name in targets)]
    if not paths:
        raise ConfigError("No layer is a target. Fix: give other targets.")
    return {path: places[path] for path in paths}


def _is_named(path: str, names: Sequence[str]) -> bool:
    """Tell whether `path`, or a module that it lies in, is or ends in one of the names."""
    parts = path.split(".")
    above = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(ends_with(each, name) for each in above for name in names)
