"""`deltaw demo`: the main job on a real model and real text, with no network."""

from typing import Annotated

import typer

from deltaw.cli.options import announce_loading


def demo(
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the demo's runs.")
    ] = "runs/demo",
    steps: Annotated[int | None, typer.Option(help="Shorten the runs to this many steps.")] = None,
) -> None:
    """Train MiniLM to tell 12 kinds of customer messages apart, and compare four ways."""
    announce_loading()
    from pathlib import Path

    from deltaw.demo.run import run_demo

    run_demo(Path(output), steps)
