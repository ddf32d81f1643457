"""Training steps under DoRA, of a Llama of 88M parameters in float32."""

import sys

from benchmarks.training import Training

TITLE = "Training step under DoRA, Llama of 88M, float32"
QUICK = False
TRAINING = Training(
    about="The same in float32, where the base's products are slower and what DoRA adds is not.",
    shape="llama-88m",
    dtype="float32",
    batches={"4x256": ("floor", "deltaw", "deltaw-dora", "peft", "peft-dora")},
)
run, report = TRAINING.run, TRAINING.report

if __name__ == "__main__":
    TRAINING.serve(sys.argv[1])
