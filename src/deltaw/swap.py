"""Changing what an object does by changing its class, and back again.

An adapted layer stays the model's own object: same parameters, same names, still an instance of
its class. Only `__class__` becomes a cached subclass `(mixin, original class)`, as PyTorch's own
`fully_shard` does. Such a class has no importable name, so pickling and `deepcopy` go through
`rebuild`.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

from deltaw.errors import TargetError


class Swapped:
    """Base of all mixins put in front of a module's own class."""

    origin: type[nn.Module]
    mixin: type["Swapped"]
    overridden: tuple[str, ...]

    @staticmethod
    def override(name: str) -> property:
        """Return the property that stands in for the attribute `name`."""
        raise AttributeError(name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        kind = type(self)
        return (rebuild, (kind.mixin, kind.origin, kind.overridden), *reduced[2:])


Kind = TypeVar("Kind", bound=Swapped)


_classes: dict[Any, type[nn.Module]] = {}
_hidden: dict[Any, tuple[set[str], set[str]]] = {}


def swapped_class(
    mixin: type[Swapped], origin: type[nn.Module], overridden: tuple[str, ...]
) -> type[nn.Module]:
    """Return the subclass `(mixin, origin)` whose attributes `overridden` are `mixin.override`."""
    key = (mixin, origin, overridden)
    if key not in _classes:
        _classes[key] = _make(mixin, origin, overridden)
    return _classes[key]


def _make(
    mixin: type[Swapped], origin: type[nn.Module], overridden: tuple[str, ...]
) -> type[nn.Module]:
    def new(kind: type[nn.Module], *args: Any, **options: Any) -> nn.Module:
        """Return an object of the class itself, as slices and copies by constructor ask for."""
        return origin(*args, **options)

    namespace: dict[str, Any] = {name: mixin.override(name) for name in overridden}
    namespace |= {
        "origin": origin,
        "mixin": mixin,
        "overridden": overridden,
        "__new__": new,
        "__module__": origin.__module__,
        "__qualname__": origin.__qualname__,
        "__doc__": origin.__doc__,
    }
    return type(origin.__name__, (mixin, origin), namespace)


def rebuild(
    mixin: type[Swapped], origin: type[nn.Module], overridden: tuple[str, ...]
) -> nn.Module:
    """Make an empty object of a swapped class, for `pickle` and `copy`."""
    return object.__new__(swapped_class(mixin, origin, overridden))


def origin_of(module: nn.Module) -> type[nn.Module]:
    """Return the module's own class, swapped or not."""
    return type(module).origin if isinstance(module, Swapped) else type(module)


def swap(module: nn.Module, mixin: type[Swapped], overridden: tuple[str, ...] = ()) -> None:
    """Change in place the class of `module` to `(mixin, its original class)`.

    A module that is swapped already keeps its original class and the attributes overridden before.
    """
    if isinstance(module, Swapped):
        overridden = tuple(sorted({*overridden, *type(module).overridden}))
    kind = swapped_class(mixin, origin_of(module), overridden)
    module.__class__ = kind


def seen_as(module: nn.Module, mixin: type[Kind]) -> Kind:
    """Return a second object with the contents of `module` and the class it would be swapped to.

    Its parameters are those of `module`; attributes set on it are its own.
    """
    probe = object.__new__(swapped_class(mixin, origin_of(module), ()))
    object.__setattr__(probe, "__dict__", dict(vars(module)))
    return cast(Kind, probe)


def unswap(module: nn.Module) -> None:
    """Change in place the class of `module` back to its original one."""
    if isinstance(module, Swapped):
        module.__class__ = type(module).origin  # type: ignore[assignment]


def refuse_hidden_names(module: nn.Module, mixin: type[Swapped], path: str) -> None:
    """Raise where an attribute of `module` bears a name that the mixin brings."""
    if isinstance(module, Swapped):
        return
    kind = type(module)
    key = (mixin, kind)
    if key not in _hidden:
        brought = set(dir(mixin)) | {"adapter", "authority", "originals"}
        _hidden[key] = brought - set(dir(nn.Module)), set(dir(kind))
    brought, own = _hidden[key]
    taken = brought & (own | vars(module).keys() | module._modules.keys())
    if taken:
        raise TargetError(
            f"{path}: {kind.__name__} has its own {', '.join(sorted(taken))}, "
            "which an adapter would hide.\nFix: rename that in the class, or leave the module out "
            'of target_modules and modules_to_save (bias="all" takes every module with a bias).'
        )


def clear_bound_forward(module: nn.Module, path: str) -> Callable[[], None]:
    """Return what must be called after a swap so that a hook's instance-level `forward` sees it.

    accelerate's hooks store `forward` on the instance and the original in `_old_forward`; removing
    them leaves a bound method behind. Anything else stored there would hide the adapter.
    """
    stored = vars(module).get("forward")
    if stored is None:
        return lambda: None
    if getattr(stored, "__func__", None) is type(module).forward:
        return lambda: vars(module).pop("forward", None)
    if "_hf_hook" in vars(module) and "_old_forward" in vars(module):
        return lambda: setattr(module, "_old_forward", type(module).forward.__get__(module))
    raise TargetError(
        f"{path}: an instance-level `forward` hides the layer's class, and with it the adapter. "
        "Fix: attach before whatever replaces `forward`, and detach once it is taken off."
    )
