"""Any module of which only parameters are trained in full: no slot, its own forward."""

from typing import Any

from torch import Tensor, nn

from deltaw.encoders import SWITCHES, Stepwise
from deltaw.layer import AdaptedLayer
from deltaw.state import LayerState


class TrainedModule(AdaptedLayer):
    """A module whose biases or head weights are read from their trained copies."""

    kind = "module"

    @classmethod
    def fits(cls, layer: nn.Module, like: LayerState) -> bool:
        """Take whatever is asked for by kind: any module has parameters."""
        return like.kind == cls.kind

    @staticmethod
    def override(name: str) -> property:
        """Return the property of a trained copy, or of a switch of torch's encoders."""
        kind = Stepwise if name in SWITCHES.values() else AdaptedLayer
        return kind.override(name)

    def alike(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the original forward, which reads the trained copies."""
        return self.base(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Put the buffer that a forward assigns where it read the old one from: in the copy.

        Under a weighted sum there is no such place, and what it assigns is dropped.
        """
        copies = self._copies(name) if name in type(self).overridden else []
        if name not in self._buffers or not copies:
            super().__setattr__(name, value)
        elif [weight for _, weight in copies] == [1]:
            copies[0][0].trained = value

    def _copies(self, name: str) -> list[tuple[nn.Module, float]]:
        """Return the adapters in force that hold a copy of `name`, with their weights."""
        found = [(self.parts(key).get(name), weight) for key, weight in self.authority.current()]
        return [(part, weight) for part, weight in found if part is not None and part.replaces]

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load the base's own values, which `assign=True` sets as attributes, past the copies."""
        authority = self.authority
        enabled, authority.enabled = authority.enabled, False
        try:
            super()._load_from_state_dict(*args)
        finally:
            authority.enabled = enabled
