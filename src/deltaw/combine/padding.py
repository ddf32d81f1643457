"""One rank and one alpha for all layers, for servers that read no patterns (vLLM)."""

from dataclasses import replace

from deltaw.combine._checks import check
from deltaw.combine._deltas import EXPERTS, copies, dtype_of, kernel, products
from deltaw.combine._layers import layer_of, padded, unfused
from deltaw.combine._settings import rank, settings
from deltaw.errors import MergeError, printable, raise_all
from deltaw.state import State


def portable(state: State) -> State:
    """Return the same adapter with alpha = r in all layers: scales go into B, zeros fill ranks up.

    Fused slices become one linear layer.

    Raises:
        MergeError: listing what such servers cannot read: parameters trained in full, a bias on B,
            grouped convolutions and loralib's, stacked experts.
    """
    check([state], None)
    problems = []
    for path, layer in state.layers.items():
        where = printable(path, 300)
        problems += [f"{where}: {name} is trained in full" for name in copies(layer)]
        problems += [f"{where}: {name}" for name in layer.tensors if name.endswith("lora_B_bias")]
        if layer.kind == EXPERTS:
            problems.append(f"{where}: stacked experts")
        if layer.groups > 1 or layer.factored:
            problems.append(f"{where}: a convolution that is grouped or factored")
    raise_all(
        MergeError,
        "Servers with one rank for all layers cannot read this adapter:",
        problems,
        "merge it into the model instead, or leave these out.",
    )
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
