"""Scores of a finished run on texts that it was not trained on, beside its base's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deltaw
from deltaw.errors import ConfigError, DeltawError, RunError
from deltaw.language import scores
from deltaw.language.data.corpus import Corpus, Request, load
from deltaw.language.data.keys import content_key
from deltaw.language.data.samples import Sample
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import samples_of
from deltaw.language.examining import Examination, examination
from deltaw.language.metrics.scoring import beside, differences
from deltaw.language.reading import request
from deltaw.language.training.judgements import are_judged
from deltaw.language.use.comparing import compare
from deltaw.language.use.opened import open_language
from deltaw.train import staging
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable
from deltaw.train.metrics import Score
from deltaw.train.receipt import skips
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
    samples, what, warning = _samples(opened.recipe, data)
    if are_judged(samples):
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
        return compare(opened, samples, what, warning=warning, merge=merge, model=model)
    encoded = opened.encoder.encode(samples)  # type: ignore[arg-type]
    if not encoded.rows:
        raise RunError("\n".join(["There is nothing to score.", *skips(encoded.skipped)]))
    padding = Padding(opened.tokenizer.pad_token_id)
    asked = samples_of(encoded.rows)
    exam = examination(opened.speaker, opened.recipe, asked) if generate else None
    base, base_said = None, None
    if opened.has_base:
        with deltaw.disabled(opened.model):
            base = scores.measured(opened.model, encoded.rows, padding)
            base_said = exam and exam.answers()
    with opened.merged(merge) as done:
        own = scores.measured(opened.model, encoded.rows, padding)
        own_said = exam and exam.answers()
    console.field("run", f"{opened.shown}, {done}")
    tokens = int(own[:, 1].sum())
    lines = [f"{counted(len(own), 'row')}{what}, {tokens:,} tokens scored"]
    console.field("data", "\n".join([*lines, *skips(encoded.skipped)]))
    if warning:
        console.field("WARNING", warning)
    found = scores.score(own)
    shown = [("run", found)] if base is None else [("base", scores.score(base)), ("run", found)]
    rises = {} if base is None else {"loss": scores.difference(base, own)}
    if exam is not None and own_said is not None:
        said = [texts for texts in (base_said, own_said) if texts is not None]
        tallies = [exam.scored(texts) for texts in said]
        shown = [
            (name, beside(score, opened.recipe.metric, tally))
            for (name, score), tally in zip(shown, tallies, strict=True)
        ]
        if len(tallies) == 2:
            rises |= differences(*tallies)
        console.field("answers", str(exam))
    found = shown[-1][1]
    console.line(table(shown, found.primary))
    for name in (name for name in found.values if name in rises):
        value, (low, high) = rises[name]
        console.line(f"{name} of the run less the base's: {value:+.3f}   {low:+.3f} to {high:+.3f}")
    if exam is not None and own_said is not None:
        _write(file, exam, base_said, own_said)
        console.field("written", f"the answers, to {printable(str(file), 300)}")
    return found


def _write(file: Path, exam: Examination, base: Sequence[str] | None, own: Sequence[str]) -> None:
    """Write a JSON line for each question, with what was answered to it."""
    lines = []
    for index, question in enumerate(exam.questions):
        row: dict[str, Any] = {"prompt": question.prompt, "references": question.references}
        if base is not None:
            row["base"] = base[index]
        lines.append(json.dumps(row | {"answer": own[index]}, ensure_ascii=False) + "\n")
    staging.write_text(file, "".join(lines))


def _samples(recipe: Recipe, data: str | None) -> tuple[Sequence[Sample], str, str]:
    """Return what is scored, what it is in words, and a warning if it was trained on."""
    if data is None:
        corpus = _own(recipe)
        held = corpus.test or corpus.validation
        if not held:
            raise RunError("The run held no rows out. Fix: deltaw eval RUN DATA")
        name = "test" if corpus.test else "validation"
        return held, f" of the {name} part that were not trained on", ""
    corpus = load(
        Request(
            dataset=data,
            dataset_dir=None if recipe.dataset_dir is None else Path(recipe.dataset_dir),
            columns=recipe.columns,
            tags=recipe.tags,
            val_size=0,
            encoding=recipe.encoding,
            skip_bad_rows=recipe.skip_bad_rows,
        )
    )
    held = corpus.test or corpus.validation or corpus.train
    return held, "", _trained_on(recipe, held)


def _own(recipe: Recipe) -> Corpus:
    corpus = load(request(recipe))
    now = {Path(path).name: digest for path, digest in corpus.hashes.items()}
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
