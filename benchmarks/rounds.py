"""Contestants that take turns, each in a fresh process of its own, over several rounds.

`take_turns` has all processes alive at once and one at work: a round is one turn of each, seconds
apart. `measure` runs one process after another, for what cannot be cut into turns. Only what was
measured in the same round is divided, so that a machine that is slower for a while is so for both.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Results

ROUNDS = 5
TURNS = 7
WARMUP = 1
ROOT = Path(__file__).parents[1]


def measure(results: Results, contestants: Sequence[str], rounds: int = ROUNDS) -> None:
    """Run a process for every contestant in every round that is not there yet.

    Odd rounds go backwards. A round that was left half done by another commit or on another machine
    is measured anew.
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
        _command(benchmark, contestant),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=_environment(),
    )
    entry: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return entry


def take_turns(results: Results, contestants: Sequence[str], turns: int = TURNS) -> None:
    """Let contestants take turns, of which the first few do not count, unless all is there.

    Every other round goes backwards. What was interrupted begins anew.
    """
    keys = [f"round={number}/{name}" for number in range(turns) for name in contestants]
    if all(key in results.entries for key in keys):
        return
    results.forget(keys)
    found: dict[str, dict[str, Any]] = {}
    processes: dict[str, Turns] = {}
    try:
        for name in contestants:
            processes[name] = Turns(results.name, name)
            processes[name].answer()
        for number in range(-WARMUP, turns):
            for name in contestants if number % 2 == 0 else contestants[::-1]:
                entry = processes[name].turn()
                if number >= 0:
                    found[f"round={number}/{name}"] = entry
                    print(f"round={number}/{name}", json.dumps(entry)[:300], flush=True)
    finally:
        for process in processes.values():
            process.end()
    for key, entry in found.items():
        results.add(key, entry)


class Turns:
    """A process that answers once when it is ready, then after every turn."""

    def __init__(self, benchmark: str, contestant: str) -> None:
        self._process = subprocess.Popen(
            _command(benchmark, contestant),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=_environment(),
        )

    def turn(self) -> dict[str, Any]:
        """Return what one turn measured."""
        assert self._process.stdin is not None
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def answer(self) -> dict[str, Any]:
        """Return what the process prints next."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}.")


def serve(turn: Callable[[], Mapping[str, float]]) -> None:
    """Answer in a process of `take_turns`: once when it is ready, then for every turn."""
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def _command(benchmark: str, contestant: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{benchmark}", contestant]


def _environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1"}


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
