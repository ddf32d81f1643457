"""A tiny random BERT with its tokenizer, and small tables of messages, for tests of runs."""

import csv
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TOPICS = {
    "refund": ["refund", "money back", "repay me"],
    "cancel": ["cancel", "stop", "call off"],
    "ship": ["ship", "deliver", "send out"],
}
ENDINGS = ["now", "soon", "please", "thanks", "again", "today"]


def messages(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct short messages of three kinds that a model can tell apart by a word."""
    draw = random.Random(seed)
    found = []
    for number in range(rows):
        label = draw.choice(sorted(TOPICS))
        end = " ".join(draw.choices(ENDINGS, k=3))
        found.append((f"{draw.choice(TOPICS[label])} order {number} {end}", label))
    return found


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write text and label columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    return path


def make_model(folder: Path, *, dropout: float = 0.1) -> Path:
    """Save a two-layer BERT of width 16 with random weights and a WordPiece tokenizer."""
    texts = [text for text, _ in messages(200)]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=48,
    )
    config = BertConfig(
        vocab_size=core.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=48,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    torch.manual_seed(0)
    model = BertModel(config)
    torch.nn.init.normal_(model.pooler.dense.bias, std=0.02)  # one at zero counts as untrained
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def events(run: Path) -> list[dict[str, object]]:
    """What a run wrote to its log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
