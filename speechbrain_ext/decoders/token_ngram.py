"""N-gram language models of tokens for the beams over tokens, from files that ``ngram --tokens`` writes.

A second n-gram, of the training transcripts, can have a negative weight. It subtracts the language model that a transducer has
learned, so that another one replaces it (low-order density ratio, Zheng et al. 2022, https://arxiv.org/abs/2203.16776).
"""

import math
import os
import re

import numpy as np
import torch

from speechbrain_ext.decoders.searchers import is_number
from speechbrain_ext.decoders.token_graph import LARGEST_TABLE, TokenGraph
from speechbrain_ext.decoders.word_lm import arpa_words, check_arpa, open_arpa
from speechbrain_ext.utils.errors import UserError, one_line

NGRAM_WEIGHT, LODR_WEIGHT = 0.3, 0.15
"""Default weights of log-probabilities: icefall's for an external language model, and half of it for low-order density ratio."""


def is_arpa(source):
    """Whether a language model is an ARPA file and not a folder or repository, judged by its name."""
    return os.path.isfile(source) or os.fspath(source).endswith((".arpa", ".gz"))


def is_of_tokens(path):
    """Whether an ARPA file is of tokens, not of words: some of its entries then begin with "▁"."""
    check_arpa(path)
    return any(word.startswith("▁") for word in arpa_words(path))


def in_tokens(sentences, tokenizer):
    """Turn sentences of words into tokens, for :func:`speechbrain_ext.decoders.ngram.write_arpa`."""
    for words in sentences:
        pieces = tokenizer.encode_as_pieces(" ".join(words))
        yield ["<unk>" if tokenizer.is_unknown(tokenizer.piece_to_id(piece)) else piece for piece in pieces]


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
        If the file is not in ARPA format, is of other tokens, or is too large.

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
    >>> ngram_graph(path, tokenizer).following.shape[1] == tokenizer.vocab_size()
    True
    """
    if not is_number(weight):
        raise UserError(f"The weight of the language model {path} is {weight!r}; give a number.")
    check_arpa(path)
    pieces = {tokenizer.id_to_piece(token): token for token in range(tokenizer.vocab_size())}
    special = [token for token in pieces.values() if tokenizer.is_control(token) or tokenizer.is_unknown(token)]
    if foreign := [word for word in arpa_words(path) if pieces.get(word, special[0] if special else -1) in special]:
        raise UserError(
            f"The language model {path} has {one_line(foreign[0], 40)!r}, which is not a token of the model; write one with "
            "ngram --tokens MODEL."
        )
    grams, order = _read(path, pieces)
    contexts = {gram[:-1] for gram in grams} | {gram for gram, (_, backoff) in grams.items() if backoff and len(gram) < order}
    contexts = sorted(contexts, key=len)
    if len(contexts) * len(pieces) > LARGEST_TABLE:
        raise UserError(
            f"The language model {path} has {len(contexts)} contexts, too many for a model of {len(pieces)} tokens; write one "
            f"with at most {LARGEST_TABLE // len(pieces)}, with ngram --prune or a lower --order."
        )
    return TokenGraph(*_tables(contexts, grams, order, len(pieces), special, weight * math.log(10)))


def _read(path, pieces):
    """(log10 probability, backoff) by n-gram of token ids, where ``<s>``, ``</s>`` and ``<unk>`` stay text; and the order."""
    grams, order = {}, 0
    with open_arpa(path) as file:
        for line in file:
            if section := re.fullmatch(r"\\(\d+)-grams:", line.strip()):
                order = int(section[1])
            elif order and not line.startswith("\\") and line.strip():
                probability, *words = line.split()
                backoff = float(words.pop()) if len(words) > order else 0.0
                gram = tuple(pieces.get(word, word) if word not in ("<s>", "</s>", "<unk>", "<UNK>") else word for word in words)
                grams[gram] = float(probability), backoff
    return grams, order


def _tables(contexts, grams, order, tokens, special, scale):
    number = {context: place for place, context in enumerate(contexts)}
    unknown = next((grams[gram][0] for gram in (("<unk>",), ("<UNK>",)) if gram in grams), -10.0)
    following = np.zeros((len(contexts), tokens), np.int32)
    added, ends = np.full((len(contexts), tokens), unknown), np.full(len(contexts), unknown)
    explicit = {}
    for gram, (probability, _) in grams.items():
        explicit.setdefault(gram[:-1], []).append((gram[-1], probability))
    for context, place in number.items():  # shorter contexts first
        if not context:
            following[place] = [_known((token,), number) for token in range(tokens)]
        else:
            shorter = _known(context[1:], number)
            backoff = grams[context][1]
            added[place], ends[place], following[place] = added[shorter] + backoff, ends[shorter] + backoff, following[shorter]
        for token, probability in explicit.get(context, ()):
            if token == "</s>":
                ends[place] = probability
            elif isinstance(token, int):
                added[place, token] = probability
        for token in (
            range(tokens) if not context else [token for token, _ in explicit.get(context, ()) if isinstance(token, int)]
        ):
            following[place, token] = _known((*context, token)[-(order - 1) :], number)
    first = number.get(("<s>",), 0)  # swapped with row 0, the state in which texts begin
    following[:, special], added[:, special] = np.arange(len(contexts))[:, None], 0.0
    swap = np.arange(len(contexts))
    swap[[0, first]] = first, 0
    following, added, ends = swap[following[swap]], scale * added[swap], scale * ends[swap]
    return [torch.from_numpy(np.ascontiguousarray(table)) for table in (following, added, ends)]


def _known(context, number):
    """The index of the longest suffix of a context that is also a context."""
    while context not in number:
        context = context[1:]
    return number[context]
