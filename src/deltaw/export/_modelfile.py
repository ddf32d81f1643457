"""Values in a Modelfile of Ollama's, such that none is read as another line."""

import re

from deltaw.errors import ConfigError, printable

NAME = re.compile(r"[A-Za-z0-9][\w.-]*([/:][\w.-]+)*", re.ASCII)
QUOTES = '"""'


def quoted(text: str) -> str:
    """Return a value between triple quotes, which Ollama reads as exactly this text.

    Ollama's reader knows no escapes. It ends a value at the first line that ends with the quotes,
    whatever spaces follow, and leaves out characters that cannot be printed.

    Raises:
        ConfigError: if the text has such a line before its last, or such a character.
    """
    lines = text.split("\n")
    strange = sorted({c for c in text if c not in "\n\t" and not c.isprintable()})
    if strange or any(line.rstrip().endswith(QUOTES) for line in lines[:-1]):
        why = f"holds {printable(strange[0])}" if strange else f"has a line that ends with {QUOTES}"
        raise ConfigError(
            f"A Modelfile cannot hold this text, which {why}: {printable(text, 200)}\n"
            "Fix: change it in the tokenizer's chat template or special tokens."
        )
    return f"{QUOTES}{text}{QUOTES}"


def require_name(name: str) -> str:
    """Return the name of a model in Ollama; raise `ConfigError` for anything that is none."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{printable(name, 200)!r} is no name of a model in Ollama.\n"
            "Fix: give one as `ollama list` shows it, such as llama3.2:1b."
        )
    return name
