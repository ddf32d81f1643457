"""Tiny random encoder-decoder models with a tokenizer of letters, and words written backwards."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deltaw.train.model import quiet

LETTERS = "abcde"
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]


def letters(*, bos: bool = False) -> Any:
    """A tokenizer of blank-separated words that ends every text with </s>, as T5's (BART's)."""
    words = [*SPECIAL, *LETTERS, "go", ":", "?"]
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if bos else "$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        bos_token="<s>",
    )  # fmt: skip


def t5(**more: Any) -> Any:
    """A T5 of two and two layers of width 32."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": len(letters()), "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
        "num_heads": 4, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, **more,
    }  # fmt: skip
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings))


def bart() -> Any:
    """A BART of one and one layer of width 16 with 24 positions, which begins answers with EOS."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=len(letters()), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=24, dropout=0.0, pad_token_id=0,
        bos_token_id=3, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def save(folder: Path, model: Any, *, bos: bool = False) -> Path:
    """Save a model with its tokenizer."""
    with quiet():
        model.save_pretrained(folder)
    letters(bos=bos).save_pretrained(folder)
    return folder


def backwards(length: int = 3) -> list[dict[str, str]]:
    """Every word of so many letters as a prompt, and backwards as its completion."""
    words = product(LETTERS, repeat=length)
    return [{"prompt": " ".join(w), "completion": " ".join(reversed(w))} for w in words]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as an array of objects."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
