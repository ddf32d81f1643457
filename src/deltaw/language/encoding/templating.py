"""Which chat template a run uses: the recipe's, the tokenizer's, or one that needs nothing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import ConfigError
from deltaw.language.encoding.answers import turn_end
from deltaw.language.encoding.naming import WITHOUT, source
from deltaw.train.escape import printable
from deltaw.train.rendering import Template


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chat template, and where it is from as a sentence."""

    template: Template
    origin: str


def choose(
    tokenizer: Any,
    name: str | None,
    *,
    plain: str | None = None,
    tools: bool = False,
    system: str | None = None,
) -> Chosen:
    """Return the template of a name or a .jinja file, else the tokenizer's own, else `alpaca`.

    `plain` takes the place of the last, for models that read no dialogues; `tools` asks for the
    tokenizer's template with tools where it has several. A `system` text that the tokenizer's own
    gives to conversations without one is left to the encoder.

    Raises:
        ConfigError: if there is none of that name, or it cannot be read.
    """
    if name is not None and name.endswith(".jinja"):
        try:
            return _made(tokenizer, Path(name).read_text("utf-8"), f"the file {printable(name)}")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"template={printable(name)}: {error}\nFix: check the path."
            ) from error
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = (tools and own.get("tool_use")) or own.get("default")
    own = own and own.removeprefix(defaulting(system))
    if name is not None:
        other = ", not the tokenizer's own" if own and own != source(name) else ""
        return _made(tokenizer, source(name), f"{name} (asked for{other})")
    if own:
        return _made(tokenizer, own, "the tokenizer's own")
    if plain is not None:
        return _made(tokenizer, plain, "none, texts as they are (template=NAME asks for one)")
    return _made(
        tokenizer,
        source(WITHOUT),
        f"{WITHOUT}, because the tokenizer has none (template=NAME asks for another)",
    )


def defaulting(system: str | None) -> str:
    """Return the line of a template that gives a system text to conversations without one."""
    if system is None:
        return ""
    message = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        f"{{%- set messages = [{message}] + messages -%}}{{%- endif %}}\n"
    )


def _made(tokenizer: Any, text: str, origin: str) -> Chosen:
    return Chosen(Template(text, tokenizer.special_tokens_map), origin)


def ends(
    tokenizer: Any, generation: Any = None, template: Template | None = None
) -> tuple[str, ...]:
    """Return the words that end an answer: EOS, and what else stops the model's generation.

    A special token that the template writes behind an answer ends it too: that of chats is often
    not the EOS of a model that has only read texts.
    """
    stops = getattr(generation, "eos_token_id", None)
    stops = [stops] if isinstance(stops, int) else stops or []
    ids = [tokenizer.eos_token_id, *stops]
    found = [tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None]
    behind = "" if template is None else turn_end(template).lstrip()
    special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    found += [word for word in special if word and behind.startswith(word)]
    return tuple(dict.fromkeys(found))
