"""Chat templates by the names that people know, for tokenizers that bring none."""

import difflib
import json
import re
from importlib.resources import files

from deltaw.errors import ConfigError
from deltaw.train.escape import printable

FOLDER = files("deltaw.language.encoding") / "templates"
SAME = {
    "qwen2": "qwen",
    "qwen3_nothink": "chatml",
    "yi": "chatml",
    "hermes": "chatml",
    "gemma2": "gemma",
    "phi": "phi3",
    "phi_small": "phi3",
}
"""Other names of the same template."""
WITHOUT = "alpaca"
"""What dialogues get where neither tokenizer nor recipe has a template: no special words in it."""
PARTS = re.compile("BEFORE|BETWEEN|CALL|END")
PLAIN = """\
{%- if tools -%}{{- raise_exception('it has no place for tools') -}}{%- endif -%}
{{- BEFORE -}}
{%- for message in messages -%}
{{- message['content'] -}}
{%- if not loop.last -%}{{- BETWEEN -}}{%- elif message['role'] == 'assistant' -%}{{- END -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- CALL -}}{%- endif -%}
"""
"""The turns as they are, with texts before, between and behind them; an answer at the end ends."""


def known() -> list[str]:
    """Return every name that a template has here."""
    own = [file.name.removesuffix(".jinja") for file in FOLDER.iterdir()]
    return sorted([*own, *SAME])


def plain(before: str = "", between: str = "\n", call: str = "", end: str = "") -> str:
    """Return a template that adds nothing but `before` all, `between` turns, and `call` to go on.

    `end` is behind the last answer. It is for models that read no dialogues, where neither
    tokenizer nor recipe has a template.
    """
    parts = {"BEFORE": before, "BETWEEN": between, "CALL": call, "END": end}
    return PARTS.sub(lambda found: json.dumps(parts[found[0]], ensure_ascii=False), PLAIN)


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
