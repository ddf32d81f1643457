"""`deltaw combine`: one adapter from several."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaw.cli.adapters import (
    Base,
    Energy,
    Exact,
    Out,
    Portable,
    Rank,
    nameless,
    new_folder,
    read_adapter,
    show,
    write_adapter,
)
from deltaw.cli.options import announce_loading
from deltaw.errors import ConfigError, printable

if TYPE_CHECKING:
    from deltaw.combine import Reduced

METHODS = ("sum", "svd", "ties", "dare", "dare-ties", "prune")


def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Folders or files of adapters.")
    ],
    out: Out,
    weights: Annotated[
        str | None, typer.Option(help="One number each, as in 0.5,0.5 or 1,-1 (1 for all).")
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + ".")] = "sum",
    rank: Rank = None,
    energy: Energy = None,
    density: Annotated[
        float | None, typer.Option(help="Share of elements that are kept: ties, dare, prune.")
    ] = None,
    majority: Annotated[
        str | None,
        typer.Option(help="How ties and dare-ties elect signs: by total magnitude, or frequency."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the elements that dare drops (0).")] = None,
    drop_copies: Annotated[
        bool, typer.Option("--drop-copies", help="Leave out biases and heads trained in full.")
    ] = False,
    portable: Portable = False,
    exact: Exact = False,
    base: Base = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Combine adapters that name different bases.")
    ] = False,
) -> None:
    """Write the weighted sum of adapters of one base, or their merge by TIES or DARE.

    sum is exact, at the lowest rank that holds it; svd cuts it to the highest rank of the adapters.
    --rank and --energy cut every method's result. The sum of DoRA adapters needs --base.
    """
    folder = new_folder(out)
    numbers = None if weights is None else _numbers(weights)
    given = {
        "density": density,
        "majority": majority,
        "seed": seed,
        "exact": exact or None,
        "base": base,
    }
    options: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
    _check(method, options)
    announce_loading()
    from deltaw.combine import StoredBase, check_portable, highest_rank, without_copies
    from deltaw.train.console import Console

    states = [read_adapter(path) for path in adapters]
    if drop_copies:
        states = [without_copies(state) for state in states]
    if any_base:
        states = [nameless(state) for state in states]
    if portable:
        check_portable(states)
    if base is not None:
        options["base"] = StoredBase(base)
    limit: dict[str, Any] = {"rank": rank, "energy": energy}
    if method == "svd" and rank is None and energy is None:
        limit["rank"] = max(map(highest_rank, states))
    made = _function(method)(states, numbers, **limit, **options)
    console = Console()
    shares = numbers or [1.0] * len(states)
    lines = [f"{w:g} x {printable(p, 300)}" for w, p in zip(shares, adapters, strict=True)]
    console.field(method, "\n".join(lines))
    show(made.kept)
    write_adapter(made.state, folder, portable)


def _function(method: str) -> "Callable[..., Reduced]":
    from functools import partial

    from deltaw import combine

    return {
        "sum": combine.add,
        "svd": combine.add,
        "ties": combine.ties,
        "prune": combine.prune,
        "dare": combine.dare,
        "dare-ties": partial(combine.dare, ties=True),
    }[method]


def _check(method: str, options: dict[str, Any]) -> None:
    if method not in METHODS:
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, not {method!r}.")
    known = {"base"} if method in ("sum", "svd") else {"density", "exact"}
    if method.startswith("dare"):
        known |= {"seed"}
    if method.endswith("ties"):
        known |= {"majority"}
    odd = [f"--{name}" for name in options if name not in known]
    if odd:
        raise ConfigError(
            f"{' and '.join(odd)} would change nothing with --method {method}.\nFix: leave it out."
        )


def _numbers(text: str) -> Sequence[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights {text!r} are not numbers.\nFix: separate them by commas, as in 0.5,0.5"
        ) from None
