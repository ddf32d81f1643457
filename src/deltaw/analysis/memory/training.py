"""What is to be trained, as far as memory depends on it."""

from dataclasses import dataclass, field
from typing import Any

import torch

from deltaw.config import LoraConfig
from deltaw.errors import ConfigError, raise_all

METHODS = ("full", "lora", "qlora", "galore")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Training:
    """One training run on a CPU, with AdamW or GaLore.

    Args:
        method: `"full"` and `"galore"` train every weight, `"lora"` adapters on dense weights and
            `"qlora"` adapters on weights that `deltaw.quantize` packs in nf4.
        rows: the rows of a batch.
        tokens: their length, of the longest batch.
        adapter: the settings of the adapters.
        labels: the classes of a classification head; without them every token is a label.
        dtype: in which the weights are loaded: `"float32"`, `"bfloat16"`, `"float16"`, or None for
            that of the files.
        autocast: compute in bfloat16 by autocast, as the Trainer's `bf16=True` does.
        checkpointing: recompute activations in the backward pass.
        fuse_loss, fuse_blocks: `deltaw.fuse_loss` and `deltaw.fuse_blocks` are called.
        galore_rank: GaLore's rank.
        layerwise: GaLore updates each weight in the backward pass.

    Raises:
        ConfigError: listing every setting that is out of range or contradicts another.
    """

    method: str = "lora"
    rows: int = 8
    tokens: int = 512
    adapter: LoraConfig = field(default_factory=LoraConfig)
    labels: int | None = None
    dtype: str | None = None
    autocast: bool = False
    checkpointing: bool = False
    fuse_loss: bool = False
    fuse_blocks: bool = False
    galore_rank: int = 128
    layerwise: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(f"method={self.method!r} is none of {', '.join(METHODS)}")
        problems += [
            f"{name}={value!r} must be at least 1"
            for name, value in (("rows", self.rows), ("tokens", self.tokens), *self._counts())
            if value < 1
        ]
        if self.dtype not in (None, *DTYPES):
            problems.append(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.layerwise and self.method != "galore":
            problems.append(f"layerwise=True is for galore, not for {self.method}")
        if self.fuse_loss and (self.labels is not None or self.trains_all):
            problems.append("fuse_loss=True needs a frozen language model's head")
        raise_all(ConfigError, "The memory of this training cannot be estimated:", problems)

    def _counts(self) -> list[tuple[str, int]]:
        labels = [] if self.labels is None else [("labels", self.labels)]
        return [*labels, ("galore_rank", self.galore_rank)]

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained."""
        return self.method in ("full", "galore")

    def auto_class(self) -> Any:
        """Return the class of transformers that makes the model."""
        import transformers

        if self.labels is None:
            return transformers.AutoModelForCausalLM
        return transformers.AutoModelForSequenceClassification
