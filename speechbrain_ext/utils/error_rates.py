"""Word error rates and their confidence intervals."""

import numpy as np

from speechbrain_ext.utils.errors import UserError, is_number, is_whole

RESAMPLES = 10_000
BLOCK = 2**22
"""Numbers to draw at a time; they take 32 MiB."""


def bootstrap_interval(errors, words, level=0.95, resamples=RESAMPLES, seed=0):
    """A confidence interval of an error rate, by bootstrap over utterances.

    Sets of the same size are drawn from the utterances, with repetition. The interval contains the middle part of their error
    rates. It estimates how much the rate would change with other utterances of the same speakers. With few utterances the
    interval is too narrow; with one it has no width.

    Source: M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.

    Arguments
    ---------
    errors : sequence of int
        (N,) insertions, deletions and substitutions of each utterance.
    words : sequence of int
        (N,) words of each reference.
    level : float
        Share of the error rates inside the interval.
    resamples : int
        Number of sets to draw.
    seed : int
        The same seed gives the same interval.

    Returns
    -------
    low, high : float
        In %; both are NaN if there are no words.

    Raises
    ------
    UserError
        If the two sequences have different lengths, or a level or number of sets is impossible.

    Example
    -------
    >>> low, high = bootstrap_interval([0, 1, 2, 1] * 25, [10] * 100)
    >>> round(low, 1), round(high, 1)
    (8.6, 11.4)
    """
    errors, words = (np.asarray(values, dtype=np.float64) for values in (errors, words))
    if errors.shape != words.shape or errors.ndim != 1:
        raise UserError(f"Errors and words have the shapes {errors.shape} and {words.shape}; give one of each per utterance.")
    if not is_number(level, 0, 1) or not is_whole(resamples, 1):
        raise UserError(
            f"level is {level!r} and resamples {resamples!r}; give a share from 0 to 1, and a whole number of 1 or more."
        )
    if not words.sum():
        return float("nan"), float("nan")
    generator, rates, block = np.random.default_rng(seed), [], max(1, BLOCK // len(words))
    for first in range(0, resamples, block):
        drawn = generator.integers(len(words), size=(min(block, resamples - first), len(words)))
        wrong, said = errors[drawn].sum(1), words[drawn].sum(1)
        rates.append(100 * wrong[said > 0] / said[said > 0])  # a set that has only empty references has no rate
    low, high = np.quantile(np.concatenate(rates), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def error_figures(error_rate):
    """The figures of an error rate for the results table.

    Arguments
    ---------
    error_rate : speechbrain.utils.metric_stats.ErrorRateStats
        It holds the words of all utterances.

    Returns
    -------
    dict
        ``WER`` in %, its 95 % interval from ``WER_low`` to ``WER_high``, ``insertions``, ``deletions``, ``substitutions`` and
        ``words``. The first three are NaN if there are no words.

    Example
    -------
    >>> from speechbrain.utils.metric_stats import ErrorRateStats
    >>> error_rate = ErrorRateStats()
    >>> error_rate.append(["a", "b"], [["THE", "CAT"], ["A"]], [["THE", "CAT"], ["A", "HAT"]])
    >>> error_figures(error_rate)
    {'WER': 25.0, 'WER_low': 0.0, 'WER_high': 50.0, 'insertions': 0, 'deletions': 1, 'substitutions': 0, 'words': 4}
    """
    if not error_rate.scores:
        raise UserError("There are no utterances to compare; append some first.")
    summary = error_rate.summarize()
    scores = sorted(error_rate.scores, key=lambda score: score["key"])  # the interval depends on the order
    counts = {kind: [score[kind] for score in scores] for kind in ("num_edits", "num_ref_tokens")}
    low, high = bootstrap_interval(*counts.values())
    return {
        "WER": round(summary["WER"], 2) if summary["num_scored_tokens"] else float("nan"),
        "WER_low": round(low, 2),
        "WER_high": round(high, 2),
        **{kind: summary[kind] for kind in ("insertions", "deletions", "substitutions")},
        "words": summary["num_scored_tokens"],
    }


def error_sentence(figures):
    """The figures of :func:`error_figures` as one sentence.

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
