"""Segments as subtitles."""

import re


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
    >>> from speechbrain_ext.decoders.alignment import Segment
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
