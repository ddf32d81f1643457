"""Chat templates of transformers (Jinja) as templates of Ollama (Go).

A template is *regular* if it writes every message as

    before(role) + content + after(role)

and then what asks for an answer. Those texts are found by rendering conversations of marks and
looking between the marks; others are rendered to see that the rule holds.
"""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from deltaw.train.rendering import Template
from deltaw.train.sandbox import RunsAway

S, U, A = "\ue000", "\ue001", "\ue002"
"""Marks in the place of contents, which no template holds: characters for private use."""
ROLES = {"system": S, "user": U, "assistant": A}
FAMILIES = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "### ": "alpaca"}
"""What stands before a user's message, and the name of the family."""
PLAIN = re.compile(r"[\w <>|/:.,;!?#*=()\[\]'\n-]*", re.ASCII)
"""What stands for itself in a template of Go's and in a Modelfile."""
DATE = "strftime_now"
"""What a template calls for the date."""
CHECKED = ("u", "su", "uau", "suau", "uauau", "suauau")


@dataclass(frozen=True)
class Chat:
    """A regular template: texts before and after each role's content, and the call for an answer.

    `system` is the system message that conversations without one get, None where they get none.
    """

    family: str
    before: dict[str, str]
    after: dict[str, str]
    call: str
    system: str | None

    def render(self, messages: list[tuple[str, str]]) -> str:
        """Return a conversation with the call for an answer, as Ollama renders it."""
        if self.system is not None and messages[0][0] != "system":
            messages = [("system", self.system), *messages]
        return "".join(self.before[r] + text + self.after[r] for r, text in messages) + self.call

    @property
    def go(self) -> str:
        """The template in Go's syntax."""
        cases = "".join(
            f'{{{{ {word} eq .Role "{role}" }}}}'
            f"{_literal(self.before[role])}{{{{ .Content }}}}{_literal(self.after[role])}"
            for word, role in zip(("if", "else if", "else if"), ROLES, strict=True)
        )
        loop = f"{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{_literal(self.call)}"
        if self.system is None:
            return loop
        added = self.before["system"] + self.system + self.after["system"]
        return f"{{{{ if not .System }}}}{_literal(added)}{{{{ end }}}}{loop}"


def recognised(tokenizer: Any) -> Chat | str:
    """Return the tokenizer's template if it is regular and of a known family, or why it is not."""
    if not tokenizer.chat_template:
        return "the tokenizer has no chat template"
    if DATE in str(tokenizer.chat_template):
        return "the chat template writes the day's date"
    try:
        chat = _between(tokenizer)
        if chat is None:
            return "the chat template does not write each message in one and the same way"
        for turns in CHECKED:
            messages = [(_role(turn), f"{turn}{n}\nab  c") for n, turn in enumerate(turns)]
            if chat.render(messages) != _rendered(tokenizer, messages, call=True):
                return f"the chat template changes what it writes over {len(turns)} messages"
    except TemplateError as error:
        return f"the chat template refuses a plain conversation ({type(error).__name__})"
    except RunsAway as error:
        return f"the chat template runs away: {error.why}"
    except ValueError as error:
        return str(error)
    if not chat.family:
        return f"the chat template is of none of the families {', '.join(FAMILIES.values())}"
    return chat


def turn_end(tokenizer: Any) -> str | None:
    """Return the special token that the chat template writes behind an answer, if it does."""
    if not tokenizer.chat_template:
        return None
    spoken = [{"role": role, "content": ROLES[role]} for role in ("user", "assistant")]
    try:
        text, _ = _template(tokenizer).render(spoken)
    except (TemplateError, ValueError):
        return None
    behind = text.partition(A)[2].lstrip()
    special = (str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)
    return next((word for word in special if word and behind.startswith(word)), None)


def _between(tokenizer: Any) -> Chat | None:
    """Return the texts between the marks, or None where they do not add up."""
    opened, called = (_split(tokenizer, "u", call=call) for call in (False, True))
    answered = _split(tokenizer, "ua", call=False)
    again = _split(tokenizer, "uau", call=False)
    first, after_user = opened
    call = _rest(called[1], prefix=after_user)
    before_answer = _rest(answered[1], prefix=after_user)
    before_user = _rest(again[2], prefix=answered[2])
    before_system, between = _split(tokenizer, "su", call=False)[:2]
    after_system = _rest(between, suffix=before_user)
    if None in (call, before_answer, before_user, after_system):
        return None
    assert call is not None and before_answer is not None
    assert before_user is not None and after_system is not None
    system = None
    if first != before_user:
        system = _rest(_rest(first, prefix=before_system) or "", suffix=between)
        if system is None:
            return None
    return Chat(
        next((name for mark, name in FAMILIES.items() if mark in before_user), ""),
        {"system": before_system, "user": before_user, "assistant": before_answer},
        {"system": after_system, "user": after_user, "assistant": answered[2]},
        call,
        system,
    )


def _split(tokenizer: Any, turns: str, *, call: bool) -> list[str]:
    """Return what is written around the marks of a conversation, such as "suau"."""
    messages = [(role, ROLES[role]) for role in map(_role, turns)]
    pieces = re.split(f"[{S}{U}{A}]", _rendered(tokenizer, messages, call=call))
    if len(pieces) != len(turns) + 1:
        raise ValueError("the chat template does not write every message once")
    return pieces


def _rendered(tokenizer: Any, messages: list[tuple[str, str]], *, call: bool) -> str:
    """Return the text of a conversation without the BOS token, which Ollama puts there itself."""
    spoken = [{"role": role, "content": content} for role, content in messages]
    text, _ = _template(tokenizer).render(spoken, prompt=call)
    bos = tokenizer.bos_token
    has = bool(bos) and text.startswith(bos)
    adds = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if has != adds:
        raise ValueError(
            f"the chat template begins {'with' if has else 'without'} the token for a beginning, "
            f"which Ollama would {'not ' * has}put there"
        )
    return text.removeprefix(bos) if has else text


def _template(tokenizer: Any) -> Template:
    return Template(tokenizer.get_chat_template(), tokenizer.special_tokens_map)


def _role(turn: str) -> str:
    return next(role for role in ROLES if role[0] == turn)


def _rest(text: str, *, prefix: str = "", suffix: str = "") -> str | None:
    """Return the text without what it begins and ends with; None where it does not."""
    whole = text.startswith(prefix) and text.endswith(suffix)
    if not whole or len(text) < len(prefix) + len(suffix):
        return None
    return text[len(prefix) : len(text) - len(suffix)]


def _literal(text: str) -> str:
    """Return a text as it stands, or as a string of Go's where it could be taken for more."""
    if PLAIN.fullmatch(text):
        return text
    kept = (c if c.isprintable() and c not in '"\\{}' else f"\\U{ord(c):08x}" for c in text)
    return f'{{{{ "{"".join(kept)}" }}}}'
