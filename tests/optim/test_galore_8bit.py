"""Moments in 8 bits, and the error where bitsandbytes is not installed."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deltaw.analysis.memory.trace import Trace
from deltaw.errors import ConfigError
from deltaw.optim import _moments
from deltaw.optim.galore import GaLoreAdamW

SETTINGS = {"rank": 8, "update_proj_gap": 4, "optim_bits": 8}


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _moments._packing.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    group = {"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2, "optim_bits": 8}
    with pytest.raises(ConfigError, match=r"needs bitsandbytes(.|\n)*pip install 'deltaw\[bnb\]'"):
        GaLoreAdamW([group])


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes absent")


def weight(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(70, 50, generator=generator).to(dtype))


def train(optimizer: GaLoreAdamW, W: nn.Parameter, first: int, last: int) -> None:
    """Steps towards a matrix, by a gradient with some noise."""
    goal = torch.linspace(-1, 1, 70)[:, None] * torch.linspace(1, 2, 50)
    for step in range(first, last):
        noise = torch.randn(70, 50, generator=torch.Generator().manual_seed(step))
        W.grad = (W.detach().float() - goal + 0.1 * noise).to(W.dtype)
        optimizer.step()


def held(optimizer: GaLoreAdamW, W: nn.Parameter, name: str) -> Tensor:
    like = torch.empty(70, 8)
    return _moments._read(optimizer.state[W], name, like, optimizer.param_groups[0]["optim_bits"])


@pytest.mark.usefixtures("bitsandbytes")
def test_a_moment_takes_a_byte_an_entry_and_is_off_by_a_small_share_of_its_block() -> None:
    W, copy = weight(), weight()
    packed = GaLoreAdamW([{"params": [W], **SETTINGS}])
    plain = GaLoreAdamW([{"params": [copy], **SETTINGS, "optim_bits": 32}])
    train(packed, W, 0, 1)
    train(plain, copy, 0, 1)
    assert torch.equal(W, copy)  # what is packed is read in the next step
    blocks = -(-70 * 8 // _moments.BLOCK)
    for name, share in (("exp_avg", 0.008), ("exp_avg_sq", 0.004)):  # a byte has no sign there
        assert packed.state[W][name].dtype == torch.uint8
        assert packed.state[W][name].numel() == 70 * 8
        assert packed.state[W][f"{name}_absmax"].shape == (blocks,)
        read, exact = held(packed, W, name).flatten(), held(plain, copy, name).flatten()
        for near, far in zip(read.split(_moments.BLOCK), exact.split(_moments.BLOCK), strict=True):
            assert (near - far).abs().max() < share * far.abs().max()
            assert (near - far).abs().max() > 0
        assert read.shape == exact.shape
    assert (held(packed, W, "exp_avg_sq") >= 0).all()


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_training_goes_nearly_where_full_moments_go(dtype: torch.dtype) -> None:
    W, copy = weight(dtype), weight(dtype)
    group = {**SETTINGS, "scale": 1.0, "update_proj_gap": 100}
    packed = GaLoreAdamW([{"params": [W], **group}], lr=0.05, weight_decay=0.0)
    plain = GaLoreAdamW([{"params": [copy], **group, "optim_bits": 32}], lr=0.05, weight_decay=0.0)
    train(packed, W, 0, 30)
    train(plain, copy, 0, 30)
    moved = (copy - weight(dtype)).float().norm()
    assert 0 < (W - copy).float().norm() < 0.1 * moved


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_moments_go_on_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    W = weight(dtype)
    optimizer = GaLoreAdamW([{"params": [W], **SETTINGS}])
    train(optimizer, W, 0, 6)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copy = nn.Parameter(W.detach().clone())
    again = GaLoreAdamW([{"params": [copy], **SETTINGS}])
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(optimizer, W, 6, 11)
    train(again, copy, 6, 11)
    assert torch.equal(W, copy)


@pytest.mark.usefixtures("bitsandbytes")
def test_a_gradient_of_zeros_moves_nothing() -> None:
    W = weight()
    optimizer = GaLoreAdamW([{"params": [W], **SETTINGS}], weight_decay=0.0)
    for _ in range(3):
        W.grad = torch.zeros_like(W)
        optimizer.step()
    assert torch.equal(W, weight())


@pytest.mark.usefixtures("bitsandbytes")
def test_the_values_of_a_byte_are_kept_on_every_device() -> None:
    for device in map(torch.device, ("cpu", "meta")):
        assert _moments._code("exp_avg", device).device == device
        assert _moments._code("exp_avg", device) is _moments._code("exp_avg", device)


@pytest.mark.usefixtures("bitsandbytes")
def test_a_rehearsed_step_leaves_the_values_of_a_byte_real() -> None:
    _moments._code.cache_clear()
    GaLoreAdamW([{"params": [weight()], **SETTINGS}])  # as RecipeRun does
    with FakeTensorMode(allow_non_fake_inputs=True), Trace():
        fake = nn.Parameter(torch.empty(70, 50))
        fake.grad = torch.empty(70, 50)
        GaLoreAdamW([{"params": [fake], **SETTINGS}]).step()
    W = weight()
    optimizer = GaLoreAdamW([{"params": [W], **SETTINGS}])
    train(optimizer, W, 0, 2)
    assert type(optimizer.state[W]["exp_avg"]) is Tensor
