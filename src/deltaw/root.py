"""The adapted model itself: its authority, and the calls on it that would lose the adapters."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from deltaw.adapter import refuse_cast
from deltaw.authority import Authority
from deltaw.encoders import Stepwise
from deltaw.errors import ConfigError, StateError, raise_all
from deltaw.formats import format_of
from deltaw.layer import AdaptedLayer
from deltaw.snapshot import state_of
from deltaw.swap import swap
from deltaw.walking import bare, unwrapped, walk

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

MERGED = "deltaw_merged"
"""The note in a checkpoint's metadata that adapters were merged when it was taken."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")


class AdaptedPart(Stepwise, _Module):
    """Mixin of the models of transformers inside the adapted one, which cannot save themselves."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: new embeddings would replace layers that hold adapters."""
        raise StateError(
            "Resizing the vocabulary replaces layers that hold adapters.\n"
            "Fix: detach, resize the base, then attach again."
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the file would mix the base with adapters."""
        raise StateError(
            f"{type(self).__name__} is part of an adapted model, and its file would be a mixture.\n"
            "Fix: save the model that was given to attach, or detach first."
        )


class AdaptedModel(AdaptedPart):
    """Mixin of the module that was given to `attach`, on which all verbs work."""

    authority: Authority

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_cast(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise StateError(
            "DataParallel copies the model at every step and would lose the adapters.\n"
            "Fix: use DistributedDataParallel or FSDP2."
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Save as usual, and note where adapters are merged."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.authority.merged is not None:
            metadata = getattr(destination, "_metadata", {})
            metadata.setdefault(prefix.removesuffix("."), {})[MERGED] = True

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        """Report what is missing of an adapter that the file holds in part."""
        if local_metadata.get(MERGED):
            raise StateError(
                "This checkpoint was taken while adapters were merged into its weights, so ΔW "
                "would count twice.\n"
                "Fix: take it after deltaw.unmerge(model), or load its weights into the base alone."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *others
        )
        layers, present = adapted_layers(self), set(map(bare, state_dict))
        for name in self.authority.configs:
            slots = {
                f"{bare(prefix)}{path}.adapter.{name}.{slot}.": part
                for path, layer in layers.items()
                for slot, part in layer.parts(name).items()
            }
            keys = {slot: [slot + key for key in part.state_dict()] for slot, part in slots.items()}
            absent = [s for s, names in keys.items() if not any(k in present for k in names)]
            if len(absent) < len(slots):
                missing_keys += [key for slot in absent for key in keys[slot]]

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
            for name in self.authority.configs:
                folder = Path(save_directory) / ("" if name == "default" else name)
                state = state_of(self, adapted_layers(self), self.authority, name)
                format_of("peft").write(state, folder)


def adapted_layers(root: AdaptedModel) -> dict[str, AdaptedLayer]:
    """Return path -> adapted layer; raise where a part was attached to on its own."""
    layers = {p: m for p, m in walk(root) if isinstance(m, AdaptedLayer)}
    strange = [path for path, layer in layers.items() if layer.authority is not root.authority]
    raise_all(
        StateError,
        "Parts of this model were attached to on their own:",
        strange,
        "detach them, then attach to the whole model.",
    )
    return layers


def find_root(model: nn.Module) -> AdaptedModel | None:
    """Return the adapted model in `model`, which may be wrapped in others; None without adapters.

    Raises:
        StateError: if `model` is only a part of the adapted one, or holds several.
    """
    if isinstance(model, AdaptedModel):
        return model
    roots = [m for _, m in walk(model) if isinstance(m, AdaptedModel)]
    if len(roots) == 1:
        return roots[0]
    if roots:
        raise StateError(
            f"{type(model).__name__} holds {len(roots)} models with adapters of their own.\n"
            "Fix: call this for each of them."
        )
    if any(isinstance(m, AdaptedLayer) for _, m in walk(model)):
        raise StateError(
            f"{type(model).__name__} is only a part of the model that adapters were attached to.\n"
            "Fix: call this on the module that was given to attach."
        )
    return None


def require_root(model: nn.Module) -> AdaptedModel:
    """Return the adapted model in `model`; raise where there are no adapters."""
    root = find_root(model)
    if root is None:
        raise StateError(f"{type(model).__name__} has no adapters. Fix: attach or load one first.")
    return root


def check_attachable(model: nn.Module, name: str) -> None:
    """Raise where no adapter of that name can be put on `model` now."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise StateError(
            f"Cannot attach to a {type(model).__name__}.\n"
            "Fix: attach to the model first, then wrap it (DistributedDataParallel or FSDP2; "
            "DataParallel copies the model at every step and is not supported)."
        )
    if unwrapped(model) is not model:
        raise StateError(
            "Cannot attach to a compiled or checkpointed model.\n"
            "Fix: attach to the model first, then wrap it."
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{name!r} cannot be an adapter's name.\nFix: use letters, digits, '_' and '-' only, "
            "and no name of an attribute of torch.nn.ModuleDict."
        )
    root = find_root(model)
    if root is not None and root is not model:
        raise StateError(
            f"A part of this {type(model).__name__} has adapters of its own.\n"
            "Fix: attach to that part again, or detach it first."
        )
    if root is not None:
        root.authority.require_changeable("attach")
        root.authority.require_base("attach another adapter")
        if name in root.authority.configs:
            raise StateError(
                f"There is an adapter {name!r} already.\n"
                f"Fix: choose another name, or deltaw.detach(model, {name!r}) first."
            )


def adopt(model: nn.Module, authority: Authority | None = None) -> AdaptedModel:
    """Make `model` the root of its adapters in place, and refuse to save any model inside it."""
    if isinstance(model, AdaptedModel):
        return model
    if "authority" in vars(model) or "authority" in model._modules:
        raise StateError(
            f"{type(model).__name__} has its own `authority`, which attaching would hide.\n"
            "Fix: rename it, or attach to a module that holds this one."
        )
    for module in model.modules():
        if "save_pretrained" in dir(type(module)) and module is not model:
            swap(module, AdaptedPart)
    swap(model, AdaptedModel)
    assert isinstance(model, AdaptedModel)
    model.authority = authority or Authority()
    return model
