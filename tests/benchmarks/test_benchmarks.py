"""The benchmarks run on a tiny model, divide what belongs together, and made the page there is."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("loralib")

from benchmarks import (
    __main__ as page,
)
from benchmarks import (
    decode,
    latency,
    memory,
    parity,
    products,
    rounds,
    saved_bytes,
    several,
    shapes,
    starts,
    tinyllama,
    training,
)
from benchmarks import results as results_
from benchmarks.contestants import CONTESTANTS
from benchmarks.results import Results

PEFTS_OWN = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning", "ignore::UserWarning:peft"
)


@PEFTS_OWN
@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_step_of_every_contestant(name: str) -> None:
    model = CONTESTANTS[name].prepare(shapes.build("tiny", "float32")).train()
    before = [p.detach().clone() for p in model.parameters()]
    assert training.stepper(model, "2x8")()["seconds"] > 0
    moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert moved == (not name.startswith("floor"))


@pytest.mark.slow
@PEFTS_OWN
def test_everything_measures_on_a_tiny_model() -> None:
    for case in ("2/0/base", "2/1/deltaw", "2/2/deltaw:x", "2/4/deltaw", "2/2/peft"):
        turn = decode.prepare(case, "tiny")
        assert turn()["seconds"] > 0 and turn()["seconds"] > 0
    for name in tinyllama.CONTESTANTS:
        found = tinyllama.measure(name, "tiny")
        assert {f"{key}/later" for key in tinyllama.OPERATIONS if name == "deltaw"} <= found.keys()
    assert tinyllama.measure("deltaw", "tiny")["changed"] == 0
    for name in latency.CONTESTANTS:
        assert all(v > 0 for v in latency.turns(name, "tiny")().values())
    found = starts.vectors(60, 40)
    assert -1e-6 < found["deltaw, missed"] < 0.01 and -1e-6 < found["PEFT, niter 4, left"] < 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "WIDTH", 24)
        patch.setattr(starts, "INNER", 40)
        assert all(starts.attached()[name] > 0 for name in starts.ATTACHED)
    for step in several.steps(shapes.build("tiny")).values():
        step()
    found = parity.measure("float32", "tiny", 3)
    assert parity.difference(found) < 1e-5
    assert found["deltaw"][0] != found["deltaw"][-1]


def test_bytes_are_counted_once_and_without_the_model() -> None:
    model = torch.nn.Linear(5, 7)
    x = torch.randn(3, 5)
    assert memory.saved_bytes(model, lambda: model(x)) == x.nbytes
    assert memory.saved_bytes(model, lambda: model(x) + model(x)) == x.nbytes
    assert saved_bytes.count("blocks", "deltaw", "tiny") > saved_bytes.count(
        "blocks", "floor", "tiny"
    )


def test_a_round_is_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupted run left is measured anew after a change, a whole round is kept."""
    asked: list[str] = []

    def measured(benchmark: str, contestant: str) -> dict[str, float]:
        asked.append(contestant)
        return {"seconds": 1.0}

    monkeypatch.setattr(rounds, "in_fresh_process", measured)
    monkeypatch.setattr(results_, "commit", lambda: "old")
    kept = Results("some", tmp_path)
    rounds.measure(kept, ("a", "b"), rounds=1)
    kept.add("round=1/a", {"seconds": 3.0})
    asked.clear()
    monkeypatch.setattr(results_, "commit", lambda: "new")
    again = Results("some", tmp_path)
    rounds.measure(again, ("a", "b"), rounds=2)
    assert asked == ["b", "a"]
    assert rounds.ratios(*(rounds.values(again, n, "seconds") for n in "ab")) == [1.0, 1.0]


def test_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes live at once, and every round has one turn of each."""
    script = (
        "from benchmarks import rounds; n = iter(range(99)); rounds.serve(lambda: {'n': next(n)})"
    )
    monkeypatch.setattr(rounds, "_command", lambda *of: [sys.executable, "-c", script])
    kept = Results("some", tmp_path)
    rounds.take_turns(kept, ("a", "b"), turns=2)
    wanted = {0: float(rounds.WARMUP), 1: rounds.WARMUP + 1.0}
    assert rounds.values(kept, "a", "n") == rounds.values(kept, "b", "n") == wanted
    monkeypatch.setattr(rounds, "_command", lambda *of: [sys.executable, "-c", "raise SystemExit"])
    rounds.take_turns(kept, ("a", "b"), turns=2)
    with pytest.raises(RuntimeError, match="ended with 0"):
        rounds.take_turns(kept, ("a", "b"), turns=3)


def test_the_page_is_what_the_results_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = importlib.import_module("benchmarks.plots")
    committed = page.PAGE.read_text()
    monkeypatch.setattr(plots, "FOLDER", tmp_path / plots.FOLDER.name)
    monkeypatch.setattr(page, "PAGE", tmp_path / page.PAGE.name)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--report"])
    page.main()
    assert page.PAGE.read_text() == committed, "run: python -m benchmarks --report"


@pytest.mark.parametrize("group", ["few", "ways", "train", "dropout", "turn"])
def test_single_steps(group: str) -> None:
    assert all(seconds > 0 for seconds in products.measure(group, times=1).values())
