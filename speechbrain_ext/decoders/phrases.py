"""Phrases that a search prefers: names and words that the user expects.

A phrase in a hypothesis, from the beginning of a word to the end of one, adds its bonus to the score. The bonus is added token by
token, so that the beam keeps the hypothesis, and is subtracted again if the phrase does not continue. The automaton is that of
Aho and Corasick 1975 (https://doi.org/10.1145/360825.360855), so phrases may overlap, begin alike and contain one another.
icefall and NeMo also use it.
"""

from collections import deque

import numpy as np
import torch

from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.decoders.searchers import is_number
from speechbrain_ext.decoders.token_graph import LARGEST_TABLE, TokenGraph
from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.text import listing

BONUS = 2.0
"""Bonus per token of a phrase without a bonus. It is WeNet's value, which lowers its errors on phrases by a quarter."""
LARGEST_BONUS = 1000


def read_phrases(path):
    """Read phrases and their bonuses.

    Arguments
    ---------
    path : str or os.PathLike
        A text file with one phrase per line, optionally followed by a tab and its bonus; by default 2 per token.

    Returns
    -------
    dict
        The bonus of each phrase, or None.

    Raises
    ------
    OSError
        If the file cannot be read.
    UserError
        If the file has no phrases, one of them twice, or a bonus that is not a number.

    Example
    -------
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "phrases.txt")
    >>> with open(path, "w") as file:
    ...     _ = file.write("NEW YORK\\nANN\\t7.5\\n")
    >>> read_phrases(path)
    {'NEW YORK': None, 'ANN': 7.5}
    """
    phrases = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8; write it in UTF-8, one phrase per line.") from error
    for number, line in enumerate(lines, 1):
        text, *bonus = line.split("\t")
        text = " ".join(normal_form(text).split())
        if not text and not any(bonus):
            continue
        try:
            (value,) = map(float, bonus) if bonus else [None]
        except ValueError:
            value = text = ""
        if not text or value is not None and not is_number(value, 0, LARGEST_BONUS):
            raise UserError(
                f"Line {number} of {path} is {one_line(line, 60)!r}; give a phrase, optionally with a tab and a bonus from 0 to "
                f"{LARGEST_BONUS}."
            )
        if text in phrases:
            raise UserError(f"Line {number} of {path} repeats {one_line(text, 60)!r}; remove one of them.")
        phrases[text] = value
    if not phrases:
        raise UserError(f"{path} has no phrases; give one per line.")
    return phrases


def phrase_graph(phrases, tokenizer):
    """The automaton of phrases.

    Arguments
    ---------
    phrases : dict
        The bonus of each phrase; None = 2 per token.
    tokenizer : sentencepiece.SentencePieceProcessor
        The model's tokenizer.

    Returns
    -------
    TokenGraph

    Raises
    ------
    UserError
        If the tokenizer cannot write a phrase, or there are too many phrases.
    """
    tokens = tokenizer.vocab_size()
    spelled = {text: tokenizer.encode_as_ids(text) for text in phrases}
    if unknown := [text for text, ids in spelled.items() if not ids or any(map(tokenizer.is_unknown, ids))]:
        others = {case for case in ("upper", "lower") for text in unknown if _can_write(tokenizer, getattr(text, case)())}
        hint = f", in {min(others)} case" if others else ""
        raise UserError(
            f"The model cannot write {len(unknown)} of the {len(phrases)} phrases, such as {listing(map(repr, unknown), 3)}; "
            f"write them as in its transcripts{hint}, or leave them out."
        )
    children, own, ahead = (
        [{}],
        [0.0],
        [0.0],
    )  # per node: bonus of the phrase that ends here, and the largest partial bonus of a longer phrase
    for text, ids in spelled.items():
        bonus, node = BONUS * len(ids) if phrases[text] is None else float(phrases[text]), 0
        for depth, token in enumerate(ids, 1):
            if token not in children[node]:
                children[node][token] = len(children)
                for values, value in ((children, {}), (own, 0.0), (ahead, 0.0)):
                    values.append(value)
            node = children[node][token]
            if depth < len(ids):
                ahead[node] = max(ahead[node], bonus * depth / len(ids))
        own[node] += bonus
    if len(children) * tokens > LARGEST_TABLE:
        raise UserError(
            f"The phrases have {len(children)} tokens, too many for a model of {tokens} tokens; give phrases with at most "
            f"{LARGEST_TABLE // tokens}."
        )
    return TokenGraph(*map(torch.from_numpy, _tables(children, own, ahead, tokenizer)))


def _tables(children, own, ahead, tokenizer):
    """For each node and token, the next node and the added score; and the added score of the text's end."""
    nodes, tokens = len(children), range(tokenizer.vocab_size())
    following = np.zeros((nodes, len(tokens)), np.int32)
    whole, part, fail, queue = np.array(own, np.float32), np.array(ahead, np.float32), [0] * nodes, deque([0])
    while queue:
        node = queue.popleft()
        if node:
            following[node] = following[fail[node]]
            # Add the values of the longest suffix that is also the start of a phrase
            whole[node] += whole[fail[node]]
            part[node] = max(part[node], part[fail[node]])
        for token, child in children[node].items():
            fail[child] = following[node, token]  # the next node of the fail node, or the root
            following[node, token] = child
            queue.append(child)
    # A bonus is final at the end of the phrase's last word; until then it is held, as are partial bonuses of longer phrases
    begins = np.array([tokenizer.id_to_piece(token).startswith("▁") for token in tokens])
    held = (whole + part)[following]
    added = held - part[:, None] - np.where(begins, 0.0, whole[:, None])
    special = [token for token in tokens if tokenizer.is_control(token) or tokenizer.is_unknown(token)]
    following[:, special], added[:, special] = np.arange(nodes)[:, None], 0.0
    return following, added.astype(np.float32), -part


def _can_write(tokenizer, text):
    return not any(map(tokenizer.is_unknown, tokenizer.encode_as_ids(text)))


def count_phrases(phrases, said, found):
    """Count phrases in the references, and how many of them a search found in the same utterance.

    Arguments
    ---------
    phrases : iterable of str
        The phrases.
    said, found : list of list of str
        The reference words of each utterance, and the words that a search found.

    Returns
    -------
    tuple of int
        Occurrences in the references, and how many of them were found.

    Example
    -------
    >>> count_phrases(["NEW YORK"], [["IN", "NEW", "YORK"], ["NEW", "YORK"]], [["IN", "NEW", "YORK"], ["NEW", "FORK"]])
    (2, 1)
    """
    counts = [0, 0]
    for words, others in zip(said, found, strict=True):
        for phrase in phrases:
            times = [_occurrences(phrase.split(), each) for each in (words, others)]
            counts[0] += times[0]
            counts[1] += min(times)
    return tuple(counts)


def _occurrences(phrase, words):
    return sum(words[i : i + len(phrase)] == phrase for i in range(len(words) - len(phrase) + 1))
