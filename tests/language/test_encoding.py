"""Samples to tokens: what is learnt is the answer and its end, and nothing is lost unsaid."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.language.tokenizers_ import byte_level, sentence_piece

from deltaw.errors import DataError
from deltaw.language.data.samples import Completion, Conversation, Message, Passage
from deltaw.language.encoding import naming
from deltaw.language.encoding.encoder import Encoder, Learnt, Rows, Sample, TooLong
from deltaw.language.encoding.labelling import MASKED
from deltaw.language.encoding.specials import unknown_id
from deltaw.language.encoding.templating import choose, ends
from deltaw.language.questions import questions
from deltaw.train.rendering import Template

TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, BOS": byte_level(bos="<s>"),
    "sentence-piece": sentence_piece(),
}
TALK = Conversation(
    (
        Message("user", "What is blue?"),
        Message("assistant", "The sky."),
        Message("user", "More, 世界!"),
        Message("assistant", "The sea is blue, 你好."),
    ),
    "f.json",
    3,
)


def encode(
    tokenizer: Any,
    *samples: Sample,
    template: str = "alpaca",
    length: int = 500,
    learnt: Learnt = "answers",
    too_long: TooLong | None = None,
) -> Rows:
    chosen = choose(tokenizer, template)
    encoder = Encoder(tokenizer, chosen.template, length, ends(tokenizer), learnt, too_long)
    return encoder.encode(samples)


def learnt(tokenizer: Any, row: Any) -> str:
    ids = [i for i in row.labels if i != MASKED]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_row_is_the_text_and_what_is_learnt_its_answers(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    (row,) = encode(tokenizer, TALK).rows
    eos = tokenizer.eos_token
    text, _ = choose(tokenizer, "alpaca").template.render(
        [{"role": m.role, "content": m.content} for m in TALK.messages]
    )
    assert row.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert learnt(tokenizer, row).replace(" ", "") == (f"Thesky.{eos}Theseaisblue,你好.{eos}")
    assert all(
        label in (MASKED, token) for label, token in zip(row.labels, row.input_ids, strict=True)
    )


def test_only_the_last_answer_or_everything() -> None:
    tokenizer = TOKENIZERS["byte-level, BOS"]
    (last,) = encode(tokenizer, TALK, learnt="last").rows
    assert learnt(tokenizer, last) == "The sea is blue, 你好.<eos>"
    (every,) = encode(tokenizer, TALK, learnt="all").rows
    assert every.labels == [MASKED, *every.input_ids[1:]]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_texts_have_bos_where_the_tokenizer_adds_it_and_eos(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    passage, joined, parted = encode(
        tokenizer,
        Passage("The sky is blue.", "f", 1),
        Completion("colour", "blue", "f", 2),
        Completion("colour: ", "blue", "f", 3),
    ).rows
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    for row in (passage, joined, parted):
        assert row.input_ids[-1] == row.labels[-1] == eos
        assert (row.input_ids[0] == tokenizer.bos_token_id) == (bos is not None)
        assert row.labels[0] == MASKED
    assert passage.labels[1:] == passage.input_ids[1:]
    assert tokenizer.decode(joined.input_ids, skip_special_tokens=True) == "colour\nblue"
    assert tokenizer.decode(parted.input_ids, skip_special_tokens=True) == "colour: blue"
    for row in (joined, parted):
        assert learnt(tokenizer, row).strip() == f"blue{tokenizer.eos_token}"


def test_a_token_over_the_beginning_of_an_answer_is_counted() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    found = encode(tokenizer, Completion("The ", "sky", "f", 1), Completion("The\n", "sky", "f", 2))
    assert found.joined == 1
    assert learnt(tokenizer, found.rows[0]) == " sky<eos>"


LONG = Completion("colour", "blue sky " * 20, "f.json", 7)


@pytest.mark.parametrize("way", ["truncate", "drop", "split", "raise", None])
def test_long_samples(way: TooLong | None) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    (whole,) = encode(tokenizer, LONG).rows
    if way == "raise":
        with pytest.raises(DataError, match=r"f\.json:7: \d+ tokens, 16 fit"):
            encode(tokenizer, LONG, length=16, too_long=way)
        return
    found = encode(tokenizer, LONG, length=16, too_long=way)
    if way == "drop":
        assert not found.rows
        assert str(found.skipped[0]).startswith("f.json:7: ")
    elif way == "split":
        assert [i for row in found.rows for i in row.input_ids] == whole.input_ids
        assert all(len(row.input_ids) <= 16 and row.labels[0] == MASKED for row in found.rows)
        assert found.split == 1
    else:
        assert [row.input_ids for row in found.rows] == [whole.input_ids[:16]]
        assert found.cut == 1
    (passage,) = encode(tokenizer, Passage("blue " * 5, "f", 1)).rows
    assert len(encode(tokenizer, passage.sample, length=6).rows) == -(-len(passage.input_ids) // 6)


def test_an_answer_beyond_the_end_is_skipped_and_said() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    found = encode(tokenizer, TALK, length=16)
    assert not found.rows
    assert "f.json:3: " in str(found.skipped[0])
    assert "the answer lies beyond" in str(found.skipped[0])


def test_nothing_to_learn_is_skipped_and_said() -> None:
    silent = Message("assistant", "The sky.", trained=False)
    found = encode(TOKENIZERS["byte-level"], Conversation((TALK.messages[0], silent), "f", 4))
    assert [str(skip) for skip in found.skipped] == ["f:4: no token of it is learnt"]


def test_a_template_that_drops_eos_is_an_error_of_every_sample() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}\n{{ m.content }}{% endfor %}"
    encoder = Encoder(tokenizer, choose(tokenizer, None).template, 99, ends(tokenizer))
    with pytest.raises(
        DataError, match=r"f\.json:3: the template does not end the answer with <eos>"
    ):
        encoder.encode([TALK])


def test_problems_of_all_samples_are_listed_and_the_others_are_not_lost() -> None:
    call = Conversation((Message("user", "x"), Message("tool", "y"), TALK.messages[1]), "g", 9)
    with pytest.raises(DataError) as caught:
        encode(TOKENIZERS["byte-level"], TALK, call, call, replace(call, line=11))
    for line in (9, 11):
        assert str(caught.value).count(f"g:{line}: it has no place for the role tool") == 1


words = st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() != ""
)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=3),
    kind=st.sampled_from([*TOKENIZERS]),
)
def test_answers_come_back_from_their_labels(turns: list[tuple[str, str]], kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    messages = [
        Message(role, text)  # type: ignore[arg-type]
        for user, answer in turns
        for role, text in (("user", user), ("assistant", answer))
    ]
    if any(token in "".join(m.content for m in messages) for token in tokenizer.all_special_tokens):
        return
    (row,) = encode(tokenizer, Conversation(tuple(messages), "f", 1), length=10_000).rows
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label == tokenizer.eos_token_id:
            runs.append([])
        elif label != MASKED:
            runs[-1].append(label)
    assert len(runs) == len(turns) + 1
    if kind != "sentence-piece":  # which knows some letters only
        for run, (_, answer) in zip(runs, turns, strict=False):
            assert answer in tokenizer.decode(run)


def test_characters_that_the_vocabulary_lacks_are_counted() -> None:
    known, unknown = Passage("The sky", "f", 1), Passage("الترميز", "f", 2)
    assert encode(sentence_piece(), known, unknown, unknown).unknown == 2
    assert encode(byte_level(), known, unknown).unknown == 0


def test_names_of_templates_and_their_origin(tmp_path: Any) -> None:
    tokenizer = byte_level()
    assert "the tokenizer has none" in choose(tokenizer, None).origin
    tokenizer.chat_template = naming.source("chatml")
    assert choose(tokenizer, None).origin == "the tokenizer's own"
    assert choose(tokenizer, "phi3").origin == "phi3 (asked for, not the tokenizer's own)"
    assert choose(tokenizer, "qwen3_nothink").origin == "qwen3_nothink (asked for)"
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}")
    assert choose(tokenizer, str(file)).template.render([{"content": "x"}])[0] == "x"


def test_a_prompt_keeps_half_the_length_however_long_answers_may_be() -> None:
    tokenizer = byte_level()
    encoder = Encoder(tokenizer, choose(tokenizer, "alpaca").template, 10, ends(tokenizer))
    (whole,) = tokenizer(["abcdefghijklmnopqrst"], add_special_tokens=False)["input_ids"]
    assert len(whole) > 10
    for answer, kept in ((1, 9), (4, 6), (5, 5), (256, 5)):
        assert encoder.prompt_ids(["abcdefghijklmnopqrst"], answer) == [whole[-kept:]]
    assert [encoder.room(length) for length in (1, 9, 12)] == [9, 1, 1]


def test_what_many_samples_share_is_said_once() -> None:
    tokenizer = byte_level()
    endless = Template("{% for m in messages %}{{ m['content'] }}{% endfor %}", {})
    encoder = Encoder(tokenizer, endless, 50, ends(tokenizer))

    def talk(line: int) -> Conversation:
        return Conversation((Message("user", "a"), Message("assistant", "b")), "f.json", line)

    def lines(count: int) -> list[str]:
        with pytest.raises(DataError) as error:
            encoder.encode([talk(line) for line in range(1, count + 1)])
        return str(error.value).splitlines()[1:-1]

    assert lines(7) == [
        "  - f.json:1 and 6 more of 7 rows: the template does not end the answer with <eos>, so "
        "the model would never learn to stop"
    ]
    assert [line[:12] for line in lines(3)] == [f"  - f.json:{n}:"[:12] for n in (1, 2, 3)]


def test_what_is_longer_than_a_tokenizer_says_is_for_the_encoder_to_say() -> None:
    tokenizer = byte_level()
    tokenizer.model_max_length = 8
    encode(tokenizer, TALK)
    chosen = choose(tokenizer, "alpaca")
    Encoder(tokenizer, chosen.template, 500, ends(tokenizer)).prompt_ids(["What is blue?"] * 2, 5)
    assert not tokenizer.deprecation_warnings


def test_an_end_that_stands_for_unknown_characters_too_is_no_unknown_character() -> None:
    tokenizer = byte_level()
    tokenizer.unk_token = tokenizer.eos_token
    assert encode(tokenizer, TALK).unknown == 0
    assert unknown_id(tokenizer) is None and unknown_id(sentence_piece()) is not None


def test_a_call_of_a_tool_is_no_answer_in_words() -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    asking = Message("user", "What is blue?")
    calling = Conversation((asking, Message("assistant", "", (call,))), "f.json", 1)
    said = Conversation((asking, Message("assistant", "The sky.")), "f.json", 2)
    tokenizer = byte_level()
    chosen = choose(tokenizer, "chatml")
    encoder = Encoder(tokenizer, chosen.template, 500, ends(tokenizer))
    (one,) = questions(encoder, [calling, said, calling])
    assert one.references == ("The sky.",)
    assert questions(encoder, [calling]) == []
