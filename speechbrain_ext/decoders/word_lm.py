"""Word n-gram language models in ARPA format, for the CTC beam searches: checks, the list of words, and scores by tokens."""

import bisect
import gzip
import itertools
import math
import os
import re
import zlib
from array import array

import numpy as np

from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.text import is_utf8

# SpeechBrain's default, for both searches: log10, added to the language model's score of <unk>.
UNKNOWN_WORD = -10.0
IMPOSSIBLE = -99.0
"""A score of <unk> up to this says nothing of unknown words. SRILM writes -99 for log 0; KenLM puts -100 for a missing <unk>."""
WHITE = re.compile(r"[ \t\v\f]+")
"""What separates fields. Other spaces of Unicode are part of a word."""
LONGEST_HEAD = 10_000
"""Lines in which the n-grams' numbers must begin."""
LARGEST_BACKOFF = 99.0
"""Back-off weights in log10 are close to 0; with larger ones the sum of a text's scores could overflow."""


def open_arpa(path):
    """Open an ARPA file as text, gzipped or not."""
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return (gzip.open if gzipped else open)(path, "rt", encoding="utf-8", errors="surrogateescape")


def check_arpa(path):
    """Read a whole ARPA file, to find its errors; see :func:`read_arpa`."""
    for _ in read_arpa(path):
        pass


def read_arpa(path):
    """Read the n-grams of a language model, and refuse a file that is not complete and correct.

    Text before ``\\data\\`` and after ``\\end\\`` is ignored, and spaces may stand for tabs. (KenLM, which the search by words
    uses, reads neither.)

    Arguments
    ---------
    path : str
        The file, plain or gzipped.

    Returns
    -------
    iterator of tuple
        The words of each n-gram, its log10 probability, and its log10 back-off weight, 0 if there is none. Shorter n-grams come
        first.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    UserError
        If the file is in another format, begins with a byte order mark, or is cut off; if it has only single words, or another
        number of n-grams than it states; or if an n-gram occurs twice, has an impossible number, or is there without its last
        word or without its other words. Errors of the whole come after the n-grams.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no language model {path}; give the path of an ARPA file.")
    try:
        with open_arpa(path) as file:
            if file.read(1) == "\ufeff":
                raise UserError(f"The language model {path} begins with a byte order mark; write it without one.")
            file.seek(0)
            lines = ((number, line) for number, line in enumerate((line.strip(" \t\v\f\n") for line in file), 1) if line)
            stated, line = _head(path, lines)
            vocabulary, shorter = set(), None
            for order in stated:
                if line != f"\\{order}-grams:":
                    raise _damaged(path, f"there is {one_line(line, 40)!r} in place of \\{order}-grams:")
                grams = _Section(path, order, order == len(stated), vocabulary)
                line = yield from grams.read(lines)
                grams.check(stated[order], shorter)
                shorter = grams.hashes
            if line != "\\end\\":
                raise _damaged(path, f"there is {one_line(line, 40)!r} in place of \\end\\")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"The language model {path} cannot be read to its end; write it again ({one_line(error)}).") from error


def _damaged(path, flaw):
    return UserError(f"The language model {path} cannot be read; write it again ({flaw}).")


def _head(path, lines):
    """The stated number of n-grams of each order, and the first line after them."""
    if not any(line == "\\data\\" for _, line in itertools.takewhile(lambda line: line[0] <= LONGEST_HEAD, lines)):
        raise UserError(
            f"The language model {path} is not in ARPA format; give the ARPA file, not KenLM's binary file, which has no list of "
            "words."
        )
    stated, line = {}, ""
    for _, line in lines:
        if line.startswith("\\"):
            break
        if count := re.fullmatch(r"ngram\s+([0-9]{1,9})\s*=\s*([0-9]{1,18})", line):
            stated[int(count[1])] = int(count[2])
    if list(stated) != list(range(1, len(stated) + 1)) or not stated or not stated[1]:
        raise _damaged(path, f"it states {stated} n-grams by order; all orders are needed, with single words")
    if not any(list(stated.values())[1:]):
        raise UserError(f"The language model {path} has only single words; give one of order 2 or more.")
    return stated, line


class _Section:
    """The n-grams of an order. A hash of each is kept, to find n-grams that occur twice or lack their first words."""

    def __init__(self, path, order, is_last, vocabulary):
        self.path, self.order, self.is_last, self.vocabulary = path, order, is_last, vocabulary
        self.hashes, self.contexts = array("q"), array("q")

    def read(self, lines):
        """Yield the n-grams; returns the line after them."""
        order, vocabulary = self.order, self.vocabulary
        sizes = (order + 1, order + 2)
        for number, line in lines:
            if line.startswith("\\"):
                return line
            if line.isascii():
                fields = line.split()
            elif is_utf8(line):
                fields = WHITE.split(line)
            else:
                raise self._flaw(number, "text that is not UTF-8")
            if len(fields) not in sizes:
                found = f"{len(fields)} field{'s' * (len(fields) != 1)}"
                raise self._flaw(number, f"{found} in place of {' or '.join(map(str, sizes[: 2 - self.is_last]))}")
            words = fields[1 : order + 1]
            try:
                probability, backoff = float(fields[0]), float(fields[-1]) if len(fields) > order + 1 else 0.0
            except ValueError:
                probability = backoff = math.nan
            if not (probability <= 0 and backoff <= LARGEST_BACKOFF) or self.is_last and backoff:
                raise self._flaw(number, "a number that is no logarithm of a probability or of a back-off weight")
            if order == 1:
                vocabulary.add(words[0])
            elif words[-1] not in vocabulary:
                raise self._flaw(number, f"the word {one_line(words[-1], 40)!r}, which is not one of the 1-grams")
            self.hashes.append(hash(" ".join(words)))
            self.contexts.append(hash(" ".join(words[:-1])))
            yield words, probability, backoff
        raise _damaged(self.path, "it has no end")

    def _flaw(self, number, what):
        return UserError(f"Line {number} of the language model {self.path} has {what}; write it again.")

    def check(self, stated, shorter):
        """Compare with the stated number, and with the n-grams of the order below."""
        if len(self.hashes) != stated:
            raise _damaged(self.path, f"it states {stated} {self.order}-grams, but holds {len(self.hashes)}")
        if not stated:
            self.hashes = np.zeros(0, np.int64)
            return
        hashes, contexts = (np.frombuffer(each, np.int64) for each in (self.hashes, self.contexts))
        self.hashes = np.sort(hashes)
        if (twice := self.hashes[1:][self.hashes[1:] == self.hashes[:-1]]).size:
            first, second = np.flatnonzero(hashes == twice[0])[:2] + 1
            raise _damaged(self.path, f"its {self.order}-grams number {first} and {second} are the same")
        if shorter is not None and not (known := np.isin(np.unique(contexts), shorter)).all():
            number = np.flatnonzero(contexts == np.unique(contexts)[~known][0])[0] + 1
            raise _damaged(self.path, f"the first words of its {self.order}-gram number {number} are not a {self.order - 1}-gram")


def arpa_words(path):
    """The words of a language model, sorted."""
    words = (words[0] for words, *_ in itertools.takewhile(lambda gram: len(gram[0]) == 1, read_arpa(path)))
    return sorted({*words} - {"<s>", "</s>", "<unk>", "<UNK>"})


def share_unknown(words, texts):
    """The share of running words of texts that are not in a language model.

    Arguments
    ---------
    words : iterable of str
        Words of the language model, see :func:`arpa_words`.
    texts : iterable of str
        The reference texts.

    Returns
    -------
    float
        From 0 to 1; 0 for texts without words.

    Example
    -------
    >>> share_unknown(["A", "CAT"], ["A CAT", "A HAT"])
    0.25
    """
    words, said = set(words), [word for text in texts for word in text.split()]
    return sum(word not in words for word in said) / max(1, len(said))


def check_spelling(words, tokenizer, path):
    """Refuse a language model in the other case, with which every word would be unknown."""
    sample = words[:: max(1, len(words) // 1000)]
    foreign = [word for word in sample if tokenizer.unk_id() in tokenizer.encode_as_ids(word)]
    if 2 * len(foreign) > len(sample) or not sample:
        example = f", such as {foreign[0]}" if foreign else ""
        raise UserError(
            f"The tokenizer cannot write most words of the language model {path}{example}; give one in the case, upper or lower, "
            "of the transcripts."
        )


def flashlight_lm(path, words, pieces, weight, word_score):
    """A word language model that scores tokens, with flashlight's interface.

    A word is scored at the first token of the next word, or at the end. The cost of an unknown word is added as soon as no known
    word has this beginning, so that such beginnings do not fill the beam.
    """
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary
    from torchaudio.models.decoder import CTCDecoderLM, CTCDecoderLMState

    weight = weight * math.log(10)  # KenLM's scores are log10
    unknown = weight * UNKNOWN_WORD
    kenlm = KenLM(path, Dictionary([*words, "<unk>"]))
    stated = kenlm.score(kenlm.start(True), len(words))[1]
    surplus = stated if stated <= IMPOSSIBLE else 0.0

    class WordLm(CTCDecoderLM):
        def forget(self):
            """Drop the states of an utterance."""
            self.known = {}  # state -> the word so far, KenLM's state before it, cost already added, score of the last token

        def start(self, start_with_nothing):
            state = CTCDecoderLMState()
            self.known = {state: ("", kenlm.start(False), 0.0, 0.0)}
            return state

        def score(self, state, token):
            following = state.child(token)  # the same object each time
            known = self.known.get(following)
            if known is None:
                word, history, paid, _ = self.known[state]
                piece, score = pieces[token], 0.0
                if piece[0] == "\u2581":
                    history, score = self._finish_word(word, history, paid)
                    word, paid, piece = "", 0.0, piece[1:]
                word += piece
                place = bisect.bisect_left(words, word)
                due = 0.0 if place < len(words) and words[place].startswith(word) else unknown
                known = self.known[following] = (word, history, due, score + due - paid)
            return following, known[3]

        def finish(self, state):
            word, history, paid, _ = self.known[state]
            history, score = self._finish_word(word, history, paid)
            return state, score + weight * kenlm.finish(history)[1]

        def _finish_word(self, word, history, paid):
            if not word:  # several boundaries in a row
                return history, 0.0
            place = bisect.bisect_left(words, word)
            if place == len(words) or words[place] != word:
                history, score = kenlm.score(history, len(words))
                return history, weight * (score - surplus) + word_score + unknown - paid
            history, score = kenlm.score(history, place)
            return history, weight * score + word_score - paid

    return WordLm()
