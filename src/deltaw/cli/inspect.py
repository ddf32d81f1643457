"""`deltaw inspect`: look into a run, an adapter, or a model that is still to be adapted."""

from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.options import Model, TrustRemoteCode, targets

Targets = Annotated[
    list[str] | None,
    typer.Option("--targets", help='Of a MODEL: names, a regular expression, or "all-linear".'),
]


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="RUN|ADAPTER|MODEL", help="Folder, file or hub name.")
    ],
    target_modules: Targets = None,
    r: Annotated[int, typer.Option("--r", help="Of a MODEL: the rank.")] = 8,
    model: Model = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show ranks, scales and the size of ΔW in every layer; or what would be adapted in a MODEL."""
    path = Path(what)
    if (path / "recipe.yaml").is_file():
        _show_run(path, model, trust_remote_code)
    elif path.is_file() or (path / "adapter_config.json").is_file():
        _show_adapter(path, model, trust_remote_code)
    else:
        _show_model(what, targets(target_modules) or "all-linear", r, trust_remote_code)


def _show_run(folder: Path, model: str | None, trust: bool) -> None:
    from deltaw.train.escape import printable
    from deltaw.train.runfolder import read_recipe, read_results

    recipe, results = read_recipe(folder), read_results(folder)
    print(f"run       {printable(str(folder), 300)}: {recipe.method}, seed {recipe.seed}")
    print(f"model     {printable(recipe.model, 300)}")
    print(f"data      {printable(recipe.data, 300)}")
    after = results.get("after")
    if after:
        before = results["before"]["values"]
        for name, value in after["values"].items():
            print(f"{name:<9} {before[name]:.3f} before, {value:.3f} after")
    if not results:
        print("state     not finished; the same `deltaw train` command resumes it")
    elif (folder / "adapter_config.json").is_file():
        _show_adapter(folder, model or recipe.model, trust)


def _show_adapter(path: Path, base: str | None, trust: bool) -> None:
    from deltaw.analysis.inspect import report
    from deltaw.analysis.show import text
    from deltaw.formats import sniff
    from deltaw.train.escape import printable
    from deltaw.train.model import load_base

    state = sniff(path).read(path)
    config = state.config
    print(
        f"adapter   r={config.r} lora_alpha={config.lora_alpha:g} "
        f"bias={config.bias}{' rslora' if config.use_rslora else ''}"
    )
    found = report(state, None if base is None else load_base(base, trust_remote_code=trust))
    for line in text(found).splitlines():
        print(printable(line, 2000))


def _show_model(name: str, names: str | list[str], r: int, trust: bool) -> None:
    import deltaw
    from deltaw.train.escape import printable
    from deltaw.train.model import load_empty

    model = load_empty(name, trust_remote_code=trust)
    plan = deltaw.plan(model, deltaw.LoraConfig(r=r, target_modules=names))
    for line in str(plan).splitlines():
        print(printable(line, 2000))
