"""Combined adapters load in PEFT, and give there what the formula gives."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw
from deltaw import combine
from deltaw.formats import peft as files
from deltaw.state import State

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).view(2, 6) * 3 % 40


class Mixed(nn.Module):
    """An embedding, convolutions with and without groups, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(40, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.body = nn.ModuleDict({"lin": nn.Linear(8, 9)})
        self.head = nn.Linear(9, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.grouped(torch.tanh(self.conv(self.emb(input_ids).transpose(1, 2))))
        return self.head(torch.tanh(self.body["lin"](x.mean(-1))))


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=12,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


SETTINGS: Mapping[str, dict[str, object]] = {
    "plain": {"r": 2, "lora_alpha": 5, "target_modules": ["body.lin", "conv"]},
    "root": {
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["emb", "conv", "grouped", "lin"],
        "rank_pattern": {"conv": 4},
    },
    "other": {"r": 2, "lora_alpha": 3, "target_modules": ["lin", "grouped"]},
}
GPT2: Mapping[str, dict[str, object]] = {
    "plain": {"r": 2, "lora_alpha": 5, "target_modules": ["c_attn", "c_fc"]},
    "root": {"r": 3, "lora_alpha": 7, "use_rslora": True, "target_modules": ["c_attn", "c_proj"]},
    "sliced": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["c_attn"],
        "enable_lora": {"c_attn": [True, False, True]},
    },
}


def adapter(base: nn.Module, settings: dict[str, object], seed: int) -> State:
    model = copy.deepcopy(base)
    deltaw.attach(model, deltaw.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ".adapter." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return deltaw.capture(model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS)
    return getattr(out, "logits", out)


def by_formula(base: nn.Module, states: list[State], weights: list[float]) -> Tensor:
    """The logits of the base with all adapters on it, each under its weight."""
    model = copy.deepcopy(base)
    for n, state in enumerate(states):
        deltaw.attach(model, state, str(n))
    deltaw.activate(model, {str(n): weight for n, weight in enumerate(weights)})
    return logits(model)


def in_peft(base: nn.Module, state: State, folder: Path) -> Tensor:
    files.write(state, folder)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    assert not [str(w.message) for w in seen if "missing" in str(w.message).lower()]
    return logits(model.eval())


@pytest.fixture(params=["mixed", "gpt2"])
def family(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, list[State]]]:
    base, settings = (mixed(), SETTINGS) if request.param == "mixed" else (gpt2(), GPT2)
    yield base, [adapter(base, each, seed) for seed, each in enumerate(settings.values())]


def test_sums_are_the_same_in_peft(family: tuple[nn.Module, list[State]], tmp_path: Path) -> None:
    base, states = family
    weights = [0.7, -1.3, 2.0]
    expected = by_formula(base, states, weights)
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    for name, state in {
        "side": combine.concatenate(states, weights),
        "sum": combine.add(states, weights).state,
    }.items():
        torch.testing.assert_close(
            in_peft(base, state, tmp_path / name), expected, rtol=1e-4, atol=1e-5
        )
        model = copy.deepcopy(base)
        deltaw.load(model, tmp_path / name)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_sums_of_dora_are_the_same_in_peft(
    family: tuple[nn.Module, list[State]], tmp_path: Path
) -> None:
    base, states = family
    paths = ["conv", "emb", "lin"] if isinstance(base, Mixed) else ["c_attn", "c_fc"]
    settings = {"r": 2, "lora_alpha": 5, "target_modules": paths, "use_dora": True}
    if isinstance(base, Mixed):
        states = [combine.without_copies(states[0])]
    both = [*states[:1], adapter(base, settings, 4)]
    expected = by_formula(base, both, [0.7, 0.6])
    weights = {n: t.clone() for n, t in base.state_dict().items() if n != "lm_head.weight"}
    save_file(weights, tmp_path / "base.safetensors")
    stored = combine.StoredBase(tmp_path / "base.safetensors")
    made = combine.add(both, [0.7, 0.6], base=stored).state
    ours = in_peft(base, made, tmp_path / "sum")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_unequal_ranks_are_the_same_in_peft(
    family: tuple[nn.Module, list[State]], tmp_path: Path
) -> None:
    base, states = family
    made = combine.add(states, energy=0.8)
    assert len({kept.rank for kept in made.kept}) > 1
    for name, state in {
        "energy": made.state,
        "ties": combine.ties(states, density=0.6, energy=0.9).state,
        "dare": combine.dare(states, density=0.6).state,
    }.items():
        ours = by_formula(base, [state], [1.0])
        torch.testing.assert_close(
            in_peft(base, state, tmp_path / name), ours, rtol=1e-4, atol=1e-5
        )


def test_a_portable_adapter_is_written_without_patterns(tmp_path: Path) -> None:
    base = gpt2()
    states = [adapter(base, each, seed) for seed, each in enumerate(GPT2.values())]
    state = combine.portable(combine.add(states, energy=0.9).state)
    got = in_peft(base, state, tmp_path / "a")
    expected = by_formula(base, [combine.add(states, energy=0.9).state], [1.0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    config = files.read(tmp_path / "a").config
    assert config.r == config.lora_alpha
    assert not config.rank_pattern and not config.alpha_pattern and not config.use_rslora


def test_trained_biases_and_heads_go_with_the_sum(tmp_path: Path) -> None:
    base = mixed()
    settings = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["lin"],
        "modules_to_save": ["head"],
        "bias": "lora_only",
    }
    states = [adapter(base, settings, seed) for seed in (1, 2)]
    expected = by_formula(base, states, [0.25, 0.75])
    made = combine.add(states, [0.25, 0.75]).state
    torch.testing.assert_close(in_peft(base, made, tmp_path / "a"), expected, rtol=1e-4, atol=1e-5)


def test_biases_on_b_go_with_the_sum(tmp_path: Path) -> None:
    base = mixed()
    settings = {"lora_alpha": 3, "lora_bias": True, "target_modules": ["lin", "grouped"]}
    states = [adapter(base, {**settings, "r": r}, seed=r) for r in (2, 3)]
    states.append(adapter(base, {"r": 1, "lora_alpha": 7, "target_modules": ["conv"]}, 1))
    weights = [0.7, -1.3, 2.0]
    expected = by_formula(base, states, weights)
    made = combine.add(states, weights).state
    torch.testing.assert_close(in_peft(base, made, tmp_path / "a"), expected, rtol=1e-4, atol=1e-5)
