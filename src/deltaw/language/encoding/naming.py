"""Chat templates by the names that people know, for tokenizers that bring none."""

import difflib
from importlib.resources import files

from deltaw.errors import ConfigError
from deltaw.train.escape import printable

FOLDER = files("deltaw.language.encoding") / "templates"
SAME = {
    "qwen2": "qwen",
    "qwen3": "chatml",
    "qwen3_nothink": "chatml",
    "yi": "chatml",
    "hermes": "chatml",
    "gemma2": "gemma",
    "phi": "phi3",
    "phi_small": "phi3",
}
"""Other names of the same template."""
WITHOUT = "alpaca"
"""What is used where neither tokenizer nor recipe has a template: it needs no special words."""
APART = """\
{%- if tools -%}{{- raise_exception('it has no place for tools') -}}{%- endif -%}
{%- for message in messages -%}
{{- message['content'] + ('' if loop.last else '\\n') -}}
{%- endfor -%}
"""
"""The same where a prompt is read apart from its answer: the turns as they are, a line each."""


def known() -> list[str]:
    """Return every name that a template has here."""
    own = [file.name.removesuffix(".jinja") for file in FOLDER.iterdir()]
    return sorted([*own, *SAME])


def source(name: str) -> str:
    """Return the Jinja text of a named template.

    Raises:
        ConfigError: if there is none of this name, naming the nearest.
    """
    if name not in known():
        near = difflib.get_close_matches(name, known(), 1)
        hint = f"did you mean {near[0]}? Known" if near else "known"
        raise ConfigError(
            f"template={printable(name)}: there is no such template; {hint} are "
            f"{', '.join(known())}.\nFix: name one of these, or leave it out: the tokenizer's own "
            "is used then."
        )
    return (FOLDER / f"{SAME.get(name, name)}.jinja").read_text("utf-8")
