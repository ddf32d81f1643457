"""`deltaw merge`: turn a run into a plain model."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.options import Model, Run, TrustRemoteCode, announce_loading
from deltaw.errors import ConfigError, RunError, printable


def merge(
    run: Run,
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder for the plain model.")],
    model: Model = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the plain model: float32, bfloat16 or float16."),
    ] = None,
    requantize: Annotated[
        bool, typer.Option(help="Keep packed weights packed, which rounds them once more.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a plain model that loads with transformers alone, and check it against the run."""
    announce_loading()
    from deltaw.train.methods import IN_PLACE
    from deltaw.train.runfolder import read_recipe

    _refuse_adapter(run, out)
    recipe = read_recipe(Path(run))
    if recipe.is_language and recipe.method in IN_PLACE:
        given = {"--model": model, "--dtype": dtype, "--requantize": requantize or None}
        _copy(run, out, given, trust_remote_code)
        return
    if recipe.is_language:
        from deltaw.cli.export import export

        export(
            run,
            out,
            "hf",
            base=model,
            dtype=dtype,
            requantize=requantize,
            trust_remote_code=trust_remote_code,
        )
        return
    from deltaw.train.export import merge_run

    merge_run(
        Path(run),
        Path(out),
        model=model,
        dtype=dtype,
        requantize=requantize,
        trust_remote_code=trust_remote_code,
    )


def _copy(run: str, out: str, given: dict[str, object], trust_remote_code: bool) -> None:
    """Copy a run that is a plain model already; raise `ConfigError` for options without effect."""
    from deltaw.cli.export import show
    from deltaw.export import copy_run

    unread = [name for name, value in given.items() if value is not None]
    if unread:
        has = "has" if len(unread) == 1 else "have"
        raise ConfigError(
            f"{', '.join(unread)} {has} no effect: this run trained the model's own weights, which "
            "are in its folder and are copied as they are.\nFix: leave it out."
        )
    show("copied", run, out, copy_run(Path(run), Path(out), trust_remote_code=trust_remote_code))


def _refuse_adapter(folder: str, out: str) -> None:
    """Raise `RunError` for an adapter that no run wrote, which does not say all that a run does."""
    from deltaw.train.runfolder import RECIPE

    if (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / RECIPE).is_file():
        command = f"deltaw export {shlex.quote(folder)} {shlex.quote(out)} --to hf --base MODEL"
        raise RunError(
            f"{printable(folder, 300)} holds an adapter and no run of deltaw.\n"
            f"Fix: {printable(command, 700)}"
        )
