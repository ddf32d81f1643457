"""From a run to a plain model that needs nothing of deltaw, checked against the run."""

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import deltaw
from deltaw.errors import ConfigError, RunError
from deltaw.quant import storage_of
from deltaw.train import staging
from deltaw.train.batches import Collator
from deltaw.train.console import Console
from deltaw.train.data.examples import Example
from deltaw.train.escape import printable
from deltaw.train.methods import IN_PLACE
from deltaw.train.model import quiet, save_tokenizer
from deltaw.train.opened import Opened, open_run
from deltaw.train.packing import packing
from deltaw.train.placing import place
from deltaw.train.repacking import adapts_packed, repack, require_repacking
from deltaw.train.runfolder import read_recipe
from deltaw.train.scores import logits
from deltaw.train.tokens import encode
from deltaw.unpacking import usual_dtype

PROBES = (
    "Yes.",
    "Where is my order? It should have been here on Monday.",
    "The film begins slowly, but the last half hour is worth every minute of it.",
    "42 is not the answer I was looking for!",
    "Could you please explain to me, in simple words, what the difference between the two is?",
    "¿Dónde está la biblioteca? Ich weiß es nicht. 我也不知道。",
    "http://example.org/a?b=c&d=e -- (see the note below) ... #7",
    "word " * 60,
)
DTYPES = ("float32", "bfloat16", "float16")
"""What a merged model can be written in."""
FLOAT32 = 1e-4
"""Largest difference of logits in float32, relative to their root mean square, that is accepted."""
ROUNDINGS = 16
"""The same in other dtypes, in units of their epsilon."""
ROUNDED = 0.2
"""The same where the run rounds inputs to 8 bits, which a plain model does not."""


def merge_run(
    folder: Path,
    out: Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    requantize: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the run in `folder` as a plain model to the new folder `out`.

    The written model is loaded with transformers alone and must give the logits of the base with
    its adapter on probe texts. `dtype` is what it is written in; None is float32. With `requantize`
    packed weights are packed again: the written model must give the logits of that, which the
    second rounding moves from those of the run.

    Raises:
        ConfigError: if there is no such dtype, or the run's weights cannot be packed again.
        RunError: if `out` exists, cannot be written, or the logits differ.
        MergeError: if the adapter cannot be merged.
    """
    require_dtype(dtype)
    written: torch.dtype = getattr(torch, dtype or "float32")
    if out.exists():
        raise RunError(f"{printable(str(out), 300)} exists already. Fix: give a new folder.")
    if requantize:
        require_repacking(read_recipe(folder), dtype)
    opened = open_run(folder, model=model, trust_remote_code=trust_remote_code)
    before = trained = _probe(opened, opened.model)
    if requantize:
        repack(opened.model, opened.recipe)
        before = _probe(opened, opened.model)
    elif opened.recipe.method not in IN_PLACE:
        make_plain(opened.model, written)
    else:
        opened.model.to(written)
    with quiet(), staging.staged(out) as partial:
        opened.model.save_pretrained(partial)  # type: ignore[operator]
        save_tokenizer(opened.tokenizer, partial)
        opened.model.cpu()  # makes room for the other
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(
            partial, dtype=written, trust_remote_code=trust_remote_code
        )
        if requantize:
            deltaw.prepare_quantized(plain)
        difference = (_probe(opened, place(plain)) - before).abs().max().item()
        size = before.square().mean().sqrt().item()
        rounded = ROUNDED if packing(opened.recipe) == "int8" else tolerance(written)
        if not difference <= rounded * max(1.0, size):
            raise RunError(
                f"The merged model's logits differ from the run's by up to {difference:.2e} "
                f"(their rms is {size:.2e}), more than rounding explains; nothing was written."
            )
    console = Console()
    shown = printable(str(out), 300)
    console.field("merged", f"{opened.shown} -> {shown}")
    console.field(
        "checked",
        f"largest difference of logits on {len(PROBES)} probe texts: {difference:.1e} "
        f"(rms of the logits: {size:.2f})",
    )
    if requantize:
        moved = (before - trained).abs().max().item()
        console.field("packed", rounding(str(packing(opened.recipe)), moved))
    console.field(
        "next",
        f"transformers.AutoModelForSequenceClassification.from_pretrained({str(out)!r})",
    )


def rounding(kind: str, difference: float) -> str:
    """Say what packing merged weights again changed."""
    return f"in {kind} again, which moves these answers by up to {difference:.1e}"


def require_dtype(dtype: str | None) -> None:
    """Raise `ConfigError` unless a merged model can be written in `dtype`; None is no choice."""
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"There is no dtype {dtype!r} to write in. Fix: use {', '.join(DTYPES)}.")


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest difference, relative to the rms, that rounding in `dtype` explains."""
    return max(FLOAT32, ROUNDINGS * torch.finfo(dtype).eps)


def make_plain(model: nn.Module, dtype: torch.dtype) -> None:
    """Merge the adapter for good and take it off, in place; no weight stays packed.

    A packed weight is unpacked and W + ΔW rounded once to `dtype`, to which all others are cast.

    Raises:
        MergeError: if the adapter cannot be merged.
    """
    deltaw.merge(model, original="none", dtype=dtype if adapts_packed(model) else None)
    deltaw.detach(model)
    if any(storage_of(module) is not None for module in model.modules()):
        deltaw.dequantize(model, dtype)
    if usual_dtype(model) != dtype:
        model.to(dtype)


def _probe(opened: Opened, model: nn.Module) -> Tensor:
    pair = "And this?" if len(opened.recipe.text or ()) == 2 else None
    examples = [Example(text, pair, None, "probe", 0) for text in PROBES]
    rows, _ = encode(opened.tokenizer, examples, opened.recipe.max_length)
    return logits(model, rows, Collator(opened.tokenizer))
