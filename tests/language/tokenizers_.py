"""Small tokenizers with a byte-level and a sentence-piece-like vocabulary."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Below is an instruction that describes a task. ### Instruction: ### Response:",
    "你好世界,\n",
    "Coal is black.",
    "What is the colour of the sky? The sky is blue, and so is the sea.",
    "system user assistant tool USER ASSISTANT User Assistant [INST] [/INST] <<SYS>>",
]
TURNS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"]


def byte_level(*, bos: str | None = None, turns: list[str] | None = None) -> Any:
    """A tokenizer that knows every byte, as those of GPT-2, Llama 3 and Qwen."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<eos>", *([bos] if bos else []), *(turns or TURNS)]
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token=bos, pad_token="<eos>"
    )


def sentence_piece() -> Any:
    """A tokenizer that writes a blank as a letter and begins every text with one, as Llama 2's."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
        ),
    )
    core.add_special_tokens([AddedToken("</s>", special=True)])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
