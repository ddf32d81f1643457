"""Taking an adapter to other programs: one file per target, each with `write`.

A target gets an `Order` and writes into a folder that becomes OUT when all went well.
"""

import importlib
from pathlib import Path
from typing import Protocol, cast

from deltaw.errors import ConfigError, FormatError
from deltaw.export._card import card
from deltaw.export._copying import copy_run
from deltaw.export._limits import trained_on
from deltaw.export._order import Order, Told
from deltaw.export._source import SEQ2SEQ, open_source, require_new
from deltaw.folder import files_in
from deltaw.train import staging
from deltaw.train.repacking import require_repacking

__all__ = ["copy_run", "export", "names"]
APART = ("hf", "peft")
"""Targets that a sequence-to-sequence model can be taken to."""


class Target(Protocol):
    """What a file of this folder offers."""

    def write(self, order: Order) -> Told:
        """Write the files of the target into `order.folder`; return what is to be told."""


def names() -> list[str]:
    """Return the targets: the files of this folder."""
    return list(files_in(__name__))


def export(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    base: str | None = None,
    dtype: str | None = None,
    requantize: bool = False,
    ollama_base: str | None = None,
    trust_remote_code: bool = False,
) -> Told:
    """Write the adapter in `source` to the new folder `out`, as another program reads it.

    Args:
        source: the folder of a run of `deltaw train`, or of any LoRA adapter of PEFT's.
        out: a folder that does not exist, or is empty; it is there in full or not at all.
        to: `"hf"` (a merged model), `"peft"`, `"vllm"`, `"mlx"`, `"gguf"` or `"ollama"`.
        base: where the base model is, if not where the adapter says.
        dtype: for a merged model (`"hf"`, `"ollama"`): what to load, merge and save in, such as
            `"bfloat16"`; None is what the base is stored in.
        requantize: for `"hf"` of a run on packed weights: pack the merged weights again, which
            rounds them once more, instead of writing them in full.
        ollama_base: for `"ollama"`: a model that Ollama has, to put the adapter on unmerged.
        trust_remote_code: whether Python code that comes with the base may run.

    Returns:
        What is to be told, by short names: what was written, how it was checked, what is next.

    Raises:
        ConfigError: if a setting is unknown or has no effect.
        RunError: if `out` is not empty, or the base cannot be loaded, or a merged model differs.
        FormatError: if the adapter is damaged, or listing all that the target cannot hold.
        MergeError: if the adapter cannot be merged.
    """
    if to not in names():
        raise ConfigError(f"There is no target {to!r}. Fix: use {', '.join(names())}.")
    if dtype is not None and to not in ("hf", "ollama"):
        raise ConfigError(f"dtype is for merged models, not for {to}. Fix: leave it out.")
    if requantize and to != "hf":
        raise ConfigError(f"requantize is for hf, not for {to}. Fix: leave it out.")
    if ollama_base is not None and to != "ollama":
        raise ConfigError(f"ollama_base is for ollama, not for {to}. Fix: leave it out.")
    if ollama_base is not None and dtype is not None:
        raise ConfigError("With ollama_base nothing is merged. Fix: leave dtype out.")
    out = Path(out)
    require_new(out)
    opened = open_source(Path(source), base, trust_remote_code=trust_remote_code)
    if requantize:
        require_repacking(opened.recipe, dtype)
    if opened.task == SEQ2SEQ and to not in APART:
        raise FormatError(
            f"--to {to} is for causal language models, and the adapter in {opened.shown} is for a "
            f"sequence-to-sequence model ({SEQ2SEQ}): its encoder has no place there.\n"
            f"Fix: use --to {' or '.join(APART)}, which transformers and PEFT read."
        )
    target = cast(Target, importlib.import_module(f"{__name__}.{to}"))
    with staging.staged(out) as partial:
        order = Order(opened, partial, out, dtype, ollama_base, requantize)
        told = target.write(order)
        if to != "hf" and (to != "ollama" or ollama_base is not None):
            told |= trained_on(opened)
        staging.write_text(partial / "README.md", card(opened, to, told))
    return told
