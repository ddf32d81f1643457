"""Templates in the sandbox: as transformers renders them, and never for ever."""

from typing import Any

import pytest
from tests.language.tokenizers_ import byte_level

from deltaw.errors import ConfigError
from deltaw.language.encoding import naming
from deltaw.train.rendering import Template
from deltaw.train.sandbox import LONGEST, Refused, RunsAway

SYSTEM = {"role": "system", "content": "Be kind."}
DIALOGUE: list[dict[str, Any]] = [
    {"role": "user", "content": "What is blue?"},
    {"role": "assistant", "content": "The sky."},
    {"role": "user", "content": "你好 and more?"},
    {"role": "assistant", "content": "The sea.\nAnd so on."},
]
CALL = {"type": "function", "function": {"name": "search", "arguments": {"words": ["a", "é"]}}}
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
WITH_TOOLS = [
    {"role": "user", "content": "Find it."},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "one"},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "Found."},
]
OWN = sorted(set(naming.known()) - set(naming.SAME))
MARKED = (
    "{% for m in messages %}{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}"
)


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return Template(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **options)[
        0
    ]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("prompt", [False, True])
def test_named_templates_render_as_in_transformers(name: str, prompt: bool) -> None:
    tokenizer = byte_level(bos="<s>")
    for messages in ([SYSTEM, *DIALOGUE], DIALOGUE, DIALOGUE[:1]):
        ours, _ = Template(naming.source(name), tokenizer.special_tokens_map).render(
            messages, prompt=prompt
        )
        theirs = tokenizer.apply_chat_template(
            messages,
            chat_template=naming.source(name),
            tokenize=False,
            add_generation_prompt=prompt,
        )
        assert ours == theirs


def test_tools_render_as_in_transformers() -> None:
    tokenizer = byte_level()
    ours, _ = Template(naming.source("qwen"), {}).render(WITH_TOOLS, TOOLS)
    theirs = tokenizer.apply_chat_template(
        WITH_TOOLS, tools=TOOLS, chat_template=naming.source("qwen"), tokenize=False
    )
    assert ours == theirs
    assert ours.count('"arguments": {"words": ["a", "é"]}') == 2


@pytest.mark.parametrize("name", sorted({*OWN} - {"chatml", "qwen", "qwen3"}))
def test_templates_without_a_place_for_tools_say_so(name: str) -> None:
    with pytest.raises(Refused, match="no place for tools"):
        render(naming.source(name), DIALOGUE, tools=TOOLS)


def test_marked_answers_are_where_transformers_finds_them() -> None:
    tokenizer = byte_level()
    text, spans = Template(MARKED, tokenizer.special_tokens_map).render(DIALOGUE)
    theirs = tokenizer.apply_chat_template(
        DIALOGUE,
        chat_template=MARKED,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert [text[a:b] for a, b in spans] == ["The sky.<eos>", "The sea.\nAnd so on.<eos>"]
    pairs = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    assert tokenizer.decode([i for i, m in pairs if m]) == "".join(text[a:b] for a, b in spans)


def test_a_default_system_text_gives_way_to_the_row() -> None:
    assert "You are Qwen" in render(naming.source("qwen"), DIALOGUE)
    assert "You are Qwen" not in render(naming.source("qwen"), [SYSTEM, *DIALOGUE])


DOUBLED = (
    "{% set ns = namespace(x='aaaa') %}{% for i in range(40) %}{% set ns.x = WHAT %}{% endfor %}"
)
SPLIT = (
    "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"
)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "loops"),
        ("{% for a in 'x' * 2000 %}{% for b in 'x' * 2000 %}{% endfor %}{% endfor %}", "loops"),
        (SPLIT, "it calls"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "no end"),
        ("{% for i in range(9999) %}{{ 'a' * 2000 }}{% endfor %}", "characters"),
        ("{{ 'a' * 1000000000 }}", "characters"),
        ("{{ [1] * 1000000000 }}", "characters"),
        ("{{ [['a' * 1000000]] * 1000 }}", "characters"),
        ("{{ 9 ** 999999 }}", "digits"),
        *(
            (DOUBLED.replace("WHAT", what), "characters")
            for what in (
                "ns.x ~ ns.x",
                "ns.x + ns.x",
                "ns.x * 2",
                "'%s%s' % (ns.x, ns.x)",
                "'%s%s' | format(ns.x, ns.x)",
                "'{0}{0}'.format(ns.x)",
                "ns.x.replace('a', 'aa')",
                "ns.x | replace('a', 'aa')",
                "[ns.x, ns.x] | join",
                "([ns.x] * 2) | map('trim') | join",
                "''.join([ns.x, ns.x])",
            )
        ),
        (DOUBLED.replace("WHAT", "[ns.x, ns.x]") + "{{ ns.x }}", "characters"),
        (DOUBLED.replace("WHAT", "[ns.x, ns.x]") + "{{ ns.x | upper }}", "characters"),
        (
            DOUBLED.replace(
                "{% set ns.x = WHAT %}", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"
            ),
            "characters",
        ),
        (
            "{% set ns = namespace(x=[]) %}{% set a = 'a' * 9000000 %}"
            "{% for i in range(99999) %}{% set ns.x = [ns.x, a[i:]] %}{% endfor %}",
            "characters",
        ),
        ("{{ 'a' | center(20000000000) }}", "characters"),
        ("{{ 'a'.ljust(20000000000) }}", "characters"),
        ("{{ 'a'.zfill(width=20000000000) }}", "characters|keyword"),
        ("{{ ['a'] | batch(20000000000, 'b') | list }}", "characters"),
        ("{{ '%99999999d' % 1 }}", "width"),
        ("{{ '%*d' % (99999999, 1) }}", "width"),
        ("{{ '%99999999d' | format(1) }}", "width"),
        ("{{ '{:20000000000}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 20000000000) }}", "width"),
        ("{{ '{a:20000000000}'.format_map({'a': 1}) }}", "width"),
    ],
)
def test_a_template_that_runs_away_is_stopped_before_it_takes_memory(source: str, why: str) -> None:
    with pytest.raises((RunsAway, Refused), match=why):
        render(source, DIALOGUE)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].nothing.more }}", "no attribute"),
        ("{{ none * 2 }}", "NoneType"),
        ("{{ none + 'a' }}", "NoneType"),
        ("{{ messages[0].nothing + 'a' }}", "no attribute"),
        ("{{ raise_exception('no \x1b[31m colour') }}", r"no \\x1b\[31m colour"),
        ("{{ lipsum(n=100000) }}", "lipsum"),
    ],
)
def test_what_a_template_must_not_do_is_refused(source: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        render(source, DIALOGUE)


def test_each_rendering_has_turns_of_its_own() -> None:
    template = Template("{% for i in range(60000) %}{% endfor %}ok", {})
    assert [template.render(DIALOGUE)[0] for _ in range(5)] == ["ok"] * 5


def test_ordinary_arithmetic_and_formatting_go_through() -> None:
    assert render(
        "{{ 2 * 3 }}{{ 'a' * 2 }}{{ 2 ** 5 }}{{ '%s in 2024' % 'x' }}{{ 7 % 4 }}", []
    ) == ("6aa32x in 20243")
    assert render("{{ 'a' * (n - 2) }}".replace("n", str(LONGEST)), [])
    assert render(
        "{{ '{:>5}|{}'.format(1, 20240101) }}{{ '%s-%s' | format(1, 20240101) }}", []
    ) == ("    1|202401011-20240101")
    assert render("{{ 'a' ~ 1 ~ none }}{{ 'abc'[1:] }}{{ [1, 2][::-1] }}", []) == "a1Nonebc[2, 1]"


def test_what_is_no_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="chat template cannot be read"):
        Template("{% for x in %}", {})


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean qwen3_nothink"):
        naming.source("qwen3_nothin")
