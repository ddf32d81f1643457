"""The losses of pairs: scores have the very loss that TRL trains by."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tests.language.models import write_json

import deltaw
from deltaw.language.choosing import settle
from deltaw.language.training.losses import PairLoss
from deltaw.language.training.pairs import Pairs
from deltaw.language.training.preferring import PreferenceJob, PreferenceTrainer, prepare
from deltaw.train.batches import padded_tokens
from deltaw.train.console import Console
from deltaw.train.effects import SMOOTHED
from deltaw.train.interrupt import Interrupt
from deltaw.train.recipe import Recipe, parse
from deltaw.train.run import make_progress

NAMES = get_args(Recipe.model_fields["pref_loss"].annotation)
CASES = [(name, eps) for name in NAMES for eps in ((0.0, 0.2) if name in SMOOTHED else (0.0,))]
GAINED = np.array([[0.7, -0.2], [-1.5, 0.4], [3.0, 3.0]])
SIZES = np.array([[3, 5], [4, 4], [1, 9]])


@pytest.fixture(scope="module")
def trained(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A job of five pairs whose adapters have moved, and its trainer."""
    folder = tmp_path_factory.mktemp("losses")
    rows = [{"prompt": f"{n}?", "chosen": " yes" * (n + 1), "rejected": " no"} for n in range(5)]
    asked = {
        "model": str(talker / "model"),
        "data": str(write_json(folder / "pairs.json", rows)),
        "validation_share": 0,
        "batch_size": 5,
    }
    console = Console(silent=True)
    job = prepare(settle(parse(asked)), console)
    with Interrupt() as interrupt:
        trainer = job.trainer(folder, interrupt, make_progress(job, console))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return job, trainer


@pytest.mark.parametrize(("name", "eps"), [case for case in CASES if case != ("exo_pair", 0.0)])
def test_a_score_has_the_loss_of_training(trained: Any, name: str, eps: float) -> None:
    job, trainer = trained
    assert isinstance(job, PreferenceJob) and isinstance(trainer, PreferenceTrainer)
    PairLoss(name, 0.3, eps).set(trainer)
    (batch,) = trainer.get_train_dataloader()
    learnt = trainer.compute_loss(trainer.model, batch).item()
    choices = {"pref_loss": name, "pref_beta": 0.3, "dpo_label_smoothing": eps}
    known = job.train
    assert isinstance(known.judged, Pairs)
    scored = known.score(job.model, job.padding, job.recipe.model_copy(update=choices))
    assert scored.values["loss"] == pytest.approx(learnt, rel=2e-5, abs=1e-6)
    with deltaw.disabled(job.model):
        at_start = known.score(job.model, job.padding, job.recipe)
    assert scored.values["loss"] != pytest.approx(at_start.values["loss"], rel=1e-3)


def test_a_pair_is_as_long_as_its_rows(trained: Any) -> None:
    _, trainer = trained
    (batch,) = trainer.get_train_dataloader()
    assert padded_tokens(trainer.order()) == [batch["input_ids"].numel()]


def test_the_smoothing_of_the_sigmoid_is_a_mixture_of_both_labels() -> None:
    right, wrong = (PairLoss("sigmoid", 0.3)(side, SIZES) for side in (GAINED, GAINED[:, ::-1]))
    mixed = PairLoss("sigmoid", 0.3, 0.2)(GAINED, SIZES)
    np.testing.assert_allclose(mixed, 0.8 * right + 0.2 * wrong, rtol=1e-12)
    robust = PairLoss("robust", 0.3, 0.2)
    unbiased = 0.8 * robust(GAINED, SIZES) + 0.2 * robust(GAINED[:, ::-1], SIZES)
    np.testing.assert_allclose(unbiased, right, rtol=1e-12)


def test_losses_by_hand() -> None:
    margin = 0.3 * (GAINED[:, 0] - GAINED[:, 1])
    np.testing.assert_allclose(PairLoss("hinge", 0.3)(GAINED, SIZES), np.maximum(0, 1 - margin))
    apart = GAINED[:, 0] / SIZES[:, 0] - GAINED[:, 1] / SIZES[:, 1]
    np.testing.assert_allclose(PairLoss("ipo", 0.3)(GAINED, SIZES), (apart - 1 / 0.6) ** 2)
    p, q = 1 / (1 + np.exp(-margin)), np.array([0.9, 0.1])
    divergence = p * np.log(p / q[0]) + (1 - p) * np.log((1 - p) / q[1])
    np.testing.assert_allclose(PairLoss("exo_pair", 0.3, 0.1)(GAINED, SIZES), divergence)
    assert np.isfinite(PairLoss("sigmoid", 1.0)(1e4 * GAINED, SIZES)).all()
