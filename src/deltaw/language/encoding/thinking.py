"""Whether a model thinks before it answers: variables that chat templates of such models read."""

from collections.abc import Mapping
from typing import Any

from deltaw.errors import ConfigError
from deltaw.language.encoding.templating import Chosen
from deltaw.train.rendering import Template

VARIABLES = ("enable_thinking", "preserve_thinking")


def told(chosen: Chosen, asked: Mapping[str, bool | None], tokenizer: Any) -> Chosen:
    """Return the template with each of `VARIABLES` set that is asked for.

    The setting stands in the template, so that whoever gets it renders as training did.

    Raises:
        ConfigError: listing the variables that this template does not read.
    """
    source = chosen.template.source
    for name in VARIABLES:
        for value in (True, False):
            source = source.removeprefix(_line(name, value))
    template = Template(source, tokenizer.special_tokens_map)
    wanted = {name: value for name in VARIABLES if (value := asked.get(name)) is not None}
    unread = [f"{name}={wanted[name]}" for name in wanted if name not in template.variables()]
    if unread:
        raise ConfigError(
            f"{', '.join(unread)}: no effect, the chat template does not read it.\n"
            "Fix: leave it out, or give a template that does, such as template=qwen3."
        )
    if not wanted:
        return chosen
    lines = "".join(_line(name, value) for name, value in wanted.items())
    return Chosen(Template(lines + source, tokenizer.special_tokens_map), chosen.origin)


def _line(name: str, value: bool) -> str:
    return f"{{%- set {name} = {str(value).lower()} %}}\n"
