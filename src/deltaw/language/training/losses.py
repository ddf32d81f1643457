"""The losses of pairs that `trl.DPOTrainer` has for every pair by itself, for scores.

With g = log p - log p_ref of an answer, m = β (g_c - g_r), ε the smoothing, S(x) = -log P(x)
and P(x) = 1 / (1 + exp(-x)):

    sigmoid       (1-ε) S(m) + ε S(-m)                    arXiv 2305.18290; ε: Mitchell 2023, "cDPO"
    robust        ((1-ε) S(m) - ε S(-m)) / (1-2ε)         arXiv 2403.00409
    hinge         max(0, 1 - m)                           arXiv 2305.10425
    ipo           (g_c / n_c - g_r / n_r - 1 / (2β))²     arXiv 2310.12036; n: tokens of the answer
    sigmoid_norm  S(β (g_c / n_c - g_r / n_r))            arXiv 2411.15124
    exo_pair      KL((P(m), P(-m)) || (1-ε, ε))           arXiv 2402.00856
    nca_pair      S(β g_c) + (S(-β g_c) + S(-β g_r)) / 2  arXiv 2402.05369
    bco_pair      S(β g_c) + S(-β g_r)                    arXiv 2404.04656
    sppo_hard     (g_c - 1 / (2β))² + (g_r + 1 / (2β))²   arXiv 2405.00675
    apo_zero      P(-β g_c) + P(β g_r)                    arXiv 2408.06266
    apo_down      P(β g_c) + P(-m)                        arXiv 2408.06266
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deltaw.train.recipe import Recipe

if TYPE_CHECKING:
    from trl import DPOTrainer

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairLoss:
    """A loss of pairs by its name, `beta` and label `smoothing`."""

    name: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> "PairLoss":
        """Return the loss that a recipe asks for."""
        return cls(recipe.pref_loss, recipe.pref_beta, recipe.dpo_label_smoothing)

    def __call__(self, gained: Floats, sizes: Floats) -> Floats:
        """Return the loss of each pair from gains and sizes of its answers, each (pairs, 2)."""
        beta, eps = self.beta, self.smoothing
        chosen, rejected = gained.T
        margin = beta * (chosen - rejected)
        match self.name:
            case "sigmoid":
                return (1 - eps) * _soft(margin) + eps * _soft(-margin)
            case "robust":
                return ((1 - eps) * _soft(margin) - eps * _soft(-margin)) / (1 - 2 * eps)
            case "hinge":
                return np.maximum(0, 1 - margin)
            case "exo_pair":
                better = _sigma(margin) * (_soft(margin) + np.log1p(-eps))
                return -better - _sigma(-margin) * (_soft(-margin) + np.log(eps))
            case "nca_pair":
                away = _soft(-beta * chosen) + _soft(-beta * rejected)
                return _soft(beta * chosen) + away / 2
            case "bco_pair":
                return _soft(beta * chosen) + _soft(-beta * rejected)
            case "sppo_hard":
                half = 1 / (2 * beta)
                return (chosen - half) ** 2 + (rejected + half) ** 2
            case "apo_zero":
                return _sigma(-beta * chosen) + _sigma(beta * rejected)
            case "apo_down":
                return _sigma(beta * chosen) + _sigma(-margin)
        means = gained / sizes
        apart = means[:, 0] - means[:, 1]
        return (apart - 1 / (2 * beta)) ** 2 if self.name == "ipo" else _soft(beta * apart)

    def set(self, trainer: "DPOTrainer") -> None:
        """Make a trainer learn by this loss.

        TRL's sigmoid has no smoothing. S(-m) = S(m) + m, so it is TRL's robust loss with
        ε' = ε / (2ε - 1).
        """
        trainer.beta = self.beta
        trainer.loss_types, trainer.label_smoothing = [self.name], self.smoothing
        if self.name == "sigmoid" and self.smoothing:
            trainer.loss_types = ["robust"]
            trainer.label_smoothing = self.smoothing / (2 * self.smoothing - 1)


def _soft(values: Floats) -> Floats:
    """Return S(x) = -log P(x)."""
    return np.logaddexp(0, -values)


def _sigma(values: Floats) -> Floats:
    return np.exp(-_soft(values))
