"""A merged model that transformers loads alone, checked against the base with its adapter on."""

from typing import Any

import torch
from torch import nn

import deltaw
from deltaw.errors import RunError, printable
from deltaw.export._model import adapted
from deltaw.export._order import Order, Told
from deltaw.export._probing import agreement, answers, largest, probe_tokens, rms
from deltaw.export._source import Source
from deltaw.export._template import turn_end
from deltaw.export._tokenizer import add_tokenizer, tokenizer_of
from deltaw.train.export import ROUNDED, make_plain, rounding, tolerance
from deltaw.train.model import quiet
from deltaw.train.packing import packing
from deltaw.train.repacking import repack
from deltaw.train.stopping import stop_at
from deltaw.unpacking import usual_dtype


def write(order: Order) -> Told:
    """Write the merged weights, both configurations and the tokenizer's files.

    W + ΔW is computed in float32 and rounded once. The written model is loaded again and must
    answer probe tokens as the base with its adapter does, up to the rounding of its dtype. With
    `requantize` W + ΔW is packed again, and the written model must answer as that does.

    Raises:
        RunError: if the base cannot be loaded, or the answers differ by more.
        MergeError: if the adapter cannot be merged, as into weights that are tied.

    Source: Hugging Face transformers.
    """
    source = order.source
    model: Any
    model, dtype = adapted(source, order.dtype)
    computed, device = usual_dtype(model), next(model.parameters()).device
    tokens = probe_tokens(model.config)
    before = answers(model, tokens)
    moved = None if _absorbed(source) else largest(before, _of_base(model, tokens))
    form, instead, rounded = _name(dtype), "try --dtype float32", None
    if order.requantize and source.recipe is not None:
        form, instead = str(packing(source.recipe)), "leave --requantize out"
        repack(model, source.recipe)
        trained, before = before, answers(model, tokens)
        rounded = largest(before, trained)
    else:
        make_plain(model, dtype)
    stops = _stop(model, tokenizer_of(source))
    with quiet():
        model.save_pretrained(order.folder)
        kind = type(model)
        del model
        merged = kind.from_pretrained(order.folder, dtype="auto")
        if rounded is not None:
            deltaw.prepare_quantized(merged)
        merged = merged.to(device).eval()
    difference, size = largest(answers(merged, tokens), before), rms(before)
    allowed = ROUNDED if _rounds_inputs(source) else max(map(tolerance, (dtype, computed)))
    if not difference <= allowed * max(1.0, size):
        raise RunError(
            f"The merged model's answers differ from the adapter's by up to {difference:.2e}, more "
            f"than rounding to {form} explains (their rms is {size:.2e}); nothing was written.\n"
            f"Fix: {instead}, or keep the adapter apart (--to peft)."
        )
    told = {"written": f"{kind.__name__} in {form}"} | stops
    told["checked"] = agreement(difference, tokens, size)
    if rounded is not None:
        told["packed"] = rounding(form, rounded)
        difference = rounded
    if moved is not None:
        told["adapter"] = f"moves these answers by up to {moved:.2g}"
        if difference > moved / 2:
            told["warning"] = (
                f"rounding to {form} takes as much as the adapter gives; {instead}, or keep the "
                "adapter apart (--to peft)"
            )
    told |= add_tokenizer(source, order.folder)
    return told | {"next": f"transformers.{kind.__name__}.from_pretrained({str(order.out)!r})"}


def _of_base(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with deltaw.disabled(model):
        return answers(model, tokens)


def _stop(model: Any, tokenizer: Any) -> Told:
    """Let a model that generates stop where its chat template ends an answer; say so if it is new.

    Servers that hold the base and this adapter apart go by the base's settings alone.
    """
    end = None if tokenizer is None or not model.can_generate() else turn_end(tokenizer)
    if end is None or not stop_at(model, [tokenizer.convert_tokens_to_ids(end)]):
        return {}
    return {"stops": f"at {printable(end)} too, which ends an answer in the chat template"}


def _absorbed(source: Source) -> bool:
    """Tell whether the base's own weights are gone, so that there is nothing to compare with."""
    return source.recipe is not None and source.recipe.absorb


def _rounds_inputs(source: Source) -> bool:
    """Tell whether the model that is merged rounds inputs to 8 bits, which no plain model does."""
    return source.recipe is not None and packing(source.recipe) == "int8"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
