"""Law 10: what would go wrong in silence raises one error that lists all problems and the fix, and
changes nothing."""

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw
from deltaw.errors import (
    ConfigError,
    DeltawError,
    FormatError,
    MergeError,
    StateError,
    TargetError,
)
from laws.building import adapt, adapted, assert_same_state, base, fill, parts, source
from laws.cases import Case, Stack
from laws.product import Setting, setting
from laws.running import over_cases

Config = deltaw.LoraConfig


def refused(
    model: nn.Module, error: type[DeltawError], act: Callable[[], object], *fragments: str
) -> str:
    """The message, which has every fragment; the model is what it was."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    classes = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(error) as caught:
        act()
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert_same_state(dict(model.state_dict()), state)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: type(m) for n, m in model.named_modules()} == classes
    return message


class Odd(nn.Module):
    """What cannot be adapted, beside what can."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.sparse = nn.Embedding(5, 4, sparse=True)
        self.hidden = nn.Linear(4, 4)
        self.hidden.forward = lambda x: x
        self.taken = nn.Linear(4, 4)
        self.taken.adapter = nn.Identity()


TARGETS: dict[str, tuple[Config, tuple[str, ...]]] = {
    "nothing matches": (
        Config(target_modules=["goood", "norn"], rank_pattern={"nowhere": 3}),
        ("'goood'", "nearest: good", "'norn'", "nearest: norm", "'nowhere'"),
    ),
    "regular expression": (Config(target_modules=r".*\.goods"), (r".*\\.goods",)),
    "exclude": (
        Config(target_modules=["good"], exclude_modules=["norm"]),
        ("'norm' (among the targets)",),
    ),
    "heads": (Config(target_modules=["good"], modules_to_save=["hed"]), ("modules_to_save 'hed'",)),
    "layers": (
        Config(target_modules=["good"], layers_to_transform=[7]),
        ("layers_to_transform 7",),
    ),
    "slices": (
        Config(target_modules=["good"], enable_lora={"god": [True, False]}),
        ("enable_lora 'god'", "nearest: good"),
    ),
    "types": (
        Config(target_modules=["norm", "bilinear", "good"]),
        ("norm: LayerNorm", "bilinear: Bilinear", "nn.Linear", "nn.Embedding", "nn.Conv1d/2d/3d"),
    ),
    "fast paths": (
        Config(target_modules=["out_proj"]),
        (
            "attention.out_proj: Multi",
            "encoder.self_attn.out_proj: Multi",
            "name the attention itself, encoder.self_attn",
        ),
    ),
    "slots of attention": (
        Config(target_modules=["attention"], enable_lora=[True, False, True]),
        ("attention: enable_lora marks q, k, v and out here, not 3 slices",),
    ),
    "sparse": (Config(target_modules=["sparse"]), ("sparse: sparse=True",)),
    "indivisible": (
        Config(target_modules=["good"], enable_lora={"good": [True, True, False]}),
        ("output of 4 does not divide into 3",),
    ),
    "hidden forward": (Config(target_modules=["hidden"]), ("hidden: an instance-level `forward`",)),
    "taken name": (Config(target_modules=["taken"]), ("taken: Linear has its own adapter",)),
    "bias of an embedding": (
        Config(target_modules=["sparse"], lora_bias=True),
        ("sparse: lora_bias", "sparse: sparse=True"),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    config, fragments = TARGETS[name]
    model = Odd()
    refused(model, TargetError, lambda: deltaw.attach(model, config), *fragments, "Fix: ")


SETTINGS: dict[str, tuple[dict[str, object], int]] = {
    "numbers": ({"r": 0, "lora_alpha": -1, "lora_dropout": 1.0}, 3),
    "not numbers": ({"r": 2.5, "lora_alpha": math.nan, "lora_dropout": math.nan}, 3),
    "names": ({"bias": "some", "modules_to_save": "head"}, 2),
    "patterns": ({"rank_pattern": {"a": 0}, "alpha_pattern": {"b": math.inf}}, 2),
    "slices": ({"enable_lora": {"a": [], "b": [False], "c": [1, 0]}}, 3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_all_listed(name: str) -> None:
    values, count = SETTINGS[name]
    with pytest.raises(ConfigError) as caught:
        Config(**values)
    assert str(caught.value).count("\n  - ") == count


def misfits_are_all_listed(setting: Setting) -> None:
    """Every tensor that does not fit, every path that is not there."""
    model = base(setting)
    state = deltaw.capture(fill(adapt(base(setting), setting)))
    layer = state.layers["layer"]
    wrong = {k: torch.cat((t, t[:1])) for k, t in layer.tensors.items()}
    layers = {
        "layer": deltaw.LayerState(
            layer.kind, wrong, layer.scale, layer.enabled, layer.groups, layer.factored
        ),
        "lair": layer,
        "shift": deltaw.LayerState("module", {"nothing.trained": torch.ones(1)}),
    }
    message = refused(
        model,
        FormatError,
        lambda: deltaw.attach(model, deltaw.State(state.config, layers)),
        "lair: there is no such module (nearest: layer",
        "shift: the module has no nothing",
        "Fix: ",
    )
    assert re.search(r"- layer.*: the file has \(.*\), the model needs \(", message)


@over_cases()
def test_misfits(case) -> None:
    misfits_are_all_listed(Setting(case))


def saved_stack(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """An adapter's folder, damaged."""
    model = Stack()
    deltaw.attach(model, Config(r=3, target_modules=["up", "fused", "gpt2"]))
    deltaw.save(model, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


PREFIX = "base_model.model."


def misfit(tensors: dict[str, Tensor]) -> None:
    """Two shapes that do not fit, and a layer that is not there."""
    tensors[PREFIX + "gpt2.lora_A.weight"] = torch.ones(3, 9)
    tensors[PREFIX + "up.lora_B.weight"] = torch.ones(11, 3)
    tensors[PREFIX + "stranger.lora_A.weight"] = torch.ones(3, 4)
    tensors[PREFIX + "stranger.lora_B.weight"] = torch.ones(4, 3)


def lose(tensors: dict[str, Tensor]) -> None:
    """Two keys missing."""
    del tensors[PREFIX + "fused.lora_B.weight"], tensors[PREFIX + "up.lora_A.weight"]


DAMAGE = {"misfit": (misfit, ("gpt2", "up", "stranger")), "missing": (lose, ("fused", "up"))}


def damaged_files_are_refused(name: str, folder: Path) -> None:
    """All that is wrong in one message; the model stays plain."""
    damage, fragments = DAMAGE[name]
    saved_stack(folder, damage)
    plain = Stack()
    refused(plain, FormatError, lambda: deltaw.load(plain, folder), *fragments)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file(name: str, tmp_path: Path) -> None:
    damaged_files_are_refused(name, tmp_path)


def test_a_file_damaged_in_both_ways(tmp_path: Path) -> None:
    saved_stack(
        tmp_path, lambda tensors: (lose(tensors), tensors.pop(PREFIX + "gpt2.lora_B.weight"))
    )
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    misfit(tensors)
    save_file(tensors, file)
    plain = Stack()
    refused(plain, FormatError, lambda: deltaw.load(plain, tmp_path), "fused", "gpt2", "stranger")


def another_base_is_refused(folder: Path) -> None:
    """Equal shapes, other bits; unless asked."""
    s = setting("linear")
    deltaw.save(adapted(s), folder)
    model = base(s, seed=1)
    refused(model, FormatError, lambda: deltaw.load(model, folder), "other weights", "Fix: ")
    with torch.no_grad():
        same = base(s)
        same.layer.weight.copy_(same.layer.weight.flip(0))
    refused(same, FormatError, lambda: deltaw.load(same, folder), "other weights")
    deltaw.load(model, folder, check_base=False)


def test_another_base(tmp_path: Path) -> None:
    another_base_is_refused(tmp_path)


def values_are_checked(value: float) -> None:
    """NaN or Inf in ΔW: not merged and not written, every layer named."""
    model = Stack().eval()
    deltaw.attach(model, Config(target_modules=["up", "fused", "gpt2"]))
    fill(model)
    with torch.no_grad():
        for name in ("up", "gpt2"):
            model.get_submodule(name).adapter["default"]["weight"].lora_B[0, 0] = value
    message = refused(
        model, MergeError, lambda: deltaw.merge(model), "up.weight", "gpt2.weight", "NaN or Inf"
    )
    assert "fused" not in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values(value: float, tmp_path: Path) -> None:
    values_are_checked(value)
    model = adapted(setting("linear"))
    with torch.no_grad():
        next(parts(model)).lora_A[0, 0] = value
    refused(model, FormatError, lambda: deltaw.save(model, tmp_path / "a"), "layer")
    assert not (tmp_path / "a").exists()


def test_overflow_in_half_precision() -> None:
    s = setting("linear", dtype=torch.float16)
    model = adapted(s)
    with torch.no_grad():
        next(parts(model)).lora_B.fill_(3e5)
        next(parts(model)).lora_A.fill_(1.0)
    refused(model, MergeError, lambda: deltaw.merge(model), "layer.weight", "Inf")


class Tied(nn.Module):
    """Two tied pairs and a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.first, self.second, self.plain = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.plain(self.second(self.first(self.embed(x)))))


def tied_weights_are_refused() -> None:
    """All of them, each with what it is tied to."""
    model = Tied()
    deltaw.attach(model, Config(target_modules=["out", "second", "plain"]))
    fill(model)
    message = refused(
        model,
        MergeError,
        lambda: deltaw.merge(model),
        "out.weight is tied to embed.weight",
        "second.weight is tied to first.weight",
        "untie=True",
    )
    assert "plain" not in message


def test_tied_weights() -> None:
    tied_weights_are_refused()


@over_cases(lambda case: not case.mergeable and case.form != "module")
def test_unmergeable(case) -> None:
    model = adapted(Setting(case))
    refused(model, MergeError, lambda: deltaw.merge(model), "layer")


def test_a_bias_without_a_place_is_refused() -> None:
    model = adapted(setting("linear-without-bias", lora_bias=True))
    refused(model, MergeError, lambda: deltaw.merge(model), "no bias to hold", "lora_bias=False")


MERGED: dict[str, Callable[[nn.Module, Path], object]] = {
    "merge": lambda m, p: deltaw.merge(m),
    "attach": lambda m, p: deltaw.attach(m, Config(target_modules=["layer"]), "two"),
    "load": lambda m, p: deltaw.load(m, p, "two"),
    "swap": lambda m, p: deltaw.load(m, p, "default", swap=True),
    "activate": lambda m, p: deltaw.activate(m, "default"),
    "disabled": lambda m, p: deltaw.disabled(m).__enter__(),
    "detach": lambda m, p: deltaw.detach(m),
    "verify": lambda m, p: deltaw.verify(m, torch.ones(2, 5)),
    "load_state_dict": lambda m, p: m.load_state_dict(m.state_dict()),
}


@pytest.mark.parametrize("name", MERGED)
def test_at_the_wrong_moment(name: str, tmp_path: Path) -> None:
    model = adapted(setting("linear"))
    deltaw.save(model, tmp_path)
    deltaw.merge(model)
    refused(model, StateError, lambda: MERGED[name](model, tmp_path), "merged", "unmerge")


def test_names_and_moments() -> None:
    s = setting("linear")
    model = base(s)
    for verb in (deltaw.merge, deltaw.unmerge, lambda m: deltaw.activate(m, "x"), deltaw.detach):
        refused(model, StateError, lambda verb=verb: verb(model))
    refused(model, ConfigError, lambda: deltaw.attach(model, source(s, model), "a/b"), "'a/b'")
    adapt(model, s)
    refused(model, StateError, lambda: adapt(model, s), "already", "Fix: ")
    refused(
        model,
        StateError,
        lambda: deltaw.activate(model, {"one": 1.0, "two": 1.0, "default": math.nan}),
        "'one'",
        "'two'",
        "nan",
        "default",
    )
    refused(model, StateError, lambda: deltaw.detach(model, "other"), "'other'", "default")
    refused(model, StateError, lambda: deltaw.capture(model, "other"), "'other'", "default")
    parallel = nn.DataParallel(base(s))
    refused(parallel, StateError, lambda: adapt(parallel, s), "DistributedDataParallel")


class PastForward(nn.Module):
    """Reads a weight past the layer's forward, always or without gradients."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.used = nn.Linear(5, 5)
        self.hidden = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.used(x))
        if self.always or not torch.is_grad_enabled():
            return nn.functional.linear(x, self.hidden.weight, self.hidden.bias)
        return self.hidden(x)


def verify_finds_what_hides(always: bool) -> None:
    """By name, and restores everything."""
    model = PastForward(always)
    deltaw.attach(model, Config(r=2, target_modules=["used", "hidden", "unused"]))
    message = refused(
        model, StateError, lambda: deltaw.verify(model, torch.randn(3, 5)), "hidden", "unused"
    )
    assert not re.search(r"- used", message)


@pytest.mark.parametrize("always", [True, False])
def test_verify(always: bool) -> None:
    verify_finds_what_hides(always)


def test_encoders_are_verified() -> None:
    """torch reads their weights past every forward, unless an adapter is in force."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    for targets in (["linear1", "linear2"], ["self_attn"]):
        deltaw.attach(model, Config(r=2, target_modules=targets))
        deltaw.verify(model, torch.randn(2, 3, 4))
        deltaw.detach(model)


@over_cases()
def test_verify_passes(case) -> None:
    s = Setting(case, head=case.form == "config")
    model = adapt(base(s), s)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    deltaw.verify(model, case.x(s.dtype))
    assert_same_state(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_an_optimizer_built_before_attach() -> None:
    s = setting("linear")
    model = base(s)
    optimizer = torch.optim.AdamW(model.parameters())
    adapt(model, s)
    x = s.case.x(s.dtype)
    refused(
        model, StateError, lambda: deltaw.verify(model, x, optimizer=optimizer), "before attach"
    )
    model(x).sum().backward()
    refused(model, StateError, optimizer.step, "Fix: build it after")


UNMERGEABLE = ("embedding-max-norm", "linear-without-bias")


@over_cases(lambda case: case.form == "config" and case.name not in UNMERGEABLE)
def test_training_with_merged_weights(case: Case) -> None:
    """Refused before anything is computed; predicting, and training after unmerging, is not."""
    s = Setting(case)
    model, x = adapted(s).train(), case.x(s.dtype)
    deltaw.merge(model)
    refused(model, StateError, lambda: model(x), "default is merged", "unmerge", "model.eval()")
    with torch.no_grad():
        model(x)
    model.eval()(x)
    deltaw.unmerge(model)
    model.train()(x).sum().backward()


@over_cases(lambda case: case.name in ("linear", "conv2d", "gpt2", "fused-101"))
def test_tensors_that_do_not_go_together(case: Case) -> None:
    """The layer, the input and what differs are named, with rows of their own too."""
    s = Setting(case)
    model, x = adapted(s), case.x(torch.float32)[:2]
    for rows in (contextlib.nullcontext, lambda: deltaw.rows(model, ["default", None])):
        with rows():
            for trained in (True, False):
                with torch.set_grad_enabled(trained):
                    refused(
                        model, StateError, lambda: model(x.double()), "float64", "weight is", "Fix"
                    )
                    if case.name != "conv2d":  # torch itself convolves what lies on meta
                        refused(
                            model,
                            StateError,
                            lambda: model(x.to("meta")),
                            "float32 on meta",
                            "weight lies on cpu",
                            "lora_A lies on cpu",
                        )
            model(x)
