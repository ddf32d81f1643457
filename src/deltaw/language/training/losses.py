"""The losses of pairs, each of a pair by itself: those of `trl.DPOTrainer`, SimPO's and ORPO's.

With l = log p of an answer, g = l - log p_ref, n its tokens, m = β (g_c - g_r), ε the smoothing,
S(x) = -log P(x) and P(x) = 1 / (1 + exp(-x)):

    sigmoid       (1-ε) S(m) + ε S(-m)                    arXiv 2305.18290; ε: Mitchell 2023, "cDPO"
    robust        ((1-ε) S(m) - ε S(-m)) / (1-2ε)         arXiv 2403.00409
    hinge         max(0, 1 - m)                           arXiv 2305.10425
    ipo           (g_c / n_c - g_r / n_r - 1 / (2β))²     arXiv 2310.12036
    sigmoid_norm  S(β (g_c / n_c - g_r / n_r))            arXiv 2411.15124
    exo_pair      KL((P(m), P(-m)) || (1-ε, ε))           arXiv 2402.00856
    nca_pair      S(β g_c) + (S(-β g_c) + S(-β g_r)) / 2  arXiv 2402.05369
    bco_pair      S(β g_c) + S(-β g_r)                    arXiv 2404.04656
    sppo_hard     (g_c - 1 / (2β))² + (g_r + 1 / (2β))²   arXiv 2405.00675
    apo_zero      P(-β g_c) + P(β g_r)                    arXiv 2408.06266
    apo_down      P(β g_c) + P(-m)                        arXiv 2408.06266
    simpo         S(β (l_c / n_c - l_r / n_r) - gamma)    arXiv 2405.14734, equation 6
    orpo          -l_c / n_c + β S(o_c - o_r)             arXiv 2403.07691, equations 6 and 7

where o = log q - log(1 - q) are the log odds of q = exp(l / n). The last two have no reference.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from deltaw.train.recipe import Recipe

if TYPE_CHECKING:
    from trl import DPOTrainer

Floats = NDArray[np.float64]
ALONE = ("simpo", "orpo")
CERTAIN = -1e-6
"""The log of the largest q, whose odds are finite."""


@dataclass(frozen=True, slots=True)
class PairLoss:
    """A loss of pairs by its name, `beta` and label `smoothing`; `gamma` is SimPO's margin."""

    name: str = "sigmoid"
    beta: float = 0.1
    smoothing: float = 0.0
    gamma: float = 0.5

    @classmethod
    def of(cls, recipe: Recipe) -> "PairLoss":
        """Return the loss that a recipe asks for."""
        smoothing, gamma = recipe.dpo_label_smoothing, recipe.simpo_gamma
        return cls(recipe.pref_loss, recipe.pref_beta, smoothing, gamma)

    @property
    def alone(self) -> bool:
        """Whether it has no reference."""
        return self.name in ALONE

    def margins(self, said: Floats, reference: Floats, sizes: Floats) -> Floats:
        """Return how far better answers are ahead: m, or β (l_c / n_c - l_r / n_r) if `alone`."""
        ahead = said / sizes if self.alone else said - reference
        return self.beta * (ahead[:, 0] - ahead[:, 1])

    def __call__(self, said: Floats, reference: Floats, sizes: Floats) -> Floats:
        """Return the loss of each pair from log p, log p_ref and n of its answers, (pairs, 2)."""
        beta, eps = self.beta, self.smoothing
        gained = said - reference
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
            case "simpo":
                better, worse = (said / sizes).T
                return _soft(beta * (better - worse) - self.gamma)
            case "orpo":
                means = np.minimum(said / sizes, CERTAIN)
                better, worse = (means - np.log(-np.expm1(means))).T
                return beta * _soft(better - worse) - means[:, 0]
        means = gained / sizes
        apart = means[:, 0] - means[:, 1]
        return (apart - 1 / (2 * beta)) ** 2 if self.name == "ipo" else _soft(beta * apart)

    def set(self, trainer: "DPOTrainer") -> None:
        """Make a trainer learn by this loss.

        TRL's sigmoid has no smoothing. S(-m) = S(m) + m, so it is TRL's robust loss with
        ε' = ε / (2ε - 1). Those without a reference are not TRL's.
        """
        trainer.beta = self.beta
        if self.alone:
            return
        trainer.loss_types, trainer.label_smoothing = [self.name], self.smoothing
        if self.name == "sigmoid" and self.smoothing:
            trainer.loss_types = ["robust"]
            trainer.label_smoothing = self.smoothing / (2 * self.smoothing - 1)

    def of_tokens(self, said: Tensor, sizes: Tensor) -> Tensor:
        """Return a loss without a reference, in the mean over pairs, for training.

        `said` are log p of the answers and `sizes` their n, (pairs, 2).
        """
        means = said / sizes
        if self.name == "simpo":
            return -logsigmoid(self.beta * (means[:, 0] - means[:, 1]) - self.gamma).mean()
        means = means.clamp(max=CERTAIN)
        better, worse = (means - torch.log(-torch.expm1(means))).unbind(-1)
        return (-self.beta * logsigmoid(better - worse) - means[:, 0]).mean()


def _soft(values: Floats) -> Floats:
    """Return S(x) = -log P(x)."""
    return np.logaddexp(0, -values)


def _sigma(values: Floats) -> Floats:
    return np.exp(-_soft(values))
