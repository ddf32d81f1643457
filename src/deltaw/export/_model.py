"""The base model of an adapter: its configuration, and the model itself with the adapter on."""

from typing import Any

import torch
import transformers
from torch import nn

import deltaw
from deltaw.errors import RunError, printable, raise_all
from deltaw.export._source import SEQ2SEQ, Source
from deltaw.state import State
from deltaw.train.export import require_dtype
from deltaw.train.identity import require_base
from deltaw.train.methods import restore, weight_dtype
from deltaw.train.model import LOADING, quiet
from deltaw.train.opened import open_run
from deltaw.train.packing import packing
from deltaw.train.placing import place
from deltaw.unpacking import usual_dtype

LAST = ("score", "classifier.out_proj", "classifier")
"""Where the last layer of a classifier is, whose rows are its labels."""


def load_config(source: Source) -> Any:
    """Return the base's configuration.

    Raises:
        RunError: if nobody says where the base is, or there is no such model.
    """
    base = source.require_base()
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(
                base, revision=source.revision, trust_remote_code=source.trust_remote_code
            )
    except LOADING as error:
        raise _cannot_load(base, error) from error


def is_language_model(source: Source, config: Any) -> bool:
    """Tell whether the adapter is for a model that predicts the next token."""
    if source.task is not None:
        return source.task == "CAUSAL_LM"
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())


def adapted(source: Source, dtype: str | None) -> tuple[nn.Module, torch.dtype]:
    """Return the base with the adapter on, in evaluation, and the dtype to merge it in.

    A run on packed weights is opened as it was trained, packed alike, and one of a classifier in
    float32; any other base is loaded in the dtype to merge in. What kind of model it is `task_type`
    decides: CAUSAL_LM and SEQ_2_SEQ_LM take a language model, SEQ_CLS a classifier with as many
    labels as the adapter's head has rows, and none the class that the base's configuration names,
    or, where the layers are named without its prefix, the model below its head.

    Raises:
        ConfigError: if there is no such dtype.
        RunError: if the base cannot be loaded, is not the one of the run, or lacks weights that the
            adapter does not bring.
        FormatError: if the adapter does not fit the base.
    """
    require_dtype(dtype)
    if source.recipe is not None and source.task == "SEQ_CLS":
        trust = source.trust_remote_code
        run = open_run(source.folder, model=source.base, trust_remote_code=trust)
        return run.model, getattr(torch, dtype or "float32")
    config = load_config(source)
    base = source.require_base()
    kind: Any = _class_for(source, config)
    if source.task == "SEQ_CLS":
        config.num_labels = _labels(source.state) or config.num_labels
    recipe = source.recipe
    asked: torch.dtype | str = getattr(torch, dtype) if dtype else config.dtype or "auto"
    trained_in = asked if recipe is None else weight_dtype(recipe)
    model, loading = _load(source, kind, config, trained_in)
    if recipe is not None:  # whose digest is of the weights as training read them
        require_base(model, base, recipe)
    packed = recipe is not None and packing(recipe) is not None
    if trained_in != asked and not packed:
        model, loading = _load(source, kind, config, asked)
    gaps = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    trained = {
        f"{path}.{name.removesuffix('.trained')}"
        for path, layer in source.state.layers.items()
        for name in layer.tensors
        if name.endswith(".trained")
    }
    raise_all(
        RunError,
        f"{printable(base, 300)} lacks weights of {kind.__name__} that the adapter does not bring:",
        [printable(key) for key in sorted(set(gaps) - trained)],
        "name the model that the adapter was trained on with --base.",
    )
    if recipe is not None and packed:
        restore(model, recipe, source.folder)
        place(model)
    else:
        deltaw.load(model, source.folder)
    return model.eval(), asked if isinstance(asked, torch.dtype) else usual_dtype(model)


def _load(
    source: Source, kind: Any, config: Any, dtype: torch.dtype | str
) -> tuple[nn.Module, Any]:
    """Return the base in this dtype, and what of it was not in its files."""
    base = source.require_base()
    try:
        with quiet():
            model, loading = kind.from_pretrained(
                base,
                config=config,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=source.task == "SEQ_CLS",
            )
    except LOADING as error:
        raise _cannot_load(base, error) from error
    return model, loading


def _class_for(source: Source, config: Any) -> Any:
    if source.task == "CAUSAL_LM":
        return transformers.AutoModelForCausalLM
    if source.task == SEQ2SEQ:
        return transformers.AutoModelForSeq2SeqLM
    if source.task == "SEQ_CLS":
        return transformers.AutoModelForSequenceClassification
    kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    prefix = f"{getattr(kind, 'base_model_prefix', '')}."
    whole = any(path.startswith(prefix) for path in source.state.layers)
    return kind if whole else transformers.AutoModel


def _labels(state: State) -> int | None:
    for path in LAST:
        layer = state.layers.get(path)
        weight = layer.tensors.get("weight.trained") if layer is not None else None
        if weight is not None:
            return len(weight)
    return None


def _cannot_load(base: str, error: Exception) -> RunError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RunError(
        f"The base model {printable(base, 200)} cannot be loaded: {printable(first, 300)}\n"
        "Fix: say where it is with --base: a folder written by save_pretrained, or a hub name "
        "(needs the network or the cache)."
    )
