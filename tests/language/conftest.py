"""One tiny language model and one file of conversations, shared by the tests of runs."""

from pathlib import Path

import pytest
from tests.language.models import conversations, make_model, write_json
from tests.train.conftest import deltaw_command

__all__ = ["deltaw_command"]


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `data.json`."""
    folder = tmp_path_factory.mktemp("talker")
    make_model(folder / "model")
    write_json(folder / "data.json", conversations(24))
    return folder
