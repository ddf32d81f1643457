"""How long it takes to start adapters by singular vectors, and how good these are.

Matrices have the shapes of a Llama's layers and singular values that fall slowly; what is captured
is told by the whole decomposition of the same matrix in the same process.
"""

import copy
import json
import sys
from typing import Any

from benchmarks import rounds
from benchmarks.results import Results
from benchmarks.tables import digits, median, spread, table
from benchmarks.timing import seconds

TITLE = "Starts by singular vectors"
QUICK = False
ROUNDS = 3
RANK = 16
TURNS = 5
SHAPES = {
    "2048 x 2048": (2048, 2048),
    "512 x 2048": (512, 2048),
    "8192 x 2048": (8192, 2048),
    "2048 x 8192": (2048, 8192),
}
DECAY = 0.5
WAYS = ("exact", "PEFT, niter 4", "deltaw")
ATTACHED = ("PEFT, pissa", "PEFT, pissa_niter_4", "deltaw, pissa", "deltaw, True")
BLOCKS, WIDTH, INNER = 3, 1024, 2816


def run(results: Results) -> None:
    """Measure every shape, and whole models, in a process per round."""
    rounds.measure(results, (*SHAPES, "model"), ROUNDS)


def measure(name: str) -> dict[str, float]:
    """Return seconds by way, and of the ways that find r vectors what they miss."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    return attached() if name == "model" else vectors(*SHAPES[name])


def vectors(out: int, into: int) -> dict[str, float]:
    """Return seconds of each way to the r largest vectors, and how far they are from the best."""
    import torch

    from deltaw.inits._svd import principal

    W = falling(out, into)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}

    def exact() -> None:
        found["exact"] = torch.linalg.svd(W, full_matrices=False)[0][:, :RANK]

    def peft() -> None:
        found["PEFT, niter 4"] = torch.svd_lowrank(W, RANK, niter=4)[0]

    def ours() -> None:
        found["deltaw"] = principal(W, RANK, generator)[0]

    taken = {"exact": seconds(exact, 1)[0]}
    turns: dict[str, list[float]] = {"PEFT, niter 4": [], "deltaw": []}
    for number in range(TURNS + 1):
        for name, way in (("PEFT, niter 4", peft), ("deltaw", ours)):
            took = seconds(way, 1)[0]
            if number:
                turns[name].append(took)
    taken |= {name: sorted(took)[TURNS // 2] for name, took in turns.items()}
    best = captured(W, found["exact"])
    whole = float(W.double().square().sum())
    for name in turns:
        share = captured(W, found[name])
        taken[f"{name}, missed"] = 1 - share / best
        taken[f"{name}, left"] = ((whole - share) / (whole - best)) ** 0.5 - 1
    return taken


def falling(out: int, into: int) -> Any:
    """Return a matrix whose singular values fall about as j^-DECAY."""
    import torch

    n = min(out, into)
    left, right = torch.randn(out, n) / out**0.5, torch.randn(n, into) / into**0.5
    return (left * torch.arange(1, n + 1) ** -DECAY) @ right


def captured(W: Any, U: Any) -> float:
    """Return ‖Uᵀ W‖², in float64."""
    return float((U.double().T @ W.double()).square().sum())


def attached() -> dict[str, float]:
    """Return the seconds that it takes to put an adapter on a stack of layers."""
    import peft
    from torch import nn

    import deltaw

    def block() -> nn.Module:
        wide, narrow = (INNER, WIDTH), (WIDTH, WIDTH)
        pairs = {"q": narrow, "k": narrow, "v": narrow, "o": narrow, "gate": wide, "up": wide}
        layers = {name: falling(*shape) for name, shape in (pairs | {"down": wide[::-1]}).items()}
        made = {name: nn.Linear(W.shape[1], W.shape[0], bias=False) for name, W in layers.items()}
        for name, layer in made.items():
            layer.weight.data = layers[name]
        return nn.ModuleDict(made)

    base = nn.ModuleList([block() for _ in range(BLOCKS)])
    names = list(base[0])
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": names}

    def attach(name: str) -> float:
        library, _, init = name.partition(", ")
        model = copy.deepcopy(base)
        start = True if init == "True" else init
        if library == "PEFT":
            settings = peft.LoraConfig(**config, init_lora_weights=start)
            return seconds(lambda: peft.get_peft_model(model, settings), 1)[0]
        own = deltaw.LoraConfig(**config, init_lora_weights=start)
        return seconds(lambda: deltaw.attach(model, own), 1)[0]

    taken = {"PEFT, pissa": attach("PEFT, pissa")}
    turns: dict[str, list[float]] = {name: [] for name in ATTACHED if name not in taken}
    for number in range(TURNS + 1):
        for name, took in turns.items():
            took += [attach(name)][number == 0 :]
    return taken | {name: sorted(took)[TURNS // 2] for name, took in turns.items()}


def report(results: Results) -> str:
    """Return a table of shapes and one of whole models."""
    shapes = [
        (
            shape,
            way,
            median(known[way].values(), 1e3),
            spread(rounds.ratios(known[way], known["deltaw"])),
            _largest(results, shape, f"{way}, missed"),
            _largest(results, shape, f"{way}, left"),
        )
        for shape in SHAPES
        for known in [{way: rounds.values(results, shape, way) for way in WAYS}]
        for way in WAYS
    ]
    known = {name: rounds.values(results, "model", name) for name in ATTACHED}
    models = [
        (name, median(own.values()), spread(rounds.ratios(own, known["deltaw, pissa"])))
        for name, own in known.items()
    ]
    return "\n\n".join(
        [
            f"The {RANK} largest singular vectors in float32 of matrices whose singular values "
            f"fall about as j^-{DECAY:g}. Missed is how much less of ‖W‖² they hold than the best "
            "ones, left how much larger what they leave of W is, the largest of all rounds; "
            f"{rounds.done(results)} rounds, a process each, ratios within a process.",
            table(("shape", "way", "ms", "time / deltaw's", "missed", "left"), shapes),
            f"Attaching with r={RANK} to {7 * BLOCKS} linear layers of {BLOCKS} blocks of width "
            f"{WIDTH} and {INNER}: the median of {TURNS} turns after one that does not count, of "
            "PEFT's whole decomposition one turn.",
            table(("start", "s", "time / deltaw's pissa"), models),
        ]
    )


def _largest(results: Results, shape: str, key: str) -> str:
    known = rounds.values(results, shape, key)
    return f"{digits(100 * max(known.values()))}%" if known else ""


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
