"""Training steps of a Llama of 88M parameters in bfloat16."""

import sys

from benchmarks.training import Training

TITLE = "Training step, Llama of 88M, bfloat16"
QUICK = True
TRAINING = Training(
    about="Hidden 768, ffn 2048, 12 layers, 12 / 4 heads, vocabulary 8192; random weights.",
    shape="llama-88m",
    dtype="bfloat16",
    batches={
        "4x256": (
            "floor",
            "floor-loss",
            "deltaw",
            "deltaw-loss",
            "deltaw-lean",
            "peft",
            "peft-bf16",
            "loralib",
            "deltaw-dropout",
            "peft-dropout",
        ),
        "4x512": ("floor", "deltaw", "deltaw-loss", "deltaw-lean", "peft", "full"),
    },
)
run, report = TRAINING.run, TRAINING.report

if __name__ == "__main__":
    TRAINING.serve(sys.argv[1])
