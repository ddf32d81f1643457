"""The marks of `deltaw data` stand around what is learnt and around nothing else."""

import re
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.language.tokenizers_ import byte_level, sentence_piece

from deltaw.language.data.samples import (
    Completion,
    Conversation,
    Message,
    Passage,
    Preference,
    Rated,
)
from deltaw.language.encoding.encoder import Encoder, Row
from deltaw.language.encoding.labelling import MASKED
from deltaw.language.encoding.templating import choose, ends
from deltaw.language.report.colouring import (
    BEGIN,
    END,
    ENDS,
    HEAD,
    TAIL,
    Stretch,
    bracketed,
    shortened,
    show,
    stretches,
    visible,
)
from deltaw.language.report.vocabulary import control_tokens, unknown_characters

TOKENIZERS = {"byte-level": byte_level(bos="<s>"), "sentence-piece": sentence_piece()}
TEXTS = st.text("ab 你好😀é\n⟦", min_size=1, max_size=12).filter(lambda text: text.strip() == text)


def rows(kind: str, *samples: object, length: int = 400) -> list[Row]:
    tokenizer = TOKENIZERS[kind]
    template = choose(tokenizer, "alpaca").template
    encoder = Encoder(tokenizer, template, length, ends(tokenizer))
    return encoder.encode(samples).rows  # type: ignore[arg-type]


def talk(*contents: str) -> Conversation:
    roles = ("user", "assistant") * len(contents)
    return Conversation(
        tuple(Message(r, c) for r, c in zip(roles, contents, strict=False)),  # type: ignore[arg-type]
        "f",
        1,
    )


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=30, deadline=None)
@given(contents=st.lists(TEXTS, min_size=2, max_size=6).filter(lambda some: len(some) % 2 == 0))
def test_what_is_marked_is_what_is_learnt(kind: str, contents: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    (row,) = rows(kind, talk(*contents))
    parts = stretches(row, tokenizer)
    whole = tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False)
    assert "".join(part.text for part in parts) == whole
    assert all(a.learnt != b.learnt for a, b in pairwise(parts))
    marked = [part.text for part in parts if part.learnt]
    pairs = zip(row.input_ids, row.labels, strict=True)
    learnt = [
        tokenizer.decode([i for i, _ in some])
        for kept, some in groupby(pairs, lambda pair: pair[1] != MASKED)
        if kept
    ]
    assert [text.removeprefix(" ") for text in marked] == [
        text.removeprefix(" ") for text in learnt
    ]
    if kind == "byte-level":
        assert marked == [text + "<eos>" for text in contents[1::2]]


@given(ids=st.lists(st.tuples(st.integers(0, 399), st.booleans()), min_size=1, max_size=30))
@example(ids=[(101, False), (133, True), (101, False)])  # a stray byte, then a whole character
def test_any_tokens_at_all_are_shown_once(ids: list[tuple[int, bool]]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    numbers = [min(i, len(tokenizer) - 1) for i, _ in ids]
    labels = [i if kept else MASKED for i, (_, kept) in zip(numbers, ids, strict=True)]
    parts = stretches(Row(numbers, labels, Passage("", "f", 1)), tokenizer)
    assert "".join(part.text for part in parts) == tokenizer.decode(numbers)


def test_a_character_of_several_tokens_is_never_broken() -> None:
    tokenizer = byte_level()
    sample = Passage("😀 smile", "f", 1)
    encoder = Encoder(tokenizer, choose(tokenizer, "alpaca").template, 50, ends(tokenizer))
    (row,) = encoder.encode([sample]).rows
    assert row.labels[0] == MASKED and len(tokenizer("😀")["input_ids"]) > 1
    assert bracketed(stretches(row, tokenizer)) == f"{BEGIN}😀 smile<eos>{END}"


def test_brackets_of_the_text_are_spelt_out() -> None:
    parts = [Stretch(f"a{BEGIN}\x1b\tb\nc", False), Stretch(f"d{END}", True)]
    assert bracketed(parts) == f"a\\u27e6\\x1b\\tb\nc{BEGIN}d\\u27e7{END}"
    assert visible("a\n\n\u2028") == "a\n\n\\u2028"


def test_long_stretches_and_many_are_cut_in_the_middle() -> None:
    long = Stretch("x" * HEAD + "y" * 1000 + "z" * TAIL, True)
    (short,) = shortened([long])
    assert short.text == "x" * HEAD + " [… 1,000 more characters …] " + "z" * TAIL and short.learnt
    many = [Stretch(str(n), n % 2 == 1) for n in range(2 * ENDS + 3)]
    kept = shortened(many)
    assert kept[:ENDS] == many[:ENDS] and kept[-ENDS:] == many[-ENDS:]
    assert kept[ENDS] == Stretch("\n[… 3 more stretches …]\n", False) and len(kept) == 2 * ENDS + 1
    assert shortened(many[: 2 * ENDS]) == many[: 2 * ENDS]


COLOUR = re.compile("\x1b\\[30;42m(.*?)\x1b\\[0m", re.S)


def test_a_terminal_has_colours_on_the_learnt_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    tokenizer = TOKENIZERS["byte-level"]
    (row,) = rows("byte-level", talk("[red]Hm\x1b[0m?", "The [bold]sky\x1b[7m.", "So", "你好"))
    show(stretches(row, tokenizer), " " * 10)
    out = capsys.readouterr().out
    assert COLOUR.findall(out) == ["The [bold]sky\\x1b[7m.<eos>", "你好<eos>"]
    assert "[red]Hm\\x1b[0m?" in out and BEGIN not in out
    assert all(line.startswith(" " * 10) for line in out.splitlines())
    monkeypatch.setenv("NO_COLOR", "1")
    show(stretches(row, tokenizer), "")
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert f"{BEGIN}你好<eos>{END}" in out


def test_special_tokens_in_text_are_those_that_the_tokenizer_reads() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    texts = ["plain", "<|im_start|>x", "a<eos><eos>", "<|im_ start|>", "<s >", "<eos", "<|end|>"]
    samples = [Completion(text, "yes", "f", n) for n, text in enumerate(texts)]
    found = {one.sample.line: one.tokens.total() for one in control_tokens(tokenizer, samples)}
    expected = {
        n: sum(i in special for i in tokenizer(text, add_special_tokens=False)["input_ids"])
        for n, text in enumerate(texts)
    }
    assert found == {n: count for n, count in expected.items() if count}
    assert set(found) == {1, 2, 6}


def test_special_tokens_in_tools_and_calls_count_too() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "<eos>"}}}
    messages = (Message("user", "?"), Message("assistant", "", (call,)))
    samples = [
        Conversation(messages, "f", 1),
        Conversation(messages[:1], "f", 2, tools=({"name": "<|end|>"},)),
    ]
    found = control_tokens(TOKENIZERS["byte-level"], samples)
    assert [dict(one.tokens) for one in found] == [{"<eos>": 1}, {"<|end|>": 1}]
    answer = (Message("assistant", "<eos>"),)
    judged = [
        Preference("a<eos>", messages, answer, "f", 1, tools=({"name": "<|end|>"},)),
        Rated(messages[:1], answer, True, "f", 2),
        Rated("<eos>", "b", False, "f", 3),
        Preference("a", "b", "c", "f", 4),
    ]
    found = control_tokens(TOKENIZERS["byte-level"], judged)
    assert [dict(one.tokens) for one in found] == [
        {"<eos>": 3, "<|end|>": 1},
        {"<eos>": 1},
        {"<eos>": 1},
    ]


def test_special_tokens_in_names_and_ids_of_calls_count_too() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calling = Message("assistant", "", (call,), call_ids=("<eos>",))
    told = Message("tool", "1", answers="<eos>", name="<|end|>")
    found = control_tokens(TOKENIZERS["byte-level"], [Conversation((calling, told), "f", 1)])
    assert [dict(one.tokens) for one in found] == [{"<eos>": 2, "<|end|>": 1}]


def test_unknown_characters_are_counted() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    found = unknown_characters(tokenizer, [Completion("abx", "yxa", "f", 1)])
    assert found == {"x": 2, "y": 1}
    assert not unknown_characters(TOKENIZERS["byte-level"], [Completion("你", "x", "f", 1)])
