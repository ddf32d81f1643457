"""Which stretch of a conversation's text is an answer, for templates of every kind."""

import pytest
from tests.language.tokenizers_ import byte_level

from deltaw.language.data.samples import Message
from deltaw.language.encoding import naming
from deltaw.language.encoding.answers import answers
from deltaw.language.encoding.templating import ends
from deltaw.train.rendering import Template
from deltaw.train.sandbox import Refused

DIALOGUE = (
    Message("system", "Be kind."),
    Message("user", "What is blue?"),
    Message("assistant", "The sky."),
    Message("user", "And more?"),
    Message("assistant", "The sea. The sky."),
)
ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
AFTER = {
    "llama2": (" ", " </s>"),
    "mistral": (" ", "</s>"),
    "vicuna": (" ", "</s>"),
    "deepseek": (" ", "</s>"),
    "chatml": ("", "<|im_end|>"),
    "qwen": ("", "<|im_end|>"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "phi4": ("", "<|im_end|>"),
    "llama3": ("", "<|eot_id|>"),
    "phi3": ("", "<|end|>"),
    "gemma": ("", "<end_of_turn>"),
}
FORGETS_THOUGHTS = """
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}
{%- elif m.role == 'assistant' and '</think>' not in m.content %}<think></think>{{ m.content }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
"""As Qwen3: thoughts of earlier turns are dropped, and the last turn begins with some."""
SHOUTS = "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}</s>{% endfor %}"
COUNTS = (
    "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
)
NO_PROMPT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"


def found(source: str, messages: tuple[Message, ...] = DIALOGUE) -> list[str]:
    template = Template(source, {"bos_token": "<s>", "eos_token": "</s>"})
    text, spans = answers(template, messages, (), ENDS)
    return [text[a:b] for a, b in spans]


@pytest.mark.parametrize("name", sorted(set(naming.known()) - set(naming.SAME)))
def test_every_named_template_gives_answer_and_end(name: str) -> None:
    before, after = AFTER.get(name, ("", "</s>"))
    assert found(naming.source(name)) == [
        f"{before}The sky.{after}",
        f"{before}The sea. The sky.{after}",
    ]


def test_turns_that_the_row_leaves_out_are_not_learnt() -> None:
    first = Message("assistant", "The sky.", trained=False)
    messages = (*DIALOGUE[:2], first, *DIALOGUE[3:])
    assert found(naming.source("chatml"), messages) == ["The sea. The sky.<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns() -> None:
    thought = Message("assistant", "<think>Well</think>The sky.")
    last = Message("assistant", "<think>Hm</think>The sea.")
    kept = "<think>Hm</think>The sea.<|im_end|>"
    with pytest.raises(Refused, match=r"turn 3 is changed or left out .*; train_on=last learns"):
        found(FORGETS_THOUGHTS, (*DIALOGUE[:2], thought, DIALOGUE[3], last))
    messages = (*DIALOGUE[:4], last)
    assert found(FORGETS_THOUGHTS, messages) == ["The sky.<|im_end|>", kept]
    assert found(FORGETS_THOUGHTS)[1] == "<think></think>The sea. The sky.<|im_end|>"


def test_a_template_that_writes_ahead_of_what_comes() -> None:
    assert found(COUNTS) == ["The sky.</s>", "The sea. The sky.</s>"]


def test_without_words_that_prompt_an_answer_its_heading_is_learnt_too() -> None:
    assert found(NO_PROMPT) == ["[assistant]The sky.</s>", "[assistant]The sea. The sky.</s>"]


def test_a_template_that_changes_answers_is_refused() -> None:
    with pytest.raises(Refused, match="turn 3 is changed or left out"):
        found(SHOUTS)


def test_a_call_without_a_place_in_the_template_is_refused() -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    messages = (DIALOGUE[1], Message("assistant", "", (call,)))
    with pytest.raises(Refused, match="turn 2 is changed or left out"):
        found(naming.source("phi3"), messages)
    with pytest.raises(Refused, match=r"template$"):  # train_on=last would not help
        found(naming.source("phi3"), messages)
    assert found(naming.source("chatml"), messages) == [
        '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call><|im_end|>'
    ]


def test_a_turn_that_is_no_answer_cannot_be_learnt_alone() -> None:
    messages = (Message("user", "x", trained=True), Message("assistant", "y"))
    with pytest.raises(Refused, match=r"turn 1 is to be learnt .* train_on=all"):
        found(naming.source("chatml"), messages)


CALLS = """
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and not loop.last and not m.tool_calls %}
{{- m.content.split('</think>')[-1] }}
{%- elif m.role == 'assistant' %}<think>
{{ m.content.split('</think>')[0].split('<think>')[-1] | trim }}
</think>

{{ m.content.split('</think>')[-1] | trim }}
{%- for call in m.tool_calls or () %}
<tool_call>{{ call.function.name }}</tool_call>
{%- endfor %}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
"""As Qwen3's: thoughts are written in its own way, and calls stand behind them."""


def test_a_call_in_a_template_that_rewrites_what_came_before() -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    messages = (
        DIALOGUE[1],
        Message("assistant", "<think>Look it up.</think>", (call,)),
        Message("tool", "blue: sky"),
        Message("assistant", "<think>So</think>The sky."),
    )
    first, last = found(CALLS, messages)
    assert first.endswith("<tool_call>search</tool_call><|im_end|>")
    assert last == "<think>\nSo\n</think>\n\nThe sky.<|im_end|>"


def test_only_turns_that_are_learnt_must_be_as_the_row_has_them() -> None:
    thought = Message("assistant", "<think>Well</think>The sky.")
    last = Message("assistant", "<think>Hm</think>The sea.")
    kept = ["<think>\nHm\n</think>\n\nThe sea.<|im_end|>"]
    messages = (DIALOGUE[1], thought, DIALOGUE[3], last)
    with pytest.raises(Refused, match="turn 2 is changed or left out"):
        found(CALLS, messages)
    template = Template(CALLS, {})
    text, spans = answers(template, messages, (), ENDS, last=True)
    assert [text[a:b] for a, b in spans] == kept
    left_out = Message("assistant", thought.content, trained=False)
    assert found(CALLS, (DIALOGUE[1], left_out, DIALOGUE[3], last)) == kept


def test_qwen3_learns_to_think_nothing_and_forgets_earlier_thoughts() -> None:
    """As LLaMA-Factory's template of this name; `qwen3_nothink` writes no thoughts."""
    thought = Message("assistant", "<think>Well</think>\n\nThe sky.", trained=False)
    last = Message("assistant", "<think>Hm</think>\n\nThe sea.")
    turns = (DIALOGUE[1], thought, DIALOGUE[1], last)
    assert found(naming.source("qwen3"), turns) == ["<think>Hm</think>\n\nThe sea.<|im_end|>"]
    text, _ = answers(Template(naming.source("qwen3"), {}), turns, (), ENDS)
    assert "<|im_start|>assistant\nThe sky.<|im_end|>" in text
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    calling = (
        DIALOGUE[1],
        Message("assistant", "<think>Look</think>\n\n", (call,)),
        Message("tool", "blue"),
        Message("assistant", "The sky."),
    )
    first, second = found(naming.source("qwen3"), calling)
    assert first.startswith("<think>Look</think>") and "search" in first
    assert second == "<think>\n\n</think>\n\nThe sky.<|im_end|>"
    assert naming.source("qwen3_nothink") == naming.source("chatml")


def test_what_ends_a_turn_is_what_the_template_writes_behind_it() -> None:
    tokenizer = byte_level(turns=["<|im_start|>", "<|im_end|>"])
    for name, wanted in (("chatml", ("<eos>", "<|im_end|>")), ("alpaca", ("<eos>",))):
        template = Template(naming.source(name), tokenizer.special_tokens_map)
        assert ends(tokenizer, None, template) == wanted
    refusing = Template("{{ raise_exception('no') }}", {})
    assert ends(tokenizer, None, refusing) == ("<eos>",)


def test_the_default_of_llama_factory() -> None:
    template = Template(naming.source("default"), {"bos_token": "<s>", "eos_token": "</s>"})
    text, _ = template.render([{"role": m.role, "content": m.content} for m in DIALOGUE[:3]])
    assert text == ("<s>System: Be kind.</s>\nHuman: What is blue?</s>\nAssistant:The sky.</s>\n")
