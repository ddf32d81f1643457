"""`deltaw eval`: score a run on its held-out rows or on other data."""

from typing import Annotated

import typer

from deltaw.cli.options import Model, NoMerge, Run, TrustRemoteCode, announce_loading


def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Other labelled data; its own if absent.")
    ] = None,
    no_merge: NoMerge = False,
    model: Model = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a trained run on its held-out rows, or on DATA."""
    announce_loading()
    from pathlib import Path

    from deltaw.language.use import evaluating
    from deltaw.train import evaluate
    from deltaw.train.runfolder import read_recipe

    language = read_recipe(Path(run)).is_language
    evaluate_run = evaluating.evaluate_run if language else evaluate.evaluate_run
    evaluate_run(
        Path(run), data, merge=not no_merge, model=model, trust_remote_code=trust_remote_code
    )
