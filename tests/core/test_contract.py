"""What the package promises about its own shape."""

from pathlib import Path

import torch
from core.models import Tower
from torch import nn

import deltaw
from deltaw.layer import AdaptedLayer
from deltaw.layers import geometries
from deltaw.root import AdaptedModel
from deltaw.swap import Swapped

SUPPORTED = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
    nn.BatchNorm1d,
    nn.LayerNorm,
)


def brought(mixin: type) -> set[str]:
    kinds = [k for k in mixin.__mro__ if issubclass(k, Swapped)]
    own = {name for kind in kinds for name in (*vars(kind), *vars(kind).get("__annotations__", ()))}
    return {name for name in own if not name.startswith("__")}


def test_no_name_of_ours_is_one_of_torchs() -> None:
    """A few hooks are overridden on purpose; nothing else of a layer's class is hidden."""
    meant = {"forward", "_apply", "_replicate_for_data_parallel"}
    meant |= {"_load_from_state_dict", "_save_to_state_dict"}
    for mixin in (*geometries(), AdaptedLayer, AdaptedModel):
        for kind in SUPPORTED:
            assert brought(mixin) & set(dir(kind)) <= meant, mixin


def test_every_public_name_can_be_had_and_no_submodule_shadows_it() -> None:
    folder = Path(deltaw.__file__).parent
    below = {path.stem for path in folder.iterdir()}
    assert not below & set(deltaw.__all__)
    for name in deltaw.__all__:
        value = getattr(deltaw, name)
        assert name == "__version__" or callable(value), name


def test_adapters_add_no_attribute_to_the_state_dict_but_their_tensors() -> None:
    model = Tower()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    added = {key.rsplit(".", 1)[1] for key in model.state_dict() if ".adapter." in key}
    assert added == {"lora_A", "lora_B", "lora_B_bias"}


def test_printing_shows_rank_and_scale() -> None:
    model = Tower()
    deltaw.attach(model, deltaw.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    assert "LoraAdapter(r=2, scale=1.5)" in str(model)


def test_apply_and_hooks_still_work() -> None:
    model = Tower()
    deltaw.attach(model, deltaw.LoraConfig(r=2, target_modules=["q_proj"]))
    seen: list[str] = []
    model.apply(lambda module: seen.append(type(module).__name__))
    assert "LoraAdapter" in seen and "Linear" in seen
    handle = model.layers[0].attn.q_proj.register_forward_hook(lambda *_: seen.append("hook"))
    model(torch.tensor([[1]]))
    handle.remove()
    assert seen[-1] == "hook"
