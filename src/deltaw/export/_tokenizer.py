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
    own = _own(source)
    return _base(source) if own is None else own


def add_tokenizer(source: Source, folder: Path) -> dict[str, str]:
    """Write the tokenizer into `folder`; return what is to be told if there is none."""
    tokenizer = tokenizer_of(source)
    if tokenizer is None:
        return {"warning": "no tokenizer was found, neither beside the adapter nor with its base"}
    save_tokenizer(tokenizer, folder)
    return {}


def other_template(source: Source) -> dict[str, str]:
    """Return what is to be told where a program would read the base's chat template, and not this.

    Nothing is told where there is no tokenizer to compare with.
    """
    own, base = _own(source), _base(source)
    if own is None or base is None or own.chat_template in (None, base.chat_template):
        return {}
    return {
        "warning": "the run was trained with another chat template than its base has, which is the "
        "one that this program reads; deltaw export --to hf writes a model with its own"
    }


def _own(source: Source) -> Any | None:
    found = any((source.folder / name).is_file() for name in FILES)
    return _loaded(source, str(source.folder), None) if found else None


def _base(source: Source) -> Any | None:
    return None if source.base is None else _loaded(source, source.base, source.revision)


def _loaded(source: Source, place: str, revision: str | None) -> Any | None:
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(
                place, revision=revision, trust_remote_code=source.trust_remote_code
            )
    except LOADING:
        return None
