"""The estimate of peak memory against the peak of `deltaw train`, each run in a fresh process.

A case is called `SHAPE/METHOD/ROWSxTOKENS`, with keys of the recipe behind it: `packing`,
`gradient_checkpointing`, `bf16`, `accumulation`; `padded` has rows of different lengths.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import estimates, memory, memory_estimate, rounds
from benchmarks.memory_estimate import GPT2, SHARED
from benchmarks.results import Results

TITLE = "Estimate of peak memory before deltaw train"
QUICK = False
FITTED = ("llama-88m", "smollm2-135m")
"""The shapes whose peaks decided what the model of the heap gives back and what is made once."""
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
)
STEPS = 2
HELD_OUT = 4
RANK = 16
LIMIT = 0.15
WORDS = ("the", "old", "man", "went", "down", "to", "the", "sea", "and", "looked", "at", "ships")


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


def guess(case: str) -> dict[str, float]:
    """Return the estimate of a case, whole and in parts, and the rough bound."""
    from deltaw.language.loading import outline
    from deltaw.language.memory.outlook import outlook

    with tempfile.TemporaryDirectory() as scratch:
        asked = recipe(case, Path(scratch))
        rows, tokens = map(int, case.split("/")[2].split("x"))
        one = outlook(asked, outline(asked).model, [tokens] * rows, [tokens] * HELD_OUT)
        found = one.estimate()
    return {"total": found.total, "bound": one.ceiling(), **found.parts}


def folder_of(shape: str) -> Path:
    """Return a folder with a model of that shape and a tokenizer, written if it is not there."""
    folder = memory_estimate.folder_of(shape)
    if shape != GPT2 and not (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(SHARED / "models" / GPT2).save_pretrained(folder)
    return folder


def recipe(case: str, scratch: Path) -> Any:
    """Return the recipe of a case, its data written to `scratch`."""
    from deltaw.train.recipe import parse

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
    keys = {flag: True for flag in flags if flag not in ("padded", "accumulation")}
    accumulation = 2 if "accumulation" in flags else 1
    return parse(
        {
            "model": str(folder_of(shape)),
            "data": str(write_data(scratch / "data.jsonl", rows, tokens, flags)),
            "task": "sft",
            "output": str(scratch / "run"),
            "batch_size": rows,
            "gradient_accumulation": accumulation,
            "max_length": tokens,
            "too_long": "truncate",
            "max_steps": STEPS,
            "eval_every": STEPS,
            "samples": 0,
            "validation_share": HELD_OUT,
            "learning_rate": 1e-4,
            **settings[method],
            **keys,
        }
    )


def write_data(file: Path, rows: int, tokens: int, flags: list[str]) -> Path:
    """Write texts that are longer than a row, or of different lengths, or parts of one."""
    count = HELD_OUT + 2 * STEPS * rows * (4 if "packing" in flags else 1)
    lines = []
    for number in range(count):
        words = tokens
        if "packing" in flags:
            words = tokens // 5
        elif "padded" in flags:
            words = tokens // (1 + number % 4)
        text = " ".join(WORDS[(number + n * (1 + number % 5)) % len(WORDS)] for n in range(words))
        lines.append(json.dumps({"text": f"{number} {text}"}))
    file.write_text("\n".join(lines) + "\n")
    return file


def measure(case: str) -> dict[str, float]:
    """Return the peak of a run above the process just before it loads the weights."""
    import bitsandbytes  # noqa: F401
    import torch

    from deltaw.language import choosing
    from deltaw.language.training import prepare as preparing

    torch.set_num_threads(1)
    load, found = preparing.load_model, dict[str, float]()

    def noting(*asked: Any) -> Any:
        found["before"] = memory.resident()
        Path("/proc/self/clear_refs").write_text("5")
        return load(*asked)

    preparing.load_model = noting
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
            f"lengths, packed rows several documents. Peaks of {' and '.join(FITTED)} decided what "
            "the model of the heap gives back between steps, and that nothing is added for what "
            "torch makes once; those of other shapes, of which some were known by then, decided "
            "nothing. Each peak was measured once. "
            f"The largest error is {estimates.worst(found):.1%}.",
            estimates.as_table(found, FITTED, "not fitted"),
        ]
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
