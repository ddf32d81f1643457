"""What a model answers to fixed tokens, to compare it before and after it was written."""

from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH = 4, 32


def probe_tokens(config: Any) -> Tensor:
    """Return tokens (rows, length), the same for every model of this configuration."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or 2 * LENGTH
    length = min(LENGTH, max(1, limit // 2))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(text.vocab_size, (ROWS, length), generator=generator, device="cpu")


@torch.no_grad()
def answers(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits, or without a head the last hidden states, in float32 on the CPU."""
    tokens = tokens.to(next(model.parameters()).device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        batch["decoder_input_ids"] = tokens
    output: Tensor = model(**batch)[0]
    return output.float().cpu()


def largest(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; NaN where there is one."""
    return (a - b).abs().max().item()


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return x.square().mean().sqrt().item()


def agreement(difference: float, tokens: Tensor, size: float) -> str:
    """Return how far answers of this rms to the tokens differ, for a person."""
    return (
        f"largest difference of answers to {tokens.numel()} probe tokens: {difference:.1e} "
        f"(their rms is {size:.2g})"
    )
