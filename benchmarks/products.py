"""What single steps inside a layer cost, which decides how the kernels take them.

All steps of a process take turns, since the machine is slower at times; each entry is one process.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import rounds
from benchmarks.results import Results
from benchmarks.tables import median, spread, table

TITLE = "Single steps on a CPU, bfloat16"
QUICK = False
RANK = 16
TIMES = 30
Steps = dict[str, Callable[[], object]]
TITLES = {
    "few": "B A for rows of 2048 x 2048, r=16; factors are kept in float32",
    "ways": "8 rows, each under its own adapter, beside a product of 2048 x 2048",
    "decode": "8 rows through 40 layers of 2048 x 2048, no gradients, r=16; nothing is cached",
    "train": "all six products of 4 adapters of 128 rows each, 768 x 768, r=16",
    "dropout": "a mask for 1024 x 768 inputs, and its product with them",
    "turn": "Sᵀ dY for 1024 rows, r=16",
    "loss": "loss and gradient of 1024 rows, output head included",
}


def run(results: Results) -> None:
    """Measure every group in a process per round."""
    rounds.measure(results, tuple(TITLES))


def measure(group: str, times: int = TIMES) -> dict[str, float]:
    """Return the median seconds of all steps of a group."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    with torch.set_grad_enabled(group in ("train", "loss")):
        steps: Steps = globals()[group]()
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(times + 2):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if number > 1:
                    taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def few() -> Steps:
    """Products of few rows in either dtype."""
    import torch
    from torch.nn import functional as F

    half = torch.bfloat16
    A, B = torch.randn(RANK, 2048), torch.randn(2048, RANK)
    steps: Steps = {}
    for rows in (1, 4, 8, 16, 32, 64, 128):
        x, y = torch.randn(rows, 2048).to(half), torch.zeros(rows, 2048, dtype=half)

        def in_half(x: Any = x, y: Any = y) -> None:
            y.addmm_(x @ A.to(half).t(), B.to(half).t())

        def in_float32(x: Any = x, y: Any = y) -> None:
            y.add_(F.linear(F.linear(x.float(), A), B))

        steps |= {f"{rows} rows, bfloat16": in_half, f"{rows} rows, float32": in_float32}
    return steps


def ways() -> Steps:
    """Rows under adapters of their own, in every way."""
    import torch

    from deltaw.kernels.bank import add_batched, add_masked, stacked
    from deltaw.kernels.linear import Term
    from deltaw.kernels.segments import Segments

    half, n = torch.bfloat16, 8
    W, x = torch.randn(2048, 2048).to(half), torch.randn(n, 1, 2048).to(half)
    y = torch.zeros_like(x)
    terms = [Term(torch.randn(RANK, 2048), torch.randn(2048, RANK), 1.0) for _ in range(n)]
    index = torch.arange(n)
    segments = Segments([slice(k, k + 1) for k in range(n)])
    kept = {dtype: stacked(terms, dtype) for dtype in (half, torch.float32)}

    def gathered() -> None:
        bank = kept[half]
        add_batched(y, x, bank._replace(A=bank.A[index], B=bank.B[index]))

    return {
        "the base's own product": lambda: x @ W.t(),
        "one after another": lambda: segments.add(y, x, terms),
        "batched, gathered for every pass": gathered,
        "batched, bfloat16": lambda: add_batched(y, x, kept[half]),
        "batched, float32": lambda: add_batched(y, x, kept[torch.float32]),
        "masked, bfloat16": lambda: add_masked(y, x, kept[half], index),
        "masked, float32": lambda: add_masked(y, x, kept[torch.float32], index),
    }


def decode(layers: int = 40, width: int = 2048) -> Steps:
    """Layers one after another: plain, with the least that an adapter asks of torch, adapted."""
    import peft
    import torch
    from torch import nn
    from torch.nn import functional as F

    import deltaw

    def stack() -> Any:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(half)

    half = torch.bfloat16
    plain, ours = stack(), stack()
    deltaw.attach(ours, deltaw.LoraConfig(r=RANK, target_modules="all-linear"))
    config = peft.LoraConfig(r=RANK, target_modules=[str(k) for k in range(layers)])
    theirs = peft.get_peft_model(stack(), config).eval()
    ours.eval()
    factors = [(torch.randn(RANK, width), torch.randn(width, RANK)) for _ in range(layers)]
    x = torch.randn(8, 1, width).to(half)

    def least() -> None:
        for layer, (A, B) in zip(plain, factors, strict=True):
            S = F.linear(x.float(), A)
            layer(x).add_(F.linear(S, B))

    return {
        "no adapter": lambda: [layer(x) for layer in plain],
        "the least calls of torch": least,
        "deltaw": lambda: [layer(x) for layer in ours],
        "PEFT": lambda: [layer(x) for layer in theirs.base_model.model],
    }


def train() -> Steps:
    """The low-rank part of a training step, both ways."""
    import torch

    from deltaw.kernels.batched import Batched
    from deltaw.kernels.linear import Term
    from deltaw.kernels.segments import Segments

    half, n, size = torch.bfloat16, 4, 128
    x, y = torch.randn(n * size, 768).to(half), torch.zeros(n * size, 768, dtype=half)
    terms = [Term(torch.randn(RANK, 768), torch.randn(768, RANK), 1.0) for _ in range(n)]
    needs = [(True, True, False)] * n
    segments = Segments([slice(size * k, size * (k + 1)) for k in range(n)])

    def step(way: Any) -> None:
        way.back(y, x, way.add(y, x, terms), terms, needs, True)

    return {
        "one adapter after another": lambda: step(segments),
        "batched": lambda: step(Batched()),
    }


def dropout() -> Steps:
    """Dropout of an input."""
    import torch
    from torch.nn import functional as F

    from deltaw.kernels.dropout import keep_mask

    x = torch.randn(1024, 768).to(torch.bfloat16)
    return {"nn.Dropout": lambda: F.dropout(x, 0.1), "deltaw": lambda: x * keep_mask(x, 0.1)}


def turn() -> Steps:
    """A thin matrix turned in memory before its product, or not."""
    import torch

    S = torch.randn(1024, RANK).to(torch.bfloat16)
    steps: Steps = {}
    for columns in (768, 2048, 5632):
        dY = torch.randn(1024, columns).to(torch.bfloat16)
        steps[f"{columns} columns, as it lies"] = lambda dY=dY: S.t() @ dY
        steps[f"{columns} columns, turned"] = lambda dY=dY: S.t().contiguous() @ dY
    return steps


def loss() -> Steps:
    """The output head with its loss, forwards and backwards."""
    import torch
    from torch.nn import functional as F

    from deltaw.kernels.cross_entropy import linear_cross_entropy

    half, rows = torch.bfloat16, 1024
    steps: Steps = {}
    for width, vocabulary in ((768, 8192), (576, 49152)):
        W = torch.randn(vocabulary, width).mul_(0.02).to(half)
        h = torch.randn(rows, width).to(half).requires_grad_()
        labels = torch.randint(0, vocabulary, (rows,))

        def plain(h: Any = h, W: Any = W, labels: Any = labels) -> None:
            F.cross_entropy(F.linear(h, W).float(), labels).backward()

        def ours(h: Any = h, W: Any = W, labels: Any = labels) -> None:
            linear_cross_entropy(h, W, None, labels, rows).backward()

        steps |= {
            f"vocabulary {vocabulary}, logits": plain,
            f"vocabulary {vocabulary}, deltaw": ours,
        }
        if hasattr(F, "linear_cross_entropy"):  # torch 2.13

            def of_torch(h: Any = h, W: Any = W, labels: Any = labels) -> None:
                F.linear_cross_entropy(h, W, labels).backward()

            steps[f"vocabulary {vocabulary}, torch's own"] = of_torch
    return steps


def report(results: Results) -> str:
    """Return a table for each group: times, and ratios to its first step."""
    text = [
        f"Steps of a group take turns in one process; the median of {TIMES} turns, as its median "
        f"over {rounds.done(results)} processes. Ratios are to the first step of the group, within "
        "a process."
    ]
    for group, title in TITLES.items():
        known = _known(results, group)
        if known:
            first = next(iter(known.values()))
            rows = [
                (name, median(own.values(), 1e6), spread(rounds.ratios(own, first)))
                for name, own in known.items()
            ]
            text += [f"### {title}", table(("", "µs", "time / first"), rows)]
    return "\n\n".join(text)


def _known(results: Results, group: str) -> Mapping[str, dict[int, float]]:
    entry = results.entries.get(f"round=0/{group}", {})
    names = [name for name in entry if name not in ("machine", "commit")]
    return {name: rounds.values(results, group, name) for name in names}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
