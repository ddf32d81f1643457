"""The run of labelled texts on tensors without memory, as our trainer of them does it."""

from typing import Any

import torch
from torch import Tensor

from deltaw.language.memory.running import RecipeRun, read
from deltaw.train.loop import loss


class TextRun(RecipeRun):
    """Training with a head for labels."""

    def loss(self, model: Any) -> Tensor:
        """Return the loss of the largest batch."""
        shape = self.batches.trained
        labels = torch.zeros(shape.rows, dtype=torch.long)
        if model.config.num_labels == 1:
            labels = labels.float()
        return loss(model(**read(model, shape.rows, shape.tokens)), labels)

    def between(self, model: Any) -> None:
        """Compute the outputs of the largest batch of held-out rows."""
        scored = self.batches.scored
        if scored is None:
            return
        model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            model(**read(model, scored.rows, scored.tokens))
        model.train()
