"""A run's folder as the processes see it that do not write: the first one does."""

from types import TracebackType
from typing import Any

from deltaw.train.recipe import Recipe
from deltaw.train.runfolder import RunFolder


class FollowedFolder(RunFolder):
    """A folder that the first process holds, checks and writes; here all that is left undone."""

    def __enter__(self) -> "FollowedFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    @property
    def started(self) -> bool:
        """Whether a run was begun here: for the first process to say."""
        return False

    def clear(self) -> None:
        """Leave it to the first process."""

    def remove_checkpoints(self, after: int = -1) -> None:
        """Leave it to the first process."""

    def refuse(self, recipe: Recipe, overwrite: bool) -> None:
        """Leave it to the first process."""

    def write_recipe(self, recipe: Recipe) -> None:
        """Leave it to the first process."""

    def write_results(self, results: dict[str, Any]) -> None:
        """Leave it to the first process."""
