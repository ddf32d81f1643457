"""Sentences about restaurants, scored beside people's: a small GPT-2 on the E2E NLG challenge.

Every weight, the last layers, and LoRA on the query and value slices of `c_attn` or on all linear
layers, after the protocol of the LoRA paper (arXiv 2106.09685, appendix D.3), cut to what two cores
do. The learning rate of each method is chosen by successive halving, then three seeds; the base's
own domain, books, is scored beside it. Reads model and texts beside the checkout
(`DELTAW_SHARED`); every run that is done is kept, so an interrupted benchmark goes on.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.restaurants import (
    BATCH,
    BEAMS,
    DECAY,
    HELD_OUT,
    METRICS,
    ROWS,
    SMOOTHING,
    WARMUP,
    load,
    measure,
    read,
    train,
)
from benchmarks.results import Results
from benchmarks.tables import table

TITLE = "Data to text: E2E NLG with a small GPT-2"
QUICK = False
SEEDS = (0, 1, 2)
T_95 = 4.303
"""Two-sided 95% point of Student's t with two degrees of freedom, for three paired seeds."""
STEPS = ROWS // BATCH
SHORT = STEPS // 8
"""Steps of the first round, in which three rates become two."""
PARAMETERS = 7_498_240
BASE = "base"


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


def run(results: Results) -> None:
    """Do every training run that is not done yet."""
    data = read()
    if BASE not in results.entries:
        results.add(BASE, measure(load(), data))
    for name, rate, steps, seed in schedule(results):
        entry = train(data, name, rate, steps, seed, generated=steps == STEPS)
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
