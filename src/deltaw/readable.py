"""What a module gets that reads its own weight, where adapters have a part in it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Readable(ABC):
    """A frozen tensor W and what adapters change in it, for the products that know how to use it.

    It looks like W, and stands in wherever a function of torch takes it. A kind overrides
    `__torch_function__` for the products it computes from parts; whatever else is done with it gets
    the dense tensor.
    """

    def __init__(self, W: Tensor) -> None:
        self.W = W

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the whole tensor, in the dtype of W."""

    @abstractmethod
    def parts(self) -> Sequence[Tensor]:
        """Return the tensors of the adapters."""

    @property
    def shape(self) -> torch.Size:
        """Return the shape of W."""
        return self.W.shape

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of W."""
        return self.W.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of W."""
        return self.W.device

    @property
    def requires_grad(self) -> bool:
        """Tell whether W or what changes it is trained."""
        return any(tensor.requires_grad for tensor in (self.W, *self.parts()))

    def __len__(self) -> int:
        return len(self.W)

    def __getitem__(self, key: Any) -> Any:
        return self.dense()[key]

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map(_dense, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, Readable) else value
