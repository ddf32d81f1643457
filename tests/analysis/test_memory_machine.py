"""What the machine has: the kernel's word, limits of cgroups, and GPUs."""

from pathlib import Path

import pytest
import torch

from deltaw.analysis.memory import Estimate, Machine, available

GB = 10**9


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


HOST = {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 5000000 kB\nHugePages_Total: 0\n"}


def test_the_host(tmp_path: Path) -> None:
    assert available(root=written(tmp_path, HOST)) == Machine(8_192_000_000, 5_120_000_000)


@pytest.mark.parametrize(
    ("own", "around", "wanted"),
    [
        ("max", "max", Machine(8_192_000_000, 5_120_000_000)),
        ("2000000000", "max", Machine(2 * GB, 1_250_000_000, "its cgroup")),
        ("max", "3000000000", Machine(3 * GB, 2_400_000_000, "its cgroup")),
        ("9000000000", "max", Machine(8_192_000_000, 5_120_000_000)),
    ],
)
def test_unified_groups(tmp_path: Path, own: str, around: str, wanted: Machine) -> None:
    group = "sys/fs/cgroup/user/job"
    files = {
        "proc/self/cgroup": "0::/user/job\n",
        f"{group}/memory.max": own + "\n",
        f"{group}/memory.current": "1000000000\n",
        f"{group}/memory.stat": "anon 5\ninactive_file 250000000\n",
        "sys/fs/cgroup/user/memory.max": around + "\n",
        "sys/fs/cgroup/user/memory.current": "600000000\n",
    }
    assert available(root=written(tmp_path, HOST | files)) == wanted


def test_groups_of_a_container(tmp_path: Path) -> None:
    """Version 1, and a path of the host that is not mounted here."""
    files = {
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000000\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500000000\n",
    }
    found = available(root=written(tmp_path, HOST | files))
    assert found == Machine(4 * GB, 3 * GB, "its cgroup")


def test_swap_counts_where_no_group_limits_memory(tmp_path: Path) -> None:
    swap = {"proc/meminfo": f"{HOST['proc/meminfo']}SwapTotal: 1000 kB\n"}
    assert available(root=written(tmp_path, swap)).swap == 1_024_000
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "4000000000\n",
        "sys/fs/cgroup/memory.current": "0\n",
    }
    assert available(root=written(tmp_path, swap | files)).swap == 0


def test_without_proc(tmp_path: Path) -> None:
    found = available(root=tmp_path)
    assert found.total == found.free > GB / 2
    assert available().total <= available(root=tmp_path).total


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 7))
    assert available("cuda:1") == Machine(7, 3)


def test_the_text() -> None:
    found = Estimate(
        {"weights": 352_400_000, "optimiser": 0, "logits": 1_526_000, "runtime": 999_600_000}
    )
    assert found.text().splitlines() == [
        "runtime       1.00 GB  of torch, once",
        "weights        352 MB  the model's own",
        "logits        1.53 MB  and their gradients",
        "in all        1.35 GB",
    ]
    last = found.text(Machine(3 * GB, GB, "its cgroup")).splitlines()[-1]
    assert last == "in all        1.35 GB  does not fit into 1.00 GB free of 3.00 GB (its cgroup)"
    assert found.text(Machine(3 * GB, 2 * GB)).endswith("  fits into 2.00 GB free of 3.00 GB")
    assert found.fits(Machine(3 * GB, 1_353_526_000)) and not found.fits(Machine(3 * GB, GB))
