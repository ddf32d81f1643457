"""What a tokenizer makes of the rows' own words: control tokens in them, unknown characters."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.language.data.samples import Completion, Message, Passage
from deltaw.language.encoding.encoder import Sample


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
        for message in sample.messages:
            yield from _of_message(message)
        yield from (_as_json(tool) for tool in sample.tools)


def _of_message(message: Message) -> Iterator[str]:
    yield message.content
    yield from (_as_json(call) for call in message.tool_calls)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
