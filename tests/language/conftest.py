"""One tiny language model and one file of conversations, shared by the tests of runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.language.models import conversations, make_model, write_json
from tests.train.conftest import deltaw_command, tiny

from deltaw.language.generating import Sampling
from deltaw.language.training import trying

__all__ = ["deltaw_command", "tiny"]


@pytest.fixture(autouse=True, scope="session")
def few_words() -> Iterator[None]:
    """Answers during training are of few tokens, which is most of what a tiny run takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trying, "ANSWER", Sampling(max_new_tokens=4))
        yield


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `data.json`."""
    folder = tmp_path_factory.mktemp("talker")
    make_model(folder / "model")
    write_json(folder / "data.json", conversations(24))
    return folder
