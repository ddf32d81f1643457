"""Training steps of a Llama of 88M parameters in float32."""

import sys

from benchmarks import training
from benchmarks.results import Results
from benchmarks.training import Training

TITLE = "Training step, Llama of 88M, float32"
QUICK = False
TRAINING = Training(
    shape="llama-88m",
    dtype="float32",
    batches={
        "4x256": ("floor", "floor-loss", "deltaw", "deltaw-loss", "deltaw-lean", "peft", "full")
    },
)


def run(results: Results) -> None:
    """Measure every contestant, with every batch there is."""
    TRAINING.run(results)


def report(results: Results) -> str:
    """Return table and plots."""
    what = "The same model in float32, where PEFT's adapters need no cast."
    return f"{what} {training.report(results, TRAINING)}"


if __name__ == "__main__":
    TRAINING.serve(sys.argv[1])
