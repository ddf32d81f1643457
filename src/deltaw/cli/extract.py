"""`deltaw extract`: the adapter that turns a base into a fine-tuned model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.cli.adapters import Energy, Exact, Out, Portable, Rank, new_folder, show, write_adapter
from deltaw.cli.options import TrustRemoteCode, announce_loading, targets
from deltaw.errors import ConfigError, MergeError, RunError, printable

if TYPE_CHECKING:
    from deltaw.combine import Place

SHOWN = 3


def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or file of the base.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The same model, fine-tuned.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    target_modules: Annotated[
        list[str] | None,
        typer.Option("--targets", help='Names, a regular expression, or "all-linear" (all).'),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Parts to leave out, or that only one model has.")
    ] = None,
    rest: Annotated[
        str, typer.Option(help="Changed norms, biases, heads: report, save (in full) or refuse.")
    ] = "report",
    portable: Portable = False,
    exact: Exact = False,
    seed: Annotated[int, typer.Option(help="Of the random sketches.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the difference of two full checkpoints as a low-rank adapter of the base."""
    if portable and rest == "save":
        raise ConfigError(
            "--portable cannot hold what --rest save keeps in full.\n"
            "Fix: leave one of them out; --rest refuse says what there is."
        )
    folder = new_folder(out)
    announce_loading()
    from deltaw import combine
    from deltaw.train.console import Console
    from deltaw.train.data.wording import counted

    console = Console()
    places, names = _layout(Path(tuned), trust_remote_code)
    made = combine.extract(
        base,
        tuned,
        rank=rank,
        energy=energy,
        targets=targets(target_modules),
        exclude=[name for value in exclude or () for name in value.split(",")],
        rest=rest,
        places=places,
        renamed=names,
        exact=exact,
        seed=seed,
    )
    if not made.state.layers:
        others = f" but for {', '.join(map(printable, made.rest[:SHOWN]))}" if made.rest else ""
        raise MergeError(
            f"{printable(base, 300)} and {printable(tuned, 300)} do not differ{others}.\n"
            "Fix: give the fine-tuned model second, or other --targets."
        )
    show(made.kept)
    console.field("unchanged", counted(made.unchanged, "tensor"))
    if made.rest:
        names = [printable(name) for name in made.rest[:SHOWN]]
        kept = "kept in full" if rest == "save" else "left out; --rest save keeps them in full"
        more = ", ..." if len(made.rest) > SHOWN else ""
        count = counted(len(made.rest), "other tensor")
        console.field("rest", f"{count} changed, {kept}:\n{', '.join(names)}{more}")
    write_adapter(made.state, folder, portable)


def _layout(tuned: Path, trust: bool) -> "tuple[dict[str, Place] | None, dict[str, str]]":
    """Return layers and names of the model that `config.json` names, None where it is not known."""
    if not (tuned / "config.json").is_file():
        return None, {}
    from deltaw.analysis.places import places, renamed
    from deltaw.train.model import load_own

    try:
        model = load_own(str(tuned), trust_remote_code=trust)
    except RunError as error:
        print(f"warning   {printable(str(error).splitlines()[0], 300)}")
        print("          layers are told from names and shapes")
        return None, {}
    return places(model), renamed(model)
