"""The random states of a run's processes, as `transformers.Trainer` writes that of one."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals


def file_name(process: int) -> str:
    """Return the name of a process's file."""
    return f"rng_state_{process}.pth" if process else "rng_state.pth"


def current() -> dict[str, Any]:
    """Return this process's states."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def write(states: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the states of all processes."""
    for process, state in enumerate(states):
        torch.save(state, folder / file_name(process))


def restore(folder: Path, process: int) -> None:
    """Take up the states of a process; one that was not there then goes on with its own."""
    path = folder / file_name(process)
    if process and not path.is_file():
        return
    with safe_globals():
        states = torch.load(path, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
