"""What a target is asked for."""

from dataclasses import dataclass
from pathlib import Path

from deltaw.export._source import Source

Told = dict[str, str]
"""What a person is told, by short names such as `checked` and `next`, in this order."""


@dataclass(frozen=True)
class Order:
    """One export: `folder` is where to write now, `out` where that will be in the end.

    `dtype` and `requantize` are for merged models; `ollama_base` names a model that Ollama has.
    """

    source: Source
    folder: Path
    out: Path
    dtype: str | None = None
    ollama_base: str | None = None
    requantize: bool = False
