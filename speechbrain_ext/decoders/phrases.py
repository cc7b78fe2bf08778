"""Phrases that a search is to listen for: names and words of which the user knows that they will be said.

Each time that a phrase is said, from the beginning of a word to the end of one, its bonus is added to the score. It is given out
token by token while the phrase is being said, so that a beam does not lose it, and taken back where it is not said to its end.
The automaton is that of Aho and Corasick 1975 (https://doi.org/10.1145/360825.360855): phrases may overlap, begin alike and lie
within one another. icefall and NeMo have it, too.
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
"""Of each token of a phrase, where its line gives no bonus: WeNet's, which lowers its errors on phrases by a quarter."""
LARGEST_BONUS = 1000


def read_phrases(path):
    """Read phrases and what each is worth.

    Arguments
    ---------
    path : str or os.PathLike
        A text file, one phrase per line, and after a tab its bonus; by default 2 for each of its tokens.

    Returns
    -------
    dict
        Bonuses, or None, by phrase.

    Raises
    ------
    OSError
        If the file cannot be read.
    UserError
        If it has no phrases, one of them twice, or something else than a number for a bonus.

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
        raise UserError(f"{path} is no text in UTF-8; write it as such, a phrase on each line.") from error
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
                f"Line {number} of {path} is {one_line(line, 60)!r}; give a phrase, and behind one tab its bonus, a number from "
                f"0 to {LARGEST_BONUS}."
            )
        if text in phrases:
            raise UserError(f"Line {number} of {path} has {one_line(text, 60)!r} again; leave one of them out.")
        phrases[text] = value
    if not phrases:
        raise UserError(f"{path} has no phrases; give one on each line.")
    return phrases


def phrase_graph(phrases, tokenizer):
    """The automaton of phrases.

    Arguments
    ---------
    phrases : dict
        Bonuses by phrase; None = 2 for each token.
    tokenizer : sentencepiece.SentencePieceProcessor
        Of the model.

    Returns
    -------
    TokenGraph

    Raises
    ------
    UserError
        If the tokenizer cannot write a phrase, or there are too many of them.
    """
    tokens = tokenizer.vocab_size()
    spelled = {text: tokenizer.encode_as_ids(text) for text in phrases}
    if unknown := [text for text, ids in spelled.items() if not ids or any(map(tokenizer.is_unknown, ids))]:
        others = {case for case in ("upper", "lower") for text in unknown if _can_write(tokenizer, getattr(text, case)())}
        hint = f" in {min(others)} case" if others else ""
        raise UserError(
            f"The model cannot write {len(unknown)} of the {len(phrases)} phrases, such as {listing(map(repr, unknown), 3)}; "
            f"write them as its transcripts are{hint}, or leave them out."
        )
    children, own, ahead = (
        [{}],
        [0.0],
        [0.0],
    )  # bonus of the phrase that ends at a node, and the largest share of one that goes on
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
            f"The phrases have {len(children)} tokens, and tables for {tokens} tokens each would be too large; give at most "
            f"{LARGEST_TABLE // tokens}."
        )
    return TokenGraph(*map(torch.from_numpy, _tables(children, own, ahead, tokenizer)))


def _tables(children, own, ahead, tokenizer):
    """Where each token leads from each node, what it adds, and what the end adds."""
    nodes, tokens = len(children), range(tokenizer.vocab_size())
    following = np.zeros((nodes, len(tokens)), np.int32)
    whole, part, fail, queue = np.array(own, np.float32), np.array(ahead, np.float32), [0] * nodes, deque([0])
    while queue:
        node = queue.popleft()
        if node:
            following[node] = following[fail[node]]
            # Of the longest of the node's endings that begin a phrase, too
            whole[node] += whole[fail[node]]
            part[node] = max(part[node], part[fail[node]])
        for token, child in children[node].items():
            fail[child] = following[node, token]  # where the fail node leads, or the root
            following[node, token] = child
            queue.append(child)
    # A phrase is said where its last word ends; until then its bonus is held, as are the shares of those that may go on
    begins = np.array([tokenizer.id_to_piece(token).startswith("▁") for token in tokens])
    held = (whole + part)[following]
    added = held - part[:, None] - np.where(begins, 0.0, whole[:, None])
    special = [token for token in tokens if tokenizer.is_control(token) or tokenizer.is_unknown(token)]
    following[:, special], added[:, special] = np.arange(nodes)[:, None], 0.0
    return following, added.astype(np.float32), -part


def _can_write(tokenizer, text):
    return not any(map(tokenizer.is_unknown, tokenizer.encode_as_ids(text)))


def count_phrases(phrases, said, found):
    """How often phrases were said, and how often of these a search has found them in the same utterance.

    Arguments
    ---------
    phrases : iterable of str
        Phrases.
    said, found : list of list of str
        The words of each utterance, and those that were found in it.

    Returns
    -------
    tuple of int

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
