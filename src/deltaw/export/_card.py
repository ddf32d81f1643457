"""The model card: what was exported, from what it was made, and how well it did."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from deltaw.errors import printable
from deltaw.export._order import Told
from deltaw.export._source import Source
from deltaw.state import IDS
from deltaw.train.recipe import Recipe

MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
}
LIBRARIES = {"peft": "peft", "vllm": "peft", "hf": "transformers", "mlx": "mlx"}
PLACES = ("model", "data", "eval_data", "dataset_dir", "template")
SEVERAL = ("data", "eval_data")
"""Places that may be several, with commas between them."""


def card(source: Source, to: str, told: Told) -> str:
    """Return the text of README.md for an export to `to`; names from files are escaped in it."""
    rows = [*_about(source), *_scores(source.results)]
    lines = ["---", _header(source, to).rstrip(), "---", "", f"# {_escaped(_title(source))}", ""]
    lines += [f"Made by deltaw: `deltaw export RUN OUT --to {to}`.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]
    if "checked" in told:
        lines += ["", f"Checked: {_escaped(told['checked'])}."]
    if source.recipe is not None:
        lines += ["", "## Recipe", "", *_fenced(_recipe(source.recipe))]
    return "\n".join(lines) + "\n"


def _header(source: Source, to: str) -> str:
    values: dict[str, Any] = {}
    if source.name and not _is_local(source.name):
        values["base_model"] = source.name
    values["library_name"] = LIBRARIES.get(to)
    values["pipeline_tag"] = PIPELINES.get(source.task or "")
    values["tags"] = ["deltaw", source.state.config.method]
    kept = {key: value for key, value in values.items() if value is not None}
    return yaml.safe_dump(kept, sort_keys=False)


def _title(source: Source) -> str:
    return f"An adapter of {_name(source.name)}" if source.name else "An adapter"


def _about(source: Source) -> Iterable[tuple[str, str]]:
    config, layers = source.state.config, source.state.layers
    if source.name:
        revision = f" at {config.revision}" if config.revision else ""
        where = " (a local folder)" if _is_local(source.name) else ""
        yield "base", _escaped(_name(source.name) + revision + where)
    scale = f"r={config.r} lora_alpha={config.lora_alpha:g}{' rslora' * config.use_rslora}"
    others = " and others" if config.rank_pattern or config.alpha_pattern else ""
    yield "method", _escaped(f"{config.method}, {scale}{others}")
    count = sum(
        tensor.numel()
        for layer in layers.values()
        for name, tensor in layer.tensors.items()
        if ".start_" not in name and not name.endswith(f".{IDS}")
    )
    yield "parameters", f"{count:,} in {len(layers)} modules"
    record = (source.recipe.record if source.recipe else None) or {}
    for name, digest in record.get("data", {}).items():
        yield "data", f"{_escaped(_name(name))}, sha256 {_escaped(digest)}"


def _scores(results: dict[str, Any]) -> Iterable[tuple[str, str]]:
    before, after = results.get("before"), results.get("after")
    if not after:
        return
    for name, value in after["values"].items():
        text = f"{value:.4f}"
        if name in after.get("intervals", {}):
            low, high = after["intervals"][name]
            text += f" (95%: {low:.4f} to {high:.4f})"
        if before and name in before["values"]:
            text += f", before training {before['values'][name]:.4f}"
        held = results.get("held_out")
        yield _escaped(f"{name} on {held}" if held else name), text


def _recipe(recipe: Recipe) -> str:
    """Return what was set, as YAML; of local paths the last names alone."""
    values = recipe.model_dump(
        exclude={"record", "trust_remote_code", "output"}, exclude_defaults=True
    )
    places = {
        key: ",".join(map(_name, values[key].split(",") if key in SEVERAL else [values[key]]))
        for key in PLACES
        if key in values
    }
    return yaml.safe_dump(values | places, sort_keys=False)


def _fenced(text: str) -> list[str]:
    """Return a block of code, behind a fence that the text cannot close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}yaml", text.rstrip(), fence]


def _name(place: str) -> str:
    """Return a hub name as it is, and of a local path the last part alone."""
    return Path(place).name if _is_local(place) else place


def _is_local(place: str) -> bool:
    return Path(place).is_absolute() or Path(place).exists() or place.startswith((".", "~"))


def _escaped(text: str) -> str:
    """Return text from outside so that it is no markup in Markdown."""
    return MARKUP.sub(r"\\\1", printable(text, 300))
