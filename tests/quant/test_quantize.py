"""Packing a model in place: what is packed, to what values and sizes, and what is refused."""

import sys

import pytest
import torch
from benchmarks.shapes import SHAPES, build, empty
from core.tiny import bert, llama
from quant.packed_models import BNB, KINDS, Net, adapt, batch, bnb, dense, net, over, size, torchao
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import deltaw
from deltaw.errors import ConfigError, StateError, TargetError
from deltaw.quant import _bnb, kinds, storage_of, storages

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""The values of QLoRA, arXiv 2305.14314, appendix E."""
FP4 = [s * v for v in (0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25)
       for s in (1, -1)]  # fmt: skip
"""A sign, and two bits of exponent with one of mantissa, over 12 (0.0625 / 12 where it is 1)."""


def test_every_storage_of_the_folder_has_a_kind() -> None:
    """So that the laws run over it."""
    assert all(storage.kinds for storage in storages())
    assert set(kinds()) == set(KINDS)


@over(*KINDS)
def test_the_layers_stay_where_they_are(kind: str) -> None:
    model = net()
    layers, names = dict(model.named_modules()), [n for n, _ in model.named_parameters()]
    assert deltaw.quantize(model, kind, exclude_modules=["last"]) == ("up", "down")
    assert dict(model.named_modules()) == layers
    assert [n for n, _ in model.named_parameters()] == names
    assert isinstance(model.up, nn.Linear) and type(model.last) is nn.Linear
    assert storage_of(model.up).shape(model.up) == (128, 64)
    assert deltaw.summary(model).total == deltaw.summary(net()).total


@bnb
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_the_nearest_values_of_the_table(kind: str) -> None:
    W = net().up.weight.detach().double()
    model = net(kind, double_quantization=False)
    blocks = W.reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4 if kind == "nf4" else FP4, dtype=torch.float64)
    nearest = ((blocks / absmax).unsqueeze(-1) - table).abs().argmin(-1)
    expected = (absmax * table[nearest]).view(W.shape)
    assert torch.allclose(dense(model.up).double(), expected, atol=1e-6)
    double = dense(net(kind).up).double()
    assert not torch.equal(double, expected)
    assert torch.allclose(double, expected, atol=2e-2 * float(absmax.max()))


@over("int8", "torchao-int8")
def test_eight_bits_are_rows_of_whole_numbers(kind: str) -> None:
    W = net().up.weight.detach().double()
    absmax = W.abs().amax(1, keepdim=True)
    found = dense(net(kind).up).double()
    assert ((found - W).abs() <= 0.52 * absmax / 127 + 2e-3 * absmax).all()
    steps = found / (absmax / (127 if kind == "int8" else 127.5))
    assert (steps - steps.round()).abs().max() < 0.1
    assert len(steps.round().unique()) > 200


@torchao
def test_int4_is_groups_of_sixteen_steps() -> None:
    W = net().up.weight.detach()
    found = dense(net("torchao-int4").up)
    low, high = W.aminmax(dim=1, keepdim=True)
    assert ((found - W).abs() <= 0.51 * (high - low) / 15 + 1e-6).all()
    assert all(len(row.unique()) <= 16 for row in found)


BYTES = {"nf4": (0.27, 0.37), "int8": (0.51, 0.58), "torchao-int8": (0.51, 0.58)}
BYTES |= {"fp4": BYTES["nf4"], "torchao-int4": (0.29, 0.385)}
"""The most bytes of packed layers, and of a Llama of 88 million, beside those in bfloat16."""


def counted(model: nn.Module, kind: str) -> tuple[int, int, int, int]:
    """Bytes of packed layers and of the model, in bfloat16 and packed; scales and tables too."""
    whole = size(model)
    sizes = {path: size(module) for path, module in model.named_modules()}
    packed = deltaw.quantize(model, kind)
    layers = sum(sizes[path] for path in packed)
    now = sum(size(model.get_submodule(path)) for path in packed)
    assert size(model) == whole - layers + now
    return layers, now, whole, size(model)


@over(*KINDS)
def test_bytes_of_a_llama_of_88_million(kind: str) -> None:
    """Of one block, of which there are twelve."""
    shape = LlamaConfig(**SHAPES["llama-88m"] | {"num_hidden_layers": 1})
    layers, now, whole, packed = counted(LlamaForCausalLM(shape).to(torch.bfloat16), kind)
    of_layers, of_whole = BYTES[kind]
    assert layers == 2 * (2 * 768 * 768 + 2 * 768 * 256 + 3 * 768 * 2048)
    assert now <= of_layers * layers
    norms = 2 * 2 * 768
    total = whole + 11 * (layers + norms)
    assert total == size(empty("llama-88m").to(torch.bfloat16))
    assert packed + 11 * (now + norms) <= of_whole * total


@pytest.mark.slow
@over(*KINDS)
def test_bytes_of_the_whole_llama(kind: str) -> None:
    layers, now, whole, packed = counted(build("llama-88m"), kind)
    assert now <= BYTES[kind][0] * layers
    assert packed <= BYTES[kind][1] * whole


@bnb
def test_heads_stay_as_they_are() -> None:
    assert "lm_head" not in deltaw.quantize(llama())
    model = bert()
    assert not any("classifier" in path for path in deltaw.quantize(model))
    assert type(model.classifier) is nn.Linear
    assert storage_of(model.bert.pooler.dense) is not None


@bnb
def test_what_torch_reads_past_its_forward_stays() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 8))
    assert deltaw.quantize(model) == ("1",)


@over(*KINDS)
def test_attaching_and_running_change_no_bits(kind: str) -> None:
    """bitsandbytes would repack 4-bit weights in evaluation on some CPUs."""
    model = net(kind)
    W, before = dense(model.up), size(model)
    adapt(model)
    for training in (False, True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            model(batch())
    assert torch.equal(dense(model.up), W)
    deltaw.detach(model)
    assert torch.equal(dense(model.up), W) and size(model) == before


REFUSED = {
    "unknown kind": ({"kind": "nf5"}, ConfigError, "no way called 'nf5'.*nf4, fp4.*torchao-int8"),
    "double of int8": (
        {"kind": "int8", "double_quantization": True},
        ConfigError,
        "no meaning for int8",
    ),
    "misnamed": ({"exclude_modules": ["lst"]}, TargetError, r"'lst' matches nothing \(nearest: la"),
}


@bnb
@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_make_no_sense(name: str) -> None:
    options, error, message = REFUSED[name]
    model = net()
    with pytest.raises(error, match=message):
        deltaw.quantize(model, **options)
    assert type(model.up) is nn.Linear


@bnb
def test_all_that_cannot_be_packed_is_listed_and_nothing_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(7, 4), nn.Linear(4, 4).double())
    model.append(nn.Linear(8, 8))
    model[3].weight = model[0].weight
    model.append(nn.Linear(4, 4, device="meta"))
    with pytest.raises(TargetError) as caught:
        deltaw.quantize(model)
    message = str(caught.value)
    for part in ("1: its input has an odd width", "2: its weight is torch.float64", "Fix: "):
        assert part in message
    assert "0: its weight is tied to 3" in message and "4: its weight is on the meta" in message
    assert all(type(layer) is nn.Linear for layer in model)


@torchao
def test_what_int4_has_no_kernel_for() -> None:
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(64, 10))
    with pytest.raises(TargetError) as caught:
        deltaw.quantize(model, "torchao-int4")
    message = str(caught.value)
    assert "- 1: its input is no multiple of 64" in message
    assert "- 2: its output is no multiple of 16" in message and "- 0" not in message


@bnb
def test_adapted_layers_are_refused() -> None:
    model = adapt(net())
    with pytest.raises(StateError, match=r"(?s)- up\n.*- down\nFix: quantize the model first"):
        deltaw.quantize(model)
    assert issubclass(type(model.up), nn.Linear) and storage_of(model.up) is None


@pytest.mark.parametrize(("kind", "package", "extra"), [
    ("nf4", "bitsandbytes", "bnb"),
    ("int8", "bitsandbytes", "bnb"),
    ("torchao-int8", "torchao", "torchao"),
])  # fmt: skip
def test_an_absent_package_says_what_to_install(
    kind: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    _bnb.library.cache_clear()
    model = net()
    with pytest.raises(ConfigError, match=rf'need {package}.*\n.*pip install "deltaw\[{extra}\]"'):
        deltaw.quantize(model, kind)
    assert type(model.up) is nn.Linear
    _bnb.library.cache_clear()


@over("nf4", "torchao-int8")
def test_models_that_accelerate_hooks(kind: str) -> None:
    """What it calls for the layer's own forward is that of the packed class."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model, plain = net(), net(kind)
    add_hook_to_module(model.up, AlignDevicesHook("cpu", io_same_device=True))
    deltaw.quantize(model, kind, exclude_modules=["last"])
    assert torch.equal(model(batch()), plain(batch()))
    adapt(model), adapt(plain)
    assert torch.equal(model(batch()), plain(batch()))
    remove_hook_from_module(model.up)
    assert torch.equal(model(batch()), plain(batch()))


@bnb
def test_packed_embeddings_are_refused() -> None:
    library = _bnb.library()
    model = nn.Sequential(library.nn.Embedding4bit(8, 64), nn.Linear(64, 4)).to("cpu")
    with pytest.raises(TargetError, match="0: only linear layers can be adapted where the weight"):
        deltaw.attach(model, deltaw.LoraConfig(target_modules=["0", "1"]))


@bnb
def test_a_weight_that_is_not_packed_yet_is_refused() -> None:
    model = nn.Sequential(_bnb.library().nn.Linear4bit(64, 8))
    with pytest.raises(TargetError, match="0: its weight is not packed yet"):
        deltaw.attach(model, deltaw.LoraConfig(target_modules=["0"]))


@bnb
def test_a_repacked_weight_is_refused() -> None:
    """As bitsandbytes does in its own forward on a CPU with bfloat16 instructions."""
    model = net("nf4")
    weight = model.up.weight
    repack = _bnb.library().functional._convert_weight_packed_for_cpu
    weight.data, weight.quant_state = repack(weight.data, weight.quant_state)
    with pytest.raises(TargetError, match=r"up: .*rounded the scales.*prepare_quantized"):
        adapt(model)


@over(*KINDS)
def test_a_packed_head_cannot_be_trained_in_full(kind: str) -> None:
    model = net(kind)
    config = deltaw.LoraConfig(target_modules=["up"], modules_to_save=["down"])
    with pytest.raises(TargetError, match="down: its weight is packed and cannot be trained"):
        deltaw.attach(model, config)
    plain = net()
    deltaw.attach(plain, config)
    with pytest.raises(ValueError, match="down: its weight is packed and cannot be trained"):
        deltaw.attach(model, deltaw.capture(plain))


@over(*KINDS)
def test_an_adapter_moves_between_packed_and_plain_bases(kind: str, tmp_path) -> None:
    """Other bits of another dtype are another form of the base; other bits of the same are not."""
    deltaw.save(adapt(net(kind)), tmp_path)
    deltaw.load(net(), tmp_path)
    deltaw.load(net(kind), tmp_path)
    torch.manual_seed(5)
    other = Net().eval()
    deltaw.quantize(other, kind, exclude_modules=["last"])
    with pytest.raises(ValueError, match="other weights"):
        deltaw.load(other, tmp_path)


@over(*BNB)
def test_preparing(kind: str) -> None:
    model = net(kind, torch.bfloat16)
    deltaw.prepare_quantized(model, float32=True)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.norm.weight.dtype == model.last.weight.dtype == torch.float32
    assert dense(model.up).shape == (128, 64) and model.up.weight.dtype != torch.float32
    with pytest.raises(StateError, match="none of its weights is packed"):
        deltaw.prepare_quantized(net())
    with pytest.raises(ConfigError, match="models of transformers, not for Net"):
        deltaw.prepare_quantized(net(kind), checkpointing=True)
    with pytest.raises(StateError, match="has adapters already"):
        deltaw.prepare_quantized(adapt(net(kind)))
