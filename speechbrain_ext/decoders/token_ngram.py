"""N-gram language models of tokens for the beams over tokens, from files that ``ngram --tokens`` writes.

A second n-gram, of the training transcripts, can have a negative weight. It subtracts the language model that a transducer has
learned, so that another one replaces it (low-order density ratio, Zheng et al. 2022, https://arxiv.org/abs/2203.16776).
"""

import math
import os
from array import array
from typing import NamedTuple

import numpy as np
import torch

from speechbrain_ext.dataio.tokenizer import is_special, piece_ids
from speechbrain_ext.decoders.ngram import BEGIN, END, UNKNOWN
from speechbrain_ext.decoders.searchers import LARGEST_WEIGHT, is_number
from speechbrain_ext.decoders.token_graph import TokenGraph
from speechbrain_ext.decoders.word_lm import UNKNOWN_WORD, arpa_words, read_arpa
from speechbrain_ext.utils.errors import UserError, one_line

NGRAM_WEIGHT, LODR_WEIGHT = 0.3, 0.15
"""Default weights of log-probabilities: icefall's for an external language model, and half of it for low-order density ratio."""
MOST_NGRAMS = 20_000_000
"""Most n-grams of a language model. Loading takes up to 125 bytes for each, 2.5 GB, and the graph 20 of them."""
MOST_UNKNOWN = 0.5
"""Part of the words that a tokenizer cannot write, from which a text is of other letters, such as lower case for capitals."""
NEVER = -99.0
"""The log10 probability that stands for 0 in ARPA files."""


def is_arpa(source):
    """Whether a language model is an ARPA file and not a folder or repository, judged by its name."""
    return os.path.isfile(source) or os.fspath(source).endswith((".arpa", ".gz"))


def is_of_tokens(path):
    """Whether an ARPA file is of tokens, not of words: some of its entries then begin with "▁"."""
    return any(word.startswith("▁") for word in arpa_words(path))


def in_tokens(sentences, tokenizer):
    """Turn sentences of words into tokens, for :func:`speechbrain_ext.decoders.ngram.write_arpa`.

    Raises
    ------
    UserError
        After the last sentence, if the tokenizer cannot write :data:`MOST_UNKNOWN` of the words or more.
    """
    unknown = total = 0
    for words in sentences:
        pieces = tokenizer.encode_as_pieces(" ".join(words))
        pieces = [UNKNOWN if tokenizer.is_unknown(tokenizer.piece_to_id(piece)) else piece for piece in pieces]
        unknown, total = unknown + pieces.count(UNKNOWN), total + len(words)
        yield pieces
    if total and unknown >= MOST_UNKNOWN * total:
        raise UserError(
            f"The tokenizer cannot write {unknown} of the {total} words of the text; give text as in the model's transcripts, in "
            "capitals with --text-normalization upper, or in lower case with lower."
        )


def ngram_graph(path, tokenizer, weight=NGRAM_WEIGHT):
    """The automaton of a language model.

    Arguments
    ---------
    path : str
        An ARPA file of the model's tokens, gzipped or not.
    tokenizer : sentencepiece.SentencePieceProcessor
        The model's tokenizer.
    weight : float
        Weight of its natural log-probabilities.

    Returns
    -------
    TokenGraph

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    UserError
        If the file is not a correct ARPA file, is of other tokens, or is too large; or if the weight is not valid.

    Example
    -------
    >>> import io, os, tempfile
    >>> from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    >>> from speechbrain_ext.decoders.ngram import write_arpa
    >>> made, path = io.BytesIO(), os.path.join(tempfile.mkdtemp(), "lm.arpa")
    >>> SentencePieceTrainer.train(sentence_iterator=iter(["AB BA"]), model_writer=made, model_type="char", vocab_size=7,
    ...     pad_id=0, minloglevel=2, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False)
    >>> tokenizer = SentencePieceProcessor(model_proto=made.getvalue())
    >>> _ = write_arpa([tokenizer.encode_as_pieces(text) for text in ("AB BA", "B A")], path, order=2)
    >>> len(ngram_graph(path, tokenizer).root) == tokenizer.vocab_size()
    True
    """
    if not is_number(weight, -LARGEST_WEIGHT, LARGEST_WEIGHT):
        raise UserError(
            f"The weight of the language model {path} is {weight!r}; give a number from {-LARGEST_WEIGHT} to {LARGEST_WEIGHT}."
        )
    orders, unknown = _read(path, tokenizer)
    if weight < 0:
        unknown = _spare(orders, unknown, tokenizer.vocab_size())
    special = torch.tensor([is_special(tokenizer, token) for token in range(tokenizer.vocab_size())])
    return _graph(_sorted(orders, len(special)), unknown, special, weight * math.log(10))


def _read(path, tokenizer):
    """For each order, n-grams (N, order) of ids, and log10 probabilities and back-off weights (N,); and the score of ``<unk>``.

    After the tokens, ids are those of ``<s>`` and ``</s>``. N-grams with ``<unk>`` are left out, as no text has this token.
    """
    tokens = tokenizer.vocab_size()
    number = piece_ids(tokenizer) | {BEGIN: tokens, END: tokens + 1, UNKNOWN: -1, UNKNOWN.upper(): -1}
    orders, unknown = [], UNKNOWN_WORD
    for count, (words, probability, backoff) in enumerate(read_arpa(path), 1):
        if count > MOST_NGRAMS:
            raise UserError(
                f"The language model {path} has more than {MOST_NGRAMS} n-grams; write a smaller one, with ngram --prune or a "
                "lower --order."
            )
        if len(words) > len(orders):
            orders.append((array("i"), array("f"), array("f")))
        try:
            ids = [number[word] for word in words]
        except KeyError as error:
            raise UserError(
                f"The language model {path} has {one_line(error.args[0], 40)!r}, which is not a token of the model; write one "
                "with ngram --tokens MODEL."
            ) from error
        if -1 in ids:
            unknown = max(probability, NEVER) if len(ids) == 1 else unknown
            continue
        flat, probabilities, backoffs = orders[-1]
        flat.extend(ids)
        probabilities.append(max(probability, NEVER))
        backoffs.append(max(backoff, NEVER))
    known = set(orders[0][0])
    if not any(piece.strip("▁") for piece, token in number.items() if token in known and token < tokens):
        raise UserError(
            f"The language model {path} has none of the model's tokens; write one with ngram --tokens MODEL, from text as in the "
            "model's transcripts."
        )
    shapes = enumerate(orders, 1)
    return [(np.frombuffer(ids, np.int32).reshape(-1, n), *map(np.array, numbers)) for n, (ids, *numbers) in shapes], unknown


def _spare(orders, unknown, tokens):
    """Lift the scores of impossible n-grams to that of the rarest token, and return that of unknown tokens, which is the same if
    the file states none. A negative weight would otherwise reward such tokens most of all."""
    grams, probability, _ = orders[0]
    known = probability[(grams[:, 0] < tokens) & (probability > NEVER)]
    rarest = known.min(initial=0)
    for _, probability, backoff in orders:
        probability[probability <= NEVER] = rarest
        backoff[backoff <= NEVER] = 0
    return unknown if unknown > UNKNOWN_WORD else rarest


class _Order(NamedTuple):
    """The n-grams of an order, ascending by context and last token."""

    grams: np.ndarray
    """(N, n) ids."""
    probability: np.ndarray
    backoff: np.ndarray
    context: np.ndarray
    """(N,) index of all ids but the last, among the n-grams of the order below."""
    keys: np.ndarray
    """(N + 1,) both in one number, and a last one that no n-gram has."""


def _sorted(orders, tokens):
    """An :class:`_Order` for each order."""
    found = []
    for grams, probability, backoff in orders:
        context = _find(found, grams[:, :-1], tokens)
        keys = context * (tokens + 2) + grams[:, -1]
        sorting = np.argsort(keys)
        keys = np.append(keys[sorting], np.iinfo(np.int64).max)
        found.append(_Order(grams[sorting], probability[sorting], backoff[sorting], context[sorting], keys))
    return found


def _find(orders, grams, tokens):
    """The index (N,) of n-grams (N, n) in their order, or -1."""
    place = np.zeros(len(grams), np.int64)
    for order, token in zip(orders, grams.T, strict=False):
        wanted = place * (tokens + 2) + token
        place = np.searchsorted(order.keys, wanted)
        place[order.keys[place] != wanted] = -1
    return place


def _graph(orders, unknown, special, scale):
    """The token graph. Its states are the contexts: n-grams that others continue, or that have a back-off weight."""
    tokens, highest = len(special), len(orders) - 1
    states, total = [], 1  # the number of each n-gram that is a context, else -1; and -1 for none
    for order, longer in zip(orders, orders[1:], strict=False):
        is_context = order.backoff != 0
        is_context[longer.context] = True
        is_context &= order.grams[:, -1] <= tokens  # nothing follows the end
        states.append(np.append(np.where(is_context, total - 1 + is_context.cumsum(), -1), -1))
        total += int(is_context.sum())

    def longest(grams):
        """The state of the longest suffix that is a context."""
        state = np.zeros(len(grams), np.int64)
        for length in range(1, min(grams.shape[1], highest) + 1):
            found = states[length - 1][_find(orders, grams[:, -length:], tokens)]
            state = np.where(found >= 0, found, state)
        return state

    root, following = np.full(tokens, unknown, np.float32), np.zeros(tokens, np.int64)
    shorter, backoff, ends = np.zeros(total, np.int64), np.zeros(total, np.float32), np.full(total, unknown, np.float32)
    entries = []
    for n, order in enumerate(orders):
        token, state = order.grams[:, -1], states[n - 1][order.context] if n else np.zeros(len(order.grams), np.int64)
        is_token, is_end = (token < tokens) & (state >= 0), (token == tokens + 1) & (state >= 0)
        after = longest(order.grams[is_token])
        if n:
            entries.append((state[is_token] * tokens + token[is_token], order.probability[is_token], after))
        else:
            root[token[is_token]], following[token[is_token]] = order.probability[is_token], after
        ends[state[is_end]] = order.probability[is_end]
        if n < highest:
            chosen = states[n][:-1] >= 0
            own = states[n][:-1][chosen]
            shorter[own], backoff[own] = longest(order.grams[chosen, 1:]), order.backoff[chosen]
            ends[own] = ends[shorter[own]] + backoff[own]
    keys, values, after = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    start = int(states[0][_find(orders, np.array([[tokens]]), tokens)].clip(min=0).item())
    tables = (scale * root, following, shorter, scale * backoff[:, None], scale * ends)
    root, following, shorter, backoff, ends = map(torch.from_numpy, tables)
    entries = tuple(map(torch.from_numpy, (keys, scale * values, after)))
    return TokenGraph(root, following, entries, shorter, backoff, ends, special.long(), start)
