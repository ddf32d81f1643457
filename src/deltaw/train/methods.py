"""What each `method` trains: adapters beside frozen weights, or the weights themselves."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deltaw
from deltaw.calibrating import Loss
from deltaw.config import LoraConfig
from deltaw.errors import RunError
from deltaw.heads import new_heads
from deltaw.inits import from_data, kind_of
from deltaw.optim.layerwise import blocks
from deltaw.patterns import within
from deltaw.plans import Plan
from deltaw.train.continuing import (
    ADAPTER,
    Adapted,
    digests,
    go_on,
    merge_adapters,
    read_adapters,
    require_one,
)
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable
from deltaw.train.optimizer import movement
from deltaw.train.packing import absorbing, move, pack
from deltaw.train.recipe import Recipe

IN_PLACE = frozenset({"full", "freeze"})
"""Methods that change the model's own weights; the others are adapters."""

NORMS = ("LayerNorm", "RMSNorm")
"""How the names of normalisations end, torch's and those that models bring along."""


def lora_config(recipe: Recipe) -> LoraConfig:
    """Return the settings of the adapter that the recipe asks for.

    `head` trains new heads alone, `bitfit` heads and every bias, `layernorm` heads and every
    normalisation, which only the model can name.

    Raises:
        ConfigError: if a setting is out of range, or there is no such start.

    Source: BitFit, arXiv 2106.10199; LayerNorm tuning, arXiv 2312.11420.
    """
    if recipe.method == "lora":
        kind_of(recipe.init_lora_weights)
        return LoraConfig(
            r=recipe.r,
            lora_alpha=recipe.lora_alpha,
            target_modules=recipe.target_modules,
            target_parameters=recipe.target_parameters,
            exclude_modules=recipe.exclude_modules,
            enable_lora=recipe.enable_lora,
            lora_dropout=recipe.lora_dropout,
            bias=recipe.bias,
            use_rslora=recipe.use_rslora,
            use_dora=recipe.use_dora,
            modules_to_save=recipe.modules_to_save,
            trainable_token_indices=recipe.trainable_token_indices,
            init_lora_weights=recipe.init_lora_weights,
            layers_to_transform=recipe.layers_to_transform,
            layers_pattern=recipe.layers_pattern,
            rank_pattern=recipe.rank_pattern,
            alpha_pattern=recipe.alpha_pattern,
            lora_bias=recipe.lora_bias,
            task_type="CAUSAL_LM" if recipe.is_language else "SEQ_CLS",
            revision=recipe.revision,
        )
    return LoraConfig(
        target_modules=[],
        bias="all" if recipe.method == "bitfit" else "none",
        modules_to_save=recipe.modules_to_save,
        task_type="CAUSAL_LM" if recipe.is_language else "SEQ_CLS",
        revision=recipe.revision,
    )


def prepare(
    model: nn.Module,
    recipe: Recipe,
    untrained: Sequence[str] = (),
    data: Iterable[Any] = (),
    loss: Loss | None = None,
) -> tuple[str, tuple[str, ...]]:
    """Freeze and adapt `model` as the method asks; return what is trained as text, and warnings.

    The adapter's start is drawn from the recipe's seed, whatever else was drawn before. What
    nobody has trained in the base (`untrained`) belongs to the new head and is trained in full,
    unless `modules_to_save` leaves it out. `data` and `loss` are for the starts from data.

    Raises:
        RunError: if the method needs layers or biases that the model does not have.
        TargetError: if the recipe names modules that it does not have.
    """
    if recipe.method == "full":
        model.requires_grad_(True)
        return "every weight" + movement(recipe), ()
    if recipe.method == "freeze":
        return thaw_last(model, recipe.last_layers) + movement(recipe), ()
    if recipe.method == "bitfit" and not any(n.endswith("bias") for n, _ in _base(model)):
        raise RunError(
            f"method=bitfit trains biases, and {type(model).__name__} has none below its head.\n"
            "Fix: use method=head for the head alone, or method=lora."
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    random = {name for name, _ in model.named_parameters() if within(name, untrained)}
    config = lora_config(recipe)
    if recipe.is_language and model.config.is_encoder_decoder:  # type: ignore[union-attr]
        config = replace(config, task_type="SEQ_2_SEQ_LM")
    norms = norms_of(model) if recipe.method == "layernorm" else []
    if (untrained or norms) and config.modules_to_save is None:
        config = replace(config, modules_to_save=[*new_heads(model), *untrained])
    if norms:
        config = replace(config, modules_to_save=[*(config.modules_to_save or ()), *norms])
    measured = from_data(config.init_lora_weights)
    plan = deltaw.attach(
        model,
        config,
        ADAPTER,
        generator=generator,
        data=data if measured else None,
        loss=loss if measured else None,
        absorb=absorbing(recipe),
    )
    assert plan is not None
    left = random - {f"{row.path}.{name}" for row in plan.trained for name in row.names}
    absorbed = ", the start absorbed into the weights" * recipe.absorb
    return count_kinds(plan) + absorbed + movement(recipe), (
        *plan.warnings,
        *(_fate(path, left) for path in untrained),
    )


def weight_dtype(recipe: Recipe) -> torch.dtype:
    """Return bfloat16 for weights that stay frozen where the recipe computes in it, or float32."""
    frozen = recipe.method not in IN_PLACE
    return torch.bfloat16 if recipe.bf16 and frozen else torch.float32


def adapt(
    model: nn.Module,
    recipe: Recipe,
    untrained: Sequence[str] = (),
    data: Iterable[Any] = (),
    loss: Loss | None = None,
) -> Adapted:
    """Pack the weights as the recipe says and `prepare` the model, in the order that it asks for.

    Adapters that the run begins with are merged, or trained on, first. A start that is absorbed is
    taken out of the full weights, and what is left of them is packed. All is done on the GPU where
    there is one with room for it.

    Raises:
        RunError: what `prepare` raises, or if the GPU has no room, or adapters that are merged
            could not be saved with the one that is trained.
        FormatError, MergeError: if one of them does not fit the model, or cannot be merged.
    """
    states = read_adapters(model, recipe)
    merged = states[: len(recipe.merged)]
    merge_adapters(model, merged)
    chosen: dict[str, list[str] | None] = {}
    if recipe.goes_on:
        chosen = {"modules_to_save": states[-1].config.modules_to_save}
        recipe = recipe.model_copy(update=chosen)
    if not recipe.absorb:
        pack(model, recipe, untrained)
    move(model, recipe)
    if recipe.goes_on:
        said, warnings = go_on(model, recipe, states[-1]) + movement(recipe), ()
    else:
        said, warnings = prepare(model, recipe, untrained, _beside(model, data), loss)
    if recipe.absorb:
        pack(model, recipe, untrained)
    if merged and recipe.method not in IN_PLACE:
        require_one(merged, deltaw.capture(model, ADAPTER))
    if merged:
        said += f", with {counted(len(merged), 'adapter')} merged into the weights first"
    kept = () if recipe.method in IN_PLACE else tuple(merged)
    return Adapted(said, (*warnings, *_precision(recipe)), kept, chosen, digests(states))


def restore(model: nn.Module, recipe: Recipe, folder: Path, untrained: Sequence[str] = ()) -> None:
    """Pack the weights as the recipe says and put the adapter in `folder` on them.

    The order is that of `adapt`, so that they are the weights that the adapter was trained on.

    Raises:
        RunError: if the GPU has no room.
        FormatError: if the adapter's file is damaged or does not fit the base.
    """
    if not recipe.absorb:
        pack(model, recipe, untrained)
    move(model, recipe)
    deltaw.load(model, folder, ADAPTER, absorb=absorbing(recipe))
    if recipe.absorb:
        pack(model, recipe, untrained)


def _precision(recipe: Recipe) -> list[str]:
    """Return a warning where the GPU would do better in another dtype."""
    if recipe.bf16 or not torch.cuda.is_available():
        return []
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return []
    return [
        "float32 takes several times the time and twice the memory of bfloat16 on this GPU.\n"
        "Fix: bf16=true"
    ]


def _beside(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches on the device of the model."""
    for batch in batches:
        device = next(model.parameters()).device
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def norms_of(model: nn.Module) -> list[str]:
    """Return the paths of the base's normalisations; raise `RunError` if there are none."""
    heads = new_heads(model)
    found = [
        path
        for path, module in model.named_modules()
        if type(module).__name__.endswith(NORMS) and not within(path, heads)
    ]
    if not found:
        raise RunError(
            f"method=layernorm trains normalisations, and {type(model).__name__} has none below "
            "its head.\nFix: use method=head for the head alone, or method=lora."
        )
    return found


def _base(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    heads = new_heads(model)
    return [(name, p) for name, p in model.named_parameters() if not within(name, heads)]


def _fate(path: str, left: set[str]) -> str:
    """Return what becomes of an untrained part of the base; of `left` nothing is trained."""
    fate = "it is trained in full like the head"
    if any(within(name, [path]) for name in left):
        fate = "it is not trained in full now; add it to modules_to_save"
    return (
        f"{printable(path)} was never trained (the weights lack it, or its bias is still zero): "
        f"{fate}"
    )


def count_kinds(plan: Plan) -> str:
    """Return `37 x linear at r=8 (query, key, ...)` and the modules trained in full."""
    kinds = Counter((target.kind, target.r) for target in plan.targets)
    parts = [f"{count} x {kind} at r={r}" for (kind, r), count in kinds.items()]
    names = list(dict.fromkeys(target.name.rsplit(".", 1)[-1] for target in plan.targets))
    if names:
        parts[-1] += f" ({', '.join(printable(name) for name in names)})"
    full = [printable(row.path) for row in plan.trained]
    if full:
        shown = ", ".join(full[:3]) + (", ..." if len(full) > 3 else "")
        parts.append(f"{len(full)} x trained in full ({shown})")
    return " and ".join(parts)


def thaw_last(model: nn.Module, k: int) -> str:
    """Freeze all but the last `k` blocks and what comes after them."""
    layers = blocks(model)
    if k > len(layers):
        raise RunError(f"last_layers={k}, but the model has {len(layers)} layers.")
    model.requires_grad_(False)
    base = getattr(model, "base_model", model)
    inside = {id(p) for p in base.parameters()}
    after = {id(p) for name, p in base.named_parameters() if name.startswith("pooler.")}
    for layer in layers[len(layers) - k :]:
        layer.requires_grad_(True)
    for parameter in model.parameters():
        if id(parameter) not in inside or id(parameter) in after:
            parameter.requires_grad_(True)
    return f"the last {k} of {len(layers)} layers and the head"
