"""Small models of transformers that the tests share, in evaluation mode."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def llama(dtype: torch.dtype = torch.float32, tie: bool = False) -> LlamaForCausalLM:
    """Two blocks with grouped heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    """Two blocks of `Conv1D`."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=24,
        n_head=2,
        vocab_size=32,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def bert() -> BertForSequenceClassification:
    """Two blocks, a pooler and a head of three classes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=28,
        max_position_embeddings=40,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()
