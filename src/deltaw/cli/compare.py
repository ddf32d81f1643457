"""`deltaw compare`: methods side by side, with a rate chosen for each and several seeds."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.options import announce_loading
from deltaw.cli.train import recipe_values
from deltaw.errors import ConfigError

USUAL = "head,bitfit,lora,rslora,lora+,dora,pissa,full"
NEEDED = ("matplotlib", "scipy")
"""What the extra `compare` brings along beside that of training."""


def compare(
    first: Annotated[
        str, typer.Argument(metavar="MODEL|RECIPE", help="Hub name or folder, or recipe.yaml.")
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [KEY=VALUE]...", help="As for train; shared by all methods."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names, or YAML files that map titles to recipe keys; with commas. "
            f"Default: what the model can have of {USUAL}."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the recipe's.")] = 5,
    lr: Annotated[
        str, typer.Option(help="auto searches for each method, rule does not, or 1e-4,3e-4,1e-3.")
    ] = "auto",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the comparison.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at once; they share the processor's cores.")
    ] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the comparison that is in the folder.")
    ] = False,
) -> None:
    """Compare methods on one task: rates searched alike, several seeds, ties marked.

    Writes a table, a JSON and an HTML report. The same command again goes on where it stopped;
    with more methods or seeds it does only what is new.
    """
    rates = _rates(lr)
    if any(part.startswith("output=") for part in rest or ()):
        raise ConfigError("output= is a run's.\nFix: give the comparison's folder with --output.")
    announce_loading()
    try:
        from deltaw.compare.comparing import compare as run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDED:
            raise
        raise ConfigError(
            f"deltaw compare needs {package}.\nFix: pip install 'deltaw[compare]'"
        ) from error
    from deltaw.compare.methods import choose

    values, _ = recipe_values(first, rest or [], {})
    run(
        values,
        choose(USUAL if methods is None else methods),
        seeds=seeds,
        rates=rates,
        output=None if output is None else Path(output),
        jobs=jobs,
        overwrite=overwrite,
        leave_out=methods is None,
    )


def _rates(text: str) -> str | tuple[float, ...]:
    if text in ("auto", "rule"):
        return text
    try:
        rates = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < 10 for rate in rates):
        raise ConfigError(
            f"--lr {text!r} is no learning rate.\n"
            "Fix: give auto, rule, or numbers between 0 and 10 with commas, such as 1e-4,3e-4,1e-3."
        )
    return rates
