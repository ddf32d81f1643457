"""Scores of a finished run on judged answers: does it prefer the better ones more than its base?"""

import gc

import deltaw
from deltaw.errors import RunError
from deltaw.language.encoding.batches import Padding
from deltaw.language.loading import load_model
from deltaw.language.training.judged import Floats, Judged
from deltaw.language.training.judgements import encode
from deltaw.language.training.pairs import Pairs
from deltaw.language.use.held import Held
from deltaw.language.use.opened import OpenedLanguage
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.identity import find_base, require_base
from deltaw.train.metrics import Score
from deltaw.train.placing import place
from deltaw.train.receipt import all_skips
from deltaw.train.scores import table


def compare(
    opened: OpenedLanguage,
    held: Held,
    *,
    merge: bool = True,
    model: str | None = None,
) -> Score:
    """Score a run on judged answers, by the loss of its recipe, with its base as reference.

    Raises:
        RunError: if no answer can be scored, or what the run started from is not at hand.
    """
    console = Console()
    judged = encode(opened.encoder, held.samples)
    if not len(judged):
        raise RunError("\n".join(["There is nothing to score.", *all_skips(judged.skipped)]))
    padding = Padding(opened.tokenizer.pad_token_id)
    reference = _reference(opened, judged, padding, model)
    with opened.merged(merge) as done:
        found = judged.log_p(opened.model, padding)
    console.field("run", f"{opened.shown}, {done}")
    paired = isinstance(judged, Pairs)
    name = "pair" if paired else "rated answer"
    beta = opened.recipe.pref_beta
    loss = f"loss={opened.recipe.pref_loss}" if paired else "the loss of KTO"
    lines = [f"{counted(len(judged), name)}{held.what}"]
    named = "the reference is the model before the run"
    if opened.recipe.adapter is not None:
        named = "the reference is the base, without the adapters that the run began with"
    if not judged.refers(opened.recipe):
        named = "there is no reference"
    lines += [f"{loss} at pref_beta={beta:g}; {named}"]
    held.show(console, lines, judged.skipped)
    base, own = (judged.score(said, reference, opened.recipe) for said in (reference, found))
    console.line(table([("base", base), ("run", own)], "loss"))
    return own


def _reference(
    opened: OpenedLanguage, judged: Judged, padding: Padding, model: str | None
) -> Floats:
    """Return what the model says that the run began with."""
    if opened.has_base:
        with deltaw.disabled(opened.model):
            return judged.log_p(opened.model, padding)
    recipe = opened.recipe
    if recipe.absorb:
        raise RunError(
            f"{opened.shown} took its start into the weights (absorb), and what the model said "
            "then is not kept.\nFix: its scores on its own held-out rows are in results.json."
        )
    source = find_base(recipe, model)
    base = load_model(recipe, source)
    require_base(base, source, recipe)
    place(base).eval()
    found = judged.log_p(base, padding)
    del base
    gc.collect()
    return found
