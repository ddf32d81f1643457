"""Taking an adapter's start out of the weights: `W := W - s B0 A0`, dense or packed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.addition import Addition
from deltaw.building import own
from deltaw.config import LoraConfig
from deltaw.errors import ConfigError, MergeError, raise_all
from deltaw.fitting import Fit, Fits
from deltaw.inits import at_zero, kind_of
from deltaw.kernels.merge import exactly, is_finite
from deltaw.layer import AdaptedLayer
from deltaw.offload import is_sharded
from deltaw.planning import base_modules, look
from deltaw.quant import kinds, storage_of
from deltaw.quantizing import FAST_PATH, misfits, packer_of
from deltaw.root import find_root
from deltaw.sharing import Shared, shared_memory
from deltaw.state import State

Places = Iterable[tuple[str, AdaptedLayer, Sequence[str]]]
"""Path, layer as if it were adapted, and slots with factors."""


def absorption_of(absorb: bool | str, source: LoraConfig | State) -> "Absorption | None":
    """Return how the start of an adapter goes into the weights; None where they stay.

    Raises:
        ConfigError: if there is no such way, nothing to absorb, or a start that needs packing.
    """
    if not isinstance(absorb, (bool, str)):
        raise ConfigError(f"absorb must be True, False or a kind of packing, got {absorb!r}.")
    if isinstance(absorb, str):
        packer_of(absorb)
    if isinstance(source, State):
        zero = not any(".start_" in name for at in source.layers.values() for name in at.tensors)
        what = "this state, which has no start"
    else:
        init = source.init_lora_weights
        zero, what = at_zero(init), f"init_lora_weights={init!r}, whose B0 A0 is zero"
        if kind_of(init) == "from_packed" and not isinstance(absorb, str):
            raise ConfigError(
                f"init_lora_weights={init!r} makes up for the rounding of packed weights, and "
                'absorb does not say what they are packed in.\nFix: absorb="nf4" or another kind '
                "of deltaw.quantize, on a model in full precision."
            )
    if absorb is False:
        return None
    if zero:
        raise ConfigError(
            f"absorb={absorb!r} has no effect with {what}.\n"
            "Fix: leave it out (deltaw.quantize packs weights as they are), or start from pissa, "
            "milora, olora, lora_ga or loftq."
        )
    return Absorption(absorb if isinstance(absorb, str) else "")


@dataclass(frozen=True)
class Absorption:
    """How W - s B0 A0 is stored: packed as `kind`, or without one as W was."""

    kind: str

    def rounded(self, dtype: torch.dtype, W: Tensor) -> Tensor:
        """Return (out, in) as it is once it is packed in a layer of that dtype, in float32."""
        if not self.kind:
            return W
        spare = nn.Linear(1, 1, bias=False, device="meta")
        spare.weight = nn.Parameter(W.to(dtype), requires_grad=False)
        self._store(spare, W)
        return kinds()[self.kind].read(spare)

    def require_possible(self, model: nn.Module, places: Places) -> None:
        """Raise a ConfigError listing all that keeps the weights of these layers from changing."""
        shared = shared_memory(model, model)
        modules = base_modules(model)
        root = find_root(model)
        problems = []
        if root is not None:
            names = ", ".join(root.authority.configs)
            problems.append(f"the model has adapters ({names}), which need its weights unchanged")
        for path, layer, slots in places:
            problems += [f"{path}: {why}" for why in _fixed(modules[path], layer, slots, shared)]
            if self.kind and slots:
                problems += [f"{path}: {why}" for why in self._unpackable(modules, path)]
        _raise(problems)

    def require_storable(
        self, model: nn.Module, layers: Mapping[str, nn.Module], fits: Fits
    ) -> None:
        """Raise a ConfigError as `require_possible`, or listing what W - s B0 A0 cannot be."""
        changed = self._changed(layers, fits)
        self.require_possible(model, [(p, m, [s.slot for s in f]) for p, m, f in changed])
        problems = []
        for path, layer, slots in self._changed(layers, fits):
            for holder in _holders(layer, [slot.slot for slot in slots]):
                try:
                    new = self._residual(layer, holder, slots)
                    if not is_finite(new):
                        problems.append(f"{path}.{holder} would hold NaN or Inf")
                    elif layer.storage is not None:
                        layer.storage.store(layer, new)
                except MergeError:
                    kind = type(layer.frozen(holder)).__name__
                    problems.append(f"{path}: a {kind} cannot be unpacked and packed again")
        _raise(problems)

    def apply(self, layers: Mapping[str, nn.Module], fits: Fits) -> None:
        """Take the starts out of the weights, one layer at a time."""
        for path, layer, slots in self._changed(layers, fits):
            for holder in _holders(layer, [slot.slot for slot in slots]):
                new = self._residual(layer, holder, slots)
                if layer.storage is None and not self.kind:
                    layer.frozen(holder).data = new
                else:
                    self._store(layers[path], new)

    def _changed(
        self, layers: Mapping[str, nn.Module], fits: Fits
    ) -> Iterator[tuple[str, AdaptedLayer, list[Fit]]]:
        """Yield the layers whose weights change: those with a start, and all that are packed."""
        for path, (geometry, fitted) in fits.items():
            slots = [slot for slot in fitted if slot.A is not None]
            if slots and (self.kind or any("start_A" in slot.extra for slot in slots)):
                yield path, look(layers[path], geometry), slots

    def _residual(self, layer: AdaptedLayer, holder: str, slots: Sequence[Fit]) -> Tensor:
        """Return W - s B0 A0, rounded once to W's dtype, or exact where it is to be packed."""
        W = layer.frozen(holder).detach() if layer.storage is None else layer.dense()
        wide = torch.promote_types(torch.float32, W.dtype)
        packs = self.kind or layer.storage is not None
        products, dense = [], []
        with exactly(W.device):
            for fit in slots:
                if "start_A" not in fit.extra or layer.holder(fit.slot) != holder:
                    continue
                A, B = (own(fit.extra[name], wide, W.device) for name in ("start_A", "start_B"))
                thin = layer.thin(A, B * -fit.scale, fit.slot)
                if thin is not None:
                    products.append(thin)
                else:
                    dense.append(layer.layout((B * -fit.scale) @ A, fit.slot))
            return Addition(products, dense, None).to(W, None if packs else W.dtype)

    def _store(self, module: nn.Module, W: Tensor) -> None:
        """Put W into a packed layer, or one that is to be packed."""
        if self.kind:
            assert isinstance(module, nn.Linear)
            kinds()[self.kind].pack(module, self.kind, double=True)
        storage = storage_of(module)
        assert storage is not None
        for name, tensor in storage.store(module, W).items():
            if isinstance(tensor, nn.Parameter):
                module._parameters[name] = tensor
            else:
                held = module._parameters.get(name, module._buffers.get(name))
                assert held is not None
                held.data = tensor

    def _unpackable(self, modules: Mapping[str, nn.Module], path: str) -> list[str]:
        module = modules[path]
        storage = storage_of(module)
        if storage is not None:
            return [
                f"its weight is packed already, as {type(storage).__name__}; load it in full "
                "precision, or use absorb=True"
            ]
        if type(module) is not nn.Linear:
            return [f"{self.kind} packs plain linear layers, and this is {type(module).__name__}"]
        if isinstance(modules.get(path.rpartition(".")[0]), FAST_PATH):
            return ["torch reads its weight past its forward, so it cannot be packed"]
        return misfits(module, self.kind)


def _fixed(
    module: nn.Module, layer: AdaptedLayer, slots: Sequence[str], shared: Shared
) -> Iterator[str]:
    """Yield the reasons why the weights of a layer cannot change."""
    for name in _holders(layer, slots):
        owner, inside = layer.owner(name)
        tensor = layer.frozen(name)
        others = shared.get((id(module if owner is layer else owner), inside))
        if tensor.is_meta:
            yield f"{name} is on the meta device; load the weights (remove offloading) first"
        elif is_sharded(tensor):
            yield f"{name} is sharded; attach before sharding"
        elif others:
            yield f"{name} is tied to {', '.join(others)}, which would change too"
    if slots and getattr(layer, "max_norm", None) is not None:
        yield "max_norm would renormalise the rows of the changed table"


def _holders(layer: AdaptedLayer, slots: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(layer.holder(slot) for slot in slots))


def _raise(problems: Sequence[str]) -> None:
    fix = "take such layers out with exclude_modules, choose another way, or leave absorb out."
    raise_all(ConfigError, "The start cannot be absorbed into the weights:", problems, fix)
