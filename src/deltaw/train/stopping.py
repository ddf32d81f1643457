"""Which tokens a model's own generation settings stop at."""

from collections.abc import Sequence
from typing import Any


def stop_at(model: Any, tokens: Sequence[int]) -> list[int]:
    """Let `model.generate`, and servers that read its settings, stop at `tokens` too.

    Return those that were not among them. A model that has only read texts stops at its EOS, and
    goes on behind the end of a turn that a chat template writes.
    """
    if model.generation_config is None:
        return []
    known = model.generation_config.eos_token_id
    before = [known] if isinstance(known, int) else list(known or ())
    added = [token for token in dict.fromkeys(tokens) if token not in before]
    if added:
        model.generation_config.eos_token_id = [*before, *added]
    return added
