"""Training steps under DoRA, of a Llama of 88M parameters in bfloat16."""

import sys

from benchmarks.training import Training

TITLE = "Training step under DoRA, Llama of 88M, bfloat16"
QUICK = False
TRAINING = Training(
    about="The same model as above, beside LoRA of the same rank.",
    shape="llama-88m",
    dtype="bfloat16",
    batches={"4x256": ("floor", "deltaw", "deltaw-dora", "peft", "peft-dora")},
)
run, report = TRAINING.run, TRAINING.report

if __name__ == "__main__":
    TRAINING.serve(sys.argv[1])
