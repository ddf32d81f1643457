"""`deltaw eval`: score a run on its held-out rows or on other data."""

from typing import Annotated, Any

import typer

from deltaw.cli.options import Model, NoMerge, Run, TrustRemoteCode, announce_loading


def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Other labelled data; its own if absent.")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Score a language model's answers too.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Write the answers here (RUN/answers.jsonl)."),
    ] = None,
    no_merge: NoMerge = False,
    model: Model = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a trained run on its held-out rows, or on DATA."""
    announce_loading()
    from pathlib import Path

    from deltaw.errors import ConfigError
    from deltaw.language.use import evaluating
    from deltaw.train import evaluate
    from deltaw.train.runfolder import read_recipe

    if output is not None and not generate:
        raise ConfigError("Only answers are written with --output.\nFix: give --generate too.")
    file = None if output is None else Path(output)
    where: dict[str, Any] = {
        "merge": not no_merge,
        "model": model,
        "trust_remote_code": trust_remote_code,
    }
    if read_recipe(Path(run)).is_language:
        evaluating.evaluate_run(Path(run), data, generate=generate, output=file, **where)
    elif generate:
        raise ConfigError("The run labels texts and answers nothing.\nFix: leave --generate out.")
    else:
        evaluate.evaluate_run(Path(run), data, **where)
