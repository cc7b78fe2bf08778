"""Words with times and confidence, from CTC probabilities and tokens."""

import math
from dataclasses import dataclass, replace

import torch
from torchaudio.functional import forced_align, merge_tokens

from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.utils.errors import UserError

FRAME_SECONDS = 0.04
"""Seconds per encoder frame: 10 ms of a feature frame times the subsampling factor, 4."""


@dataclass(frozen=True)
class Word:
    """A word with its times in seconds, and the geometric mean of its tokens' probabilities."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Segment:
    """A piece of speech between two pauses, with its times in seconds and the geometric mean of its words' confidence."""

    start: float
    end: float
    text: str
    confidence: float
    words: tuple = ()
    resume: float | None = None
    """Time in seconds at which an interrupted run can continue with the same result; None if it is not needed."""


def within(part, seconds):
    """Cut the times of a segment or word at the end of the audio, which may lie inside the last frame.

    Arguments
    ---------
    part : Segment or Word
        With times in seconds.
    seconds : float
        Length of the audio.

    Returns
    -------
    Segment or Word

    Example
    -------
    >>> within(Word("cat", 1.0, 1.52, 0.9), 1.5)
    Word(text='cat', start=1.0, end=1.5, confidence=0.9)
    """
    limit = math.floor(1000 * seconds + 1e-6) / 1000  # a whole number of milliseconds, as all times
    if part.end <= limit:
        return part
    keys = {"words": tuple(within(word, seconds) for word in part.words)} if isinstance(part, Segment) else {}
    return replace(part, start=min(part.start, limit), end=min(part.end, limit), **keys)


def collapse(best, blank=0, previous=None):
    """Tokens of the most probable path, without repetitions and blanks.

    Arguments
    ---------
    best : list of int
        The most probable token of each frame.
    blank : int
        The blank token.
    previous : int, optional
        The most probable token of the frame before.

    Returns
    -------
    list of tuple
        (token, first frame).

    Example
    -------
    >>> collapse([0, 3, 3, 0, 3, 5])
    [(3, 1), (3, 4), (5, 5)]
    """
    tokens = []
    for frame, token in enumerate(best):
        if token not in (blank, previous):
            tokens.append((token, frame))
        previous = token
    return tokens


def greedy_tokens(log_probs, lens, blank=0):
    """Greedy CTC search of a batch. It waits once for the device; SpeechBrain's search waits twice for each utterance.

    Arguments
    ---------
    log_probs : torch.Tensor
        (B, T, V) log-probabilities, or logits.
    lens : torch.Tensor
        (B,) relative lengths.
    blank : int
        The blank token.

    Returns
    -------
    list of list of int
        Tokens of each utterance.

    Example
    -------
    >>> best = torch.tensor([[1, 1, 0, 2], [2, 0, 2, 2]])
    >>> greedy_tokens(torch.eye(3)[best], torch.tensor([1.0, 0.5]))
    [[1, 2], [2]]
    """
    best, frames = log_probs.argmax(-1), absolute_lengths(lens, log_probs.shape[1])
    rows = torch.cat((frames.to(best.device).unsqueeze(1), best), dim=1).tolist()
    return [[token for token, _ in collapse(row[1 : 1 + row[0]], blank)] for row in rows]


def align(log_probs, tokens, blank=0):
    """Find the most probable frames of given tokens.

    Arguments
    ---------
    log_probs : torch.Tensor
        (T, V) log-probabilities of a CTC model.
    tokens : list of int
        Tokens of the spoken text.
    blank : int
        The blank token.

    Returns
    -------
    list of tuple
        For each token its first frame, the frame after its last one, and its mean log-probability in these.

    Raises
    ------
    ValueError
        If there are fewer frames than these tokens need.

    Example
    -------
    >>> log_probs = torch.eye(4)[[0, 2, 2, 0, 3]].mul(5).log_softmax(-1)
    >>> [(start, end) for start, end, _ in align(log_probs, [2, 3])]
    [(1, 3), (4, 5)]
    """
    if not tokens:
        return []
    needed = len(tokens) + sum(one == other for one, other in zip(tokens, tokens[1:], strict=False))
    if needed > len(log_probs):
        raise UserError(
            f"The {len(tokens)} tokens of the text need {needed} frames, but the audio has {len(log_probs)}; give a shorter text."
        )
    # On the host, because torchaudio has no kernel for Apple's devices; it is little work
    path, scores = forced_align(log_probs.float().cpu().unsqueeze(0), torch.tensor([tokens]), blank=blank)
    return [(span.start, span.end, span.score) for span in merge_tokens(path[0], scores[0], blank)]


def group_words(tokens, spans, tokenizer, offset=0):
    """Words of aligned tokens.

    Arguments
    ---------
    tokens : list of int
        Token ids.
    spans : list of tuple
        From :func:`align`.
    tokenizer : sentencepiece.SentencePieceProcessor
        A tokenizer that begins words with "▁".
    offset : int
        Number of frames before the aligned ones.

    Returns
    -------
    tuple of Word
    """
    groups = []
    for token, span in zip(tokens, spans, strict=True):
        if not groups or tokenizer.id_to_piece(token).startswith("▁"):
            groups.append([])
        groups[-1].append((token, span))
    words = []
    for group in groups:
        text = " ".join(tokenizer.decode_ids([token for token, _ in group]).split())
        if not text:  # a word boundary alone
            continue
        # The frame of a separate boundary is not that of its word
        spoken = [pair for pair in group if tokenizer.id_to_piece(pair[0]) != "▁"]
        start, end = (FRAME_SECONDS * (offset + frame) for frame in (spoken[0][1][0], spoken[-1][1][1]))
        words.append(Word(text, round(start, 3), round(end, 3), confidence([score for _, (*_, score) in spoken])))
    return tuple(words)


def make_segment(log_probs, tokens, tokenizer, blank=0, offset=0):
    """Make a segment from frames and the tokens that a search found in them; None without words.

    Arguments
    ---------
    log_probs : torch.Tensor
        (T, V) log-probabilities of a CTC model.
    tokens : list of int
        Tokens that a search found.
    tokenizer : sentencepiece.SentencePieceProcessor
        Turns tokens into words.
    blank : int
        The blank token.
    offset : int
        Number of frames before ``log_probs``.

    Returns
    -------
    Segment or None
    """
    text = " ".join(tokenizer.decode_ids(tokens).split())
    if not text:
        return None
    try:
        spans = align(log_probs, tokens, blank)
    except ValueError:  # another search than CTC's may find too many tokens for these frames
        times = (round(FRAME_SECONDS * (offset + frame), 3) for frame in (0, len(log_probs)))
        return Segment(*times, text, 0.0)
    words = group_words(tokens, spans, tokenizer, offset)
    return Segment(words[0].start, words[-1].end, text, confidence_of(words), words)


def confidence_of(words):
    """The confidence of a segment with these words."""
    return confidence([math.log(max(word.confidence, 1e-9)) for word in words])


def confidence(scores):
    """The geometric mean of probabilities, from their logarithms."""
    return round(math.exp(math.fsum(scores) / len(scores)), 4)
