"""What a tokenizer makes of the rows' own words: control tokens in them, unknown characters."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from deltaw.language.data.samples import (
    Completion,
    Conversation,
    Message,
    Passage,
    Preference,
    Rated,
    Sample,
    Turns,
)


@dataclass(frozen=True, slots=True)
class Control:
    """A sample whose own words hold special tokens of the model, and how often each."""

    sample: Sample
    tokens: Counter[str]


def control_tokens(tokenizer: Any, samples: Iterable[Sample]) -> list[Control]:
    """Return the samples in which text would be read as control tokens.

    A row that says `<|im_end|>` ends its turn there, whatever its writer meant.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    if not special:
        return []
    words = sorted(map(re.escape, special), key=len, reverse=True)
    pattern = re.compile("|".join(words))
    found = []
    for sample in samples:
        tokens = Counter(word for text in own_words(sample) for word in pattern.findall(text))
        if tokens:
            found.append(Control(sample, tokens))
    return found


def unknown_characters(tokenizer: Any, samples: Sequence[Sample]) -> Counter[str]:
    """Return the characters that the vocabulary does not have, and how often they occur."""
    unknown = tokenizer.unk_token_id
    if unknown is None or not samples:
        return Counter()
    counts = Counter(c for sample in samples for text in own_words(sample) for c in text)
    characters = list(counts)
    encoded = tokenizer(characters, add_special_tokens=False)["input_ids"]
    return Counter(
        {c: counts[c] for c, ids in zip(characters, encoded, strict=True) if unknown in ids}
    )


def own_words(sample: Sample) -> Iterator[str]:
    """Yield every text that is the sample's, not the template's."""
    if isinstance(sample, Passage):
        yield sample.text
    elif isinstance(sample, Completion):
        yield from (sample.prompt, sample.completion)
    else:
        for turns in _turns(sample):
            yield from (turns,) if isinstance(turns, str) else chain(*map(_of_message, turns))
        yield from (_as_json(tool) for tool in sample.tools)


def _turns(sample: Conversation | Preference | Rated) -> tuple[Turns, ...]:
    if isinstance(sample, Conversation):
        return (sample.messages,)
    if isinstance(sample, Preference):
        return sample.prompt, sample.chosen, sample.rejected
    return sample.prompt, sample.completion


def _of_message(message: Message) -> Iterator[str]:
    yield message.content
    yield from (_as_json(call) for call in message.tool_calls)
    yield from (own for own in (message.name, message.answers, *message.call_ids) if own)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
