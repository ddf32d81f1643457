"""Which layers an adapter takes where the settings do not say: PEFT's choice, by model type.

It is the projection of queries and values, under the names each architecture gives them, or the
fused projection where there is one.
"""

from collections.abc import Sequence

from torch import nn

from deltaw.errors import ConfigError
from deltaw.formats._peft_write import TASK_HEADS
from deltaw.planning import base_modules

_TYPES = {
    ("q_proj", "v_proj"): (
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 "
        "stablelm"
    ),
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("q", "v"): "mt5 t5",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("query_key_value",): "bloom chatglm falcon gpt_neox",
    ("in_proj",): "deberta",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
}
BY_MODEL_TYPE = {kind: names for names, kinds in _TYPES.items() for kind in kinds.split()}


def default_targets(model: nn.Module) -> list[str]:
    """Return the names of the layers that PEFT adapts in a model of this type.

    Raises:
        ConfigError: if the type is not known.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in BY_MODEL_TYPE:
        raise ConfigError(
            f"It is not known which layers to adapt in {type(model).__name__} (type {kind!r}).\n"
            'Fix: give target_modules in the LoraConfig, for example "all-linear".'
        )
    return list(BY_MODEL_TYPE[kind])


def heads(model: nn.Module, named: Sequence[str] | None, task: str | None) -> list[str]:
    """Return the modules that PEFT trains in full: those named, and those it adds for a task.

    Like PEFT's, the names match the end of a path within a word too: `norm` is `input_layernorm`
    as well. Those for a task need not all be there, though PEFT's files list them all.
    """
    added = TASK_HEADS.get(task or "", ())
    names = tuple(dict.fromkeys((*(named or ()), *added)))
    found = [path for path in base_modules(model) if path and path.endswith(names)]
    missing = [
        name
        for name in names
        if name not in added and not any(path.endswith(name) for path in found)
    ]
    return missing + found
