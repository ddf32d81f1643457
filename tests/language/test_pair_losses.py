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
from deltaw.language.training.pairs import score as score_pairs
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
SAID = np.array([[-2.0, -9.5], [-7.0, -1.0], [-0.1, -20.0]])


def five_pairs(talker: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """What a recipe says of five pairs whose answers have different lengths."""
    rows = [{"prompt": f"{n}?", "chosen": " yes" * (n + 1), "rejected": " no"} for n in range(5)]
    data = write_json(folder / "pairs.json", rows)
    return {"model": str(talker / "model"), "data": str(data), **more}


@pytest.fixture(scope="module")
def trained(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A job of five pairs whose adapters have moved, and its trainer."""
    folder = tmp_path_factory.mktemp("losses")
    asked = five_pairs(talker, folder, validation_share=0, batch_size=5)
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
    trainer.pair_loss = PairLoss(name, 0.3, eps, 0.7)
    trainer.pair_loss.set(trainer)
    (batch,) = trainer.get_train_dataloader()
    learnt = trainer.compute_loss(trainer.model, batch).item()
    choices = {"pref_loss": name, "pref_beta": 0.3, "dpo_label_smoothing": eps, "simpo_gamma": 0.7}
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


def loss_of(loss: PairLoss, gained: Any) -> Any:
    """The loss of gains, for a reference that is not 0."""
    return loss(gained + SAID, SAID, SIZES)


def test_the_smoothing_of_the_sigmoid_is_a_mixture_of_both_labels() -> None:
    right, wrong = (loss_of(PairLoss("sigmoid", 0.3), g) for g in (GAINED, GAINED[:, ::-1]))
    mixed = loss_of(PairLoss("sigmoid", 0.3, 0.2), GAINED)
    np.testing.assert_allclose(mixed, 0.8 * right + 0.2 * wrong, rtol=1e-12)
    robust = PairLoss("robust", 0.3, 0.2)
    unbiased = 0.8 * loss_of(robust, GAINED) + 0.2 * loss_of(robust, GAINED[:, ::-1])
    np.testing.assert_allclose(unbiased, right, rtol=1e-12)


def test_losses_by_hand() -> None:
    margin = 0.3 * (GAINED[:, 0] - GAINED[:, 1])
    hinge = loss_of(PairLoss("hinge", 0.3), GAINED)
    np.testing.assert_allclose(hinge, np.maximum(0, 1 - margin))
    apart = GAINED[:, 0] / SIZES[:, 0] - GAINED[:, 1] / SIZES[:, 1]
    np.testing.assert_allclose(loss_of(PairLoss("ipo", 0.3), GAINED), (apart - 1 / 0.6) ** 2)
    p, q = 1 / (1 + np.exp(-margin)), np.array([0.9, 0.1])
    divergence = p * np.log(p / q[0]) + (1 - p) * np.log((1 - p) / q[1])
    np.testing.assert_allclose(loss_of(PairLoss("exo_pair", 0.3, 0.1), GAINED), divergence)
    assert np.isfinite(loss_of(PairLoss("sigmoid", 1.0), 1e4 * GAINED)).all()


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_by_hand(name: str) -> None:
    """By the likelihoods per token themselves, to the power of 1 / n."""
    found = PairLoss(name, 2.5, gamma=1.5)(SAID, GAINED, SIZES)
    q = np.exp(SAID) ** (1 / SIZES)
    odds = q / (1 - q)
    if name == "simpo":
        ratio = (q[:, 0] / q[:, 1]) ** 2.5 * np.exp(-1.5)
        wanted = -np.log(ratio / (1 + ratio))
    else:
        ratio = odds[:, 0] / odds[:, 1]
        wanted = -np.log(q[:, 0]) - 2.5 * np.log(ratio / (1 + ratio))
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    sure = PairLoss(name, 1.0)(0 * SAID, SAID, SIZES)
    assert np.isfinite(sure).all()

    said, sizes = torch.tensor(SAID), torch.tensor(SIZES)
    learnt = PairLoss(name, 2.5, gamma=1.5).of_tokens(said, sizes)
    np.testing.assert_allclose(learnt.item(), wanted.mean(), rtol=1e-10)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_what_is_certain_has_a_gradient(name: str) -> None:
    said = torch.tensor([[0.0, -3.0], [-1e-9, -8.0]], requires_grad=True)
    loss = PairLoss(name, 0.1).of_tokens(said, torch.tensor([[3, 4], [2, 9]]))
    loss.backward()
    assert loss.isfinite() and said.grad is not None and said.grad.isfinite().all()


def test_losses_without_a_reference_compare_tokens() -> None:
    loss = PairLoss("simpo", 2.0)
    score = score_pairs(SAID, np.full_like(SAID, 99.0), SIZES, loss)
    ahead = 2 * (SAID[:, 0] / SIZES[:, 0] - SAID[:, 1] / SIZES[:, 1])
    assert score.values["margin"] == pytest.approx(ahead.mean())
    assert score.values["accuracy"] == pytest.approx((ahead > 0).mean())


def test_nothing_is_asked_of_a_reference_that_is_not_there(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = five_pairs(talker, tmp_path, validation_share=1, pref_loss="simpo")
    monkeypatch.setattr(Pairs, "log_p", lambda *_: pytest.fail("the reference is asked"))
    job = prepare(settle(parse(asked)), Console())
    job.show_rows(Console())
    job.foresee(Console())
    assert "4 pairs; there is no reference" in capsys.readouterr().out
    assert "ahead by 5 in log p per token" in "".join(job.warnings)
    kinder = parse(asked | {"pref_beta": 2, "simpo_gamma": 1})
    assert not prepare(settle(kinder), Console(silent=True)).warnings


def test_adapters_are_tried_on_the_shortest_rows_and_no_more_than_a_batch(
    talker: Path, tmp_path: Path
) -> None:
    more = {"validation_share": 0, "batch_size": 2, "gradient_checkpointing": True}
    asked = five_pairs(talker, tmp_path, **more)
    job = prepare(settle(parse(asked)), Console(silent=True))
    lengths = [len(r.input_ids) for side in job.train.judged.sides().values() for r in side]
    with Interrupt() as interrupt:
        trainer = job.trainer(tmp_path, interrupt, make_progress(job, Console(silent=True)))
    assert job.probe(trainer)["input_ids"].shape == (2, sorted(lengths)[1])
    assert any(getattr(part, "gradient_checkpointing", False) for part in job.model.modules())
