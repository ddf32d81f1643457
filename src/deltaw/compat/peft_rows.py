"""PEFT's `adapter_names`: one adapter for each row of a batch, in `model(...)` and `generate`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import deltaw
from deltaw.root import AdaptedModel

BASE = "__base__"
"""What PEFT calls a row without an adapter."""


class MixedBatchModel(AdaptedModel):
    """Mixin of an adapted model that takes the adapter of each row with its inputs.

    It also trains, where PEFT refuses: every row's loss trains its own adapter.
    """

    def __call__(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Run the model, with row i under `adapter_names[i]`, or under none for "__base__"."""
        if adapter_names is None:
            return super().__call__(*args, **kwargs)
        with deltaw.rows(self, _rows(adapter_names)):
            return super().__call__(*args, **kwargs)

    @property
    def generate(self) -> Callable[..., Any]:
        """Return the model's own `generate`, which takes `adapter_names` too."""
        own: Callable[..., Any] = super().generate

        @functools.wraps(own)
        def generate(*args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
            if adapter_names is None:
                return own(*args, **kwargs)
            with deltaw.rows(self, _rows(adapter_names)):
                return own(*args, **kwargs)

        return generate


def _rows(adapter_names: Sequence[str]) -> list[str | None]:
    return [None if name == BASE else name for name in adapter_names]
