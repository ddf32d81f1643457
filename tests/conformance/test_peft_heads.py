"""Biases and modules trained in full through files, both ways."""

import copy
from pathlib import Path

import pytest
import torch
from peft_pair import (
    IDS,
    Mlp,
    ScaledEmbedding,
    Tokens,
    X,
    bert,
    both_directions,
    close,
    llama,
    loaded_by_deltaw,
    loaded_by_peft,
    output,
    peft,
    quiet,
    saved_by_deltaw,
    saved_by_peft,
    seeded,
    tensors,
    with_deltaw,
    with_peft,
)

import deltaw

P = "base_model.model."


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_19_trained_biases(bias: str, tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["lin", "out"], "bias": bias}
    both_directions(seeded(Mlp), X, tmp_path, **settings)
    names = {name.removeprefix(P) for name in tensors(tmp_path / "theirs") if "lora" not in name}
    assert names == {"lin.base_layer.bias", "body.lin.base_layer.bias"} | (
        {"norm.bias", "head.bias"} if bias == "all" else set()
    )


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_20_modules_trained_in_full(bias: str, tmp_path: Path) -> None:
    base = seeded(Mlp)
    settings = {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["body.lin"],
        "modules_to_save": ["head", "norm"],
        "bias": bias,
    }
    theirs = with_peft(base, **settings)
    read = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path / "theirs"))
    close(output(theirs, X), output(read, X))
    ours = with_deltaw(base, **settings)
    written = saved_by_deltaw(ours, tmp_path / "ours")
    close(output(ours, X), output(loaded_by_peft(base, written), X))
    wrapped = {"original_module", "modules_to_save"}
    assert tensors(written).keys() == {
        name for name in tensors(tmp_path / "theirs") if not wrapped & set(name.split("."))
    }


class Heads(torch.nn.Module):
    """An adapted module whose name ends in that of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.rehead = torch.nn.ModuleDict({"lin": torch.nn.Linear(5, 6)})
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.rehead["lin"](x)))


def test_20_a_head_whose_name_ends_that_of_an_adapted_module(tmp_path: Path) -> None:
    base = seeded(Heads)
    ours = with_deltaw(base, r=3, target_modules=["lin"], modules_to_save=["head"])
    written = saved_by_deltaw(ours, tmp_path)
    close(output(ours, X), output(loaded_by_peft(base, written), X))
    close(output(ours, X), output(loaded_by_deltaw(base, written), X))


def test_20_two_adapters_with_heads_of_their_own(tmp_path: Path) -> None:
    base = seeded(Mlp)
    folders = {}
    for seed, (name, heads) in enumerate({"a": ["head"], "b": ["norm", "head"]}.items()):
        model = with_peft(
            base, name, seed, r=2, lora_alpha=5, target_modules=["lin"], modules_to_save=heads
        )
        folders[name] = saved_by_peft(model, tmp_path) / name
    theirs = loaded_by_peft(base, folders["a"], "a")
    ours = loaded_by_deltaw(base, folders["a"], "a")
    with quiet():
        theirs.load_adapter(str(folders["b"]), "b")
    deltaw.load(ours, folders["b"], "b")
    for name in ("a", "b", "a"):
        with quiet():
            theirs.set_adapter(name)
        deltaw.activate(ours, name)
        close(output(theirs, X), output(ours, X))
        for adapter in ("a", "b"):
            again = tensors(saved_by_deltaw(ours, tmp_path / "again", adapter))
            assert again.keys() == tensors(folders[adapter]).keys()


def test_20_the_head_of_a_task(tmp_path: Path) -> None:
    base = bert()
    theirs = with_peft(base, r=3, lora_alpha=7, task_type="SEQ_CLS", target_modules=["query"])
    read = loaded_by_deltaw(base, saved_by_peft(theirs, tmp_path / "theirs"))
    close(output(theirs, IDS), output(read, IDS))
    ours = with_deltaw(
        base, r=3, lora_alpha=7, task_type="SEQ_CLS", target_modules=["query"], modules_to_save=None
    )
    written = saved_by_deltaw(ours, tmp_path / "ours")
    assert tensors(written).keys() == tensors(tmp_path / "theirs").keys()
    loaded = loaded_by_peft(base, written)
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    close(output(ours, IDS), output(loaded, IDS))


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": []}, {"target_modules": ["query", "classifier"]}]
)
def test_20_a_classifier_without_a_trained_head_is_read_by_peft(
    settings: dict[str, object], tmp_path: Path
) -> None:
    base = bert()
    settings = {"target_modules": ["query"], "r": 3, "task_type": "SEQ_CLS", **settings}
    ours = with_deltaw(base, **settings)
    written = saved_by_deltaw(ours, tmp_path)
    close(output(ours, IDS), output(loaded_by_peft(base, written), IDS))


TOKENS: dict[str, dict[str, object]] = {
    "by name": {"trainable_token_indices": {"embed_tokens": [5, 1, 12]}},
    "of the input": {"trainable_token_indices": [5, 1, 12]},
    "by a path": {"trainable_token_indices": {"model.embed_tokens": [3]}},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TOKENS)
def test_21_trained_tokens(name: str, tied: bool, tmp_path: Path) -> None:
    """The rows alone are in the file; a tied output head reads them too."""
    base = llama()
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.model.embed_tokens.weight
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **TOKENS[name]}
    both_directions(base, IDS, tmp_path, **settings)
    assert len([key for key in tensors(tmp_path / "ours") if "token" in key]) == 1


def test_21_trained_tokens_of_a_scaled_table(tmp_path: Path) -> None:
    base = seeded(lambda: Tokens(ScaledEmbedding))
    ids = torch.arange(8).view(2, 4)
    settings = {"r": 2, "target_modules": ["lin"], "trainable_token_indices": {"emb": [2, 7]}}
    both_directions(base, ids, tmp_path, **settings)


def test_21_the_gradient_of_the_rows_is_peft_s(tmp_path: Path) -> None:
    base = llama()
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    settings = {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [5, 1, 12]}
    theirs = with_peft(base, **settings)
    ours = copy.deepcopy(base)
    deltaw.load(ours, saved_by_peft(theirs, tmp_path), trainable=True)
    labels = IDS["input_ids"]
    theirs(**IDS, labels=labels).loss.backward()
    ours(**IDS, labels=labels).loss.backward()
    (found,) = [p for n, p in ours.named_parameters() if "tokens_delta" in n]
    (expected,) = [p for n, p in theirs.named_parameters() if "tokens_delta" in n]
    close(found.grad, expected.grad)
