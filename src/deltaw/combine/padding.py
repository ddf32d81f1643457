"""One rank and one alpha for all layers, for servers that read no patterns (vLLM)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from deltaw.combine._checks import check
from deltaw.combine._deltas import EXPERTS, copies, dtype_of, kernel, products
from deltaw.combine._layers import layer_of, padded, unfused
from deltaw.combine._places import ATTENTION
from deltaw.combine._settings import rank, settings
from deltaw.combine.bases import is_dora
from deltaw.errors import MergeError, printable, raise_all
from deltaw.state import State


def check_portable(states: Sequence[State]) -> None:
    """Raise a MergeError that lists what keeps a sum of these adapters from being portable."""
    raise_all(
        MergeError,
        "Servers with one rank for all layers cannot read this adapter:",
        list(dict.fromkeys(problem for state in states for problem in _unreadable(state))),
        "merge it into the model instead, or leave these out; `deltaw extract` makes a LoRA near "
        "to a DoRA from its base and the merged model.",
    )


def _unreadable(state: State) -> Iterator[str]:
    """Yield what such servers cannot read."""
    if is_dora(state):
        yield "it is a DoRA, whose ΔW rescales the rows of W as well, and that is no B A"
    for path, layer in state.layers.items():
        where = printable(path, 300)
        yield from (f"{where}: {name} is trained in full" for name in copies(layer))
        yield from (f"{where}: {name}" for name in layer.tensors if name.endswith("lora_B_bias"))
        if layer.kind == EXPERTS:
            yield f"{where}: stacked experts"
        if layer.kind == ATTENTION:
            yield f"{where}: projections of an nn.MultiheadAttention"
        if layer.groups > 1 or layer.factored:
            yield f"{where}: a convolution that is grouped or factored"


def portable(state: State) -> State:
    """Return the same adapter with alpha = r in all layers: scales go into B, zeros fill ranks up.

    Fused slices become one linear layer.

    Raises:
        MergeError: listing what such servers cannot read: parameters trained in full, a bias on B,
            grouped convolutions and loralib's, attention, stacked experts, and DoRA.
    """
    check_portable([state])
    check([state], None)
    plain = {path: unfused(layer) for path, layer in state.layers.items()}
    most = max(map(rank, plain.values()))
    layers = {
        path: layer_of(
            layer,
            kernel(layer),
            {key: padded(part, most) for key, part in products(layer).items()},
            {},
            dtype_of(layer),
        )
        for path, layer in plain.items()
    }
    return replace(state, config=settings(state.config, layers), layers=layers)
