"""Whether a model thinks before it answers is set in the template, and goes with the run."""

from pathlib import Path

import pytest
from tests.language.tokenizers_ import byte_level
from transformers import AutoTokenizer

from deltaw.errors import ConfigError
from deltaw.language.choosing import train
from deltaw.language.data.samples import Message
from deltaw.language.encoding.answers import answers
from deltaw.language.encoding.templating import choose
from deltaw.language.encoding.thinking import told
from deltaw.language.use.opened import open_language
from deltaw.train.recipe import parse
from deltaw.train.rendering import Template

EMPTY = "<think>\n\n</think>\n\n"
ASKED = [{"role": "user", "content": "x"}]
OFF = "{%- set enable_thinking = false %}\n"


def turns(*texts: str) -> list[Message]:
    return [Message("user" if i % 2 == 0 else "assistant", t) for i, t in enumerate(texts)]


def qwen3(**asked: bool) -> Template:
    tokenizer = byte_level()
    return told(choose(tokenizer, "qwen3"), asked, tokenizer).template


def test_a_model_that_does_not_think_is_asked_behind_an_empty_thought() -> None:
    begin = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert qwen3().render(ASKED, prompt=True)[0] == begin
    assert qwen3(enable_thinking=True).render(ASKED, prompt=True)[0] == begin
    assert qwen3(enable_thinking=False).render(ASKED, prompt=True)[0] == begin + EMPTY


def test_the_empty_thought_is_then_read_and_not_learnt() -> None:
    said = turns("x", "The sea.", "y", "The sky.")
    for asked, before in (({}, EMPTY), ({"enable_thinking": False}, "")):
        text, spans = answers(qwen3(**asked), said, (), ("<|im_end|>",))
        assert [text[a:b] for a, b in spans] == [
            f"{before}The sea.<|im_end|>",
            f"{before}The sky.<|im_end|>",
        ]
        assert text.count(EMPTY) == 2


def test_earlier_thoughts_are_kept_if_asked() -> None:
    said = turns("x", "<think>Hm</think>\n\nThe sea.", "y", "The sky.")
    plain = [{"role": m.role, "content": m.content, "tool_calls": []} for m in said]
    assert "Hm" not in qwen3().render(plain)[0]
    assert "<think>Hm</think>\n\nThe sea." in qwen3(preserve_thinking=True).render(plain)[0]


def test_a_template_that_does_not_read_it_is_refused() -> None:
    tokenizer = byte_level()
    chosen = choose(tokenizer, "chatml")
    assert told(chosen, {}, tokenizer) is chosen
    asked = {"enable_thinking": False, "preserve_thinking": True}
    with pytest.raises(ConfigError, match="enable_thinking=False, preserve_thinking=True: no eff"):
        told(chosen, asked, tokenizer)


def test_a_setting_that_a_template_brings_is_replaced() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = OFF + choose(tokenizer, "qwen3").template.source
    assert (
        EMPTY in told(choose(tokenizer, None), {}, tokenizer).template.render(ASKED, prompt=True)[0]
    )
    on = told(choose(tokenizer, None), {"enable_thinking": True}, tokenizer).template
    assert EMPTY not in on.render(ASKED, prompt=True)[0] and OFF not in on.source


def test_a_run_brings_it_along(talker: Path, tmp_path: Path) -> None:
    values = {
        "model": str(talker / "model"),
        "data": str(talker / "data.json"),
        "output": str(tmp_path / "run"),
        "max_steps": 1,
        "template": "qwen3",
        "default_system": "Be kind.",
        "enable_thinking": False,
    }
    run = train(parse(values))
    tokenizer = AutoTokenizer.from_pretrained(run)
    asked = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert asked.endswith(EMPTY) and "Be kind." in asked
    assert open_language(run).encoder.prompted([Message("user", "x")]) == asked
    with pytest.raises(ConfigError, match="enable_thinking=False: no effect"):
        train(parse(values | {"template": "chatml", "output": str(tmp_path / "other")}))
    assert not (tmp_path / "other").exists()
