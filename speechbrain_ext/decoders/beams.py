"""Parts that the beam searches over tokens share: hypotheses and their backtrace."""

import math
from typing import NamedTuple

import torch

HASH = 6364136223846793005
"""Odd multiplier of a text's hash, modulo 2^64 (Knuth's for linear congruences)."""


class Hypothesis(NamedTuple):
    """A text that a search found."""

    tokens: list
    frames: list
    """The frame of each token."""
    score: float
    """Log-probability, summed over alignments, plus the scores of token graphs."""


def choose(ranked, at_end, beam):
    """Choose the hypotheses that a beam keeps.

    With phrases, a quarter of the places is for those that would be the best if the text ended here. Bonuses of phrases that do
    not continue, and are taken back later, can then not push out the right text.

    Arguments
    ---------
    ranked : torch.Tensor
        (B, N) scores.
    at_end : torch.Tensor, optional
        (B, N) what would be added if the text ended here, see :func:`speechbrain_ext.decoders.token_graph.settled`.
    beam : int
        K, the number of hypotheses.

    Returns
    -------
    torch.Tensor
        (B, K) indices of the chosen ones, by their scores.

    Example
    -------
    >>> ranked, at_end = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[-6.0, -4.0, 0.0]])
    >>> choose(ranked, None, 2), choose(ranked, at_end, 2)
    (tensor([[0, 1]]), tensor([[0, 2]]))
    """
    if at_end is None or beam == 1:
        return ranked.topk(beam).indices
    kept = max(1, beam // 4)
    first = ranked.topk(beam - kept).indices
    left = (ranked + at_end).clamp(min=torch.finfo(ranked.dtype).min).scatter(1, first, -math.inf)  # none is chosen twice
    chosen = torch.cat((first, left.topk(kept).indices), 1)
    return chosen.gather(1, ranked.gather(1, chosen).argsort(dim=1, descending=True, stable=True))


def best_of(lengths, scores, rewards):
    """The index of the best text, in a search that divides scores by lengths.

    Texts with equal rewards are compared by their score per token, as in SpeechBrain and icefall; the best ones of each reward by
    their scores. A positive score per token would be the less, the more a text says.

    Arguments
    ---------
    lengths : list of int
        What each score is divided by.
    scores : list of float
        Scores, with rewards.
    rewards : list of float
        The rewards in the scores: bonuses of phrases.

    Returns
    -------
    int

    Example
    -------
    >>> best_of([2, 4], [-3.0, -4.0], [0.0, 0.0]), best_of([2, 4], [4.0, 3.0], [6.0, 0.0])
    (1, 0)
    """

    def per_token(index):
        return (scores[index] - rewards[index]) / lengths[index]

    equal = {}
    for index, reward in enumerate(rewards):
        equal.setdefault(round(reward, 3), []).append(index)
    return max((max(indices, key=per_token) for indices in equal.values()), key=scores.__getitem__)


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
