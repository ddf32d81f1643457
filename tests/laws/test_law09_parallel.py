"""Law 9: checkpointing, DDP and FSDP2 give the gradients of one plain process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.utils.checkpoint import checkpoint

import deltaw
from deltaw.errors import StateError
from laws.building import adapt, base, fill, same_bits
from laws.cases import Stack
from laws.product import Setting, setting
from laws.running import over_cases

KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])


class Checkpointed(nn.Module):
    """A part whose forward is run again in backward."""

    def __init__(self, part: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.part = part
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        # a reentrant checkpoint needs an input that requires gradients; tokens have none
        anchor = torch.ones((), requires_grad=True)
        return checkpoint(self.once, x, anchor, use_reentrant=self.reentrant)

    def once(self, x: Tensor, anchor: Tensor) -> Tensor:
        """The part itself."""
        return self.part(x) * anchor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def backward(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """The gradients of a sum in which every output has its own weight."""
    model.zero_grad()
    torch.manual_seed(21)
    y = run(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return gradients(model)


def checkpointing_changes_nothing(setting: Setting, reentrant: bool) -> None:
    """Bit for bit, dropout included."""
    setting = setting.but(dtype=torch.float64)
    model = fill(adapt(base(setting), setting)).train()
    x = setting.case.x(setting.dtype)
    plain = backward(model, model, x)
    again = backward(model, Checkpointed(model, reentrant), x)
    assert plain.keys() == again.keys() and plain
    assert [n for n in plain if not same_bits(plain[n], again[n])] == []


@KINDS
@over_cases()
def test_checkpointing(case, reentrant: bool) -> None:
    dropout = 0.25 if case.form not in ("module", "parameter") else 0.0
    bias = "all" if case.form == "config" else "none"
    checkpointing_changes_nothing(Setting(case, dropout=dropout, bias=bias), reentrant)


SWITCHES: dict[str, Callable[[nn.Module], object]] = {
    "another": lambda m: deltaw.activate(m, "second"),
    "none": lambda m: deltaw.activate(m, None),
    "weights": lambda m: deltaw.activate(m, {"default": 0.5}),
    "detached": lambda m: deltaw.detach(m, "default"),
}


def switching_before_backward_raises(switch: str, reentrant: bool) -> None:
    """Instead of gradients of the wrong adapter; switched back it goes through."""
    s = setting("linear")
    model = adapt(fill(adapt(base(s), s)), s, "second")
    fill(model, "second", 6)
    x = s.case.x(s.dtype)
    y = Checkpointed(model, reentrant)(x).sum()
    SWITCHES[switch](model)
    with pytest.raises(StateError, match="backward"):
        y.backward()


@KINDS
@pytest.mark.parametrize("switch", SWITCHES)
def test_switching_before_backward(switch: str, reentrant: bool) -> None:
    switching_before_backward_raises(switch, reentrant)


@KINDS
def test_disabling_during_backward(reentrant: bool) -> None:
    s = setting("linear")
    model = fill(adapt(base(s), s))
    y = Checkpointed(model, reentrant)(s.case.x(s.dtype)).sum()
    with deltaw.disabled(model), pytest.raises(StateError, match="backward"):
        y.backward()


@KINDS
def test_merging_before_backward(reentrant: bool) -> None:
    s = setting("linear")
    model = fill(adapt(base(s), s))
    y = Checkpointed(model, reentrant)(s.case.x(s.dtype)).sum()
    deltaw.merge(model)
    with pytest.raises(StateError, match="backward"):
        y.backward()


@KINDS
def test_switching_and_back_is_fine(reentrant: bool) -> None:
    s = setting("linear")
    model = adapt(fill(adapt(base(s), s)), s, "second")
    x = s.case.x(s.dtype)
    plain = backward(model, model, x)
    again = Checkpointed(model, reentrant)

    def switched(x: Tensor) -> Tensor:
        y = again(x)
        deltaw.activate(model, "second")
        with torch.no_grad():
            model(x)
        deltaw.activate(model, "default")
        return y

    found = backward(model, switched, x)
    assert [n for n in plain if not same_bits(plain[n], found[n])] == []


@KINDS
def test_a_switch_after_backward_is_fine(reentrant: bool) -> None:
    s = setting("linear")
    model = adapt(fill(adapt(base(s), s)), s, "second")
    again = Checkpointed(model, reentrant)
    x = s.case.x(s.dtype)
    for name in ("default", "second", "default"):
        deltaw.activate(model, name)
        assert all(f".{name}." in n for n in backward(model, again, x))


@KINDS
def test_a_switch_in_the_step_after_is_seen(reentrant: bool) -> None:
    """What an earlier step ran under does not count for this one."""
    s = setting("linear")
    model = adapt(fill(adapt(base(s), s)), s, "second")
    again = Checkpointed(model, reentrant)
    x = s.case.x(s.dtype)
    backward(model, again, x)
    deltaw.activate(model, "second")
    y = again(x).sum()
    deltaw.activate(model, "default")
    with pytest.raises(StateError, match="backward"):
        y.backward()


class Attending(Stack):
    """The same with an attention and a transposed convolution before the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)
        self.spread = nn.ConvTranspose1d(6, 6, 3, padding=1, groups=2)
        self.tokens, self.embed = self.embed, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        h = h + self.attention(h, h, h)[0]
        return super().forward(self.spread(h.mT).mT)


def build() -> Attending:
    """The model of every process."""
    torch.manual_seed(0)
    model = Attending().double()
    model.head = nn.Linear(5, 3).double()  # BatchNorm sees half a batch in each process
    settings = deltaw.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["tokens", "attention", "spread", "up", "fused", "mixing", "gpt2"],
        enable_lora={"fused": [True, False, True]},
        modules_to_save=["head"],
        bias="all",
    )
    deltaw.attach(model, settings)
    fill(model)
    deltaw.attach(model, settings, "idle")
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets for both processes."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(0, 11, (4, 7), generator=generator)
    return x, torch.randn(4, 7, 3, generator=generator, dtype=torch.float64)


def mean_loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Whose mean over processes is the one of the whole batch."""
    return (model(x) - target).square().mean()


def process(rank: int, kind: str, folder: str) -> None:
    """One of two: two steps on its half of the batch, then the parameters to a file."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        model = build()
        x, target = (t[rank * 2 : rank * 2 + 2] for t in batch())
        run, gathered = wrap(model, kind)
        trained = steps(model, run, x, target, gathered)
        if rank == 0:
            torch.save(trained, f"{folder}/trained.pt")
    finally:
        dist.destroy_process_group()


def wrap(model: Attending, kind: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """What runs, and how a gradient becomes whole."""
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        return wrapped, lambda grad: grad
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in (model.attention, model.spread, model.up, model.fused, model.mixing):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lambda grad: grad.full_tensor()


def steps(
    model: Attending,
    run: nn.Module,
    x: Tensor,
    target: Tensor,
    gathered: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The gradients of two steps of SGD."""
    held = [p for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(held, lr=0.1)
    found = {}
    for step in range(2):
        optimizer.zero_grad()
        mean_loss(run, x, target).backward()
        found |= {
            f"{step} {n}": gathered(p.grad).clone()
            for n, p in model.named_parameters()
            if p.grad is not None and "idle" not in n
        }
        optimizer.step()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    multiprocessing.spawn(process, (kind, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "trained.pt", weights_only=True)
    model = build()
    expected = steps(model, model, *batch(), lambda grad: grad)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, rtol=1e-10, atol=1e-12), name
