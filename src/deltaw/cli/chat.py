"""`deltaw chat`: talk with a trained language model in the terminal."""

import sys
from typing import Annotated

import typer

from deltaw.cli.options import Model, NoMerge, TrustRemoteCode, announce_loading


def chat(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folder of a run; more add adapters.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token, 1 draws as the model says.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Likeliest mass drawn from.")] = 1.0,
    no_merge: NoMerge = False,
    model: Model = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a run; /base compares with its base, /adapter switches between runs."""
    announce_loading()
    from pathlib import Path

    from deltaw.language.generating import Sampling
    from deltaw.language.use.chatting import chat as talk

    talk(
        [Path(run) for run in runs],
        lambda: input("> " if sys.stdin.isatty() else ""),
        sampling=Sampling(max_new_tokens, temperature, top_p),
        merge=not no_merge,
        model=model,
        trust_remote_code=trust_remote_code,
    )
