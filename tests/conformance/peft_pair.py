"""The same adapter on one base under PEFT and under deltaw, passed between them through files."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deltaw

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Make = Callable[[], nn.Module]


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the warnings of PEFT, which gives many about what is as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every trainable parameter random numbers, B included."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.data = (torch.randn(p.shape, generator=generator) * 0.2).to(p.dtype)
    return model.eval()


def with_peft(
    base: nn.Module, name: str = "default", seed: int = 0, **settings: object
) -> nn.Module:
    """Return a copy of `base` adapted by PEFT with random numbers."""
    with quiet():
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings), name)
    return randomise(model, seed)


def with_deltaw(
    base: nn.Module, name: str = "default", seed: int = 0, **settings: object
) -> nn.Module:
    """Return a copy of `base` adapted by deltaw with random numbers, under PEFT's defaults."""
    model = copy.deepcopy(base)
    settings = {"lora_alpha": 8, "modules_to_save": [], **settings}
    deltaw.attach(model, deltaw.LoraConfig(**settings), name)
    return randomise(model, seed)


def saved_by_peft(model: nn.Module, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(str(folder))
    return folder


def saved_by_deltaw(model: nn.Module, folder: Path, name: str = "default") -> Path:
    deltaw.save(model, folder, name)
    return folder


def loaded_by_peft(base: nn.Module, folder: Path, name: str = "default") -> nn.Module:
    """Load with PEFT, for which missing keys are a warning; here they are an error."""
    model = copy.deepcopy(base)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    assert not [str(w.message) for w in seen if "missing" in str(w.message).lower()]
    assert not [str(w.message) for w in seen if "Unexpected keyword" in str(w.message)]
    return model.eval()


def loaded_by_deltaw(base: nn.Module, folder: Path, name: str = "default") -> nn.Module:
    model = copy.deepcopy(base)
    deltaw.load(model, folder, name)
    return model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def output(model: nn.Module, x: object) -> Tensor:
    with torch.no_grad():
        result = model(**x) if isinstance(x, dict) else model(x)
    return getattr(result, "logits", result)


def both_directions(
    base: nn.Module, x: object, folder: Path, tolerance: float = 1e-6, **settings: object
) -> None:
    """Write with one library, read with the other, and compare what comes out of the model."""
    theirs = with_peft(base, **settings)
    written = saved_by_peft(theirs, folder / "theirs")
    read = loaded_by_deltaw(base, written)
    close(output(theirs, x), output(read, x), tolerance)
    assert not torch.allclose(output(read, x), output(base, x), atol=1e-3)

    ours = with_deltaw(base, **settings)
    written = saved_by_deltaw(ours, folder / "ours")
    close(output(ours, x), output(loaded_by_peft(base, written), x), tolerance)
    assert not torch.allclose(output(ours, x), output(base, x), atol=1e-3)

    again = saved_by_deltaw(read, folder / "again")
    assert tensors(again).keys() == tensors(folder / "theirs").keys()
    for name, tensor in tensors(folder / "theirs").items():
        assert torch.equal(tensors(again)[name], tensor), name


# ---------------------------------------------------------------- models


class Mlp(nn.Module):
    """Linear layers whose names end in each other, at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.body = nn.ModuleDict({"lin": nn.Linear(7, 9), "out": nn.Linear(9, 6, bias=False)})
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body["lin"](torch.tanh(self.lin(x))))
        return self.head(self.norm(self.body["out"](h)))


class ScaledEmbedding(nn.Embedding):
    """Like that of Gemma: what is looked up is multiplied."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(2.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Tokens(nn.Module):
    def __init__(self, kind: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.emb = kind(11, 6)
        self.lin = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin(self.emb(ids))


class Convolution(nn.Module):
    def __init__(self, dims: int, kernel: object = 3, **options: object) -> None:
        super().__init__()
        kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        self.conv = kinds[dims](4, 6, kernel, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(2).mean(-1))


def seeded(make: Make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40,
        n_embd=12,
        n_layer=3,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=32,
        num_labels=3,
    )
    return seeded(lambda: transformers.BertForSequenceClassification(config))


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return seeded(lambda: transformers.LlamaForCausalLM(config))


IDS = {"input_ids": torch.arange(12).view(2, 6) * 3 % 40}
X = torch.linspace(-2, 2, 40).view(8, 5)
TARGETS = ["lin", "body.out"]
