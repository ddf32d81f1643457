"""Samples kept from training: drawn by seed, and never seen in training as well."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deltaw.errors import ConfigError, DataError, printable, raise_all
from deltaw.language.data.keys import Key, content_key, prompt_key, where
from deltaw.language.data.samples import Passage, Sample
from deltaw.train.data.rows import Skip
from deltaw.train.data.wording import counted, some

Sets = list[list[Sample]]
"""The samples of each data set."""


class TooFewError(DataError):
    """Holding out as much as was asked for would leave nothing."""


def check_size(size: float) -> None:
    """Refuse a size of the held-out part that is neither a share nor a count."""
    if not (0 <= size < 1 or (size >= 1 and float(size).is_integer())):
        raise ConfigError(
            f"validation_share is {size}\n"
            "Fix: give a share from 0 to below 1, or a number of samples."
        )


def hold_out(sets: Sets, size: float, seed: int) -> tuple[Sets, Sets]:
    """Return what is kept and what is held out of each data set, in the order they had.

    A `size` below 1 is a share of the distinct prompts; from 1 on it is a number of samples, which
    is exceeded where the last prompt drawn has several. Samples with one prompt stay together, and
    every data set keeps at least one. Of a single passage the end is held out. Raises
    `TooFewError`.
    """
    only = sets[0][0] if [len(set_) for set_ in sets] == [1] else None
    if isinstance(only, Passage) and size < 1:
        kept, held = _cut(only, size)
        return [[kept]], [[held]]
    counts = Counter(prompt_key(sample) for set_ in sets for sample in set_)
    homes: dict[Key, set[int]] = defaultdict(set)
    for number, set_ in enumerate(sets):
        for sample in set_:
            homes[prompt_key(sample)].add(number)
    left = Counter(number for numbers in homes.values() for number in numbers)
    keys = list(counts)
    wanted = max(1, round(size * len(keys))) if size < 1 else size
    held_keys: set[Key] = set()
    count = 0
    for index in np.random.default_rng(seed).permutation(len(keys)):
        key = keys[index]
        if count < wanted and all(left[number] > 1 for number in homes[key]):
            left.subtract(homes[key])
            held_keys.add(key)
            count += 1 if size < 1 else counts[key]
    if count < wanted:
        raise TooFewError(
            f"validation_share is {size}, of {counted(sum(counts.values()), 'sample')} with "
            f"{counted(len(keys), 'different prompt')}: too few to hold so many out\n"
            "Fix: add rows, give the validation part as a file, or set validation_share=0."
        )
    kept_sets: Sets = [[] for _ in sets]
    held_sets: Sets = [[] for _ in sets]
    for number, set_ in enumerate(sets):
        for sample in set_:
            part = held_sets if prompt_key(sample) in held_keys else kept_sets
            part[number].append(sample)
    return kept_sets, held_sets


def without_leaks(sets: Sets, held: Sequence[Sample], drop: bool) -> tuple[Sets, list[Skip]]:
    """Return the training samples that are not held out, and the others as skipped rows.

    Raises `DataError` naming the others unless `drop`; held-out samples always stay.
    """
    places = {content_key(sample): where(sample) for sample in reversed(held)}
    kept: Sets = [[] for _ in sets]
    skips = []
    for number, set_ in enumerate(sets):
        for sample in set_:
            other = places.get(content_key(sample))
            if other is None:
                kept[number].append(sample)
            else:
                skips.append(Skip(sample.file, sample.line, f"held out too: {other}"))
    if not drop:
        raise_all(
            DataError,
            f"held out too, so evaluation would flatter: {counted(len(skips), 'training sample')}",
            [str(skip) for skip in skips],
            "remove them, or drop them from the training part with allow_leakage=true.",
        )
    return kept, skips


def shared_prompts(train: Sequence[Sample], held: Sequence[Sample]) -> list[Sample]:
    """Return the held-out samples whose prompt training has too."""
    known = {prompt_key(sample) for sample in train}
    return [sample for sample in held if prompt_key(sample) in known]


def repeated(samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Return (sample, earlier one with the same content) for each that repeats another."""
    groups: dict[Key, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[content_key(sample)].append(sample)
    return [(sample, group[0]) for group in groups.values() for sample in group[1:]]


def overlap_warnings(train: Sequence[Sample], held: Sequence[Sample]) -> list[str]:
    """Return what a person should know about repetitions in training and about shared prompts."""
    warnings = []
    if copies := repeated(train):
        warnings.append(
            f"{counted(len(copies), 'repeated training sample')}, all kept: "
            + some([f"{where(sample)} repeats {where(earlier)}" for sample, earlier in copies])
        )
    if known := shared_prompts(train, held):
        warnings.append(
            f"{counted(len(known), 'held-out sample')} with a prompt that training has too, and "
            "another answer: " + some([where(sample) for sample in known])
        )
    return warnings


def _cut(passage: Passage, share: float) -> tuple[Passage, Passage]:
    """Cut a text at the last line end, or else blank, before its last `share`."""
    text = passage.text
    limit = round(len(text) * (1 - share))
    at = next((at + 1 for mark in ("\n", " ") if (at := text.rfind(mark, 0, limit)) > 0), limit)
    kept, held = text[:at], text[at:]
    if not kept.strip() or not held.strip():
        raise TooFewError(
            f'{where(passage)}: too short to hold any of it out: "{printable(text, 40)}"\n'
            "Fix: give more text, give the validation part as a file, or set validation_share=0."
        )
    return replace(passage, text=kept), replace(
        passage, text=held, line=passage.line + kept.count("\n")
    )
