"""`deltaw check`: the receipt of a run, its first steps timed, and what is wrong with its plan."""

from deltaw.language.choosing import preparation, settle
from deltaw.language.memory import weighing
from deltaw.train.choices import check_reports
from deltaw.train.console import Console
from deltaw.train.data.wording import size
from deltaw.train.interrupt import Interrupt
from deltaw.train.model import quiet
from deltaw.train.probing import Probed, most_memory, probe
from deltaw.train.recipe import Recipe
from deltaw.train.run import rehearsal


def check(recipe: Recipe) -> Probed:
    """Show what training would do, try its first steps on the longest batch, and write nothing.

    Raises:
        DeltawError: for whatever training would be refused, or for steps that diverge.
    """
    check_reports(recipe)
    settled = settle(recipe.model_copy(update={"report_to": []}))
    console = Console()
    with (
        Interrupt("Stopped.") as interrupt,
        quiet(),
        rehearsal(settled, preparation(settled, weighing.compare), console, interrupt) as (
            _,
            trainer,
        ),
    ):
        probed = probe(trainer)
    _show_probe(console, probed)
    longest = ", the longest batch included" * probed.longest_first
    console.field("used", f"{size(most_memory())} at most so far{longest}")
    console.field("done", "nothing was written; deltaw train with the same arguments trains")
    return probed


def _show_probe(console: Console, probed: Probed) -> None:
    losses = ", ".join(f"{loss:.3f}" for loss in probed.losses)
    console.field("first", f"loss {losses} in the first steps, as the run will have them")
    console.field("time", str(probed))
