"""Merging is one rounding, refuses what it would corrupt, and is undone bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from core.models import TOKENS, Tower, shake
from safetensors.torch import save_file
from torch import nn

import deltaw
import deltaw.originals
from deltaw import LoraConfig
from deltaw.errors import ConfigError, DeltawError, MergeError, StateError

CONFIG = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "embed"], bias="all")


def adapted(dtype: torch.dtype = torch.float32) -> Tower:
    model = Tower().to(dtype).eval()
    deltaw.attach(model, CONFIG)
    shake(model)
    return model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if ".adapter." not in k}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("original", ["keep", "cpu", "file"])
def test_the_originals_come_back_from_every_place(original: str, tmp_path: Path) -> None:
    model = adapted()
    before, output = bits(model), model(TOKENS)
    path = tmp_path / "kept.safetensors" if original == "file" else None
    report = deltaw.merge(model, original=original, path=path)
    assert len(report.layers) == 3 * 7 + 2 and not report.rounding
    assert not same(bits(model), before)
    assert torch.allclose(model(TOKENS), output, atol=1e-5)
    deltaw.unmerge(model)
    assert same(bits(model), before) and torch.equal(model(TOKENS), output)


def test_the_bases_own_file_can_be_the_place(tmp_path: Path) -> None:
    model = adapted()
    before = bits(model)
    save_file({f"model.{k}": v for k, v in before.items()}, tmp_path / "model.safetensors")
    deltaw.merge(model, original="file", path=tmp_path)
    deltaw.unmerge(model)
    assert same(bits(model), before)
    changed = {f"model.{k}": v + (k == "embed.weight") for k, v in before.items()}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(MergeError, match=r"embed.weight in .* is not the weight"):
        deltaw.merge(model, original="file", path=tmp_path)
    assert same(bits(model), before)


def test_a_final_merge_leaves_a_plain_model() -> None:
    model = adapted()
    output = model(TOKENS)
    deltaw.merge(model, original="none")
    with pytest.raises(StateError, match="was final"):
        deltaw.unmerge(model)
    deltaw.detach(model)
    assert type(model) is Tower and torch.allclose(model(TOKENS), output, atol=1e-5)
    assert not any(".adapter." in key for key in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_report_what_rounding_takes(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    report = deltaw.merge(model)
    assert set(report.rounding) == {
        p for p in report.layers if (p != "head" and "proj" in p) or p == "embed"
    } - {p for p in report.layers if "k_proj" in p or "v_proj" in p}
    assert all(0 < lost < 0.05 for lost in report.rounding.values())
    assert "rounding takes up to" in str(report)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_nan_and_inf_are_named_and_nothing_changes(value: float) -> None:
    model = adapted(torch.float16)
    before = bits(model)
    with torch.no_grad():
        model.layers[1].attn.o_proj.adapter["default"]["weight"].lora_B[0, 0] = value
        model.layers[2].attn.q_proj.adapter["default"]["weight"].lora_A[0, 0] = value
    with pytest.raises(MergeError) as caught:
        deltaw.merge(model)
    for path in ("layers.1.attn.o_proj.weight", "layers.2.attn.q_proj.weight"):
        assert f"{path} would hold NaN or Inf" in str(caught.value)
    assert same(bits(model), before) and model(TOKENS) is not None
    deltaw.activate(model, None)


def tied_tower() -> Tower:
    """A model whose adapted embedding is also the weight of its head."""
    model = Tower().eval()
    model.out = nn.Linear(10, 13, bias=False)
    model.out.weight = model.embed.weight
    deltaw.attach(model, LoraConfig(r=2, target_modules=["embed"]))
    shake(model)
    return model


def test_a_tied_weight_is_refused_unless_untied() -> None:
    model = tied_tower()
    tied = model.embed.weight
    with pytest.raises(MergeError, match=r"embed.weight is tied to out.weight"):
        deltaw.merge(model)
    output, head = model(TOKENS), model.out.weight.clone()
    deltaw.merge(model, untie=True)
    assert torch.equal(model.out.weight, head) and model.embed.weight is not tied
    assert torch.allclose(model(TOKENS), output, atol=1e-5)
    deltaw.unmerge(model)
    assert model.embed.weight is tied and model.out.weight is tied


@pytest.mark.parametrize(
    ("original", "owner", "name"),
    [("cpu", torch.Tensor, "cpu"), ("file", deltaw.originals, "bits")],
    ids=["cpu", "file"],
)
def test_originals_that_cannot_all_go_to_their_place_stay(
    original: str, owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    before = bits(model)
    real, calls = getattr(owner, name), []

    def once(tensor: torch.Tensor) -> object:
        if calls:
            raise MemoryError
        calls.append(tensor)
        return real(tensor) if original == "file" else torch.zeros_like(tensor)

    monkeypatch.setattr(owner, name, once)
    with pytest.raises(MemoryError):
        deltaw.merge(model, original=original, path=tmp_path / "w" if original == "file" else None)
    monkeypatch.undo()
    assert calls and same(bits(model), before)
    assert deltaw.merge(model).layers


def test_what_is_tied_while_merged_gets_the_original_too() -> None:
    model = tied_tower()
    before = bits(model)
    deltaw.merge(model, untie=True)
    model.out.weight = model.embed.weight
    deltaw.unmerge(model)
    assert model.out.weight is model.embed.weight and same(bits(model), before)


def test_max_norm_runs_forward_and_refuses_merge() -> None:
    model = nn.Sequential(nn.Embedding(7, 5, max_norm=0.5))
    deltaw.attach(model, LoraConfig(r=2, target_modules=["0"]))
    shake(model)
    model(torch.tensor([1, 2]))
    with pytest.raises(MergeError, match="max_norm"):
        deltaw.merge(model)


def test_a_bias_on_b_needs_a_bias_to_merge_into() -> None:
    model = Tower()
    deltaw.attach(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"], lora_bias=True))
    shake(model)
    with pytest.raises(MergeError, match=r"layers.0.attn.q_proj.bias: the layer has no bias"):
        deltaw.merge(model)


def test_a_weight_changed_since_the_merge_is_not_lost() -> None:
    model = adapted()
    deltaw.merge(model)
    with torch.no_grad():
        model.layers[0].attn.q_proj._parameters["weight"][0, 0] += 1
    with pytest.raises(MergeError, match=r"layers.0.attn.q_proj.weight was changed since"):
        deltaw.unmerge(model)
    changed = bits(model)
    deltaw.detach(model)
    assert type(model) is Tower and same(bits(model), changed)


def test_a_merge_that_can_be_undone_is_not_detached() -> None:
    model = adapted()
    deltaw.merge(model)
    merged = bits(model)
    with pytest.raises(StateError, match=r"call deltaw\.unmerge.* first.*merge again"):
        deltaw.detach(model)
    deltaw.unmerge(model)
    deltaw.merge(model, original="none")
    deltaw.detach(model)
    assert same(bits(model), merged)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"nonsense")])
def test_originals_whose_file_is_gone_are_named_and_can_be_given_up(damage, tmp_path: Path) -> None:
    model = adapted()
    file = tmp_path / "kept.safetensors"
    deltaw.merge(model, original="file", path=file)
    content, merged = file.read_bytes(), bits(model)
    damage(file)
    with pytest.raises(MergeError, match=r"kept\.safetensors holds no originals.*\nFix") as caught:
        deltaw.unmerge(model)
    assert str(caught.value).count("\n  - ") == 1 and same(bits(model), merged)
    file.write_bytes(content)
    with pytest.raises(StateError, match="Cannot detach"):
        deltaw.detach(model)
    damage(file)
    deltaw.detach(model)
    assert type(model) is Tower and same(bits(model), merged)


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch) -> None:
    model = adapted()
    before = bits(model)
    monkeypatch.chdir(tmp_path)
    deltaw.merge(model, original="file", path="kept.safetensors")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    deltaw.unmerge(model)
    assert same(bits(model), before)


def test_a_file_of_another_kind_is_no_place_and_stays_as_it_is(tmp_path: Path) -> None:
    model = adapted()
    before = bits(model)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MergeError, match=r"notes\.txt holds no originals.*\nFix: name the file"):
        deltaw.merge(model, original="file", path=tmp_path / "notes.txt")
    assert same(bits(model), before) and (tmp_path / "notes.txt").read_text() == "mine"


def test_while_merged_the_adapters_cannot_change() -> None:
    model = adapted()
    deltaw.attach(model, LoraConfig(r=2, target_modules=["head"]), "b")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    deltaw.merge(model)
    calls = [
        lambda: deltaw.activate(model, "b"),
        lambda: deltaw.attach(model, CONFIG, "c"),
        lambda: deltaw.merge(model),
        lambda: deltaw.detach(model),
        lambda: deltaw.verify(model, TOKENS),
        lambda: model.load_state_dict(state),
    ]
    for call in calls:
        with pytest.raises(StateError, match="unmerge"):
            call()
    with pytest.raises(StateError, match="unmerge"), deltaw.disabled(model):
        pass
    deltaw.unmerge(model)


def test_eval_and_train_never_touch_weights() -> None:
    model = adapted()
    before = bits(model)
    model.train().eval().train()
    assert same(bits(model), before)


def test_nothing_active_is_nothing_to_merge() -> None:
    model = adapted()
    deltaw.activate(model, None)
    with pytest.raises(StateError, match="nothing to merge"):
        deltaw.merge(model)
    with pytest.raises(StateError, match="Nothing is merged"):
        deltaw.unmerge(model)


def test_a_failure_while_keeping_gives_everything_back(tmp_path: Path) -> None:
    model = adapted()
    before = bits(model)
    with pytest.raises(MergeError, match="cannot be written"):
        deltaw.merge(model, original="file", path=tmp_path / "no" / "such" / "folder")
    assert same(bits(model), before)
    deltaw.merge(model)


@pytest.mark.parametrize(
    ("original", "path"),
    [("disk", None), ("file", None), ("cpu", "x"), ("file", "\0")],
)
def test_a_place_that_makes_no_sense_is_refused(original: str, path: str | None) -> None:
    with pytest.raises(ConfigError):
        deltaw.merge(adapted(), original=original, path=path)


def test_merged_is_undone_when_the_block_fails() -> None:
    model = adapted()
    before = bits(model)
    with pytest.raises(ZeroDivisionError), deltaw.merged(model):
        1 / 0  # noqa: B018
    assert same(bits(model), before)


def test_meta_weights_say_what_to_do() -> None:
    with torch.device("meta"):
        model = Tower()
    deltaw.attach(model, CONFIG)
    with pytest.raises(DeltawError, match=r"embed\.weight is on the meta device"):
        deltaw.merge(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_share_of_a_full_copy_is_rounded_once(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(31, 17)).to(dtype)
    deltaw.attach(model, LoraConfig(target_modules=[], modules_to_save=["0"]), "head")
    layer = model[0]
    for name, parameter in layer.named_parameters():
        if name.endswith("trained"):
            nn.init.normal_(parameter)
    base = layer.frozen("weight").detach().clone().double()
    copy = layer.parts("head")["weight"].trained.detach().double()
    deltaw.activate(model, {"head": 0.3})
    deltaw.merge(model)
    exact = (0.7 * base + 0.3 * copy).float()
    step = torch.finfo(dtype).eps * exact.abs()
    assert ((layer.weight.detach().float() - exact).abs() <= 0.502 * step + 1e-7).all()


@pytest.mark.parametrize("original", ["keep", "none"])
def test_a_checkpoint_of_merged_weights_is_not_loaded_beside_the_adapter(
    tmp_path: Path, original: str
) -> None:
    model, other = adapted(), adapted()
    deltaw.merge(model, original=original)
    torch.save(nn.Sequential(model).state_dict(), tmp_path / "merged.pt")
    found = torch.load(tmp_path / "merged.pt")
    with pytest.raises(StateError, match="count twice"):
        nn.Sequential(other).load_state_dict(found)
    deltaw.detach(other)
    weights = {name: tensor for name, tensor in found.items() if ".adapter." not in name}
    nn.Sequential(other).load_state_dict(weights)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_checkpoint_taken_after_an_unmerge_is_loaded() -> None:
    model, other = adapted(), adapted()
    with deltaw.merged(model):
        pass
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), model(TOKENS))


@torch.no_grad()
def test_what_rounding_takes_from_a_whole_matrix_is_reported() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 12), nn.Conv1d(8, 8, 3, groups=2)).to(torch.bfloat16)
    deltaw.attach(model, LoraConfig(r=2, use_dora=True, target_modules=["0", "1"]))
    shake(model, std=0.01)
    for layer in model:
        part = layer.parts("default")["weight"]
        norms = layer.matrix("weight").float().norm(dim=1)
        part.lora_magnitude_vector.copy_(norms * 1.001)
    before = [layer.matrix("weight").float() for layer in model]
    parts = [layer.parts("default")["weight"] for layer in model]
    deltas = [part.delta(W) for part, W in zip(parts, before, strict=True)]
    report = deltaw.merge(model)
    for path, (layer, W, delta) in enumerate(zip(model, before, deltas, strict=True)):
        share = (layer.matrix("weight").float() - (W + delta)).norm() / delta.norm()
        assert report.rounding[str(path)] == pytest.approx(float(share), rel=1e-3)
    assert "rounding takes up to" in str(report)


def test_zeros_for_a_bias_that_is_not_there_merge() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3)).eval()
    deltaw.attach(model, LoraConfig(r=2, lora_bias=True, target_modules=["0", "1"]))
    shake(model)
    part, x = model[0].parts("default")["weight"], torch.ones(2, 5)
    with torch.no_grad():
        part.lora_B_bias.zero_()
        output = model(x)
        with deltaw.merged(model):
            assert torch.allclose(model(x), output, atol=1e-5)
        part.lora_B_bias[1] = 1e-6
    with pytest.raises(MergeError, match=r"0\.bias: the layer has no bias"):
        deltaw.merge(model)
