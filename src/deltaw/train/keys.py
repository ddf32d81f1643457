"""The keys of a recipe that say how a language model is trained."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Metric = Literal[
    "accuracy",
    "macro_f1",
    "matthews",
    "pearson",
    "spearman",
    "loss",
    "exact_match",
    "bleu",
    "nist",
    "rouge_l",
    "chrf",
]
Optim = Literal[
    "adamw",
    "galore_adamw",
    "galore_adamw_layerwise",
    "galore_adamw_8bit",
    "galore_adamw_8bit_layerwise",
]


class LanguageKeys(BaseModel):
    """Which texts are read, how they become tokens, and which of these are learnt.

    `dataset_dir`, `columns`, `tags`, `mix_strategy`, `interleave_probs` and `max_samples` are
    LLaMA-Factory's settings of these names; `max_new_tokens`, `num_beams`, `length_penalty`,
    `repetition_penalty` and `no_repeat_ngram_size` are transformers', for answers that are scored.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    eval_data: str | None = Field(None, min_length=1)
    eval_on_each_dataset: bool = False
    dataset_dir: str | None = None
    columns: dict[str, str] | None = None
    tags: dict[str, str] | None = None
    max_samples: int | None = Field(None, ge=1)
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = (
        "concat"
    )
    interleave_probs: list[float] | None = None
    skip_bad_rows: bool = False
    template: str | None = None
    default_system: str | None = None
    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None
    train_on: Literal["answers", "last", "all"] = "answers"
    too_long: Literal["truncate", "drop", "split", "raise"] | None = None
    separator: str = "\n"
    packing: bool = False
    samples: int = Field(1, ge=0, le=20)
    max_new_tokens: int | None = Field(None, ge=1)
    num_beams: int = Field(1, ge=1)
    length_penalty: float = 1.0
    repetition_penalty: float = Field(1.0, gt=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    pref_beta: float = Field(0.1, gt=0)
    pref_loss: Literal[
        "sigmoid",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "sigmoid_norm",
        "simpo",
        "orpo",
    ] = "sigmoid"
    simpo_gamma: float = Field(0.5, ge=0)
    dpo_label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    kto_chosen_weight: float = Field(1.0, gt=0)
    kto_rejected_weight: float = Field(1.0, gt=0)


LANGUAGE = tuple(LanguageKeys.model_fields)
"""Keys that only language models read."""
EITHER = ("eval_data", "max_samples", "skip_bad_rows")
"""Those of them that a person may mean for labelled rows too."""
JUDGED = ("pref_beta",)
"""Keys that preferences and rated answers read."""
PREFERENCES = ("pref_loss", "dpo_label_smoothing", "simpo_gamma")
"""Keys that only preferences read."""
RATED = ("kto_chosen_weight", "kto_rejected_weight")
"""Keys that only rated answers read."""
ANSWERS = (
    "eval_on_each_dataset",
    "train_on",
    "packing",
    "max_new_tokens",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
)
"""Keys that only answers learnt as they are read."""
LABELLED = ("text", "label", "test_share", "max_train_rows")
"""Keys that only classification and regression read."""
