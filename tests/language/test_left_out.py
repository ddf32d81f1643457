"""What chat templates leave out or refuse is said, or left out with the rest."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tests.language.tokenizers_ import byte_level

from deltaw.errors import DataError
from deltaw.language.data.corpus import Corpus
from deltaw.language.data.samples import Conversation, Message, Preference, Rated
from deltaw.language.encoding.answers import answers
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.templating import choose, ends
from deltaw.language.reading import encoder_of, template_of
from deltaw.language.training.pairs import encode as encode_pairs
from deltaw.language.training.ratings import encode as encode_ratings
from deltaw.language.training.receipt import Tokens
from deltaw.language.training.sides import lines
from deltaw.train.recipe import parse
from deltaw.train.rendering import Template
from deltaw.train.sandbox import Refused, RunsAway

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


FUSSY = "{% if messages[0].content == 'No.' %}{{ raise_exception('not this') }}{% endif %}" + MUTE
BAD = Message("user", "No.")


def test_a_template_need_not_write_no_turns_at_all() -> None:
    """Dialogues may begin with an answer, and templates look at what is first."""
    sample = talk(ANSWER, USER, Message("assistant", "And the sea."))
    chatml = choose(TOKENIZER, "chatml").template
    with pytest.raises(Refused, match="cannot read it: list object has no element 0"):
        chatml.render([], prompt=True)
    _, spans = answers(chatml, sample.messages, (), ("<|im_end|>",))
    text, _ = chatml.render([{"role": m.role, "content": m.content} for m in sample.messages])
    assert [text[a:b] for a, b in spans] == ["The sky.<|im_end|>", "And the sea.<|im_end|>"]


def test_what_the_template_refuses_is_an_error_or_skipped_and_listed() -> None:
    samples = [talk(USER, ANSWER), Conversation((BAD, ANSWER), "f", 2)]
    with pytest.raises(DataError, match=r"f:2: not this\nFix: .*skip_bad_rows=true"):
        encoder(FUSSY).encode(samples)
    found = encoder(FUSSY, skip_bad=True).encode(samples)
    assert len(found.rows) == 1 and [str(skip) for skip in found.skipped] == ["f:2: not this"]
    endless = encoder(FUSSY.replace("{{ eos_token }}", ""), skip_bad=True).encode(samples[:1])
    assert not endless.rows and "would never learn to stop" in str(endless.skipped[0])
    with pytest.raises(DataError, match=r"f:1: \d+ tokens, 5 fit"):
        replace(encoder(FUSSY, too_long="raise", skip_bad=True), max_length=5).encode(samples)


def test_judged_answers_that_the_template_refuses_are_skipped_and_listed() -> None:
    one, worse = encoder(FUSSY, skip_bad=True), Message("assistant", "Coal.")
    compared = encode_pairs(one, [Preference((BAD,), (ANSWER,), (worse,), "f", 3)])
    rated = encode_ratings(one, [Rated((BAD,), (ANSWER,), True, "f", 3)])
    for judged in (compared, rated):
        assert [str(skip) for skip in judged.skipped] == ["f:3: not this"]


def test_a_recipe_says_whether_rows_are_skipped() -> None:
    config = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=64)
    model = SimpleNamespace(config=config, generation_config=None, named_modules={}.items)
    for skip in (True, False):
        recipe = parse({"model": "m", "data": "d", "skip_bad_rows": skip})
        assert encoder_of(recipe, TOKENIZER, choose(TOKENIZER, None), model).skip_bad == skip


def test_the_first_row_of_which_a_template_makes_no_end_stops_all() -> None:
    long = "{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}"
    source = f"{{% if messages[0].content == 'b' %}}{long}{{% endif %}}"
    talks = [Conversation((Message("user", word),), "f.json", n) for n, word in enumerate("abb")]
    encoder = Encoder(TOKENIZER, Template(source, {}), 99, ("<eos>",), skip_bad=True)
    with pytest.raises(RunsAway, match=r"runs away: it calls .* times, at f\.json:1\.\nFix: "):
        encoder.encode(talks)
