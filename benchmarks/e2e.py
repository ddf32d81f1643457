"""Sentences about restaurants, scored beside people's: a small GPT-2 on the E2E NLG challenge.

Every weight, the last layers, and LoRA on the query and value slices of `c_attn` or on all linear
layers, after the protocol of the LoRA paper (arXiv 2106.09685, appendix D.3), cut to what two cores
do. The learning rate of each method is chosen by successive halving, then three seeds; the base's
own domain, books, is scored beside it. Reads model and texts beside the checkout
(`DELTAW_SHARED`); every run that is done is kept, so an interrupted benchmark goes on.
"""

import csv
import os
import random
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Results
from benchmarks.tables import table

TITLE = "Data to text: E2E NLG with a small GPT-2"
QUICK = False
SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared")
SEEDS = (0, 1, 2)
T_95 = 4.303
"""Two-sided 95% point of Student's t with two degrees of freedom, for three paired seeds."""
ROWS, BATCH = 8000, 8
STEPS = ROWS // BATCH
SHORT = STEPS // 8
"""Steps of the first round, in which three rates become two."""
WARMUP = 0.1
SMOOTHING, DECAY = 0.1, 0.01
HELD_OUT = 400
"""Rows of the training file, of other meanings than those trained on, that choose the rate."""
BOOKS, WINDOW = 66, 256
"""How many windows of the books are scored, of how many tokens."""
TOKENS, BEAMS = 80, 4
PARAMETERS = 7_498_240
METRICS = ("BLEU", "NIST", "ROUGE-L")
Text = tuple[str, str]
"""What is to be said, and a sentence that says it."""


@dataclass(frozen=True)
class Method:
    """What is trained, and the three learning rates tried, lowest first."""

    title: str
    rates: tuple[float, float, float]


METHODS = {
    "full": Method("full fine-tuning", (3e-4, 1e-3, 3e-3)),
    "last2": Method("last 2 of 8 layers", (3e-4, 1e-3, 3e-3)),
    "lora_qv": Method("LoRA, query and value, r=4", (1e-3, 3e-3, 1e-2)),
    "lora_all": Method("LoRA, all linear, r=8", (1e-3, 3e-3, 1e-2)),
}
BASE = "base"


def run(results: Results) -> None:
    """Do every training run that is not done yet."""
    data = read()
    if BASE not in results.entries:
        results.add(BASE, measure(load(), data))
    for name, rate, steps, seed in schedule(results):
        entry = train(data, name, rate, steps, seed)
        results.add(key(name, rate, steps, seed), entry)
        print(key(name, rate, steps, seed), entry, flush=True)


def key(name: str, rate: float, steps: int, seed: int) -> str:
    """Return under what name the entry of a run is kept."""
    return f"{name}/lr={rate:g}/steps={steps}/seed={seed}"


def schedule(results: Results) -> Iterator[tuple[str, float, int, int]]:
    """Yield (method, rate, steps, seed) of the runs to do, each once its choice is known."""

    def todo(
        name: str, rate: float, steps: int, seed: int
    ) -> Iterator[tuple[str, float, int, int]]:
        if key(name, rate, steps, seed) not in results.entries:
            yield name, rate, steps, seed

    for name, method in METHODS.items():
        for rate in method.rates:
            yield from todo(name, rate, SHORT, SEEDS[0])
    for name in METHODS:
        for rate in survivors(results, name):
            yield from todo(name, rate, STEPS, SEEDS[0])
    for seed in SEEDS[1:]:
        for name in METHODS:
            yield from todo(name, best_rate(results, name), STEPS, seed)


def survivors(results: Results, name: str) -> list[float]:
    """Return the better two rates of the first round."""
    return sorted(METHODS[name].rates, key=lambda rate: _loss(results, name, rate, SHORT))[:2]


def best_rate(results: Results, name: str) -> float:
    """Return the better of the survivors after all steps."""
    return min(survivors(results, name), key=lambda rate: _loss(results, name, rate, STEPS))


def _loss(results: Results, name: str, rate: float, steps: int) -> float:
    return float(results.entries[key(name, rate, steps, SEEDS[0])]["loss"])


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


def train(data: Data, name: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Return the scores after training; answers are generated where all steps were done."""
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
    entry = measure(speaker, data, generated=steps >= STEPS)
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


def report(results: Results) -> str:
    """Return the table of scores and of what was forgotten."""
    entries = {name: runs for name in METHODS if (runs := _final(results, name))}
    if not entries:
        return "No method is done yet."
    base = results.entries[BASE]
    rows = [
        ("untrained", "0", "", *_shown([base]), "", ""),
        *(
            (
                METHODS[name].title,
                f"{runs[0]['trained']:,} ({runs[0]['trained'] / PARAMETERS:.2%})",
                f"{best_rate(results, name):g}{'*' * _at_edge(results, name)}",
                *_shown(runs),
                _paired(runs, entries.get("full")) if name != "full" else "",
                _mean([entry["books"] - base["books"] for entry in runs], 3),
            )
            for name, runs in entries.items()
        ),
    ]
    return "\n\n".join(
        [
            f"books-gpt2-7m ({PARAMETERS:,} parameters, trained on books alone) on {ROWS:,} rows "
            "of E2E NLG, after appendix D.3 of arXiv 2106.09685: AdamW with weight decay "
            f"{DECAY:g}, batch {BATCH}, label smoothing {SMOOTHING:g}, warm-up and a linear end, "
            f"beam search with length penalty 0.9 and no 4-gram twice. Cut for two cores: {ROWS:,} "
            f"of 42,061 rows, one epoch instead of five ({STEPS:,} steps), {WARMUP:.0%} warm-up "
            f"instead of 500 steps, {BEAMS} beams instead of 10; gradients are clipped at 1, there "
            "is no dropout, and alpha is 32 at r=4 as there and 16 at r=8. All 547 meanings of the "
            "development set are answered and scored beside all their references: BLEU and NIST "
            "as the scripts of the challenge count them (capitals aside), ROUGE-L as the mean F1 "
            "beside the best reference. The loss, in nats per token, is of "
            f"{HELD_OUT} rows of other meanings, which chose the rate of three by successive "
            "halving; a rate with a star is the lowest or the highest of its three. Means of "
            f"{len(SEEDS)} seeds ± standard error. The last columns are the difference in BLEU to "
            "full fine-tuning of the same seed with the 95% interval of a paired t-test over "
            f"{len(SEEDS)} seeds, and how much the loss on held-out books rose, which is "
            f"{base['books']:.3f} before.",
            table(
                (
                    "method",
                    "trained",
                    "rate",
                    "loss",
                    *METRICS,
                    "BLEU against full",
                    "forgotten",
                ),
                rows,
            ),
        ]
    )


def _final(results: Results, name: str) -> list[dict[str, Any]]:
    """Return the entries of all seeds at the best rate, or nothing where some are missing."""
    try:
        rate = best_rate(results, name)
        return [results.entries[key(name, rate, STEPS, seed)] for seed in SEEDS]
    except KeyError:
        return []


def _shown(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    for name, digits in (("loss", 3), *zip(METRICS, (2, 2, 3), strict=True)):
        yield _mean([entry[name] for entry in runs], digits)


def _paired(runs: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]] | None) -> str:
    if full is None:
        return ""
    pairs = zip(runs, full, strict=True)
    differences = [one["BLEU"] - other["BLEU"] for one, other in pairs]
    mean = statistics.mean(differences)
    half = T_95 * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def _at_edge(results: Results, name: str) -> bool:
    return best_rate(results, name) in (METHODS[name].rates[0], METHODS[name].rates[-1])


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
