"""PEFT's calls that write adapters into the weights, which may follow each other in any order."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

import deltaw
from deltaw.authority import Active
from deltaw.root import AdaptedModel


class MergingModel(AdaptedModel):
    """Mixin of an adapted model that gives it PEFT's methods of merging."""

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = True,
        *,
        untie: bool = False,
    ) -> None:
        """Write the active adapters, or those named, into the weights until `unmerge_adapter`.

        Those that are merged stay so. `untie` gives a tied weight its own copy first.

        Raises:
            MergeError: listing every weight that is tied, or would hold NaN or Inf.
            StateError: if there is no such adapter.
        """
        merged = self.authority.merged
        both = _with_merged(self, adapter_names)
        if merged is not None and set(both) == set(merged):
            warnings.warn("All these adapters are merged already.", stacklevel=2)
            return
        with _unmerged(self):
            _merge(self, both, "keep", untie)

    def unmerge_adapter(self) -> None:
        """Give every weight its original bits back."""
        if self.authority.merged is None:
            warnings.warn("No adapter is merged.", stacklevel=2)
            return
        deltaw.unmerge(self)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        *,
        untie: bool = False,
    ) -> nn.Module:
        """Write the active adapters into the weights for good and return the plain model.

        Those that are merged stay so. NaN is refused whether or not `safe_merge` asks for it;
        `untie` gives a tied weight its own copy first.

        Raises:
            MergeError: listing every weight that is tied, or would hold NaN or Inf.
            StateError: if there is no such adapter.
        """
        both = _with_merged(self, adapter_names)
        with _unmerged(self):
            _merge(self, both, "none", untie)
        return self.unload()

    def unload(self) -> nn.Module:
        """Take all adapters off and return the plain model."""
        deltaw.detach(self)
        return self

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Give the base's own output within a `with` block, also where adapters are merged."""
        with _unmerged(self), deltaw.disabled(self):
            yield


def _with_merged(model: MergingModel, names: Sequence[str] | None) -> Active:
    """Return what is merged, and beside it the adapters named or active."""
    authority = model.authority
    more = authority.active if names is None else tuple((name, 1.0) for name in names)
    return tuple(dict((*more, *(authority.merged or ()))).items())


@contextmanager
def _unmerged(model: MergingModel) -> Iterator[None]:
    """Unmerge what is merged, and merge it again after the block unless that has merged."""
    merged = model.authority.merged
    if merged is not None:
        deltaw.unmerge(model)
    try:
        yield
    finally:
        if merged is not None and model.authority.merged is None:
            _merge(model, merged, "keep", untie=True)


def _merge(model: MergingModel, which: Active, original: str, untie: bool) -> None:
    """Merge these adapters, and leave active what was."""
    active = model.authority.active
    try:
        deltaw.activate(model, dict(which))
        deltaw.merge(model, original=original, untie=untie)
    finally:
        model.authority.activate(active)
