"""All commands in the order a person meets them."""

from contextlib import suppress
from importlib import metadata
from typing import Annotated

import typer

from deltaw import __version__
from deltaw.cli.chat import chat
from deltaw.cli.check import check
from deltaw.cli.combine import combine
from deltaw.cli.compare import compare
from deltaw.cli.data import data
from deltaw.cli.demo import demo
from deltaw.cli.evaluate import evaluate
from deltaw.cli.export import export
from deltaw.cli.extract import extract
from deltaw.cli.inspect import inspect
from deltaw.cli.merge import merge
from deltaw.cli.predict import predict
from deltaw.cli.resize import resize
from deltaw.cli.train import train

app = typer.Typer(
    help="Fine-tune pretrained models with low-rank adapters, and see that it worked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
BESIDE = ("torch", "transformers", "trl")


def _show_version(asked: bool) -> None:
    if not asked:
        return
    beside = []
    for name in BESIDE:
        with suppress(metadata.PackageNotFoundError):
            beside.append(f"{name} {metadata.version(name)}")
    typer.echo(f"deltaw {__version__} ({', '.join(beside)})")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Say which version this is if asked."""


app.command()(demo)
app.command()(train)
app.command()(data)
app.command()(check)
app.command()(compare)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(chat)
app.command()(inspect)
app.command()(merge)
app.command()(export)
app.command()(combine)
app.command()(resize)
app.command()(extract)
