"""Segments between pauses, in audio of any length.

A CTC model predicts blanks in pauses. :class:`Segmenter` takes its probabilities in pieces, and ends a segment after a long run
of blanks. Greedy search never changes earlier tokens, so all words but the last are final at once. With a transducer, a pause is
where both the transducer and CTC predict only blanks. CTC then gives the times of words, because a transducer emits them late.
Where CTC predicts only blanks, a transducer's words are dropped, because it invents some in long silence.
"""

import sys
from dataclasses import replace

import torch

from speechbrain_ext.decoders.alignment import FRAME_SECONDS, Segment, align, collapse, confidence_of, make_segment
from speechbrain_ext.utils.errors import UserError, is_number


class Segmenter:
    """Divides probabilities that arrive in pieces of any size into segments.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        Turns tokens into words.
    blank : int
        The blank token.
    endpoint : float
        Seconds of silence that end a segment.
    longest : float
        Seconds after which a segment ends at its longest pause so far.
    search : callable, optional
        Replaces greedy search when a segment has ended. Takes the frames (T, D) of the segment and their log-probabilities
        (T, V), and returns tokens and log-probabilities.
    restarts : bool
        Whether the encoder state is reset after each segment. The rest of the same piece is then dropped, and ``restart`` is
        True.
    start : int
        Frames before the first piece.
    search_stream : callable, optional
        Returns a search that takes the frames of a segment as they arrive, in place of greedy CTC search, see
        :class:`speechbrain_ext.decoders.transducer.TransducerStream`. It needs ``restarts``.

    Raises
    ------
    ValueError
        If a time is not positive and finite.
    """

    margin = 12
    """Frames of silence around a segment's words that ``search`` also gets."""
    shown = 3
    """Frames before a cut in which ``search`` may already write the word after it."""

    def __init__(self, tokenizer, blank=0, endpoint=0.8, longest=30.0, search=None, restarts=False, start=0, search_stream=None):
        for name, value in (("endpoint", endpoint), ("longest", longest)):
            if not is_number(value, 0, sys.float_info.max) or not value:
                raise UserError(f"{name} is {value!r}; give a number of seconds above 0.")
        self._tokenizer, self._blank, self._search = tokenizer, blank, search
        self._pause = max(1, round(endpoint / FRAME_SECONDS))
        self._longest = max(2, round(longest / FRAME_SECONDS))
        self.start = start
        """Frames in finished segments and in the pauses after them."""
        self.restart = False
        """Whether the encoder state must be reset, to continue at frame ``start``."""
        self._restarts = restarts
        self._best, self._log_probs, self._frames, self._previous = [], [], [], None
        self._search_stream = search_stream
        self._stream = search_stream() if search_stream else None

    @property
    def tokens(self):
        """(token, frame) of the current segment; the frames count from its start."""
        if self._stream is not None:
            return self._stream.tokens if any(token != self._blank for token in self._best) else []
        return collapse(self._best, self._blank, self._previous)

    @property
    def text(self):
        """Text of the current segment so far."""
        return self._text(self.tokens)

    @property
    def stable_text(self):
        """The words of ``text`` that will not change; empty if ``search`` will rewrite the segment."""
        if self._search is not None:
            return ""
        tokens = self.tokens if self._stream is None else self.tokens[: self._stream.certain]
        while tokens and not self._tokenizer.id_to_piece(tokens[-1][0]).startswith("▁"):
            tokens.pop()
        return self._text(tokens[:-1])

    def _text(self, tokens):
        return " ".join(self._tokenizer.decode_ids([token for token, _ in tokens]).split())

    def accept(self, log_probs, frames=None):
        """Process the next frames.

        Arguments
        ---------
        log_probs : torch.Tensor
            (T, V).
        frames : torch.Tensor, optional
            (T, D), for ``search`` and ``search_stream``.

        Returns
        -------
        list of Segment
            Segments that have ended.
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
        """Drop silence except its last frames, and set ``restart``.

        Returns
        -------
        bool
            Whether any frames were dropped.
        """
        silence = len(self._best) - self.margin
        if silence < 1:
            return False
        self._cut(silence)
        self._drop()
        return True

    def _drop(self):
        """Drop all frames since the last segment; after its reset the encoder computes them again."""
        self._best, self._log_probs, self._frames, self._previous = [], [], [], None
        self.restart = True
        if self._stream is not None:
            self._stream = self._search_stream()

    def finish(self):
        """End the last segment.

        Returns
        -------
        list of Segment
            One segment or none.
        """
        ended = self._cut(len(self._best))
        if self._stream is not None:
            self._stream = self._search_stream()
        return ended

    def _spoken(self):
        """The frames with a token other than blank."""
        frames = {frame for frame, token in enumerate(self._best) if token != self._blank}
        return sorted(frames if self._stream is None else frames.union(frame for _, frame in self.tokens))

    def _placed(self):
        """The tokens with their frames; those of a transducer at CTC's times, but no later than the transducer emitted them."""
        tokens = self.tokens
        if self._stream is None or not tokens:
            return tokens
        try:
            spans = align(torch.cat(self._log_probs), [token for token, _ in tokens], self._blank)
        except ValueError:  # more tokens than CTC can align
            return tokens
        return [(token, min(frame, start)) for (token, frame), (start, *_) in zip(tokens, spans, strict=True)]

    def _next_cut(self):
        """Where to cut next, or None: the frame after the cut, whether speech comes before it and, where the frames of the tokens
        do not show it, the number of tokens before it."""
        frames = self._spoken()
        if not frames:
            # No speech yet: keep the frames that a search may need before the first word.
            return (len(self._best) - self.margin, False) if len(self._best) >= self._pause + 2 * self.margin else None
        limit = frames[0] + self._longest  # later frames must not matter, as they may be in another piece
        for last, following in zip(frames, [*frames[1:], len(self._best)], strict=True):
            end = last + 1 + self._pause
            if following >= end and end <= limit:
                return end, True
        if len(self._best) < limit:
            return None
        # Cut at the longest pause before a word in the second half, or at the last pause; without a pause, at the limit.
        half, pauses, tokens = (frames[0] + limit) // 2, [], self._placed()
        for count, ((_, before), (token, frame)) in enumerate(zip(tokens, tokens[1:], strict=False), 1):
            if half < frame < limit and self._tokenizer.id_to_piece(token).startswith("▁"):
                silence = self._best[before:frame].count(self._blank)
                pauses.append((silence, frame - silence // 2, count))
        if not pauses:
            return limit, True
        # With restarts, only the last word, which is not stable, is computed again.
        _, end, count = pauses[-1] if self._restarts else max(pauses)
        return end, True, count

    def _without_early(self, tokens, log_probs, last):
        """Tokens without a last word that begins in the last frames before a cut, and after CTC's ``last`` frame with a token: it
        is the word after the cut, which the next segment has."""
        begin = max((i for i, token in enumerate(tokens) if self._tokenizer.id_to_piece(token).startswith("▁")), default=0)
        try:
            spans = align(log_probs, tokens, self._blank)
        except ValueError:  # more tokens than CTC can align
            return tokens
        return tokens[:begin] if spans and spans[begin][0] >= max(last + 1, len(log_probs) - self.shown) else tokens

    def _cut(self, end, count=None):
        """End the segment before frame ``end``, with its first ``count`` tokens, or all tokens before that frame."""
        tokens = [(token, frame) for token, frame in self.tokens if frame < end] if count is None else self.tokens[:count]
        log_probs = torch.cat(self._log_probs) if self._log_probs else None
        frames = torch.cat(self._frames) if self._frames else None
        segment = None
        if tokens:
            first = max(0, (tokens[0][1] if self._stream is None else self._spoken()[0]) - self.margin)
            scores, said = log_probs[first:end], [token for token, _ in tokens]
            if self._search is not None:
                said, scores = self._search(frames[first:end], scores)
                if count is not None:
                    said = self._without_early(said, scores, tokens[-1][1] - first)
            segment = make_segment(scores, said, self._tokenizer, self._blank, self.start + first)
        if end > 0:
            self._previous = self._best[end - 1]
        if self._stream is not None:
            self._stream.forget(end)
        self.start += end
        if segment is not None:
            segment = replace(segment, resume=round(FRAME_SECONDS * self.start, 3))
        self._best = self._best[end:]
        self._log_probs = [log_probs[end:].clone()] if self._best else []  # a view would keep all earlier frames in memory
        self._frames = [frames[end:].clone()] if frames is not None and self._best else []
        return [] if segment is None else [segment]


def split_at_pauses(segment, pause=0.8):
    """Split a segment at its pauses.

    Arguments
    ---------
    segment : Segment
        A segment, with or without words.
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
            confidence_of(words),
            tuple(words),
        )
        for words in groups
    ]
