"""`deltaw data`: look at a data set before training on it."""

from typing import Annotated, Any

import typer

from deltaw.cli.options import TrustRemoteCode, announce_loading


def data(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="File, folder or hub data set, as for train.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of a recipe that are about data."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Count the tokens of this model; no weights are read."),
    ] = None,
    template: Annotated[str | None, typer.Option(help="Chat template by name or file.")] = None,
    bad: Annotated[bool, typer.Option("--bad", help="List every row left out, not a few.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Samples shown as the model sees them.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what a data set holds, what is wrong with it and, with a model, what would be learnt."""
    announce_loading()
    from deltaw.cli.train import joined
    from deltaw.language.report.reporting import Detail, report
    from deltaw.train.recipe import parse_overrides

    words = [*(settings or [])]
    named: dict[str, Any] = {} if template is None else {"template": template}
    named |= {"trust_remote_code": True} if trust_remote_code else {}
    report(
        data,
        joined(parse_overrides(words), named),
        model=model,
        detail=Detail(every=bad, samples=samples),
        words=[*words, *(f"{key}={value}" for key, value in named.items())],
    )
