"""Contestants that take turns, one fresh process each, over several rounds.

Only what was measured in the same round is divided, so that a machine that is slower for a while is
so for both.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Results

ROUNDS = 5
ROOT = Path(__file__).parents[1]


def measure(results: Results, contestants: Sequence[str], rounds: int = ROUNDS) -> None:
    """Measure every contestant in every round that is not there yet; odd rounds go backwards.

    A round that was left half done by another commit or on another machine is measured anew.
    """
    for number in range(rounds):
        keys = [f"round={number}/{name}" for name in contestants]
        known = [results.entries[key] for key in keys if key in results.entries]
        if len(known) < len(keys) and not all(map(results.is_of_now, known)):
            results.forget(keys)
        for name in contestants if number % 2 == 0 else contestants[::-1]:
            key = f"round={number}/{name}"
            if key not in results.entries:
                entry = in_fresh_process(results.name, name)
                results.add(key, entry)
                print(key, json.dumps(entry)[:300], flush=True)


def in_fresh_process(benchmark: str, contestant: str) -> dict[str, Any]:
    """Return what `python -m benchmarks.BENCHMARK CONTESTANT` prints as its last line."""
    found = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", contestant],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    entry: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return entry


def values(results: Results, contestant: str, key: str) -> dict[int, float]:
    """Return one number of a contestant by round."""
    found = {}
    for name, entry in results.entries.items():
        number, _, rest = name.removeprefix("round=").partition("/")
        if rest == contestant and key in entry:
            found[int(number)] = float(entry[key])
    return found


def done(results: Results) -> int:
    """Return in how many rounds every contestant was measured that was measured at all."""
    counts = Counter(key.partition("/")[2] for key in results.entries)
    return min(counts.values(), default=0)


def ratios(above: Mapping[int, float], below: Mapping[int, float]) -> list[float]:
    """Return the ratio within each round that has both."""
    return [above[number] / below[number] for number in sorted(above.keys() & below.keys())]
