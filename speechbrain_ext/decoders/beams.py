"""Parts that the beam searches over tokens share: hypotheses and their backtrace."""

from typing import NamedTuple

HASH = 6364136223846793005
"""Odd multiplier of a text's hash, modulo 2^64 (Knuth's for linear congruences)."""


class Hypothesis(NamedTuple):
    """A text that a search found."""

    tokens: list
    frames: list
    """The frame of each token."""
    score: float
    """Log-probability, summed over alignments, plus the scores of token graphs."""


def trace(steps, last, beam, blank):
    """Trace the hypothesis at a place of the beam back to its start.

    Arguments
    ---------
    steps : list of list of int
        For each step, the previous places of the K hypotheses, their K new tokens (blank = none), and the frame.
    last : int
        The final place of the hypothesis.
    beam : int
        K, the number of hypotheses.
    blank : int
        The blank token.

    Returns
    -------
    list
        The first place, followed by a (token, frame) for each token.

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
