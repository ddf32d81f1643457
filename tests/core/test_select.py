"""Targets, excludes, layers and patterns choose what PEFT would; every miss is reported."""

from dataclasses import replace

import pytest
import torch
from core.models import TOKENS, Tower
from torch import nn

import deltaw
from deltaw import LoraConfig
from deltaw.errors import ConfigError, TargetError
from deltaw.plans import Plan


def targets(plan: Plan) -> list[str]:
    return [target.path for target in plan.targets]


def test_a_list_matches_at_dots() -> None:
    found = targets(deltaw.plan(Tower(), LoraConfig(target_modules=["q_proj", "attn.v_proj"])))
    assert found == [f"layers.{i}.attn.{n}" for i in range(3) for n in ("q_proj", "v_proj")]


def test_a_string_is_an_expression_over_the_whole_path() -> None:
    config = LoraConfig(target_modules=r"layers\.[02]\.attn\.(q|v)_proj")
    found = targets(deltaw.plan(Tower(), config))
    assert found == [f"layers.{i}.attn.{n}" for i in (0, 2) for n in ("q_proj", "v_proj")]


def test_list_expression_and_all_linear_agree() -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "experts.0", "experts.1", "head"]
    listed = targets(deltaw.plan(Tower(), LoraConfig(target_modules=names)))
    pattern = r"head|layers\.\d\.(attn\..*_proj|experts\.\d)"
    assert targets(deltaw.plan(Tower(), LoraConfig(target_modules=pattern))) == listed
    assert targets(deltaw.plan(Tower(), LoraConfig())) == listed


def test_excludes_take_out() -> None:
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.attn.q_proj"]
    )
    assert "layers.1.attn.q_proj" not in targets(deltaw.plan(Tower(), config))
    assert len(targets(deltaw.plan(Tower(), config))) == 5
    config = LoraConfig(exclude_modules=r".*experts.*|head")
    assert len(targets(deltaw.plan(Tower(), config))) == 12


@pytest.mark.parametrize("pattern", [None, "layers", ["layers"]])
def test_layers_filter_by_block_not_by_expert(pattern: str | list[str] | None) -> None:
    config = LoraConfig(
        target_modules=["experts.0", "experts.1"], layers_to_transform=[1], layers_pattern=pattern
    )
    assert targets(deltaw.plan(Tower(), config)) == ["layers.1.experts.0", "layers.1.experts.1"]


def test_a_path_given_in_full_passes_the_layer_filter() -> None:
    config = LoraConfig(target_modules=["layers.2.attn.q_proj", "k_proj"], layers_to_transform=0)
    found = targets(deltaw.plan(Tower(), config))
    assert found == ["layers.0.attn.k_proj", "layers.2.attn.q_proj"]


def test_rank_and_alpha_patterns_take_the_first_match() -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "k_proj"],
        rank_pattern={r"layers\.0\..*": 2, "q_proj": 4},
        alpha_pattern={"^layers.1.attn.q_proj": 7, "k_proj": 9},
    )
    rows = {t.path: (t.r, t.alpha, t.scale) for t in deltaw.plan(Tower(), config).targets}
    assert rows["layers.0.attn.q_proj"] == (2, 5, 5 / 2)
    assert rows["layers.1.attn.q_proj"] == (4, 7, 7 / 4)
    assert rows["layers.1.attn.k_proj"] == (3, 9, 9 / 3)


def test_every_miss_is_listed_with_the_nearest_names() -> None:
    config = LoraConfig(
        target_modules=["q_prj", "v_proj"],
        exclude_modules=["k_proj"],
        modules_to_save=["haed"],
        rank_pattern={"nope": 2},
        alpha_pattern={"v_prj": 2},
        layers_to_transform=[0, 7],
        layers_pattern=["blocks"],
        enable_lora={"c_attn": [True, False]},
    )
    with pytest.raises(TargetError) as caught:
        deltaw.plan(Tower(), config)
    text = str(caught.value)
    for part in (
        "target_modules 'q_prj' (nearest: q_proj",
        "exclude_modules 'k_proj'",
        "modules_to_save 'haed' (nearest: head",
        "rank_pattern 'nope'",
        "alpha_pattern 'v_prj'",
        "layers_to_transform 7",
        "layers_pattern 'blocks'",
        "enable_lora 'c_attn'",
    ):
        assert part in text
    assert "v_proj'" not in text.replace("'v_prj'", "")


def test_attach_changes_nothing_where_something_misses() -> None:
    model = Tower()
    with pytest.raises(TargetError):
        deltaw.attach(model, LoraConfig(target_modules=["q_proj", "v_porj"]))
    assert type(model) is Tower and not deltaw.configs(model)
    assert all(p.requires_grad for p in model.parameters())


def test_misses_become_warnings_when_asked() -> None:
    plan = deltaw.plan(Tower(), LoraConfig(r=2, target_modules=["q_proj", "zz"]), strict=False)
    assert len(plan.targets) == 3 and plan.warnings == ("target_modules 'zz' matches nothing",)


def test_unsupported_modules_are_named_with_what_is_supported() -> None:
    with pytest.raises(TargetError, match=r"norm: LayerNorm is not a supported") as caught:
        deltaw.plan(Tower(), LoraConfig(target_modules=["norm", "attn"]))
    for part in ("layers.0.attn: Attention", "nn.Linear", "nn.Embedding", "nn.Conv1d/2d/3d"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (nn.Sequential(nn.TransformerDecoderLayer(8, 2, 16)), "0.multihead_attn"),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), "0"),
    ],
)
def test_layers_read_past_their_forward_are_refused(model: nn.Module, path: str) -> None:
    with pytest.raises(TargetError, match=f"past its forward; name the attention itself, {path}"):
        deltaw.attach(model, LoraConfig(target_modules=["out_proj"]))


def test_all_linear_takes_attention_for_the_four_linear_maps_that_it_is() -> None:
    model = nn.Sequential(nn.TransformerDecoderLayer(8, 2, 16))
    plan = deltaw.plan(model, LoraConfig(r=2))
    assert [(target.path, target.slots) for target in plan.targets] == [
        ("0.self_attn", ("q", "k", "v", "out")),
        ("0.multihead_attn", ("q", "k", "v", "out")),
        ("0.linear1", ("weight",)),
        ("0.linear2", ("weight",)),
    ]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(5, 4, sparse=True), "sparse"),
        (nn.LazyLinear(4), "not known before"),
        (type("Odd", (nn.Embedding,), {"forward": lambda self, x: x})(5, 4), "overrides forward"),
    ],
)
def test_layers_that_cannot_be_adapted_say_why(layer: nn.Module, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        deltaw.plan(nn.Sequential(layer), LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"r": 0}, "r must be"),
        ({"r": -2}, "r must be"),
        ({"r": 2.5}, "r must be"),
        ({"r": True}, "r must be"),
        ({"lora_alpha": 0}, "lora_alpha must be"),
        ({"lora_alpha": -1.0}, "lora_alpha must be"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be"),
        ({"lora_dropout": 1.0}, "lora_dropout must lie"),
        ({"lora_dropout": -0.1}, "lora_dropout must lie"),
        ({"task_type": "SEQCLS"}, "task_type must be one of SEQ_CLS"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]"),
        ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\]"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list"),
        ({"enable_lora": {"q": [False, False]}}, "at least one True"),
        ({"target_modules": None}, "nothing would be trained"),
        ({"layers_pattern": "layers"}, "goes with layers_to_transform"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        LoraConfig(**settings)  # type: ignore[arg-type]


def test_all_settings_out_of_range_stand_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, lora_alpha=-1, lora_dropout=2, bias="x")
    assert str(caught.value).count("\n  - ") == 4


def test_a_rank_above_the_layers_own_is_a_warning() -> None:
    plan = deltaw.plan(Tower(), LoraConfig(r=7, target_modules=["head", "q_proj"]))
    [line] = plan.warnings
    assert line.startswith("in 4 layers ")
    assert "r=7 is above 6 in q_proj; r=7 is above 3 in head" in line


def test_alpha_defaults_to_twice_the_rank() -> None:
    assert LoraConfig(r=5).lora_alpha == 10


def test_slices_must_divide_the_output() -> None:
    with pytest.raises(TargetError, match="does not divide into 4 slices"):
        deltaw.plan(
            Tower(),
            LoraConfig(
                target_modules=["q_proj"], enable_lora={"q_proj": [True, False, False, True]}
            ),
        )


def test_a_plan_changes_nothing_and_reads_like_a_table() -> None:
    model = Tower()
    before = model(TOKENS)
    text = str(deltaw.plan(model, LoraConfig(r=2, target_modules=["q_proj", "head"])))
    assert (model(TOKENS) == before).all() and type(model.head) is nn.Linear
    assert "layers.0-2.attn.q_proj (3)" in text and "6x10" in text
    assert text.endswith("4 linear layers, 122 trainable parameters")


class Biased(nn.Module):
    """A model with a bias of its own beside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3)
        self.bias_out = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add its own bias."""
        return self.up(x) + self.bias_out


def test_a_bias_of_the_model_itself_is_named_with_what_to_do() -> None:
    model = Biased()
    with pytest.raises(TargetError, match=r"bias_out, which Biased itself holds") as caught:
        deltaw.attach(model, LoraConfig(bias="all"))
    assert type(model) is Biased and 'bias="lora_only"' in str(caught.value)
    deltaw.attach(nn.Sequential(model), LoraConfig(bias="all"))
    deltaw.attach(Biased(), LoraConfig(bias="lora_only"))


@pytest.mark.parametrize("target", ["all-linear", ["weight"]])
def test_a_lone_layer_says_to_put_it_in_a_module(target: str | list[str]) -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(TargetError, match=r"Linear holds no module.*\nFix: put it in one"):
        deltaw.attach(layer, LoraConfig(target_modules=target))
    deltaw.attach(nn.Sequential(layer), LoraConfig())


def test_a_tied_table_is_counted_where_it_still_acts() -> None:
    model = Tower()
    model.out = nn.Linear(10, 13, bias=False)
    model.out.weight = model.embed.weight
    whole = deltaw.summary(model).total
    deltaw.attach(model, LoraConfig(target_modules=[], modules_to_save=["embed"]))
    found = deltaw.summary(model)
    assert (found.total, found.trainable) == (whole + 130, 130)
    assert "out.weight" in {row.name for row in found.rows}
    deltaw.attach(model, LoraConfig(target_modules=[], modules_to_save=["out"]), "out")
    assert deltaw.summary(model).total == whole + 130


@pytest.mark.parametrize("target", [["again"], ["blocks.again"], r".*again"])
def test_a_second_name_of_a_module_is_answered_with_the_first(target: str | list[str]) -> None:
    model = nn.Module()
    model.up = nn.Linear(3, 3)
    model.blocks = nn.ModuleDict({"again": model.up})
    for settings in ({"target_modules": target}, {"modules_to_save": ["again"]}):
        with pytest.raises(TargetError, match=r"again'? \(blocks\.again is up; give that name\)"):
            deltaw.plan(model, LoraConfig(**settings))


def test_running_statistics_that_no_file_holds_are_warned_of() -> None:
    blocks = (nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)) for _ in range(3))
    model = nn.Sequential(*blocks, nn.InstanceNorm1d(4))
    wanted = LoraConfig(r=2, target_modules=r".*\.0")
    [line] = deltaw.plan(model, wanted).warnings
    assert line.startswith("running statistics") and line.endswith("modules_to_save: 0-2.1 (3)")
    assert not deltaw.plan(model, replace(wanted, modules_to_save=["0.1", "1.1", "2.1"])).warnings
