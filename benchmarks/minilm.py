"""deltaw and PEFT side by side on a real encoder: attach, load, switch, merge, and a training step.

Each measurement is one fresh process; the contestants take turns over five rounds. A process
measures every operation several times and reports its fastest, since everything else on the
machine only adds to it; the tables show medians over rounds, and ratios within a round.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import rounds
from benchmarks.results import Results
from benchmarks.tables import median, spread, table
from benchmarks.timing import fastest

TITLE = "deltaw and PEFT on MiniLM"
QUICK = False
CONTESTANTS = ("deltaw", "peft", "full", "frozen")
OPERATIONS = {
    "attach": "attach, all linear layers, r=8",
    "load": "load from disk",
    "switch": "switch between two adapters",
    "merge": "merge",
    "unmerge": "unmerge",
    "step": "training step, 16 x 32 tokens",
}


def run(results: Results) -> None:
    """Measure every contestant in every round."""
    rounds.measure(results, CONTESTANTS)


def report(results: Results) -> str:
    """Return the table of medians and of ratios to deltaw."""
    rows = []
    for key, title in OPERATIONS.items():
        ours, theirs = (rounds.values(results, name, key) for name in ("deltaw", "peft"))
        rows.append(
            (
                title,
                median(ours.values(), 1e3),
                median(theirs.values(), 1e3),
                spread(rounds.ratios(theirs, ours)),
            )
        )
    steps = {name: rounds.values(results, name, "step") for name in CONTESTANTS}
    full, frozen = (
        spread(rounds.ratios(steps[name], steps["deltaw"])) for name in ("full", "frozen")
    )
    return (
        "all-MiniLM-L6-v2 with a classification head, float32, two threads, no dropout. Times in "
        f"milliseconds, medians of {rounds.done(results)} interleaved rounds; ratios are medians "
        "of PEFT's time by deltaw's in the same round, with the smallest and the largest. `frozen` "
        "is the forward and the backward to the activations without any adapter, the floor; "
        "`full` trains every weight.\n\n"
        + table(("", "deltaw", "PEFT", "PEFT / deltaw"), rows)
        + f"\n\nA step of `full` / deltaw's: {full}; of `frozen` / deltaw's: {frozen}."
    )


def measure(name: str) -> dict[str, float]:
    """Return the seconds of every operation for one contestant."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from deltaw.demo.run import model_folder

    torch.set_num_threads(2)

    def make() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=12)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    if name in ("full", "frozen"):
        model = make()
        if name == "frozen":
            model.requires_grad_(False)
            model.classifier.requires_grad_(True)
            model.enable_input_require_grads()
        return {"step": fastest(stepper(model), 12)}
    with tempfile.TemporaryDirectory() as folder:
        return measure_deltaw(make, folder) if name == "deltaw" else measure_peft(make, folder)


def stepper(model: Any) -> Callable[[], None]:
    """Return one training step with AdamW over what is trained."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (16, 32), generator=generator)
    labels = torch.randint(0, 12, (16,), generator=generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()

    return step


def measure_deltaw(make: Callable[[], Any], folder: str) -> dict[str, float]:
    """Measure deltaw."""
    import deltaw

    config = deltaw.LoraConfig(r=8)
    attach = min(fastest(partial(deltaw.attach, make(), config), 1) for _ in range(4))
    model = make()
    deltaw.attach(model, config, "first")
    step = fastest(stepper(model), 12)
    deltaw.save(model, folder, "first")
    names = iter(["second", *(f"more{i}" for i in range(4))])
    load = fastest(lambda: deltaw.load(model, folder, next(names)), 5)
    switch = fastest(
        lambda: (deltaw.activate(model, "second"), deltaw.activate(model, "first")), 20
    )
    merge, unmerge = [], []
    for _ in range(5):
        merge.append(fastest(lambda: deltaw.merge(model), 1))
        unmerge.append(fastest(lambda: deltaw.unmerge(model), 1))
    return {
        "attach": attach,
        "load": load,
        "switch": switch / 2,
        "merge": min(merge),
        "unmerge": min(unmerge),
        "step": step,
    }


def measure_peft(make: Callable[[], Any], folder: str) -> dict[str, float]:
    """Measure PEFT with the same layers, head and scale."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    attach = min(fastest(partial(peft.get_peft_model, make(), config), 1) for _ in range(4))
    model = peft.get_peft_model(make(), config)
    step = fastest(stepper(model), 12)
    model.save_pretrained(folder)
    names = iter(["second", *(f"more{i}" for i in range(4))])
    load = fastest(lambda: model.load_adapter(folder, next(names)), 5)
    switch = fastest(lambda: (model.set_adapter("second"), model.set_adapter("default")), 20)
    merge, unmerge = [], []
    for _ in range(5):
        merge.append(fastest(lambda: model.merge_adapter(["default"]), 1))
        unmerge.append(fastest(lambda: model.unmerge_adapter(), 1))
    return {
        "attach": attach,
        "load": load,
        "switch": switch / 2,
        "merge": min(merge),
        "unmerge": min(unmerge),
        "step": step,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
