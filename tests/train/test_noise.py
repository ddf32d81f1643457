"""Noise on embeddings: how large it is, who gets it, and that nothing of it stays."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from deltaw.errors import ConfigError
from deltaw.recomputing import recompute
from deltaw.train import run as running
from deltaw.train.noise import noisy_embeddings, require_one_stack
from deltaw.train.recipe import parse
from deltaw.train.run import train


class Small(nn.Module):
    """A model as far as its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


@pytest.mark.parametrize("length", [16, 64])
def test_noise_is_uniform_below_alpha_by_the_root_of_all_numbers_of_a_row(length: int) -> None:
    torch.manual_seed(0)
    model, ids = Small(), torch.randint(50, (32, length))
    with noisy_embeddings(model, 5):
        noise = (model.table(ids) - nn.functional.embedding(ids, model.table.weight)).flatten()
    bound = 5 / (length * 64) ** 0.5
    assert 0.99 * bound < noise.abs().max() <= bound * 1.0001
    assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert abs(noise.mean()) < 0.01 * bound
    length_of_noise = noise.view(32, -1).norm(dim=1)
    torch.testing.assert_close(length_of_noise, torch.full((32,), 5 / 3**0.5), rtol=0.1, atol=0)


def test_it_is_the_noise_of_transformers() -> None:
    model, ids = Small(), torch.arange(12).view(2, 6)
    torch.manual_seed(1)
    with noisy_embeddings(model, 7):
        mine = model.table(ids)
    plain = model.table(ids)
    torch.manual_seed(1)
    theirs = neftune_post_forward_hook(
        SimpleNamespace(training=True, neftune_noise_alpha=7), None, plain
    )
    torch.testing.assert_close(mine, theirs)


def test_evaluation_is_left_alone_and_draws_nothing() -> None:
    model, ids = Small().eval(), torch.arange(6)[None]
    state = torch.get_rng_state()
    with noisy_embeddings(model, 5):
        assert torch.equal(model.table(ids), nn.functional.embedding(ids, model.table.weight))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_hook_goes_after_an_error_too(wrong: bool) -> None:
    model = Small()
    with pytest.raises(ValueError) if wrong else nullcontext(), noisy_embeddings(model, 5):
        assert model.table._forward_hooks
        if wrong:
            raise ValueError
    assert not model.table._forward_hooks
    with noisy_embeddings(model, 0):
        assert not model.table._forward_hooks


def test_recomputed_activations_have_the_same_noise() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    ids = torch.arange(20)[None]

    def gradients() -> Iterator[Tensor]:
        torch.manual_seed(2)
        model.zero_grad()
        with noisy_embeddings(model, 5):
            model(ids, labels=ids, use_cache=False).loss.backward()
        return (p.grad.clone() for p in model.parameters())

    plain = list(gradients())
    recompute(model)
    assert all(map(torch.equal, gradients(), plain))


def test_two_stacks_that_share_an_embedding_are_refused() -> None:
    recipe = parse({"model": "m", "data": "d", "neftune_noise_alpha": 5})
    one, two = (SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=b)) for b in (0, 1))
    require_one_stack(recipe, one)
    require_one_stack(recipe.model_copy(update={"neftune_noise_alpha": 0.0}), two)
    with pytest.raises(ConfigError, match="encoder and decoder share one embedding"):
        require_one_stack(recipe, two)
    with pytest.raises(ConfigError, match=r"neftune_noise_alpha=-1: .* than or equal to 0"):
        parse({"model": "m", "data": "d", "neftune_noise_alpha": -1})


def test_a_classifier_is_trained_on_noisy_texts_and_goes_on_bit_for_bit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "model": str(tiny / "model"),
        "data": str(tiny / "data.csv"),
        "max_steps": 4,
        "eval_every": 2,
        "learning_rate": 0.02,
        "keep": "last",
    }

    def weights(name: str, alpha: float) -> dict[str, Tensor]:
        asked = values | {"output": str(tmp_path / name), "neftune_noise_alpha": alpha}
        return load_file(train(parse(asked), silent=True) / "adapter_model.safetensors")

    plain, noisy = weights("plain", 0), weights("noisy", 5)
    assert any(not torch.equal(noisy[name], plain[name]) for name in plain)

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "restore", broken)
        with pytest.raises(KeyboardInterrupt):
            weights("run", 5)
    for path in (tmp_path / "run" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-4").rmdir()
    resumed = weights("run", 5)
    assert all(torch.equal(resumed[name], noisy[name]) for name in noisy)
