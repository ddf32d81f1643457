"""The record of a deep model is that of all its layers, though only a few are rehearsed."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from memory_models import gpt2, llama
from torch import nn

import deltaw
from deltaw.analysis.memory import Training, depth
from deltaw.analysis.memory.depth import FEW, rehearse_deep, stack_of, steps
from deltaw.analysis.memory.peak import most, peak
from deltaw.analysis.memory.rehearsal import rehearse
from deltaw.analysis.memory.runs import TrainerRun
from deltaw.analysis.memory.trace import Record

LAYERS = 8
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def run(**settings: Any) -> TrainerRun:
    adapter = settings.pop("adapter", deltaw.LoraConfig(r=3))
    asked = {"rows": 4, "tokens": 32, "galore_rank": 8, "adapter": adapter}
    return TrainerRun(Training(**asked | settings))


def deep(layers: int = LAYERS, **settings: Any) -> nn.Module:
    with torch.device("meta"):
        return llama(num_hidden_layers=layers, **WIDE | settings)


@pytest.fixture
def depths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each rehearsal had; models of eight layers are deep here."""
    seen = list[int]()

    def counted(model: Any, *rest: Any) -> Record:
        seen.append(len(model.model.layers))
        return rehearse(model, *rest)

    monkeypatch.setattr(depth, "DEEP", LAYERS)
    monkeypatch.setattr(depth, "rehearse", counted)
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full"},
        {"method": "lora"},
        {"method": "qlora"},
        {"method": "galore"},
        {"method": "galore", "layerwise": True},
        {"checkpointing": True},
        {"fuse_loss": True, "fuse_blocks": True},
    ],
    ids=str,
)
def test_a_grown_record_is_the_whole_one(settings: Any, depths: list[int]) -> None:
    if settings.get("method") == "qlora":
        pytest.importorskip("bitsandbytes")
    grown = rehearse_deep(deep(), run(**settings), None)
    whole = rehearse(deep(), run(**settings), None)
    assert depths == list(FEW)
    assert steps(grown) == steps(whole)
    for found, true in ((peak(grown), peak(whole)), (most(grown), most(whole))):
        assert sum(found.values()) == pytest.approx(sum(true.values()), abs=4096)
        kept = {"weights", "gradients", "optimiser"} & true.keys()
        assert {part: found[part] for part in kept} == {part: true[part] for part in kept}


def test_the_work_does_not_grow_with_the_depth(depths: list[int]) -> None:
    """Eighty layers of a model as wide as those of 70 billion weights take five at once."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    model = deep(80, **shape, num_key_value_heads=8).to(torch.bfloat16)
    record = rehearse_deep(model, run(method="full"), None)
    assert depths == list(FEW)
    weights = sum(p.nbytes for p in model.parameters())
    parts = Counter[str]()
    for block in record.blocks:
        parts[block.part] += block.size
    assert parts["weights"] == pytest.approx(weights, rel=1e-6)
    assert parts["gradients"] == weights
    assert parts["optimiser"] == pytest.approx(2 * weights, rel=1e-6)


def test_layers_that_are_adapted_unlike_are_all_rehearsed(depths: list[int]) -> None:
    """The last layers alone have adapters, so that the first few say nothing of them."""
    adapter = deltaw.LoraConfig(r=3, layers_to_transform=[5, 6, 7])
    record = rehearse_deep(deep(), run(adapter=adapter), None)
    assert depths == [LAYERS]
    assert steps(record) == steps(rehearse(deep(), run(adapter=adapter), None))


def test_layers_that_compute_unlike_are_all_rehearsed(
    depths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the third depth allocates is not what the first two foretell."""
    layer = type(deep().model.layers[0])  # type: ignore[union-attr,index]
    own = layer.forward

    def forward(self: Any, states: torch.Tensor, *rest: Any, **settings: Any) -> Any:
        out = own(self, states, *rest, **settings)
        return out * out * out if self.self_attn.layer_idx % 2 else out

    monkeypatch.setattr(layer, "forward", forward)
    model = deep()
    record = rehearse_deep(model, run(), None)
    assert depths == [*FEW, LAYERS]
    assert steps(record) == steps(rehearse(copy.deepcopy(model), run(), None))


def test_few_layers_are_all_rehearsed(depths: list[int]) -> None:
    rehearse_deep(deep(LAYERS - 1), run(), None)
    assert depths == [LAYERS - 1]


def test_the_longest_list_of_layers_that_are_alike() -> None:
    assert stack_of(deep()) == "model.layers"
    assert stack_of(gpt2()) == "transformer.h"
    assert stack_of(nn.Sequential(nn.Linear(2, 2))) is None
    assert stack_of(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])) is None
