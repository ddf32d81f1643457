"""A T5 of the small model's shape with random weights, and a tokenizer of a few words."""

from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
}
SPECIAL = ("<pad>", "</s>", "<unk>")


def save(folder: Path, words: tuple[str, ...]) -> None:
    """Write the model with a tokenizer of these words, which ends every text as T5's does."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    known = {word: number for number, word in enumerate((*SPECIAL, *dict.fromkeys(words)))}
    core = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = T5Config(**SHAPE, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    T5ForConditionalGeneration(config).save_pretrained(folder)
