"""Which keys of a recipe are read, by its method and by its optimiser."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from deltaw.errors import ConfigError, printable, raise_all
from deltaw.train import schedules
from deltaw.train.keys import ANSWERS, JUDGED, LABELLED, LANGUAGE, PREFERENCES, RATED

if TYPE_CHECKING:
    from deltaw.train.recipe import Recipe, Task

LOW_RANK = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "enable_lora",
    "lora_dropout",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "absorb",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "loraplus_lr_ratio",
    "loraplus_lr_embedding",
)
OF_ADAPTER = (
    *[key for key in LOW_RANK if not key.startswith("loraplus")],
    "modules_to_save",
    "trainable_token_indices",
)
"""Keys that an adapter which is trained on has settings of its own for."""
GALORE = (
    "galore_rank",
    "galore_update_interval",
    "galore_scale",
    "galore_proj_type",
    "galore_exact_svd",
    "galore_target",
)
QUANTIZATION = ("quantization_type", "double_quantization", "quantization_method")
"""Keys that say how the weights are packed which `quantization_bit` asks for."""
SMOOTHED = ("sigmoid", "robust", "exo_pair")
"""The losses of preferences that read `dpo_label_smoothing`."""
READERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LOW_RANK, ("lora",)),
    **dict.fromkeys(("optim", *GALORE), ("full", "freeze")),
    "adapter": ("lora", "full", "freeze"),
    "create_new_adapter": ("lora",),
    "trainable_token_indices": ("lora",),
    "quantization_bit": ("lora", "head", "bitfit", "layernorm"),
    "modules_to_save": ("lora", "head", "bitfit", "layernorm"),
    "last_layers": ("freeze",),
}
"""Which methods read a key; those not listed are read by all."""


def without_effect(recipe: "Recipe") -> list[str]:
    """Return what is wrong with every value that nothing would read."""
    changed = recipe.changed
    unread = {
        key: f"{key}={printable(repr(changed[key]))} has no effect with method={recipe.method}, "
        f"only with {' or '.join(readers)}; leave it out, or did you mean method={readers[0]}?"
        for key, readers in READERS.items()
        if key in changed and recipe.method not in readers
    }
    left = changed.keys() - unread
    return [
        *unread.values(),
        *_unread_by_task(recipe, left),
        *_unread_by_optimizer(recipe, left),
        *schedules.unread(recipe, left),
        *_unread_of_pace(recipe, left),
        *_unread_of_order(recipe),
        *_unread_of_packing(recipe, left),
        *_unread_of_start(recipe, left),
        *_unread_of_smoothing(recipe, left),
        *_unread_of_adapter(recipe, left),
    ]


def refuse_unread(recipe: "Recipe", task: "Task") -> None:
    """Raise `ConfigError` listing the values that nothing reads where the data are for `task`."""
    raise_all(
        ConfigError,
        f"The data are for {task}, and the recipe asks for something else:",
        without_effect(recipe.model_copy(update={"task": task})),
        "or say task=sft if a language model is to learn these rows.",
    )


def _unread_by_task(recipe: "Recipe", changed: set[str]) -> Iterator[str]:
    """Yield what the task does not read, once it is known."""
    if recipe.task is None:
        return
    readers = dict.fromkeys(LABELLED, ("classification", "regression"))
    readers |= dict.fromkeys(LANGUAGE, ("sft", "dpo", "kto"))
    readers |= dict.fromkeys(JUDGED, ("dpo", "kto")) | dict.fromkeys(ANSWERS, ("sft",))
    readers |= dict.fromkeys(PREFERENCES, ("dpo",)) | dict.fromkeys(RATED, ("kto",))
    for key, tasks in readers.items():
        if key in changed and recipe.task not in tasks:
            value = printable(repr(getattr(recipe, key)))
            yield (
                f"{key}={value} has no effect with task={recipe.task}, only with "
                f"task={' or '.join(tasks)}; leave it out"
            )
    if recipe.is_language and recipe.method == "head":
        yield "method=head trains the new head of a classifier, and a language model has none"


def _unread_of_smoothing(recipe: "Recipe", changed: set[str]) -> Iterator[str]:
    """Yield a smoothing that the loss of preferences does not read, or lacks."""
    if "dpo_label_smoothing" in changed and recipe.pref_loss not in SMOOTHED:
        yield (
            f"dpo_label_smoothing={recipe.dpo_label_smoothing:g} has no effect with "
            f"pref_loss={recipe.pref_loss}, only with {' or '.join(SMOOTHED)}; leave it out"
        )
    if "simpo_gamma" in changed and recipe.pref_loss != "simpo":
        yield (
            f"simpo_gamma={recipe.simpo_gamma:g} has no effect with pref_loss={recipe.pref_loss}, "
            "only with simpo; leave it out"
        )
    if recipe.pref_loss == "exo_pair" and "dpo_label_smoothing" not in changed:
        yield "pref_loss=exo_pair needs dpo_label_smoothing above 0; its paper has 0.001"


def _unread_of_adapter(recipe: "Recipe", changed: set[str]) -> Iterator[str]:
    """Yield what the adapters that a run begins with decide themselves, or do not go with."""
    if recipe.create_new_adapter and recipe.adapter is None:
        yield "create_new_adapter=True has no effect without adapter; leave it out"
    if recipe.goes_on:
        for key in OF_ADAPTER:
            if key in changed:
                value = printable(repr(getattr(recipe, key)))
                yield (
                    f"{key}={value} has no effect with adapter, whose own settings hold while it "
                    "is trained on; leave it out, or give create_new_adapter=true"
                )
    if not recipe.merged:
        return
    for key in ("quantization_bit", "absorb"):
        if getattr(recipe, key):
            yield (
                f"{key} does not go with adapters that are merged first, as all are but one that "
                "is trained on; write the model with them by deltaw export RUN OUT --to hf, and "
                "give OUT as model"
            )


def _unread_of_start(recipe: "Recipe", changed: set[str]) -> Iterator[str]:
    """Yield what a start cannot be absorbed into, and what there is no such start for."""
    if not changed & {"absorb", "init_lora_weights"}:
        return
    from deltaw.inits import at_zero, kind_of  # imports torch

    init = recipe.init_lora_weights
    shown = f"init_lora_weights={printable(repr(init))}"
    if recipe.absorb and at_zero(init):
        yield (
            f"absorb=True has no effect with {shown}, whose B0 A0 is zero; leave it out, or use "
            "pissa, milora, olora, lora_ga or loftq"
        )
    if kind_of(init) == "from_packed" and not (recipe.absorb and recipe.quantization_bit):
        yield f"{shown} makes up for packing: it needs quantization_bit and absorb=true"
    if recipe.absorb and not recipe.double_quantization:
        yield "double_quantization=False does not go with absorb, which packs the scales too"


def _unread_of_pace(recipe: "Recipe", changed: set[str]) -> Iterator[str]:
    """Yield steps between evaluations where epochs are asked for."""
    if recipe.eval_each_epoch and "eval_every" in changed:
        yield (
            f"eval_every={recipe.eval_every} has no effect with eval_each_epoch=True; keep one of "
            "them"
        )


def _unread_of_order(recipe: "Recipe") -> Iterator[str]:
    """Yield an order that packed rows, or good and bad answers, cannot keep."""
    if not recipe.shuffle and recipe.packing:
        yield "shuffle=False does not go with packing=True, which puts rows together by length"
    if not recipe.shuffle and recipe.task == "kto":
        yield "shuffle=False does not go with task=kto, whose batches mix good and bad answers"


def _unread_of_packing(recipe: "Recipe", changed: set[str]) -> Iterator[str]:
    """Yield what says how weights are packed where none are, or not in that way."""
    bit, method = recipe.quantization_bit, recipe.quantization_method
    if recipe.bf16 and (bit, method) == (8, "bnb"):
        yield (
            "bf16=True would round the biases of the layers that bitsandbytes keeps in 8 bits; "
            "leave it out, or use quantization_method=torchao"
        )
    if bit is None:
        readers, keys = "quantization_bit", QUANTIZATION
    elif (bit, method) != (4, "bnb"):
        readers, keys = "quantization_bit=4 and quantization_method=bnb", QUANTIZATION[:2]
    else:
        return
    for key in keys:
        if key in changed:
            value = printable(repr(getattr(recipe, key)))
            yield f"{key}={value} has no effect, only with {readers}; leave it out"


def _unread_by_optimizer(recipe: "Recipe", changed: set[str]) -> Iterator[str]:
    if recipe.loraplus_lr_ratio is None and "loraplus_lr_embedding" in changed:
        yield "loraplus_lr_embedding has no effect without loraplus_lr_ratio"
    for key in GALORE:
        if key in changed and not recipe.uses_galore:
            yield f"{key} has no effect with optim={recipe.optim}; did you mean optim=galore_adamw?"
    for key in ("gradient_accumulation", "max_grad_norm"):
        if key in changed and recipe.updates_in_backward:
            yield (
                f"{key} has no effect with optim={recipe.optim}, which updates each weight in "
                "every backward pass; leave it out, or did you mean optim="
                f"{recipe.optim.removesuffix('_layerwise')}?"
            )
