"""`deltaw export`: take an adapter to other programs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.cli.options import TrustRemoteCode, announce_loading

if TYPE_CHECKING:
    from deltaw.export._order import Told


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder of a run, or of an adapter of PEFT's.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder to write to.")],
    to: Annotated[str, typer.Option("--to", help="hf, peft, vllm, mlx, gguf or ollama.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "--model", help="Where the base model is, if not where RUN says."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of a merged model: float32, bfloat16 or float16 (as the base)."),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(help="For hf: keep packed weights packed, which rounds them once more."),
    ] = False,
    ollama_base: Annotated[
        str | None,
        typer.Option(help="A model that Ollama has, to put the adapter on without a merge."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write an adapter as another program reads it: merged, or apart in that program's format."""
    announce_loading()
    from deltaw.export import export as written

    told = written(
        run,
        out,
        to=to,
        base=base,
        dtype=dtype,
        requantize=requantize,
        ollama_base=ollama_base,
        trust_remote_code=trust_remote_code,
    )
    show("exported", run, out, told, f" ({to})")


def show(done: str, run: str, out: str, told: "Told", how: str = "") -> None:
    """Print what was done with a run, and what is told of it."""
    from deltaw.errors import printable
    from deltaw.train.console import Console

    console = Console()
    console.field(done, f"{printable(run, 300)} -> {printable(str(Path(out)), 300)}{how}")
    for name, text in told.items():
        console.field(name, printable(text, 2000), whole=name == "next")
