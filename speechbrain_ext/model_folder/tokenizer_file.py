"""What a SentencePiece file holds, before SentencePiece reads it.

SentencePiece trusts its file: tables of normalisation are followed wherever they lead in the memory, and a piece of 100,000 bytes
overflows the stack. A stranger's file is therefore looked at first. Its format is a protocol buffer, sentencepiece_model.proto.
"""

import numpy as np

from speechbrain_ext.utils.errors import UserRuntimeError
from speechbrain_ext.utils.text import printable

LARGEST_FILE, LONGEST_PIECE = 2**25, 1000
"""Bytes of the file, and of a piece. Files of ours have some 100 kB, pieces 16 characters."""

PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5
"""Fields of a model."""
TEXT, KIND = 1, 3
"""Fields of a piece."""
TABLE = 2
"""Of a normaliser, what it does to texts. Files of ours have none."""
UNKNOWN_SURFACE = 44
"""Of the trainer, what is shown for the unknown token."""
BYTE = 6
"""The kind of a piece that stands for a byte, which may be one that a terminal obeys."""


def check_tokenizer(data):
    """Refuse a SentencePiece model that is damaged, or that SentencePiece or a terminal would do harm with.

    Arguments
    ---------
    data : bytes
        The content of the file.

    Raises
    ------
    UserRuntimeError
        The message is what is wrong, to go on from the name of the file.

    Example
    -------
    >>> check_tokenizer(b"\\x0a\\x05\\x0a\\x03cat")
    >>> check_tokenizer(b"\\x1a\\x03\\x12\\x01x")
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserRuntimeError: has a table of normalisation that is damaged
    """
    try:
        for field, value in _fields(data):
            if field == PIECES:
                _check_piece(dict(_fields(value)))
            elif field == TRAINER:
                _check_text(dict(_fields(value)).get(UNKNOWN_SURFACE, b""))
            elif field in (NORMALIZER, DENORMALIZER):
                for number, table in _fields(value):
                    if number == TABLE and table:
                        _check_table(table)
    except (ValueError, TypeError) as error:
        if isinstance(error, UserRuntimeError):
            raise
        raise UserRuntimeError("is damaged, or no SentencePiece model") from error


def _check_piece(fields):
    if fields.get(KIND) == BYTE:
        raise UserRuntimeError("has pieces for single bytes, which are part of no text")
    _check_text(fields.get(TEXT, b""))


def _check_text(data):
    if len(data) > LONGEST_PIECE:
        raise UserRuntimeError(f"has a piece of {len(data)} bytes, and {LONGEST_PIECE} at most are read")
    text = data.decode()
    if printable(text) != text:
        raise UserRuntimeError(f"has the piece '{printable(text)[:40]}', whose control characters are part of no text")


def _check_table(data):
    """A trie of 32-bit units, from texts to places among the texts that follow it, as the library Darts-clone walks over it.

    From a unit at place ``p`` the walk goes on at ``p ^ offset ^ byte``, with any byte.
    """
    size = int.from_bytes(data[:4], "little")
    units, texts = np.frombuffer(data[4 : 4 + size], "<u4").astype(np.int64), data[4 + size :]
    following = np.arange(len(units)) ^ (units >> 10 << ((units & 0x200) >> 6))
    inner = units >> 31 == 0  # the others are values
    inner[:1] = True  # where every walk begins
    flawless = bool(len(units)) and texts.endswith(b"\0") and ((following[inner] | 255) < len(units)).all()
    values = units[following[inner & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF if flawless else units
    if not flawless or (values >= len(texts)).any():
        raise UserRuntimeError("has a table of normalisation that is damaged")


def _fields(data):
    """Yield the number and the value of each field of a message: an int, or bytes."""
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
        if position > len(data):
            raise ValueError("it ends within a field")
        yield key >> 3, value


def _varint(data, position):
    """A number of seven bits in each byte, and where it ends."""
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
