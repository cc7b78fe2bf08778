"""Word n-gram language models in ARPA format, for the CTC beam searches: checks, the list of words, and scores by tokens."""

import bisect
import gzip
import math
import os
import re

from speechbrain_ext.utils.errors import UserError, one_line

# SpeechBrain's default, for both searches: log10, added to the language model's score of <unk>.
UNKNOWN_WORD = -10.0


def open_arpa(path):
    """Open an ARPA file as text, gzipped or not."""
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return (gzip.open if gzipped else open)(path, "rt", encoding="utf-8", errors="replace")


def check_arpa(path):
    """Refuse a file that is not a complete ARPA file of order 2 or more.

    Arguments
    ---------
    path : str
        The file, plain or gzipped.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    UserError
        If it is in another format, begins with a byte order mark, is cut off, has another number of entries than it states, or is
        of order 1.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no language model {path}; check lm_file.")
    stated, found, order, ended = {}, {}, None, False
    try:
        with open_arpa(path) as file:
            if file.read(1) == "\ufeff":
                raise UserError(f"The language model {path} begins with a byte order mark; write it without one.")
            file.seek(0)
            for number, line in enumerate(file, 1):
                line = line.strip()
                if line.startswith("\\"):
                    section = re.fullmatch(r"\\(\d+)-grams:", line)
                    order, ended = (int(section[1]) if section else 0 if line == "\\data\\" else None), line == "\\end\\"
                    if ended:
                        break
                elif order == 0 and (count := re.fullmatch(r"ngram\s+(\d+)\s*=\s*(\d+)", line)):
                    stated[int(count[1])] = int(count[2])
                elif order and line:
                    found[order] = found.get(order, 0) + 1
                    if len(line.split()) < order + 1:
                        raise UserError(f"Line {number} of the language model {path} has too few fields; write it again.")
                elif order is None and not stated and number > 10_000:
                    break
    except (OSError, EOFError) as error:
        raise UserError(f"The language model {path} cannot be read to its end; write it again ({one_line(error)}).") from error
    if not stated:
        raise UserError(
            f"The language model {path} is not in ARPA format; give the ARPA file, not KenLM's binary file, which has no list of "
            "words."
        )
    if not ended or found != {order: count for order, count in stated.items() if count}:
        raise UserError(
            f"The language model {path} cannot be read; write it again (it states {stated} entries by order, but holds {found}"
            f"{'' if ended else ', and has no end'})."
        )
    if max(stated) < 2:
        raise UserError(f"The language model {path} has only single words; give one of order 2 or more.")


def arpa_words(path):
    """The words of a language model, sorted."""
    words = set()
    with open_arpa(path) as file:
        for line in file:
            if line.startswith("\\1-grams:"):
                break
        for line in file:
            if line.startswith("\\"):
                break
            if line.strip():
                words.add(line.split()[1])  # the first field is the log10 probability
    return sorted(words - {"<s>", "</s>", "<unk>", "<UNK>"})


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
                return history, weight * score + word_score + unknown - paid
            history, score = kenlm.score(history, place)
            return history, weight * score + word_score - paid

    return WordLm()
