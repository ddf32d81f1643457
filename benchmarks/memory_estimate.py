"""The estimate of peak memory against the peak of the Trainer, each run in a fresh process.

A case is called `SHAPE/METHOD/ROWSxTOKENS`, with `/checkpointing` or `/fused` behind it. Models are
loaded from files, in float32, as `from_pretrained` does; GPT-2's are bfloat16 and are converted.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import estimates, memory, rounds, shapes
from benchmarks.results import Results

TITLE = "Estimate of peak memory before training"
QUICK = False
SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared")
GPT2 = "books-gpt2-7m"
FITTED = ("llama-88m", "smollm2-135m")
"""The shapes whose peaks decide the constants; the others' peaks only check them."""
CASES = (
    f"{GPT2}/lora/2x128",
    f"{GPT2}/full/2x128",
    f"{GPT2}/galore/2x128",
    f"{GPT2}/lora/4x256",
    f"{GPT2}/lora/4x256/checkpointing",
    "tinyllama-4/lora/1x128",
    "tinyllama-4/qlora/1x128",
    "tinyllama-4/full/1x128",
    "tinyllama-4/galore/1x128",
    "llama-88m/lora/1x128",
    "llama-88m/lora/2x256",
    "llama-88m/qlora/1x128",
    "llama-88m/full/1x128",
    "llama-88m/galore/1x128",
    "llama-88m/galore-layerwise/1x128",
    "llama-88m/lora/2x256/checkpointing",
    "llama-88m/lora/2x256/fused",
    "smollm2-135m/lora/1x128",
    "smollm2-135m/qlora/1x128",
    "smollm2-135m/full/1x128",
    "smollm2-135m/galore/1x128",
)
REPEATED = (f"{GPT2}/lora/4x256", f"{GPT2}/full/2x128", "tinyllama-4/lora/1x128")
"""The cases that are measured in every round, for the spread."""
ROUNDS = 3
STEPS = 3
RANK = 16
GALORE_RANKS = {GPT2: 64, "tiny": 8}
LIMIT = 0.15


def run(results: Results) -> None:
    """Measure what is not measured yet, then estimate all of it by the code that there is."""
    for number in range(ROUNDS):
        for case in CASES if number == 0 else REPEATED:
            key = f"round={number}/{case}"
            if key not in results.entries:
                folder_of(case.split("/")[0])
                results.add(key, rounds.in_fresh_process(results.name, case))
                print(key, results.entries[key], flush=True)
    for case in CASES:
        results.add(f"estimate/{case}", guess(case))
        print(case, results.entries[f"estimate/{case}"], flush=True)


def folder_of(shape: str) -> Path:
    """Return a folder with a model of that shape, written if it is not there."""
    if shape == GPT2:
        return SHARED / "models" / GPT2
    folder = Path(tempfile.gettempdir()) / "deltaw-memory" / shape
    if not (folder / "config.json").exists():
        shapes.build(shape, "float32").save_pretrained(folder)
    return folder


def training(case: str) -> Any:
    """Return what is trained in a case."""
    import deltaw
    from deltaw.analysis.memory import Training

    shape, method, batch, *flags = case.split("/")
    rows, tokens = map(int, batch.split("x"))
    return Training(
        method=method.removesuffix("-layerwise"),
        rows=rows,
        tokens=tokens,
        adapter=deltaw.LoraConfig(r=RANK),
        dtype="float32",
        checkpointing="checkpointing" in flags,
        fuse_loss="fused" in flags,
        fuse_blocks="fused" in flags,
        galore_rank=GALORE_RANKS.get(shape, 128),
        layerwise=method.endswith("-layerwise"),
    )


def guess(case: str) -> dict[str, float]:
    """Return the estimate of a case, whole and in parts."""
    from deltaw.analysis.memory import estimate

    found = estimate(folder_of(case.split("/")[0]), training(case))
    return {"total": found.total, **found.parts}


def measure(case: str) -> dict[str, float]:
    """Return the peak above the process that has imported everything, of loading and training."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import torch
    import torch._dynamo
    import transformers
    from transformers import Trainer  # noqa: F401
    from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from deltaw import attaching, blocks, fusing, quantizing
    from deltaw.optim import galore

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    shape, asked = case.split("/")[0], training(case)
    imported = memory.resident()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of(shape), dtype=torch.float32)
    model.config.use_cache = False
    read(model)
    if asked.method == "qlora":
        quantizing.quantize(model)
    optimizer = None
    if asked.method == "galore":
        groups = galore.groups(model, asked.galore_rank)
        optimizer = galore.GaLoreAdamW(groups, lr=1e-4, layerwise=asked.layerwise)
    elif not asked.trains_all:
        attaching.attach(model, asked.adapter)
    if asked.fuse_loss:
        fusing.fuse_loss(model)
        blocks.fuse_blocks(model)
    train(model, asked, optimizer)
    return {"peak": memory.peak() - imported}


def read(model: Any) -> None:
    """Read every weight once, as a long run does; files are mapped and read where needed."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()


def train(model: Any, asked: Any, optimizer: Any) -> None:
    """Train a few steps by the Trainer."""
    import torch
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    size = STEPS * asked.rows, asked.tokens
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator)
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=asked.rows,
        max_steps=STEPS,
        use_cpu=True,
        gradient_checkpointing=asked.checkpointing,
        max_grad_norm=0.0 if asked.layerwise else 1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()


def report(results: Results) -> str:
    """Return the table of estimates and peaks."""
    found = estimates.compared(results, CASES)
    spreads = [
        (max(several) - min(several)) / statistics.median(several)
        for case in REPEATED
        if len(several := estimates.peaks(results, case)) > 1
    ]
    again = f"Measured again, peaks differ by up to {max(spreads):.1%}. " if spreads else ""
    return "\n\n".join(
        [
            "`deltaw.analysis.memory.estimate` reads the configuration and the headers of the "
            "weights, and says the peak memory of training before anything is loaded. Beside it is "
            "the largest resident set of a fresh process that loads the model in float32 and "
            f"trains it by transformers' Trainer for {STEPS} steps, less that of the process with "
            "everything imported; one thread, malloc as it comes. Every weight is read once, as a "
            f"long run does. Adapters have r={RANK}; fused are loss and blocks. The "
            f"constants were fitted to {' and '.join(FITTED)} alone, as another table shows; the "
            f"other shapes check them. {again}The largest error is {estimates.worst(found):.1%}.",
            estimates.as_table(found, FITTED, "checked"),
        ]
    )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
