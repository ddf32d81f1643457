"""The picture of a run's losses, and evaluations at the end of every epoch, which are in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from deltaw.errors import ConfigError
from deltaw.train import choices
from deltaw.train.plotting import PICTURE, logged, plot_losses, smoothed
from deltaw.train.recipe import parse
from deltaw.train.run import train


@pytest.fixture
def values(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    paths = {"model": tiny / "model", "data": tiny / "data.csv", "output": tmp_path / "run"}
    return {key: str(path) for key, path in paths.items()} | {"plot_loss": True}


def test_the_average_begins_with_the_first_value_and_forgets() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([2.0, 4.0]) == pytest.approx([2.0, (0.9 * 2 + 4) / 1.9])
    assert smoothed([100.0, *[1.0] * 200])[-1] == pytest.approx(1.0, abs=1e-6)


def test_each_loss_is_drawn_at_its_step(tmp_path: Path) -> None:
    history = [{"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.0}, {"step": 4, "loss": 0.5}]
    assert logged(history, "loss") == ([2, 4], [1.5, 0.5])
    assert logged(history, "eval_loss") == ([2], [1.0])
    for name, part in (("both", history), ("alone", history[::2])):
        plot_losses(part, tmp_path / f"{name}.png")
    both, alone = (image.imread(tmp_path / f"{name}.png") for name in ("both", "alone"))
    assert both.shape == alone.shape
    assert is_red(both) and not is_red(alone)


def is_red(picture: Any) -> bool:
    """Whether validation losses are there."""
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    return bool(((red > 0.9) & (green < 0.6) & (blue < 0.5)).any())


def test_a_run_draws_its_losses_and_is_evaluated_after_each_epoch(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"batch_size": 5, "gradient_accumulation": 2, "epochs": 3, "eval_each_epoch": True}
    run = train(parse(values | more))
    assert image.imread(run / PICTURE).std() > 0
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = {event["step"]: event["epoch"] for event in events if "eval_loss" in event}
    assert list(steps.values()) == [1, 2, 3]
    assert f"evaluated every {min(steps)}; 3 epochs" in capsys.readouterr().out
    assert not (train(parse(values | {"plot_loss": False}), overwrite=True) / PICTURE).exists()


def test_what_cannot_be_drawn_or_contradicts_is_refused(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="eval_every=3 has no effect with eval_each_epoch=True"):
        parse(values | {"eval_every": 3, "eval_each_epoch": True})
    monkeypatch.setattr(choices, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"plot_loss=True draws with matplotlib(.|\n)*Fix: pip"):
        train(parse(values))
    assert not Path(values["output"]).exists() or not any(Path(values["output"]).glob("*.yaml"))
