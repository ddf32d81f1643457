"""An instruction set from a file of LLaMA-Factory to an adapter that PEFT reads.

books-gpt2-7m learns 1,100 instructions through `deltaw train theirs.yaml`; then `deltaw chat`,
`deltaw eval` and `deltaw export` are run on what came out, and the exported adapter is opened by
PEFT and its logits compared with deltaw's. LoRA and every weight, three seeds. Reads model and
data beside the checkout (`DELTAW_SHARED`); every run that is done is kept.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from benchmarks.tables import table

TITLE = "Instructions end to end, from a file of LLaMA-Factory"
QUICK = False
SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared")
WORK = Path(__file__).parent / ".work" / "instruction"
MODEL = SHARED / "models" / "books-gpt2-7m"
SEEDS = (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
    "LoRA r=16, all linear": {
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_target": "all",
        "learning_rate": 5e-3,
    },
    "full fine-tuning": {"finetuning_type": "full", "learning_rate": 5e-4},
}
RECIPE: dict[str, Any] = {
    "model_name_or_path": str(MODEL),
    "stage": "sft",
    "do_train": True,
    "dataset": "instructions",
    "template": "alpaca",
    "cutoff_len": 256,
    "val_size": 0.1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 60,
    "gradient_checkpointing": False,
    "report_to": "none",
}
QUESTION = "Name three colours of the rainbow."
COMMAND = [sys.executable, "-c", "from deltaw.cli import main; main()"]


def run(results: Results) -> None:
    """Do every run that is not done yet."""
    for name in METHODS:
        for seed in SEEDS:
            if key(name, seed) not in results.entries:
                entry = end_to_end(name, seed)
                results.add(key(name, seed), entry)
                print(key(name, seed), entry, flush=True)


def key(name: str, seed: int) -> str:
    """Return under what name the entry of a run is kept."""
    return f"{name}/seed={seed}"


def end_to_end(name: str, seed: int) -> dict[str, Any]:
    """Train, talk, evaluate, export, and open with the other library; return what was seen."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run = WORK / "run"
    deltaw("train", str(_recipe(name, seed)))
    found = json.loads((run / "results.json").read_text())
    scored = deltaw("eval", str(run))
    talk = deltaw("chat", str(run), "--max-new-tokens", "40", typed=f"{QUESTION}\n/base\n")
    before, after = (found[moment]["values"] for moment in ("before", "after"))
    if f"{after['loss']:.3f}" not in scored:
        raise AssertionError(f"deltaw eval says something else than training:\n{scored}")
    entry = {
        "loss": [before["loss"], after["loss"]],
        "tokens_right": [before["tokens_right"], after["tokens_right"]],
        "trainable": found["trainable_parameters"],
        "bytes": found["weights_bytes"],
        "talk": talk.splitlines()[1:],
    }
    if name.startswith("LoRA"):
        deltaw("export", str(run), str(WORK / "hf"), "--to", "hf", "--dtype", "float32")
        deltaw("export", str(run), str(WORK / "peft"), "--to", "peft")
        entry["logits"] = _differences()
    else:
        deltaw("merge", str(run), str(WORK / "hf"))
    return entry


def deltaw(*words: str, typed: str = "") -> str:
    """Run a command as a user would and return what it printed."""
    done = subprocess.run(
        [*COMMAND, *words], input=typed, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"deltaw {' '.join(words)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def report(results: Results) -> str:
    """Return the table of losses, and how far the exported adapter is from what was trained."""
    rows = []
    for name in METHODS:
        entries = [e for seed in SEEDS if (e := results.entries.get(key(name, seed)))]
        if len(entries) == len(SEEDS):
            rows.append(
                (
                    name,
                    f"{entries[0]['trainable']:,}",
                    f"{entries[0]['bytes'] / 1e6:.1f} MB",
                    _mean([entry["loss"][0] for entry in entries]),
                    _mean([entry["loss"][1] for entry in entries]),
                    _mean([entry["tokens_right"][1] for entry in entries]),
                )
            )
    logits = [e["logits"] for e in results.entries.values() if "logits" in e]
    parts = [
        "`deltaw train` with an unchanged file of LLaMA-Factory, then `chat`, `eval` and `export`, "
        f"each as its own command: {RECIPE['num_train_epochs']} epochs of 988 instructions, 112 "
        "held out (drawn by the seed), template alpaca; loss in nats per learnt token, mean ± "
        f"standard error of {len(SEEDS)} seeds. The rates were not searched: the two lines show "
        "that the way works, not which method is better.",
        table(
            ("method", "trained", "file", "loss before", "loss after", "tokens right"),
            rows,
        ),
    ]
    if logits:
        parts.append(
            "Largest difference of logits to the run opened by deltaw, beside it, in float32: "
            f"exported with `--to peft` and opened by PEFT {max(x['peft'] for x in logits):.1e}, "
            f"merged with `--to hf` and opened by transformers {max(x['hf'] for x in logits):.1e} "
            f"(logits up to {max(x['largest'] for x in logits):.0f})."
        )
    return "\n\n".join(parts)


def _recipe(name: str, seed: int) -> Path:
    """Write the file as LLaMA-Factory reads it, with the list of data sets it names."""
    import yaml

    data = SHARED / "data" / "instruct_rasbt" / "instruction-data.json"
    (WORK / "dataset_info.json").write_text(json.dumps({"instructions": {"file_name": str(data)}}))
    places = {"dataset_dir": str(WORK), "output_dir": str(WORK / "run"), "seed": seed}
    file = WORK / "theirs.yaml"
    file.write_text(yaml.safe_dump(RECIPE | METHODS[name] | places))
    return file


def _differences() -> dict[str, float]:
    """Return the largest differences of logits between deltaw's run and the two exports."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltaw.language.use.opened import open_language

    tokenizer = AutoTokenizer.from_pretrained(WORK / "run")
    ids = tokenizer(f"### Instruction:\n{QUESTION}\n\n### Response:\n", return_tensors="pt")

    def logits(model: Any) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids["input_ids"]).logits
        return found

    ours = logits(open_language(WORK / "run").model)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    theirs = logits(PeftModel.from_pretrained(base, WORK / "peft"))
    merged = logits(AutoModelForCausalLM.from_pretrained(WORK / "hf", dtype=torch.float32))
    return {
        "peft": float((ours - theirs).abs().max()),
        "hf": float((ours - merged).abs().max()),
        "largest": float(ours.abs().max()),
    }


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"
