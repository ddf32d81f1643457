"""Which tensor of a PEFT file belongs to which module, told from names and shapes alone."""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from deltaw.config import LoraConfig
from deltaw.formats import _peft_tokens
from deltaw.formats._parts import B_BIAS, MAGNITUDE, TOKENS, TRAINED, A, B
from deltaw.formats._peft_attention import OUTPUT
from deltaw.state import LayerState

PREFIX = "base_model.model."
LINEAR = {
    A: "lora_A.weight",
    B: "lora_B.weight",
    B_BIAS: "lora_B.bias",
    MAGNITUDE: "lora_magnitude_vector",
}
EMBEDDING = {A: "lora_embedding_A", B: "lora_embedding_B", MAGNITUDE: "lora_magnitude_vector"}
SUFFIXES = {suffix: name for names in (LINEAR, EMBEDDING) for name, suffix in names.items()}
_FACTOR = re.compile(rf"(?P<path>.+)\.(?P<suffix>{'|'.join(map(re.escape, SUFFIXES))})", re.DOTALL)
_FEATURES = {
    "lora_diag": "KaSA",
}
_LORA = {suffix.partition(".")[0] for suffix in SUFFIXES}
_INSIDE = ".base_layer"
# With bias="all" PEFT also stores the biases inside its own wrappers, under these names.
_WRAPPERS = {"original_module", "modules_to_save"}


@dataclass
class Found:
    """What a file holds of one module: the kind of layer, and the key of each of its tensors."""

    kind: str = "module"
    keys: dict[str, str] = field(default_factory=dict)


def key(path: str, suffix: str) -> str:
    """Return the key of a tensor of the module at `path`, "" being the model itself."""
    return f"{PREFIX}{path}.{suffix}" if path else PREFIX + suffix


def layout(header: Mapping[str, Tensor], config: LoraConfig) -> tuple[dict[str, Found], list[str]]:
    """Return what the file holds of each module, and a list of all that is wrong with it."""
    found: dict[str, Found] = {}
    problems: list[str] = []
    rest: list[str] = []
    saved = frozenset(config.modules_to_save or ())
    for name in header:
        match = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if not name.startswith(PREFIX):
            problems.append(f"unexpected {name!r}: it does not start with {PREFIX!r}")
        elif match is None or _module(name) in saved:
            rest.append(name)
        else:
            place = found.setdefault(match["path"], Found())
            if place.kind == "module" or "embedding" in match["suffix"]:
                place.kind = "embedding" if "embedding" in match["suffix"] else "linear"
            place.keys[SUFFIXES[match["suffix"]]] = name
    for path in [p for p in found if not {A, B} <= found[p].keys.keys() and _within(p, saved)]:
        rest += found.pop(path).keys.values()
    ranks = {config.r, *config.rank_pattern.values()}
    for path, place in found.items():
        if A in place.keys and header[place.keys[A]].dim() > 2:
            place.kind = "conv"
        several = bool(config.target_parameters)
        problems += [f"{path!r}: {p}" for p in _pair_problems(place, header, ranks, several)]
        if config.use_dora != (MAGNITUDE in place.keys) and {A, B} <= place.keys.keys():
            text = "is missing" if config.use_dora else "is there, and use_dora is not set"
            problems.append(f"{path!r}: lora_magnitude_vector {text}")
        outer = f"{path}.".rpartition(f"{_INSIDE}.")[0]
        nested = path == outer + OUTPUT or (several and path.endswith(_INSIDE))
        if outer in found and not nested:
            problems.append(
                f"{path!r}: an adapter inside the adapted {outer!r} (stacked experts without "
                "target_parameters) is not supported"
            )
    problems += _copies(rest, found, config.bias, saved)
    for path, place in found.items():
        if TOKENS in place.keys:
            problems += _peft_tokens.problems(path, header[place.keys[TOKENS]], config)
    found = _nested(found) if config.target_parameters else found
    if not found and not problems:
        problems.append("it holds no tensor of an adapter")
    return found, problems


def _nested(found: Mapping[str, Found]) -> dict[str, Found]:
    """Return the wrappers of one module together, their factors numbered from the outermost on."""
    deep = {path.partition(_INSIDE)[0] for path in found if path.endswith(_INSIDE)}
    together: dict[str, Found] = {}
    for path, place in found.items():
        outer, *inner = path.split(_INSIDE)
        if outer in deep and not any(inner):
            numbered = {
                name if name.endswith(TRAINED) else f"{len(inner)}.{name.partition('.')[2]}": own
                for name, own in place.keys.items()
            }
            together.setdefault(outer, Found("experts")).keys.update(numbered)
        else:
            together[path] = place
    return together


def in_shape(place: Found, header: Mapping[str, Tensor]) -> LayerState:
    """Return a module's state with tensors of a header, which have shapes alone.

    A factor without the other is left out: `layout` has reported it.
    """
    tensors = {n: header[key] for n, key in place.keys.items() if _partner(n) in place.keys}
    if place.kind != "conv" or B not in tensors or not tensors[B].dim() > 1:
        return LayerState(place.kind, tensors)
    tensors[B] = tensors[B].flatten(1)
    groups = tensors[A].shape[0] // max(tensors[B].shape[1], 1)
    return LayerState("conv", tensors, groups=groups)


def _partner(name: str) -> str:
    """Return the name of the factor that goes with a factor; of any other tensor its own."""
    slot, _, tensor = name.rpartition(".")
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}.get(tensor, tensor)
    return f"{slot}.{other}"


def _module(name: str) -> str:
    return name.removeprefix(PREFIX).rpartition(".")[0]


def _within(path: str, saved: Collection[str]) -> bool:
    """Tell whether the module at `path` is one of those saved in full, or part of one.

    Such a module may be called `lora_A` itself.
    """
    parts = path.split(".")
    return any(".".join(parts[: n + 1]) in saved for n in range(len(parts)))


def _copies(
    names: Collection[str], found: dict[str, Found], bias: str, saved: Collection[str]
) -> list[str]:
    """Add the tensors trained as full copies to `found`, and return what is wrong with them."""
    adapted = set(found)
    problems, beside = [], []
    for name in names:
        path, _, parameter = name.removeprefix(PREFIX).rpartition(".")
        segments = name.split(".")
        feature = next((f for part, f in _FEATURES.items() if part in segments), None)
        if name.endswith(f".{_peft_tokens.SUFFIX}"):
            table = path.removesuffix(".token_adapter")
            found.setdefault(table, Found()).keys[TOKENS] = name
        elif feature:
            problems.append(f"{name!r}: {feature} is not supported")
        elif _LORA & set(segments) and not _within(path, saved):
            problems.append(f"unexpected {name!r}: no tensor of that name belongs to a LoRA layer")
        elif bias == "all" and _WRAPPERS & set(segments):
            continue
        elif path.removesuffix(_INSIDE) not in adapted:
            found.setdefault(path, Found()).keys[parameter + TRAINED] = name
        elif parameter == "weight":
            beside.append(name)
        else:
            found[path.removesuffix(_INSIDE)].keys[parameter + TRAINED] = name
    if beside:
        warnings.warn(
            f"{', '.join(map(repr, beside))} not read: the frozen weights that PEFT stores beside "
            "adapted embeddings. If the vocabulary was resized, the base needs them before the "
            "adapter is loaded.",
            stacklevel=6,
        )
    return problems


def _pair_problems(
    place: Found, header: Mapping[str, Tensor], ranks: Collection[int], several: bool
) -> list[str]:
    """Return what is wrong with the factors, which may be those of `several` experts each."""
    missing = [name for name in (A, B) if name not in place.keys]
    if missing:
        there = ", ".join(repr(name) for name in place.keys.values())
        return [f"{missing[0].removeprefix('weight.')} is missing beside {there}"]
    tensors = {name: header[key] for name, key in place.keys.items()}
    problems = [
        f"{place.keys[name]!r} holds {tensor.dtype}, not floating point numbers"
        for name, tensor in tensors.items()
        if not tensor.is_floating_point()
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not _fit(place.kind, shapes):
        text = ", ".join(f"{n.removeprefix('weight.')} {s}" for n, s in shapes.items())
        problems.append(f"shapes do not fit each other: {text}")
    elif not any(shapes[A][0] % r == 0 if several else shapes[A][0] == r for r in ranks):
        problems.append(
            f"rank {shapes[A][0]} by its shape, but the settings know only "
            f"{', '.join(map(str, sorted(ranks)))}"
        )
    return problems


def magnitude_shape(kind: str, b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that PEFT gives to DoRA's magnitude beside a B of shape `b`."""
    return (1, b[0], *[1] * (len(b) - 2)) if kind == "conv" else b[:1]


def _fit(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    a, b, bias = shapes[A], shapes[B], shapes.get(B_BIAS, shapes[B][:1])
    if not all(size > 0 for size in (*a, *b)) or len(a) != len(b) or bias != b[:1]:
        return False
    if shapes.get(MAGNITUDE, magnitude_shape(kind, b)) != magnitude_shape(kind, b):
        return False
    if kind == "conv":
        groups, left = divmod(a[0], b[1])
        return len(a) <= 5 and not left and b[0] % groups == 0 and set(b[2:]) == {1}
    return len(a) == 2 and a[0] == b[1]
