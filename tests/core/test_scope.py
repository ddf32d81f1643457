"""Verbs work on the model that was given to `attach`, wrapped or not, and on nothing less."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from core.models import TOKENS, Tower, shake
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import deltaw
from deltaw import LoraConfig
from deltaw.errors import ConfigError, FormatError, MergeError, StateError, TargetError
from deltaw.walking import bare

CONFIG = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"])


class Wrapper(nn.Module):
    """A model inside another module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Run the model."""
        return self.model(x)


def compiled(model: nn.Module) -> nn.Module:
    """Compile with a backend that imports nothing more."""
    return torch.compile(model, backend="eager")


def test_a_part_of_the_adapted_model_is_refused() -> None:
    model = Tower().eval()
    deltaw.attach(model, CONFIG)
    part = model.layers[0]
    calls = [
        lambda: deltaw.merge(part),
        lambda: deltaw.detach(part),
        lambda: deltaw.capture(part),
        lambda: deltaw.activate(part, None),
        lambda: deltaw.attach(part, CONFIG, "b"),
    ]
    for call in calls:
        with pytest.raises(StateError, match="only a part of the model"):
            call()


def test_parts_attached_on_their_own_are_not_one_model() -> None:
    model = Tower().eval()
    deltaw.attach(model.layers[0], CONFIG)
    with pytest.raises(StateError, match="A part of this Tower has adapters of its own"):
        deltaw.attach(model, CONFIG)
    deltaw.merge(model)
    deltaw.unmerge(model)
    deltaw.attach(model.layers[1], CONFIG)
    with pytest.raises(StateError, match="holds 2 models"):
        deltaw.merge(model)


def test_a_part_attached_later_is_noticed() -> None:
    model = Tower().eval()
    deltaw.attach(model, LoraConfig(r=2, target_modules=["head"]))
    deltaw.attach(model.layers[1], CONFIG)
    for call in (deltaw.merge, deltaw.capture, deltaw.detach):
        with pytest.raises(StateError, match="attached to on their own"):
            call(model)


@pytest.mark.parametrize("wrap", [Wrapper, nn.DataParallel, compiled])
def test_a_wrapped_model_is_the_model(wrap, tmp_path: Path) -> None:
    model = Tower().eval()
    deltaw.attach(model, CONFIG)
    shake(model)
    wrapped = wrap(model)
    deltaw.save(wrapped, tmp_path)
    assert list(deltaw.capture(wrapped).layers) == list(deltaw.capture(model).layers)
    fresh = Tower().eval()
    deltaw.load(fresh, tmp_path)
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_a_weight_tied_outside_the_adapted_part_is_not_changed() -> None:
    part = Tower().eval()
    whole = Wrapper(part)
    whole.out = nn.Linear(10, 13, bias=False)
    whole.out.weight = part.embed.weight
    deltaw.attach(part, LoraConfig(r=2, target_modules=["embed"]))
    shake(part)
    before = whole.out.weight.clone()
    with pytest.raises(MergeError, match=r"- embed\.weight is tied to out\.weight"):
        deltaw.merge(whole)
    deltaw.merge(whole, untie=True)
    assert torch.equal(whole.out.weight, before) and whole.out.weight is not part.embed.weight
    whole.out.weight = part.embed.weight
    deltaw.unmerge(whole)
    assert whole.out.weight is part.embed.weight and torch.equal(whole.out.weight, before)


def test_attach_comes_before_compile() -> None:
    with pytest.raises(StateError, match="Cannot attach to a compiled or checkpointed"):
        deltaw.attach(compiled(Tower()), CONFIG)


def checkpointed(block: nn.Module) -> nn.Module:
    return checkpoint_wrapper(block)


@pytest.mark.parametrize("wrap", [compiled, checkpointed])
def test_wrapped_blocks_have_the_names_of_plain_ones(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    """Attached before or after the wrapping, the file is that of the plain model."""
    torch._dynamo.reset()
    config = replace(CONFIG, bias="lora_only", rank_pattern={r"^layers\.1\.attn\.q_proj": 3})
    plain, before, after = (Tower().eval() for _ in range(3))
    names = sorted(name for name, _ in trainable(after))
    deltaw.attach(plain, config)
    shake(plain)
    deltaw.save(plain, tmp_path / "plain")
    deltaw.load(before, tmp_path / "plain", trainable=True)
    for model in (before, after):
        for i, block in enumerate(model.layers[:2]):
            model.layers[i] = wrap(block)
    with pytest.raises(FormatError, match="other weights"):
        deltaw.load(Tower(seed=1), tmp_path / "plain")
    deltaw.load(after, tmp_path / "plain", trainable=True)
    for number, model in enumerate((before, after)):
        with torch.no_grad():
            assert torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-6)
        deltaw.save(model, tmp_path / str(number))
        for file in (tmp_path / "plain").iterdir():
            assert (tmp_path / str(number) / file.name).read_bytes() == file.read_bytes()
        model.load_state_dict(model.state_dict())
        deltaw.detach(model)
        found = [bare(name) for name, _ in trainable(model)]
        assert sorted(found) == names


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_slices_and_the_whole_merge_together() -> None:
    model = nn.Sequential(nn.Linear(7, 12)).eval()
    base = model[0].weight.clone()
    deltaw.attach(model, LoraConfig(r=2, enable_lora=[True, False, True]), "thirds")
    deltaw.attach(model, LoraConfig(r=2, enable_lora=[False, True]), "halves")
    deltaw.attach(model, LoraConfig(r=2), "whole")
    shake(model)
    deltaw.activate(model, {"thirds": 1.0, "halves": -0.5, "whole": 2.0})
    x = torch.randn(5, 7)
    output = model(x)
    with deltaw.merged(model):
        assert torch.allclose(model(x), output, atol=1e-5)
    assert torch.equal(model[0].weight, base)


def test_a_delta_and_a_full_copy_of_one_weight_merge_together() -> None:
    model = nn.Sequential(nn.Linear(7, 5)).eval()
    deltaw.attach(model, LoraConfig(r=2, target_modules=["0"]), "delta")
    deltaw.attach(model, LoraConfig(target_modules=[], modules_to_save=["0"]), "copy")
    shake(model)
    x = torch.randn(3, 7)
    for weights in ({"delta": 1.0, "copy": 1.0}, {"delta": 0.5, "copy": 0.25}):
        deltaw.activate(model, weights)
        output = model(x)
        with deltaw.merged(model):
            assert torch.allclose(model(x), output, atol=1e-5)


def test_after_a_final_merge_all_goes_or_nothing() -> None:
    model = Tower().eval()
    deltaw.attach(model, CONFIG, "a")
    deltaw.attach(model, CONFIG, "b")
    shake(model)
    output = model(TOKENS)
    deltaw.merge(model, original="none")
    with pytest.raises(StateError, match="detach one adapter alone"):
        deltaw.detach(model, "b")
    deltaw.detach(model)
    assert torch.allclose(model(TOKENS), output, atol=1e-5)


def test_originals_with_names_that_end_alike_come_back_to_their_own_place(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    before = {name: p.clone() for name, p in model.named_parameters()}
    deltaw.attach(model, LoraConfig(r=2))
    shake(model)
    deltaw.merge(model, original="file", path=tmp_path / "kept.safetensors")
    deltaw.unmerge(model)
    deltaw.detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_file_of_originals_that_changed_is_noticed(tmp_path: Path) -> None:
    model = Tower()
    deltaw.attach(model, CONFIG)
    shake(model)
    file = tmp_path / "kept.safetensors"
    deltaw.merge(model, original="file", path=file)
    from safetensors.torch import load_file, save_file

    save_file({name: t + 1 for name, t in load_file(file).items()}, file)
    with pytest.raises(MergeError, match="no longer holds the original"):
        deltaw.unmerge(model)


def test_the_root_too_may_read_past_a_forward() -> None:
    with pytest.raises(TargetError, match="past its forward; name the attention itself, whose"):
        deltaw.attach(nn.MultiheadAttention(8, 2), LoraConfig(r=2, target_modules=["out_proj"]))


class Rectified(nn.Linear):
    """A linear layer that is not one."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified output."""
        return torch.relu(super().forward(x))


class Named(nn.Linear):
    """A linear layer that says that it is one."""

    applies_weight = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        return super().forward(x)


def test_subclasses_with_their_own_forward_are_refused_unless_vouched_for() -> None:
    model = nn.Sequential(Rectified(4, 4), Named(4, 4), nn.Linear(4, 4))
    plan = deltaw.plan(model, LoraConfig(r=2))
    assert [t.path for t in plan.targets] == ["1", "2"] and "override forward: 0" in str(plan)
    with pytest.raises(TargetError, match="Rectified overrides forward"):
        deltaw.attach(model, LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrisation"),
        (nn.LazyConv2d(4, 3), "not known before"),
    ],
)
def test_layers_without_a_weight_say_why(layer: nn.Module, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        deltaw.plan(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))


def test_an_idle_adapter_counts_as_nothing_even_with_nan() -> None:
    model = Tower().eval()
    deltaw.attach(model, CONFIG, "a")
    deltaw.attach(model, CONFIG, "b")
    shake(model)
    with torch.no_grad():
        model.layers[0].attn.q_proj.adapter["b"]["weight"].lora_B.fill_(float("nan"))
    fast = torch.compile(model, backend="eager", fullgraph=True)
    deltaw.activate(model, {"a": 1.0, "b": 0.0})
    with torch.no_grad():
        assert torch.allclose(fast(TOKENS), model(TOKENS), atol=1e-6)
    with deltaw.merged(model):
        assert torch.isfinite(model(TOKENS)).all()


def test_half_an_adapter_does_not_load_strictly() -> None:
    model = Tower()
    deltaw.attach(model, CONFIG)
    state = model.state_dict()
    part = {k: v for k, v in state.items() if "layers.1.attn.q_proj.adapter" not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*layers.1.attn.q_proj.adapter.default"):
        model.load_state_dict(part)
    model.load_state_dict({k: v for k, v in state.items() if ".adapter." not in k})


def test_a_copy_made_while_disabled_is_not_disabled() -> None:
    model = Tower().eval()
    deltaw.attach(model, CONFIG)
    shake(model)
    output = model(TOKENS)
    with deltaw.disabled(model):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), output)


@pytest.mark.parametrize("name", ["training", "_modules", "keys"])
def test_a_name_of_torchs_changes_nothing(name: str) -> None:
    model = Tower()
    with pytest.raises(ConfigError):
        deltaw.attach(model, CONFIG, name)
    assert type(model) is Tower and all(p.requires_grad for p in model.parameters())


def test_a_root_with_its_own_authority_is_refused() -> None:
    model = Tower()
    model.authority = "mine"
    with pytest.raises(StateError, match="own `authority`"):
        deltaw.attach(model, CONFIG)
    assert model.authority == "mine" and type(model.layers[0].attn.q_proj) is nn.Linear


def test_contexts_of_construction_change_nothing() -> None:
    states = []
    for context in ("plain", "bfloat16", "inference"):
        model = Tower().eval()
        generator = torch.Generator().manual_seed(3)
        if context == "bfloat16":
            torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.inference_mode(context == "inference"):
                deltaw.attach(model, CONFIG, generator=generator)
        finally:
            torch.set_default_dtype(torch.float32)
        deltaw.activate(model, None)
        deltaw.activate(model, "default")
        deltaw.verify(model, TOKENS)
        with deltaw.merged(model):
            pass
        states.append(deltaw.capture(model).layers["layers.0.attn.q_proj"].tensors)
    for state in states[1:]:
        assert torch.equal(state["weight.lora_A"], states[0]["weight.lora_A"])


@pytest.mark.parametrize("which", [["a"], {"default": "x"}, 3, {"default": None}])
def test_activating_nonsense_says_so(which: object) -> None:
    model = Tower()
    deltaw.attach(model, CONFIG)
    with pytest.raises(StateError, match="Cannot activate"):
        deltaw.activate(model, which)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": 5},
        {"target_modules": [1]},
        {"rank_pattern": [1]},
        {"use_rslora": "yes"},
        {"layers_to_transform": ["1"]},
    ],
)
def test_settings_of_a_wrong_type_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LoraConfig(**settings)


def test_one_module_under_two_paths_is_not_tied_to_itself() -> None:
    model = Tower().eval()
    model.again = model.head
    flat = torch.randn(60)
    model.layers[0].attn.q_proj.weight.data = flat[:60].view(6, 10)
    deltaw.attach(model, LoraConfig(r=2, target_modules=["head", "q_proj"]))
    shake(model)
    deltaw.merge(model)


def test_views_of_one_buffer_are_tied_only_where_they_overlap() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    flat = torch.randn(18)
    for index, layer in enumerate(model):
        layer.weight.data = flat[9 * index : 9 * index + 9].view(3, 3)
    deltaw.attach(model, LoraConfig(r=2))
    shake(model)
    with deltaw.merged(model):
        pass


def test_a_table_that_renormalises_its_rows_is_no_other_base(tmp_path: Path) -> None:
    def base(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(7, 5, max_norm=0.5), nn.Linear(5, 2)).eval()

    model = base(0)
    deltaw.attach(model, LoraConfig(r=2, target_modules=["0", "1"]))
    shake(model)
    x = torch.arange(7)
    output = model(x)
    deltaw.save(model, tmp_path)
    fresh = base(0)
    deltaw.load(fresh, tmp_path)
    assert torch.allclose(fresh(x), output)
    with pytest.raises(FormatError, match="other weights"):
        deltaw.load(base(1), tmp_path)


def test_a_name_that_an_adapter_would_hide_says_how_to_go_on() -> None:
    class Head(nn.Module):
        def __init__(self, first: str) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.add_module(first, nn.Linear(5, 3))

    def model(first: str) -> nn.Module:
        return nn.ModuleDict({"up": nn.Linear(5, 5), "head": Head(first)})

    config = LoraConfig(target_modules=["up"], modules_to_save=["head"])
    hidden = model("dense")
    with pytest.raises(TargetError, match=r"head: Head has its own dense.*\nFix: rename"):
        deltaw.attach(hidden, config)
    assert not deltaw.configs(hidden) and type(hidden["head"]) is Head
    deltaw.attach(model("project"), config)
    deltaw.attach(hidden, replace(config, modules_to_save=[]))


def test_a_forward_that_hides_a_layer_stops_detach_before_anything_is_gone() -> None:
    model = Tower().eval()
    deltaw.attach(model, CONFIG)
    deltaw.attach(model, replace(CONFIG, target_modules=["q_proj"]), "b")
    shake(model)
    layer = model.layers[2].attn.o_proj
    output, forward = model(TOKENS), layer.forward
    layer.forward = lambda x: forward(x)
    for name in ("default", None):
        with pytest.raises(TargetError, match="o_proj: an instance-level `forward`"):
            deltaw.detach(model, name)
        assert list(deltaw.configs(model)) == ["default", "b"]
        assert torch.equal(model(TOKENS), output)
    del layer.forward
    deltaw.detach(model)
    assert type(layer) is nn.Linear
