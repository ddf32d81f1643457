"""Scores of a finished run on texts that it was not trained on, beside its base's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deltaw
from deltaw.errors import ConfigError, DeltawError, RunError
from deltaw.language import scores
from deltaw.language.data.corpus import Corpus, Request, load
from deltaw.language.data.keys import content_key
from deltaw.language.data.samples import Sample
from deltaw.language.data.thoughts import left_out
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Row, samples_of
from deltaw.language.examining import Examination, examination
from deltaw.language.metrics.scoring import Tallies, beside, differences
from deltaw.language.reading import request
from deltaw.language.scores import Interval, Sums
from deltaw.language.training.judgements import are_judged
from deltaw.language.use.comparing import compare
from deltaw.language.use.held import Held
from deltaw.language.use.opened import OpenedLanguage, open_language
from deltaw.train import staging
from deltaw.train.choices import by_name
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable
from deltaw.train.metrics import Score
from deltaw.train.receipt import all_skips
from deltaw.train.recipe import Recipe
from deltaw.train.runfolder import ANSWERS
from deltaw.train.scores import table


def evaluate_run(
    folder: Path,
    data: str | None,
    *,
    generate: bool = False,
    output: Path | None = None,
    merge: bool = True,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> Score:
    """Score a finished run on its own held-out rows, or on `data`, beside its base.

    With `generate` both answer what the rows ask, and the answers are scored and written to
    `output`, by default `answers.jsonl` in the run's folder.
    """
    file = output or folder / ANSWERS
    if generate and not file.parent.is_dir():
        raise RunError(
            f"{printable(str(file.parent), 300)} is no folder to write answers to.\n"
            "Fix: create it, or name another file with --output."
        )
    opened = open_language(folder, model=model, trust_remote_code=trust_remote_code)
    console = Console()
    held = _held(opened.recipe, data)
    if are_judged(held.samples):
        _require_judgeable(opened, generate)
        return compare(opened, held, merge=merge, model=model)
    encoded = opened.encoder.encode(held.samples)  # type: ignore[arg-type]
    if not encoded.rows:
        raise RunError("\n".join(["There is nothing to score.", *all_skips(encoded.skipped)]))
    asked = samples_of(encoded.rows)
    exam = examination(opened.speaker, opened.recipe, asked) if generate else None
    said = {}
    if opened.has_base:
        with deltaw.disabled(opened.model):
            said["base"] = _say(opened, encoded.rows, exam)
    with opened.merged(merge) as done:
        said["run"] = _say(opened, encoded.rows, exam)
    console.field("run", f"{opened.shown}, {done}")
    tokens = int(said["run"].losses[:, 1].sum())
    lines = [f"{counted(len(encoded.rows), 'row')}{held.what}, {tokens:,} tokens scored"]
    held.show(console, lines, encoded.skipped)
    if exam is not None:
        console.field("answers", str(exam))
    shown = [(name, one.score(opened.recipe)) for name, one in said.items()]
    found = shown[-1][1]
    console.line(table(shown, found.primary))
    if "base" in said:
        rises = said["run"].rises(said["base"])
        for name in (name for name in found.values if name in rises):
            value, (low, high) = rises[name]
            line = f"{name} of the run less the base's: {value:+.3f}"
            console.line(f"{line}   {low:+.3f} to {high:+.3f}")
    if exam is not None:
        _write(file, exam, said)
        console.field("written", f"the answers, to {printable(str(file), 300)}")
    return found


@dataclass(frozen=True)
class Said:
    """What a model says of the rows: sums of its losses, its answers if asked, and their scores."""

    losses: Sums
    answers: Sequence[str] = ()
    tallies: Tallies | None = None

    def score(self, recipe: Recipe) -> Score:
        """Return the loss, beside the scores of the answers if there are any."""
        found = scores.score(self.losses)
        return found if self.tallies is None else beside(found, recipe.metric, self.tallies)

    def rises(self, before: "Said") -> dict[str, tuple[float, Interval]]:
        """Return how much each score is above that of `before`, with its interval."""
        found = {"loss": scores.difference(before.losses, self.losses)}
        if self.tallies is None or before.tallies is None:
            return found
        return found | differences(before.tallies, self.tallies)


def _say(opened: OpenedLanguage, rows: Sequence[Row], exam: Examination | None) -> Said:
    losses = scores.measured(opened.model, rows, Padding(opened.tokenizer.pad_token_id))
    if exam is None:
        return Said(losses)
    answers = exam.answers()
    return Said(losses, answers, exam.scored(answers))


def _require_judgeable(opened: OpenedLanguage, generate: bool) -> None:
    """Refuse to score judgements by a model that cannot be, or by answers that nobody judged."""
    if opened.model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise RunError(
            "These rows compare or rate answers, which sequence-to-sequence models are not "
            "scored by.\nFix: give rows with a prompt and an answer."
        )
    if generate:
        raise ConfigError(
            "These rows compare or rate answers, which says nothing of new ones.\n"
            "Fix: leave --generate out, or give rows with answers."
        )


def _write(file: Path, exam: Examination, said: Mapping[str, Said]) -> None:
    """Write a JSON line for each question, with what was answered to it."""
    keys = {"base": "base", "run": "answer"}
    lines = []
    for index, question in enumerate(exam.questions):
        row: dict[str, Any] = {"prompt": question.prompt, "references": question.references}
        row |= {keys[name]: one.answers[index] for name, one in said.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    staging.write_text(file, "".join(lines))


def _held(recipe: Recipe, data: str | None) -> Held:
    """Return what is scored, with a warning if it was trained on."""
    if data is None:
        corpus = _own(recipe)
        held = corpus.test or corpus.validation
        if not held:
            raise RunError("The run held no rows out. Fix: deltaw eval RUN DATA")
        name = "test" if corpus.test else "validation"
        return Held(held, f" of the {name} part that were not trained on")
    corpus = load(
        Request(
            dataset=data,
            dataset_dir=None if recipe.dataset_dir is None else Path(recipe.dataset_dir),
            columns=recipe.columns,
            tags=recipe.tags,
            val_size=0,
            encoding=recipe.encoding,
            skip_bad_rows=recipe.skip_bad_rows,
            enable_thinking=recipe.enable_thinking,
        )
    )
    held = corpus.test or corpus.validation or corpus.train
    notes = (*left_out(corpus.thoughtless), *all_skips(corpus.skipped))
    return Held(held, warning=_trained_on(recipe, held), notes=notes)


def _own(recipe: Recipe) -> Corpus:
    corpus = load(request(recipe))
    now = by_name(corpus.hashes)
    if now != (recipe.record or {}).get("data"):
        raise RunError(
            f"The data {printable(recipe.data, 300)} changed since the run, so rows held out now "
            "may have been trained on.\nFix: give the rows to score: deltaw eval RUN DATA"
        )
    return corpus


def _trained_on(recipe: Recipe, samples: Sequence[Sample]) -> str:
    """Return a warning if samples were trained on, as far as the run's data still tell."""
    try:
        own = {content_key(sample) for sample in _own(recipe).train}
    except DeltawError:
        return ""
    known = sum(content_key(sample) in own for sample in samples)
    return f"{known:,} of these rows were trained on; the score flatters the run" if known else ""
