"""Training steps of a Llama of SmolLM2-135M's shape, whose head is a third of a step."""

import sys

from benchmarks import training
from benchmarks.results import Results
from benchmarks.training import Training

TITLE = "Training step, SmolLM2-135M's shape, bfloat16"
QUICK = False
TRAINING = Training(
    shape="smollm2-135m",
    dtype="bfloat16",
    batches={
        "4x512": (
            "floor",
            "floor-loss",
            "deltaw",
            "deltaw-loss",
            "deltaw-lean",
            "peft",
            "peft-bf16",
            "full",
        )
    },
)


def run(results: Results) -> None:
    """Measure every contestant, with every batch there is."""
    TRAINING.run(results)


def report(results: Results) -> str:
    """Return table and plots."""
    what = (
        "Hidden 576, ffn 1536, 30 layers, 9 / 3 heads, vocabulary 49152, tied embeddings; random "
        "weights."
    )
    return f"{what} {training.report(results, TRAINING)}"


if __name__ == "__main__":
    TRAINING.serve(sys.argv[1])
