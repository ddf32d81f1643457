"""`--to ollama`: templates say the same in Go, and nothing gets out of its line of a Modelfile."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language_models import logits, save_adapter, save_base, tokenizer, with_peft
from ollama_readers import read_modelfile, render

from deltaw.errors import ConfigError, FormatError
from deltaw.export import export
from deltaw.export._modelfile import quoted
from deltaw.export._template import Chat, recognised
from deltaw.export.ollama import _spoken

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are \"it\".\nBe brief."
    "<|im_end|>\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ALPACA = (
    "{% if messages[0].role != 'system' %}Below is an instruction.\n\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
DATED = DEFAULT.replace("Be brief.", "{{ strftime_now('%d') }}") + CHATML
QUOTES = DEFAULT.replace("Be brief.", '"""\nFROM evil') + CHATML
EMPTY = DEFAULT.replace('You are "it".\nBe brief.', "") + CHATML
BRACES = CHATML.replace("<|im_end|>", '{{ "{{ .System }}" }}"""\\x00\u00a0😀<|im_end|>')
CHATS = (
    [("user", "hi")],
    [("system", "be {{ .kind }}"), ("user", "hi\n\nthere")],
    [("user", "a"), ("assistant", "b"), ("user", 'c """ d'), ("assistant", "e"), ("user", "f")],
)


@pytest.mark.parametrize(
    ("template", "bos", "family", "stops"),
    [
        (CHATML, False, "chatml", ["<|im_end|>", "</s>"]),
        (DEFAULT + CHATML, False, "chatml", ["<|im_end|>", "</s>"]),
        ("{{ bos_token }}" + CHATML, True, "chatml", ["<|im_end|>", "</s>"]),
        (LLAMA3, True, "llama3", ["<|eot_id|>", "</s>"]),
        (ALPACA, False, "alpaca", ["</s>"]),
        (BRACES, False, "chatml", None),
        (QUOTES, False, "chatml", ["<|im_end|>", "</s>"]),
        (EMPTY, False, "chatml", ["<|im_end|>", "</s>"]),
    ],
)
def test_a_known_template_says_the_same_in_go(template, bos, family, stops) -> None:
    told = tokenizer(template, bos=bos)
    chat = recognised(told)
    assert isinstance(chat, Chat) and chat.family == family
    if stops is not None:
        lines = read_modelfile("FROM .\n" + "\n".join(_spoken(chat, told)) + "\n")
        values = dict(lines)
        assert values["template"] == chat.go
        assert [value for name, value in lines if name == "parameter stop"] == stops
    for messages in CHATS:
        spoken = [{"role": role, "content": text} for role, text in messages]
        wanted = told.apply_chat_template(spoken, tokenize=False, add_generation_prompt=True)
        assert render(chat.go, messages) == (wanted.removeprefix("<s>") if bos else wanted)


def test_the_system_message_that_a_template_adds_is_found() -> None:
    chat, alpaca = recognised(tokenizer(DEFAULT + CHATML)), recognised(tokenizer(ALPACA))
    assert isinstance(chat, Chat) and chat.system == 'You are "it".\nBe brief.'
    assert isinstance(alpaca, Chat) and alpaca.system == "Below is an instruction."


@pytest.mark.parametrize(
    ("template", "bos", "why"),
    [
        (None, False, "no chat template"),
        (DATED, False, "the day's date"),
        (LLAMA3, False, "begins with the token for a beginning, which Ollama would not put"),
        (CHATML, True, "begins without the token for a beginning, which Ollama would put"),
        (CHATML.replace("im_", "xx_"), False, "of none of the families chatml, llama3, alpaca"),
        (
            CHATML.replace("{{ m.content }}", "{% if loop.last %}!{% endif %}{{ m.content }}"),
            False,
            "one and the same way|changes what it writes",
        ),
        (
            CHATML.replace(
                "{{ m.content }}", "{% if loop.index == 5 %}!{% endif %}{{ m.content }}"
            ),
            False,
            "changes what it writes over 5 messages",
        ),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), False, "over 1 messages"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"),
            False,
            "does not write every message once",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML,
            False,
            "refuses a plain conversation",
        ),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}" + CHATML,
            False,
            "runs away",
        ),
    ],
)
def test_a_template_that_is_not_exactly_known_is_left_out(template, bos, why) -> None:
    told = recognised(tokenizer(template, bos=bos))
    assert isinstance(told, str) and re.search(why, told)


TEXTS = ("", "plain", " a b ", 'says """hi""" to\nall', '"', '""', 'x"""', "a\n\tb\n", "FROM evil")


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_read_as_it_was_written(text: str) -> None:
    file = f"FROM .\nSYSTEM {quoted(text)}\nPARAMETER stop {quoted('</s>')}\n"
    assert read_modelfile(file) == [("from", "."), ("system", text), ("parameter stop", "</s>")]


@pytest.mark.parametrize(
    "text",
    ['x"""\nFROM evil', 'x"""  \nFROM evil', '"""\n', "a\rb", "a\u00a0b", "a\x1b[0m", "\u202e"],
)
def test_a_value_that_would_be_read_otherwise_is_refused(text: str) -> None:
    file = f'FROM .\nSYSTEM """{text}"""\n'
    try:
        read = read_modelfile(file.replace("\r", "\n"))
    except AssertionError:
        read = []
    assert read != [("from", "."), ("system", text)]
    with pytest.raises(ConfigError, match="A Modelfile cannot hold this text") as error:
        quoted(text)
    assert all(line.isprintable() for line in str(error.value).split("\n"))


def test_a_merged_model_lies_beside_its_modelfile(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base)
    tokenizer(DEFAULT + CHATML).save_pretrained(source)
    told = export(source, tmp_path / "my out", to="ollama", base=str(base))
    lines = read_modelfile((tmp_path / "my out" / "Modelfile").read_text())
    assert [name for name, _ in lines] == [
        *["from", "template", "parameter stop", "parameter stop"],
    ]
    assert lines[0] == ("from", ".")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "my out")
    torch.testing.assert_close(logits(merged), logits(with_peft(base, source)))
    assert list(told)[-1] == "next" and f"-f '{tmp_path / 'my out' / 'Modelfile'}'" in told["next"]
    assert told["template"] == "chatml, translated" and "warning" not in told


def test_an_adapter_lies_beside_its_modelfile(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base)
    told = export(
        source, tmp_path / "out", to="ollama", base=str(base), ollama_base="hub/llama3.2:1b-q4_0"
    )
    lines = read_modelfile((tmp_path / "out" / "Modelfile").read_text())
    assert lines[:2] == [("from", "hub/llama3.2:1b-q4_0"), ("adapter", "./adapter.gguf")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *["Modelfile", "README.md", "adapter.gguf"]
    ]
    assert told["template"] == "none: the tokenizer has no chat template"


@pytest.mark.parametrize(
    "name", ["a\nADAPTER /etc/x", "a\n", "a b", "", "-x", ".", "/etc/x", '"', "a:", "é"]
)
def test_what_is_no_name_in_ollama_is_refused(tmp_path: Path, name: str) -> None:
    base = save_base(tmp_path / "base")
    source = save_adapter(tmp_path / "run", base, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="is no name of a model in Ollama"):
        export(source, tmp_path / "out", to="ollama", base=str(base), ollama_base=name)
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_told_and_other_models_refused(
    tmp_path: Path, finished: Path
) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    settings: dict[str, Any] = {"target_modules": ["c_attn"]}
    source = save_adapter(tmp_path / "run", base, **settings)
    told = export(source, tmp_path / "out", to="ollama", base=str(base))
    assert "Ollama may not read gpt2" in told["warning"]
    with pytest.raises(FormatError, match="Ollama runs language models"):
        export(finished, tmp_path / "classifier", to="ollama")
