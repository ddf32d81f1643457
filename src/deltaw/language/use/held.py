"""What a finished run is scored on."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.language.data.samples import Sample
from deltaw.train.console import Console
from deltaw.train.data.rows import Skip
from deltaw.train.receipt import all_skips


@dataclass(frozen=True, slots=True)
class Held:
    """Samples, what they are in words, and a warning if they were trained on.

    `notes` say what of their data was left out.
    """

    samples: Sequence[Sample]
    what: str = ""
    warning: str = ""
    notes: Sequence[str] = ()

    def show(self, console: Console, lines: Sequence[str], skipped: Sequence[Skip]) -> None:
        """Print `lines` about the data, and behind them all that was left out."""
        console.field("data", "\n".join([*lines, *self.notes, *all_skips(skipped)]))
        if self.warning:
            console.field("WARNING", self.warning)
