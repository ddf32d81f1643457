"""Writing ΔW into the weights, and giving the originals back."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.addition import addition_of
from deltaw.authority import Active
from deltaw.copies import mixed
from deltaw.errors import MergeError, StateError, raise_all
from deltaw.fingerprint import bits
from deltaw.geometry import WEIGHT
from deltaw.heads import tell_untied
from deltaw.kernels.merge import exactly, is_finite
from deltaw.layer import AdaptedLayer
from deltaw.offload import device_of
from deltaw.originals import away, check_kept, keep, kept_by, restored
from deltaw.readable import Readable
from deltaw.root import adapted_layers, require_root
from deltaw.sharing import shared_memory
from deltaw.storage import Original
from deltaw.tables import changing_apart
from deltaw.touching import owner_of, refusals, touched
from deltaw.unpacking import (
    Unpacked,
    beside,
    forget_packing,
    pack_again,
    replace_packed,
    usual_dtype,
)

Done = dict[tuple[str, AdaptedLayer, str], Original]
"""The originals of what was written, by path, layer and name."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    `rounding` gives for each layer kept in half precision `‖W'_stored - W'‖ / ‖ΔW‖` over some of
    its rows, the share of the update lost to rounding; it is empty for float32.
    """

    layers: tuple[str, ...]
    rounding: dict[str, float]

    def __str__(self) -> str:
        text = f"merged {len(self.layers)} layers"
        if self.rounding:
            worst = max(self.rounding, key=lambda path: self.rounding[path])
            text += f"; rounding takes up to {self.rounding[worst]:.1%} of ΔW ({worst})"
        return text


@torch.inference_mode(False)
def merge(
    model: nn.Module,
    *,
    original: str = "keep",
    path: str | Path | None = None,
    untie: bool = False,
    requantize: bool = False,
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Write the active adapters into the weights: `W' = round(W + Σ weight ΔW)`.

    ΔW and the sum are computed in float32 (float64 for a float64 base) and rounded once to the
    weight's dtype. A packed weight is unpacked and stays so: its layer is a plain one until
    `unmerge`. Nothing is changed where anything is refused.

    Args:
        model: an adapted model with at least one active adapter.
        original: where the weights stay for `unmerge`: `"keep"` beside the merged ones, `"cpu"`,
            `"file"`, or `"none"`, which makes the merge final.
        path: for `"file"`: a safetensors file or folder that holds the originals, such as the
            base's own, or one to be written.
        untie: give a weight that is shared with another parameter, in whatever part of `model`,
            its own copy first; where the merge is final the model's config says so.
        requantize: pack the merged weights as those in place are, which rounds them again and may
            take most of a small ΔW; `deltaw.measure_merge` tells.
        dtype: what unpacked weights are written in, and their layers' biases with them, so that
            such a layer runs in a model of this dtype; None is what they were packed from or, where
            they do not tell (int8), the dtype of their bias, else of the model's first weight.

    Raises:
        ConfigError: if `requantize` meets `dtype`.
        MergeError: listing every weight that is tied, on meta, sharded, renormalised by `max_norm`,
            or whose ΔW holds NaN or Inf; or that cannot be packed again. If `requantize` or `dtype`
            is asked for and no merged layer is packed.
        StateError: if no adapter is active, or adapters are merged already.
    """
    root = require_root(model)
    authority = root.authority
    authority.require_changeable("merge")
    active = authority.current()
    layers = {
        p: m
        for p, m in adapted_layers(root).items()
        if any(name in m.adapter for name, _ in active)
    }
    if not layers:
        raise StateError("No adapter is active, so there is nothing to merge. Fix: activate one.")
    check_kept(original, path)
    shared = changing_apart(shared_memory(model, root), layers, active)
    problems = [p for path_, m in layers.items() for p in refusals(path_, m, active, shared, untie)]
    unpacked = Unpacked(requantize, dtype, usual_dtype(root))
    unpacked.require_effect(any(m.storage is not None for m in layers.values()))
    problems += unpacked.refusals(original, layers)
    raise_all(MergeError, "Cannot merge:", problems)
    rounding: dict[str, float] = {}
    written: set[object] = set()
    with _all_or_none(model) as done:
        for path_, layer in layers.items():
            found, lost = _merged(path_, layer, active, problems, unpacked)
            for name, new in found.items() if not problems else ():
                owner = owner_of(layer, name)
                place = owner if owner in shared else id(layer.frozen(name))
                if place in written:
                    continue
                written.add(place)
                _write(layer, name, new, owner in shared)
                kept = layer.originals[name] = away(original, layer.originals[name])
                done[path_, layer, name] = kept
            if lost is not None:
                rounding[path_] = lost
        raise_all(MergeError, "Cannot merge:", problems)
        keep(original, path, list(done))
    if original == "none":
        forget_packing(root)
        if untie:
            tell_untied(model)
    authority.merged = active
    return MergeReport(tuple(layers), rounding)


@torch.inference_mode(False)
def unmerge(model: nn.Module) -> None:
    """Give every weight its original bits back.

    Raises:
        StateError: if nothing is merged, or the originals were not kept.
        MergeError: listing every weight that was changed since the merge, and every file that no
            longer holds an original.
    """
    root = require_root(model)
    authority = root.authority
    if authority.merged is None:
        raise StateError("Nothing is merged.")
    merged = kept_by(adapted_layers(root))
    if not merged:
        raise StateError(
            'The merge was final (original="none"). Fix: load the base again; '
            "deltaw.detach(model) makes the merged model a plain one."
        )
    found, problems = restored(merged)
    raise_all(MergeError, "Cannot unmerge:", problems, "detach the model to keep it as it is.")
    for layer, name, tensor in found:
        _give_back(model, layer, name, tensor)
    authority.merged = None


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[MergeReport]:
    """Merge within a `with` block and unmerge after it."""
    report = merge(model)
    try:
        yield report
    finally:
        unmerge(model)


@contextlib.contextmanager
def _all_or_none(model: nn.Module) -> Iterator[Done]:
    """Give back every original that is noted within the `with` block if anything goes wrong."""
    done: Done = {}
    try:
        yield done
    except BaseException:
        for (_, layer, name), kept in done.items():
            layer.originals[name] = kept
            assert kept.tensor is not None
            _give_back(model, layer, name, kept.tensor.to(layer.frozen(name).device))
        raise


def _merged(
    path: str, layer: AdaptedLayer, active: Active, problems: list[str], unpacked: Unpacked
) -> tuple[dict[str, Tensor], float | None]:
    """Return the merged tensors of one layer, and the share of ΔW that rounding takes."""
    storage, lost = layer.storage, list[float]()
    try:
        with torch.no_grad(), exactly(device_of(layer)):
            new = {
                name: _with_copies(layer, name, active)
                for name in touched(layer, active)
                if storage is None or name != WEIGHT
            }
            merged = {}
            slots = [slot for slot, *_ in layer.contributors(active)]
            biases = {layer.holder(slot): layer.bias_name(slot) for slot in slots}
            for holder, bias in biases.items():
                addition = addition_of(layer, active, holder)
                W = new[holder] if storage is None else layer.dense()
                dtype = layer.frozen(holder).dtype if storage is None else unpacked.dtype_of(layer)
                merged[holder] = addition.to(W, dtype)
                share = None if dtype is None else addition.lost(W, merged[holder])
                lost += [] if share is None else [share]
                if addition.shift is not None and bias in new:
                    new[bias] = new[bias].to(addition.shift.dtype) + addition.shift
            unpacked_to = unpacked.dtype_of(layer) if storage and WEIGHT in merged else None
            if unpacked_to is not None:
                new = {**beside(layer, unpacked_to), **new}
            new = {n: t.to(unpacked_to or layer.frozen(n).dtype) for n, t in new.items()}
            new |= merged
            broken = [name for name, tensor in new.items() if not is_finite(tensor)]
            if storage is not None and WEIGHT in new and not broken:
                new |= unpacked.stored(layer, new[WEIGHT])
    except MergeError as problem:
        problems.append(f"{path}: {problem}")
        return {}, None
    problems += [f"{path}.{name} would hold NaN or Inf" for name in broken]
    return new, max(lost, default=None)


def _with_copies(layer: AdaptedLayer, name: str, active: Active) -> Tensor:
    P = mixed(layer.frozen(name), layer.copies(name, active))
    return P.dense() if isinstance(P, Readable) else P


def _write(layer: AdaptedLayer, name: str, new: Tensor, tied: bool) -> None:
    if layer.storage is not None and name == WEIGHT and isinstance(new, nn.Parameter):
        replace_packed(layer, new)
        return
    old = layer.frozen(name)
    new = new.contiguous()
    parameter = old if tied and isinstance(old, nn.Parameter) else None
    if name in layer._buffers or parameter is not None or new.data_ptr() == old.data_ptr():
        new = new.clone()
    layer.originals[name] = Original(old.data, bits(new), parameter)
    if name in layer._buffers:
        layer._buffers[name] = new
    elif parameter is not None:
        owner, own = layer.owner(name)
        owner._parameters[own] = nn.Parameter(new, requires_grad=False)
    else:
        old.data = new


def _give_back(model: nn.Module, layer: AdaptedLayer, name: str, tensor: Tensor | None) -> None:
    kept = layer.originals.pop(name)
    assert tensor is not None
    if kept.packed is not None:
        pack_again(layer, kept.packed)
    if kept.parameter is not None:
        _put_in_place_of(layer.frozen(name), kept.parameter, model)
    elif name in layer._buffers:
        layer._buffers[name] = tensor
    else:
        layer.frozen(name).data = tensor


def _put_in_place_of(merged: Tensor, original: nn.Parameter, model: nn.Module) -> None:
    """Give the original back to every module that holds the merged copy, tied to it since."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is merged:
                module._parameters[name] = original
