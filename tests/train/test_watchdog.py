"""A loss that leaves its course is noticed, ordinary noise is not, and a run goes back and on."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.train.models import events
from transformers import TrainerState

from deltaw.errors import DivergedError
from deltaw.train import run as running
from deltaw.train.checkpoint import STATE
from deltaw.train.guarding import watchdog
from deltaw.train.guarding.guarded import MOST, Guarded
from deltaw.train.guarding.watchdog import FEWEST, PATIENCE, WINDOW, Watchdog
from deltaw.train.interrupt import Stopped
from deltaw.train.loop import RecipeTrainer
from deltaw.train.recipe import parse
from deltaw.train.run import train
from deltaw.train.runfolder import read_recipe, read_results

ADAPTER = "adapter_model.safetensors"
REAL = Guarded.training_step

Draw = Callable[[int, random.Random], float]
NOISE: dict[str, Draw] = {
    "even": lambda _, r: 2 + 0.3 * r.gauss(0, 1),
    "small batches": lambda _, r: math.exp(r.gauss(0, 1)),
    "hard rows among easy ones": lambda _, r: 4.0 if r.random() < 0.3 else 0.3 + 0.1 * r.random(),
    "no variance": lambda _, r: r.paretovariate(0.7),
    "falling": lambda step, r: 3 * math.exp(-step / 2000) * math.exp(0.5 * r.gauss(0, 1)),
    "learnt by heart": lambda step, r: (3.0 if step < 20 else 1e-4) * math.exp(2 * r.gauss(0, 1)),
    "easier from epoch to epoch": lambda step, r: 3 * 0.7 ** (step // 500) + 0.4 * r.gauss(0, 1),
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_is_no_alarm(kind: str) -> None:
    generator, dog = random.Random(7), Watchdog()
    for step in range(15_000):
        dog.see(step + 1, NOISE[kind](step, generator))
        assert not dog.alarmed, step


def course(length: int) -> list[float]:
    generator = random.Random(3)
    return [2 + 0.2 * generator.gauss(0, 1) for _ in range(length)]


def alarm(losses: list[float]) -> tuple[int, int | None] | None:
    dog = Watchdog()
    for step, loss in enumerate(losses, start=1):
        dog.see(step, loss)
        if dog.alarmed:
            return step, dog.began
    return None


def test_a_jump_that_stays_is_an_alarm_after_five_steps_and_a_short_one_is_not() -> None:
    calm = course(100)
    assert alarm([*calm, *[6.0] * PATIENCE]) == (100 + PATIENCE, 101)
    assert alarm([*calm, *[6.0] * (PATIENCE - 1), 2.0, *[6.0] * (PATIENCE - 1), *calm]) is None
    assert alarm([*calm, *[2.8] * 20]) is None
    assert alarm([*course(FEWEST - 1), *[6.0] * FEWEST]) is None
    assert alarm([*course(FEWEST), *[6.0] * PATIENCE]) == (FEWEST + PATIENCE, FEWEST + 1)


def test_the_distance_is_twice_that_of_the_largest_and_a_twentieth_of_the_first() -> None:
    dog = Watchdog()
    for step in range(WINDOW):
        dog.see(step, 10.0 if step == 0 else (1.0, 1.1, 1.2)[step % 3])
    dog.see(WINDOW, 1.1)
    assert max(dog.usual) == 1.2
    assert not dog.stands_out(1.59) and dog.stands_out(1.61)
    dog.first = 1.0
    assert not dog.stands_out(1.29) and dog.stands_out(1.31)


def test_what_was_seen_goes_through_a_checkpoint(tmp_path: Path) -> None:
    dog, other = Watchdog(), Watchdog()
    for step, loss in enumerate([*course(100), 6.0, 6.5]):
        dog.see(step, loss)
    state = TrainerState(stateful_callbacks=[dog])
    state.save_to_json(str(tmp_path / "state.json"))
    other.on_train_begin(None, TrainerState.load_from_json(str(tmp_path / "state.json")), None)
    assert other.state() == dog.state() and other.began == 100


@pytest.fixture
def values(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(watchdog, "FEWEST", 8)
    return {
        "model": str(tiny / "model"),
        "data": str(tiny / "data.csv"),
        "output": str(tmp_path / "run"),
        "max_steps": 24,
        "eval_every": 8,
        "batch_size": 4,
        "lora_dropout": 0.1,
        "learning_rate": 0.001,
    }


def start(values: dict[str, Any], **more: Any) -> Path:
    return train(parse(values | more), silent=True, scored=())


def spoil(patch: pytest.MonkeyPatch, steps: range, by: float, slowed: int = 1) -> None:
    """Add to the losses of some steps until the rate was lowered so often."""

    def spoilt(self: Guarded, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step + 1
        loss = REAL(self, *args, **kwargs)
        if step in steps and self.slowed < slowed:
            self.require_finite(loss + by, "The loss", step)
            self._step_loss += by
        return loss

    patch.setattr(Guarded, "training_step", spoilt)


def rates(run: Path) -> dict[int, float]:
    """The rate of the latest step of each number."""
    steps = [e for e in events(run) if e["event"] == "step" and "learning_rate" in e]
    return {e["step"]: e["learning_rate"] for e in steps}


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"bf16": True, "gradient_accumulation": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"method": "full", "optim": "galore_adamw", "galore_rank": 4}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "bf16", "galore"],
)
def test_a_run_goes_back_and_on_at_half_the_rate_and_says_so(
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
) -> None:
    """Stopped and resumed afterwards it ends with the same bytes."""
    values |= more
    if "method" in more:
        del values["lora_dropout"]
    weights = "model.safetensors" if "method" in more else ADAPTER
    spoil(monkeypatch, range(14, 20), 9.0)
    run = train(parse(values))
    out = capsys.readouterr().out
    assert "rollback  The loss left its course" in out and "in steps 14 to 18." in out
    assert "back to step 8, and on at 0.5 times the rate, at most 0.0005" in out
    (back,) = read_results(run)["rollbacks"]
    assert (back["wrong"], back["to"], back["factor"]) == (14, 8, 0.5)
    assert (read_recipe(run).record or {})["rollbacks"] == [back]
    plan = [0.001 * min(step / 2, (24 - step) / 22) for step in range(24)]
    found = rates(run)
    assert [found[step + 1] for step in range(24)] == pytest.approx(
        [rate * (0.5 if step > 8 else 1) for step, rate in enumerate(plan)]
    )

    def broken(*_: object) -> None:
        raise Stopped(2, "")

    values["output"] += "-again"
    with monkeypatch.context() as patch:
        patch.setattr(running._Run, "_save", broken)
        with pytest.raises(Stopped):
            start(values)
    folder = Path(values["output"])
    (folder / "checkpoint-24").rename(folder.parent / "gone")
    assert (folder / "checkpoint-16").exists()
    assert (start(values) / weights).read_bytes() == (run / weights).read_bytes()


def test_a_checkpoint_of_the_jump_is_gone_and_the_best_before_it_is_kept(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although those of the jump score better, and few checkpoints are kept."""
    spoil(monkeypatch, range(14, 20), 9.0)

    def judge(self: RecipeTrainer, metrics: dict[str, float], trial: Any) -> bool:
        step = self.state.global_step
        better = step <= 10 or (step > 12 and self.slowed == 0)
        self.state.best_global_step = step if better else 10
        return better

    monkeypatch.setattr(RecipeTrainer, "_determine_best_metric", judge)
    restored: list[Path] = []
    real = running.restore
    monkeypatch.setattr(
        running, "restore", lambda model, path: (restored.append(path), real(model, path))
    )
    (back,) = read_results(start(values, eval_every=2))["rollbacks"]
    assert (back["wrong"], back["to"]) == (14, 12)
    assert [path.name for path in restored] == ["checkpoint-10"]


@pytest.mark.parametrize("number", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_what_is_no_number_is_gone_back_from_too_but_not_for_ever(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    spoil(monkeypatch, range(11, 12), number, slowed=2)
    run = start(values)
    whys = [back["why"] for back in read_results(run)["rollbacks"]]
    assert whys == [f"The loss became {number} in step 11."] * 2
    values["output"] += "-2"
    with pytest.raises(DivergedError, match=f"became {number} in step 11"):
        start(values, watchdog=False)
    assert "rollbacks" not in (read_recipe(Path(values["output"])).record or {})
    spoil(monkeypatch, range(11, 12), number, slowed=MOST + 1)
    values["output"] += "-3"
    with pytest.raises(DivergedError, match=f"became {number} in step 11"):
        start(values)
    record = read_recipe(Path(values["output"])).record or {}
    assert [back["factor"] for back in record["rollbacks"]] == [0.5, 0.25, 0.125]


def test_before_the_first_checkpoint_a_jump_changes_nothing(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = start(values, eval_every=24)
    spoil(monkeypatch, range(12, 18), 9.0)
    run = start(values, eval_every=24, output=values["output"] + "-2")
    assert (run / ADAPTER).read_bytes() == (calm / ADAPTER).read_bytes()
    assert read_results(run)["rollbacks"] == []


def test_what_could_be_gone_back_to_keeps_its_best(tmp_path: Path) -> None:
    for step, best in ((10, 10), (20, 10), (30, 30)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        TrainerState(global_step=step, best_global_step=best).save_to_json(str(folder / STATE))
    trainer = object.__new__(Guarded)
    trainer.args = SimpleNamespace(save_total_limit=2)
    trainer.state = TrainerState(global_step=30, best_global_step=30)
    trainer.watchdog = None
    assert trainer._kept(tmp_path, [10, 20, 30]) == {30}
    trainer.watchdog = watchdog.Watchdog()
    trainer._rotate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-30",
    ]
    trainer.state = TrainerState(global_step=40, best_global_step=30)
    folder = tmp_path / "checkpoint-40"
    folder.mkdir()
    trainer.state.save_to_json(str(folder / STATE))
    trainer._rotate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-30", "checkpoint-40"]
    (tmp_path / "checkpoint-mine").mkdir()
    trainer.args.output_dir = str(tmp_path)
    assert trainer._good_checkpoint() == tmp_path / "checkpoint-30"
