"""The base of a run with its weights packed as the recipe says."""

from collections.abc import Sequence

from torch import nn

import deltaw
from deltaw.errors import RunError
from deltaw.patterns import ends_with
from deltaw.train.placing import fitting, has_room, home, place
from deltaw.train.recipe import Recipe


def packing(recipe: Recipe) -> str | None:
    """Return the kind of `deltaw.quantize` that the recipe asks for, or None."""
    bit = recipe.quantization_bit
    if bit is None:
        return None
    if recipe.quantization_method == "torchao":
        return f"torchao-int{bit}"
    return recipe.quantization_type if bit == 4 else "int8"


def absorbing(recipe: Recipe) -> bool | str:
    """Return the `absorb` of `deltaw.attach` that the recipe asks for.

    Where it is not False the adapter comes before `pack`, which leaves its layers alone.
    """
    return recipe.absorb and (packing(recipe) or True)


def move(model: nn.Module, recipe: Recipe) -> None:
    """Move the base to the GPU before its adapter is made, if there is one with room for it.

    Raises:
        RunError: if it has to be there and does not fit: what was packed is there already, and
            torchao packs int4 for the device that a weight is on, at once if a start is absorbed.
    """
    packed = packing(recipe) is not None and not recipe.absorb
    if packed or has_room(model):
        place(model)
    elif home() is not None and absorbing(recipe) == "torchao-int4":
        raise RunError(
            f"{type(model).__name__} does not fit into the memory of the GPU before it is packed, "
            "which absorb asks for with torchao's int4.\n"
            "Fix: quantization_method=bnb, or leave absorb out."
        )


def pack(model: nn.Module, recipe: Recipe, untrained: Sequence[str]) -> None:
    """Pack the linear layers of the base, on the GPU if there is one, if the recipe asks for it.

    Heads stay as they are, and what is trained in full beside them: `modules_to_save` and, without
    it, what nobody has trained in the base (`untrained`).

    Raises:
        ConfigError: if the package that packs them is not installed.
        TargetError: listing every layer that cannot be packed.
        RunError: if what is packed does not fit into the GPU.
    """
    kind = packing(recipe)
    if kind is None:
        return
    double = recipe.double_quantization if kind in ("nf4", "fp4") else None
    names = recipe.modules_to_save or untrained
    kept = [path for path, _ in model.named_modules() if any(ends_with(path, n) for n in names)]
    with fitting(model):
        deltaw.quantize(
            model, kind, exclude_modules=kept, double_quantization=double, device=home()
        )
