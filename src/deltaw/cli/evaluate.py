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

    from deltaw.train.evaluate import evaluate_run

    evaluate_run(
        Path(run), data, merge=not no_merge, model=model, trust_remote_code=trust_remote_code
    )
