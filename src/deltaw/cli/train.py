"""`deltaw train`: fine-tune a model on labelled texts, conversations or plain text."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.launching import launch, launched, together, wanted
from deltaw.cli.options import TrustRemoteCode, announce_loading, targets
from deltaw.errors import ConfigError, raise_all

Text = Annotated[list[str] | None, typer.Option(help="Text column; twice for a pair.")]
Targets = Annotated[
    list[str] | None,
    typer.Option("--targets", help='Layers: names, a regular expression, or "all-linear".'),
]


def train(
    first: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="Hub name or folder, or recipe.yaml (or .json): deltaw's or LLaMA-Factory's, "
            "axolotl's, mlx-lm's, TRL's.",
        ),
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [KEY=VALUE]...",
            help="csv, tsv, json, jsonl or parquet file, folder, or hub data set; recipe keys.",
        ),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run below runs/.")] = None,
    text: Text = None,
    label: Annotated[str | None, typer.Option(help="Label column.")] = None,
    task: Annotated[
        str | None, typer.Option(help="classification, regression, sft, dpo or kto (by the data).")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="lora (default), full, head, bitfit, layernorm or freeze.")
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank (8).")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Scale times rank (2r).")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Dropout before A (0).")] = None,
    target_modules: Targets = None,
    quantization_bit: Annotated[
        int | None, typer.Option(help="Keep frozen linear weights in 4 or 8 bits.")
    ] = None,
    quantization_type: Annotated[
        str | None, typer.Option(help="4-bit values: nf4 (default) or fp4.")
    ] = None,
    quantization_method: Annotated[
        str | None, typer.Option(help="What packs the weights: bnb (default) or torchao.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Peak rate (by rule).")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data (by rows).")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch (16).")] = None,
    optim: Annotated[
        str | None,
        typer.Option(help="adamw, or for full and freeze galore_adamw[_8bit][_layerwise]."),
    ] = None,
    loraplus_lr_ratio: Annotated[
        float | None, typer.Option(help="LoRA+: the rate of B over that of A (off).")
    ] = None,
    galore_rank: Annotated[int | None, typer.Option(help="Directions of a gradient (128).")] = None,
    galore_update_interval: Annotated[
        int | None, typer.Option(help="Steps between two choices of them (200).")
    ] = None,
    galore_scale: Annotated[
        float | None, typer.Option(help="Factor on projected updates (2).")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens kept of a text.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="What chooses the best state: accuracy, loss, bleu, rouge_l, ..."),
    ] = None,
    early_stopping: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a better score.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random (0).")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16", help="Compute in bfloat16.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that share every batch (one for each GPU)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show receipt and recipe, train nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that is in the folder.")
    ] = False,
) -> None:
    """Train an adapter on labelled texts, answers or preferences, and evaluate it before and after.

    The same command again resumes a run that was interrupted. Every key that --dry-run shows can be
    given as KEY=VALUE.
    """
    options: dict[str, Any] = {
        "output": output,
        "name": name,
        "text": text or None,
        "label": label,
        "task": task,
        "method": method,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": targets(target_modules),
        "quantization_bit": quantization_bit,
        "quantization_type": quantization_type,
        "quantization_method": quantization_method,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "optim": optim,
        "loraplus_lr_ratio": loraplus_lr_ratio,
        "galore_rank": galore_rank,
        "galore_update_interval": galore_update_interval,
        "galore_scale": galore_scale,
        "max_length": max_length,
        "metric": metric,
        "early_stopping": early_stopping,
        "seed": seed,
        "bf16": bf16,
        "trust_remote_code": trust_remote_code or None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    file, given, origin = recipe_parts(first, rest or [], given)

    announce_loading()
    from deltaw.language.choosing import train as run
    from deltaw.language.foreign.reading import read
    from deltaw.language.foreign.tool import Around
    from deltaw.train.recipe import Recipe, parse

    def read_for(several: int) -> tuple[Recipe, str | None]:
        found = read(file, given, Around(several, Path(origin).parent))
        return parse(found.values, origin, names=found.names, problems=found.problems), found.said

    several = together(processes)
    recipe, said = read_for(several)
    count = wanted(processes, recipe)
    if count < several and not launched():
        recipe, said = read_for(count)
    more = {"dry_run": dry_run, "overwrite": overwrite, "said": said}
    if count == 1 or (dry_run and processes is None):
        run(recipe, **more)
    else:
        raise typer.Exit(launch(count, run, {"recipe": recipe, **more}))


def recipe_values(
    first: str, rest: list[str], options: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Return the values of a recipe and where they are from."""
    file, given, origin = recipe_parts(first, rest, options)
    return file | given, origin


def recipe_parts(
    first: str, rest: list[str], options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return a file's values, those of the command line, which come first, and their place."""
    from deltaw.train import yamlfile
    from deltaw.train.recipe import parse_overrides

    if first.lower().endswith((".yaml", ".yml", ".json")):
        return yamlfile.read(Path(first)), joined(parse_overrides(rest), options), first
    if not rest:
        raise ConfigError(
            "A model and data are needed, or a recipe.\nFix: give MODEL DATA, or recipe.yaml."
        )
    named = {"model": first, "data": rest[0]}
    return {}, joined(named, parse_overrides(rest[1:]), options), "the command line"


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """Return the values of all parts; raise if two of them give one key."""
    counts = Counter(key for part in parts for key in part)
    raise_all(
        ConfigError,
        "Given twice on the command line:",
        [f"{key}: {_values(key, parts)}" for key, count in counts.items() if count > 1],
        "keep one of each.",
    )
    return {key: value for part in parts for key, value in part.items()}


def _values(key: str, parts: Sequence[dict[str, Any]]) -> str:
    return " and ".join(repr(part[key]) for part in parts if key in part)
