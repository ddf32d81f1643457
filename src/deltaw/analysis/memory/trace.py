"""What a run on fake tensors would allocate and free, in order, and what for.

A fake tensor has a shape, a dtype and a device and no memory, so that the run itself, its autograd
and its kernels take their real course within seconds. Every storage that an operation returns is
noted when it is made and when nothing refers to it any more. Where the code asks for a value, the
answer is one or true, and every element is nonzero, which takes the most memory.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PARTS = (
    "weights",
    "adapters",
    "gradients",
    "optimiser",
    "activations",
    "logits",
    "temporaries",
)


@dataclass
class Block:
    """A piece of memory: its bytes, what for, and whether it lies in pages of its own.

    `untouched` counts bytes that were asked for beside these, and never written.
    """

    size: int
    part: str
    mapped: bool = False
    untouched: int = 0


@dataclass(frozen=True)
class Event:
    """A block is born or dies, in a phase of the run."""

    number: int
    born: bool
    phase: str


@dataclass(frozen=True)
class Record:
    """All blocks of a run, and the events in their order."""

    blocks: tuple[Block, ...]
    events: tuple[Event, ...]


class Trace(TorchDispatchMode):
    """A dispatch mode that notes blocks; enter it inside a `FakeTensorMode`.

    Args:
        wide: the size of the vocabulary, by which logits are told, or 0.
    """

    def __init__(self, wide: int = 0) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.events: list[Event] = []
        self.wide = wide
        self._phase, self._part = "load", "weights"
        self._free = False
        self._numbers: dict[int, int] = {}
        self._written: dict[int, set[object]] = {}

    @contextmanager
    def phase(self, name: str, part: str) -> Iterator[None]:
        """Note what follows as of this phase and, by default, of this part."""
        before = self._phase, self._part
        self._phase, self._part = name, part
        try:
            yield
        finally:
            self._phase, self._part = before

    @contextmanager
    def elsewhere(self, yes: bool = True) -> Iterator[None]:
        """Count storages that are made here as nothing; their bytes are part of other blocks."""
        self._free = yes
        try:
            yield
        finally:
            self._free = False

    def record(self) -> Record:
        """Return what was noted until now."""
        return Record(tuple(self.blocks), tuple(self.events))

    def allocate(self, size: int, part: str, *, mapped: bool = False) -> int:
        """Note a block that no operation returns; return its number."""
        self.blocks.append(Block(size, part, mapped))
        self.events.append(Event(len(self.blocks) - 1, True, self._phase))
        return len(self.blocks) - 1

    def free(self, number: int) -> None:
        """Note the end of a block."""
        self.events.append(Event(number, False, self._phase))

    def assign(self, tensor: Tensor, part: str) -> None:
        """Say what a tensor is for; nothing is said of one that was not noted."""
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self.blocks[number].part = part

    def alive(self) -> set[int]:
        """Return the numbers of the blocks that are in use now."""
        return set(self._numbers.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        answer = VALUES.get(func)
        out = func(*args, **(kwargs or {})) if answer is None else answer(*args)
        inside = INSIDE.get(str(func))
        if inside is not None:
            self.free(self.allocate(inside(*args), "temporaries"))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if func is torch.ops.aten.empty.memory_format:
            storage = out.untyped_storage()
            block = self.blocks[self._numbers[storage._cdata]]
            self._written[storage._cdata] = set()
            block.size, block.untouched = 0, block.size
        elif self._written and func._schema.is_mutable:
            self._write(func, args, kwargs or {})
        return out

    def _write(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Count what is written of tensors that were made empty: other pages are no memory."""
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | {**kwargs}
        for argument in func._schema.arguments:
            tensor = given.get(argument.name)
            if argument.is_write and isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                views = self._written.get(storage._cdata)
                view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
                if views is not None and view not in views:
                    views.add(view)
                    block = self.blocks[self._numbers[storage._cdata]]
                    more = min(tensor.nbytes, block.untouched)
                    block.size, block.untouched = block.size + more, block.untouched - more

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        logits = self._phase in ("forward", "backward") and tensor.ndim > 1
        part = "logits" if logits and self.wide and tensor.shape[-1] == self.wide else self._part
        size = 0 if self._free else storage.nbytes()
        self._numbers[key] = self.allocate(size, part)
        weakref.finalize(storage, self._end, key).atexit = False

    def _end(self, key: int) -> None:
        self._written.pop(key, None)
        self.free(self._numbers.pop(key))


def _one(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _everywhere(tensor: Tensor) -> Tensor:
    return torch.empty((tensor.numel(), tensor.ndim), dtype=torch.long, device=tensor.device)


VALUES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._local_scalar_dense.default: _one,
    torch.ops.aten.nonzero.default: _everywhere,
    torch.ops.aten.equal.default: lambda *_: True,
}
"""What is answered where a fake tensor has no values."""


INSIDE: dict[str, Callable[..., int]] = {
    "aten.linalg_qr.default": lambda matrix, *_: matrix.nbytes,
    "aten._linalg_svd.default": lambda matrix, *_: matrix.nbytes,
    "bitsandbytes.quantize_4bit.default": lambda W, *_: 8 * W.numel(),
    "bitsandbytes.gemm_4bit.default": lambda x, _, shape, *__: x.itemsize * math.prod(shape),
}
"""The bytes that an operation takes for itself: LAPACK overwrites a copy of the matrix, packing has
each number scaled in float32 and its code in int32, and a product unpacks the whole weight."""
