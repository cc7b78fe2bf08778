"""Word n-gram language models from text, as ARPA files: interpolated modified Kneser-Ney, with the estimates of KenLM's lmplz.

The probability of a word w after the words h, with h' for h without its first word, is

    p(w | h) = (c(h w) - D(c(h w))) / sum_v c(h v) + gamma(h) p(w | h')

where gamma(h) is the probability that the discounts D free, and the last p is 1 / (number of words). c is the count in the text
for the highest order and for n-grams that begin a sentence; for others it is the number of different words before them.

Sources: R. Kneser and H. Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995; S. Chen and J. Goodman, "An
empirical study of smoothing techniques for language modeling", 1999 (three discounts per order); K. Heafield et al., "Scalable
modified Kneser-Ney language model estimation", ACL 2013 (pruning, and counts at the beginning of a sentence).

N-grams are stored as arrays of numbers: an n-gram is the index of its first n - 1 words among the n-grams of the order below, and
the id of its last word. The text is stored as ids, and counted in blocks of n-grams that begin with the same words. Counting
takes 24 bytes for each word of the text, and up to 60 for each different n-gram.
"""

import os
from array import array
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from speechbrain_ext.utils.errors import UserError, is_whole, one_line
from speechbrain_ext.utils.files import replacing

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
HIGHEST_ORDER = 6
"""The highest order that flashlight's KenLM reads."""
FALLBACK = (0.5, 1.0, 1.5)
"""Discounts of lmplz for texts that are too small to estimate them."""
NEVER = 1e-30
"""The probability of ``<s>``, which follows no word."""
LINES = 100_000
"""Lines of the file that are written at a time."""
BLOCK = 2_000_000
"""Places of the text that are sorted at a time."""
FIRST = 2
"""Id of the first word while the text is read: 0 begins a sentence, and 1 ends it."""


class NgramSummary(NamedTuple):
    """Size of a language model and of its text."""

    sentences: int
    words: int
    """Running words of the text."""
    unknown: int
    """Running words that are not in the vocabulary."""
    entries: tuple
    """Number of n-grams of each order, from 1; the first is the vocabulary with ``<s>``, ``</s>`` and ``<unk>``."""


class _Grams(NamedTuple):
    """The n-grams of an order."""

    context: np.ndarray
    """(N,) index of all words but the last, among the n-grams of the order below."""
    word: np.ndarray
    """(N,) id of the last word."""
    suffix: np.ndarray
    """(N,) index of all words but the first, among the n-grams of the order below."""
    count: np.ndarray
    """(N,) count in the text."""


class _Level(NamedTuple):
    """The n-grams of an order with their probabilities."""

    context: np.ndarray
    word: np.ndarray
    kept: np.ndarray
    """(N,) whether the n-gram is in the model."""
    probability: np.ndarray
    """(N,) probability of the last word after the others."""
    backoff: np.ndarray
    """(contexts,) backoff weight of each n-gram of the order below."""


def write_arpa(sentences, path, order=3, prune=(0,), vocabulary=None, progress=False):
    """Estimate a language model and write it as an ARPA file, completely or not at all.

    Arguments
    ---------
    sentences : iterable of list of str
        The words of each sentence. ``<unk>`` is any word outside the vocabulary; ``<s>`` and ``</s>`` are ignored.
    path : str or os.PathLike
        The file.
    order : int
        The number of words of the longest n-grams, 2 to 6.
    prune : sequence of int
        Leave out n-grams with at most this count in the text: a number for bigrams, one for trigrams and so on, not
        decreasing. The last number also holds for all higher orders.
    vocabulary : int, optional
        Keep only this number of the most frequent words; the others count as ``<unk>``. By default all words are kept.
    progress : bool
        Whether to show progress bars on standard error.

    Returns
    -------
    NgramSummary

    Raises
    ------
    UserError
        If there are no words, a word is empty or has white space, or an argument is out of range.
    OSError
        If the file cannot be written; the error comes before counting.

    Example
    -------
    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "lm.arpa")
    >>> write_arpa([["THE", "CAT"], ["THE", "HAT"]], path, order=2)
    NgramSummary(sentences=2, words=4, unknown=0, entries=(6, 5))
    >>> open(path).read().split()[:4]
    ['\\\\data\\\\', 'ngram', '1=6', 'ngram']
    """
    if not is_whole(order, 2, HIGHEST_ORDER):
        raise UserError(f"The order is {order}; give 2 to {HIGHEST_ORDER} words, mostly 3 or 4.")
    prune = list(prune)
    if not prune or len(prune) >= order or not all(is_whole(count, 0) for count in prune) or prune != sorted(prune):
        raise UserError(
            f"The counts to prune are {prune}; give up to {order - 1} whole numbers, for bigrams, trigrams and so on, none of "
            "them negative or smaller than the one before."
        )
    if vocabulary is not None and not is_whole(vocabulary, 1):
        raise UserError(f"The vocabulary size is {vocabulary!r}; give a whole number of 1 or more.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the name of a file.")
    if os.fspath(path).endswith(".gz"):
        raise UserError(f"{path} would not be compressed; give a name that ends in .arpa, and compress the file with gzip.")
    limits = [-1, *prune, *[prune[-1]] * (order - 1 - len(prune))]  # -1: no word is pruned
    with replacing(path) as file:
        ids, names = _number(*_read(sentences), vocabulary)
        sentence_count, unknown = np.bincount(ids, minlength=len(names))[-2:].tolist()
        word_count = len(ids) - 2 * sentence_count
        with tqdm(total=2 * order, desc="Estimating", unit=" steps", disable=not progress) as bar:
            grams = _count(ids, len(names), order, bar)
            del ids
            levels = _estimate(grams, limits, bar)
        entries = tuple(int(level.kept.sum()) for level in levels)
        if not all(entries):
            raise UserError(
                f"There are no n-grams of order {entries.index(0) + 1}, because sentences are short or --prune is high; lower "
                "--prune or --order."
            )
        with tqdm(total=sum(entries), desc="Writing", unit=" n-grams", unit_scale=True, disable=not progress) as bar:
            _write(file, levels, names, entries, bar)
    return NgramSummary(sentence_count, word_count, unknown, entries)


class _Ids(dict):
    """Ids by word; a new word gets the next id."""

    def __missing__(self, word):
        self[word] = number = FIRST + len(self)
        return number


def _read(sentences):
    """The ids of all sentences in one array, and the ids by word."""
    known, ids = _Ids(), array("i")
    for sentence in sentences:
        if isinstance(sentence, str):
            raise UserError(f"There is the sentence {one_line(repr(sentence), 40)}; give the list of its words.")
        ids.append(0)
        ids.extend(map(known.__getitem__, sentence))
        ids.append(1)
    return np.frombuffer(ids, dtype=np.int32), known


def _number(ids, known, vocabulary):
    """The text in final ids, and the words in the order of these ids: sorted, then ``</s>``, ``<s>`` and ``<unk>``."""
    words = sorted(known.keys() - {BEGIN, END, UNKNOWN, UNKNOWN.upper()})
    if not words:
        raise UserError("The text holds no words; give another text.")
    if flawed := [word for word in words if word.split() != [word]]:
        raise UserError(f"There is the word {one_line(repr(flawed[0]), 40)}; give words without white space.")
    if vocabulary is not None and vocabulary < len(words):
        counts = np.bincount(ids)
        words = sorted(
            sorted(words, key=lambda word: -counts[known[word]])[:vocabulary]
        )  # words of equal count in alphabetical order
    names = [*words, END, BEGIN, UNKNOWN]
    final = np.full(FIRST + len(known), len(words) + 2, dtype=np.int32)
    final[[known[word] for word in words]] = np.arange(len(words))
    final[:FIRST] = len(words) + 1, len(words)
    final[[known[name] for name in (BEGIN, END) if name in known]] = -1
    ids = final[ids]
    return (ids if ids.min() >= 0 else ids[ids >= 0]), names


def _count(ids, size, order, bar):
    """The n-grams of each order, sorted by their index in the order below."""
    nowhere = np.zeros(size, dtype=np.int32)
    grams = [_Grams(nowhere, np.arange(size, dtype=np.int32), nowhere, np.bincount(ids, minlength=size))]
    bar.update()
    places = ids  # index of the n-gram of the order below that begins at each word of the text
    starts = np.arange(len(ids), dtype=np.int32)
    for length in range(2, order + 1):
        starts = starts[ids[length - 2 :][starts] != size - 3]  # n-grams do not cross the end of a sentence
        before, longer = places[starts], np.zeros_like(ids) if length < order else None
        parts, known = [], 0
        for first, last in _blocks(grams[-1].count):
            here = starts[(before >= first) & (before < last)]
            keys = places[here].astype(np.uint64) << np.uint64(32)
            keys |= ids[length - 1 :][here].astype(np.uint64)
            sorting = np.argsort(keys)
            keys, here = keys[sorting], here[sorting]
            is_new = np.ones(len(keys), dtype=bool)
            is_new[1:] = keys[1:] != keys[:-1]
            new = np.flatnonzero(is_new)
            count = np.diff(new, append=len(keys))
            keys = keys[new]
            word, context = (part.astype(np.int32) for part in (keys & np.uint64(2**32 - 1), keys >> np.uint64(32)))
            parts.append((context, word, places[here[new] + 1], count.astype(np.int32)))
            if longer is not None:
                longer[here] = np.repeat(np.arange(known, known + len(new), dtype=np.int32), count)
            known += len(new)
        grams.append(_Grams(*map(np.concatenate, zip(*parts, strict=True))))
        places = longer
        bar.update()
    return grams


def _blocks(counts):
    """Yield ranges of n-grams that occur about :data:`BLOCK` times together."""
    ends, first = counts.cumsum(), 0
    while first < len(counts):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + BLOCK, "right")))
        yield first, last
        first = last


def _estimate(grams, limits, bar):
    """Probabilities of each order; removes the n-grams from their list, to free memory."""
    size = len(grams[0].count)
    begins = np.arange(size) == size - 2
    probability, levels = np.array([1 / (size - 1)], dtype=np.float32), []  # <s> follows no word
    for limit in limits:
        gram = grams.pop(0)
        count, kept = gram.count, gram.count > limit
        if levels:
            begins = begins[gram.context]
        if grams:
            count = np.bincount(grams[0].suffix, minlength=len(count))
            if levels:
                count = np.where(begins, gram.count, count)
        removed = np.where(kept, _discounts(count)[np.minimum(count, 3)], count).astype(np.float32)
        total, left = (np.bincount(gram.context, each, len(probability)).astype(np.float32) for each in (count, removed))
        backoff = np.divide(left, total, out=np.ones_like(total), where=total > 0)
        own = count.astype(np.float32)
        own -= removed
        own /= total[gram.context]
        lower = backoff[gram.context]
        lower *= probability[gram.suffix]
        own += lower
        probability = own
        levels.append(_Level(gram.context, gram.word, kept, probability, backoff))
        bar.update()
    return levels


def _discounts(count):
    """The discounts of counts of 0, 1, 2, and 3 or more."""
    once, twice, thrice, more = (int((count == number).sum()) for number in range(1, 5))
    if not (once and twice and thrice and more):
        return np.array([0, *FALLBACK])
    share = once / (once + 2 * twice)
    found = 1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * more / thrice
    return np.array([0, *(found if all(0 < value < most for most, value in enumerate(found, start=1)) else FALLBACK)])


def _write(file, levels, names, entries, bar):
    """Write the ARPA file."""
    words, levels[0].probability[-2] = np.array(names, dtype=object), NEVER
    file.write("\\data\\\n")
    file.writelines(f"ngram {order}={count}\n" for order, count in enumerate(entries, start=1))
    for order, level in enumerate(levels, start=1):
        file.write(f"\n\\{order}-grams:\n")
        line = "%.7g\t" + " ".join(["%s"] * order) + "\t%.7g" * (order < len(levels)) + "\n"
        for first in range(0, len(level.kept), LINES):
            place = first + np.flatnonzero(level.kept[first : first + LINES])
            numbers, columns = [level.probability[place], *(above.backoff[place] for above in levels[order : order + 1])], []
            for lower in reversed(levels[:order]):
                columns.append(words[lower.word[place]])
                place = lower.context[place]
            # Rounding may give a probability above 1
            logs = [np.minimum(np.log10(number, dtype=np.float64), 0) for number in numbers]
            fields = (column.tolist() for column in (logs[0], *reversed(columns), *logs[1:]))
            file.writelines(map(line.__mod__, zip(*fields, strict=True)))
            bar.update(len(place))
    file.write("\n\\end\\\n")
