"""`deltaw inspect`: look into a run, an adapter, or a model that is still to be adapted."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.cli.options import Model, TrustRemoteCode, targets
from deltaw.errors import ConfigError, FormatError, RunError, raise_all

if TYPE_CHECKING:
    from torch import nn

    from deltaw.state import State
    from deltaw.train.recipe import Recipe

Targets = Annotated[
    list[str] | None,
    typer.Option("--targets", help='Of a MODEL: names, a regular expression, or "all-linear".'),
]


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="Folder, file or hub name.")
    ],
    target_modules: Targets = None,
    r: Annotated[int | None, typer.Option("--r", help="Of a MODEL: the rank (8).")] = None,
    model: Model = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show ranks, scales and the size of ΔW in every layer; or what would be adapted in a MODEL."""
    path = Path(what)
    planned = ["--targets"] * bool(target_modules) + ["--r"] * (r is not None)
    if (path / "recipe.yaml").is_file():
        _refuse_options("a run", planned)
        _show_run(path, model, trust_remote_code)
    elif path.is_file() or (path / "adapter_config.json").is_file():
        _refuse_options("an adapter", planned)
        _show_adapter(path, model, None, trust_remote_code)
    else:
        _refuse_options("a model", [] if model is None else ["--model"])
        names = targets(target_modules) or "all-linear"
        _show_model(what, names, 8 if r is None else r, trust_remote_code)


def _refuse_options(kind: str, options: list[str]) -> None:
    if options:
        raise ConfigError(
            f"{' and '.join(options)} would change nothing: this is {kind}, which is shown as it "
            "is.\nFix: leave it out."
        )


def _show_run(folder: Path, model: str | None, trust: bool) -> None:
    from deltaw.train.escape import printable
    from deltaw.train.methods import IN_PLACE
    from deltaw.train.runfolder import read_recipe, read_results

    recipe, results = read_recipe(folder), read_results(folder)
    print(f"run       {printable(str(folder), 300)}: {recipe.method}, seed {recipe.seed}")
    print(f"model     {printable(recipe.model, 300)}")
    print(f"data      {printable(recipe.data, 300)}")
    if results.get("before") and results["after"]:
        before = results["before"]["values"]
        for name, value in results["after"]["values"].items():
            then = f"{before[name]:.3f} before, " if name in before else ""
            print(f"{name:<9} {then}{value:.3f} after")
    if not results:
        print("state     not finished; the same `deltaw train` command resumes it")
    elif recipe.method not in IN_PLACE:
        if not (folder / "adapter_config.json").is_file():
            raise RunError(
                f"{printable(str(folder), 300)} has lost its adapter_config.json.\n"
                "Fix: restore the file, or train again with --overwrite."
            )
        _show_adapter(folder, model, recipe, trust)


def _show_adapter(path: Path, model: str | None, recipe: "Recipe | None", trust: bool) -> None:
    """Print the table; the base is `model`, or that of the recipe if it is still there."""
    from deltaw.analysis.inspect import report
    from deltaw.analysis.show import text
    from deltaw.formats import sniff
    from deltaw.train.escape import printable

    state = sniff(path).read(path, finite=False)
    config = state.config
    low_rank = any(layer.kind != "module" for layer in state.layers.values())
    if low_rank:
        print(
            f"adapter   r={config.r} lora_alpha={config.lora_alpha:g} "
            f"bias={config.bias}{' rslora' if config.use_rslora else ''}"
            f"{' dora' if config.use_dora else ''}"
        )
    base = None
    if model is not None or recipe is not None:
        try:
            base = _base(state, model, recipe, trust)
        except (RunError, FormatError) as error:
            if model is not None:
                raise
            print(f"base      {str(error).splitlines()[0]}")
            print("          ΔW/W is not shown without it; say where it is now with --model")
    elif low_rank:
        print("base      not given; --model BASE shows ΔW/W")
    found = report(state, base)
    for line in text(found).splitlines():
        print(printable(line, 2000))
    raise_all(
        FormatError,
        f"{printable(str(path), 300)} holds numbers that are not finite:",
        [printable(name) for name in found.broken],
        "the training run that made it diverged; take an earlier checkpoint.",
    )


def _base(state: "State", model: str | None, recipe: "Recipe | None", trust: bool) -> "nn.Module":
    """Return `model`, or the base of the recipe; raise if the adapter is not one for it."""
    from deltaw.analysis.inspect import require_fitting
    from deltaw.train.identity import find_base, require_base
    from deltaw.train.model import load_base

    name = model if recipe is None else find_base(recipe, model)
    assert name is not None
    revision = None if recipe is None else recipe.revision
    base = load_base(name, revision=revision, trust_remote_code=trust)
    if recipe is not None:
        require_base(base, name, recipe)
    require_fitting(state, base, name)
    return base


def _show_model(name: str, names: str | list[str], r: int, trust: bool) -> None:
    import deltaw
    from deltaw.heads import new_heads
    from deltaw.train.escape import printable
    from deltaw.train.model import load_empty, untrained_in

    model = load_empty(name, trust_remote_code=trust)
    untrained = untrained_in(Path(name), model)
    full = [*new_heads(model), *untrained] if untrained else None
    plan = deltaw.plan(model, deltaw.LoraConfig(r=r, target_modules=names, modules_to_save=full))
    for line in str(plan).splitlines():
        print(printable(line, 2000))
    for path in untrained:
        print(f"{printable(path)} was never trained, so that `deltaw train` trains it in full")
