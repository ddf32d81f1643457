"""Prompts and answers as the tokens that an encoder reads and a decoder learns."""

from dataclasses import replace
from typing import Any

import pytest
from tests.language.seq2seq_models import letters

from deltaw.errors import DataError
from deltaw.language.data.samples import Completion, Conversation, Message, Passage
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Sample
from deltaw.language.encoding.naming import plain
from deltaw.language.encoding.seq2seq import Seq2SeqEncoder
from deltaw.language.encoding.templating import choose
from deltaw.language.report.colouring import Stretch, sides


def encoder(tokenizer: Any = None, *, template: str | None = None, **settings: Any) -> Any:
    tokenizer = tokenizer or letters()
    chosen = choose(tokenizer, template, plain=plain()).template
    return Seq2SeqEncoder(tokenizer, chosen, 16, ("</s>",), **settings)


def talk(*turns: tuple[Any, ...]) -> Conversation:
    return Conversation(tuple(Message(*turn) for turn in turns), "f", 7)


def texts(made: Any, *samples: Sample) -> list[tuple[str, str]]:
    rows = made.encode(samples).rows
    return [tuple(made.tokenizer.decode(ids) for ids in (r.input_ids, r.labels)) for r in rows]


PAIR = Completion("a b", " c d e", "f", 1)
MANY = talk(("user", "a"), ("assistant", "b"), ("user", "c d"), ("assistant", "e"))


def test_both_sides_are_the_tokenizers_own_and_all_of_the_answer_is_learnt() -> None:
    for bos in (False, True):
        tokenizer = letters(bos=bos)
        (row,) = encoder(tokenizer).encode([PAIR]).rows
        assert row.input_ids == tokenizer("a b")["input_ids"]
        assert row.labels == tokenizer(text_target="c d e")["input_ids"]
        assert row.labels[-1] == tokenizer.eos_token_id
        assert row.learnt == 4 + bos


def test_an_answer_ends_where_the_tokenizer_does_not_end_it() -> None:
    tokenizer = letters()
    tokenizer.backend_tokenizer.post_processor = None
    (row,) = encoder(tokenizer).encode([PAIR]).rows
    assert tokenizer.decode(row.input_ids) == "a b"
    assert tokenizer.decode(row.labels) == "c d e </s>"
    (row,) = encoder(tokenizer).encode([replace(PAIR, completion="a </s> b c")]).rows
    assert tokenizer.decode(row.labels) == "a </s> b c </s>"


def test_every_answer_of_a_conversation_is_learnt_from_what_comes_before_it() -> None:
    both = [("a </s>", "b </s>"), ("a b c d </s>", "e </s>")]
    assert texts(encoder(), MANY) == both
    assert texts(encoder(learnt="last"), MANY) == both[1:]
    left = replace(MANY, messages=(*MANY.messages[:3], Message("assistant", "e", (), False)))
    assert texts(encoder(), left) == both[:1]
    assert texts(encoder(system="go"), MANY)[0] == ("go a </s>", "b </s>")


def test_a_template_makes_the_prompt_and_leaves_the_answer_alone() -> None:
    made = replace(encoder(template="vicuna"), max_length=64)
    (row,) = made.encode([talk(("user", "a"), ("assistant", "b"))]).rows
    prompt = made.template.render([{"role": "user", "content": "a"}], prompt=True)[0]
    assert row.input_ids == made.tokenizer(prompt)["input_ids"] and ":" in prompt
    assert made.tokenizer.decode(row.labels) == "b </s>"


def test_nothing_is_learnt_of_a_conversation_without_a_learnt_answer() -> None:
    found = encoder().encode([talk(("user", "a"), ("assistant", "b", (), False))])
    assert not found.rows
    assert [(s.file, s.line, s.reason) for s in found.skipped] == [
        ("f", 7, "no answer of it is learnt")
    ]


def test_what_has_no_prompt_or_no_answer_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"(?s)t:3 is plain text.*Fix: give rows with a prompt"):
        encoder().encode([PAIR, Passage("a b c", "t", 3)])
    call = ({"type": "function", "function": {"name": "x", "arguments": {}}},)
    samples = [talk(("user", "a"), ("assistant", "", call)), talk(("user", "a", (), True))]
    with pytest.raises(DataError) as error:
        encoder().encode(samples)
    assert "f:7: turn 2 calls a tool" in str(error.value)
    assert "; turn 1 is to be learnt by its row and is no answer" in str(error.value)


LONG = Completion("a b c d e a b c d e", "e d c b a e d c", "f", 4)


def test_too_long_sides_are_cut_dropped_or_refused_and_counted() -> None:
    made = replace(encoder(), max_length=6)
    found = made.encode([PAIR, LONG, replace(LONG, prompt="a")])
    assert [texts(made, s)[0] for s in (LONG, replace(LONG, prompt="a"))] == [
        ("a b c d e </s>", "e d c b a e"),
        ("a </s>", "e d c b a e"),
    ]
    assert (found.cut, [size for _, size in found.long]) == (2, [11, 9])
    dropped = replace(made, too_long="drop").encode([PAIR, LONG])
    assert len(dropped.rows) == 1 and dropped.cut == 0
    assert "a prompt of 11 tokens and an answer of 9, 6 fit each" in dropped.skipped[0].reason
    with pytest.raises(DataError, match="f:4: a prompt of 11 tokens and an answer of 9"):
        replace(made, too_long="raise").encode([LONG])


def test_a_prompt_to_answer_is_the_prompt_of_training() -> None:
    made = replace(encoder(letters(bos=True)), max_length=6)
    rows = made.encode([PAIR, LONG]).rows
    prompts = [made.opening(made.joined(s.prompt, s.completion)) for s in (PAIR, LONG)]
    assert made.prompt_ids(prompts, 100) == [row.input_ids for row in rows]
    assert made.prompt_ids([made.prompted(MANY.messages[:3])], 1) == [
        row.input_ids for row in made.encode([MANY]).rows[1:]
    ]


def test_each_side_is_padded_by_itself_and_padding_is_not_learnt() -> None:
    rows = encoder().encode([PAIR, Completion("a b c d", "e", "f", 2)]).rows
    batch = Padding(0)([{"input_ids": r.input_ids, "labels": r.labels} for r in rows])
    assert batch["input_ids"].tolist() == [[*rows[0].input_ids, 0, 0], rows[1].input_ids]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [rows[0].labels, [*rows[1].labels, -100, -100]]


def test_unknown_characters_of_either_side_are_counted() -> None:
    samples = [PAIR, replace(PAIR, prompt="z"), replace(PAIR, completion="z")]
    assert encoder().encode(samples).unknown == 2


def test_a_sample_is_shown_with_its_answer_marked() -> None:
    made = encoder()
    (row,) = made.encode([PAIR]).rows
    assert sides(row, made.tokenizer) == [
        Stretch("a b </s>\n", False),
        Stretch("c d e </s>", True),
    ]
