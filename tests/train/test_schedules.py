"""Schedules of the rate: the rates of a run's steps are those of transformers, by every name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from deltaw.errors import ConfigError
from deltaw.train import rates
from deltaw.train.recipe import parse
from deltaw.train.run import train
from deltaw.train.schedules import BY_SCORE, KWARGS

LEAST = {"model": "m", "data": "d"}
SHAPE = rates.Shape(768, "bert", causal=False)
NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2, "warmup_lr_rate": 0.5},
    "warmup_stable_decay": {"num_decay_steps": 3, "decay_type": "linear"},
    "inverse_sqrt": {"timescale": 4},
    "cosine": {"num_cycles": 1.5},
}


def test_every_name_of_transformers_is_known() -> None:
    assert {kind.value for kind in SchedulerType} == {*KWARGS, *BY_SCORE}


def planned(**values: Any) -> rates.TrainingPlan:
    recipe = parse(LEAST | {"learning_rate": 0.01, "max_steps": 8, "warmup": 2.0} | values)
    return rates.planned(recipe, 16, SHAPE, "loss")


@pytest.mark.parametrize("name", KWARGS)
def test_a_run_goes_by_the_schedule(tiny: Path, tmp_path: Path, name: str) -> None:
    values = {
        "model": str(tiny / "model"),
        "data": str(tiny / "data.csv"),
        "output": str(tmp_path / "run"),
        "learning_rate": 0.01,
        "max_steps": 6,
        "scheduler": name,
        "scheduler_kwargs": NEEDED.get(name, {}),
    }
    warmup = 0 if name == "constant" else 2
    run = train(parse(values | ({"warmup": 2} if warmup else {})), silent=True, scored=())
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = [event["learning_rate"] for event in events if "learning_rate" in event]
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.01)
    schedule = get_scheduler(name, optimizer, warmup, 6, NEEDED.get(name, {}))
    wanted = []
    for _ in range(6):
        wanted.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(wanted)


def test_what_is_stable_by_default_is_a_third_behind_the_warm_up() -> None:
    def steps(**values: int) -> dict[str, Any]:
        chosen = {"scheduler": "warmup_stable_decay", "scheduler_kwargs": values}
        return planned(**chosen).scheduler_kwargs

    assert steps() == {"num_decay_steps": 4}
    assert steps(num_stable_steps=5) == {"num_decay_steps": 1}
    assert steps(num_stable_steps=1, num_decay_steps=5) == {"num_decay_steps": 5}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("polynomial", {"lr_end": 0.5}, "lr_end .0.5. must be smaller"),
        ("cosine", {"num_cycles": "many"}, "scheduler=cosine with .*'many'"),
        ("warmup_stable_decay", {"decay_type": "steep"}, "Unknown decay type: steep"),
        ("warmup_stable_decay", {"num_stable_steps": 4, "num_decay_steps": 4}, "be 6 together"),
        (
            "cosine_warmup_with_min_lr",
            {"min_lr": 0, "warmup_lr_rate": -1},
            "the rate would be multiplied by -1",
        ),
    ],
)
def test_settings_that_make_no_schedule_are_refused(
    name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}(.|\n)*Fix: correct scheduler_kwargs"):
        planned(scheduler=name, scheduler_kwargs=given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheduler": "greedy"}, "scheduler='greedy': it goes by a score"),
        ({"scheduler": "reduce_lr_on_plateau"}, "it goes by a score; here .* the step alone"),
        ({"scheduler": "sine"}, "scheduler='sine': Input should be 'linear', 'cosine'"),
        ({"scheduler_kwargs": {"power": 2}}, "linear reads none, and not power"),
        (
            {"scheduler": "cosine", "scheduler_kwargs": {"cycles": 2}},
            "cosine reads num_cycles, and not cycles",
        ),
        ({"scheduler_kwargs": 3}, "scheduler_kwargs=3: Input should be a valid dict"),
        ({"lr_scheduler_kwargs": {}}, "did you mean scheduler_kwargs"),
        (
            {"scheduler": "constant", "warmup": 5},
            "warmup=5 has no effect with scheduler=constant; .*constant_with_warmup",
        ),
    ],
)
def test_what_a_schedule_does_not_read_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(LEAST | values)
