"""Rows of one batch under adapters of their own."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from torch import nn

from deltaw.errors import StateError, raise_all
from deltaw.root import AdaptedModel, adapted_layers, require_root
from deltaw.rowmap import RowMap
from deltaw.rowwise import RowError


class Rows:
    """A context in which each row of a batch is under its own adapter; it can be entered again."""

    def __init__(self, root: AdaptedModel, names: Sequence[str | None]) -> None:
        self._root = root
        self._map = RowMap(names)
        self._before: list[RowMap | None] = []

    def __enter__(self) -> Self:
        authority = self._root.authority
        authority.require_unmerged("give rows adapters of their own")
        authority.require_base("give rows adapters of their own")
        gone = [name for name in self._map.distinct if name not in authority.configs]
        _require_known(gone, self._root)
        self._map.forget()
        self._before.append(authority.rows)
        authority.rows = self._map
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._root.authority.rows = self._before.pop()
        self._map.forget()
        if isinstance(problem, RowError):
            paths = {id(layer): path for path, layer in adapted_layers(self._root).items()}
            name = paths.get(id(problem.layer), type(problem.layer).__name__)
            raise StateError(
                f"{name} {problem.problem}.\n"
                "Fix: give deltaw.rows one entry for each row of the batch."
            ) from problem


def rows(model: nn.Module, names: Sequence[str | None]) -> Rows:
    """Put each row of a batch under its own adapter within a `with` block.

        y_i = W x_i + s_k B_k A_k x_i        k = names[i]; the base alone for None

    A layer may see k times as many rows: those of the batch k times each (beams), or the tokens of
    each row one after another; a first dimension that is a multiple for another reason is taken for
    that. The base is read once for all rows, in training too: every row's
    loss trains its own adapter, and adapters without rows do not move. Of frozen adapters the
    factors are stacked for the second and further passes within a block; do not write into them
    there.

    Args:
        model: an adapted model.
        names: the adapter of each row; None for the base alone.

    Raises:
        StateError: listing every unknown name, or if merged or absorbed; in a forward pass, naming
            the module whose rows do not match.
    """
    root = require_root(model)
    names = names if isinstance(names, str) else list(names)
    if isinstance(names, str) or not names:
        raise StateError(
            f"Rows need one adapter's name or None each, got {names!r}.\n"
            'Fix: give a list such as ["first", "second", None].'
        )
    unknown = [name for name in names if name is not None and name not in root.authority.configs]
    _require_known(unknown, root)
    return Rows(root, names)


def _require_known(unknown: Sequence[object], root: AdaptedModel) -> None:
    problems = [f"there is no adapter {name!r}" for name in dict.fromkeys(unknown)]
    have = ", ".join(root.authority.configs)
    raise_all(StateError, "Rows cannot be put under:", problems, f"the adapters are: {have}.")
