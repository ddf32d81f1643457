"""`deltaw data`: what a data set is, and what a model would learn of it; nothing is written."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltaw.errors import ConfigError, printable, raise_all
from deltaw.language.choosing import settle
from deltaw.language.data.corpus import load
from deltaw.language.data.findings import facts
from deltaw.language.data.gathering import EmptyError
from deltaw.language.data.holding import TooFewError
from deltaw.language.reading import request
from deltaw.language.report import judgedreport, tokenreport
from deltaw.language.report.listing import listed
from deltaw.language.training.judgements import are_judged
from deltaw.train.console import Console
from deltaw.train.data.wording import counted
from deltaw.train.keys import LABELLED, LANGUAGE
from deltaw.train.model import load_empty, load_tokenizer, positions, quiet
from deltaw.train.reading import read
from deltaw.train.receipt import show_data
from deltaw.train.recipe import Recipe, parse
from deltaw.train.tokens import encode

UNNAMED = "MODEL"
"""Stands in a recipe for a model that nobody named."""
NEXT = 2000
"""Characters of a command that are shown."""
READ = frozenset(
    {
        *LANGUAGE,
        *LABELLED,
        "model",
        "revision",
        "trust_remote_code",
        "data",
        "task",
        "max_length",
        "encoding",
        "validation_share",
        "split_seed",
        "seed",
        "allow_leakage",
        "batch_size",
        "shuffle",
        "group_by_length",
    }
)
"""The keys of a recipe that say what becomes of data."""


@dataclass(frozen=True, slots=True)
class Detail:
    """How much is shown: every row that is left out, or the first few; so many samples."""

    every: bool = False
    samples: int = 3


def report(
    data: str,
    settings: Mapping[str, Any],
    *,
    model: str | None = None,
    detail: Detail = Detail(),
    words: Sequence[str] = (),
) -> None:
    """Print what `data` hold under these keys of a recipe and, with `model`, its tokens.

    `words` are the keys as they were typed, for the command to type next. Of the model only
    configuration and tokenizer are read. Rows that training refuses are listed here, and left out.

    Raises:
        ConfigError: for keys that say nothing about data.
        DeltawError: for what `deltaw train` could not use at all either.
    """
    recipe = parse({"model": model or UNNAMED, "data": data, **settings})
    raise_all(
        ConfigError,
        "These keys say nothing about data:",
        sorted(recipe.model_fields_set - READ),
        "leave them out, or use deltaw check.",
    )
    console = Console()
    with quiet():
        recipe = settle(recipe)
        if recipe.is_language:
            _show_language(console, recipe, model is not None, detail)
        else:
            _show_labelled(console, recipe, model is not None, detail)
    after = f"deltaw data {shlex.join([data, *words])} --model MODEL"
    if model is not None:
        after = f"deltaw check {shlex.join([model, data, *words])}"
    console.field("next", printable(after, NEXT), whole=True)


def _show_language(console: Console, recipe: Recipe, modelled: bool, detail: Detail) -> None:
    asked = request(recipe)
    every = replace(asked, skip_bad_rows=True, allow_leakage=True)
    unheld = None
    try:
        corpus = load(every)
    except EmptyError as error:
        if detail.every:
            _show_rows(console, "skipped", "left out", error.skipped, detail)
        raise
    except TooFewError as error:
        corpus, unheld = load(replace(every, val_size=0)), str(error)
    for name, text in facts(corpus):
        console.field(name, text)
    apart = {*corpus.bad, *corpus.leaked}
    empty = [skip for skip in corpus.skipped if skip not in apart]
    _show_rows(console, "skipped", "left out, nothing to learn in them", empty, detail)
    how = "left out" if asked.skip_bad_rows else "refused, unless skip_bad_rows=true"
    _show_rows(console, "bad", f"{how}, because they make no sense", corpus.bad, detail)
    how = "left out" if asked.allow_leakage else "refused, unless allow_leakage=true"
    _show_rows(console, "leaked", f"{how}, because they are held out too", corpus.leaked, detail)
    for warning in (*corpus.notes, *([unheld] if unheld else [])):
        console.field("warning", warning)
    if not modelled:
        return
    show = judgedreport.show if are_judged(corpus.train) else tokenreport.show
    show(console, recipe, corpus, every=detail.every, samples=detail.samples)


def _show_rows(
    console: Console, name: str, why: str, skips: Sequence[object], detail: Detail
) -> None:
    if skips:
        lines = listed([str(skip) for skip in skips], every=detail.every)
        console.field(name, "\n".join([f"{counted(len(skips), 'row')} {why}:", *lines]))


def _show_labelled(console: Console, recipe: Recipe, modelled: bool, detail: Detail) -> None:
    data = read(recipe)
    show_data(console, data)
    if detail.every:
        _show_rows(console, "skipped", "left out", data.skipped, detail)
    if modelled:
        name, trust = recipe.model, recipe.trust_remote_code
        outline = load_empty(name, revision=recipe.revision, trust_remote_code=trust)
        tokenizer = load_tokenizer(
            name, outline.config, revision=recipe.revision, trust_remote_code=trust
        )
        limit = positions(outline)
        console.field(
            "length", str(encode(tokenizer, data.train, recipe.max_length, limit=limit)[1])
        )
