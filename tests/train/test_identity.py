"""A run goes on its own base only, whatever its method and wherever the weights differ."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tests.train.models import make_model, messages, write_csv

from deltaw.errors import FormatError, RunError
from deltaw.train.opened import open_run
from deltaw.train.recipe import parse
from deltaw.train.run import train


@pytest.mark.parametrize("method", ["lora", "head", "bitfit"])
@pytest.mark.parametrize("changed", ["word_embeddings.weight", "LayerNorm.bias"])
def test_another_base_is_refused(tmp_path: Path, method: str, changed: str) -> None:
    model = make_model(tmp_path / "model")
    run = train(
        parse(
            {
                "model": str(model),
                "data": str(write_csv(tmp_path / "data.csv", messages(24))),
                "output": str(tmp_path / "run"),
                "max_steps": 1,
                "method": method,
            }
        ),
        silent=True,
    )
    open_run(run)
    base = transformers.AutoModel.from_pretrained(model)
    name = next(name for name, _ in base.named_parameters() if name.endswith(changed))
    with torch.no_grad():
        base.get_parameter(name).view(-1)[3] += 0.25
    base.save_pretrained(tmp_path / "other")
    with pytest.raises(RunError, match="not those that this run was trained on"):
        open_run(run, model=str(tmp_path / "other"))


@pytest.fixture(scope="module", params=["lora", "full"])
def labelled_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three classes, and what its recipe says."""
    folder = tmp_path_factory.mktemp("labelled")
    values = {
        "model": str(make_model(folder / "model")),
        "data": str(write_csv(folder / "data.csv", messages(24))),
        "output": str(folder / "run"),
        "max_steps": 1,
        "method": request.param,
    }
    return train(parse(values), silent=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("  - cancel\n  - refund\n", r"2 (labels|now)"),
        ("  - cancel\n", "1 label of its record"),
        ("", "0 labels of its record"),
    ],
)
def test_a_run_that_lost_labels_is_not_opened(
    labelled_run: Path, tmp_path: Path, labels: str, message: str
) -> None:
    shutil.copytree(labelled_run, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    text = recipe.read_text("utf-8")
    whole = "  labels:\n  - cancel\n  - refund\n  - ship\n"
    assert whole in text
    recipe.write_text(text.replace(whole, f"  labels:{labels and chr(10)}{labels or ' []'}\n"))
    with pytest.raises((RunError, FormatError), match=message) as caught:
        open_run(tmp_path / "run")
    assert "Fix: restore" in str(caught.value)
