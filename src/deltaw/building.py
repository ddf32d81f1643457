"""Making the modules of an adapter from what each slot gets."""

import functools

import torch
from torch import Tensor, nn

from deltaw.adapter import Adapter
from deltaw.adapters import Parts, builder_of
from deltaw.adapters._reserved import ReservedLora
from deltaw.adapters.replace import ReplaceAdapter
from deltaw.adapters.token_rows import TokenRowsAdapter
from deltaw.config import LoraConfig
from deltaw.fitting import Fit
from deltaw.layer import AdaptedLayer
from deltaw.offload import device_of
from deltaw.serving import Serving


class Builder:
    """Makes the modules of one adapter."""

    def __init__(
        self, config: LoraConfig, trainable: bool, fresh: bool, serving: Serving, absorbed: bool
    ) -> None:
        self._config = config
        self._serving = serving
        self._method = builder_of(config.method)
        self._trainable = trainable
        self._fresh = fresh
        self._absorbed = absorbed
        self._taken: set[int] = set()
        self._copies: dict[int, nn.Parameter] = {}

    def build(self, layer: AdaptedLayer, fit: Fit) -> Adapter:
        """Return the module of one slot, or of one parameter or buffer trained in full."""
        device = device_of(layer)
        if fit.trained is not None:
            copy = self._copy(layer.frozen(fit.slot), fit.trained, device)
            if fit.ids is None:
                return ReplaceAdapter(copy)
            return TokenRowsAdapter(copy, own(fit.ids, torch.int64, device), fit.follows)
        master = master_dtype(layer.frozen(layer.holder(fit.slot)))
        lean = self._serving.dtype or master
        assert fit.A is not None and fit.B is not None
        A, B = self._own(fit.A, lean, device), self._own(fit.B, lean, device)
        bias = None if fit.bias is None else self._own(fit.bias, master, device)
        extra = {name: self._own(tensor, master, device) for name, tensor in fit.extra.items()}
        matrix = functools.partial(layer.matrix, fit.slot)
        dropout = self._config.lora_dropout
        parts = Parts(A, B, fit.scale, dropout, bias, extra, matrix, self._absorbed)
        reserve = self._serving.reserve
        adapter = ReservedLora(parts, reserve) if reserve else self._method(parts)
        return adapter.requires_grad_(self._trainable)

    def _copy(self, frozen: Tensor, trained: Tensor, device: torch.device) -> Tensor:
        """Return the copy that stands in for `frozen`, one for all layers that share it."""
        if not isinstance(frozen, nn.Parameter):
            return own(trained, frozen.dtype, device)
        if id(frozen) not in self._copies:
            value = own(trained, master_dtype(frozen), device)
            self._copies[id(frozen)] = nn.Parameter(value, requires_grad=self._trainable)
        return self._copies[id(frozen)]

    def _own(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor itself where it is fresh, whole and not taken yet, else a copy."""
        memory = tensor.untyped_storage()
        whole = memory.nbytes() == tensor.nbytes and tensor.is_contiguous()
        free = whole and memory.data_ptr() not in self._taken and not tensor.is_inference()
        if not (self._fresh and free):
            return own(tensor, dtype, device)
        self._taken.add(memory.data_ptr())
        return _in_order(tensor.detach().to(device, dtype))


def own(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a contiguous copy that shares nothing with `tensor`."""
    return _in_order(tensor.detach().to(device=device, dtype=dtype, copy=True))


def _in_order(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor whose strides are those of one from a file, also of one row.

    A product's last bits depend on them.
    """
    return tensor.contiguous().view(-1).view(tensor.shape)


def master_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype an adapter is kept in: float32, or float64 for a float64 base."""
    return torch.promote_types(torch.float32, weight.dtype)
