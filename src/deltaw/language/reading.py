"""What a recipe asks of its data: which, and as which tokens."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import ConfigError, DataError, raise_all
from deltaw.language.data.corpus import Corpus, Request
from deltaw.language.data.samples import (
    Completion,
    Conversation,
    Passage,
    Preference,
    Rated,
    Sample,
    Turns,
    has_tools,
)
from deltaw.language.encoding.encoder import Encoder, Rows, parting
from deltaw.language.encoding.naming import plain
from deltaw.language.encoding.seq2seq import Seq2SeqEncoder
from deltaw.language.encoding.specials import begun
from deltaw.language.encoding.templating import Chosen, choose, ends
from deltaw.language.encoding.thinking import VARIABLES, told
from deltaw.train.console import Console
from deltaw.train.data.rows import Skip
from deltaw.train.escape import printable
from deltaw.train.model import positions
from deltaw.train.noise import TWO_STACKS
from deltaw.train.recipe import Recipe

LONGEST = 2048
"""Tokens of a row where the recipe does not say."""


def request(recipe: Recipe) -> Request:
    """Return which data the recipe asks for."""
    return Request(
        dataset=recipe.data,
        eval_dataset=recipe.eval_data,
        dataset_dir=None if recipe.dataset_dir is None else Path(recipe.dataset_dir),
        columns=recipe.columns,
        tags=recipe.tags,
        mix_strategy=recipe.mix_strategy,
        interleave_probs=recipe.interleave_probs,
        max_samples=recipe.max_samples,
        val_size=recipe.validation_share,
        seed=recipe.seed if recipe.split_seed is None else recipe.split_seed,
        skip_bad_rows=recipe.skip_bad_rows,
        allow_leakage=recipe.allow_leakage,
        encoding=recipe.encoding,
        enable_thinking=recipe.enable_thinking,
    )


def template_of(recipe: Recipe, tokenizer: Any, model: Any, corpus: Corpus) -> Chosen:
    """Return the template of the recipe, or what this model and its tokenizer go without one.

    It says itself whether the model thinks, where the recipe does.

    Raises:
        ConfigError: if there is no such template, or it cannot be told what the recipe says.
    """
    asked = {name: getattr(recipe, name) for name in VARIABLES}
    return told(_template(recipe, tokenizer, model, corpus), asked, tokenizer)


def _template(recipe: Recipe, tokenizer: Any, model: Any, corpus: Corpus) -> Chosen:
    """Return the template as it is.

    Where no sample is a dialogue, that is the texts as training reads them: with BOS where the
    tokenizer adds it, and between prompt and completion what mostly stands there.
    """
    system = recipe.default_system
    if model.config.is_encoder_decoder:
        return choose(tokenizer, recipe.template, plain=plain(), system=system)
    partings: Counter[str] = Counter()
    samples = (*corpus.train, *corpus.validation, *corpus.test)
    tools = any(map(has_tools, samples))
    for sample in samples:
        prompt, answer = _asked(sample)
        if not isinstance(prompt, str) or not isinstance(answer, str):
            return choose(tokenizer, recipe.template, tools=tools, system=system)
        partings[parting(prompt, answer, recipe.separator) if prompt else ""] += 1
    between = partings.most_common(1)[0][0] if partings else ""
    begin = "".join(tokenizer.convert_ids_to_tokens(begun(tokenizer)))
    end = tokenizer.eos_token or ""
    asis = plain(begin, between, between, end)
    return choose(tokenizer, recipe.template, plain=asis, system=system)


def _asked(sample: Sample) -> tuple[Turns, Turns]:
    """Return the prompt and the answer of a sample; a passage has no prompt."""
    match sample:
        case Completion() | Rated():
            return sample.prompt, sample.completion
        case Preference():
            return sample.prompt, sample.chosen
        case Passage():
            return "", sample.text
        case Conversation():
            return sample.messages[:-1], sample.messages[-1:]


def encoder_of(recipe: Recipe, tokenizer: Any, template: Chosen, model: Any) -> Encoder:
    """Return how the recipe's samples become tokens of this model.

    Raises:
        ConfigError: listing every setting that has no meaning for a sequence-to-sequence model, or
            if more tokens are asked for than the model has positions.
    """
    kind = Encoder
    if model.config.is_encoder_decoder:
        _require_apart(recipe)
        kind = Seq2SeqEncoder
    return kind(
        tokenizer,
        template.template,
        _room(recipe, positions(model)),
        ends(tokenizer, model.generation_config, template.template),
        recipe.train_on,
        recipe.too_long,
        recipe.separator,
        recipe.default_system,
        recipe.skip_bad_rows,
    )


def _require_apart(recipe: Recipe) -> None:
    """Refuse what cannot be asked of a model that reads prompts and writes answers."""
    checks = {
        "packing=True: prompts that share a row would be read as one; rows of similar length are "
        "batched together anyway": recipe.packing,
        "train_on=all: prompts are read, not foretold, so there is nothing of them to learn": (
            recipe.train_on == "all"
        ),
        "too_long=split: an answer belongs to its whole prompt; use truncate, drop or raise": (
            recipe.too_long == "split"
        ),
        "separator: prompt and answer stand apart, with nothing between them": (
            "separator" in recipe.changed
        ),
        "method=freeze: it counts the layers of one stack, and this model has two": (
            recipe.method == "freeze"
        ),
        "lr_layer_decay: it counts the layers of one stack, and this model has two": (
            recipe.lr_layer_decay is not None
        ),
        TWO_STACKS: recipe.neftune_noise_alpha > 0,
    }
    raise_all(
        ConfigError,
        f"{printable(recipe.model, 200)} is a sequence-to-sequence model, which these do not fit:",
        [problem for problem, found in checks.items() if found],
        "leave them out.",
    )


def _room(recipe: Recipe, limit: int | None) -> int:
    """Return how many tokens a row may have."""
    if recipe.max_length is None:
        return min(LONGEST, limit or LONGEST)
    if limit is not None and recipe.max_length > limit:
        raise ConfigError(
            f"max_length={recipe.max_length}, and the model has positions for {limit} tokens.\n"
            f"Fix: give at most {limit}, or leave it out."
        )
    return recipe.max_length


def require_turns(samples: Sequence[Any], corpus: Corpus) -> None:
    """Raise where answers are compared or rated, which this kind of training cannot use."""
    if not all(isinstance(sample, Conversation | Completion | Passage) for sample in samples):
        raise DataError(
            f"{corpus.origins[0].schema.reasons}\nThese rows compare or rate answers, and "
            "task=sft learns answers as they are.\nFix: task=dpo learns from comparisons, task=kto "
            "from ratings; or name the column to learn (columns.response)."
        )


def require_validation(recipe: Recipe, corpus: Corpus) -> None:
    """Refuse what goes by validation samples where there are none."""
    asked = [f"early_stopping={recipe.early_stopping}"] * (recipe.early_stopping is not None)
    asked += ["eval_on_each_dataset=True"] * recipe.eval_on_each_dataset
    if asked and not corpus.validation:
        raise ConfigError(
            f"{' and '.join(asked)} needs validation rows, and there are none.\n"
            "Fix: leave it out, or set validation_share above 0."
        )


def require_metric(recipe: Recipe, fitting: Sequence[str]) -> None:
    """Refuse to compare states by a score that this kind of training does not have."""
    if recipe.metric is not None and recipe.metric not in fitting:
        raise ConfigError(
            f"metric={recipe.metric} is no score of task={recipe.task}.\n"
            f"Fix: choose {' or '.join(fitting)}, or leave it out."
        )


def require_scored(
    recipe: Recipe, asked: int, kept: int, skipped: Sequence[Skip], console: Console
) -> None:
    """Say where validation samples are there and none of them can be scored; refuse to need one."""
    if kept or not asked:
        return
    listed = "".join(f"\n  - {skip}" for skip in skipped[:5])
    text = f"None of the {asked:,} validation samples can be scored:{listed}\n"
    fix = "Fix: raise max_length, or give other validation rows."
    if recipe.early_stopping is not None or recipe.metric is not None:
        raise DataError(f"{text}{fix[:-1]}; early_stopping and metric go by them.")
    console.field("warning", f"{text}{fix}")


def require_rows(train: Rows, corpus: Corpus) -> None:
    """Raise where nothing is left to learn."""
    if not train.rows:
        first = "".join(f"\n  - {skip}" for skip in train.skipped[:5])
        left = len(train.skipped) - 5
        first += f"\n  ... and {left:,} more" if left > 0 else ""
        raise DataError(
            f"None of the {len(corpus.train):,} training samples has a token to learn:{first}\n"
            "Fix: raise max_length, set train_on=all, or give rows with answers."
        )
