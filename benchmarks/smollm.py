"""Training steps of a Llama of SmolLM2-135M's shape, whose head is a third of a step."""

import sys

from benchmarks.training import Training

TITLE = "Training step, SmolLM2-135M's shape, bfloat16"
QUICK = False
TRAINING = Training(
    about="Hidden 576, ffn 1536, 30 layers, 9 / 3 heads, vocabulary 49152, tied embeddings; "
    "random weights.",
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
run, report = TRAINING.run, TRAINING.report

if __name__ == "__main__":
    TRAINING.serve(sys.argv[1])
