"""What chat templates leave out or refuse is said, or left out with the rest."""

from types import SimpleNamespace
from typing import Any

import pytest
from tests.language.tokenizers_ import byte_level

from deltaw.language.data.corpus import Corpus
from deltaw.language.data.samples import Conversation, Message, Preference
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.rendering import Template
from deltaw.language.encoding.templating import choose, ends
from deltaw.language.reading import template_of
from deltaw.language.training.pairs import encode as encode_pairs
from deltaw.language.training.receipt import Tokens
from deltaw.language.training.sides import lines
from deltaw.train.recipe import parse

TOKENIZER = byte_level()
TOOL = {"type": "function", "function": {"name": "search"}}
USER, ANSWER = Message("user", "What is\nblue?"), Message("assistant", "The sky.")
MUTE = "{%- for m in messages if m.role != 'system' -%}{{ m.content | trim }}{{ eos_token }}" + (
    "{%- endfor -%}"
)
"""It has no place for system texts and tools."""
ESCAPED = MUTE.replace("m.content | trim", "m.content | tojson")


def encoder(source: str, **more: Any) -> Encoder:
    template = Template(source, TOKENIZER.special_tokens_map)
    return Encoder(TOKENIZER, template, 200, ends(TOKENIZER), **more)


def talk(*messages: Message, tools: Any = ()) -> Conversation:
    return Conversation(messages, "f", 1, tools)


@pytest.mark.parametrize(
    ("source", "sample", "unsaid"),
    [
        (MUTE, talk(USER, ANSWER), 0),
        (ESCAPED, talk(USER, Message("assistant", "sky")), 0),
        (MUTE, talk(Message("system", "Be kind."), USER, ANSWER), 1),
        (MUTE, talk(USER, ANSWER, tools=(TOOL,)), 1),
        (MUTE.replace("system", "user"), talk(USER, ANSWER), 1),
    ],
)
def test_samples_that_are_read_in_part_are_counted(
    source: str, sample: Conversation, unsaid: int
) -> None:
    one = encoder(source, learnt="all")
    found = one.encode([sample])
    assert found.unsaid == unsaid
    said = "1 sample with a system text, a question or a tool that the template leaves out"
    assert (said in Tokens(found, one).lines()) == bool(unsaid)


def test_answers_to_prompts_that_are_read_in_part_are_counted() -> None:
    one = encoder(MUTE)
    better, worse = (Message("assistant", text) for text in ("The sky.", "Coal."))
    judged = encode_pairs(one, [Preference((USER,), (better,), (worse,), "f", 1, (TOOL,))])
    assert judged.unsaid == 2
    assert lines(judged, one)[-1].startswith("2 answers with a system text")


@pytest.mark.parametrize(("tools", "source"), [((TOOL,), "with tools"), ((), "without")])
def test_of_several_templates_that_with_tools_is_for_samples_with_tools(
    tools: Any, source: str
) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "without", "tool_use": "with tools"}
    corpus = Corpus((), (talk(USER, ANSWER, tools=tools),), (), (), (), (), (), (), {})
    recipe = parse({"model": "m", "data": "d"})

    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    assert template_of(recipe, tokenizer, model, corpus).template.source == source
    assert choose(tokenizer, None).template.source == "without"
