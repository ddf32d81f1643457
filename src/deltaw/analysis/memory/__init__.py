"""How much memory a training run takes, before any weight is read.

estimate("some/model", Training(method="lora", rows=4, tokens=512)).text(available())
"""

from deltaw.analysis.memory.estimate import Estimate, estimate
from deltaw.analysis.memory.machine import Machine, available
from deltaw.analysis.memory.training import Training

__all__ = ["Estimate", "Machine", "Training", "available", "estimate"]
