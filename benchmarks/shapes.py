"""Llamas of known shapes with random weights, built in a second or two."""

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-88m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "tinyllama-4": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": False,
    },
}
DRAWN = 4_000_037
"""How many random numbers are drawn; a prime, so that no two rows of a weight are alike."""
STD = 0.02


def empty(shape: str) -> Any:
    """Return a model without memory for its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], use_cache=False))


def build(shape: str, dtype: str = "bfloat16", seed: int = 0) -> Any:
    """Return a model of that shape: norms of one, other weights N(0, 0.02²)."""
    import torch

    model = empty(shape).to(getattr(torch, dtype)).to_empty(device="cpu")
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(DRAWN, generator=generator).mul_(STD).to(getattr(torch, dtype))
    offset = 0
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            offset = _fill(parameter.data.view(-1), numbers, offset)
    return model


def _fill(flat: Any, numbers: Any, offset: int) -> int:
    """Fill one weight with the numbers from `offset` on, and return where the next one starts."""
    filled = 0
    while filled < len(flat):
        part = numbers[offset : offset + len(flat) - filled]
        flat[filled : filled + len(part)] = part
        filled += len(part)
        offset = (offset + len(part)) % len(numbers)
    return offset


def randomise(model: Any) -> None:
    """Give every `lora_B` random values, so that ΔW is not zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=STD, generator=generator)
