"""Tiny random language models, a tokenizer, and adapters for them that are not at their start."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import deltaw

VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 40, "n_inner": 36}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(kind: str, **more: Any) -> transformers.PretrainedConfig:
    """The configuration of a `gpt2`, `llama`, `qwen2`, `qwen3`, ... of three blocks."""
    if kind == "gpt2":
        sizes = {k: v for k, v in SIZES.items() if k in ("vocab_size", "bos_token_id")}
        return transformers.GPT2Config(**sizes, eos_token_id=2, **GPT2, **more)
    heads = {"head_dim": 8} if kind in ("llama", "qwen3", "mistral") else {}
    settings = {**SIZES, **heads, "tie_word_embeddings": False, **more}
    return transformers.AutoConfig.for_model(kind, **settings)


def save_base(folder: Path, kind: str = "llama", *, dtype: Any = None, **more: Any) -> Path:
    """Save a random model and its tokenizer."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config(kind, **more))
    model.to(dtype or torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path, base: Path, *, task: str | None = "CAUSAL_LM", auto: Any = None, **settings: Any
) -> Path:
    """Save an adapter of the model in `base`, with every tensor drawn at random."""
    kind = auto or transformers.AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=torch.float32)
    given = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, **settings}
    deltaw.attach(model, deltaw.LoraConfig(task_type=task, **given))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_(std=0.2)
    deltaw.save(model, folder)
    return folder


def tokenizer(template: str | None = None, *, bos: bool = False) -> Any:
    """A tokenizer of words; with `bos` it begins every text with <s>."""
    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(VOCABULARY - 3))]
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = template
    return made


@cache
def tokens() -> torch.Tensor:
    """Some tokens to ask about."""
    return torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """The answers to `tokens()`."""
    return model.eval()(input_ids=tokens())[0].float()


def with_peft(base: Path, adapter: Path, auto: Any = None) -> Any:
    """The base with the adapter on, by PEFT."""
    import peft

    kind = auto or transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter)
