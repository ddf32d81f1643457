"""The memory that this machine has: of the host, within the limits of its cgroups, or of a GPU."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Bytes of memory in all, and those that are free; `limited` names what caps them.

    `swap` is what the host could move to a disk beside it, which limits may forbid.
    """

    total: int
    free: int
    limited: str = ""
    swap: int = 0


def available(device: str = "cpu", root: Path = Path("/")) -> Machine:
    """Return the memory of a device: `"cpu"`, or a GPU as `"cuda"` or `"cuda:1"`.

    Of the host, what the kernel would give without swapping, and no more than any cgroup leaves.

    Args:
        device: where the model would be trained.
        root: where `/proc` and `/sys` are.
    """
    if torch.device(device).type != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        return Machine(total, free)
    known = _meminfo(root / "proc" / "meminfo")
    if "MemTotal" not in known:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return Machine(pages * size, pages * size)
    total = known["MemTotal"]
    machine = Machine(total, known.get("MemAvailable", total), swap=known.get("SwapTotal", 0))
    for limit, used in _limits(root):
        if limit < machine.total:
            free = min(machine.free, max(limit - used, 0))
            machine = Machine(limit, free, "its cgroup")
    return machine


def _meminfo(file: Path) -> dict[str, int]:
    if not file.is_file():
        return {}
    rows = (line.partition(":") for line in file.read_text().splitlines())
    return {name: int(value.split()[0]) << 10 for name, _, value in rows if value.endswith("kB")}


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of every cgroup that this process is in, with those around it.

    Within a container its own group is the root of what is mounted, whatever its name says.
    """
    file = root / "proc" / "self" / "cgroup"
    for line in file.read_text().splitlines() if file.is_file() else ():
        _, controllers, path = line.split(":", 2)
        unified = not controllers
        if not unified and "memory" not in controllers.split(","):
            continue
        mount = root / "sys" / "fs" / "cgroup" / ("" if unified else "memory")
        group = mount / path.lstrip("/")
        names = ("memory.max", "memory.current") if unified else V1
        for folder in (group, *group.parents):
            found = [_number(folder / name) for name in names]
            if found[0] is not None:
                yield found[0], (found[1] or 0) - _reclaimable(folder)
            if folder == mount:
                break


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _number(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else "max"
    return int(text) if text.isdigit() else None


def _reclaimable(folder: Path) -> int:
    """Return the bytes of files that the kernel would drop for want of memory."""
    file = folder / "memory.stat"
    rows = dict(line.split() for line in file.read_text().splitlines()) if file.is_file() else {}
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
