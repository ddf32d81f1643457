"""Files that people train on: all of them are read, each as what it is."""

from collections import Counter
from pathlib import Path

import pytest

from deltaw.language.data.corpus import Request, load
from deltaw.language.data.keys import prompt_key

REAL = {
    "llamafactory_demo/alpaca_en_demo.json": ("Conversation", 999, 0),
    "llamafactory_demo/identity.json": ("Conversation", 91, 0),
    "llamafactory_demo/glaive_toolcall_en_demo.json": ("Conversation", 300, 0),
    "llamafactory_demo/v1_sft_demo.jsonl": ("Conversation", 500, 0),
    "llamafactory_demo/dpo_en_demo.json": ("Preference", 300, 0),
    "llamafactory_demo/kto_en_demo.json": ("Rated", 300, 0),
    "llamafactory_demo/c4_demo.jsonl": ("Passage", 300, 0),
    "llamafactory_demo/wiki_demo.txt": ("Passage", 1, 0),
    "dolly_open_qa/dolly_open_qa.jsonl": ("Conversation", 3400, 0),
    "instruct_rasbt/instruction-data.json": ("Conversation", 1100, 0),
    "instruct_rasbt/instruction-data-with-preference.json": ("Preference", 1094, 6),
    "gsm8k/train.jsonl": ("Conversation", 7473, 0),
    "e2e_nlg/devset.csv": ("Completion", 4672, 0),
    "self_instruct_seed/seed_tasks.jsonl": ("Conversation", 175, 0),
    "aesop_fables/train.jsonl": ("Passage", 227, 0),
    "aesop_fables/valid.jsonl": ("Passage", 28, 0),
    "tinystories_2mb/stories.jsonl": ("Passage", 2316, 0),
    "tinystories_2mb/tinystories_sample.txt": ("Passage", 2317, 0),
    "tinyshakespeare/input.txt": ("Passage", 1, 0),
    "books_valid": ("Passage", 11, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(shared: Path, name: str) -> None:
    corpus = load(Request(str(shared / "data" / name), val_size=0))
    kinds = Counter(type(sample).__name__ for sample in corpus.train)
    assert (*kinds.most_common(1)[0], len(corpus.skipped)) == REAL[name]
    assert len(kinds) == 1


def test_real_folders_and_references(shared: Path) -> None:
    corpus = load(Request(str(shared / "data" / "e2e_nlg"), max_samples=500))
    assert (len(corpus.train), len(corpus.validation)) == (500, 4672)
    assert len({prompt_key(sample) for sample in corpus.validation}) == 547
    fables = load(Request(str(shared / "data" / "aesop_fables")))
    assert (len(fables.train), len(fables.validation)) == (227, 28)


def test_the_demo_of_llamafactory_by_its_names(shared: Path) -> None:
    folder = shared / "data" / "llamafactory_demo"
    names = "identity,alpaca_en_demo#100,glaive_toolcall_en_demo"
    corpus = load(Request(names, dataset_dir=folder, val_size=0))
    assert [origin.train for origin in corpus.origins] == [91, 100, 300]
    for name, count in {
        "dpo_en_demo": 300,
        "kto_en_demo": 300,
        "wiki_demo": 1,
        "c4_demo": 300,
    }.items():
        assert len(load(Request(name, dataset_dir=folder, val_size=0)).train) == count
    calls = [m for s in corpus.train for m in s.messages if m.tool_calls]  # type: ignore[union-attr]
    assert len(calls) == 211
    assert sum(bool(s.tools) for s in corpus.train) == 191  # type: ignore[union-attr]
