"""Results on disk: one JSON file per benchmark, written whole after every entry."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("deltaw", "torch", "transformers", "peft", "loralib", "accelerate", "tokenizers")


class Results:
    """Entries of one benchmark keyed by what was measured; each knows machine and versions."""

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        self.name = name
        self.path = folder / f"{name}.json"
        data = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.entries: dict[str, dict[str, Any]] = data.get("entries", {})
        self.machines: list[dict[str, Any]] = data.get("machines", [])

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Keep one entry and write the file."""
        here = machine()
        if here not in self.machines:
            self.machines.append(here)
        self.entries[key] = entry | {"machine": self.machines.index(here), "commit": commit()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        data = {"machines": self.machines, "entries": dict(sorted(self.entries.items()))}
        partial.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(partial, self.path)

    def is_of_now(self, entry: dict[str, Any]) -> bool:
        """Tell whether an entry is of this commit, machine and set of versions."""
        return entry["commit"] == commit() and self.machines[entry["machine"]] == machine()

    def forget(self, keys: Iterable[str]) -> None:
        """Drop entries, on disk when the next one is kept."""
        for key in keys:
            self.entries.pop(key, None)

    def footer(self) -> str:
        """Return one line on machine, versions and commits for each set of them."""
        lines = []
        for index, here in enumerate(self.machines):
            entries = [entry for entry in self.entries.values() if entry["machine"] == index]
            commits = sorted({entry["commit"] for entry in entries})
            packages = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
            lines.append(
                f"Measured on {here['cpu']}, {here['cores']} cores; Python {here['python']}, "
                f"{packages}; commit {', '.join(commits)}."
            )
        return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return what a result depends on beside the code that was measured."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """Return the commit that is checked out."""
    found = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or "unknown"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
