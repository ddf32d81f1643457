"""A default system text goes with the run's template, into chats and into other programs."""

from pathlib import Path
from typing import Any

import pytest
from tests.language.tokenizers_ import byte_level
from transformers import AutoTokenizer

from deltaw.export._template import Chat, recognised
from deltaw.language.choosing import train
from deltaw.language.data.samples import Message
from deltaw.language.encoding import naming
from deltaw.language.encoding.templating import choose, defaulting
from deltaw.language.generating import Sampling
from deltaw.language.use import chatting
from deltaw.language.use.opened import open_language
from deltaw.train.recipe import parse
from deltaw.train.rendering import Template

SYSTEM = 'Be "kind" %} {{ 1 }}\nand \\n 简短 😀.'
ASKED = [{"role": "user", "content": "x"}]
CASES = [*(naming.source(name) for name in ("chatml", "llama3", "alpaca", "mistral"))]


@pytest.mark.parametrize(
    "source", [*CASES, *("\n" + s for s in CASES[:1]), "\n\n  {% if 1 %}a{% endif %}"]
)
def test_the_line_of_a_template_says_what_a_system_turn_would(source: str) -> None:
    tokenizer = byte_level(bos="<s>")
    saved = defaulting(SYSTEM) + source
    plain, whole = (Template(s, tokenizer.special_tokens_map) for s in (source, saved))
    given = [{"role": "system", "content": "Other."}, *ASKED]
    own = [{"role": "system", "content": SYSTEM}, *ASKED]
    assert whole.render(ASKED) == plain.render(own)
    assert whole.render(given) == plain.render(given)
    theirs = tokenizer.apply_chat_template(ASKED, chat_template=saved, tokenize=False)
    assert theirs == plain.render(own)[0]


def test_a_run_brings_its_default_system_text(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(
        parse(
            {
                "model": str(talker / "model"),
                "data": str(talker / "data.json"),
                "output": str(tmp_path / "run"),
                "max_steps": 1,
                "template": "chatml",
                "default_system": SYSTEM,
            }
        )
    )
    opened = open_language(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    asked = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert asked == opened.encoder.prompted([Message("user", "x")])
    assert asked.count("kind") == 1
    found = recognised(tokenizer_without_bos(tokenizer))
    assert isinstance(found, Chat) and found.system == SYSTEM
    prompts: list[str] = []

    def answered(speaker: Any, texts: list[str], *rest: Any) -> list[str]:
        prompts.extend(texts)
        return ["y"]

    monkeypatch.setattr(chatting, "generate", answered)
    talk = chatting.Chat(opened, {"a": "a"}, Sampling(), merge=False)
    for line in ("x", "/system", "x"):
        talk.say(line)
    assert prompts[0] == asked
    assert prompts[1] == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"


def tokenizer_without_bos(tokenizer: Any) -> Any:
    """A tokenizer with the same template that puts nothing before a text."""
    plain = byte_level()
    plain.chat_template = tokenizer.chat_template
    return plain


def test_a_template_that_has_the_default_system_text_keeps_it_once(talker: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker / "model")
    line = defaulting(SYSTEM)
    tokenizer.chat_template = line + naming.source("chatml")
    assert choose(tokenizer, None, system=SYSTEM).template.source == naming.source("chatml")
    assert choose(tokenizer, None).template.source == line + naming.source("chatml")
