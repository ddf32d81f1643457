"""Loading a pretrained encoder or decoder with a classification head, and its tokenizer."""

import contextlib
import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from deltaw.errors import RunError, raise_all
from deltaw.heads import new_heads
from deltaw.patterns import within
from deltaw.train.escape import printable
from deltaw.train.rates import FULL_WIDTH, Shape

LOADING = (OSError, ValueError, KeyError, ImportError, RuntimeError)
"""What transformers raises for an absent, damaged or unknown model."""

CLASSIFIER = "AutoModelForSequenceClassification"
WORDS = 2
"""Least tokens beside the special ones; without its file a tokenizer has none, or a blank."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the reports and bars of transformers; errors still raise."""
    verbosity = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def load_config(
    name: str,
    labels: Sequence[str] | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Return the model's configuration with a head for `labels`, or one output for `None`.

    Raises:
        RunError: if there is no such model or its type is unknown.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if labels is not None:
        head = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code, **head
            )
    except LOADING as error:
        raise cannot_load(name, error) from error


def load_model(
    config: Any,
    name: str,
    seed: int,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, list[str]]:
    """Return the float32 model, and the paths in its base that nobody has trained.

    That is a pooler that the weights lack as a whole, or whose biases are still zero, as those of
    sentence encoders, which do without it. What the weights lack is drawn from `seed`.

    Raises:
        RunError: if the weights cannot be loaded, listing every other tensor that they lack or
            have in another shape; or if the architecture has no classification head.
    """
    try:
        with quiet():
            torch.manual_seed(seed)
            model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                revision=revision,
                dtype=torch.float32,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except LOADING as error:
        raise cannot_load(name, error) from error
    missing = set(loading["missing_keys"])
    loaded = {key: tensor for key, tensor in model.state_dict().items() if key not in missing}
    untrained = _untrained(model, loaded)
    drawn = [] if any(within(key, untrained) for key in loaded) else untrained
    refuse_gaps(model, name, loading, [*new_heads(model), *drawn])
    return model, untrained


def load_empty(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Return the model with a new head of one output on the meta device."""
    config = load_config(name, None, revision=revision, trust_remote_code=trust_remote_code)
    return build_empty(config, name, trust_remote_code=trust_remote_code)


def build_empty(config: Any, name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the model with a new head on the meta device: names and shapes, no weights.

    Raises:
        RunError: if the architecture has no classification head.
    """
    try:
        with quiet(), torch.device("meta"):
            return transformers.AutoModelForSequenceClassification.from_config(  # type: ignore[no-any-return]
                config, trust_remote_code=trust_remote_code
            )
    except LOADING as error:
        raise cannot_load(name, error) from error


def load_own(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """Return the model of the class that its configuration names, on the meta device.

    Raises:
        RunError: if its type is unknown.
    """
    try:
        with quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            if kind is None:
                return transformers.AutoModel.from_config(  # type: ignore[no-any-return]
                    config, trust_remote_code=trust_remote_code
                )
            model: nn.Module = kind(config)
            model.tie_weights()  # type: ignore[operator]
            return model
    except LOADING as error:
        raise cannot_load(name, error) from error


def untrained_in(folder: Path, model: nn.Module) -> list[str]:
    """Return the paths in the base of `model`, which may be empty, that nobody trained in `folder`.

    Only the files' pooler is read; without such files nothing is known and nothing returned.

    Raises:
        RunError: if a file cannot be read.
    """
    files = sorted(folder.glob("model*.safetensors"))
    prefix = f"{model.base_model_prefix}."
    weights = {}
    try:
        for file in files:
            with safe_open(file, "pt") as held:
                for key in held.keys():  # noqa: SIM118  (it is no mapping)
                    name = prefix + key.removeprefix(prefix)
                    if within(name, [f"{prefix}pooler"]):
                        weights[name] = held.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise cannot_load(str(folder), error) from error
    return _untrained(model, weights) if files else []


def load_base(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Return the model with a new head of one output, to look at its weights."""
    config = load_config(name, None, revision=revision, trust_remote_code=trust_remote_code)
    return load_model(config, name, 0, revision=revision, trust_remote_code=trust_remote_code)[0]


def load_tokenizer(
    name: str, config: Any, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the tokenizer; without a padding token its end-of-text token pads.

    Raises:
        RunError: if it cannot be loaded, has no vocabulary, or has neither token.
    """
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
    except LOADING as error:
        raise cannot_load(name, error) from error
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < WORDS:
        raise RunError(
            f"The tokenizer of {printable(name, 200)} has no vocabulary: its files, such as "
            "tokenizer.json, are missing or empty.\n"
            "Fix: copy them there from where the model came from."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RunError(f"The tokenizer of {printable(name, 200)} has no token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files; raise `OSError` if they cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(errno.EIO, str(error)) from error  # tokenizers raises a bare Exception


def full_name(name: str) -> str:
    """Return a local folder as an absolute path and a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def shape(config: Any) -> Shape:
    """Return the width of the model, its family, and whether that writes from left to right."""
    text = config.get_text_config()
    family = text.model_type
    return Shape(
        width=getattr(text, "hidden_size", None) or FULL_WIDTH,
        family=family,
        causal=family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )


def positions(model: nn.Module) -> int | None:
    """Return how many tokens the model has positions for, `None` where there is no limit.

    Where positions have a padding index (RoBERTa and its kin) the first token has the one after.
    """
    names = ("max_position_embeddings", "max_decoder_position_embeddings")
    limit = next((n for name in names if (n := getattr(model.config, name, None))), None)
    for path, module in model.named_modules():
        padding = module.padding_idx if isinstance(module, nn.Embedding) else None
        if path.endswith(".position_embeddings") and padding is not None:
            limit = module.num_embeddings - padding - 1
    return limit if limit and limit > 0 else None


def size_on_disk(model: nn.Module) -> int:
    """Return the bytes of the model's own weights in memory, without what adapters add."""
    return sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if ".adapter." not in name
    )


def _untrained(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the pooler's path if `weights` lack it as a whole, or its biases are still zero."""
    pooler = f"{model.base_model_prefix}.pooler"
    names = [key for key in model.state_dict() if within(key, [pooler])]
    held = [key for key in names if key in weights]
    biases = [weights[key] for key in held if key.endswith(".bias")]
    absent = bool(names) and not held
    untouched = bool(biases) and not any(bias.any() for bias in biases)
    return [pooler] if absent or untouched else []


def refuse_gaps(model: nn.Module, name: str, loading: Any, new: Sequence[str]) -> None:
    """Raise if the weights lack anything outside `new`, or have it in another shape."""
    problems = [
        f"{printable(key)}: missing"
        for key in sorted(loading["missing_keys"])
        if not within(key, new)
    ]
    problems += [
        f"{printable(key)}: {tuple(found)} in the weights, {tuple(wanted)} in the model"
        for key, found, wanted in sorted(loading["mismatched_keys"])
        if not within(key, new)
    ]
    others = sorted(loading["unexpected_keys"])
    unused = f" ({len(others)} of other names, such as {printable(others[0])})" if others else ""
    raise_all(
        RunError,
        f"The weights of {printable(name, 200)}{unused} do not fit {type(model).__name__}:",
        problems,
        "give a folder whose config.json and weights were written by one save_pretrained.",
    )


def cannot_load(name: str, error: Exception, wanted: str = CLASSIFIER) -> RunError:
    """Return what is wrong with the model `name`, of which the class `wanted` was to be loaded."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RunError(
        f"The model {printable(name, 200)} cannot be loaded: {printable(first, 300)}\n"
        "Fix: give a folder written by save_pretrained, or a hub name (needs the network or the "
        f"cache); the architecture must be one that {wanted} knows."
    )
