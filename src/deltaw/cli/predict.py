"""`deltaw predict`: label one text or a file of texts."""

from typing import Annotated

import typer

from deltaw.cli.options import Model, NoMerge, Run, TrustRemoteCode, announce_loading


def predict(
    run: Run,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT|FILE",
            help="One text, two of a pair, or a file of rows; before a text like -5 write --.",
        ),
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Write JSON lines here (for a FILE).")
    ] = None,
    no_merge: NoMerge = False,
    model: Model = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Predict the label of a text, or of every row of a file, as JSON lines."""
    announce_loading()
    from pathlib import Path

    from deltaw.train.predict import predict_run

    predict_run(
        Path(run),
        texts,
        None if output is None else Path(output),
        merge=not no_merge,
        model=model,
        trust_remote_code=trust_remote_code,
    )
