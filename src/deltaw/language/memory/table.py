"""The memory of one recipe by the usual methods, as a table."""

from collections.abc import Iterator

from deltaw.analysis.memory.estimate import Estimate, size
from deltaw.errors import DeltawError, printable
from deltaw.language.memory.outlook import Outlook
from deltaw.train.model import shape
from deltaw.train.packing import packing

COLUMNS = {
    "weights": ("weights",),
    "trained": ("adapters", "gradients", "optimiser", "buckets"),
    "batch": ("activations", "logits", "temporaries"),
    "rest": ("allocator", "runtime"),
}
LEGEND = "* this recipe; trained: with gradients and moments; rest: heap, torch"
RANK = 128


def variants(outlook: Outlook) -> Iterator[tuple[str, Outlook, bool]]:
    """Yield name, outlook, and whether it is the recipe's own: full, LoRA, QLoRA, GaLore, own."""
    recipe = outlook.recipe
    own = _kind(outlook)
    dense = {"quantization_bit": None, "absorb": False}
    full = {**dense, "method": "full", "optim": "adamw"}
    rank = min(RANK, max(1, shape(outlook.model.config).width // 4))
    galore = {**full, "optim": "galore_adamw", "galore_rank": rank}
    r = {"r": recipe.r, "method": "lora", "optim": "adamw"}
    packed = {**r, "quantization_bit": 4, "quantization_method": "bnb"}
    others = {"full": full, "LoRA": {**dense, **r}, "QLoRA": packed, "GaLore": galore}
    if recipe.merged:
        del others["QLoRA"]
    for name, changes in others.items():
        mine = name == own
        one = outlook if mine else outlook.with_recipe(**changes)
        yield _named(name, one), one, mine
    if own not in others:
        yield own, outlook, True


def lines(found: list[tuple[str, Estimate | DeltawError, bool]]) -> list[str]:
    """Return the lines of the table; where there is no estimate, the reason."""
    rows = [f"  {'':<13}" + "".join(f"{name:>10}" for name in (*COLUMNS, "in all"))]
    for name, one, mine in found:
        start = f"{'*' if mine else ' '} {name:<13}"
        if isinstance(one, DeltawError):
            reason = printable(str(one).splitlines()[0].rstrip(":"), 200)
            rows.append(f"{start} not estimated: {reason}")
            continue
        parts = [sum(one.parts.get(p, 0) for p in held) for held in COLUMNS.values()]
        rows.append(start + "".join(f"{size(number):>10}" for number in (*parts, one.total)))
    return rows


def _kind(outlook: Outlook) -> str:
    recipe = outlook.recipe
    if recipe.method == "full":
        return "GaLore" if recipe.uses_galore else "full"
    if recipe.method != "lora" or packing(recipe) not in (None, "nf4", "fp4"):
        return f"{recipe.method} {packing(recipe) or ''}".strip()
    return "LoRA" if recipe.quantization_bit is None else "QLoRA"


def _named(name: str, outlook: Outlook) -> str:
    if name == "full":
        return name
    recipe, settings = outlook.recipe, outlook.settings
    r = settings.r if settings is not None and recipe.goes_on else recipe.r
    return f"{name} r={recipe.galore_rank if name == 'GaLore' else r}"
