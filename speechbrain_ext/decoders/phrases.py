"""Phrases that a search prefers: names and words that the user expects.

A phrase in a hypothesis, from the beginning of a word to the end of one, adds its bonus to the score. The bonus is added token by
token, so that the beam keeps the hypothesis, and is subtracted again if the phrase does not continue. The automaton is that of
Aho and Corasick 1975 (https://doi.org/10.1145/360825.360855), so phrases may overlap, begin alike and contain one another.
icefall and NeMo also use it.
"""

import math
from collections import deque

import torch

from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.dataio.tokenizer import is_special
from speechbrain_ext.decoders.token_graph import TokenGraph
from speechbrain_ext.utils.errors import UserError, is_number, one_line
from speechbrain_ext.utils.text import listing

BONUS = 2.0
"""Bonus per token of a phrase without a bonus. It is WeNet's value, which lowers its errors on phrases by a quarter."""
LARGEST_BONUS = 1000
MOST_TOKENS = 1_000_000
"""Most tokens of all phrases, common beginnings counted once; their graph is built in 1 GB."""


def read_phrases(path, tokenizer=None, per_token=None):
    """Read phrases and their bonuses.

    Arguments
    ---------
    path : str or os.PathLike
        A text file with one phrase per line, optionally followed by a tab and its bonus; by default 2 per token.
    tokenizer : sentencepiece.SentencePieceProcessor, optional
        The model's tokenizer, to name the lines of phrases that it cannot write.
    per_token : float, optional
        The bonus per token of phrases without a bonus of their own; it needs the tokenizer. A phrase gets at most 1000.

    Returns
    -------
    dict
        The bonus of each phrase; without ``per_token``, None for a phrase without one.

    Raises
    ------
    OSError
        If the file cannot be read.
    UserError
        If the file has no phrases, one of them twice, a bonus that is not a number, or a phrase that the tokenizer cannot write,
        or ``per_token`` is not a number from 0 to 1000.

    Example
    -------
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "phrases.txt")
    >>> with open(path, "w") as file:
    ...     _ = file.write("NEW YORK\\nANN\\t7.5\\n")
    >>> read_phrases(path)
    {'NEW YORK': None, 'ANN': 7.5}
    """
    if per_token is not None and not is_number(per_token, 0, LARGEST_BONUS):
        raise UserError(f"The bonus per token of the phrases is {per_token!r}; give a number from 0 to {LARGEST_BONUS}.")
    if per_token is not None and tokenizer is None:
        raise UserError(f"The bonus per token of the phrases is {per_token!r}, but there is no tokenizer; give the model's.")
    phrases, unknown = {}, []
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8; write it in UTF-8, one phrase per line.") from error
    for number, line in enumerate(lines, 1):
        text, *bonus = line.rstrip("\t").split("\t")
        text = _normal(text)
        if not text and not any(bonus):
            continue
        try:
            (value,) = map(float, bonus) if bonus else [None]
        except ValueError:
            value = text = ""
        if not text or value is not None and not is_number(value, 0, LARGEST_BONUS):
            shown = one_line(line.replace("\t", "<tab>"), 60)
            raise UserError(
                f"Line {number} of {path} is {shown!r}; give a phrase, optionally with a tab and a bonus from 0 to "
                f"{LARGEST_BONUS}."
            )
        if text in phrases:
            raise UserError(f"Line {number} of {path} repeats {one_line(text, 60)!r}; remove one of them.")
        phrases[text] = value
        if tokenizer is not None and not _can_write(tokenizer, text):
            unknown.append((number, text))
    if unknown:
        shown = listing((f"{text!r} in line {number}" for number, text in unknown), 3)
        raise _unwritable(
            tokenizer, [text for _, text in unknown], f"{len(unknown)} of the {len(phrases)} phrases of {path}, such as {shown}"
        )
    if not phrases:
        raise UserError(f"{path} has no phrases; give one per line.")
    if per_token is None:
        return phrases
    usual = {text: min(per_token * len(tokenizer.encode_as_ids(text)), LARGEST_BONUS) for text in phrases}
    return {text: usual[text] if bonus is None else bonus for text, bonus in phrases.items()}


def normal_phrases(phrases):
    """Phrases as :func:`read_phrases` gives them.

    Arguments
    ---------
    phrases : dict
        The bonus of each phrase; None = 2 per token.

    Returns
    -------
    dict
        The same, in NFKC and with single spaces.

    Raises
    ------
    UserError
        If a phrase is given twice, or a bonus is no number from 0 to 1000.

    Example
    -------
    >>> normal_phrases({" NEW  YORK": None})
    {'NEW YORK': None}
    """
    if not isinstance(phrases, dict) or not all(isinstance(text, str) and text.split() for text in phrases):
        raise UserError(f"The phrases are {one_line(repr(phrases), 60)}; give a dict with a bonus, or None, for each phrase.")
    normal = {}
    for text, bonus in phrases.items():
        if bonus is not None and not is_number(bonus, 0, LARGEST_BONUS):
            raise UserError(f"The bonus of the phrase {text!r} is {bonus!r}; give None, or a number from 0 to {LARGEST_BONUS}.")
        if _normal(text) in normal:
            raise UserError(f"The phrases have {_normal(text)!r} twice; remove one of them.")
        normal[_normal(text)] = bonus
    return normal


def _normal(text):
    return " ".join(normal_form(text).split())


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
        If the tokenizer cannot write a phrase, a bonus is no number from 0 to 1000, or there are too many phrases.
    """
    phrases = normal_phrases(phrases)
    if unknown := [text for text in phrases if not _can_write(tokenizer, text)]:
        raise _unwritable(
            tokenizer, unknown, f"{len(unknown)} of the {len(phrases)} phrases, such as {listing(map(repr, unknown), 3)}"
        )
    # For each node: the bonus of the phrase that ends here, and the largest partial bonus of a longer one
    children, own, ahead = [{}], [0.0], [0.0]
    for text, bonus in phrases.items():
        ids, node = tokenizer.encode_as_ids(text), 0
        bonus = BONUS * len(ids) if bonus is None else float(bonus)
        for depth, token in enumerate(ids, 1):
            if token not in children[node]:
                children[node][token] = len(children)
                for values, value in ((children, {}), (own, 0.0), (ahead, 0.0)):
                    values.append(value)
            node = children[node][token]
            if depth < len(ids):
                ahead[node] = max(ahead[node], bonus * depth / len(ids))
        own[node] += bonus
        if len(children) > MOST_TOKENS:  # before the graph fills the memory
            raise UserError(f"The {len(phrases)} phrases have more than {MOST_TOKENS} tokens; give fewer.")
    return _graph(children, own, ahead, tokenizer)


def _graph(children, whole, part, tokenizer):
    """The token graph of a tree of phrases. A node backs off to the longest suffix that is also the start of a phrase."""
    shorter, queue, order = [0] * len(children), deque([0]), []
    while queue:
        node = queue.popleft()
        order.append(node)
        # Add the values of the suffix
        whole[node] += whole[shorter[node]] if node else 0.0
        part[node] = max(part[node], part[shorter[node]])
        for token, child in children[node].items():
            above = node
            while above and token not in children[shorter[above]]:
                above = shorter[above]
            shorter[child] = children[shorter[above]][token] if above else 0
            queue.append(child)
    # A bonus is final at the end of the phrase's last word; until then it is held, as are partial bonuses of longer phrases
    tokens = range(tokenizer.vocab_size())
    special = torch.tensor([is_special(tokenizer, token) for token in tokens])
    begins = torch.tensor([tokenizer.id_to_piece(token).startswith("▁") for token in tokens])
    whole, part, shorter = torch.tensor(whole), torch.tensor(part), torch.tensor(shorter)
    held = whole + part
    lost = torch.stack((part, held), 1)  # before a token that begins a word, and before any other
    root, following = torch.zeros(len(tokens)), torch.zeros(len(tokens), dtype=torch.long)
    for token, child in children[0].items():
        root[token], following[token] = held[child], child
    edges = [(node * len(tokens) + token, child) for node in order[1:] for token, child in children[node].items()]
    keys, after = torch.tensor(sorted(edges), dtype=torch.long).view(-1, 2).unbind(1)
    classes = (~begins).long()
    values = held[after] - lost[keys // len(tokens), classes[keys % len(tokens)]]
    backoff = lost[shorter] - lost
    tables = (root, following, (keys, values, after), shorter, backoff, -part, classes.masked_fill(special, 2))
    return TokenGraph(*tables, is_reward=True)


def _can_write(tokenizer, text):
    ids = tokenizer.encode_as_ids(text)
    return bool(ids) and not any(map(tokenizer.is_unknown, ids))


def _unwritable(tokenizer, phrases, shown):
    """The error for phrases that the tokenizer cannot write."""
    cases = {case for case in ("upper", "lower") for text in phrases if _can_write(tokenizer, getattr(text, case)())}
    hint = f", in {min(cases)} case" if cases else ""
    if any(_is_number(text.rpartition(" ")[2]) for text in phrases):
        hint += ", with a tab before a bonus"
    return UserError(f"The model cannot write {shown}; write them as in its transcripts{hint}, or leave them out.")


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
