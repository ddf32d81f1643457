"""Which checkpoints lie in a folder, by their names."""

import re
from pathlib import Path

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a folder by their steps, oldest first."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
