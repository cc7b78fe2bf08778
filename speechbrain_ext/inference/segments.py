"""Segments between pauses, however long the audio.

A CTC model says nothing ("blank") in pauses. :class:`Segmenter` takes its probabilities in pieces, and ends a segment where that
lasts; greedy search never takes back what it has said, so the words of a segment before the last one are certain at once. Where a
transducer says what is said, it is silent only where both are, and CTC places the words in time, as a transducer says them late.
"""

import math
from dataclasses import replace

import torch

from speechbrain_ext.decoders.alignment import FRAME_SECONDS, Segment, align, collapse, confidence, make_segment
from speechbrain_ext.utils.errors import UserError


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
        From the frames (T, D) of a segment and their log-probabilities (T, V) to its tokens and their log-probabilities, in place
        of greedy search.
    restarts : bool
        Whether the encoder starts anew behind each segment: what comes after it in the same piece is left out then, and
        ``restart`` says so.
    start : int
        Frames before the first piece.
    search_stream : callable, optional
        Gives a search that takes the frames of a segment as they come, in place of greedy CTC, see
        :class:`speechbrain_ext.decoders.transducer.TransducerStream`. It needs ``restarts``.

    Raises
    ------
    ValueError
        If a time is not positive and finite.
    """

    margin = 12
    """Frames of silence around a segment's words that a second search gets."""

    def __init__(self, tokenizer, blank=0, endpoint=0.8, longest=30.0, search=None, restarts=False, start=0, search_stream=None):
        for name, value in (("endpoint", endpoint), ("longest", longest)):
            if not 0 < value < math.inf:
                raise UserError(f"{name} is {value}; give a number of seconds above 0.")
        self._tokenizer, self._blank, self._search = tokenizer, blank, search
        self._pause = max(1, round(endpoint / FRAME_SECONDS))
        self._longest = max(2, round(longest / FRAME_SECONDS))
        self.start = start
        """Frames in finished segments, and in the pauses behind them."""
        self.restart = False
        """Whether the encoder is to start anew, at ``start``."""
        self._restarts = restarts
        self._best, self._log_probs, self._frames, self._previous = [], [], [], None
        self._search_stream = search_stream
        self._stream = search_stream() if search_stream else None

    @property
    def tokens(self):
        """(token, frame) of the segment that has not ended; the frames count from its start."""
        if self._stream is not None:
            return self._stream.tokens
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
        tokens = self.tokens if self._stream is None else self.tokens[: self._stream.certain]
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
            (T, D), for ``search`` and ``search_stream``.

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
        if self._stream is not None:
            self._stream.accept(frames)
        ended = []
        while (cut := self._next_cut()) is not None:
            end, spoken, *count = cut
            ended += self._cut(end, *count)
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
        if self._stream is not None:
            self._stream = self._search_stream()

    def finish(self):
        """End the last segment.

        Returns
        -------
        list of Segment
            One or none.
        """
        ended = self._cut(len(self._best))
        if self._stream is not None:
            self._stream = self._search_stream()
        return ended

    def _spoken(self):
        """The frames in which something is said."""
        frames = {frame for frame, token in enumerate(self._best) if token != self._blank}
        return sorted(frames if self._stream is None else frames.union(frame for _, frame in self._stream.tokens))

    def _placed(self):
        """The tokens, where CTC places those of a transducer, but no later than it has said them."""
        tokens = self.tokens
        if self._stream is None or not tokens:
            return tokens
        try:
            spans = align(torch.cat(self._log_probs), [token for token, _ in tokens], self._blank)
        except ValueError:  # more tokens than CTC has room for
            return tokens
        return [(token, min(frame, start)) for (token, frame), (start, *_) in zip(tokens, spans, strict=True)]

    def _next_cut(self):
        """The frame before which to cut, whether anything has been said before it, and how many tokens end there, if that is
        not seen by their frames; or None."""
        frames = self._spoken()
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
        half, pauses, tokens = (frames[0] + limit) // 2, [], self._placed()
        for count, ((_, before), (token, frame)) in enumerate(zip(tokens, tokens[1:], strict=False), 1):
            if half < frame < limit and self._tokenizer.id_to_piece(token).startswith("▁"):
                silence = self._best[before:frame].count(self._blank)
                pauses.append((silence, frame - silence // 2, count))
        if not pauses:
            return limit, True
        # Where the encoder starts anew, only a word that may have got longer is heard again: what was stable stays.
        _, end, count = pauses[-1] if self._restarts else max(pauses)
        return end, True, count

    def _cut(self, end, count=None):
        """End the segment before a frame, with so many of its tokens, or with those before that frame."""
        tokens = [(token, frame) for token, frame in self.tokens if frame < end] if count is None else self.tokens[:count]
        log_probs = torch.cat(self._log_probs) if self._log_probs else None
        frames = torch.cat(self._frames) if self._frames else None
        segment = None
        if tokens:
            first = max(0, (tokens[0][1] if self._stream is None else self._spoken()[0]) - self.margin)
            heard, said = log_probs[first:end], [token for token, _ in tokens]
            if self._search is not None:
                said, heard = self._search(frames[first:end], heard)
            segment = make_segment(heard, said, self._tokenizer, self._blank, self.start + first)
        if end > 0:
            self._previous = self._best[end - 1]
        if self._stream is not None:
            self._stream.forget(end)
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
    >>> from speechbrain_ext.decoders.alignment import Word
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
            confidence([math.log(max(word.confidence, 1e-9)) for word in words]),
            tuple(words),
        )
        for words in groups
    ]
