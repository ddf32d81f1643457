"""States for the tests of file formats: drawn by hypothesis, and a few made by hand."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from deltaw.config import LoraConfig
from deltaw.state import LayerState, State

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Names that code working on substrings of keys would trip over.
SEGMENTS = (
    "lin",
    "0",
    "weight",
    "bias",
    "lora_x",
    "default",
    "q-proj",
    "base_layers",
    "été",
    "lora",
)
KINDS = ("linear", "conv1d", "embedding", "conv", "fused", "module")


def same_layers(a: State, b: State) -> bool:
    """Tell whether two states hold the same layers, bit for bit."""
    return a.layers.keys() == b.layers.keys() and all(
        same_layer(layer, b.layers[path]) for path, layer in a.layers.items()
    )


def same_layer(a: LayerState, b: LayerState) -> bool:
    return (
        (a.kind, a.scale, a.enabled, a.groups, a.factored)
        == (b.kind, b.scale, b.enabled, b.groups, b.factored)
        and a.tensors.keys() == b.tensors.keys()
        and all(
            tensor.dtype == b.tensors[name].dtype and torch.equal(tensor, b.tensors[name])
            for name, tensor in a.tensors.items()
        )
    )


def layer(
    kind: str,
    r: int = 3,
    *,
    scale: float = 1.5,
    groups: int = 1,
    spanning: bool = False,
    enabled: tuple[bool, ...] = (True, False, True),
    bias: bool = False,
    trained: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LayerState:
    """Return a layer with random numbers in odd shapes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {f"{name}.trained": draw(7) for name in trained}
    if kind == "module":
        return LayerState(kind, tensors)
    if kind == "fused":
        for index in (i for i, on in enumerate(enabled) if on):
            tensors[f"slice_{index}.lora_A"] = draw(r, 5)
            tensors[f"slice_{index}.lora_B"] = draw(4, r)
            if bias:
                tensors[f"slice_{index}.lora_B_bias"] = draw(4)
        return LayerState(kind, tensors, scale, enabled)
    shapes = ((r, 5), (7, r))
    if kind == "conv":
        width = 2 * groups if spanning else 2
        shapes = ((r * groups if spanning else r, width, 3, 1), (5 * groups, r))
    tensors["weight.lora_A"] = draw(*shapes[0])
    tensors["weight.lora_B"] = draw(*shapes[1])
    if bias:
        tensors["weight.lora_B_bias"] = draw(shapes[1][0])
    return LayerState(kind, tensors, scale, groups=groups)


@st.composite
def layers(draw: st.DrawFn, config: LoraConfig, kinds: tuple[str, ...] = KINDS) -> LayerState:
    kind = draw(st.sampled_from(kinds))
    r = draw(st.integers(1, 4))
    flags = st.lists(st.booleans(), min_size=1, max_size=4).map(tuple).filter(any)
    groups = draw(st.integers(1, 3)) if kind == "conv" else 1
    alpha = draw(st.one_of(st.integers(1, 64), st.floats(1e-3, 1e3)))
    named = ("bias",) if kind != "module" else ("weight", "bias", "running_mean")
    return layer(
        kind,
        r,
        scale=draw(st.sampled_from([config.scale(r, alpha), alpha])) if kind != "module" else 1.0,
        groups=groups,
        spanning=groups > 1 and draw(st.booleans()),
        enabled=draw(flags) if kind == "fused" else (),
        bias=kind not in ("module", "embedding") and draw(st.booleans()),
        trained=named if kind == "module" or draw(st.booleans()) else (),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**32)),
    )


@st.composite
def states(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> State:
    config = LoraConfig(
        r=draw(st.integers(1, 4)),
        lora_alpha=draw(st.integers(1, 64)),
        use_rslora=draw(st.booleans()),
        lora_dropout=draw(st.sampled_from([0.0, 0.1])),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        task_type=draw(st.sampled_from([None, "CAUSAL_LM"])),
        base_model_name_or_path=draw(st.sampled_from([None, "gpt2", "some-org/some.model"])),
    )
    path = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map(".".join)
    paths = draw(st.lists(path, min_size=1, max_size=4, unique=True))
    base = draw(st.sampled_from([None, "sha256:0123"]))
    return State(config, {path: draw(layers(config, kinds)) for path in paths}, base)
