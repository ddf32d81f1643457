"""Changes of a recipe that would make it fit into memory, each with its estimate."""

from collections.abc import Iterator
from dataclasses import replace

from deltaw.analysis.memory.estimate import Estimate, size
from deltaw.errors import DeltawError
from deltaw.language.memory.outlook import Outlook
from deltaw.language.memory.shapes import Batches
from deltaw.train.methods import IN_PLACE

SHORTEST = 64
"""Tokens below which a row is not cut to save memory."""


def fixes(outlook: Outlook, limit: int) -> list[str]:
    """Return each single change that stays below `limit` bytes, or all of them at once."""
    found, last = [], outlook
    for kind in (_smaller_batches, _checkpointing, _halved, _packed, _adapters, _shorter):
        for text, changed in kind(outlook):
            estimated = _estimate(changed) if changed.floor() <= limit else None
            if estimated is not None and estimated.total <= limit:
                found.append(f"{text}, about {size(estimated.total)}")
                break
    if found:
        return found
    texts, least = [], _estimate(outlook)
    for kind in (_smaller_batches, _checkpointing, _adapters, _halved, _packed):
        for text, changed in [*kind(last)][-1:]:
            estimated = _estimate(changed)
            if estimated is not None and (least is None or estimated.total < least.total):
                texts.append(text)
                last, least = changed, estimated
    if not texts or least is None:
        return ["take a smaller model, or a machine with more memory"]
    together = f"{' '.join(texts)}, about {size(least.total)}"
    if least.total <= limit:
        return [together]
    return [f"take a smaller model, or a machine with more memory: even {together}"]


def _estimate(outlook: Outlook) -> Estimate | None:
    try:
        return outlook.estimate()
    except DeltawError:
        return None


def _smaller_batches(outlook: Outlook) -> Iterator[tuple[str, Outlook]]:
    recipe, trained = outlook.recipe, outlook.batches.trained
    size, passes = recipe.batch_size, recipe.gradient_accumulation
    least = {"kto": 2, "dpo": outlook.processes}.get(recipe.task or "", 1)
    while size % (2 * least) == 0:
        size, passes = size // 2, passes * 2
        text = f"batch_size={size} gradient_accumulation={passes}"
        changes = {"batch_size": size, "gradient_accumulation": passes}
        if recipe.updates_in_backward:
            text, changes = f"batch_size={size}", {"batch_size": size}
        batches = replace(outlook.batches, trained=replace(trained, rows=min(trained.rows, size)))
        yield text, outlook.with_recipe(batches, **changes)


def _checkpointing(outlook: Outlook) -> Iterator[tuple[str, Outlook]]:
    if not outlook.recipe.gradient_checkpointing:
        yield "gradient_checkpointing=true", outlook.with_recipe(gradient_checkpointing=True)


def _halved(outlook: Outlook) -> Iterator[tuple[str, Outlook]]:
    recipe = outlook.recipe
    if recipe.quantization_bit is None and not recipe.bf16 and recipe.method not in IN_PLACE:
        yield "bf16=true", outlook.with_recipe(bf16=True)


def _packed(outlook: Outlook) -> Iterator[tuple[str, Outlook]]:
    recipe = outlook.recipe
    if recipe.method == "lora" and recipe.quantization_bit is None and not recipe.merged:
        changes = {"quantization_bit": 4, "absorb": False}
        yield "quantization_bit=4", outlook.with_recipe(**changes)


def _adapters(outlook: Outlook) -> Iterator[tuple[str, Outlook]]:
    if outlook.recipe.method == "full":
        optim = " optim=adamw" if outlook.recipe.optim != "adamw" else ""
        yield f"method=lora{optim}", outlook.with_recipe(method="lora", optim="adamw")


def _shorter(outlook: Outlook) -> Iterator[tuple[str, Outlook]]:
    batches = outlook.batches
    tokens = max(batches.trained.tokens, batches.trained.answers) // 2
    while tokens >= SHORTEST:
        held = (shape and shape.cut(tokens) for shape in (batches.scored, batches.known))
        cut = Batches(batches.trained.cut(tokens), *held)
        yield f"max_length={tokens}", outlook.with_recipe(cut)
        tokens //= 2
