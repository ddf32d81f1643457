"""A tiny random Llama with its tokenizer, and a small file of conversations, for tests of runs."""

import json
from pathlib import Path

import torch
from tests.language.tokenizers_ import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

COLOURS = {"sky": "blue", "sea": "blue", "grass": "green", "snow": "white", "coal": "black"}


def make_model(folder: Path, *, positions: int = 128, tied: bool = False) -> Path:
    """Save a two-layer Llama of width 16 with random weights and a byte-level tokenizer."""
    tokenizer = byte_level(bos="<s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(rows: int) -> list[dict[str, str]]:
    """Distinct short questions with their answers."""
    things = list(COLOURS)
    return [
        {
            "instruction": f"What is the colour of the {things[n % 5]}, number {n}?",
            "input": "",
            "output": f"The {things[n % 5]} is {COLOURS[things[n % 5]]}." + " And more." * (n % 4),
        }
        for n in range(rows)
    ]


def write_json(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write rows as an array of objects."""
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path
