"""What a GPU, or another default device than the CPU, would bring out, seen on a CPU."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import deltaw
from deltaw import absorbing, addition, merging
from deltaw.analysis import inspect
from deltaw.blocks import LeanNorm, _probe
from deltaw.calibrating import _rows
from deltaw.combine._layers import unfused
from deltaw.combine._spectrum import _sketch
from deltaw.combine.dropping import drop
from deltaw.export._probing import probe_tokens
from deltaw.kernels import cross_entropy
from deltaw.kernels.merge import exactly
from deltaw.state import LayerState
from deltaw.train.batches import EpochSampler, SteadyBatches


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _dropped() -> Tensor:
    return drop(torch.ones(5, 7, dtype=torch.float64, device="cpu"), 0.5, _generator())


def _sketched() -> Tensor:
    M = torch.arange(63.0, device="cpu").reshape(9, 7)
    return _sketch(M, 3, _generator()).S


def _fused() -> Tensor:
    A, B = torch.ones(2, 5, device="cpu"), torch.ones(4, 2, device="cpu")
    slices = {"slice_1.lora_A": A, "slice_1.lora_B": B}
    return unfused(LayerState("fused", slices, 1.0, (False, True, False))).tensors["weight.lora_B"]


def _tokens() -> Tensor:
    config = SimpleNamespace(vocab_size=50)
    return probe_tokens(SimpleNamespace(get_text_config=lambda: config))


def _order(kind: type[EpochSampler]) -> Callable[[], Tensor]:
    return lambda: torch.tensor(list(kind(range(1, 12), 2, 0, bucketed=True)), device="cpu")


def _probed() -> Tensor:
    return _probe(torch.ones(3, device="cpu"), 3)


@pytest.mark.parametrize(
    "draw",
    [_dropped, _sketched, _fused, _tokens, _order(EpochSampler), _order(SteadyBatches), _probed],
)
def test_what_is_drawn_is_the_same_whatever_the_default_device(draw: Callable[[], Tensor]) -> None:
    expected = draw()
    with torch.device("meta"):
        assert torch.equal(draw(), expected)


def test_a_model_is_verified_whatever_the_default_device() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["0"]))
    x = torch.ones(2, 4)
    with torch.device("meta"):
        deltaw.verify(model, x)


class Norm(nn.Module):
    """An RMSNorm as in many models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def test_modules_are_tried_without_the_random_state_of_other_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forked: list[Any] = []
    fork, state = torch.random.fork_rng, torch.get_rng_state()

    def spied(devices: Any = None) -> Any:
        forked.append(devices)
        return fork(devices)

    monkeypatch.setattr(torch.random, "fork_rng", spied)
    monkeypatch.setattr(torch, "manual_seed", None)
    assert LeanNorm.computes(Norm())
    assert forked == [[], []]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mask_on_another_device_than_the_inputs_shows_their_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["0"]))
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):  # no device mismatch
        x = torch.ones(2, 5, 4)
        _rows(model[0], x, torch.ones(2, 5, dtype=torch.bool, device="cuda"))


def test_the_norm_of_dora_is_taken_where_the_base_is() -> None:
    names = {"lora_A": (2, 5), "lora_B": (3, 2), "lora_magnitude_vector": (3,)}
    layer = LayerState("linear", {f"weight.{n}": torch.ones(s) for n, s in names.items()}, 1.0)
    W = torch.ones(3, 5, dtype=torch.float64, device="meta")
    with pytest.raises(RuntimeError, match="item"):  # all but the last number is there
        inspect._dora_norm(layer, "weight", W)


@pytest.mark.parametrize(("device", "rows"), [("cpu", 262), ("cuda", 1048), ("meta", 1048)])
def test_a_gpu_takes_larger_chunks_of_logits(device: str, rows: int) -> None:
    assert cross_entropy._chunk(torch.device(device), 256_000) == rows


MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 is allowed."""
    before, MATMUL.fp32_precision = MATMUL.fp32_precision, "tf32"
    yield
    MATMUL.fp32_precision = before


@pytest.fixture
def rounding(tf32: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions that weights are computed in where TF32 is allowed and all are on a GPU."""
    seen: list[str] = []
    add = addition.add_products

    def added(*parts: Any) -> Tensor:
        seen.append(MATMUL.fp32_precision)
        return add(*parts)

    monkeypatch.setattr(addition, "add_products", added)
    for module in (merging, absorbing):
        monkeypatch.setattr(module, "exactly", lambda _: exactly(torch.device("cuda")))
    return seen


def test_a_merge_takes_no_tf32(rounding: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["0"]))
    deltaw.merge(model)
    assert rounding == ["ieee"] and MATMUL.fp32_precision == "tf32"


def test_a_start_is_taken_out_of_a_weight_without_tf32(rounding: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    config = deltaw.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    deltaw.attach(model, config, absorb=True)
    assert set(rounding) == {"ieee"} and MATMUL.fp32_precision == "tf32"


@pytest.mark.usefixtures("tf32")
def test_the_precision_of_products_comes_back_after_an_error() -> None:
    with exactly(torch.device("cpu")):
        assert MATMUL.fp32_precision == "tf32"
    with pytest.raises(ZeroDivisionError), exactly(torch.device("cuda")):
        assert MATMUL.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert MATMUL.fp32_precision == "tf32"


@pytest.mark.parametrize("original", ["cpu", "keep"])
def test_each_original_leaves_its_device_before_the_next_layer_is_merged(
    original: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["0", "1"]))
    done: list[str] = []
    merged, move = merging._merged, Tensor.cpu

    def watched(path: str, *rest: Any) -> Any:
        done.append(path)
        return merged(path, *rest)

    def moved(tensor: Tensor) -> Tensor:
        done.append("cpu")
        return move(tensor)

    monkeypatch.setattr(merging, "_merged", watched)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "bits", lambda _: "")
        patch.setattr(Tensor, "cpu", moved)
        deltaw.merge(model, original=original)
    assert done == (["0", "cpu", "1", "cpu"] if original == "cpu" else ["0", "1"])


def test_a_merge_that_fails_gives_originals_back_to_where_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["0"]))
    sent: list[Any] = []
    move = Tensor.to

    def moved(tensor: Tensor, *where: Any) -> Tensor:
        sent.append(where)
        return move(tensor, *where)

    def fail(*_: Any) -> None:
        monkeypatch.setattr(Tensor, "to", moved)
        raise ZeroDivisionError

    monkeypatch.setattr(merging, "keep", fail)
    with pytest.raises(ZeroDivisionError):
        deltaw.merge(model, original="cpu")
    assert sent == [(torch.device("cpu"),)]
