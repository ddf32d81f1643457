"""The estimate of peak memory against the peak of `deltaw train`, each run in a fresh process.

A case is called `SHAPE/METHOD/ROWSxTOKENS`, with keys of the recipe behind it: `packing`,
`gradient_checkpointing`, `bf16`, `accumulation`; `padded` has rows of different lengths. Rows are
texts, or as one of `labels`, `rated`, `pairs`, `answers` says.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import estimates, memory, memory_estimate, memory_rows, rounds, t5
from benchmarks.memory_estimate import FITTED, GPT2, SHARED
from benchmarks.results import Results

TITLE = "Estimate of peak memory before deltaw train"
QUICK = False
T5 = "t5-60m"
KINDS = {"labels": None, "rated": "kto", "pairs": "dpo"}
"""The tasks of rows that are no texts or answers."""
CASES = (
    f"{GPT2}/lora/4x256",
    f"{GPT2}/full/4x256",
    f"{GPT2}/galore/4x256",
    f"{GPT2}/lora/4x256/packing",
    f"{GPT2}/lora/4x256/padded",
    "tinyllama-4/lora/1x128",
    "tinyllama-4/qlora/1x128",
    "tinyllama-4/full/1x128",
    "tinyllama-4/galore/1x128",
    "llama-88m/lora/2x256",
    "llama-88m/full/2x256",
    "llama-88m/qlora/2x256",
    "llama-88m/galore/2x256",
    "llama-88m/galore-8bit/2x256",
    "llama-88m/lora/2x256/packing",
    "llama-88m/lora/2x256/gradient_checkpointing",
    "llama-88m/lora/2x256/bf16",
    "llama-88m/full/2x256/accumulation",
    "smollm2-135m/lora/1x128",
    "smollm2-135m/qlora/1x128",
    "smollm2-135m/full/1x128",
    "smollm2-135m/galore/1x128",
    "minilm/lora/16x64/labels",
    "minilm/full/16x64/labels",
    "minilm/qlora/16x64/labels",
    "llama-88m/lora/2x256/labels",
    f"{GPT2}/lora/4x256/pairs",
    f"{GPT2}/lora/4x256/rated",
    f"{T5}/lora/4x128/answers",
    f"{T5}/full/4x128/answers",
)
STEPS = 2
HELD_OUT = 4
RANK = 16
LIMIT = 0.15


def run(results: Results) -> None:
    """Measure what is not measured yet, then estimate all of it by the code that there is."""
    for case in CASES:
        key = f"round=0/{case}"
        if key not in results.entries:
            folder_of(case.split("/")[0])
            results.add(key, rounds.in_fresh_process(results.name, case))
            print(key, results.entries[key], flush=True)
    for case in CASES:
        results.add(f"estimate/{case}", guess(case))
        print(case, results.entries[f"estimate/{case}"], flush=True)


class _Known(Exception):
    """Ends a preparation before a weight is read."""


def guess(case: str) -> dict[str, float]:
    """Return the estimate of a case, whole and in parts, and the rough bound."""
    from deltaw.language.choosing import preparation
    from deltaw.train.console import Console

    seen = []

    def note(console: Console, outlook: Any) -> None:
        seen.append(outlook)
        raise _Known

    with tempfile.TemporaryDirectory() as scratch, suppress(_Known):
        asked = recipe(case, Path(scratch))
        preparation(asked, note)(asked, Console(silent=True))
    (one,) = seen
    found = one.estimate()
    return {"total": found.total, "bound": one.ceiling(), **found.parts}


def folder_of(shape: str) -> Path:
    """Return a folder with a model of that shape and a tokenizer, written if it is not there."""
    if shape == "minilm":
        from deltaw.demo.run import model_folder

        return model_folder()
    folder = Path(tempfile.gettempdir()) / "deltaw-memory" / shape
    if shape == T5:
        if not (folder / "config.json").exists():
            t5.save(folder, memory_rows.WORDS)
        return folder
    folder = memory_estimate.folder_of(shape)
    if shape != GPT2 and not (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(SHARED / "models" / GPT2).save_pretrained(folder)
    return folder


def recipe(case: str, scratch: Path) -> Any:
    """Return the recipe of a case, its data written to `scratch`."""
    from deltaw.train.recipe import Recipe, parse

    shape, method, batch, *flags = case.split("/")
    rows, tokens = map(int, batch.split("x"))
    galore = {"galore_rank": memory_estimate.GALORE_RANKS.get(shape, 128)}
    settings: dict[str, dict[str, Any]] = {
        "lora": {"r": RANK},
        "qlora": {"r": RANK, "quantization_bit": 4},
        "full": {"method": "full"},
        "galore": {"method": "full", "optim": "galore_adamw"} | galore,
        "galore-layerwise": {"method": "full", "optim": "galore_adamw_layerwise"} | galore,
        "galore-8bit": {"method": "full", "optim": "galore_adamw_8bit"} | galore,
    }
    keys = {flag: True for flag in flags if flag in Recipe.model_fields}
    (task,) = {KINDS[flag] for flag in flags if flag in KINDS} or {"sft"}
    count = HELD_OUT + 2 * STEPS * rows * (4 if "packing" in flags else 1)
    data = memory_rows.write(scratch / "data.jsonl", count, tokens, flags)
    of_kind: dict[str | None, dict[str, Any]] = {
        None: {"validation_share": HELD_OUT / count},
        "sft": {"validation_share": HELD_OUT, "too_long": "truncate", "samples": 0},
    }
    judged = {"validation_share": HELD_OUT, "too_long": "truncate"}
    return parse(
        {
            "model": str(folder_of(shape)),
            "data": str(data),
            "task": task,
            "output": str(scratch / "run"),
            "batch_size": rows,
            "gradient_accumulation": 2 if "accumulation" in flags else 1,
            "max_length": tokens,
            "max_steps": STEPS,
            "eval_every": STEPS,
            "learning_rate": 1e-4,
            **settings[method],
            **of_kind.get(task, judged),
            **keys,
        }
    )


def measure(case: str) -> dict[str, float]:
    """Return the peak of a run above the process just before it loads the weights."""
    import bitsandbytes  # noqa: F401
    import torch

    from deltaw.language import choosing
    from deltaw.language.training import judging
    from deltaw.language.training import prepare as preparing
    from deltaw.train import prepare as labelling

    torch.set_num_threads(1)
    found = dict[str, float]()

    def noting(load: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*asked: Any, **more: Any) -> Any:
            found["before"] = memory.resident()
            Path("/proc/self/clear_refs").write_text("5")
            return load(*asked, **more)

        return noted

    for module in (judging, preparing, labelling):
        module.load_model = noting(module.load_model)
    with tempfile.TemporaryDirectory() as scratch:
        choosing.train(recipe(case, Path(scratch)))
    status = Path("/proc/self/status").read_text().splitlines()
    (most,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    return found | {"peak": most - found["before"]}


def report(results: Results) -> str:
    """Return the table of estimates and peaks."""
    found = estimates.compared(results, CASES)
    return "\n\n".join(
        [
            "What `deltaw train` and `deltaw check` say of a recipe's memory before they read a "
            "weight, beside the largest resident set of a fresh process that runs `deltaw train` "
            f"on it for {STEPS} steps, with scores of {HELD_OUT} held-out rows before and after "
            "and a checkpoint, less that of the process just before it reads the weights; one "
            "thread, malloc as it comes. Adapters have r=16; padded batches have rows of different "
            f"lengths, packed rows several documents. {' and '.join(FITTED)} alone decided the "
            "constants, and what the model of the heap gives back between steps; the other shapes "
            "check them. Each peak was measured once. "
            f"The largest error is {estimates.worst(found):.1%}.",
            estimates.as_table(found, FITTED, "not fitted"),
        ]
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
