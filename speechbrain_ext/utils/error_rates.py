"""Word error rates with what chance has to do with them."""

import numpy as np

RESAMPLES = 10_000
BLOCK = 2**22
"""Numbers to draw at a time, which takes 32 MiB."""


def bootstrap_interval(errors, words, level=0.95, resamples=RESAMPLES, seed=0):
    """A confidence interval of an error rate, by bootstrap over utterances.

    Sets of as many utterances are drawn from the given ones, with repetition; the interval is that of the middle part of their
    error rates. It says how far another choice of such utterances would move the figure, of the same speakers. A handful of
    utterances gives too narrow an interval, and one utterance none.

    Source: M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.

    Arguments
    ---------
    errors : sequence of int
        (N,) insertions, deletions and substitutions of each utterance.
    words : sequence of int
        (N,) words of each reference.
    level : float
        Share of the error rates that lie inside.
    resamples : int
        How many sets are drawn.
    seed : int
        The same seed gives the same interval.

    Returns
    -------
    low, high : float
        In %; both are NaN where there are no words.

    Example
    -------
    >>> low, high = bootstrap_interval([0, 1, 2, 1] * 25, [10] * 100)
    >>> round(low, 1), round(high, 1)
    (8.6, 11.4)
    """
    errors, words = (np.asarray(values, dtype=np.float64) for values in (errors, words))
    if not words.sum():
        return float("nan"), float("nan")
    generator, rates, block = np.random.default_rng(seed), [], max(1, BLOCK // len(words))
    for first in range(0, resamples, block):
        drawn = generator.integers(len(words), size=(min(block, resamples - first), len(words)))
        wrong, said = errors[drawn].sum(1), words[drawn].sum(1)
        rates.append(100 * wrong[said > 0] / said[said > 0])  # sets of empty references alone have no rate
    low, high = np.quantile(np.concatenate(rates), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def error_figures(error_rate):
    """The figures of an error rate, as the results table has them.

    Arguments
    ---------
    error_rate : speechbrain.utils.metric_stats.ErrorRateStats
        With the words of all utterances.

    Returns
    -------
    dict
        ``WER`` and its 95 % interval ``WER_low`` to ``WER_high`` in %, ``insertions``, ``deletions``, ``substitutions`` and
        ``words``.

    Example
    -------
    >>> from speechbrain.utils.metric_stats import ErrorRateStats
    >>> error_rate = ErrorRateStats()
    >>> error_rate.append(["a", "b"], [["THE", "CAT"], ["A"]], [["THE", "CAT"], ["A", "HAT"]])
    >>> error_figures(error_rate)
    {'WER': 25.0, 'WER_low': 0.0, 'WER_high': 50.0, 'insertions': 0, 'deletions': 1, 'substitutions': 0, 'words': 4}
    """
    summary = error_rate.summarize()
    counts = {kind: [score[kind] for score in error_rate.scores] for kind in ("num_edits", "num_ref_tokens")}
    low, high = bootstrap_interval(*counts.values())
    return {
        "WER": round(summary["WER"], 2),
        "WER_low": round(low, 2),
        "WER_high": round(high, 2),
        **{kind: summary[kind] for kind in ("insertions", "deletions", "substitutions")},
        "words": summary["num_scored_tokens"],
    }


def error_sentence(figures):
    """The figures of :func:`error_figures` in a line.

    Example
    -------
    >>> counts = {"insertions": 0, "deletions": 1, "substitutions": 0, "words": 4}
    >>> error_sentence({"WER": 25.0, "WER_low": 0.0, "WER_high": 50.0} | counts)
    'WER 25.00 % (95 % interval 0.00 to 50.00) of 4 words (0 insertions, 1 deletions, 0 substitutions)'
    """
    return (
        "WER {WER:.2f} % (95 % interval {WER_low:.2f} to {WER_high:.2f}) of {words} words "
        "({insertions} insertions, {deletions} deletions, {substitutions} substitutions)"
    ).format(**figures)
