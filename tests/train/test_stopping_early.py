"""After how many evaluations without a better score a run ends."""

from types import SimpleNamespace

import pytest
from transformers import TrainerState

from deltaw.train.interrupt import Interrupt
from deltaw.train.loop import Flow, is_done


def state(scores: list[float], best: int) -> TrainerState:
    """A state with one evaluation in each step, of which `best` is the state that is kept."""
    history = [{"step": n, "eval_accuracy": s, "eval_loss": 1 / n} for n, s in enumerate(scores, 1)]
    found = TrainerState(global_step=len(scores), best_global_step=best, log_history=history)
    found.best_metric = scores[best - 1]
    return found


@pytest.mark.parametrize(
    ("scores", "best", "ends"),
    [
        ([0.5, 0.5, 0.5], 3, True),
        ([0.5, 0.6, 0.6], 3, False),
        ([0.5, 0.6, 0.5, 0.6], 4, True),
        ([0.5, 0.4, 0.6], 3, False),
        ([0.6, 0.4, 0.5], 1, True),
    ],
)
def test_equal_scores_are_no_better(scores: list[float], best: int, ends: bool) -> None:
    control = SimpleNamespace(should_training_stop=False)
    args = SimpleNamespace(metric_for_best_model="accuracy")
    Flow(Interrupt(), 2).on_save(args, state(scores, best), control)
    assert control.should_training_stop == ends
    assert is_done(state(scores, best), 99, 2, "accuracy") == ends
    assert not is_done(state(scores, best), 99, None, "accuracy")
