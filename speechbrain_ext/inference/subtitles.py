"""Segments as subtitles: cues that can be read in time, within the audio.

A segment lasts up to 30 s, and holds more text than fits on a screen. It is divided into cues, the texts shown at one time. As
broadcasters do, a cue has up to two lines of 42 characters, and lasts 1 to 7 s. A cue ends at a long pause if there is one, else
where the cues become about equal. Its lines are of similar length, the upper one the shorter.
"""

import difflib
import math
import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from numbers import Integral, Real

from speechbrain_ext.utils.errors import UserError

MIN_SECONDS = 1.0
"""Shortest time of a cue on the screen, if silence follows."""
PAUSE = 0.8
"""Seconds of the longest pause that is preferred for a cut; longer ones end segments."""


@dataclass(frozen=True)
class SubtitleOptions:
    """Limits of a cue.

    Arguments
    ---------
    max_lines : int
        Most lines of a cue.
    max_line_length : int
        Most characters of a line. A longer word gets a separate line; in scripts without spaces, such as Chinese, it is divided.
    max_seconds : float
        Longest time of a cue.
    word_times : bool
        Whether WebVTT holds the start of each word; players can then show the words as they are spoken.

    Raises
    ------
    UserError
        If a value is not valid.

    Example
    -------
    >>> SubtitleOptions(max_lines=1)
    SubtitleOptions(max_lines=1, max_line_length=42, max_seconds=7.0, word_times=False)
    """

    max_lines: int = 2
    max_line_length: int = 42
    max_seconds: float = 7.0
    word_times: bool = False

    def __post_init__(self):
        for value, what in ((self.max_lines, "number of lines"), (self.max_line_length, "number of characters in a line")):
            if not isinstance(value, Integral) or value < 1:
                raise UserError(f"The subtitles' largest {what} is {value!r}; give a whole number, 1 or more.")
        if not isinstance(self.max_seconds, Real) or not MIN_SECONDS <= self.max_seconds < math.inf:
            raise UserError(f"The subtitles' longest time is {self.max_seconds!r}; give a number of seconds, 1 or more.")
        if not isinstance(self.word_times, bool):
            raise UserError(f"The subtitles' word_times is {self.word_times!r}; give True or False.")


@dataclass(frozen=True)
class Cue:
    """Text that is on the screen at one time, with its times in seconds."""

    start: float
    end: float
    lines: tuple
    """Lines, each a tuple of Piece."""

    @property
    def text(self):
        """The lines, joined by line ends."""
        return "\n".join("".join(_spaced(line)) for line in self.lines)


@dataclass(frozen=True)
class Piece:
    """A word, or a part of one that is too long for a line, with its times in seconds."""

    text: str
    start: float
    end: float
    goes_on: bool = False
    """Whether it is a later part of a word, without a space before it."""
    is_timed: bool = True
    """Whether its start is the measured start of a word, not an estimate."""


def cues(segments, options=None, seconds=None):
    """Segments divided into cues.

    A cue begins with its first word and ends with its last one. A cue of less than 1 s is extended to 1 s, but not into the next
    cue or past the end of the audio. Cues do not overlap: if words do, the earlier cue ends first. If the next cue begins at the
    same time, or the audio ends there, the cue begins earlier, and lasts at least one millisecond.

    Arguments
    ---------
    segments : list of Segment
        Segments in order of time.
    options : SubtitleOptions, optional
        Limits of a cue; by default two lines of 42 characters and 7 s.
    seconds : float, optional
        Length of the audio; by default the end of the last segment.

    Returns
    -------
    list of Cue

    Example
    -------
    >>> from speechbrain_ext.decoders.alignment import Segment, Word
    >>> words = (Word("GO", 0.0, 0.4, 1.0), Word("ON", 0.5, 0.9, 1.0), Word("THEN", 1.5, 1.7, 1.0))
    >>> segment = Segment(0.0, 1.7, "GO ON THEN", 1.0, words)
    >>> [(cue.start, cue.end, cue.text) for cue in cues([segment], seconds=10.0)]
    [(0.0, 1.7, 'GO ON THEN')]
    >>> [(cue.start, cue.end, cue.text) for cue in cues([segment], SubtitleOptions(1, 5), 10.0)]
    [(0.0, 1.0, 'GO ON'), (1.5, 2.5, 'THEN')]
    """
    options = options or SubtitleOptions()
    if seconds is None:
        seconds = max((segment.end for segment in segments), default=0.0)
    groups = [group for segment in segments for group in _divide(_pieces(segment, options), options)]
    found, shortest, longest = [], round(1000 * MIN_SECONDS), round(1000 * options.max_seconds)
    limit = max(1, math.floor(1000 * seconds + 1e-6))  # in milliseconds, as in the files; above 0, so that a cue fits
    for pieces in reversed(groups):
        start = max(0, min(round(1000 * pieces[0].start), limit - 1))
        end = round(1000 * max(piece.end for piece in pieces))
        end = min(max(end, start + shortest), start + longest, limit)
        found.append(Cue(start / 1000, end / 1000, _lines(pieces, options)))
        limit = start
    return found[::-1]


def subtitles(segments, style, options=None, seconds=None):
    """Segments as subtitles.

    Arguments
    ---------
    segments : list of Segment
        Segments in order of time.
    style : str
        "srt" or "vtt".
    options : SubtitleOptions, optional
        As for :func:`cues`.
    seconds : float, optional
        As for :func:`cues`.

    Returns
    -------
    str

    Raises
    ------
    UserError
        If there is no such style.

    Example
    -------
    >>> from speechbrain_ext.decoders.alignment import Segment
    >>> print(subtitles([Segment(3660.5, 3661.25, "HELLO", 1.0)], "srt", seconds=4000.0))
    1
    01:01:00,500 --> 01:01:01,500
    HELLO
    <BLANKLINE>
    """
    options = options or SubtitleOptions()
    if style not in ("srt", "vtt"):
        raise UserError(f"The style of subtitles is {style!r}; give srt or vtt.")
    blocks = [] if style == "srt" else ["WEBVTT\n"]
    for number, cue in enumerate(cues(segments, options, seconds), 1):
        start, end = (_clock(time, "," if style == "srt" else ".") for time in (cue.start, cue.end))
        if style == "srt":
            text = re.sub("-{2,}>", "->", cue.text)  # an arrow is allowed only in the line of the times
            blocks.append(f"{number}\n{start} --> {end}\n{text}\n")
        else:
            blocks.append(f"{start} --> {end}\n{_vtt_text(cue, options.word_times)}\n")
    return "\n".join(blocks)


def _vtt_text(cue, word_times):
    lines, last = [], cue.start
    for pieces in cue.lines:
        line = ""
        for piece, text in zip(pieces, _spaced(pieces), strict=True):
            text = re.sub("[&<>]", lambda match: f"&{_ENTITIES[match[0]]};", text)
            start = round(piece.start, 3)
            if word_times and piece.is_timed and last < start < cue.end:
                space = " " if text.startswith(" ") else ""
                text, last = f"{space}<{_clock(start, '.')}>{text.removeprefix(' ')}", start
            line += text
        lines.append(line)
    return "\n".join(lines)


_ENTITIES = {"&": "amp", "<": "lt", ">": "gt"}


def _clock(seconds, point):
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"


def _spaced(pieces):
    """The texts of a line's pieces, with the spaces before them."""
    return [piece.text if not index or piece.goes_on else f" {piece.text}" for index, piece in enumerate(pieces)]


# -------------------- from a segment to pieces


def _pieces(segment, options):
    if not segment.words:  # a search may find more words than can be aligned
        return _estimated(segment.text, segment.start, segment.end, options, is_timed=False)
    words, said, pieces = segment.words, segment.text.split(), []
    if " ".join(word.text for word in words).split() == said:
        return [piece for word in words for piece in _estimated(word.text, word.start, word.end, options, is_timed=True)]
    # The text was corrected by hand: unchanged words keep their times
    changes = difflib.SequenceMatcher(None, [word.text for word in words], said, autojunk=False).get_opcodes()
    for _, first, last, start, end in changes:
        if last - first == end - start:
            for word, text in zip(words[first:last], said[start:end], strict=True):
                pieces += _estimated(text, word.start, word.end, options, is_timed=True)
        elif start < end:
            replaced = words[first:last] or words[max(0, first - 1) : first + 1]  # added words: their neighbours
            begin, until = replaced[0].start, replaced[-1].end
            if first == last and 0 < first < len(words) and words[first - 1].end < words[first].start:  # the gap between them
                begin, until = words[first - 1].end, words[first].start
            pieces += _estimated(" ".join(said[start:end]), begin, until, options, is_timed=False)
    return pieces


def _estimated(text, start, end, options, is_timed):
    """The words of a text with known start and end; the times between are in proportion to the number of characters."""
    words = text.split()
    length, place, pieces = len(" ".join(words)), 0, []
    for word in words:
        for index, part in enumerate(_parts(word, (end - start) * len(word) / length, options)):
            times = (start + (end - start) * at / length for at in (place, place + len(part)))
            pieces.append(Piece(part, *times, goes_on=index > 0, is_timed=is_timed and not pieces))
            place += len(part)
        place += 1
    return pieces


_SCRIPTS_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
"""Characters of Thai, Lao, Burmese, Khmer, Chinese and Japanese."""


def _parts(word, seconds, options):
    """The word, or about equal parts if it is too long for a line and its script has no spaces."""
    if len(word) <= options.max_line_length or not _SCRIPTS_WITHOUT_SPACES.search(word):
        return [word]
    count = max(math.ceil(len(word) / options.max_line_length), math.ceil(seconds / options.max_seconds))
    length, letters, parts = math.ceil(len(word) / count), [], []
    for character in word:
        if letters and unicodedata.category(character).startswith("M"):  # a vowel or accent of the letter before it
            letters[-1] += character
        else:
            letters.append(character)
    for letter in letters:
        if parts and len(parts[-1]) + len(letter) <= length:
            parts[-1] += letter
        else:
            parts.append(letter)
    return parts


# -------------------- from pieces to cues and lines


def _divide(pieces, options):
    """The pieces of each cue, divided with the least total cost.

    A cue costs the square of its empty share, of characters or of seconds, whichever share is smaller. Cues are therefore few and
    about equal. A pause between two cues lowers the cost by up to 0.5, about the least cost of one more cue. A single short word
    at the end costs 2, more than moving another word from the cue before it.
    """
    best = [(0.0, 0)] + [(math.inf, 0)] * len(pieces)  # before each piece: the least cost, and where the last cue begins
    for first in range(len(pieces)):
        pause = max(0.0, pieces[first].start - pieces[first - 1].end) if first else 0.0
        before = best[first][0] - min(pause / PAUSE, 1) / 2
        lines, used, characters = 1, 0, 0
        for last in range(first, len(pieces)):
            piece = pieces[last]
            more = len(piece.text) + (last > first and not piece.goes_on)
            characters += more
            lines, used = (lines + 1, len(piece.text)) if used and used + more > options.max_line_length else (lines, used + more)
            seconds = piece.end - pieces[first].start
            if last > first and (lines > options.max_lines or seconds > options.max_seconds + 1e-6):
                break
            full = max(characters / (options.max_lines * options.max_line_length), seconds / options.max_seconds)
            cost = before + (1 - min(1.0, full)) ** 2
            if 0 < first == len(pieces) - 1 and len(piece.text) < options.max_line_length / 2:
                cost += 2
            best[last + 1] = min(best[last + 1], (cost, first))
    groups, end = [], len(pieces)
    while end:
        first = best[end][1]
        groups.append(pieces[first:end])
        end = first
    return groups[::-1]


def _lines(pieces, options):
    """The fewest lines, then the shortest longest line, with the upper lines the shorter ones."""
    count = len(_filled(pieces, options.max_line_length))
    shortest = min(options.max_line_length, max(len(piece.text) for piece in pieces))
    widths = range(shortest, min(options.max_line_length, sum(len(piece.text) + 1 for piece in pieces)) + 1)
    width = widths[bisect_left(widths, True, key=lambda width: len(_filled(pieces, width)) <= count)]
    return _filled(pieces, width)


def _filled(pieces, width):
    """Lines that are filled from the last one up."""
    lines, used = [], 0
    for piece, following in zip(reversed(pieces), [None, *reversed(pieces[1:])], strict=True):
        space = following is not None and not following.goes_on
        if lines and used + space + len(piece.text) <= width:
            lines[-1].append(piece)
            used += space + len(piece.text)
        else:
            lines.append([piece])
            used = len(piece.text)
    return tuple(tuple(reversed(line)) for line in reversed(lines))
