"""Reading an adapter from disk onto a model."""

from pathlib import Path

import torch
from torch import nn

from deltaw.absorbing import absorption_of
from deltaw.attaching import attach_state
from deltaw.errors import ConfigError, FormatError, StateError, printable
from deltaw.fingerprint import adapted_weights, fingerprint
from deltaw.fitting import fit, named
from deltaw.formats import format_of, sniff
from deltaw.hotswap import swap_in
from deltaw.planning import base_modules
from deltaw.root import check_attachable, find_root
from deltaw.serving import USUAL, Serving
from deltaw.state import State


def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    swap: bool = False,
    check_base: bool = True,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    reserve: int | None = None,
    absorb: bool | str = False,
) -> None:
    """Put the adapter at `path` on `model`.

    The layers are those of the file's tensors. The first adapter of a model becomes active.

    Args:
        model: the base, or a model that has other adapters already.
        path: a folder or file in any format of `deltaw/formats`.
        name: what to call it.
        trainable: whether its parameters have `requires_grad`.
        swap: replace the adapter `name` that is there; it stays active or not as it was.
        check_base: compare the base's bits with those the adapter was trained on, where the file
            says so and the dtype is the same.
        format: a file of `deltaw/formats`; None finds out.
        dtype: what to keep A and B in if they are not trained; None is float32, or float64 for a
            base in float64. In half precision they take half the memory.
        reserve: the highest rank that may come by `swap`. An adapter of another rank or alpha, or
            of fewer layers, then comes in place, and a compiled model is not compiled again.
            Leave it and `dtype` out with `swap` to keep what is there.
        absorb: as in `attach`, for an adapter whose start was absorbed into the same base.

    Raises:
        ConfigError: if `absorb` has no effect or meets `swap`, `reserve` or `dtype`; listing every
            weight that it cannot change.
        FormatError: listing every tensor that does not fit, or if the base is another one.
        StateError: if the name is taken and `swap` is False, or the adapters are merged; listing
            what a reserve has no room for.
    """
    path = Path(path)
    root = find_root(model)
    exists = root is not None and name in root.authority.configs
    if swap and not exists:
        raise StateError(f"There is no adapter {name!r} to swap. Fix: load without swap.")
    if root is not None and swap:
        root.authority.require_changeable("swap an adapter")
        root.authority.require_base("swap an adapter")
        model = root
    if not swap:
        check_attachable(model, name)
    layers = base_modules(model)
    reader = format_of(format) if format else sniff(path)
    state = named(layers, reader.read(path, lambda shapes: fit(layers, shapes)[1]))
    if check_base:
        _check_base(model, state, path)
    serving = Serving(dtype, reserve)
    absorption = absorption_of(absorb, state)
    if absorption is not None and (swap or serving != USUAL):
        raise ConfigError(
            f"absorb={absorb!r} changes the weights for this one adapter, in full precision.\n"
            "Fix: leave out swap, reserve and dtype, or absorb."
        )
    if swap:
        swap_in(model, layers, state, name, trainable, serving)
    else:
        attach_state(
            model, state, name, trainable, fresh=True, serving=serving, absorption=absorption
        )


def _check_base(model: nn.Module, state: State, path: Path) -> None:
    if state.base is None:
        return
    ours = fingerprint(model, adapted_weights(state.layers))
    same_dtype = ours is not None and ours.split(":")[0] == state.base.split(":")[0]
    if same_dtype and ours != state.base:
        raise FormatError(
            f"The adapter {printable(str(path), 300)} was trained on a base of the same shapes but "
            "other weights.\n"
            "Fix: load that base, or pass check_base=False if you know that this one will do."
        )
