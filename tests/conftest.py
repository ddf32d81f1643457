"""What every test stands on: no network, the shared data, and a count of what was skipped."""

import gc
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

SHARED = Path(os.environ.get("DELTAW_SHARED") or Path(__file__).parents[2] / "shared").resolve()
TEST_ALL = "DELTAW_TEST_ALL" in os.environ
ALLOW_MISSING = os.environ.get("DELTAW_ALLOW_MISSING") == "1"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Set before transformers, datasets or their subprocesses are imported, which read them once.
os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1"
)
if not IS_WORKER:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="deltaw-hf-")

# Nothing may depend on the machine's speed; the whole suite draws new examples in each run.
settings.register_profile(
    "deltaw", deadline=None, derandomize=not TEST_ALL, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("deltaw")


def pytest_configure() -> None:
    if TEST_ALL and not ALLOW_MISSING and not SHARED.is_dir():
        raise pytest.UsageError(
            f"the whole suite needs the shared data, and {SHARED} is absent: "
            "set DELTAW_SHARED to its folder, or DELTAW_ALLOW_MISSING=1 to skip what needs it"
        )


def pytest_collection_finish() -> None:
    """Training runs collect garbage, which is slow among the objects of thousands of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No test depends on which ones ran before it, nor on how many threads they asked for."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, models and adapters beside the checkout (`DELTAW_SHARED`)."""
    if not SHARED.is_dir():
        pytest.skip(f"shared data absent: {SHARED}")
    return SHARED


def skip_line(reasons: Iterable[str]) -> str:
    """`skipped: 3 (shared data absent: 2, no GPU: 1)`: reasons are counted up to their colon."""
    counts = Counter(reason.removeprefix("Skipped: ").partition(":")[0] for reason in reasons)
    detail = ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())
    return f"skipped: {counts.total()}" + (f" ({detail})" if detail else "")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    result = yield
    if IS_WORKER:
        return result
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if TEST_ALL and reporter is not None:
        reporter.write_line(skip_line(r.longrepr[2] for r in reporter.stats.get("skipped", [])))
    return result
