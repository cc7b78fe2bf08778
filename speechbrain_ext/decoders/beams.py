"""What the beams over tokens share: hypotheses, and how they are written down step by step."""

from typing import NamedTuple

HASH = 6364136223846793005
"""Odd multiplier of a text's hash, modulo 2^64 (Knuth's for linear congruences)."""


class Hypothesis(NamedTuple):
    """A text, as a search has found it."""

    tokens: list
    frames: list
    """The frame in which each token was said."""
    score: float
    """Log-probability of the alignments that were added up, with what token graphs have added."""


def trace(steps, last, beam, blank):
    """The text that ends at a place of the beam, after the place that it began with.

    Arguments
    ---------
    steps : list of list of int
        For each step the K places that hypotheses come from, their K tokens, blanks for none, and the frame.
    last : int
        The place.
    beam : int
        K.
    blank : int
        The blank.

    Returns
    -------
    list
        The first place, and (token, frame) one after the other.

    Example
    -------
    >>> trace([[0, 0, 5, 7, 3], [1, 0, 6, 0, 4]], 0, beam=2, blank=0)
    [0, (7, 3), (6, 4)]
    """
    text = []
    for step in reversed(steps):
        if step[beam + last] != blank:
            text.append((step[beam + last], step[-1]))
        last = step[last]
    return [last, *reversed(text)]
