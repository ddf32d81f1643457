"""The rules of the test suite itself: shared data, skips and their count."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS_SHARED = """
import pytest

def test_needs_shared(shared): pass
def test_needs_a_device(): pytest.skip("no GPU: none found")
def test_runs(): pass
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A checkout of two skipping tests and one passing, whose shared folder is absent."""
    tests = tmp_path / "checkout" / "tests"
    tests.mkdir(parents=True)
    (tests / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text("utf-8"), "utf-8")
    (tests / "test_sample.py").write_text(NEEDS_SHARED, "utf-8")
    return tests


def run(suite: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DELTAW_", "PYTEST_", "HF_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(suite)],
        env=inherited | variables,
        cwd=suite,
        capture_output=True,
        text=True,
    )


def test_absent_data_is_skipped_by_default(suite: Path) -> None:
    result = run(suite)
    assert result.returncode == 0
    assert "1 passed, 2 skipped" in result.stdout.splitlines()[-1]


def test_absent_data_stops_the_whole_suite(suite: Path) -> None:
    result = run(suite, DELTAW_TEST_ALL="1")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "DELTAW_SHARED" in result.stderr


@pytest.mark.parametrize("options", [(), ("--numprocesses", "1")])
def test_allowed_absence_is_counted_in_the_last_line(suite: Path, options: tuple[str]) -> None:
    result = run(suite, *options, DELTAW_TEST_ALL="1", DELTAW_ALLOW_MISSING="1")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "skipped: 2 (shared data absent: 1, no GPU: 1)"


def test_present_data_is_used(suite: Path) -> None:
    (suite.parents[1] / "shared").mkdir()
    result = run(suite, DELTAW_TEST_ALL="1")
    assert result.stdout.splitlines()[-1] == "skipped: 1 (no GPU: 1)"
