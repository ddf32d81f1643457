"""A chat remembers as much as the model has positions for, and says what it forgets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.templating import choose, ends
from deltaw.language.generating import Sampling
from deltaw.language.use import chatting
from deltaw.language.use.opened import OpenedLanguage
from deltaw.train.recipe import parse


@pytest.fixture
def opened(talker: Path) -> OpenedLanguage:
    """A run that was trained with few tokens, of a model with positions for 128."""
    model = AutoModelForCausalLM.from_pretrained(talker / "model")
    tokenizer = AutoTokenizer.from_pretrained(talker / "model")
    recipe = parse({"model": "m", "data": "d", "default_system": "Be kind."})
    template = choose(tokenizer, "chatml")
    encoder = Encoder(tokenizer, template.template, 30, ends(tokenizer), system="Be kind.")
    return OpenedLanguage(talker, recipe, model, tokenizer, template, encoder)


@pytest.mark.parametrize("limit", [True, False])
def test_whole_turns_are_forgotten_and_that_is_said_once(
    opened: OpenedLanguage,
    limit: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not limit:
        monkeypatch.setattr(chatting, "positions", lambda model: None)
        opened = replace(opened, encoder=replace(opened.encoder, max_length=128))
    prompts: list[str] = []

    def answered(speaker: Any, texts: list[str], *rest: Any) -> list[str]:
        prompts.extend(texts)
        ids = speaker.encoder.prompt_ids(texts, 8)[0]
        assert speaker.tokenizer.decode(ids) == texts[0]
        return ["The sky."]

    monkeypatch.setattr(chatting, "generate", answered)
    talk = chatting.Chat(opened, {"a": "a"}, Sampling(max_new_tokens=8), merge=False)
    for number in range(9):
        talk.say(f"What is the colour of the sky, number {number}?")
    system = "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert all(prompt.startswith(f"{system}<|im_start|>user\n") for prompt in prompts)
    assert "number 0" in prompts[1] and "number 0" not in prompts[-1]
    assert "number 7" in prompts[-1]
    said = "The conversation has outgrown 128 tokens: its beginning is forgotten.\n"
    assert capsys.readouterr().out == said
    talk.say("/reset")
    talk.say("x")
    assert "number" not in prompts[-1]
    assert capsys.readouterr().out == ""
