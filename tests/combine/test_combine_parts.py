"""Stacked experts, and rows of single tokens, in sums and cuts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from core.mixtures import MODELS, NAMES
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw
from deltaw import combine
from deltaw.errors import MergeError
from deltaw.formats import peft as files
from deltaw.layers.experts import Experts
from deltaw.state import State

WEIGHTS = [0.5, -1.5]


def drawn(model: nn.Module, seed: int, **settings: Any) -> nn.Module:
    deltaw.attach(model, deltaw.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in sorted(model.named_parameters()):
            if ".adapter." in path:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def experts(base: nn.Module, seed: int, r: int, **settings: Any) -> State:
    given = {"target_modules": ["q_proj"], "target_parameters": NAMES, **settings}
    return deltaw.capture(drawn(copy.deepcopy(base), seed, r=r, lora_alpha=5, **given))


def parameters(base: nn.Module, state: State) -> dict[str, Tensor]:
    """The weights with an adapter merged by its own layers."""
    model = copy.deepcopy(base)
    deltaw.attach(model, state)
    deltaw.merge(model, original="none")
    deltaw.detach(model)
    return dict(model.named_parameters())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_sums_of_stacked_experts_are_exact(make: Any) -> None:
    base = make()
    states = [
        experts(base, 1, 2, alpha_pattern={"down_proj": 7}),
        experts(base, 2, 3, use_rslora=True, target_parameters=NAMES[:1]),
    ]
    each = [parameters(base, state) for state in states]
    for made in (
        combine.concatenate(states, WEIGHTS),
        combine.add(states, WEIGHTS).state,
    ):
        found = parameters(base, made)
        for name, W in base.named_parameters():
            sums = [w * (P[name] - W) for w, P in zip(WEIGHTS, each, strict=True)]
            torch.testing.assert_close(found[name] - W, sum(sums), rtol=1e-4, atol=2e-6, msg=name)


def test_experts_may_be_named_without_their_module() -> None:
    base = MODELS["mixtral"]()
    bare = [name.rpartition(".")[2] for name in NAMES]
    state = experts(base, 1, 2, target_parameters=bare)
    assert combine.resize(state, rank=1).state.config.r == 1


def test_every_expert_is_cut_to_the_rank_by_itself(tmp_path: Path) -> None:
    base = MODELS["mixtral"]()
    state = experts(base, 1, 3, target_modules=[])
    made = combine.resize(state, rank=2)
    assert {kept.rank for kept in made.kept} == {2} and made.state.config.r == 2
    files.write(made.state, tmp_path / "cut")
    model = copy.deepcopy(base)
    deltaw.load(model, tmp_path / "cut")
    deltaw.merge(model, original="none")
    whole, W = parameters(base, state), dict(base.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for name in (f"{path}.{slot}" for slot in ("gate_up_proj", "down_proj")):
                U, S, Vh = torch.linalg.svd(whole[name] - W[name], full_matrices=False)
                best = (U[..., :2] * S[..., None, :2]) @ Vh[..., :2, :]
                cut = model.get_parameter(name) - W[name]
                torch.testing.assert_close(cut, best, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:]], ids=["both", "one", "other"])
def test_experts_in_files_of_ours_have_their_names(
    make: Any, names: list[str], tmp_path: Path
) -> None:
    given = {"target_parameters": names, "alpha_pattern": {names[-1]: 7}}
    made = combine.resize(experts(make(), 1, 3, **given), rank=2).state
    for state in (experts(make(), 1, 3, **given), made):
        files.write(state, tmp_path / "file")
        found = files.read(tmp_path / "file")
        assert found.layers.keys() == state.layers.keys()
        for path, layer in state.layers.items():
            own = found.layers[path]
            assert (own.kind, sorted(own.tensors)) == (layer.kind, sorted(layer.tensors))
            for name, tensor in layer.tensors.items():
                assert torch.equal(own.tensors[name], tensor)
            for name in layer.tensors:
                slot = name.rpartition(".")[0]
                assert own.scale_of(slot) == layer.scale_of(slot)
        files.write(found, tmp_path / "again")
        for file in (tmp_path / "file").iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_experts_as_peft_packs_them_are_refused_with_the_way_out(tmp_path: Path) -> None:
    base = next(iter(MODELS.values()))()
    for number, names in enumerate((NAMES, NAMES[:1])):
        folder = tmp_path / str(number)
        files.write(experts(base, 1, 2, target_parameters=names), folder)
        (folder / "deltaw.json").unlink()
        with pytest.raises(MergeError, match=r"stacked experts as PEFT packs them, .*; load it"):
            combine.resize(files.read(folder), rank=1)
    with pytest.raises(MergeError, match="stacked experts"):
        combine.portable(experts(base, 1, 2))
    apart = [experts(base, 1, 2, target_parameters=[name]) for name in NAMES]
    with pytest.raises(MergeError, match="no adapter has all of down_proj, gate_up_proj"):
        combine.add(apart)


def test_experts_beside_dora_are_refused(tmp_path: Path) -> None:
    base = MODELS["mixtral"]()
    dora = experts(base, 1, 2, target_parameters=None, use_dora=True)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    where = combine.StoredBase(tmp_path / "base.safetensors")
    told = r"mlp\.experts in adapter 2 holds stacked experts, which have no DoRA"
    with pytest.raises(MergeError, match=told):
        combine.add([dora, experts(base, 1, 2)], base=where)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)


def rows(seed: int, tokens: list[int]) -> State:
    torch.manual_seed(0)
    given: dict[str, Any] = {"trainable_token_indices": {"embed": tokens}}
    return deltaw.capture(drawn(Table(), seed, r=3, target_modules=["mix"], **given))


def test_rows_of_tokens_are_kept_and_mixed(tmp_path: Path) -> None:
    a, b = rows(1, [7, 2, 9]), rows(2, [7, 2, 9])
    name = "weight.trainable_tokens_delta"
    cut = combine.resize(a, rank=1).state
    assert torch.equal(cut.layers["embed"].tensors[name], a.layers["embed"].tensors[name])
    made = combine.add([a, b], [0.25, 0.75]).state
    mixed = 0.25 * a.layers["embed"].tensors[name] + 0.75 * b.layers["embed"].tensors[name]
    files.write(made, tmp_path / "mixed")
    torch.manual_seed(0)
    model = Table()
    deltaw.load(model, tmp_path / "mixed")
    again = deltaw.capture(model).layers["embed"].tensors
    torch.testing.assert_close(again[name], mixed)
    assert again["weight.token_indices"].tolist() == [7, 2, 9]


def test_rows_of_other_tokens_or_weights_are_refused() -> None:
    a, b = rows(1, [7, 2, 9]), rows(2, [7, 2, 8])
    with pytest.raises(MergeError, match=r"tokens \[7, 2, 9\] in adapter 1, .*\[7, 2, 8\] in ad"):
        combine.add([a, b], [0.5, 0.5])
    with pytest.raises(MergeError, match=r"embed\.weight\.trainable_tokens_delta: 2\n.*--drop-c"):
        combine.add([a, a])
    bare = combine.add([combine.without_copies(each) for each in (a, b)]).state
    assert sorted(bare.layers) == ["mix"] and bare.config.trainable_token_indices is None
