"""Turns that a row leaves out are not learnt, whatever else is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.language.rows import only
from tests.language.test_encoding import learnt
from tests.language.tokenizers_ import byte_level

from deltaw.language.data.samples import Conversation, Message, Preference, Rated
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.templating import choose, ends
from deltaw.language.training import pairs, ratings

TOKENIZER = byte_level()
ENCODER = Encoder(TOKENIZER, choose(TOKENIZER, "chatml").template, 200, ("<|im_end|>",), "all")
TALK = (
    Message("user", "What is blue?"),
    Message("assistant", "Coal."),
    Message("user", "No."),
    Message("assistant", "The sky."),
)


@pytest.mark.parametrize(
    ("left", "wanted"),
    [
        (None, "user\nWhat is blue?|\n<assistant\nCoal.|\n<user\nNo.|\n<assistant\nThe sky.|\n"),
        (1, "user\nWhat is blue?|\n<assistant\n<user\nNo.|\n<assistant\nThe sky.|\n"),
        (2, "user\nWhat is blue?|\n<assistant\nCoal.|\n<assistant\nThe sky.|\n"),
        (3, "user\nWhat is blue?|\n<assistant\nCoal.|\n<user\nNo.|\n<assistant\n"),
    ],
)
def test_with_everything_learnt_a_turn_can_be_left_out(left: Any, wanted: str) -> None:
    turns = [replace(m, trained=False) if n == left else m for n, m in enumerate(TALK)]
    (row,) = ENCODER.encode([Conversation(tuple(turns), "f", 1)]).rows
    shown = learnt(TOKENIZER, row).replace("<|im_start|>", "<").replace("<|im_end|>", "|")
    assert shown == wanted


def test_a_prompt_apart_is_learnt_with_everything_alone(tmp_path: Path) -> None:
    prompt = [{"role": m.role, "content": m.content} for m in TALK[:3]]
    answer = [{"role": "assistant", "content": "The sky."}]
    sample = only(tmp_path, {"prompt": prompt, "completion": answer})
    (row,) = ENCODER.encode([sample]).rows
    assert "What is blue?" in learnt(TOKENIZER, row) and "Coal." in learnt(TOKENIZER, row)
    (row,) = replace(ENCODER, learnt="answers").encode([sample]).rows
    assert learnt(TOKENIZER, row) == "The sky.<|im_end|>"


def test_the_answer_that_is_judged_is_the_last_whatever_its_row_says() -> None:
    one = replace(ENCODER, learnt="answers", ends=("<|im_end|>", *ends(TOKENIZER)))
    left = replace(TALK[-1], trained=False)
    worse = Message("assistant", "The coal.")
    (pair,) = pairs.encode(one, [Preference(TALK[:-1], (left,), (worse,), "f", 1)]).pairs
    (answer,) = ratings.encode(one, [Rated(TALK[:-1], (left,), True, "f", 1)]).answers
    assert learnt(TOKENIZER, pair.chosen) == "The sky.<|im_end|>"
    assert learnt(TOKENIZER, pair.rejected) == "The coal.<|im_end|>"
    assert learnt(TOKENIZER, answer.row) == "The sky.<|im_end|>"
