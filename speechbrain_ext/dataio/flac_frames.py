"""Count the samples in the frames of a FLAC file without decoding them (RFC 9639, section 9).

libsndfile reads as many samples as the header states, and libFLAC inserts silence for missing frames. Walking over the frames
shows such faults. Each frame begins with a header that has a checksum and a running number, and ends with a checksum of the
whole frame. The size of a frame is not stated. The next frame is found by its header: hardly any other bytes look like a
header, and none have the right number.
"""

import re
from typing import NamedTuple

LARGEST_FRAME = 2**22
"""Bytes, more than for 65,536 samples of 8 channels with 32 bits."""
STEP = 2**20


class Frames(NamedTuple):
    """The result of a walk over frames."""

    stated: int
    """Samples per channel stated by the header."""
    held: int
    """Samples per channel in the frames."""
    ends: list
    """Possible ends of the last frame: all places where its checksum fits. By chance it fits at one byte in 65,536."""
    gap: int | None
    """Start of a whole frame with a wrong number; None if there is none."""


class _Header(NamedTuple):
    number: int
    samples: int
    variable: bool


def walk_frames(file, begin, end):
    """Walk over the frames of a FLAC file.

    Arguments
    ---------
    file : binary file
    begin, end : int
        Position of the first byte (of ``fLaC``) and of the one after the last.

    Returns
    -------
    Frames or None
        None if no frame follows the header.

    Example
    -------
    >>> import io, numpy, soundfile
    >>> file = io.BytesIO()
    >>> soundfile.write(file, numpy.zeros(10_000), 16000, format="FLAC")
    >>> size = file.seek(0, 2)
    >>> walk_frames(file, 0, size) == Frames(10_000, 10_000, [size], None)
    True
    """
    info = _read(file, begin + 8, 18)
    smallest, largest = int.from_bytes(info[0:2], "big"), int.from_bytes(info[2:4], "big")
    stated = int.from_bytes(info[13:18], "big") & 0xFFFFFFFFF  # 36 bits
    position, last = begin + 4, False
    while not last:
        head = _read(file, position, 4)
        if len(head) < 4:
            return None
        last = head[0] >= 128
        position += 4 + int.from_bytes(head[1:4], "big")
    start, due, held, gap = position, None, 0, None  # start: of the previous frame
    checksum = _Checksum(file, start)
    for place, header in _headers(file, start, end):
        if due is None and place > start:
            return None
        if due is None or header.number in due:
            # The number counts frames or samples. Old encoders do not mark it in the frame, only in the header of the file.
            due = {header.number + header.samples} if header.variable or smallest != largest else set()
            due |= set() if header.variable else {header.number + 1}
            start, held = place, held + header.samples
            checksum = _Checksum(file, start)
        elif gap is None and checksum.at(place) == 0:
            gap = place
    if due is None:
        return None
    return Frames(stated, held, list(_Checksum(file, start).zeros(min(end, start + LARGEST_FRAME))), gap)


def _headers(file, position, end):
    """Yield the positions of all bytes that look like the header of a frame, and the header."""
    while position < end:
        block = _read(file, position, min(STEP + 15, end - position))
        for match in re.finditer(rb"\xff[\xf8\xf9]", block[: STEP + 1]):
            header = _header(block[match.start() : match.start() + 16])
            if header is not None:
                yield position + match.start(), header
        position += STEP


def _header(data):
    """The header at the start of 16 bytes; None if there is none."""
    if len(data) < 6 or data[2] >> 4 == 0 or data[2] & 15 == 15 or data[3] >> 4 > 10 or data[3] & 1 or data[3] & 14 == 6:
        return None
    more = 0  # bytes of the number after the first one, as in UTF-8
    while more < 7 and data[4] << more & 128:
        more += 1
    if more == 1:
        return None
    number, more = data[4] & (0x7F >> more), max(0, more - 1)
    if any(byte & 0xC0 != 0x80 for byte in data[5 : 5 + more]):
        return None
    for byte in data[5 : 5 + more]:
        number = number << 6 | byte & 0x3F
    position, size = 5 + more, data[2] >> 4
    if size in (6, 7):
        samples = int.from_bytes(data[position : position + size - 5], "big") + 1
        position += size - 5
    else:
        samples = 192 if size == 1 else 576 << size - 2 if size < 6 else 256 << size - 8
    position += {12: 1, 13: 2, 14: 2}.get(data[2] & 15, 0)
    crc = 0
    for byte in data[: position + 1]:  # the last byte is the checksum
        crc = _CRC8[crc ^ byte]
    return None if crc or len(data) <= position else _Header(number, samples, bool(data[1] & 1))


class _Checksum:
    """The checksum of the bytes from a position on. It is 0 at the end of a whole frame, which includes its checksum."""

    def __init__(self, file, position):
        self._file, self._position, self._crc = file, position, 0

    def at(self, position):
        """The checksum up to a position; each call continues from the last one."""
        for _ in self.zeros(position):
            pass
        return self._crc

    def zeros(self, end):
        """Yield the positions up to ``end`` where the checksum is 0."""
        crc = self._crc
        while self._position < end:
            block = _read(self._file, self._position, min(STEP, end - self._position))
            if not block:
                break
            for place, byte in enumerate(block, start=self._position + 1):
                crc = crc << 8 & 0xFF00 ^ _CRC16[crc >> 8 ^ byte]
                if not crc:
                    yield place
            self._position, self._crc = self._position + len(block), crc


def _table(polynomial, bits):
    """The table of a checksum of ``bits`` bits: the change by each byte."""
    table = []
    for byte in range(256):
        crc = byte << bits - 8
        for _ in range(8):
            crc = (crc << 1 ^ (polynomial if crc >> bits - 1 else 0)) & (1 << bits) - 1
        table.append(crc)
    return table


_CRC8, _CRC16 = _table(0x07, 8), _table(0x8005, 16)


def _read(file, position, count):
    file.seek(position)
    return file.read(count)
