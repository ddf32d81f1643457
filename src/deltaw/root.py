"""The adapted model itself: its authority, and the calls on it that would lose the adapters."""

from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from deltaw.adapter import refuse_cast
from deltaw.authority import Authority
from deltaw.errors import StateError
from deltaw.layer import AdaptedLayer
from deltaw.saving import save_all
from deltaw.swap import Swapped, swap

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class AdaptedModel(Swapped, _Module):
    """Mixin of the module that was given to `attach`."""

    authority: Authority

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_cast(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise StateError(
            "DataParallel copies the model at every step and would lose the adapters.\n"
            "Fix: use DistributedDataParallel or FSDP2."
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: new embeddings would replace layers that hold adapters."""
        raise StateError(
            "Resizing the vocabulary replaces layers that hold adapters.\n"
            "Fix: detach, resize the base, then attach again."
        )

    def save_pretrained(
        self,
        save_directory: str,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Write the adapters as PEFT does: `default` into the folder, others into sub-folders.

        `options` are those of transformers that shape a full checkpoint; they do not apply here,
        except that `push_to_hub` is refused.
        """
        if options.get("push_to_hub"):
            raise StateError("push_to_hub is not supported. Fix: save, then upload the folder.")
        if is_main_process:
            save_all(self, save_directory)


def find_authority(model: nn.Module) -> Authority | None:
    """Return the authority of an adapted model, or None."""
    if isinstance(model, AdaptedModel):
        return model.authority
    found = (m.authority for m in model.modules() if isinstance(m, (AdaptedLayer, AdaptedModel)))
    return next(found, None)


def require_authority(model: nn.Module) -> Authority:
    """Return the authority of an adapted model; raise where it has no adapters."""
    authority = find_authority(model)
    if authority is None:
        raise StateError(f"{type(model).__name__} has no adapters. Fix: attach or load one first.")
    return authority


def authority_of(model: nn.Module) -> Authority:
    """Return the authority of `model`, making it the root of a new one if it has none."""
    authority = find_authority(model) or Authority()
    if not isinstance(model, AdaptedModel):
        swap(model, AdaptedModel)
    assert isinstance(model, AdaptedModel)
    model.authority = authority
    return authority
