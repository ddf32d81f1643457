"""An adapter from two full checkpoints gives the fine-tuned model back on the base."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from combine_states import close, delta
from core.mixtures import MODELS
from safetensors.torch import save_file
from torch import Tensor, nn

import deltaw
from deltaw import combine
from deltaw.analysis.places import places
from deltaw.combine._matching import guessed
from deltaw.errors import ConfigError, FormatError, MergeError
from deltaw.formats import peft as files

Tensors = dict[str, Tensor]


def tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "embed.weight": draw(11, 6),
        "h.lin.weight": draw(7, 6),
        "h.lin.bias": draw(7),
        "h.conv.weight": draw(5, 3, 2),
        "norm.weight": draw(6),
        "still.weight": draw(4, 4),
    }


def moved(base: Tensors, r: int) -> Tensors:
    """The base with a change of rank r in every matrix but one, and of any kind elsewhere."""
    generator = torch.Generator().manual_seed(7)
    new = {}
    for name, tensor in base.items():
        rows, flat = len(tensor), tensor.flatten(1) if tensor.dim() > 1 else tensor
        change = torch.randn(flat.shape, generator=generator)
        if tensor.dim() > 1:
            left = torch.randn(rows, r, generator=generator)
            change = left @ torch.randn(r, flat.shape[1], generator=generator)
        new[name] = tensor if name == "still.weight" else tensor + change.view(tensor.shape)
    return new


def saved(path: Path, named: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = tensors()
    return saved(tmp_path / "b.safetensors", base), saved(
        tmp_path / "t.safetensors", moved(base, 2)
    )


def as_matrix(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name == "embed.weight" else tensor.flatten(1)


def test_a_change_of_low_rank_comes_back_whole(pair: tuple[Path, Path]) -> None:
    made = combine.extract(*pair, rank=2)
    base = tensors()
    new = moved(base, 2)
    assert set(made.state.layers) == {"embed", "h.lin", "h.conv"}
    assert {p: own.kind for p, own in made.state.layers.items()} == {
        "embed": "embedding",
        "h.lin": "linear",
        "h.conv": "conv",
    }
    for path, own in made.state.layers.items():
        name = f"{path}.weight"
        close(delta(own), as_matrix(name, new[name]) - as_matrix(name, base[name]), 1e-5)
    assert all(kept.rank == 2 and kept.error < 1e-5 for kept in made.kept)
    assert made.rest == ("h.lin.bias", "norm.weight")
    assert made.unchanged == 1


def test_what_is_lost_is_told(pair: tuple[Path, Path]) -> None:
    base, new = tensors(), moved(tensors(), 2)
    made = combine.extract(*pair, rank=1, targets=["lin"])
    M = new["h.lin.weight"].double() - base["h.lin.weight"].double()
    sigma = torch.linalg.svdvals(M)
    assert made.kept[0].error == pytest.approx(float(sigma[1:].norm() / sigma.norm()), rel=1e-4)
    assert made.kept[0].energy == pytest.approx(1 - made.kept[0].error ** 2, rel=1e-6)
    error = (delta(made.state.layers["h.lin"]) - M).norm() / M.norm()
    assert float(error) == pytest.approx(made.kept[0].error, rel=1e-4)
    assert made.rest == ("embed.weight", "h.conv.weight", "h.lin.bias", "norm.weight")
    assert combine.extract(*pair, energy=1 - 1e-6).state.config.r == 2


def test_the_rest_is_saved_or_refused_on_request(pair: tuple[Path, Path]) -> None:
    new = moved(tensors(), 2)
    made = combine.extract(*pair, rank=2, exclude=["conv"], rest="save")
    layers = made.state.layers
    assert torch.equal(layers["h.lin"].tensors["bias.trained"], new["h.lin.bias"])
    assert torch.equal(layers["norm"].tensors["weight.trained"], new["norm.weight"])
    assert torch.equal(layers["h.conv"].tensors["weight.trained"], new["h.conv.weight"])
    assert made.state.config.bias == "all"
    assert made.state.config.modules_to_save == ["h.conv", "norm"]
    with pytest.raises(MergeError) as error:
        combine.extract(*pair, rank=2, rest="refuse")
    assert "  - h.lin.bias\n  - norm.weight\n" in str(error.value)


def test_a_module_of_the_rest_is_saved_whole(tmp_path: Path) -> None:
    base = {**tensors(), "norm.weight": torch.ones(4), "norm.bias": torch.zeros(4)}
    new = {**moved(tensors(), 1), "norm.weight": torch.rand(4), "norm.bias": torch.zeros(4)}
    a, b = saved(tmp_path / "a.safetensors", base), saved(tmp_path / "b.safetensors", new)
    made = combine.extract(a, b, rank=1, rest="save")
    assert set(made.state.layers["norm"].tensors) == {"weight.trained", "bias.trained"}
    assert made.rest == ("h.lin.bias", "norm.weight")


def sharded(folder: Path, named: Tensors) -> Path:
    folder.mkdir()
    names = list(named)
    parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, own in parts.items():
        saved(folder / file, {name: named[name] for name in own})
    where = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def pickled(folder: Path, named: Tensors) -> Path:
    folder.mkdir()
    torch.save(named, folder / "pytorch_model.bin")
    return folder


def old_pickle(folder: Path, named: Tensors) -> Path:
    folder.mkdir()
    file = folder / "pytorch_model.bin"
    torch.save(named, file, _use_new_zipfile_serialization=False)
    return file


def whole(folder: Path, named: Tensors) -> Path:
    folder.mkdir()
    saved(folder / "model.safetensors", named)
    return folder


@pytest.mark.parametrize("write", [sharded, pickled, old_pickle, whole])
def test_every_form_of_a_checkpoint_gives_the_same(
    pair: tuple[Path, Path], tmp_path: Path, write: Callable[[Path, Tensors], Path]
) -> None:
    base = write(tmp_path / "base", tensors())
    tuned = write(tmp_path / "tuned", moved(tensors(), 2))
    ours, theirs = combine.extract(base, tuned, rank=2), combine.extract(*pair, rank=2)
    for path, own in theirs.state.layers.items():
        for name, tensor in own.tensors.items():
            assert torch.equal(ours.state.layers[path].tensors[name], tensor)
    assert ours.kept == theirs.kept


def test_all_that_does_not_match_is_listed(tmp_path: Path) -> None:
    base, new = tensors(), moved(tensors(), 2)
    del new["h.conv.weight"], new["norm.weight"]
    new["h.lin.weight"] = torch.ones(8, 6)
    new["head.weight"] = torch.ones(3, 6)
    a, b = saved(tmp_path / "a.safetensors", base), saved(tmp_path / "b.safetensors", new)
    with pytest.raises(FormatError) as error:
        combine.extract(a, b, rank=2)
    assert str(error.value).splitlines()[1:-1] == [
        "  - h.conv.weight is missing in the tuned one",
        "  - norm.weight is missing in the tuned one",
        "  - h.lin.weight is (7, 6) in the base and (8, 6) in the tuned one",
    ]
    made = combine.extract(a, b, rank=2, exclude=["conv", "norm", "h.lin"])
    assert list(made.state.layers) == ["embed"]
    assert made.rest == ("h.lin.bias", "h.lin.weight", "head.weight")
    other = saved(tmp_path / "c.safetensors", {"x.weight": torch.ones(2, 2)})
    with pytest.raises(FormatError, match=r"x\.weight is only in the tuned one"):
        combine.extract(a, other, rank=1)


def test_a_model_inside_another_is_found(tmp_path: Path) -> None:
    base, new = tensors(), moved(tensors(), 2)
    inside = {f"bert.{name}": tensor for name, tensor in new.items()}
    inside["head.weight"] = torch.ones(3, 6)
    a, b = saved(tmp_path / "a.safetensors", base), saved(tmp_path / "b.safetensors", inside)
    made = combine.extract(a, b, rank=2, rest="save")
    assert {"bert.embed", "bert.h.lin", "bert.h.conv", "head", "bert.norm"} == set(
        made.state.layers
    )
    back = combine.extract(b, a, rank=2, exclude=["head"])
    assert {"embed", "h.lin", "h.conv"} == set(back.state.layers)
    close(delta(back.state.layers["h.lin"]), -delta(made.state.layers["bert.h.lin"]), 1e-5)


def test_broken_numbers_and_quantised_weights_are_listed(tmp_path: Path) -> None:
    base, new = tensors(), moved(tensors(), 2)
    base["q.weight"] = torch.zeros(3, 3, dtype=torch.int8)
    new["q.weight"] = torch.ones(3, 3, dtype=torch.int8)
    new["h.lin.weight"][0, 0] = float("nan")
    new["norm.weight"][0] = float("inf")
    a, b = saved(tmp_path / "a.safetensors", base), saved(tmp_path / "b.safetensors", new)
    with pytest.raises(MergeError) as error:
        combine.extract(a, b, rank=2)
    assert str(error.value).splitlines()[1:-1] == [
        "  - h.lin.weight: NaN or Inf in its difference",
        "  - q.weight: stored as torch.int8, torch.int8",
        "  - norm.weight: NaN or Inf in its difference",
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "Neither rank nor energy"),
        ({"rank": 2, "energy": 0.5}, "Both rank and energy"),
        ({"rank": 7}, "rank 7 is above that of every matrix; the largest, 'embed', has 6"),
        ({"energy": 0.0}, "energy must lie"),
        ({"rank": 1, "rest": "drop"}, "rest must be one of report, save, refuse"),
        ({"rank": 1, "targets": ["lin", "q_proj"]}, "'q_proj'"),
        ({"rank": 1, "targets": "nothing.*"}, "No layer is a target"),
    ],
)
def test_settings_out_of_range(
    pair: tuple[Path, Path], settings: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        combine.extract(*pair, **settings)


def test_damaged_and_absent_checkpoints(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    with pytest.raises(FormatError, match=r"There is no .*nowhere"):
        combine.extract(tmp_path / "nowhere", tuned, rank=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="holds no model"):
        combine.extract(tmp_path / "empty", tuned, rank=1)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="is an adapter, not a whole model"):
        combine.extract(tmp_path / "adapter", tuned, rank=1)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(base.read_bytes()[:-40])
    with pytest.raises(FormatError, match="not a whole file of tensors"):
        combine.extract(cut, tuned, rank=1)
    evil = tmp_path / "evil.bin"
    torch.save({"a": print}, evil)
    with pytest.raises(FormatError, match="never does"):
        combine.extract(evil, tuned, rank=1)
    torch.save({"a": 1}, evil)
    with pytest.raises(FormatError, match="more than tensors"):
        combine.extract(evil, tuned, rank=1)
    folder = sharded(tmp_path / "shards", tensors())
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"not beside it:\n  - model-2"):
        combine.extract(folder, tuned, rank=1)
    saved(folder / "model-2.safetensors", {"still.weight": torch.ones(2)})
    with pytest.raises(FormatError, match=r"none of its files:\n  - h\.conv\.weight\n  - norm"):
        combine.extract(folder, tuned, rank=1)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(FormatError, match=r"not beside it:\n  - \.\./b\.safetensors"):
        combine.extract(folder, tuned, rank=1)
    index.write_text("[]")
    with pytest.raises(FormatError, match="no index of shards"):
        combine.extract(folder, tuned, rank=1)
    whole(tmp_path / "two", tensors())
    saved(tmp_path / "two" / "other.safetensors", tensors())
    with pytest.raises(FormatError, match=r"several models.*model\.safetensors, other"):
        combine.extract(tmp_path / "two", tuned, rank=1)


transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(12).view(2, 6) * 3 % 40


def gpt2(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=12,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Conv2d(4, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.h(x).flatten(2).mean(-1))


def tuned_from(model: nn.Module) -> nn.Module:
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return tuned


def logits(model: nn.Module, x: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return getattr(out, "logits", out)


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_fine_tuned_gpt2_comes_back_in_peft_and_here(tmp_path: Path, tied: bool) -> None:
    base = gpt2(tied)
    tuned = tuned_from(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(FormatError, match=r"c_attn\.weight \(12, 36\) beside a bias \(36,\)"):
        combine.extract(tmp_path / "base", tmp_path / "tuned", energy=1.0)
    made = combine.extract(
        tmp_path / "base", tmp_path / "tuned", energy=1.0, rest="save", places=places(base)
    )
    assert made.state.layers["lm_head"].kind == "linear"
    assert made.state.layers["transformer.h.0.attn.c_proj"].kind == "conv1d"
    files.write(made.state, tmp_path / "adapter")
    expected = logits(tuned)
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    model = copy.deepcopy(base)
    deltaw.load(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    got = logits(in_peft(base, tmp_path / "adapter"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_grouped_convolution_comes_back_in_peft_and_here(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Grouped().eval()
    tuned = tuned_from(base)
    x = torch.randn(2, 4, 5, 6)
    ours = (
        saved(tmp_path / "b.safetensors", base.state_dict()),
        saved(tmp_path / "t.safetensors", tuned.state_dict()),
    )
    made = combine.extract(*ours, energy=1.0, rest="save", places=places(base))
    files.write(made.state, tmp_path / "adapter")
    model = copy.deepcopy(base)
    deltaw.load(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model, x), logits(tuned, x), rtol=1e-4, atol=1e-5)
    got = logits(in_peft(base, tmp_path / "adapter"), x)
    torch.testing.assert_close(got, logits(tuned, x), rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_comes_back_and_is_not_taken_for_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.ConvTranspose2d(4, 6, (3, 2), groups=2))
    tuned = tuned_from(base)
    x = torch.randn(2, 4, 5, 6)
    ours = (
        saved(tmp_path / "b.safetensors", base.state_dict()),
        saved(tmp_path / "t.safetensors", tuned.state_dict()),
    )
    made = combine.extract(*ours, energy=1.0, rest="save", places=places(base))
    deltaw.attach(base, made.state)
    torch.testing.assert_close(logits(base, x), logits(tuned, x), rtol=1e-4, atol=1e-5)
    with pytest.raises(FormatError, match=r"0\.weight \(4, 3, 3, 2\) beside a bias \(6,\)"):
        combine.extract(*ours, energy=1.0)


def test_a_linear_layer_that_is_called_an_embedding_is_known_by_its_bias() -> None:
    """ALBERT's `embedding_hidden_mapping_in`, and GPT-NeoX's head `embed_out`."""
    shapes = {"a.embedding_hidden_mapping_in.weight": (8, 4), "embed_out.weight": (9, 4)}
    shapes |= {"a.embedding_hidden_mapping_in.bias": (8,), "a.word_embeddings.weight": (9, 4)}
    kinds = {path: place.kind for path, place in guessed(shapes).items()}
    assert kinds == {
        "a.embedding_hidden_mapping_in": "linear",
        "embed_out": "linear",
        "a.word_embeddings": "embedding",
    }


ATTENTION_SLOTS = ("q", "k", "v", "out")
ATTENTION = {
    "packed": {},
    "apart": {"kdim": 5, "vdim": 4},
    "further": {"add_bias_kv": True},
}


class Attending(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 3, **settings)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        key, value = x[..., : self.mha.kdim], x[..., : self.mha.vdim]
        return self.head(self.mha(x, key, value)[0])


def files_of(tmp_path: Path, base: nn.Module, tuned: nn.Module) -> tuple[Path, Path]:
    return (
        saved(tmp_path / "b.safetensors", base.state_dict()),
        saved(tmp_path / "t.safetensors", tuned.state_dict()),
    )


@pytest.mark.parametrize("told", [True, False], ids=["places", "guessed"])
@pytest.mark.parametrize("settings", ATTENTION.values(), ids=ATTENTION)
def test_attention_comes_back(tmp_path: Path, settings: dict[str, object], told: bool) -> None:
    torch.manual_seed(0)
    base = Attending(**settings).double().eval()
    tuned = tuned_from(base)
    x = torch.randn(7, 2, 6).double()
    where = places(base) if told else None
    made = combine.extract(*files_of(tmp_path, base, tuned), rank=6, rest="save", places=where)
    attention = made.state.layers["mha"]
    assert attention.kind == "attention" and sorted(made.state.layers) == [
        "head",
        "mha",
        "mha.out_proj",
    ]
    assert {kept.path for kept in made.kept} == {"head", *(f"mha[{s}]" for s in ATTENTION_SLOTS)}
    files.write(made.state, tmp_path / "adapter")
    for source in (made.state, tmp_path / "adapter"):
        model = copy.deepcopy(base)
        deltaw.attach(model, source) if source is made.state else deltaw.load(model, source)
        torch.testing.assert_close(logits(model, x), logits(tuned, x), rtol=1e-12, atol=1e-12)


def test_slots_that_stay_get_no_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Attending().double().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.mha.in_proj_weight[:6] += torch.randn(6, 6)
    made = combine.extract(*files_of(tmp_path, base, tuned), energy=1.0, targets="all-linear")
    assert list(made.state.layers) == ["mha"] and made.rest == () and made.unchanged == 5
    assert set(made.state.layers["mha"].tensors) == {"q.lora_A", "q.lora_B"}
    x = torch.randn(7, 2, 6).double()
    model = copy.deepcopy(base)
    deltaw.attach(model, made.state)
    torch.testing.assert_close(logits(model, x), logits(tuned, x), rtol=1e-12, atol=1e-12)
    tuned.mha.in_proj_weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="in_proj_weight: NaN") as error:
        combine.extract(*files_of(tmp_path, base, tuned), energy=1.0)
    assert str(error.value).count("NaN or Inf") == 1


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_stacks_of_experts_come_back(tmp_path: Path, name: str) -> None:
    """Stacked as (E, in, out) and (E, out, in); the second expert of all stays as it is."""
    base = MODELS[name]()
    tuned = tuned_from(base)
    stacks = [n for n, P in base.named_parameters() if P.dim() == 3]
    with torch.no_grad():
        for stack in stacks:
            tuned.get_parameter(stack)[1] = base.get_parameter(stack)[1]
    both = files_of(tmp_path, base, tuned)
    made = combine.extract(*both, rank=16, rest="save", places=places(base))
    assert not set(stacks) & set(made.rest) and len(stacks) == 4
    expected = logits(tuned)
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    deltaw.attach(base, made.state)
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)
    guess = combine.extract(*both, rank=16)
    assert set(stacks) < set(guess.rest)
