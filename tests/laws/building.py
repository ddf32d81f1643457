"""Building the models of the product, and giving their adapters values as if trained."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import deltaw
from deltaw.adapter import Adapter
from deltaw.inits import from_data
from deltaw.layer import AdaptedLayer
from deltaw.layers.conv_spanning import SpanningConv
from deltaw.quant import storage_of
from deltaw.storage import inner
from laws.cases import Head, Small
from laws.oracle import spread_rows
from laws.product import Setting

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def base(setting: Setting, seed: int = 0) -> nn.Module:
    """The model of a setting without adapters, in evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = setting.case.layer()
        head = None
        if setting.head:
            y = setting.case.call(layer, setting.case.x(torch.float32))
            axis = 1 if "conv" in setting.case.file and setting.case.file != "conv1d" else -1
            head = Head(y.shape[axis], axis)
        model = Small(layer, head, setting.case.call)
        for module in (layer, getattr(head, "norm", None)):
            if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d)):
                nn.init.normal_(module.weight, 1.0)
                nn.init.normal_(module.bias)
        for name in setting.case.biases():
            nn.init.normal_(layer.get_parameter(name))
    model = model.to(setting.dtype).eval()
    if setting.case.packed:
        deltaw.quantize(model, setting.case.packed, exclude_modules=["head"])
        return model
    if setting.case.file == "attention":
        # torch multiplies a transposed input by a weight that trains in another way.
        layer.requires_grad_(False)
    settle(model, setting.case.x(setting.dtype))
    return model


def unpacked(model: nn.Module, setting: Setting) -> nn.Module:
    """The model with a dense weight in its layer."""
    layer = model.layer
    storage = storage_of(layer)
    if storage is not None:
        W = storage.read(layer).to(setting.dtype)
        model.layer = nn.Linear(*W.shape[::-1], bias=layer.bias is not None, dtype=W.dtype)
        model.layer.weight.data, model.layer.bias = W, layer.bias
    return model


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Run until max_norm finds nothing more to renormalise, which in half precision takes a few."""
    for _ in range(20):
        before = [p.clone() for p in model.layer.parameters()]
        model(x)
        if all(map(same_bits, model.layer.parameters(), before)):
            return
    raise AssertionError("max_norm does not settle")


def config(setting: Setting) -> deltaw.LoraConfig:
    """The config of a setting."""
    case = setting.case
    r, alpha = setting.rank
    saved = (["head"] if setting.head else []) + (["layer"] if case.form == "module" else [])
    targets = {"module": None, "parameter": []}.get(case.form, ["layer"])
    return deltaw.LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=targets,
        target_parameters=["layer.weight"] if case.form == "parameter" else None,
        lora_dropout=setting.dropout,
        bias=setting.bias,
        use_rslora=setting.rslora,
        modules_to_save=saved,
        init_lora_weights=setting.init,
        lora_bias=setting.lora_bias,
        method=setting.method,
        enable_lora={"layer": case.enabled} if case.enabled else None,
    )


def source(setting: Setting, model: nn.Module, seed: int = 3) -> deltaw.LoraConfig | deltaw.State:
    """What `attach` is given: a config, or for the forms of files a state whose B is zero."""
    if setting.case.form in ("config", "module", "parameter"):
        return config(setting)
    layer = model.layer
    r = setting.rank[0]
    if setting.case.form == "spanning":
        A = (r * layer.groups, layer.in_channels, *layer.kernel_size)
        B = (layer.out_channels, r)
    else:
        k, dims = layer.kernel_size[0], len(layer.kernel_size)
        A = (r * k, layer.in_channels * k ** (dims - dims // 2))
        B = (layer.out_channels // layer.groups * k ** (dims // 2), r * k)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "weight.lora_A": torch.randn(A, generator=generator),
        "weight.lora_B": torch.zeros(B),
    }
    factored = setting.case.form == "factored"
    state = deltaw.LayerState(
        "conv", tensors, setting.scale, groups=layer.groups, factored=factored
    )
    return deltaw.State(config(setting), {"layer": state})


def adapt(model: nn.Module, setting: Setting, name: str = "default", seed: int = 3) -> nn.Module:
    """Attach at the start that the setting asks for."""
    generator = torch.Generator().manual_seed(seed)
    data = {}
    if from_data(setting.init):
        data = {"data": [setting.case.x(setting.dtype, n) for n in (21, 22)], "loss": squares}
    deltaw.attach(model, source(setting, model, seed), name, generator=generator, **data)
    return model


def squares(model: nn.Module, x: Tensor) -> Tensor:
    """A loss for starts from data."""
    return model(x).float().square().mean()


def fill(model: nn.Module, name: str = "default", seed: int = 5, size: float = 0.3) -> nn.Module:
    """Give every tensor of an adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for layer in [m for m in model.modules() if isinstance(m, AdaptedLayer)]:
            for slot in layer.adapter[name].values() if name in layer.adapter else ():
                for key, tensor in (*slot.named_parameters(), *slot.named_buffers()):
                    if slot.replaces and tensor.is_floating_point():
                        tensor.copy_(tensor.double() + noise(*tensor.shape).abs())
                    elif key == "lora_B" and isinstance(layer, SpanningConv):
                        rank = tensor.shape[1] // layer.groups
                        tensor.copy_(spread_rows(layer, noise(tensor.shape[0], rank)))
                    elif not slot.replaces:
                        tensor.copy_(noise(*tensor.shape))
    return model


def adapted(setting: Setting, seed: int = 0, **options: float) -> nn.Module:
    """A model with one adapter that does something, in evaluation."""
    return fill(adapt(base(setting, seed), setting), **options)


def parts(model: nn.Module, name: str = "default") -> Iterator[Adapter]:
    """The modules of one adapter."""
    for path, module in model.named_modules():
        if isinstance(module, Adapter) and f".adapter.{name}." in f".{path}.":
            yield module


def bits(tensor: Tensor) -> Tensor:
    """The same memory read as integers."""
    return tensor.detach().contiguous().view(_INTEGER[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit agree, of each tensor that a packed one is made of."""
    return all(
        x.dtype == y.dtype and torch.equal(bits(x), bits(y))
        for x, y in zip(inner(a), inner(b), strict=True)
    )


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what `state_dict` holds beside adapters, in order."""
    return {
        key: value.detach().clone()
        for key, value in model.state_dict().items()
        if ".adapter." not in key
    }


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Keys, their order, and all bits."""
    assert list(a) == list(b)
    assert [key for key in a if not same_bits(a[key], b[key])] == []


def run(model: nn.Module, setting: Setting, seed: int = 1) -> Tensor:
    """The output for the setting's input, without gradients."""
    with torch.no_grad():
        return model(setting.case.x(setting.dtype, seed))


def loss(model: nn.Module, setting: Setting, seed: int = 1) -> Tensor:
    """A scalar in which every output has a weight of its own."""
    y = model(setting.case.x(setting.dtype, seed))
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return (y * weights).sum() + (y * y).sum() / 7


def train(model: nn.Module, setting: Setting, steps: int = 2, **options: object) -> None:
    """A few steps of AdamW with weight decay over all that requires gradients."""
    held = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=0.05, weight_decay=0.1, **options)  # type: ignore[arg-type]
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, setting, step).backward()
        optimizer.step()
    model.eval()
