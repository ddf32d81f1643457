"""Tiny mixtures of experts of transformers, whose experts are stacked in one parameter."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

NAMES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(12).view(2, 6) * 3 % 40
COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(intermediate_size=24, num_local_experts=4, **COMMON)
    return seeded(lambda: transformers.MixtralForCausalLM(config))


def qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        intermediate_size=24, moe_intermediate_size=8, num_experts=4, head_dim=8, **COMMON
    )
    return seeded(lambda: transformers.Qwen3MoeForCausalLM(config))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        intermediate_size=24, num_local_experts=4, head_dim=8, sliding_window=8, **COMMON
    )
    model = seeded(lambda: transformers.GptOssForCausalLM(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj_bias" in name or "experts" in name:
                parameter.normal_(std=0.2)
    return model


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss}
