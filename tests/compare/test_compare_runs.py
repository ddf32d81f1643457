"""Comparisons that are run: resumed, extended, stopped, refused; mostly without real training."""

import json
import os
import re
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from tests.train.models import make_model, messages, write_csv

from deltaw.compare import comparing, processes, worker
from deltaw.compare.comparing import compare
from deltaw.compare.folder import REPORT, RUNNING, TABLE
from deltaw.compare.methods import NAMED, choose
from deltaw.compare.record import FILE
from deltaw.errors import ConfigError, DataError, RunError
from deltaw.train.interrupt import Stopped
from deltaw.train.locking import held

Work = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The values of a recipe for a tiny model and table."""
    folder = tmp_path_factory.mktemp("compare")
    make_model(folder / "model")
    data = write_csv(folder / "data.csv", messages(60))
    return {"model": str(folder / "model"), "data": str(data), "max_steps": 4}


class Fake:
    """Stands in for processes: does a method's work at once, by a table of outcomes."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, dict[str, Any], tuple[str, ...]]] = []
        self.examined: list[str] = []
        self.digests = {"base": "b", "tokenizer": "t"}
        self.outcomes: dict[str, tuple[str, Any]] = {}
        self.after: Callable[[], None] = lambda: None

    def outcome(self, name: str, work: Work, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        """Return what comes of a piece of work."""
        if name in self.outcomes:
            return self.outcomes[name]
        if work is worker.examine:
            self.examined.append(name)
            return "done", {
                "rate": 0.01,
                "steps": 8,
                "every": 2,
                "metric": "accuracy",
                "adapted": "all",
                "trainable": 10,
                "parameters": 100,
                "warnings": ["the pooler is new"],
                **self.digests,
            }
        if work is worker.identify:
            return "done", self.digests
        values, scored = arguments
        self.ran.append((name, dict(values), scored))
        self.after()
        score = 1 - abs(values["learning_rate"] - 0.04) - values["seed"] / 100
        return "done", {
            "diverged": None,
            **self.digests,
            "validation": score,
            "validation_loss": 1 - score,
            "test": {"values": {"accuracy": score}, "rows": 9} if scored else None,
            "trainable": 10,
            "file_bytes": 40,
            "seconds_per_step": 0.1,
            "peak_bytes": 1000,
            "loss": [[1, 1.0], [2, 0.5]],
        }


class Process:
    """A process that has ended."""

    exitcode = 0

    def join(self, timeout: float | None = None) -> None:
        """It has."""

    def terminate(self) -> None:
        """It has."""

    def is_alive(self) -> bool:
        """It is not."""
        return False


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replace processes."""
    found = Fake()

    def start(pool: processes.Pool, name: str, work: Work, *arguments: Any) -> None:
        ours, theirs = processes.multiprocessing.Pipe(duplex=False)
        theirs.send(found.outcome(name, work, arguments))
        theirs.close()
        pool.tasks.append(processes.Task(name, Process(), ours))  # type: ignore[arg-type]

    monkeypatch.setattr(processes.Pool, "start", start)
    return found


METHODS = {"a": {"r": 2}, "b": {"r": 4}}


def test_all_runs_and_their_settings(task: dict[str, Any], fake: Fake, tmp_path: Path) -> None:
    out = compare(task | {"r": 3, "seed": 5}, METHODS, seeds=2, output=tmp_path / "out")
    assert len(fake.ran) == 2 * (3 + 2 + 2) and fake.examined == ["a", "b"]
    values = [values for _, values, _ in fake.ran]
    assert {v["split_seed"] for v in values} == {5} and {v["seed"] for v in values} == {5, 6}
    assert {v["test_share"] for v in values} == {0.2}
    searched = [v for _, v, scored in fake.ran if not scored]
    assert {v["learning_rate"] for v in searched} == {0.0025, 0.01, 0.04}
    assert sorted({v["max_steps"] for v in searched}) == [2, 4]
    assert {v["seed"] for v in searched} == {5}
    final = [v for _, v, scored in fake.ran if scored]
    assert {(v["learning_rate"], v["max_steps"], v["eval_every"]) for v in final} == {(0.04, 8, 2)}
    assert {path.name for path in out.iterdir()} == {FILE, TABLE, REPORT, ".lock"}
    found = json.loads((out / FILE).read_text())
    assert [row["title"] for row in found["summary"]["rows"]] == ["a", "b"]
    assert str(tmp_path) not in (out / FILE).read_text() + (out / REPORT).read_text()


def test_all_runs_share_one_split_where_the_recipe_leaves_it_open(
    task: dict[str, Any], fake: Fake, tmp_path: Path
) -> None:
    nothing = dict.fromkeys(("seed", "split_seed", "test_share"))
    compare(task | nothing, METHODS, seeds=2, rates="rule", output=tmp_path)
    values = [values for _, values, _ in fake.ran]
    assert {v["split_seed"] for v in values} == {0} and {v["test_share"] for v in values} == {0.2}
    assert {v["seed"] for v in values} == {0, 1}


@pytest.mark.parametrize(("asked", "found"), [(0.3, {0.3}), (4, {1, 2, 4}), (1, {1})])
def test_short_runs_warm_up_for_as_much_less(
    task: dict[str, Any], fake: Fake, tmp_path: Path, asked: float, found: set[float]
) -> None:
    compare(task | {"warmup": asked}, {"a": {}}, seeds=1, output=tmp_path)
    assert {values["warmup"] for _, values, _ in fake.ran} == found
    assert fake.ran[-1][1]["warmup"] == asked


def test_what_is_done_is_not_done_again(task: dict[str, Any], fake: Fake, tmp_path: Path) -> None:
    compare(task, METHODS, seeds=2, output=tmp_path)
    fake.ran.clear()
    fake.examined.clear()
    pages = [(tmp_path / name).read_bytes() for name in (TABLE, FILE)]
    compare(task, METHODS, seeds=2, output=tmp_path)
    assert fake.ran == [] and fake.examined == []
    assert [(tmp_path / name).read_bytes() for name in (TABLE, FILE)] == pages
    compare(task, METHODS | {"c": {"r": 6}}, seeds=3, output=tmp_path)
    assert len(fake.ran) == 2 + (3 + 2 + 3) and fake.examined == ["c"]
    (tmp_path / RUNNING / "half").mkdir(parents=True)
    old = [tmp_path / RUNNING / "half", tmp_path / TABLE, tmp_path / REPORT]
    left: list[Path] = []
    fake.after = lambda: left.extend(path for path in old if path.exists())
    compare(task, {"c": {"r": 6}}, seeds=3, rates=(0.01, 0.04), output=tmp_path, overwrite=True)
    assert left == []
    assert len(json.loads((tmp_path / FILE).read_text())["runs"]) == 2 + 3


def test_a_stop_keeps_what_is_done(task: dict[str, Any], fake: Fake, tmp_path: Path) -> None:
    def stop() -> None:
        if len(fake.ran) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    fake.after = stop
    with pytest.raises(Stopped) as stopped:
        compare(task, METHODS, seeds=2, output=tmp_path)
    assert stopped.value.number == signal.SIGTERM and "what is done is kept" in str(stopped.value)
    done = len(json.loads((tmp_path / FILE).read_text())["runs"])
    assert done == 4 and not (tmp_path / TABLE).exists()
    fake.after = lambda: None
    compare(task, METHODS, seeds=2, output=tmp_path)
    assert len(fake.ran) == 14 + 1


def test_rule_and_given_rates(task: dict[str, Any], fake: Fake, tmp_path: Path) -> None:
    compare(task, METHODS, seeds=1, rates="rule", output=tmp_path / "rule")
    assert [values["learning_rate"] for _, values, _ in fake.ran] == [0.01, 0.01]
    fake.ran.clear()
    compare(task, METHODS, seeds=1, rates=(0.5, 0.04), output=tmp_path / "given")
    assert {values["learning_rate"] for _, values, _ in fake.ran} == {0.04, 0.5}


def test_a_rate_that_diverges_is_told(
    task: dict[str, Any], fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for share in (0.25, 0.5):
        fake.outcomes[f"a | lr 0.04 | share {share:g} | seed 0"] = (
            "diverged",
            "The loss is nan\n.",
        )
    compare(task, METHODS, seeds=1, output=tmp_path)
    runs = json.loads((tmp_path / FILE).read_text())["runs"]
    assert runs["a | lr 0.04 | share 0.25 | seed 0"]["diverged"] == "The loss is nan"
    assert "a | lr 0.01 | share 1 | seed 0" in runs
    out = capsys.readouterr().out
    assert "lr 0.04 | share 0.25 | seed 0: diverged" in out
    assert out.count("the pooler is new") == 1 and "(a, b)" in out


def test_every_method_is_looked_at_before_the_first_run(
    task: dict[str, Any], fake: Fake, tmp_path: Path
) -> None:
    fake.outcomes["a"] = ("refused", "no such layer\nFix: name another.")
    fake.outcomes["b"] = ("crashed", "Traceback ...")
    with pytest.raises(RunError) as error:
        compare(task, METHODS, output=tmp_path / "out")
    assert "a: no such layer" in str(error.value) and "b: Traceback" in str(error.value)
    assert fake.ran == [] and not (tmp_path / "out").exists()


def test_what_the_model_cannot_have_may_be_left_out(
    task: dict[str, Any], fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.outcomes["b"] = ("refused", "there are no biases\nFix: use another.")
    with pytest.raises(RunError, match=r"(?s)b: there are no .*Fix: see each, or leave b out of"):
        compare(task, METHODS, seeds=1, rates="rule", output=tmp_path)
    out = compare(task, METHODS, seeds=1, rates="rule", output=tmp_path, leave_out=True)
    assert "left out  b: there are no biases\n" in capsys.readouterr().out
    found = json.loads((out / FILE).read_text())
    assert [row["title"] for row in found["summary"]["rows"]] == ["a"] == list(found["methods"])
    fake.outcomes["c"] = ("refused", "no such model")
    with pytest.raises(RunError, match="c: no such model"):
        compare(task, {"c": {}}, output=tmp_path / "none", leave_out=True)


def test_a_stop_while_seeds_are_added_leaves_no_table_of_fewer(
    task: dict[str, Any], fake: Fake, tmp_path: Path
) -> None:
    compare(task, METHODS, seeds=1, rates="rule", output=tmp_path)
    assert (tmp_path / TABLE).exists() and (tmp_path / REPORT).exists()
    fake.after = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped):
        compare(task, METHODS, seeds=2, rates="rule", output=tmp_path)
    assert not (tmp_path / TABLE).exists() and not (tmp_path / REPORT).exists()
    fake.after = lambda: None
    compare(task, METHODS, seeds=2, rates="rule", output=tmp_path)
    assert (tmp_path / TABLE).exists()


def test_a_method_that_cannot_go_on_is_named_when_the_others_are_done(
    task: dict[str, Any], fake: Fake, tmp_path: Path
) -> None:
    fake.outcomes["a | lr 0.01 | share 0.25 | seed 0"] = ("refused", "The disk is full.")
    with pytest.raises(RunError, match=r"(?s)could not go on:\n  - a: a . lr 0.01 .*disk is full"):
        compare(task, METHODS, seeds=2, output=tmp_path)
    found = json.loads((tmp_path / FILE).read_text())
    assert [row["title"] for row in found["summary"]["rows"]] == ["b"]
    assert "| b " in (tmp_path / TABLE).read_text()
    fake.outcomes.clear()
    compare(task, METHODS, seeds=2, output=tmp_path)
    assert "| a " in (tmp_path / TABLE).read_text()


def test_a_stop_before_the_first_run_is_done_leaves_a_folder_to_go_on_in(
    task: dict[str, Any], fake: Fake, tmp_path: Path
) -> None:
    fake.after = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped):
        compare(task, METHODS, seeds=1, output=tmp_path)
    (tmp_path / RUNNING / "run").mkdir(parents=True)
    fake.after = lambda: None
    compare(task, METHODS, seeds=1, output=tmp_path)
    (tmp_path / FILE).unlink()
    for name in (TABLE, REPORT):
        (tmp_path / name).unlink()
    (tmp_path / RUNNING).mkdir()
    compare(task, METHODS, seeds=1, output=tmp_path)


def test_what_is_overwritten_stays_until_all_methods_can_be_run(
    task: dict[str, Any], fake: Fake, tmp_path: Path
) -> None:
    compare(task, METHODS, seeds=1, rates="rule", output=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    fake.outcomes["c"] = ("refused", "no such layer")
    with pytest.raises(RunError, match="c: no such layer"):
        compare(task, {"c": {"r": 2}}, output=tmp_path, overwrite=True)
    assert (tmp_path / FILE).read_bytes() == before and (tmp_path / REPORT).is_file()


CHANGES = pytest.mark.parametrize(
    ("key", "message"),
    [("base", "the base model's weights changed"), ("tokenizer", "the tokenizer changed")],
)


@CHANGES
@pytest.mark.parametrize("more", [{}, {"c": {"r": 6}}])
def test_another_base_is_refused_before_the_first_run(
    task: dict[str, Any], fake: Fake, tmp_path: Path, key: str, message: str, more: dict[str, Any]
) -> None:
    compare(task, METHODS, seeds=1, rates="rule", output=tmp_path)
    before, ran = (tmp_path / FILE).read_bytes(), len(fake.ran)
    fake.digests |= {key: "other"}
    with pytest.raises(RunError, match=f"(?s)holds another comparison:.*{message}"):
        compare(task, METHODS | more, seeds=1, rates="rule", output=tmp_path)
    assert (tmp_path / FILE).read_bytes() == before and len(fake.ran) == ran
    compare(task, METHODS, seeds=1, rates="rule", output=tmp_path, overwrite=True)


@CHANGES
def test_a_run_of_another_base_is_done_again_once_that_is_restored(
    task: dict[str, Any], fake: Fake, tmp_path: Path, key: str, message: str
) -> None:
    right = dict(fake.digests)

    def exchange() -> None:
        Path(fake.ran[-1][1]["output"]).mkdir(parents=True)
        fake.digests |= {key: "other"}

    fake.after = exchange
    with pytest.raises(RunError, match=rf"(?s)b \| lr 0.01 .*{message}.*Fix: restore"):
        compare(task, METHODS, seeds=1, rates="rule", output=tmp_path)
    assert list((tmp_path / RUNNING).iterdir()) == []
    fake.after, fake.digests = lambda: None, right
    compare(task, METHODS, seeds=1, rates="rule", output=tmp_path)
    assert len(fake.ran) == 4


def test_the_model_at_hand_must_be_there_whatever_is_left_out(
    task: dict[str, Any], fake: Fake, tmp_path: Path
) -> None:
    compare(task, METHODS, seeds=1, rates="rule", output=tmp_path)
    fake.outcomes |= {"c": ("refused", "no such model"), "the model": ("refused", "it is gone")}
    for methods in (METHODS, METHODS | {"c": {}}):
        with pytest.raises(RunError, match=r"(?s)compared with the record's:.*it is gone"):
            compare(task, methods, seeds=1, rates="rule", output=tmp_path, leave_out=True)


def test_a_record_that_says_less_of_its_models_is_gone_on_with(
    task: dict[str, Any], fake: Fake, tmp_path: Path
) -> None:
    compare(task, METHODS, seeds=1, rates="rule", output=tmp_path)
    text = (tmp_path / FILE).read_text()
    less = text.replace(', "tokenizer": "t"', "")
    assert less.count('"base": "b"') == 4 and "tokenizer" not in less
    (tmp_path / FILE).write_text(less)
    compare(task, METHODS, seeds=2, rates="rule", output=tmp_path)
    fake.digests |= {"tokenizer": "other"}
    with pytest.raises(RunError, match="the tokenizer changed"):
        compare(task, METHODS, seeds=2, rates="rule", output=tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rate": 1e-3}, ConfigError, "would favour the methods that it suits"),
        ({"validation_share": 0.0}, ConfigError, "chosen on a validation part"),
        ({"test_share": 0.0}, ConfigError, "there is no test part"),
        ({"data": "nowhere.csv"}, DataError, "nowhere.csv"),
        ({"rank": 3}, ConfigError, "a: unknown key rank"),
        ({"galore_rank": 3}, ConfigError, "galore_rank=3 has no effect with any of the methods"),
        ({"max_samples": 3}, ConfigError, "max_samples=3 has no effect with task=classification"),
    ],
)
def test_refusals_leave_nothing_behind(
    task: dict[str, Any],
    fake: Fake,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        compare(task | changes, METHODS, output=tmp_path / "out")
    assert fake.ran == [] and not (tmp_path / "out").exists()


def test_folders_that_are_no_comparison(task: dict[str, Any], fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"other files \(notes.txt\) and no comparison"):
        compare(task, METHODS, output=tmp_path, overwrite=True)
    busy = tmp_path / "busy"
    busy.mkdir()
    with held(busy, lambda: None), pytest.raises(RunError, match="Another process"):
        compare(task, METHODS, output=busy)
    assert (tmp_path / "notes.txt").read_text() == "mine" and fake.examined == []


def test_the_folder_by_default(
    task: dict[str, Any], fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = compare(task, METHODS, seeds=1, rates="rule")
    assert str(out) == "runs/compare-model-data"
    assert str(compare(task | {"name": "x"}, METHODS, seeds=1, rates="rule")) == "runs/compare-x"


def test_a_process_that_dies_is_named() -> None:
    ours, theirs = processes.multiprocessing.Pipe(duplex=False)
    theirs.close()
    dead = Process()
    dead.exitcode = -9  # type: ignore[misc]
    kind, reason = processes.Task("a | lr 1", dead, ours).outcome()  # type: ignore[arg-type]
    assert kind == "refused" and "a | lr 1 ended with code -9 (killed; perhaps for want" in reason


class Pipe:
    """Takes what a worker sends."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, value: Any) -> None:
        """Keep it."""
        self.sent.append(value)

    def close(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (Stopped(15, "stopped"), "stopped"),
        (RunError("full"), "refused"),
        (worker.torch.OutOfMemoryError("CUDA out of memory"), "refused"),
        (ValueError("defect"), "crashed"),
    ],
)
def test_what_a_worker_tells(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, kind: str
) -> None:
    monkeypatch.setattr(os, "setsid", lambda: None)

    def work() -> dict[str, Any]:
        raise raised

    pipe = Pipe()
    connection: Connection = pipe  # type: ignore[assignment]
    worker.serve(connection, worker.torch.get_num_threads(), work)
    assert pipe.sent[0][0] == kind
    assert kind != "refused" or "memory" not in str(raised) or "Fix: a smaller" in pipe.sent[0][1]


def test_curves_are_means_over_the_same_steps_whatever_a_run_logged() -> None:
    every = {step: float(step) for step in range(1, 121)}
    some = {step: float(step) for step in range(2, 41, 2)}
    whole, short = worker._thinned(every, 120), worker._thinned(some, 120)
    assert [step for step, _ in whole] == list(range(2, 121, 2))
    assert [step for step, _ in short] == list(range(2, 41, 2))
    assert whole[:2] == [[2, 1.5], [4, 3.5]] and short[:2] == [[2, 2.0], [4, 4.0]]
    assert worker._thinned({}, None) == []


def test_a_line_of_a_log_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert list(worker._events(log)) == [{"event": "step", "step": 1}]


def test_real_runs_in_processes_of_their_own(task: dict[str, Any], tmp_path: Path) -> None:
    methods = choose("head,dora")
    out = compare(task, methods, seeds=2, rates="rule", output=tmp_path, jobs=2)
    found = json.loads((out / FILE).read_text())
    assert len(found["runs"]) == 4 and not (out / RUNNING).exists()
    for key, run in found["runs"].items():
        assert run["test"]["rows"] > 0 and run["peak_bytes"] > 0 and run["seconds_per_step"] > 0
        assert len(run["loss"]) == 4 and run["loss"][-1][0] == 4 and run["machine"], key
    assert worker.identify(task).items() <= run.items()
    rows = {row["title"]: row for row in found["summary"]["rows"]}
    assert rows["dora"]["trainable"] > rows["head"]["trainable"] > 0
    assert "dora" in (out / REPORT).read_text() and "dora" in (out / TABLE).read_text()
    assert methods["dora"] == NAMED["dora"] and comparing.TEST_SHARE == 0.2
