"""Parameters adapted on their own: which a config takes, and which are meant in a file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from deltaw.config import LoraConfig
from deltaw.errors import TargetError, raise_all
from deltaw.formats import _peft_experts
from deltaw.layers.experts import Experts
from deltaw.patterns import pattern_values, within
from deltaw.select import Selection, names_parameter
from deltaw.state import LayerState
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

    A file of PEFT's counts on the settings and the model for their names and their experts. What is
    told apart already, and what is no parameter's, comes back as it is; beside it is all that does
    not fit.
    """
    wanted = config.target_parameters or ()
    names = [n for n in parameters_of(module) if names_parameter(f"{path}.{n}", wanted)]
    if not _peft_experts.is_packed(layer) or (layer.kind == "linear" and not names):
        return layer, []
    counts = {name: seen_as(module, Experts).stacked(name) for name in names}
    return _peft_experts.told_apart(path, layer, counts, config)
