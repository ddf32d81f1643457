"""loralib's tensors as LayerStates, and back."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.config import LoraConfig
from deltaw.formats._files import not_finite
from deltaw.formats._parts import TRAINED, A, B, copies, factors, pinned, slices
from deltaw.patterns import pattern_values
from deltaw.state import LayerState, State

_A, _B = ".lora_A", ".lora_B"
# loralib keeps the layer that a convolution adapts in a child of this name.
_CONV = ".conv"


@dataclass(frozen=True)
class Reader:
    """What the file does not say: `lora_alpha`, the rank of convolutions, the adapted slices."""

    lora_alpha: float | None
    r: int | None
    enable_lora: Mapping[str, Sequence[bool]]

    def problems(self, header: Mapping[str, Tensor]) -> list[str]:
        """List what keeps tensors of these names and shapes from being an adapter."""
        flags = self._flags(header)
        if not flags:
            return [_no_pairs(header)]
        known = self.lora_alpha is not None
        problems = [] if known else ["it does not say lora_alpha, so pass lora_alpha="]
        for path, enabled in flags.items():
            pair = {side: header.get(path + side) for side in (_A, _B)}
            missing = [path + side for side, tensor in pair.items() if tensor is None]
            text = [f"{missing[0]!r} is missing"] if missing else self._pair(header, path, enabled)
            problems += text
        for name in _others(header):
            path, _, parameter = name.rpartition(".")
            if parameter == "weight" and _owner(path, flags) in flags:
                problems.append(f"{name!r} is a base weight; save lora_state_dict(model) alone")
        return problems

    def state(self, tensors: Mapping[str, Tensor]) -> State:
        """Return the adapter of tensors without problems."""
        flags = self._flags(tensors)
        layers = {
            path: self._layer(tensors[path + _A], tensors[path + _B], enabled)
            for path, enabled in flags.items()
        }
        for name in _others(tensors):
            path, _, parameter = name.rpartition(".")
            path = _owner(path, flags)
            layer = layers.get(path, LayerState("module", {}))
            own = {**layer.tensors, parameter + TRAINED: tensors[name]}
            layers[path] = replace(layer, tensors=own)
        return State(self._config(layers), dict(sorted(layers.items())))

    def _flags(self, names: Mapping[str, Tensor]) -> dict[str, Sequence[bool]]:
        """Return the adapted paths, each with its flags for a fused layer or none."""
        paths = sorted(
            {n.removesuffix(side) for side in (_A, _B) for n in names if n.endswith(side)}
        )
        none: Sequence[bool] = ()
        return dict(zip(paths, pattern_values(self.enable_lora, paths, none), strict=True))

    def _pair(self, header: Mapping[str, Tensor], path: str, enabled: Sequence[bool]) -> list[str]:
        a, b = header[path + _A], header[path + _B]
        misfit = f"{path!r}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit"
        if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape) or a.shape[0] % b.shape[1]:
            return [misfit]
        if not a.is_floating_point() or not b.is_floating_point():
            return [f"{path!r} holds {a.dtype} and {b.dtype}, not floating point numbers"]
        n = a.shape[0] // b.shape[1]
        if n > 1 and not enabled:
            leaf = path.rpartition(".")[2]
            return [
                f"{path!r} adapts {n} slices of a fused layer without saying which, so pass "
                f"enable_lora={{{leaf!r}: [...]}} with {n} True"
            ]
        if enabled and (sum(enabled) != n or b.shape[0] % n):
            return [f"{misfit} the slices {list(enabled)}"]
        rows = b.shape[1] if enabled else a.shape[0]
        if self.r and (rows % self.r or (enabled and rows != self.r)):
            return [f"{misfit} r={self.r}"]
        return []

    def _layer(self, a: Tensor, b: Tensor, enabled: Sequence[bool]) -> LayerState:
        alpha = self.lora_alpha or 1
        if not enabled:
            r = self.r or a.shape[0]
            factored = r != a.shape[0]
            kind = "conv" if factored else "linear"
            return LayerState(kind, {A: a, B: b}, alpha / r, factored=factored)
        on = [index for index, flag in enumerate(enabled) if flag]
        tensors = {}
        for index, own_a, own_b in zip(on, a.chunk(len(on)), b.chunk(len(on)), strict=True):
            tensors[f"slice_{index}.lora_A"] = own_a.clone()
            tensors[f"slice_{index}.lora_B"] = own_b.clone()
        return LayerState("fused", tensors, alpha / b.shape[1], tuple(enabled))

    def _config(self, layers: Mapping[str, LayerState]) -> LoraConfig:
        alpha = self.lora_alpha
        assert alpha is not None
        ranks = {path: round(alpha / at.scale) for path, at in layers.items() if factors(at)}
        r = Counter(ranks.values()).most_common(1)[0][0]
        saved = [p for p, at in layers.items() if p not in ranks and copies(at).keys() - {"bias"}]
        biased = {path in ranks for path, at in layers.items() if copies(at).keys() == {"bias"}}
        rules = {False: "all", True: "lora_only"}
        fused = {pinned(path): at.enabled for path, at in layers.items() if at.enabled}
        return LoraConfig(
            r=r,
            lora_alpha=alpha,
            target_modules=list(ranks),
            bias=rules[min(biased)] if biased else "none",
            modules_to_save=saved,
            rank_pattern={pinned(path): rank for path, rank in ranks.items() if rank != r},
            enable_lora=fused or None,
        )


def _others(names: Mapping[str, Tensor]) -> list[str]:
    """Return the names that are not of a factor."""
    return sorted(name for name in names if not name.endswith((_A, _B)))


def _owner(path: str, adapted: Mapping[str, object]) -> str:
    """Return the adapted convolution that holds the module at `path`, or `path`."""
    outer = path.removesuffix(_CONV)
    return outer if outer in adapted else path


def _no_pairs(names: Mapping[str, Tensor]) -> str:
    if any(name.endswith(".lora_a") for name in names):
        return "its names (lora_a, lora_b) are those of MLX's format, which is not read"
    if any(name.endswith(".lora_A.weight") for name in names):
        return "its names (lora_A.weight) are PEFT's: name the folder with its adapter_config.json"
    return "it has no tensor named lora_A"


def unwritable(state: State) -> list[str]:
    """List what loralib's format cannot hold."""
    problems = [] if any(map(factors, state.layers.values())) else ["it has no low-rank layer"]
    for path, layer in state.layers.items():
        problems += [f"{path!r}: {text}" for text in not_finite(layer.tensors)]
        if factors(layer):
            problems += [f"{path!r}: {text}" for text in _unwritable(layer, state.config)]
    return problems


def _unwritable(layer: LayerState, config: LoraConfig) -> list[str]:
    if any(name.endswith("lora_B_bias") for name in layer.tensors):
        return ["it has no bias on B"]
    if layer.kind in ("attention", "conv_transpose"):
        return [f"it has no layer of kind {layer.kind}"]
    if layer.kind == "conv" and not layer.factored:
        return ["its convolutions are factored otherwise, B A having the shape of the weight"]
    if layer.kind == "experts":
        return ["it has no adapters of parameters"]
    alpha = config.lora_alpha or 1
    slots = slices(layer) or ["weight"]
    widths = {layer.tensors[f"{slot}.lora_B"].shape[1] for slot in slots}
    width = widths.pop()
    if widths:
        return ["its slices have one rank"]
    side = max(round(layer.scale * width / alpha), 1) if layer.factored else 1
    if width % side or layer.scale != alpha / (width // side):
        return [f"it has no scale of its own, and {layer.scale} is not lora_alpha / r"]
    return []


def named(state: State) -> dict[str, Tensor]:
    """Return the tensors by their names in the file."""
    tensors = {}
    for path, layer in state.layers.items():
        if factors(layer):
            slots = slices(layer) or ["weight"]
            for side in (_A, _B):
                tensors[path + side] = torch.cat([layer.tensors[slot + side] for slot in slots])
        inner = path + _CONV if layer.factored else path
        for name, tensor in copies(layer).items():
            tensors[f"{inner}.{name}" if inner else name] = tensor
    return tensors
