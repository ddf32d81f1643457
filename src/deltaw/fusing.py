"""The loss of a causal language model of transformers without its logits."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from deltaw.errors import StateError, TargetError
from deltaw.kernels import why_not
from deltaw.kernels.cross_entropy import IGNORED, linear_cross_entropy
from deltaw.layer import AdaptedLayer
from deltaw.swap import Swapped, swap, unswap

if TYPE_CHECKING:
    _Linear = nn.Linear
else:
    _Linear = object

WORTH = 16
"""From how many rows on a head waits for the loss; decoding is not held up."""
DESCRIBING = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}


class Logits(Tensor):
    """The output of a head, computed when anything but the loss asks for its values."""

    hidden: Tensor
    head: nn.Linear
    wide: bool
    modes: tuple[bool, torch.dtype | None]
    _known: Tensor | None

    @staticmethod
    def of(head: nn.Linear, hidden: Tensor, cast: torch.dtype | None) -> "Logits":
        """Return what stands for the logits of `hidden`, computed in autocast's `cast` if any."""
        return Logits._of(head, hidden, (torch.is_grad_enabled(), cast), False)

    @staticmethod
    def _of(
        head: nn.Linear, hidden: Tensor, modes: tuple[bool, torch.dtype | None], wide: bool
    ) -> "Logits":
        size = (*hidden.shape[:-1], head.out_features)
        dtype = torch.float32 if wide else modes[1] or hidden.dtype
        kept: Logits = Tensor._make_wrapper_subclass(
            Logits, size, dtype=dtype, device=hidden.device
        )
        kept.head, kept.hidden, kept.modes, kept.wide, kept._known = head, hidden, modes, wide, None
        return kept

    def values(self) -> Tensor:
        """Return the logits themselves, computed as the head would have done when it was called."""
        if self._known is None:
            graded, cast = self.modes
            device = self.hidden.device.type
            autocast = torch.autocast(device, cast, enabled=cast is not None)
            with torch.set_grad_enabled(graded), autocast:
                output: Tensor = type(self.head).origin.forward(self.head, self.hidden)  # type: ignore[attr-defined]
                self._known = output.float() if self.wide else output
        return self._known

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in DESCRIBING:
                return func(*args, **(kwargs or {}))
            if func is Tensor.float and args[0]._known is None:
                return cls._of(args[0].head, args[0].hidden, args[0].modes, True)
            args, kwargs = tree_map_only(cls, cls.values, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *others: Any) -> NoReturn:
        raise StateError(
            f"{func} reads logits that were left to the loss, past what would compute them.\n"
            "Fix: give it logits.clone(), or call remove() on what deltaw.fuse_loss returned."
        )


class WaitingHead(Swapped, _Linear):
    """Mixin of an output head that leaves its product to the loss."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits, or what stands for them where there are many rows."""
        weights = (self.weight, self.bias)
        trained = torch.is_grad_enabled() and any(
            w is not None and w.requires_grad for w in weights
        )
        rows = input.numel() // max(input.shape[-1], 1)
        if rows < WORTH or trained or input.is_meta or why_not(input, *weights):
            output: Tensor = type(self).origin.forward(self, input)
            return output
        autocast = torch.is_autocast_enabled(input.device.type)
        return Logits.of(
            self, input, torch.get_autocast_dtype(input.device.type) if autocast else None
        )


class ChunkedLoss:
    """transformers' loss of causal language models, from hidden states where the logits wait."""

    def __init__(self, plain: Callable[..., Tensor]) -> None:
        self.plain = plain

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """Return the mean loss of the labelled tokens, or their sum by `num_items_in_batch`."""
        if not isinstance(logits, Logits) or logits._known is not None:
            return self.plain(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **others
            )
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.hidden.device)
        targets = targets.masked_fill(targets == ignore_index, IGNORED)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        count = count.to(targets.device) if isinstance(count, Tensor) else count
        head, hidden = logits.head, logits.hidden
        rows = hidden.reshape(-1, hidden.shape[-1])
        return linear_cross_entropy(rows, head.weight, head.bias, targets, count)


class Fused:
    """What `fuse_loss` returns; `remove()` gives the model its own head and loss back."""

    def __init__(self, model: Any, head: nn.Module) -> None:
        self._model, self._head = model, head

    def remove(self) -> None:
        """Undo `fuse_loss`."""
        if isinstance(self._head, WaitingHead):
            unswap(self._head)
        if isinstance(self._model.loss_function, ChunkedLoss):
            self._model.loss_function = self._model.loss_function.plain


def fuse_loss(model: Any) -> Fused:
    """Compute the loss of a causal language model without its logits, from now on.

    `loss = Σ (log Σ_v exp z_v - z_label) / labelled tokens` with `z = W h`: unlabelled tokens are
    dropped before the output head, the rest goes through it chunk by chunk, and of the frozen head
    no gradient is made. Value and gradients are the model's own up to rounding. The logits of the
    output can still be read; they are computed then. Decoding, compiled models and heads that are
    trained work as before.

    Args:
        model: a causal language model of transformers.

    Raises:
        TargetError: if the model has no linear output head with transformers' causal loss, or the
            head is adapted.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    loss: Any = getattr(model, "loss_function", None)
    if isinstance(loss, ChunkedLoss):
        raise TargetError(f"The loss of this {type(model).__name__} is fused already.")
    if not isinstance(head, nn.Linear) or getattr(loss, "__name__", "") != "ForCausalLMLoss":
        raise TargetError(
            f"{type(model).__name__} has no linear output head with transformers' causal loss.\n"
            "Fix: give the causal language model itself, such as AutoModelForCausalLM loads."
        )
    if "forward" in vars(head):
        raise TargetError(
            "An instance-level `forward` hides the class of the output head.\n"
            "Fix: call fuse_loss before whatever replaced it, such as accelerate's hooks."
        )
    if isinstance(head, AdaptedLayer):
        raise TargetError(
            "The output head is adapted, and its adapter needs the logits.\n"
            "Fix: leave the head out of target_modules and modules_to_save."
        )
    swap(head, WaitingHead)
    model.loss_function = ChunkedLoss(loss)
    return Fused(model, head)
