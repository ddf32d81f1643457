"""`deltaw check`: what a run would do, before it does it."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.options import TrustRemoteCode, announce_loading
from deltaw.cli.train import recipe_parts


def check(
    first: Annotated[
        str, typer.Argument(metavar="MODEL|RECIPE", help="Hub name or folder, or recipe.yaml.")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA] [KEY=VALUE]...", help="As for deltaw train."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the receipt of a run, time its first steps, and write nothing."""
    given = {"trust_remote_code": True} if trust_remote_code else {}
    file, named, origin = recipe_parts(first, rest or [], given)
    announce_loading()
    from deltaw.language.foreign.reading import read
    from deltaw.language.foreign.tool import Around
    from deltaw.language.report.checking import check as run
    from deltaw.train.recipe import parse

    reading = read(file, named, Around(folder=Path(origin).parent))
    run(parse(reading.values, origin, names=reading.names, problems=reading.problems))
