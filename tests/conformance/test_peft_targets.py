"""Which layers the settings choose, and with which rank and alpha: the same as in PEFT."""

import copy

import pytest
from peft_pair import bert, gpt2, llama, peft, quiet, seeded
from torch import Tensor, nn

import deltaw


def chosen_by_peft(model: nn.Module, **settings: object) -> dict[str, tuple[int, float, float]]:
    """Return path -> (rank, alpha, scale)."""
    with quiet():
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    return {
        name.removeprefix("base_model.model."): (
            module.r["default"],
            module.lora_alpha["default"],
            module.scaling["default"],
        )
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }


def chosen_by_deltaw(model: nn.Module, **settings: object) -> dict[str, tuple[int, float, float]]:
    config = deltaw.LoraConfig(**{"lora_alpha": 8, "modules_to_save": [], **settings})
    plan = deltaw.plan(model, config, strict=False)
    return {target.path: (target.r, target.alpha, target.scale) for target in plan.targets}


class Deep(nn.Module):
    """The same names at three depths."""

    def __init__(self) -> None:
        super().__init__()
        self.foo = nn.Linear(4, 4)
        self.middle = nn.ModuleDict({"foo": nn.Linear(4, 4), "foobar": nn.Linear(4, 4)})
        self.outer = nn.ModuleDict({"middle": nn.ModuleDict({"foo": nn.Linear(4, 4)})})
        self.module = nn.ModuleDict({"middle": nn.ModuleDict({"foo": nn.Linear(4, 4)})})

    def forward(self, x: Tensor) -> Tensor:
        return self.foo(x)


PATTERNS = [
    {"foo": 1},
    {"^foo": 1},
    {"middle.foo": 1},
    {"^middle.foo": 1},
    {"outer.middle.foo": 1},
    {"foo": 1, "middle.foo": 2, "outer.middle.foo": 5},
    {"outer.middle.foo": 5, "middle.foo": 2, "foo": 1},
    {"^foo": 1, "foo": 2},
    {"foo": 2, "^foo": 1},
    {"oo": 1},
    {"middle": 1},
    {"foobar": 1},
    {"foo.*": 1},
    {".*foo": 1},
    {"^outer.*": 1, "^.*middle.foo": 2},
    {r"middle\.foo": 1},
    {"m[a-z]+.foo": 1, "[^.]+": 2},
    {"(outer|module).middle.foo": 1},
    {"^middle.foo$": 1},
    {"": 1},
]
ALL = ["foo", "foobar"]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_08_the_first_pattern_that_matches_wins(pattern: dict[str, int], rslora: bool) -> None:
    model = seeded(Deep)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ALL, "use_rslora": rslora}
    for patterns in (
        {"rank_pattern": pattern},
        {"alpha_pattern": pattern},
        {"rank_pattern": pattern, "alpha_pattern": {"^outer.middle.foo": 11}},
    ):
        theirs = chosen_by_peft(model, **settings, **patterns)
        assert len(theirs) == 5
        assert chosen_by_deltaw(model, **settings, **patterns) == theirs


TARGETS = [
    (llama, "all-linear"),
    (llama, ["q_proj", "v_proj"]),
    (llama, ["self_attn.q_proj", "mlp.up_proj"]),
    (llama, ["model.layers.1.self_attn.k_proj"]),
    (llama, r".*\.(q_proj|up_proj)"),
    (llama, r"model\.layers\.[01]\..*_proj"),
    (llama, ["lm_head"]),
    (llama, ["proj", "q_proj"]),
    (bert, "all-linear"),
    (bert, ["query", "output.dense"]),
    (bert, "bert.pooler.dense"),
    (gpt2, "all-linear"),
    (gpt2, ["c_attn"]),
    (gpt2, ["attn.c_proj", "wte"]),
]


@pytest.mark.parametrize(("model", "targets"), TARGETS)
def test_09_lists_and_patterns_choose_the_same_layers(model: object, targets: object) -> None:
    base = model()
    settings = {"r": 2, "target_modules": targets}
    if model is bert and targets == "all-linear":
        settings["task_type"] = "SEQ_CLS"  # without it PEFT takes the head for any linear layer
        settings["modules_to_save"] = ["classifier"]
    theirs = chosen_by_peft(base, **settings)
    assert theirs
    assert chosen_by_deltaw(base, **settings) == theirs


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (["q_proj", "v_proj"], ["v_proj"]),
        (["q_proj", "v_proj"], ["model.layers.1.self_attn.v_proj"]),
        ("all-linear", ["up_proj", "k_proj"]),
        ("all-linear", r".*\.mlp\..*"),
        (["q_proj"], r"model\.layers\.[12]\..*"),
        (r".*_proj", ["layers.0.mlp.up_proj"]),
    ],
)
def test_10_layers_are_excluded_alike(targets: object, excluded: object) -> None:
    settings = {"r": 2, "target_modules": targets, "exclude_modules": excluded}
    theirs = chosen_by_peft(llama(), **settings)
    assert theirs
    assert chosen_by_deltaw(llama(), **settings) == theirs


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [(0, None), ([0, 2], None), ([1], "layers"), ([1, 2], ["layers"]), ([0], "h")],
)
def test_10_blocks_are_chosen_alike(layers: object, pattern: object) -> None:
    settings = {
        "r": 2,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    if pattern == "h":
        with pytest.raises(ValueError):
            chosen_by_peft(llama(), **settings)
        with pytest.raises(deltaw.DeltawError):
            chosen_by_deltaw(llama(), **settings)
        return
    theirs = chosen_by_peft(llama(), **settings)
    assert theirs
    assert chosen_by_deltaw(llama(), **settings) == theirs


def test_10_a_full_path_is_not_filtered_by_blocks() -> None:
    settings = {
        "r": 2,
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    }
    theirs = chosen_by_peft(llama(), **settings)
    assert theirs.keys() == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    }
    assert chosen_by_deltaw(llama(), **settings) == theirs
