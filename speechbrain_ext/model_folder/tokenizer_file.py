"""Check a SentencePiece file before SentencePiece reads it.

SentencePiece trusts its file: a wrong normalisation table makes it read any place in memory, and a piece of 100,000 bytes
overflows the stack. Untrusted files are therefore checked first. The format is a protocol buffer, sentencepiece_model.proto.
What two readers could understand differently is refused: protobuf skips a known field of another wire type, and cuts numbers to
32 bits.
"""

import numpy as np

from speechbrain_ext.utils.errors import UserRuntimeError
from speechbrain_ext.utils.text import printable

LARGEST_FILE, LONGEST_PIECE = 2**25, 1000
"""Limits in bytes of the file and of a piece. Our files have about 100 kB, pieces 16 characters."""

PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5
"""Fields of a model."""
TEXT, KIND = 1, 3
"""Fields of a piece."""
TABLE = 2
"""Field of a normaliser: the table of replacements. Our files have none."""
UNKNOWN_SURFACE = 44
"""Field of the trainer: the text of the unknown token."""
NUMBER, BYTES = 0, 2
"""Wire types."""
BYTE = 6
"""Kind of a piece for a single byte, which may be a control character."""


def check_tokenizer(data):
    """Refuse a SentencePiece model that is damaged, or harmful to SentencePiece or a terminal.

    Arguments
    ---------
    data : bytes
        The content of the file.

    Raises
    ------
    UserRuntimeError
        If so. The message is the rest of a sentence that begins with the name of the file.

    Example
    -------
    >>> check_tokenizer(b"\\x0a\\x05\\x0a\\x03cat")
    >>> check_tokenizer(b"\\x1a\\x03\\x12\\x01x")
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserRuntimeError: has a damaged normalisation table
    """
    try:
        for field, value in _fields(data, dict.fromkeys((PIECES, TRAINER, NORMALIZER, DENORMALIZER), BYTES)):
            if field == PIECES:
                for number, part in _fields(value, {TEXT: BYTES, KIND: NUMBER}):
                    if number == TEXT:
                        _check_text(part)
                    elif number == KIND:
                        _check_kind(part)
            elif field == TRAINER:
                for number, part in _fields(value, {UNKNOWN_SURFACE: BYTES}):
                    if number == UNKNOWN_SURFACE:
                        _check_text(part)
            elif field in (NORMALIZER, DENORMALIZER):
                for number, part in _fields(value, {TABLE: BYTES}):
                    if number == TABLE and part:
                        _check_table(part)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserRuntimeError):
            raise
        raise UserRuntimeError("is damaged, or not a SentencePiece model") from error


def _check_kind(kind):
    if kind == BYTE:
        raise UserRuntimeError("has pieces for single bytes, which are not allowed")
    if kind >= 2**31:
        raise ValueError(f"a kind of {kind}")


def _check_text(data):
    if len(data) > LONGEST_PIECE:
        raise UserRuntimeError(f"has a piece of {len(data)} bytes, more than the allowed {LONGEST_PIECE}")
    text = data.decode()
    if printable(text) != text:
        raise UserRuntimeError(f"has the piece '{printable(text)[:40]}', whose control characters are not allowed")


def _check_table(data):
    """Check a table: a trie of 32-bit units of the library Darts-clone, which maps texts to places in the texts after it.

    From a unit at place ``p``, a walk continues at ``p ^ offset ^ byte``, with any byte.
    """
    size = int.from_bytes(data[:4], "little")
    units, texts = np.frombuffer(data[4 : 4 + size], "<u4").astype(np.int64), data[4 + size :]
    following = np.arange(len(units)) ^ (units >> 10 << ((units & 0x200) >> 6))
    inner = units >> 31 == 0  # the other units are values
    inner[:1] = True  # every walk begins here
    flawless = bool(len(units)) and texts.endswith(b"\0") and ((following[inner] | 255) < len(units)).all()
    values = units[following[inner & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF if flawless else units
    if not flawless or (values >= len(texts)).any():
        raise UserRuntimeError("has a damaged normalisation table")


def _fields(data, known):
    """Yield the number and the value of each field of a message: an int, or bytes. Known fields must have their wire type."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
        elif kind in (1, 2, 5):
            size = 8 if kind == 1 else 4
            if kind == 2:
                size, position = _varint(data, position)
            value, position = data[position : position + size], position + size
        else:
            raise ValueError(f"a field of kind {kind}")
        if key >= 2**32 or known.get(key >> 3, kind) != kind:
            raise ValueError(f"a field {key >> 3} of kind {kind}")
        if position > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, value


def _varint(data, position):
    """A number with seven bits per byte, and the position after it."""
    value = 0
    for index in range(10):
        if position >= len(data):
            raise ValueError("it ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, position
    raise ValueError("a number of more than ten bytes")
