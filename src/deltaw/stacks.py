"""Parameters adapted on their own: which a config takes, and which are meant in a file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from deltaw.config import LoraConfig
from deltaw.errors import TargetError, raise_all
from deltaw.layers.experts import Experts
from deltaw.patterns import pattern_value, pattern_values, within
from deltaw.select import Selection, names_parameter
from deltaw.state import LayerState, with_scales
from deltaw.swap import seen_as


@dataclass(frozen=True)
class Stack:
    """One parameter: (out, in), or `count` such matrices along a leading axis."""

    path: str
    name: str
    shape: tuple[int, int]
    count: int
    r: int
    alpha: float
    scale: float


def parameters_of(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters, in its order."""
    return [name for name, P in module._parameters.items() if P is not None]


def stacks_of(
    modules: Mapping[str, nn.Module], selection: Selection, config: LoraConfig
) -> Iterator[Stack]:
    """Yield the parameters that `target_parameters` takes.

    Raises:
        TargetError: listing every one that cannot be adapted, and every setting that they have not.
    """
    chosen = selection.parameters
    problems = _setting_problems(config) if chosen else []
    problems += [f"{name}: {p}" for name in chosen for p in _problems(modules, name, selection)]
    raise_all(
        TargetError,
        "target_parameters cannot be used so:",
        problems,
        "name matrices and stacks of them, which are adapted by plain LoRA.",
    )
    assert config.lora_alpha is not None
    ranks = pattern_values(config.rank_pattern, chosen, config.r)
    alphas = pattern_values(config.alpha_pattern, chosen, config.lora_alpha)
    for full, r, alpha in zip(chosen, ranks, alphas, strict=True):
        path, _, name = full.rpartition(".")
        layer = seen_as(modules[path], Experts)
        count = layer.stacked(name)
        yield Stack(path, name, layer.shape(name), count, r, alpha, config.scale(r, alpha))


def _setting_problems(config: LoraConfig) -> list[str]:
    found = []
    if config.lora_dropout:
        found.append(f"lora_dropout={config.lora_dropout}: PEFT, whose format this is, has none")
    if config.lora_bias:
        found.append("lora_bias=True: a parameter has no output of its own")
    if config.method != "lora":
        found.append(f"method={config.method!r}: PEFT, whose format this is, has LoRA alone")
    return found


def _problems(modules: Mapping[str, nn.Module], full: str, selection: Selection) -> Iterator[str]:
    path, _, name = full.rpartition(".")
    P = modules[path]._parameters[name]
    assert P is not None
    if P.dim() not in (2, 3):
        yield f"it has {P.dim()} dimensions, not 2 or 3"
    if not P.is_floating_point():
        yield f"it holds {P.dtype}, not floating-point numbers"
    if path in selection.targets:
        yield "its module is adapted as a whole, by target_modules"
    if within(path, selection.heads):
        yield "it is trained in full, by modules_to_save"


def told_apart(
    path: str, module: nn.Module, layer: LayerState, config: LoraConfig
) -> tuple[LayerState, list[str]]:
    """Return the state of a module with the factors of a file by the names of its parameters.

    A file numbers the factors of several parameters from the last one of the module on, packs all
    experts in one A (E r, in) and one B (out, E r), the expert changing fastest in the columns of
    B, and counts on the settings and the model for the rest. What is told apart already, and what
    is no parameter's, comes back as it is; beside it is all that does not fit.
    """
    packed = [name.removesuffix(".lora_A") for name in layer.tensors if name.endswith(".lora_A")]
    wanted = config.target_parameters or ()
    names = [n for n in parameters_of(module) if names_parameter(f"{path}.{n}", wanted)]
    numbered = layer.kind == Experts.kind and all(slot.isdigit() for slot in packed)
    if not packed or not (numbered or (names and packed == ["weight"] and layer.kind == "linear")):
        return layer, []
    if len(names) != len(packed):
        return layer, [
            f"{path}: the file has factors of {len(packed)} parameters, and target_parameters "
            f"takes {', '.join(names) or 'none'}"
        ]
    tensors = {n: t for n, t in layer.tensors.items() if n.rpartition(".")[0] not in packed}
    scales, problems = {}, []
    for name, slot in zip(names, sorted(packed, key=_depth, reverse=True), strict=True):
        full = f"{path}.{name}"
        r = pattern_value(config.rank_pattern, full, config.r)
        alpha = pattern_value(config.alpha_pattern, full, config.lora_alpha or 1)
        count = seen_as(module, Experts).stacked(name)
        A, B = layer.tensors[f"{slot}.lora_A"], layer.tensors[f"{slot}.lora_B"]
        scales[name] = config.scale(r, alpha)
        if {A.shape[0], B.shape[-1]} == {r * max(count, 1)}:
            A, B = unpacked(A, B, count)
        else:
            problems.append(
                f"{full}: the file has rank {A.shape[0]} in all, the model needs {max(count, 1)} "
                f"x {r}"
            )
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    return with_scales(replace(layer, kind=Experts.kind, tensors=tensors), scales), problems


def unpacked(A: Tensor, B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return A (E, r, in) and B (E, out, r) of a file's A (E r, in) and B (out, E r)."""
    if not count:
        return A, B
    into, out = A.shape[1], B.shape[0]
    return A.reshape(count, -1, into), B.reshape(out, -1, count).permute(2, 0, 1).contiguous()


def _depth(slot: str) -> int:
    return int(slot) if slot.isdigit() else 0
