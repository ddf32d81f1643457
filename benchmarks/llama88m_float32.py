"""Training steps of a Llama of 88M parameters in float32."""

import sys

from benchmarks.training import Training

TITLE = "Training step, Llama of 88M, float32"
QUICK = False
TRAINING = Training(
    about="The same model in float32, where PEFT's adapters need no cast.",
    shape="llama-88m",
    dtype="float32",
    batches={
        "4x256": ("floor", "floor-loss", "deltaw", "deltaw-loss", "deltaw-lean", "peft", "full")
    },
)
run, report = TRAINING.run, TRAINING.report

if __name__ == "__main__":
    TRAINING.serve(sys.argv[1])
