"""Checking the state of an adapter against a model before anything is changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from deltaw import tables
from deltaw.errors import StateError, raise_all
from deltaw.geometry import WEIGHT
from deltaw.layer import AdaptedLayer
from deltaw.layers import geometry_of
from deltaw.layers.conv_factored import FactoredConv
from deltaw.layers.experts import Experts
from deltaw.layers.linear import slice_slot
from deltaw.layers.module import TrainedModule
from deltaw.offload import loaded_as_one
from deltaw.patterns import within
from deltaw.planning import look, refusals
from deltaw.quant import storage_of
from deltaw.select import nearest
from deltaw.stacks import parameters_of, told_apart
from deltaw.state import IDS, ROWS, LayerState, State, without_twin


@dataclass(frozen=True)
class Fit:
    """What one slot of one layer gets: factors (r, in) and (out, r), or a trained copy.

    Where `ids` are given the copy is that of these rows; it `follows` where another module has it.
    """

    slot: str
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
    trained: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    ids: Tensor | None = None
    follows: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under the names they have in the model."""
        named = {
            "lora_A": self.A,
            "lora_B": self.B,
            "lora_B_bias": self.bias,
            "trained" if self.ids is None else ROWS: self.trained,
            IDS: self.ids,
        }
        return {**self.extra, **{n: tensor for n, tensor in named.items() if tensor is not None}}


SUGGESTED = 20
"""For how many missing modules the nearest ones are looked up, each of which takes long."""
LORA = ("lora_A", "lora_B", "lora_B_bias", "trained")
Fits = dict[str, tuple[type[AdaptedLayer], list[Fit]]]


def fit(
    layers: Mapping[str, nn.Module], state: State, start: bool = True
) -> tuple[Fits, list[str]]:
    """Return the geometry and the contents of every layer of `state`, and all that misfits.

    Without `start` the factors of which one is subtracted are of twice the rank, which is all that
    an adapter needs that is not trained.
    """
    fits: Fits = {}
    problems: list[str] = []
    for path, told in state.layers.items():
        if path not in layers or not path:
            like = nearest(path, list(layers)) if len(problems) < SUGGESTED else ""
            problems.append(f"{shown(path)}: there is no such module{like}")
            continue
        module = layers[path]
        layer_state, misfits = told_apart(path, module, told, state.config)
        if misfits:
            problems += misfits
            continue
        found = _low_rank(layers, path, layer_state, problems, start)
        geometry, slots = found if found is not None else (TrainedModule, [])
        for name in _slots(layer_state, "trained"):
            trained = layer_state.tensors[f"{name}.trained"]
            own = module._parameters.get(name, module._buffers.get(name))
            if hasattr(nn.ModuleDict(), name):
                problems.append(f"{path}: a parameter called {name} cannot be trained in full")
            elif name in _slots(layer_state, "lora_A"):
                problems.append(f"{path}: its {name} is adapted and trained in full as well")
            elif own is None:
                problems.append(f"{path}: the module has no {name}")
            elif name == WEIGHT and storage_of(module):
                problems.append(f"{path}: its weight is packed and cannot be trained in full")
            elif own.shape != trained.shape:
                problems.append(_misfit(f"{path}.{name}", trained, tuple(own.shape)))
            else:
                slots.append(Fit(name, trained=trained))
        slots += _rows(path, module, layer_state, problems)
        fits[path] = (geometry, slots)
    _follow(layers, fits, problems)
    return fits, problems


def _rows(path: str, module: nn.Module, state: LayerState, problems: list[str]) -> list[Fit]:
    """Return the rows of tables that are trained."""
    found = []
    for name in _slots(state, ROWS):
        rows, ids = state.tensors[f"{name}.{ROWS}"], state.tensors[f"{name}.{IDS}"]
        reasons = tables.refusals(module, ids.tolist())
        if name in (*_slots(state, "lora_A"), *_slots(state, "trained")):
            reasons.append(f"its {name} is trained otherwise as well")
        problems += [f"{path}: {reason}" for reason in reasons]
        own = module._parameters.get(name)
        if own is None or reasons:
            continue
        if rows.shape == (len(ids), own.shape[1]):
            found.append(Fit(name, trained=rows, ids=ids))
        else:
            where = f"{path}.{name} of {len(ids)} tokens"
            problems.append(_misfit(where, rows, (len(ids), own.shape[1])))
    return found


def _follow(layers: Mapping[str, nn.Module], fits: Fits, problems: list[str]) -> None:
    """Give the rows of a table to every module that holds the same one."""
    for path, (_, slots) in list(fits.items()):
        for rows in [one for one in slots if one.ids is not None and not one.follows]:
            for other in tables.followers(layers, path, rows.slot):
                geometry, own = fits.setdefault(other, (TrainedModule, []))
                if any(one.slot == rows.slot for one in own):
                    problems.append(f"{other}: its {rows.slot} is that of {path}, and adapted too")
                fits[other] = (geometry, [*own, replace(rows, follows=True)])


def named(layers: Mapping[str, nn.Module], state: State) -> State:
    """Return the state of a file with factors of parameters by the names that the model has."""
    told = {p: told_apart(p, layers[p], own, state.config)[0] for p, own in state.layers.items()}
    return replace(state, layers=told)


def refuse_mixed(layers: Mapping[str, nn.Module], fits: Fits, leaving: str | None = None) -> None:
    """Raise where a layer with factors of one geometry would get factors of another.

    Those of the adapter `leaving` do not count.
    """
    problems = [
        f"{path}: {', '.join(staying)}"
        for path, (geometry, _) in fits.items()
        if isinstance(layer := layers[path], AdaptedLayer)
        and len({geometry, type(layer).mixin} - {TrainedModule}) > 1
        and (staying := [name for name in layer.adapter if name != leaving])
    ]
    raise_all(
        StateError,
        "The adapter's factors have another form than those of other adapters on the same layers, "
        "and the two cannot be mixed:",
        problems,
        "call deltaw.detach(model, name) for each of these first.",
    )


def refuse_loaded_as_one(model: nn.Module, fits: Fits) -> None:
    """Raise where accelerate loads a block's tensors by a list which lacks the adapter's."""
    raise_all(
        StateError,
        "accelerate loads each of these modules as a whole and would not find an adapter in it:",
        [
            shown(block) or type(model).__name__
            for block in loaded_as_one(model)
            if any(not block or within(path, [block]) for path in fits)
        ],
        "attach first and offload then, or offload without preload_module_classes.",
    )


def _low_rank(
    layers: Mapping[str, nn.Module],
    path: str,
    state: LayerState,
    problems: list[str],
    start: bool,
) -> tuple[type[AdaptedLayer], list[Fit]] | None:
    """Return the geometry and the factors of each slot, or None where there are none."""
    slots = _slots(state, "lora_A")
    if not slots:
        return None
    module = layers[path]
    stacked = state.kind == Experts.kind
    if stacked:
        own = parameters_of(module)
        reasons = [f"the module has no {slot}" for slot in slots if slot not in own]
        slots = [name for name in own if name in slots]
    else:
        reasons = refusals(layers, path, state)
    problems += [f"{path}: {reason}" for reason in reasons]
    if reasons:
        return None
    geometry = Experts if stacked else geometry_of(module, state)
    assert geometry is not None
    layer = look(module, geometry)
    fits = []
    for slot in slots:
        A, B = state.tensors[f"{slot}.lora_A"], state.tensors.get(f"{slot}.lora_B")
        if B is None:
            problems.append(f"{path}: {slot}.lora_B is missing")
            continue
        bias = state.tensors.get(f"{slot}.lora_B_bias")
        inner = slot
        if slot.startswith("slice_") and not stacked and "_of_" not in slot:
            inner = slice_slot(int(slot.removeprefix("slice_")), len(state.enabled))
        where = f"{path}.{slot}" if stacked else path
        shape_A, shape_B = layer.packed_shapes(inner, A.shape[-2 if stacked else 0])
        if A.shape != shape_A:
            problems.append(_misfit(f"{where} lora_A", A, shape_A))
        elif B.shape != shape_B:
            problems.append(_misfit(f"{where} lora_B", B, shape_B))
        elif bad := _twin_problems(state, slot):
            problems += [f"{path} {text}" for text in bad]
        elif bias is not None and bias.shape != (layer.shape(inner)[0],):
            problems.append(_misfit(f"{path} lora_B bias", bias, layer.shape(inner)[:1]))
        else:
            A, B = layer.unpack(A, B)
            scale = state.scale_of(slot) * scale_of(layer, state)
            extra = _extra(state, slot)
            if "start_A" in extra:
                A0, B0 = layer.unpack(extra.pop("start_A"), extra.pop("start_B"))
                if start:
                    extra |= {"start_A": A0, "start_B": B0}
                else:
                    A, B = without_twin(A, B, A0, B0)
            fits.append(Fit(inner, A, B, bias, extra=extra, scale=scale))
    return geometry, fits


def scale_of(layer: AdaptedLayer, state: LayerState) -> float:
    """Return k for factors of loralib's whose reader took their r k rows for the rank, else 1."""
    if isinstance(layer, FactoredConv) and not state.factored:
        return float(layer.kernel_size[0])
    return 1.0


def _extra(state: LayerState, slot: str) -> dict[str, Tensor]:
    """Return the tensors of a slot beside A, B and its bias, which a method brings."""
    own = {key.removeprefix(f"{slot}."): tensor for key, tensor in state.tensors.items()}
    return {n: t for n, t in own.items() if "." not in n and n not in LORA}


def _twin_problems(state: LayerState, slot: str) -> list[str]:
    """Return what is wrong with the start that is subtracted; it has the shapes of A and B."""
    pairs = {name: state.tensors.get(f"{slot}.start_{name}") for name in "AB"}
    if all(tensor is None for tensor in pairs.values()):
        return []
    return [
        f"start_{name} has not the shape of lora_{name}"
        for name, start in pairs.items()
        if start is None or start.shape != state.tensors[f"{slot}.lora_{name}"].shape
    ]


def _slots(state: LayerState, tensor: str) -> list[str]:
    return [key.removesuffix(f".{tensor}") for key in state.tensors if key.endswith(f".{tensor}")]


def shown(path: str) -> str:
    """Return a path from a file so that it is safe to print."""
    return path if path.isprintable() else repr(path)


def _misfit(what: str, tensor: Tensor, expected: tuple[int, ...]) -> str:
    return f"{what}: the file has {tuple(tensor.shape)}, the model needs {expected}"
