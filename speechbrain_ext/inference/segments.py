"""From CTC probabilities to words with times, and to segments between pauses, however long the audio.

A CTC model says nothing ("blank") in pauses. :class:`Segmenter` takes its probabilities in pieces, and ends a segment where that
lasts; greedy search never takes back what it has said, so the words of a segment before the last one are certain at once.
"""

import math
import re
from dataclasses import dataclass, replace

import torch
from torchaudio.functional import forced_align, merge_tokens

FRAME_SECONDS = 0.04
"""Of the front ends of :mod:`speechbrain_ext.lobes.subsampling` on features of 10 ms."""


@dataclass(frozen=True)
class Word:
    """A word with its times in seconds, and the geometric mean of its tokens' probabilities."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Segment:
    """What is said between two pauses, with its times in seconds, and the geometric mean of its tokens' probabilities."""

    start: float
    end: float
    text: str
    confidence: float
    words: tuple = ()
    resume: float | None = None
    """Seconds from which recognition may start anew, and go on as if it had not stopped; None where nobody needs to know."""


def collapse(best, blank=0, previous=None):
    """Tokens of the most probable path: repetitions once, no blanks.

    Arguments
    ---------
    best : list of int
        The most probable token of each frame.
    blank : int
        The blank token.
    previous : int, optional
        That of the frame before.

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


def align(log_probs, tokens, blank=0):
    """The most probable frames of given tokens.

    Arguments
    ---------
    log_probs : torch.Tensor
        (T, V) log-probabilities of a CTC model.
    tokens : list of int
        What is said.
    blank : int
        The blank token.

    Returns
    -------
    list of tuple
        For each token its first frame, the frame behind its last one, and its mean log-probability in these.

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
        raise ValueError(f"{len(tokens)} tokens need {needed} frames, and the audio has {len(log_probs)}: the text is too long.")
    path, scores = forced_align(log_probs.float().unsqueeze(0), torch.tensor([tokens], device=log_probs.device), blank=blank)
    return [(span.start, span.end, span.score) for span in merge_tokens(path[0].cpu(), scores[0].cpu(), blank)]


def group_words(tokens, spans, tokenizer, offset=0):
    """Words of aligned tokens.

    Arguments
    ---------
    tokens : list of int
        Token ids.
    spans : list of tuple
        From :func:`align`.
    tokenizer : sentencepiece.SentencePieceProcessor
        Whose words begin with "▁".
    offset : int
        Frames before these.

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
        text = tokenizer.decode_ids([token for token, _ in group]).strip()
        if not text:  # a word boundary alone
            continue
        heard = [pair for pair in group if tokenizer.id_to_piece(pair[0]) != "▁"]  # a boundary's frame says little of the word's
        start, end = (FRAME_SECONDS * (offset + frame) for frame in (heard[0][1][0], heard[-1][1][1]))
        words.append(Word(text, round(start, 3), round(end, 3), _confidence([score for _, (*_, score) in heard])))
    return tuple(words)


def make_segment(log_probs, tokens, tokenizer, blank=0, offset=0):
    """A segment of what is said in some frames; None without words.

    Arguments
    ---------
    log_probs : torch.Tensor
        (T, V) log-probabilities of a CTC model.
    tokens : list of int
        What is said, as a search found it.
    tokenizer : sentencepiece.SentencePieceProcessor
        For the words.
    blank : int
        The blank token.
    offset : int
        Frames before these.

    Returns
    -------
    Segment or None
    """
    text = " ".join(tokenizer.decode_ids(tokens).split())
    if not text:
        return None
    try:
        spans = align(log_probs, tokens, blank)
    except ValueError:  # another search than CTC's may say more than fits
        times = (round(FRAME_SECONDS * (offset + frame), 3) for frame in (0, len(log_probs)))
        return Segment(*times, text, 0.0)
    words = group_words(tokens, spans, tokenizer, offset)
    return Segment(words[0].start, words[-1].end, text, _confidence([score for *_, score in spans]), words)


def _confidence(scores):
    """From log-probabilities."""
    return round(math.exp(math.fsum(scores) / len(scores)), 4)


class Segmenter:
    """Segments of probabilities that come in pieces of any size.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        For the words.
    blank : int
        The blank token.
    endpoint : float
        Seconds of silence that end a segment.
    longest : float
        Seconds after which one ends at the longest pause so far.
    search : callable, optional
        From the frames (T, D) of a segment to its tokens and their log-probabilities (T, V), in place of greedy search.
    restarts : bool
        Whether the encoder starts anew behind each segment: what comes after it in the same piece is left out then, and
        ``restart`` says so.
    start : int
        Frames before the first piece.

    Raises
    ------
    ValueError
        If a time is not positive and finite.
    """

    margin = 12
    """Frames of silence around a segment's words that a second search gets."""

    def __init__(self, tokenizer, blank=0, endpoint=0.8, longest=30.0, search=None, restarts=False, start=0):
        for name, value in (("endpoint", endpoint), ("longest", longest)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; give a number of seconds above 0.")
        self._tokenizer, self._blank, self._search = tokenizer, blank, search
        self._pause = max(1, round(endpoint / FRAME_SECONDS))
        self._longest = max(2, round(longest / FRAME_SECONDS))
        self.start = start
        """Frames in finished segments, and in the pauses behind them."""
        self.restart = False
        """Whether the encoder is to start anew, at ``start``."""
        self._restarts = restarts
        self._best, self._log_probs, self._frames, self._previous = [], [], [], None

    @property
    def tokens(self):
        """(token, frame) of the segment that has not ended; the frames count from its start."""
        return collapse(self._best, self._blank, self._previous)

    @property
    def text(self):
        """Of the segment that has not ended: a beginning of what it will be, as far as greedy search goes."""
        return self._text(self.tokens)

    @property
    def stable_text(self):
        """The words of ``text`` that will not get longer; nothing where another search will have the last word."""
        if self._search is not None:
            return ""
        tokens = self.tokens
        while tokens and not self._tokenizer.id_to_piece(tokens[-1][0]).startswith("▁"):
            tokens.pop()
        return self._text(tokens[:-1])

    def _text(self, tokens):
        return " ".join(self._tokenizer.decode_ids([token for token, _ in tokens]).split())

    def accept(self, log_probs, frames=None):
        """Take in the next frames.

        Arguments
        ---------
        log_probs : torch.Tensor
            (T, V).
        frames : torch.Tensor, optional
            (T, D), for ``search``.

        Returns
        -------
        list of Segment
            Those that have ended.
        """
        self.restart = False
        self._best += log_probs.argmax(-1).tolist()
        self._log_probs.append(log_probs)
        if self._search is not None:
            self._frames.append(frames)
        ended = []
        while (cut := self._next_cut()) is not None:
            end, spoken = cut
            ended += self._cut(end)
            if spoken and self._restarts:
                self._drop()
                break
        return ended

    def skip_silence(self):
        """Forget a silence but for its end, for an encoder that starts anew at ``start``.

        Returns
        -------
        bool
            Whether there was anything to forget.
        """
        silence = len(self._best) - self.margin
        if silence < 1:
            return False
        self._cut(silence)
        self._drop()
        return True

    def _drop(self):
        """Forget what has come since the last segment: an encoder that starts anew at ``start`` hears it again."""
        self._best, self._log_probs, self._frames, self._previous = [], [], [], None
        self.restart = True

    def finish(self):
        """End the last segment.

        Returns
        -------
        list of Segment
            One or none.
        """
        return self._cut(len(self._best))

    def _next_cut(self):
        """The frame before which to cut, and whether anything has been said before it; or None."""
        frames = [frame for frame, token in enumerate(self._best) if token != self._blank]
        if not frames:
            # Nothing has been said: what is kept is what a search may need before the first word.
            return (len(self._best) - self.margin, False) if len(self._best) >= self._pause + 2 * self.margin else None
        limit = frames[0] + self._longest  # what comes behind it decides nothing, as it may be in another piece
        for last, following in zip(frames, [*frames[1:], len(self._best)], strict=True):
            end = last + 1 + self._pause
            if following >= end and end <= limit:
                return end, True
        if len(self._best) < limit:
            return None
        # The longest pause before a word, in the second half, or the last one; without any, here.
        half, pauses, tokens = (frames[0] + limit) // 2, [], self.tokens
        for (_, before), (token, frame) in zip(tokens, tokens[1:], strict=False):
            if half < frame < limit and self._tokenizer.id_to_piece(token).startswith("▁"):
                silence = self._best[before:frame].count(self._blank)
                pauses.append((silence, frame - silence // 2))
        if not pauses:
            return limit, True
        # Where the encoder starts anew, only a word that may have got longer is heard again: what was stable stays.
        return (pauses[-1] if self._restarts else max(pauses))[1], True

    def _cut(self, end):
        """End the segment before a frame."""
        tokens = [(token, frame) for token, frame in self.tokens if frame < end]
        log_probs = torch.cat(self._log_probs) if self._log_probs else None
        frames = torch.cat(self._frames) if self._frames else None
        segment = None
        if tokens:
            first = max(0, tokens[0][1] - self.margin)
            heard, said = log_probs[first:end], [token for token, _ in tokens]
            if self._search is not None:
                said, heard = self._search(frames[first:end])
            segment = make_segment(heard, said, self._tokenizer, self._blank, self.start + first)
        if end > 0:
            self._previous = self._best[end - 1]
        self.start += end
        if segment is not None:
            segment = replace(segment, resume=round(FRAME_SECONDS * self.start, 3))
        self._best = self._best[end:]
        self._log_probs = [log_probs[end:].clone()] if self._best else []  # a view would keep what went before
        self._frames = [frames[end:].clone()] if frames is not None and self._best else []
        return [] if segment is None else [segment]


def split_at_pauses(segment, pause=0.8):
    """Segments between the pauses of one with words.

    Arguments
    ---------
    segment : Segment
        Any.
    pause : float
        Seconds without a word that end a segment.

    Returns
    -------
    list of Segment

    Example
    -------
    >>> words = (Word("GO", 0.0, 0.5, 0.8), Word("ON", 1.5, 2.0, 0.9))
    >>> [(part.start, part.end, part.text) for part in split_at_pauses(Segment(0.0, 2.0, "GO ON", 0.85, words))]
    [(0.0, 0.5, 'GO'), (1.5, 2.0, 'ON')]
    """
    groups = []
    for word in segment.words:
        if not groups or word.start - groups[-1][-1].end >= pause:
            groups.append([])
        groups[-1].append(word)
    if len(groups) < 2:
        return [segment]
    return [
        Segment(
            words[0].start,
            words[-1].end,
            " ".join(word.text for word in words),
            _confidence([math.log(max(word.confidence, 1e-9)) for word in words]),
            tuple(words),
        )
        for words in groups
    ]


def subtitles(segments, style):
    """Segments as subtitles.

    Arguments
    ---------
    segments : list of Segment
        In their order.
    style : str
        "srt" or "vtt".

    Returns
    -------
    str

    Example
    -------
    >>> print(subtitles([Segment(0.5, 3661.25, "HELLO", 1.0)], "srt"))
    1
    00:00:00,500 --> 01:01:01,250
    HELLO
    <BLANKLINE>
    """
    lines = [] if style == "srt" else ["WEBVTT", ""]
    for number, segment in enumerate(segments, 1):
        start, end = (_clock(seconds, "," if style == "srt" else ".") for seconds in (segment.start, segment.end))
        text = segment.text if style == "srt" else re.sub("[&<>]", lambda match: f"&{_ENTITIES[match[0]]};", segment.text)
        lines += [*([str(number)] if style == "srt" else []), f"{start} --> {end}", text, ""]
    return "\n".join(lines)


_ENTITIES = {"&": "amp", "<": "lt", ">": "gt"}


def _clock(seconds, point):
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
