"""What `benchmarks.e2e` trains and how it is scored: one run of a small GPT-2 on E2E NLG."""

import csv
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared")
ROWS, BATCH = 8000, 8
WARMUP = 0.1
SMOOTHING, DECAY = 0.1, 0.01
HELD_OUT = 400
"""Rows of the training file, of other meanings than those trained on, that choose the rate."""
BOOKS, WINDOW = 66, 256
"""How many windows of the books are scored, of how many tokens."""
TOKENS, BEAMS = 80, 4
METRICS = ("BLEU", "NIST", "ROUGE-L")
Text = tuple[str, str]
"""What is to be said, and a sentence that says it."""


@dataclass(frozen=True)
class Data:
    """Rows to train on and to choose rates by, what is asked with all its answers, and books."""

    train: list[Text]
    held_out: list[Text]
    asked: dict[str, list[str]]
    books: list[str]


def read() -> Data:
    """Read rows for training, others of other meanings, the development set, and books."""
    folder = SHARED / "data" / "e2e_nlg"
    rows = _rows(folder / "trainset.csv")
    random.Random(0).shuffle(rows)
    held_out = rows[:HELD_OUT]
    known = {meaning for meaning, _ in held_out}
    train = [row for row in rows[HELD_OUT:] if row[0] not in known][:ROWS]
    asked: dict[str, list[str]] = {}
    for meaning, sentence in _rows(folder / "devset.csv"):
        asked.setdefault(meaning, []).append(sentence)
    files = sorted((SHARED / "data" / "books_valid").glob("*.txt"))
    size = 5 * WINDOW  # characters, of which a window's tokens take about two thirds
    books = []
    for file in files:
        text = file.read_text("utf-8")
        step = len(text) // (BOOKS // len(files) + 1)
        books += [text[step * n : step * n + size] for n in range(1, BOOKS // len(files) + 1)]
    return Data(train, held_out, asked, books)


def _rows(path: Path) -> list[Text]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(spelt(row["mr"]), row["ref"]) for row in csv.DictReader(file)]


def spelt(meaning: str) -> str:
    """Return `eatType[pub], near[Burger King]` as `eat type: pub; near: Burger King`."""
    parts = re.findall(r"(\w[\w ]*)\[([^\]]*)\]", meaning)
    return "; ".join(
        f"{re.sub('[A-Z]', lambda found: ' ' + found[0].lower(), name)}: {value}"
        for name, value in parts
    )


def load() -> Any:
    """Return the model, its tokenizer and how rows are encoded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltaw.language.encoding.encoder import Encoder
    from deltaw.language.encoding.templating import choose, ends
    from deltaw.language.generating import Speaker

    torch.set_num_threads(1)
    folder = SHARED / "models" / "books-gpt2-7m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(tokenizer, choose(tokenizer, None).template, WINDOW, ends(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Speaker(model, tokenizer, encoder)


def choose_weights(model: Any, name: str) -> None:
    """Let only those weights train that the method trains."""
    import deltaw
    from deltaw.train.methods import thaw_last

    if name == "last2":
        thaw_last(model, 2)
    elif name == "lora_qv":
        slices = [True, False, True]
        deltaw.attach(
            model,
            deltaw.LoraConfig(r=4, lora_alpha=32, target_modules=["c_attn"], enable_lora=slices),
        )
    elif name == "lora_all":
        deltaw.attach(model, deltaw.LoraConfig(r=8, lora_alpha=16))


def train(
    data: Data, name: str, rate: float, steps: int, seed: int, *, generated: bool = True
) -> dict[str, Any]:
    """Return the scores after training, those of answers too if `generated`."""
    import torch
    from torch.nn import functional as F

    from deltaw.language.encoding.batches import Padding
    from deltaw.language.encoding.encoder import MASKED
    from deltaw.train.batches import EpochSampler

    began = time.process_time()
    speaker = load()
    model = speaker.model
    torch.manual_seed(seed)
    choose_weights(model, name)
    rows = _encoded(speaker, data.train)
    order = list(EpochSampler([len(row.input_ids) for row in rows], BATCH, seed, bucketed=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=DECAY)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    padding = Padding(speaker.tokenizer.pad_token_id)
    model.train()
    for step in range(steps):
        some = [rows[index] for index in order[BATCH * step : BATCH * (step + 1)]]
        batch = padding([{"input_ids": row.input_ids, "labels": row.labels} for row in some])
        labels = batch.pop("labels")[:, 1:]
        learnt = labels != MASKED
        hidden = model.transformer(**batch, use_cache=False)[0][:, :-1]
        logits = model.lm_head(hidden[learnt])
        F.cross_entropy(logits, labels[learnt], label_smoothing=SMOOTHING).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    entry = measure(speaker, data, generated=generated)
    counted = {"trained": sum(p.numel() for p in trained)}
    return counted | entry | {"cpu_seconds": round(time.process_time() - began)}


def measure(speaker: Any, data: Data, *, generated: bool = True) -> dict[str, Any]:
    """Return the loss on held-out rows and on books, and the scores of generated answers."""
    from contextlib import nullcontext

    import deltaw
    from deltaw.language.data.samples import Passage
    from deltaw.language.encoding.batches import Padding
    from deltaw.language.scores import measured, ratios
    from deltaw.switching import configs

    model = speaker.model
    padding = Padding(speaker.tokenizer.pad_token_id)
    windows = speaker.encoder.encode([Passage(text, "books", 1) for text in data.books]).rows
    # A window that is full is the beginning of its text; what is left of the text is not scored.
    parts = {
        "loss": _encoded(speaker, data.held_out),
        "books": [row for row in windows if len(row.input_ids) == WINDOW],
    }
    with deltaw.merged(model) if configs(model) else nullcontext():
        losses = {
            part: float(ratios(measured(model, rows, padding).sum(0))["loss"])
            for part, rows in parts.items()
        }
        return losses | (scored(speaker, data.asked) if generated else {})


def scored(speaker: Any, asked: dict[str, list[str]]) -> dict[str, float]:
    """Return the scores of the model's answers beside all that people wrote."""
    from deltaw.language.generating import Sampling, answers
    from deltaw.language.metrics.bleu import bleu
    from deltaw.language.metrics.nist import nist
    from deltaw.language.metrics.rouge import rouge_l
    from deltaw.language.metrics.words import Words

    encoder = speaker.encoder
    sampling = Sampling(TOKENS, num_beams=BEAMS, length_penalty=0.9, no_repeat_ngram_size=4)
    prompts = [encoder.opening(encoder.joined(meaning, "")) for meaning in asked]
    said, wanted = answers(speaker, prompts, sampling), list(asked.values())
    tallies = (
        bleu(said, wanted, Words(), lowercase=True),
        nist(said, wanted, Words()),
        rouge_l(said, wanted),
    )
    return {name: tally.value for name, tally in zip(METRICS, tallies, strict=True)}


def _encoded(speaker: Any, texts: Sequence[Text]) -> list[Any]:
    from deltaw.language.data.samples import Completion

    rows: list[Any] = speaker.encoder.encode(
        [Completion(meaning, sentence, "e2e", 1) for meaning, sentence in texts]
    ).rows
    return rows
