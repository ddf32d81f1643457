"""Which tokens of a text are learnt, by the stretches of it that are."""

from collections.abc import Sequence

from deltaw.train.rendering import Span

MASKED = -100
"""The label of a token that is not learnt."""


def labelled(
    ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]
) -> tuple[list[int], bool]:
    """Return the label of every token, and whether one spans the beginning of an answer.

    A token is learnt if any of its characters is in an answer; one without characters belongs to
    where it stands.
    """
    labels = [MASKED] * len(ids)
    joined = False
    at = 0
    for start, end in spans:
        while at < len(ids) and offsets[at][1] <= start and offsets[at][0] < start:
            at += 1
        while at < len(ids) and offsets[at][0] < end:
            joined |= offsets[at][0] < start
            labels[at] = ids[at]
            at += 1
    return labels, joined
