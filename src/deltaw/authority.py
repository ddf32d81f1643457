"""The one place that knows which adapters a model has and which are active.

It is pure data, shared by reference by all adapted layers of a model, so that switching visits no
layer. It holds no module and adds nothing to `state_dict`. It is not thread-safe.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from deltaw.config import LoraConfig
from deltaw.errors import StateError
from deltaw.kernels.shared import SharedInput
from deltaw.rowmap import RowMap

Active = tuple[tuple[str, float], ...]
MOST_SEEN = 100
"""How many different settings between two backward passes are remembered."""


class Authority:
    """Names, settings and weights of the adapters on one model."""

    def __init__(self) -> None:
        self.configs: dict[str, LoraConfig] = {}
        self.active: Active = ()
        self.enabled = True
        self.merged: Active | None = None
        self.absorbed = False
        self.thawed: set[str] = set()
        self.fingerprints: dict[str, str | None] = {}
        self.mix = _zeros(0)
        self.shared: SharedInput | None = None
        self.rows: RowMap | None = None
        self._alone = False
        self._seen: set[Active | tuple[str | None, ...]] = set()
        self._last: Active | tuple[str | None, ...] | None = None
        self._recomputed = False

    def current(self) -> Active:
        """Return the adapters in force for all rows as (name, weight) pairs: none while merged."""
        alike = self.enabled and self.merged is None and self.rows is None
        return self.active if alike else ()

    def row_map(self) -> RowMap | None:
        """Return which adapter each row is under, where rows have adapters of their own now."""
        return self.rows if self.enabled and self.merged is None else None

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Put one adapter, or none, in force for all rows within a `with` block."""
        before = self.rows, self.active, self._alone
        self.rows, self.active, self._alone = None, () if name is None else ((name, 1.0),), True
        try:
            yield
        finally:
            self.rows, self.active, self._alone = before

    def several(self) -> bool:
        """Tell whether there is a choice between adapters now."""
        alike = self.enabled and self.merged is None and self.rows is None and not self._alone
        return len(self.configs) > 1 and alike

    def add(self, name: str, config: LoraConfig) -> None:
        """Add an adapter, active only if there is no other."""
        alone = not self.configs
        self.configs[name] = config
        self.activate(((name, 1.0),) if alone else self.active)

    def remove(self, name: str) -> None:
        """Forget an adapter; it no longer counts in the active sum."""
        del self.configs[name]
        self.fingerprints.pop(name, None)
        self.activate(tuple(pair for pair in self.active if pair[0] != name))

    def activate(self, active: Active) -> None:
        """Make the weighted sum `active` the one in force."""
        self.active = active
        if self.mix.numel() != len(self.configs):
            self.mix = _zeros(len(self.configs))
        weights: Mapping[str, float] = dict(active)
        for index, name in enumerate(self.configs):
            self.mix[index] = weights.get(name, 0.0)

    def require_changeable(self, doing: str) -> None:
        """Raise if the adapters are merged into the weights, or serve rows of their own now."""
        self.require_shared(doing)
        self.require_unmerged(doing)

    def require_shared(self, doing: str) -> None:
        """Raise if rows have adapters of their own now."""
        if self.rows is not None:
            raise StateError(
                f"Cannot {doing} while rows have adapters of their own.\n"
                "Fix: leave the `with deltaw.rows(...)` block first."
            )

    def require_unmerged(self, doing: str) -> None:
        """Raise if the adapters are merged into the weights."""
        if self.merged is not None:
            names = ", ".join(name for name, _ in self.merged)
            raise StateError(
                f"Cannot {doing}: adapter {names} is merged into the weights.\n"
                "Fix: call deltaw.unmerge(model) first."
            )

    def require_base(self, doing: str) -> None:
        """Raise if the adapter's start was taken out of the base's weights."""
        if self.absorbed:
            raise StateError(
                f"Cannot {doing}: the adapter's start was absorbed into the weights, so those of "
                "the base are no longer there.\n"
                'Fix: load the base again; deltaw.merge(model, original="none") makes what was '
                "trained a plain model."
            )

    def note_forward(self) -> Active:
        """Record a forward pass, or compare a checkpoint's recomputation with what was recorded.

        A recomputation under other adapters than those of its forward would give wrong gradients in
        silence. Forwards under several settings before one backward are all accepted.

        Returns:
            What is in force for all rows.

        Raises:
            StateError: if the adapters were switched between forward and backward.
        """
        active, rows = self.current(), self.row_map()
        now = active if rows is None else rows.names
        if torch._C._current_graph_task_id() == -1:
            if now is self._last:
                return active
            self._last = now
            if self._recomputed or len(self._seen) > MOST_SEEN:
                self._seen.clear()
                self._recomputed = False
            self._seen.add(now)
        elif now not in self._seen:
            raise StateError(
                "Other adapters are active in the backward pass than in the checkpointed forward "
                "pass, so the recomputed gradients would be wrong.\n"
                "Fix: call backward before you switch, merge or disable adapters."
            )
        else:
            self._recomputed, self._last = True, None
        return active

    def __getstate__(self) -> dict[str, object]:
        passing: dict[str, object] = {
            "enabled": True,
            "shared": None,
            "rows": None,
            "_alone": False,
            "_seen": set(),
            "_last": None,
            "_recomputed": False,
        }
        return vars(self) | passing


@torch.inference_mode(False)
def _zeros(count: int) -> torch.Tensor:
    """Return zeros that can be filled in any context, in the precision of Python's numbers."""
    return torch.zeros(count, dtype=torch.float64, device="cpu")
