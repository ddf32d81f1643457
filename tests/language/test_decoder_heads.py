"""A classification head on a decoder: the last token of the row is read, whatever pads it."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.language.models import COLOURS, make_model
from tests.language.tokenizers_ import byte_level
from tests.train.conftest import Command
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from deltaw.train.batches import Collator
from deltaw.train.data.examples import Example
from deltaw.train.opened import open_run
from deltaw.train.scores import logits
from deltaw.train.tokens import encode


def llama(folder: Path) -> Path:
    return make_model(folder)


def gpt2(folder: Path) -> Path:
    """GPT-2 knows no padding; its own end token has to do."""
    tokenizer = byte_level()
    tokenizer.pad_token = None
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [llama, gpt2])
def test_rows_of_any_length_together_score_as_alone_and_as_in_peft(
    deltaw_command: Command, make: object, tmp_path: Path
) -> None:
    model = make(tmp_path / "model")  # type: ignore[operator]
    rows = [f"is the {thing} {n},{colour}" for n in range(5) for thing, colour in COLOURS.items()]
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    run = tmp_path / "run"
    code, out, _ = deltaw_command(
        "train", model, data, "-o", run, "max_steps=6", "learning_rate=0.02", "batch_size=4"
    )
    assert code == 0 and "trained in full (score)" in out
    texts = ["snow", "is the sky 3", "is the sky as blue as the sea is, number 17"]
    opened = open_run(run)
    collate = Collator(opened.tokenizer)
    rows, _ = encode(opened.tokenizer, [Example(t, None, None, "f", 1) for t in texts], None)
    together = logits(opened.model, rows, collate)
    alone = torch.cat([logits(opened.model, [row], collate) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(run)
    count = len(opened.labels)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=count)
    theirs = PeftModel.from_pretrained(base, run).eval()
    with torch.no_grad():
        wanted = torch.cat([theirs(**tokenizer(t, return_tensors="pt")).logits for t in texts])
    torch.testing.assert_close(together, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=1e-5)
