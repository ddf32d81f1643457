"""One line, with its source, for each setting that is unusual for the data at hand."""

from deltaw.train.recipe import Recipe

FEW_ROWS = 1000
MANY_ROWS = 20_000
HIGH_RANK = 64
LARGE_BATCH = 64


def advice(
    recipe: Recipe, rows: int, rate: float, usual_rate: float, *, partial: bool
) -> list[str]:
    """Return the lines, none when nothing is unusual; `partial` adapters leave layers out."""
    lines = []
    if not usual_rate / 5 <= rate <= usual_rate * 5:
        lines.append(
            f"learning_rate={rate:g} is far from the usual {usual_rate:g}; the rate matters more "
            "than any other setting (arXiv 2602.04998)"
        )
    effective = recipe.batch_size * recipe.gradient_accumulation
    if recipe.method == "lora":
        if not recipe.goes_on:
            lines += _adapter_advice(recipe, rows)
        if partial:
            lines.append(
                "target_modules: adapting all linear layers is better than attention alone, also "
                "at equal parameters (arXiv 2305.14314; LoRA Without Regret, 2025)"
            )
        if effective > LARGE_BATCH:
            lines.append(
                f"{effective} rows in a step: large batches cost LoRA more than full fine-tuning "
                "(Thinking Machines, LoRA Without Regret, 2025)"
            )
    return lines


def _adapter_advice(recipe: Recipe, rows: int) -> list[str]:
    lines = []
    if recipe.r > 16 and rows < FEW_ROWS:
        lines.append(
            f"r={recipe.r} for {rows} rows: r=8 or less usually does as well "
            "(arXiv 2106.09685, section 7.2)"
        )
    if recipe.r >= HIGH_RANK and not recipe.use_rslora:
        lines.append(
            f"r={recipe.r}: use_rslora=true keeps a high rank from learning more slowly "
            "(arXiv 2312.03732)"
        )
    ratio = recipe.loraplus_lr_ratio
    if ratio is not None and not 2 <= ratio <= 32:
        lines.append(f"loraplus_lr_ratio={ratio:g}: 4 to 16 is usual (arXiv 2402.12354, section 5)")
    scale = (recipe.lora_alpha or 2 * recipe.r) / recipe.r
    if not 0.5 <= scale <= 4:
        lines.append(
            f"lora_alpha/r = {scale:g}: 1 to 2 is usual (arXiv 2106.09685, 2405.09673); it acts "
            "like a factor on the learning rate"
        )
    if recipe.lora_dropout == 0 and rows < FEW_ROWS:
        lines.append(
            f"lora_dropout=0 for {rows} rows: 0.1 often generalises better on so few "
            "(arXiv 2106.09685, 2305.14314)"
        )
    if recipe.lora_dropout > 0.1 and rows > MANY_ROWS:
        lines.append(
            f"lora_dropout={recipe.lora_dropout:g} with {rows} rows: 0 to 0.1 is usual "
            "(arXiv 2305.14314)"
        )
    if recipe.lora_dropout > 0.3:
        lines.append(
            f"lora_dropout={recipe.lora_dropout:g} is unusually high; 0.05 to 0.1 is usual "
            "(arXiv 2106.09685, 2305.14314)"
        )
    return lines
