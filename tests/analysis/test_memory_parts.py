"""The parts of an estimate are the bytes of real tensors."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_models import VOCABULARY, bert, gpt2, llama, saved
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deltaw
from deltaw.analysis.memory import Training, estimate
from deltaw.analysis.memory.fakes import empty
from deltaw.analysis.memory.headers import read_headers
from deltaw.analysis.memory.rehearsal import rehearse
from deltaw.analysis.memory.runs import TrainerRun
from deltaw.analysis.memory.trace import Record, Trace
from deltaw.errors import TargetError
from deltaw.optim import galore

ROWS, TOKENS = 5, 23
LORA = deltaw.LoraConfig(r=3, lora_alpha=7)


def asked(**settings: Any) -> Training:
    return Training(**{"rows": ROWS, "tokens": TOKENS, "adapter": LORA} | settings)


def rehearsed(folder: Path, training: Training) -> Record:
    weights = read_headers(str(folder))
    dtype = weights.dtype
    return rehearse(empty(str(folder), training, dtype), TrainerRun(training), weights)


def held(record: Record, part: str, *, until: str = "") -> int:
    """The bytes of a part that are alive at the end of a phase, or of all."""
    last = max(
        (i for i, event in enumerate(record.events) if event.phase == until),
        default=len(record.events) - 1,
    )
    alive = set[int]()
    for event in record.events[: last + 1]:
        (alive.add if event.born else alive.discard)(event.number)
    return sum(record.blocks[n].size for n in alive if record.blocks[n].part == part)


def most(record: Record) -> Counter[str]:
    """The most bytes of each part at once."""
    live, found = Counter[str](), Counter[str]()
    for event in record.events:
        block = record.blocks[event.number]
        live[block.part] += block.size if event.born else -block.size
        found |= live
    return found


def nbytes(tensors: Any) -> int:
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def prepared(model: Any, training: Training) -> Any:
    model.config.use_cache = False
    if not training.trains_all:
        deltaw.attach(model, training.adapter)
    if training.fuse_loss:
        deltaw.fuse_loss(model)
    if training.fuse_blocks:
        deltaw.fuse_blocks(model)
    if training.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batch(training: Training) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    if training.labels is not None:
        return {"input_ids": ids, "labels": torch.randint(training.labels, (ROWS,))}
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def kept(model: nn.Module, training: Training) -> int:
    """The bytes of all storages that autograd keeps in a real forward pass, but for parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=training.autocast):
        loss = model(**batch(training)).loss
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    assert loss.requires_grad
    return sum(size for place, size in storages.items() if place not in own)


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2, "bert": bert}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["full", "lora", "galore"])
def test_weights_adapters_gradients_and_states(name: str, method: str, tmp_path: Path) -> None:
    """Bytes of the real model's tensors after a real step."""
    training = asked(method=method, labels=3 if name == "bert" else None, galore_rank=4)
    model = MODELS[name]()
    record = rehearsed(saved(model, tmp_path), training)
    weights = nbytes(model.parameters())
    prepared(model, training)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, fused=True)
    if method == "galore":
        optimizer = galore.GaLoreAdamW(galore.groups(model, 4))
    model(**batch(training)).loss.backward()
    gradients = nbytes(p.grad for p in trained)
    optimizer.step()
    states = nbytes(
        v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)
    )
    assert held(record, "weights") == weights
    own = nbytes(p for n, p in model.named_parameters() if ".adapter." in n)
    index = 8 * (method == "lora")  # which adapter is active
    assert held(record, "adapters", until="load") == own + index
    assert held(record, "gradients", until="backward") == gradients
    assert held(record, "optimiser") == states
    assert held(record, "gradients") == 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"method": "full"}),
        ("llama", {"autocast": True}),
        ("llama", {"checkpointing": True}),
        ("llama", {"fuse_loss": True, "fuse_blocks": True}),
        ("llama", {"adapter": deltaw.LoraConfig(r=3, lora_dropout=0.1)}),
        ("llama", {"adapter": deltaw.LoraConfig(r=3, use_dora=True)}),
        ("gpt2", {}),
        ("gpt2", {"method": "full"}),
        ("bert", {"labels": 3}),
    ],
    ids=str,
)
def test_what_the_forward_pass_keeps(name: str, settings: Any, tmp_path: Path) -> None:
    """Activations and logits are what autograd keeps, and the batch, positions and the like."""
    training = asked(**settings)
    model = MODELS[name]()
    record = rehearsed(saved(model, tmp_path), training)
    real = kept(prepared(model, training), training)
    found = sum(held(record, part, until="forward") for part in ("activations", "logits"))
    if training.checkpointing:
        assert found >= 3 * ROWS * TOKENS * 32 * 4, "each of three blocks keeps its input"
        whole = rehearsed(tmp_path, asked())
        assert found < 0.6 * sum(
            held(whole, part, until="forward") for part in ("activations", "logits")
        )
        return
    assert real <= found + 64
    masks = 0.03 * (training.adapter.lora_dropout > 0)  # drawn apart for readers of one input
    assert found <= (1.02 + masks) * real + 4 * ROWS * TOKENS * 8


@pytest.mark.parametrize("method", ["full", "lora"])
def test_logits(method: str, tmp_path: Path) -> None:
    """The loss keeps log-softmax in float32; its gradient and that of the logits are as large."""
    width = ROWS * TOKENS * VOCABULARY * 4
    record = rehearsed(saved(llama(), tmp_path), asked(method=method))
    assert held(record, "logits", until="forward") == width
    assert most(record)["logits"] == 3 * width


def test_a_fused_loss_has_no_logits_of_all_rows(tmp_path: Path) -> None:
    record = rehearsed(saved(llama(), tmp_path), asked(rows=64, fuse_loss=True))
    logits = [b.size for b in record.blocks if b.part == "logits"]
    assert max(logits) == 512 * VOCABULARY * 4 < 64 * TOKENS * VOCABULARY * 4


def test_packed_weights(tmp_path: Path) -> None:
    """What is packed has the bytes that `deltaw.quantize` leaves."""
    pytest.importorskip("bitsandbytes")
    model = llama(hidden_size=64, intermediate_size=128)
    record = rehearsed(saved(model, tmp_path), asked(method="qlora"))
    file = nbytes(model.parameters())
    packed = deltaw.quantize(model)
    states = [model.get_submodule(path).weight.quant_state for path in packed]
    own = nbytes(model.get_submodule(path).weight for path in packed)
    scales = nbytes(
        t for s in states for t in (s.absmax, s.state2.absmax, s.offset) if isinstance(t, Tensor)
    )
    found = held(record, "weights", until="load") - file
    codes = 4 * (16 + 256) * 2  # one table of values per process
    assert own + scales <= found <= own + scales + codes * len(packed)


def test_nothing_to_pack(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(TargetError, match="GPT2LMHeadModel has no linear layer to pack in 4 bits"):
        rehearsed(saved(gpt2(), tmp_path), asked(method="qlora"))


def test_layerwise_updates_free_gradients(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    together, each = (
        most(rehearsed(folder, asked(method="galore", galore_rank=4, layerwise=layerwise)))
        for layerwise in (False, True)
    )
    assert together["gradients"] == nbytes(llama().parameters())
    assert 0 < each["gradients"] <= 4 * VOCABULARY * 32


def test_other_dtypes_are_converted(tmp_path: Path) -> None:
    """A file in another dtype is mapped until it is converted; then only the new weights stay."""
    folder = saved(llama(torch.bfloat16), tmp_path)
    numbers = sum(p.numel() for p in llama().parameters())
    in_place = estimate(folder, asked())
    converted = estimate(folder, asked(dtype="float32"))
    frequencies = 32 // 4 // 2 * 4 * 2  # of rotary positions, which are in no file
    assert in_place.parts["weights"] == 2 * numbers
    assert converted.parts["weights"] == 4 * numbers + frequencies
    assert in_place.parts["adapters"] == converted.parts["adapters"] > 0


def test_an_empty_tensor_is_memory_where_it_is_written() -> None:
    with FakeTensorMode(), Trace() as trace:
        held = torch.empty((8, 100))
        torch.mm(torch.ones(8, 3), torch.ones(3, 10), out=held[:, :10])
        held[:, :10].add_(1)
        held[:, 50:60].copy_(torch.ones(8, 10))
        torch.empty((2, 2)).fill_(1)
    empty = [block for block in trace.record().blocks if block.size + block.untouched == 3200]
    assert [(block.size, block.untouched) for block in empty] == [(640, 2560)]
    assert [b.untouched for b in trace.record().blocks if b.size == 16] == [0]
    del held
