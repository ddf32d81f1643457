"""Law 5: saved and loaded, deep-copied, pickled and torch-saved models give the same output."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.formats import loralib, names
from deltaw.storage import inner
from laws.building import (
    adapt,
    adapted,
    assert_same_state,
    base,
    base_state,
    fill,
    parts,
    run,
    same_bits,
    train,
)
from laws.cases import Stack
from laws.product import Setting, setting
from laws.running import over_cases, over_pairs, whole_product


def format_for(setting: Setting) -> str:
    """loralib's convolutions have a form in loralib's file alone."""
    return "loralib" if setting.case.form == "factored" else "peft"


def sorted_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict by key: a file does not know the order in which slots were attached."""
    return dict(sorted(model.state_dict().items()))


def saving_keeps_the_output(setting: Setting, folder: Path) -> None:
    """Through a file onto a fresh base, with every tensor's bits."""
    model = adapted(setting)
    format_ = format_for(setting)
    file = folder / ("adapter.pt" if format_ == "loralib" else "adapter")
    deltaw.save(model, file, format=format_)
    other = base(setting)
    before = base_state(other)
    if format_ == "loralib":
        r = setting.rank[0]  # the file says neither this nor the scale
        state = loralib.read(file, lora_alpha=setting.scale * r, r=r)
        deltaw.attach(other, state, trainable=False)
    else:
        deltaw.load(other, file)
    assert_same_state(base_state(other), before)
    assert same_bits(run(other, setting), run(model, setting))
    assert not any(p.requires_grad for p in other.parameters())
    if format_ == "peft":  # to be trained on, also a start that is subtracted comes back
        other = base(setting)
        deltaw.load(other, file, trainable=True)
        assert same_bits(run(other, setting), run(model, setting))
    assert_same_state(sorted_state(other), sorted_state(model))


def copies_keep_the_output(setting: Setting) -> None:
    """And share no tensor with the model they were made from."""
    model = adapted(setting)
    expected = run(model, setting)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved(model)):
        assert_same_state(dict(made.state_dict()), state)
        assert type(made.layer) is type(model.layer)
        assert same_bits(run(made, setting), expected)
        assert not places(made) & places(model)
        fill(made, seed=99)
        with deltaw.disabled(made):
            run(made, setting)
        deltaw.activate(made, None)
        assert same_bits(run(model, setting), expected)
        deltaw.activate(made, "default")
        assert not torch.equal(run(made, setting), expected)
    assert_same_state(dict(model.state_dict()), state)


def places(model: torch.nn.Module) -> set[int]:
    """Where the parameters lie in memory."""
    return {part.data_ptr() for p in model.parameters() for part in inner(p)}


def saved(model: torch.nn.Module) -> torch.nn.Module:
    """The model through `torch.save`."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def state_dict_restores(setting: Setting) -> None:
    """The whole state_dict of an adapted model loads into another with strict=True."""
    model = adapted(setting)
    other = fill(adapt(base(setting, seed=7), setting, seed=8), seed=9)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same_state(dict(other.state_dict()), dict(model.state_dict()))
    assert same_bits(run(other, setting), run(model, setting))


@over_pairs()
def test_saving(setting: Setting, tmp_path: Path) -> None:
    saving_keeps_the_output(setting, tmp_path)


@over_pairs()
def test_copies(setting: Setting) -> None:
    copies_keep_the_output(setting)


@over_cases(lambda case: case.reloads)
def test_state_dict(case) -> None:
    state_dict_restores(Setting(case, bias="all" if case.form == "config" else "none"))


@pytest.mark.slow
@over_cases()
def test_copies_everywhere(case, tmp_path: Path) -> None:
    whole_product(case, lambda s: saving_keeps_the_output(s, tmp_path / str(s)))
    whole_product(case, copies_keep_the_output)


def several_adapters_come_back(folder: Path) -> None:
    """Each under its own name, from its own folder."""
    s = setting("gpt2-fused-101", head=True)
    model = base(s)
    for seed, name in enumerate(("one", "two", "three")):
        fill(adapt(model, s, name, seed), name, seed)
    outputs = {}
    for name in ("one", "two", "three"):
        deltaw.activate(model, name)
        outputs[name] = run(model, s)
        deltaw.save(model, folder / name, name)
    other = base(s)
    for name in ("three", "one", "two"):
        deltaw.load(other, folder / name, name)
    for name, expected in outputs.items():
        deltaw.activate(other, name)
        assert same_bits(run(other, s), expected)
    assert not torch.equal(outputs["one"], outputs["two"])


def test_several_adapters(tmp_path: Path) -> None:
    several_adapters_come_back(tmp_path)


def test_a_stack_of_geometries(tmp_path: Path) -> None:
    model = stack()
    x = torch.randint(0, 11, (2, 5))
    deltaw.save(model, tmp_path)
    torch.manual_seed(0)
    other = Stack().eval()
    deltaw.load(other, tmp_path)
    assert same_bits(other(x), model(x))


def stack() -> Stack:
    """All kinds of layers, adapted with ranks of their own."""
    torch.manual_seed(0)
    model = Stack().eval()
    settings = deltaw.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["embed", "up", "fused", "mixing", "gpt2"],
        enable_lora={"fused": [False, True, True]},
        rank_pattern={"up": 2},
        alpha_pattern={"gpt2": 7},
        modules_to_save=["head"],
        bias="all",
    )
    deltaw.attach(model, settings)
    return fill(model)


def test_a_copy_trains_alone() -> None:
    s = setting("linear", head=True, bias="all")
    model = adapted(s)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    made = copy.deepcopy(model)
    train(made, s)
    assert_same_state(dict(model.state_dict()), state)
    assert not all(
        same_bits(p, q)
        for a, b in zip(parts(made), parts(model), strict=True)
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


def test_a_merged_model_is_copied_merged() -> None:
    s = setting("conv2d-groups", dtype=torch.bfloat16)
    model = adapted(s)
    before = base_state(model)
    deltaw.merge(model)
    merged = run(model, s)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(run(made, s), merged)
        deltaw.unmerge(made)
        assert_same_state(base_state(made), before)
    assert same_bits(run(model, s), merged)


def test_every_format_is_known() -> None:
    """A format added to the folder needs a line in `format_for`."""
    assert set(names()) == {"peft", "loralib"}
