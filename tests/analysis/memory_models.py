"""Tiny models of transformers, as folders and in memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, GPT2Config, LlamaConfig
from transformers.models.bert.modeling_bert import BertForSequenceClassification
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM

VOCABULARY = 97
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> LlamaForCausalLM:
    """A Llama of three layers."""
    return LlamaForCausalLM(LlamaConfig(**LLAMA | settings)).to(dtype)


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of two layers, whose linear layers are Conv1D and whose head is tied."""
    config = GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=VOCABULARY, n_positions=64)
    return GPT2LMHeadModel(config)


def bert(labels: int = 3) -> BertForSequenceClassification:
    """A BERT of two layers with a classification head."""
    config = BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_labels=labels,
    )
    return BertForSequenceClassification(config)


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """The folder, with the model written to it."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder
