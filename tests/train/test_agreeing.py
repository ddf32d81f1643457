"""What DDP is told of a model with packed weights and frozen starts, in one process over gloo."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from quant.packed_models import adapt, batch, net, over
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import deltaw
from deltaw.train.distributed import shared
from deltaw.train.distributed.outliving import outlive
from deltaw.train.distributed.shared import agree


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@over("torchao-int8", "torchao-int4", "nf4")
@pytest.mark.usefixtures("alone")
def test_packed_weights_train_under_ddp(kind: str) -> None:
    model, plain = adapt(net(kind)), adapt(net(kind))
    agree(model)
    parallel = DistributedDataParallel(model)
    loss = parallel(batch()).square().sum()
    loss.backward()
    expected = plain(batch()).square().sum()
    expected.backward()
    assert torch.equal(loss, expected)
    trained = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter.grad, trained[name])


@pytest.mark.usefixtures("alone")
def test_starts_are_sent_once_and_not_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    config = deltaw.LoraConfig(r=3, target_modules=["up"], init_lora_weights="olora")
    deltaw.attach(model, config)
    sent: list[int] = []
    monkeypatch.setattr(shared.dist, "broadcast", lambda tensor, _: sent.append(tensor.data_ptr()))
    agree(model)
    names = ("lora_A", "lora_B", "start_A", "start_B")
    own = {f"up.adapter.default.weight.{name}" for name in names}
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert sorted(sent) == sorted(held[name].data_ptr() for name in own)
    monkeypatch.undo()
    parallel = DistributedDataParallel(model)
    assert parallel.parameters_to_ignore == {name for name in own if ".start_" in name}
    assert not parallel.modules_buffers


class Group:
    """What tells when it is dropped."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def __del__(self) -> None:
        self.told.append("group")


@pytest.mark.usefixtures("alone")
def test_the_group_goes_after_what_ddp_made_of_it() -> None:
    """Otherwise the group waits for a thread of gloo's that waits for Python's lock."""
    told: list[str] = []
    parallel = DistributedDataParallel(net())
    parallel.process_group = Group(told)
    outlive(parallel)
    for name in ("reducer", "logger"):
        weakref.finalize(getattr(parallel, name), told.append, name)
    del parallel
    gc.collect()
    assert sorted(told[:2]) == ["logger", "reducer"] and told[2:] == ["group"]


@pytest.mark.usefixtures("alone")
def test_the_first_process_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(net())

    def received(tensor: Tensor, source: int) -> None:
        assert source == 0
        tensor.fill_(0.5)

    monkeypatch.setattr(shared.dist, "broadcast", received)
    agree(model)
    for name, parameter in model.named_parameters():
        assert bool((parameter == 0.5).all()) == (".adapter." in name)
