"""Answers of a run's model to prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deltaw.language.encoding.encoder import Encoder
from deltaw.train.distributed.dividing import divided
from deltaw.train.model import positions, quiet


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn; names of transformers."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model with its tokenizer, and what its rows are like."""

    model: nn.Module
    tokenizer: Any
    encoder: Encoder


def answers(
    speaker: Speaker, prompts: Sequence[str], sampling: Sampling, batch_size: int = 16
) -> list[str]:
    """Return the answer to each rendered prompt; prompts of like length go together.

    Where prompt and answer together are too long for the model, the answer ends early.
    """
    lengths = [len(ids) for ids in speaker.encoder.prompt_ids(prompts, 1)]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    pieces = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def of(some: Sequence[int]) -> list[str]:
        room = speaker.encoder.room(lengths[some[-1]])
        short = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        return generate(speaker, [prompts[index] for index in some], short)

    found = [""] * len(prompts)
    for some, made in zip(pieces, divided(pieces, of, whole=speaker.model), strict=True):
        for index, answer in zip(some, made, strict=True):
            found[index] = answer
    return found


def generate(
    speaker: Speaker,
    prompts: Sequence[str],
    sampling: Sampling,
    streamer: Any = None,
) -> list[str]:
    """Return the answer to each rendered prompt, up to the first end of a turn.

    No answer is longer than the model has positions for.
    """
    tokenizer, model = speaker.tokenizer, speaker.model
    apart = model.config.is_encoder_decoder  # type: ignore[union-attr]
    rows = speaker.encoder.prompt_ids(prompts, sampling.max_new_tokens)
    most, limit = sampling.max_new_tokens, positions(model)
    if limit is not None:
        most = min(most, limit if apart else max(1, limit - max(map(len, rows))))
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id
    ids = _padded(rows, pad, left=not apart).to(device)
    mask = _padded([[1] * len(row) for row in rows], 0, left=not apart).to(device)
    drawn = sampling.temperature > 0
    training = model.training
    model.eval()
    with torch.no_grad(), quiet():
        found = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=drawn,
            temperature=sampling.temperature if drawn else None,
            top_p=sampling.top_p if drawn else None,
            top_k=None,
            num_beams=sampling.num_beams,
            length_penalty=sampling.length_penalty if sampling.num_beams > 1 else None,
            repetition_penalty=sampling.repetition_penalty,
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            eos_token_id=speaker.encoder.end_ids,
            pad_token_id=pad,
            streamer=streamer,
        )
    model.train(training)
    begin = 1 if apart else ids.shape[1]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in found[:, begin:]]


def _padded(rows: Sequence[list[int]], value: int, *, left: bool) -> torch.Tensor:
    """Return rows as one tensor, filled up on the left where they are gone on with."""
    longest = max(map(len, rows))
    filled = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(filled, rows, strict=True)
    return torch.tensor([[*more, *row] if left else [*row, *more] for more, row in pairs])
