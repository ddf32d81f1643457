"""A recipe: every choice behind a training run, checked before anything is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from deltaw.errors import ConfigError, raise_all
from deltaw.train import yamlfile
from deltaw.train.effects import without_effect
from deltaw.train.escape import printable
from deltaw.train.keys import LanguageKeys, Metric, Optim
from deltaw.train.misfits import AS_HERE, follows, misfit, named, unknown
from deltaw.train.record import Record
from deltaw.train.schedules import Schedule
from deltaw.train.spellings import METHODS, OPTIMIZERS, respelt

Method = Literal["lora", "full", "head", "bitfit", "layernorm", "freeze"]
Task = Literal["classification", "regression", "sft", "dpo", "kto"]
LANGUAGE_TASKS = frozenset({"sft", "dpo", "kto"})


class Recipe(LanguageKeys):
    """Everything that decides a run; `None` means that deltaw chooses, and says what it chose.

    `warmup` and `validation_share` are shares below 1; from 1 on they count steps and rows. In a
    run's folder `record` keeps what was chosen, so that another choice can still be made where a
    key is changed; see `filled`.
    """

    model: str = Field(min_length=1)
    revision: str | None = None
    data: str = Field(min_length=1)
    name: str | None = None
    output: str | None = Field(None, min_length=1)

    text: list[str] | None = Field(None, min_length=1)
    label: str | None = None
    task: Task | None = None
    max_length: int | None = Field(None, ge=1)
    encoding: str = "utf-8"
    validation_share: float = Field(0.1, ge=0)
    test_share: float = Field(0.0, ge=0, lt=1)
    split_seed: int | None = Field(None, ge=0, lt=2**31)
    max_train_rows: int | None = Field(None, ge=1)
    allow_leakage: bool = False

    method: Method = "lora"
    adapter: list[str] | None = Field(None, min_length=1)
    create_new_adapter: bool = False
    r: int = 8
    lora_alpha: float | None = None
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    enable_lora: list[bool] | dict[str, list[bool]] | None = None
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool | str = True
    absorb: bool = False
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    lora_bias: bool = False
    quantization_bit: Literal[4, 8] | None = None
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    quantization_method: Literal["bnb", "torchao"] = "bnb"
    last_layers: int = Field(2, ge=1)
    lr_layer_decay: float | None = Field(None, gt=0, le=1)
    loraplus_lr_ratio: float | None = Field(None, gt=0, le=1e6)
    loraplus_lr_embedding: float = Field(1e-6, gt=0, lt=10)
    optim: Optim = "adamw"
    galore_rank: int = Field(128, ge=1)
    galore_update_interval: int = Field(200, ge=1)
    galore_scale: float = Field(2.0, gt=0)
    galore_proj_type: Literal["std", "reverse_std", "left", "right"] = "std"
    galore_exact_svd: bool = False
    galore_target: str | list[str] = "all-linear"

    epochs: float | None = Field(None, gt=0, le=1e6)
    max_steps: int | None = Field(None, ge=1, le=10**9)
    batch_size: int = Field(16, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0, lt=10)
    scheduler: Schedule = "linear"
    scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    warmup: float = Field(0.1, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    shuffle: bool = True
    neftune_noise_alpha: float = Field(0.0, ge=0)
    group_by_length: bool = True
    bf16: bool = False
    gradient_checkpointing: bool = False
    fsdp: bool = False
    allow_overcommit: bool = False
    seed: int = Field(0, ge=0, lt=2**31)

    eval_every: int | None = Field(None, ge=1)
    eval_each_epoch: bool = False
    metric: Metric | None = None
    early_stopping: int | None = Field(None, ge=1)
    watchdog: bool = True
    keep: Literal["best", "last"] = "best"
    report_to: list[str] = Field(default_factory=list)
    plot_loss: bool = False
    trust_remote_code: bool = False

    record: dict[str, Any] | None = None

    @field_validator("text", "report_to", "adapter", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: object) -> object:
        if isinstance(value, str) and value in METHODS:
            raise ValueError(f"did you mean method: lora with {METHODS[value]}?")
        return value

    @field_validator("optim", mode="before")
    @classmethod
    def _optim(cls, value: object) -> object:
        return OPTIMIZERS.get(value, value) if isinstance(value, str) else value

    @field_validator("galore_target", mode="before")
    @classmethod
    def _galore_target(cls, value: object) -> object:
        return "all-linear" if value == "all" else value

    @field_validator("r", "last_layers", "batch_size", "seed", "galore_rank", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("must be a whole number")
        return value

    @field_validator("warmup", "validation_share")
    @classmethod
    def _share_or_count(cls, value: float) -> float:
        if value >= 1 and not value.is_integer():
            raise ValueError("must be a share below 1, or a whole number")
        return value

    @field_validator("record")
    @classmethod
    def _whole_record(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            Record.model_validate(value or {})
        except ValidationError as error:
            raise ValueError("; ".join(map(misfit, error.errors()))) from error
        return value

    @field_validator("model", "data", "output", "adapter")
    @classmethod
    def _path(cls, value: str | list[str] | None) -> str | list[str] | None:
        if any("\0" in part for part in ([value] if isinstance(value, str) else value or ())):
            raise ValueError("must not hold a NUL character")
        return value

    @field_validator("name")
    @classmethod
    def _one_segment(cls, value: str | None) -> str | None:
        if value is not None:
            check_segment(value)
        return value

    @property
    def changed(self) -> dict[str, Any]:
        """The keys that are not at their defaults."""
        fields = type(self).model_fields
        return {
            key: value
            for key, value in self
            if value != fields[key].get_default(call_default_factory=True)
        }

    @property
    def is_language(self) -> bool:
        """Tell whether a language model is trained."""
        return self.task in LANGUAGE_TASKS

    @property
    def goes_on(self) -> bool:
        """Tell whether the last adapter of `adapter` is trained on, and no new one."""
        return self.adapter is not None and self.method == "lora" and not self.create_new_adapter

    @property
    def merged(self) -> list[str]:
        """The adapters that are merged into the weights before training."""
        adapters = self.adapter or []
        return adapters[:-1] if self.goes_on else adapters

    @property
    def uses_galore(self) -> bool:
        """Tell whether matrices are trained through the leading directions of their gradients."""
        return self.optim.startswith("galore")

    @property
    def updates_in_backward(self) -> bool:
        """Tell whether a weight is updated as soon as the backward pass has its gradient."""
        return self.optim.endswith("layerwise")


def check_segment(name: str) -> None:
    """Raise `ValueError` unless `name` is one plain path segment, as run and adapter names are."""
    strange = not name.isprintable() or any(c in name for c in '/\\:*?"<>|') or name != name.strip()
    if not name or strange or name.startswith(".") or len(name) > 100:
        raise ValueError("must be one plain folder name of at most 100 characters")


def parse(
    values: Mapping[str, Any],
    origin: str = "the command line",
    *,
    names: Mapping[str, str] = AS_HERE,
    problems: Sequence[str] = (),
    recorded: bool = False,
) -> Recipe:
    """Return the recipe of these values.

    Errors call a key as in `names`, and list `problems` that were found before. What had no effect
    on a run that is `recorded` is let be.

    Raises:
        ConfigError: listing every unknown key, with the nearest known ones, and every value that
            does not fit or that the method does not read.
    """
    known = [key for key in Recipe.model_fields if key != "record"]
    values, wrong = respelt(values)
    problems = [*problems, *wrong]
    problems += [unknown(str(key), known) for key in values if key not in Recipe.model_fields]
    good = {key: value for key, value in values.items() if key in Recipe.model_fields}
    recipe = None
    try:
        recipe = Recipe.model_validate(good)
    except ValidationError as error:
        found = [misfit(detail, names) for detail in error.errors()]
        problems += [problem for problem in found if not follows(problem, problems)]
    else:
        unread = [] if recorded else without_effect(recipe)
        problems += [named(problem, names) for problem in unread]
    raise_all(
        ConfigError,
        f"The recipe from {printable(origin, 300)} cannot be used:",
        problems,
        "correct the file, or give key=value behind it." if names else "",
    )
    assert recipe is not None
    return recipe


def filled(recipe: Recipe, origin: str = "the record of a run") -> Recipe:
    """Return the recipe of a run with what deltaw chose for it in every key that was left open.

    Raises:
        ConfigError: if what the record says was chosen does not fit.
    """
    chosen = (recipe.record or {}).get("chosen", {})
    return parse(chosen | recipe.model_dump(exclude_none=True), origin, recorded=True)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file with `key=value` overrides applied."""
    return parse(yamlfile.read(path) | parse_overrides(overrides), str(path))


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Return `key=value` arguments as a dictionary; values are read as YAML."""
    values: dict[str, Any] = {}
    problems = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            problems.append(f"{printable(pair)!r} is not `key=value`")
        elif key in values:
            problems.append(f"{printable(key)} is given twice")
        else:
            values[key] = yamlfile.value(text)
    raise_all(
        ConfigError,
        "These arguments cannot be used:",
        problems,
        "give each key of a recipe once, such as r=16, and in quotes where it holds blanks.",
    )
    return values
