"""What a tokenizer puts around a text, and what stands for what it cannot write."""

from typing import Any


def begun(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before a text, such as BOS."""
    mark = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    size = len(whole) - len(mark)
    return next((whole[:n] for n in range(size + 1) if whole[n : n + len(mark)] == mark), [])


def unknown_id(tokenizer: Any) -> int | None:
    """Return the token that stands for unknown characters alone, or None."""
    number: int | None = tokenizer.unk_token_id
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if number in others else number
