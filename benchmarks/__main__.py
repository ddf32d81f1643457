"""`python -m benchmarks [NAME ...] [--all]`: run benchmarks and write `docs/benchmarks.md`.

Each benchmark is a file of this folder with `TITLE`, `QUICK`, `run(results)` and
`report(results) -> str`. Its results are kept in `benchmarks/results/NAME.json`; one that is
interrupted goes on where it stopped.
"""

import argparse
import importlib
from pathlib import Path

from benchmarks.headlines import summary
from benchmarks.results import Results

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
HEADER = """# Benchmarks

Everything on this page is written by `python -m benchmarks` from the files in
`benchmarks/results/`, which also say on what machine and with which versions they were measured.
A ratio is shown as its median with the smallest and the largest of all rounds.
"""


def names() -> list[str]:
    """Return the benchmarks: the files that have a title."""
    return sorted(p.stem for p in HERE.glob("*.py") if "\nTITLE = " in p.read_text())


def main() -> None:
    """Run what is asked for, then write the page from all results there are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}")
    parser.add_argument("--all", action="store_true", help="the long ones too")
    parser.add_argument("--report", action="store_true", help="write the page, measure nothing")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(names())
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names())}")
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in names()}
    if not asked.report:
        for name in asked.names or [n for n, m in modules.items() if asked.all or m.QUICK]:
            modules[name].run(Results(name))
    results = {name: Results(name) for name in modules}
    parts = [HEADER, summary(results)]
    for name, module in modules.items():
        own = results[name]
        if own.entries:
            parts.append(f"## {module.TITLE}\n\n{module.report(own)}\n\n{own.footer()}\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(part for part in parts if part))


if __name__ == "__main__":
    main()
