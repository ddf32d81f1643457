"""The tokenizer that goes with an adapter."""

from pathlib import Path
from typing import Any

import transformers

from deltaw.export._source import Source
from deltaw.train.model import LOADING, quiet, save_tokenizer

FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TEMPLATE = "chat_template.jinja"


def tokenizer_of(source: Source) -> Any | None:
    """Return the tokenizer in the adapter's folder, or else the base's; None where neither is."""
    places: list[tuple[str, str | None]] = []
    if any((source.folder / name).is_file() for name in FILES):
        places.append((str(source.folder), None))
    if source.base is not None:
        places.append((source.base, source.revision))
    for place, revision in places:
        try:
            with quiet():
                return transformers.AutoTokenizer.from_pretrained(
                    place, revision=revision, trust_remote_code=source.trust_remote_code
                )
        except LOADING:
            continue
    return None


def add_tokenizer(source: Source, folder: Path) -> dict[str, str]:
    """Write the tokenizer into `folder`; return what is to be told if there is none."""
    tokenizer = tokenizer_of(source)
    if tokenizer is None:
        return {"warning": "no tokenizer was found, neither beside the adapter nor with its base"}
    save_tokenizer(tokenizer, folder)
    return {}
