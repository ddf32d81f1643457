"""A run goes on its own base only, whatever its method and wherever the weights differ."""

from pathlib import Path

import pytest
import torch
import transformers
from tests.train.models import make_model, messages, write_csv

from deltaw.errors import RunError
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
