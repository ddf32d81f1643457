"""Recipes for LoRA+ and GaLore: their names, their groups, and runs to the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.core.tiny import bert
from tests.train.conftest import Command
from torch import nn

from deltaw.errors import ConfigError, StateError, TargetError
from deltaw.optim import decays, loraplus
from deltaw.optim.galore import GaLoreAdamW
from deltaw.train import rates
from deltaw.train.console import Console
from deltaw.train.interrupt import Interrupt
from deltaw.train.loop import TextTrainer
from deltaw.train.methods import prepare
from deltaw.train.optimizer import optimizer_groups
from deltaw.train.prepare import prepare as prepare_job
from deltaw.train.recipe import Recipe, parse
from deltaw.train.run import make_progress, train

LEAST = {"model": "m", "data": "d"}


@pytest.mark.parametrize(
    ("values", "optim"),
    [
        ({"optim": "galore"}, "galore_adamw"),
        ({"optim": "galore_adamw_8bit_layerwise"}, "galore_adamw_8bit_layerwise"),
        ({"optim": "adamw_torch"}, "adamw"),
        ({"use_galore": True}, "galore_adamw"),
        ({"use_galore": True, "galore_layerwise": True}, "galore_adamw_layerwise"),
        ({"use_galore": True, "galore_layerwise": False}, "galore_adamw"),
        ({"use_galore": False, "galore_layerwise": False}, "adamw"),
        ({"use_galore": False, "optim": "galore"}, "galore_adamw"),
    ],
)
def test_names_of_other_trainers(values: dict[str, object], optim: str) -> None:
    assert parse(LEAST | {"method": "full"} | values).optim == optim


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_galore": "yes"}, "use_galore='yes': must be true or false"),
        ({"use_galore": True, "optim": "galore"}, "optim does not go with use_galore; keep optim"),
        ({"galore_layerwise": True}, "galore_layerwise has no effect without use_galore"),
        ({"optim": "adam"}, "optim='adam': Input should be 'adamw', 'galore_adamw'"),
        ({"galore_rank": 0}, "galore_rank=0: Input should be greater"),
        ({"galore_rank": 8}, "galore_rank has no effect with optim=adamw; did you mean optim=gal"),
        ({"update_proj_gap": 8}, "unknown key update_proj_gap; did you mean galore_update_inter"),
        ({"proj_type": "left"}, "unknown key proj_type; did you mean galore_proj_type[?]"),
        ({"exact_svd": True}, "unknown key exact_svd; did you mean galore_exact_svd[?]"),
        (
            {"optim": "galore", "galore_proj_type": "full"},
            "galore_proj_type='full': Input should be 'std', 'reverse_std', 'left' or 'right'",
        ),
        ({"galore_exact_svd": True}, "galore_exact_svd has no effect with optim=adamw"),
        ({"optim": "galore", "method": "lora"}, "optim='galore_adamw' has no effect with method="),
        ({"optim": "galore", "method": "bitfit"}, "only with full or freeze"),
        (
            {"optim": "galore_adamw_layerwise", "gradient_accumulation": 2},
            "gradient_accumulation has no effect with(.|\n)*did you mean optim=galore_adamw[?]",
        ),
        (
            {"optim": "galore_adamw_layerwise", "max_grad_norm": 0.5},
            "max_grad_norm has no effect with",
        ),
        ({"loraplus_lr_ratio": 4}, "loraplus_lr_ratio=4.0 has no effect with method=full, only wi"),
        ({"loraplus_lr_ratio": 0, "method": "lora"}, "loraplus_lr_ratio=0: Input should be gr"),
        (
            {"loraplus_lr_embedding": 1e-5, "method": "lora"},
            "loraplus_lr_embedding has no effect without loraplus_lr_ratio",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(LEAST | {"method": "full"} | values)


def grouped(recipe: Recipe, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The options of each trained parameter by its name."""
    return by_name(model, optimizer_groups(model, recipe, 0.01))


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {
        id(p): {k: v for k, v in g.items() if k != "params"} for g in groups for p in g["params"]
    }
    return {n: found[id(p)] for n, p in model.named_parameters() if p.requires_grad}


def test_rates_of_lora_plus_and_of_layers_multiply() -> None:
    model = bert()
    recipe = parse(LEAST | {"loraplus_lr_ratio": 8, "lr_layer_decay": 0.5, "r": 2})
    prepare(model, recipe)
    found = grouped(recipe, model)
    for name, options in found.items():
        rate = 0.01 * (8 if ".lora_B" in name else 1)
        rate *= {"0": 0.25, "1": 0.5}.get(name.split(".layer.")[-1][0], 1)
        assert options == {"lr": rate, "weight_decay": 0.01 * ("bias" not in name)}, name
    assert {options["lr"] for options in found.values()} >= {0.02, 0.04, 0.0025, 0.01}


def test_matrices_go_through_galore_at_the_rate_of_their_layer() -> None:
    model = bert()
    values = {"method": "full", "lr_layer_decay": 0.5, "weight_decay": 0.3}
    galore = {"optim": "galore", "galore_rank": 5, "galore_update_interval": 7, "galore_scale": 3}
    found = grouped(parse(LEAST | values | galore | {"galore_target": ["query", "pooler"]}), model)
    settings = {
        "rank": 5,
        "update_proj_gap": 7,
        "scale": 3.0,
        "proj_type": "std",
        "exact_svd": False,
        "optim_bits": 32,
    }
    for name, options in found.items():
        chosen = name.endswith("weight") and (".query." in name or ".pooler." in name)
        assert (options.items() >= settings.items()) == chosen, name
        assert ("rank" in options) == chosen, name
    assert found["bert.encoder.layer.0.attention.self.query.weight"]["lr"] == 0.0025
    assert found["bert.pooler.dense.weight"] == {"lr": 0.01, "weight_decay": 0.3, **settings}
    eight = parse(LEAST | values | {"optim": "galore_adamw_8bit", "galore_rank": 5})
    assert grouped(eight, bert())["bert.pooler.dense.weight"]["optim_bits"] == 8
    sides = galore | {"galore_proj_type": "left", "galore_exact_svd": True}
    left = grouped(parse(LEAST | values | sides), bert())["bert.pooler.dense.weight"]
    assert (left["proj_type"], left["exact_svd"]) == ("left", True)
    everywhere = parse(LEAST | values | galore | {"galore_target": "all"})
    assert len([o for o in grouped(everywhere, bert()).values() if "rank" in o]) == 13


def test_a_rank_beyond_every_matrix_and_an_adapter_without_b_are_named() -> None:
    with pytest.raises(TargetError, match="rank=128"):
        grouped(parse(LEAST | {"method": "full", "optim": "galore"}), bert())
    recipe = parse(LEAST | {"target_modules": [], "loraplus_lr_ratio": 4, "bias": "all"})
    model = bert()
    prepare(model, recipe)
    with pytest.raises(StateError, match="No B of an adapter"):
        grouped(recipe, model)


def test_lora_plus_keeps_the_product_of_both_rates() -> None:
    plain = rates.learning_rate(parse(LEAST), rates.Shape(768, "bert", causal=False), 500)
    plus = rates.learning_rate(
        parse(LEAST | {"loraplus_lr_ratio": 16}), rates.Shape(768, "bert", causal=False), 500
    )
    assert plus.value * (16 * plus.value) == pytest.approx(plain.value**2, rel=0.1)
    assert plus.origin == f"{plain.origin}; / sqrt(16) for LoRA+"
    asked = parse(LEAST | {"loraplus_lr_ratio": 16, "learning_rate": 0.1})
    assert rates.learning_rate(asked, rates.Shape(768, "bert", causal=False), 500).value == 0.1


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True, "bias": "all", "loraplus_lr_ratio": 4},
        {"method": "full"},
        {"method": "full", "optim": "galore", "galore_rank": 4},
    ],
    ids=["dora", "full", "galore"],
)
def test_matrices_decay_and_vectors_do_not(
    tiny: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    paths = {"model": str(tiny / "model"), "data": str(tiny / "data.csv")}
    recipe = parse(paths | {"weight_decay": 0.3, "learning_rate": 0.01} | values)
    console = Console(silent=True)
    job = prepare_job(recipe, console)
    trainer = job.trainer(tmp_path, Interrupt(), make_progress(job, console))
    found = by_name(trainer.model, trainer.optimizer.param_groups)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        assert found[name]["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0), name
    assert any("magnitude" in name for name in trained) == recipe.use_dora
    if recipe.loraplus_lr_ratio is not None:
        library = by_name(trainer.model, loraplus.groups(trainer.model, 0.01, 4, 1e-6, 0.3))
        for name, options in library.items():
            assert options.items() <= found[name].items(), name


@pytest.mark.parametrize("more", [{}, {"optim": "galore", "galore_rank": 4}])
def test_the_constants_of_adam(tiny: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    paths = {"model": str(tiny / "model"), "data": str(tiny / "data.csv"), "method": "full"}
    constants = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    console = Console(silent=True)
    job = prepare_job(parse(paths | constants | more), console)
    trainer = job.trainer(tmp_path, Interrupt(), make_progress(job, console))
    for group in trainer.optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_biases_in_a_stack_do_not_decay() -> None:
    stack = nn.Parameter(torch.ones(4, 3))
    assert decays("experts.gate_up_proj", stack)
    assert not decays("experts.gate_up_proj_bias", stack)


GALORE = {"method": "full", "galore_rank": 4, "galore_update_interval": 2, "learning_rate": 0.005}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"optim": "galore_adamw_layerwise", **GALORE},
            "full: every weight, matrices by GaLore at rank 4, in the backward pass and so without",
        ),
        ({"optim": "galore", "bf16": True, **GALORE}, "matrices by GaLore at rank 4\n"),
        ({"optim": "galore", **GALORE, "method": "freeze", "last_layers": 1}, "the head, matrices"),
        ({"loraplus_lr_ratio": 16, "learning_rate": 0.002}, "B at 16 times the rate (LoRA+)"),
    ],
    ids=["layerwise", "bf16", "freeze", "loraplus"],
)
def test_a_run_to_its_end(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    said: str,
) -> None:
    paths = {"model": str(tiny / "model"), "data": str(tiny / "data.csv")}
    recipe = parse(paths | {"output": str(tmp_path / "run"), "max_steps": 8} | values)
    run = train(recipe)
    assert said in capsys.readouterr().out
    assert (run / "results.json").is_file()


def test_the_command_line_takes_the_names(deltaw_command: Command, tiny: Path) -> None:
    code, out, err = deltaw_command(
        *("train", tiny / "model", tiny / "data.csv", "--method", "full", "--dry-run"),
        *("--optim", "galore_adamw_layerwise", "--galore-rank", 6, "--galore-scale", 4),
        *("--galore-update-interval", 9),
    )
    assert (code, err) == (0, "")
    for text in ("optim: galore_adamw_layerwise", "galore_rank: 6", "galore_scale: 4.0"):
        assert text in out
    code, out, err = deltaw_command(
        *("train", tiny / "model", tiny / "data.csv", "--loraplus-lr-ratio", 8, "--dry-run")
    )
    assert (code, err) == (0, "")
    assert "B at 8 times the rate (LoRA+)" in out


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_layerwise"])
def test_checkpoints_of_galore_go_on_exactly(tiny: Path, tmp_path: Path, optim: str) -> None:
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.csv"), "max_steps": 7}
    recipe = parse(values | GALORE | {"optim": optim, "eval_every": 3})

    def trainer(folder: str) -> TextTrainer:
        console = Console(silent=True)
        job = prepare_job(recipe, console)
        transformers.set_seed(0)
        return job.trainer(tmp_path / folder, Interrupt(), make_progress(job, console))

    whole, part = trainer("whole"), trainer("part")
    assert isinstance(whole.optimizer, GaLoreAdamW)
    whole.train()
    before = [p.detach().clone() for p in part.model.parameters()]
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    pairs = zip(whole.model.parameters(), part.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    moved = zip(before, part.model.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in moved if a.ndim == 2)
