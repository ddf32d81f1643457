"""The validation loss of every data set by itself, beside that of all of them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from deltaw.language.data.corpus import Corpus
from deltaw.language.encoding.encoder import Row
from deltaw.language.scores import Sums, ratios
from deltaw.train.console import Console
from deltaw.train.escape import printable

Sets = Mapping[str, Sequence[int]]
"""Which rows are from which data set."""


def sets_of(corpus: Corpus, rows: Sequence[Row]) -> Sets:
    """Return which validation rows are from which data set."""
    name_of = {
        id(sample): name for name, samples in corpus.validation_sets().items() for sample in samples
    }
    found = defaultdict[str, list[int]](list)
    for index, row in enumerate(rows):
        found[name_of[id(row.sample)]].append(index)
    return found


def losses(sets: Sets, found: Sums) -> dict[str, float]:
    """Return the loss per learnt token of each set as `NAME_loss`, from the sums of all rows."""
    return {
        f"{name}_loss": float(ratios(found[list(rows)].sum(0))["loss"])
        for name, rows in sets.items()
    }


class EachSet(TrainerCallback):  # type: ignore[misc]
    """Prints the validation loss of each data set after every evaluation."""

    def __init__(self, sets: Sets, console: Console) -> None:
        self.sets = sets
        self.console = console

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Print one line for each set."""
        for name in self.sets:
            value = metrics[f"eval_{name}_loss"]
            self.console.line(
                f"          step {state.global_step:>5}  validation loss {value:.3f} of "
                f"{printable(name, 200)}"
            )
