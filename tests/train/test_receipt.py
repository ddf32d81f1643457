"""The receipt: what it says is what is done."""

from pathlib import Path
from typing import Any

import pytest
from tests.train.conftest import Command
from tests.train.models import messages, write_csv

from deltaw.errors import ConfigError
from deltaw.train.console import Console
from deltaw.train.data.wording import size
from deltaw.train.recipe import parse
from deltaw.train.run import train


@pytest.fixture
def receipt(deltaw_command: Command, tiny: Path) -> Any:
    """The output of a dry run with these arguments after model and data."""

    def show(*arguments: str | Path, data: Path | None = None) -> str:
        found = deltaw_command(
            "train", tiny / "model", data or tiny / "data.csv", "--dry-run", *arguments
        )
        assert (found[0], found[2]) == (0, "")
        return found[1]

    return show


def test_rows_beyond_the_most_that_are_trained_on_are_counted(receipt: Any) -> None:
    text = receipt("max_train_rows=10")
    assert "60 rows read: 10 training, 6 validation, 44 beyond max_train_rows, 0 skipped" in text


def test_without_validation_rows_nothing_is_said_to_be_evaluated(receipt: Any) -> None:
    text = receipt("validation_share=0", "max_steps=4")
    assert "saved every 1, not evaluated for want of validation rows" in text
    assert "evaluated every" not in text


def test_early_stopping_without_validation_rows_is_refused(tiny: Path) -> None:
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.csv")}
    with pytest.raises(ConfigError, match=r"early_stopping=2 needs validation rows(.|\n)*Fix: "):
        train(parse(values | {"validation_share": 0, "early_stopping": 2}), dry_run=True)


def test_a_dry_run_promises_no_file(receipt: Any, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "data.csv", messages(40) + [("", "ship")] * 6)
    text = receipt(data=data)
    assert "skipped 1 more; a run lists all in its log.jsonl" in text


def test_ranks_that_are_too_high_are_one_warning(receipt: Any) -> None:
    lines = receipt("r=64").splitlines()
    warnings = [line for line in lines if line.startswith("warning")]
    assert warnings == [
        "warning   in 13 layers ΔW cannot have the rank asked for: r=64 is above 16 in query, "
        "key, value, dense"
    ]


@pytest.mark.parametrize("name", ["wandb", "nonsense"])
def test_a_place_to_report_to_that_is_absent_is_one_error(
    deltaw_command: Command,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(
        "deltaw.train.choices.get_available_reporting_integrations", lambda: ["mlflow"]
    )
    code, _, err = deltaw_command(
        "train", tiny / "model", tiny / "data.csv", "-o", tmp_path / "run", f"report_to={name}"
    )
    assert code == 1
    assert err.startswith(f"error: report_to={name}: not installed")
    assert "give all, none, or names of what is installed (mlflow)" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["all", "none"])
def test_reporting_to_all_or_none_is_accepted(receipt: Any, name: str) -> None:
    assert "verify    passed" in receipt(f"report_to={name}")


def test_epochs_that_the_steps_cut_short_are_said_to_be(receipt: Any) -> None:
    assert "10 epochs (as asked, but ended by max_steps=3)" in receipt("epochs=10", "max_steps=3")
    assert "2 epochs (as asked)" in receipt("epochs=2", "max_steps=300")


def test_an_override_of_a_runs_recipe_is_not_held_back_by_what_was_chosen(
    deltaw_command: Command, tiny: Path, tmp_path: Path
) -> None:
    first = train(
        parse(
            {
                "model": str(tiny / "model"),
                "data": str(tiny / "data.csv"),
                "output": str(tmp_path / "run"),
                "epochs": 0.25,
                "validation_share": 0,
            }
        ),
        silent=True,
    )
    code, out, err = deltaw_command(
        "train",
        first / "recipe.yaml",
        "epochs=10",
        "method=head",
        "--output",
        tmp_path / "other",
        "--dry-run",
    )
    assert (code, err) == (0, "")
    assert "40 of 16 rows" in out
    assert "10 epochs (as asked)" in out
    assert "default for a head alone" in out


def test_a_dry_runs_recipe_leaves_open_what_was_not_asked(
    deltaw_command: Command, receipt: Any, tmp_path: Path
) -> None:
    text = receipt()
    (tmp_path / "recipe.yaml").write_text(text[text.index("# The recipe") :], encoding="utf-8")
    _, out, _ = deltaw_command("train", tmp_path / "recipe.yaml", "r=16", "epochs=2", "--dry-run")
    assert "8 of 16 rows" in out
    assert "\n# lora_alpha: 32" in out


def test_a_dry_runs_choices_can_be_fixed_by_taking_their_marks_away(
    deltaw_command: Command, receipt: Any, tmp_path: Path
) -> None:
    text = receipt()
    asked, chosen = text[text.index("# The recipe") :].split("# Chosen for it")
    fixed = chosen.replace("\n# ", "\n").partition("\n")[2]
    (tmp_path / "recipe.yaml").write_text(asked + fixed, encoding="utf-8")
    code, out, err = deltaw_command("train", tmp_path / "recipe.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert "# Chosen" not in out
    assert all(line in out for line in fixed.splitlines())


def test_a_terminal_gets_lines_that_fit_and_the_log_whole_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    console = Console()
    console.log_to(tmp_path / "log.jsonl")
    console.field("advice", "a word and another " + "x" * 50 + " and the rest of the line")
    console.field("next", "deltaw predict some/folder of/a/run/with/blanks", whole=True)
    assert capsys.readouterr().out.splitlines() == [
        "advice    a word and another",
        "          " + "x" * 50,
        "          and the rest of the line",
        "next      deltaw predict some/folder of/a/run/with/blanks",
    ]
    assert len((tmp_path / "log.jsonl").read_text("utf-8").splitlines()) == 2
    assert "x and the rest" in (tmp_path / "log.jsonl").read_text("utf-8")


def test_many_labels_are_broken_between_labels_without_trailing_blanks(
    receipt: Any, tmp_path: Path
) -> None:
    rows = [(f"text {n}", f"a label of some length {n % 9}") for n in range(90)]
    text = receipt(data=write_csv(tmp_path / "data.csv", rows))
    lines = text[text.index("labels  ") : text.index("\nmemory")].split("\n")
    assert len(lines) > 3
    assert all(line == line.rstrip() and len(line) <= 80 for line in lines)
    assert all(line.endswith(",") for line in lines[:-1])


def test_one_of_a_thing_is_singular(receipt: Any) -> None:
    text = receipt("epochs=1", "batch_size=1", "warmup=0.02")
    assert "54 of 1 row, " in text
    assert "; 1 epoch (as asked)" in text
    assert "after 1 warm-up step\n" in text


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "1 byte"), (999, "999 bytes"), (21_300, "21.3 kB"), (9e7, "90.0 MB")]
)
def test_sizes_show_what_is_there(count: int, shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("targets", "advised"),
    [
        ("query,value", True),
        (".*(query|value)", True),
        ("query,key,value,dense", False),
        ("all-linear", False),
    ],
)
def test_only_layers_that_are_left_out_are_advised(
    receipt: Any, targets: str, advised: bool
) -> None:
    assert ("adapting all linear layers" in receipt("--targets", targets)) is advised


def test_no_layers_at_all_are_a_choice(receipt: Any) -> None:
    assert "adapting all linear" not in receipt("target_modules=[]", "modules_to_save=[classifier]")
