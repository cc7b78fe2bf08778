"""Compare the length that the container of an audio file states with the content of the file.

libsndfile reads many broken files without an error: half of a W64 file as a shorter one, or only the first of two joined FLAC
files. This module does not decode. It walks over headers, pages and frames, and checks three things:

* The file is complete. All bytes that a header states are present (WAV, RF64, W64, AIFF, SVX, CAF, AU, NIST, VOC, AVR, HTK,
  MAT4, MAT5, MPC2K, SDS, WVE, XI), as are all pages of an Ogg stream, with valid checksums, and all frames of an MP3 or FLAC
  file.
* No samples come after its end. Tags, further chunks and up to ``LONGEST_TRAILER`` other bytes are ignored. A second file or a
  second chunk of samples is refused.
* A joined Ogg, MP3 or FLAC file, with or without tags between its parts, is split into the parts, and each part is read.

Some faults show in no header or frame, and such files count as whole:

* an MP3 without a Xing header or a headerless GSM 6.10 file, cut exactly between two frames;
* a file whose header states no length, cut between two samples or followed by other bytes (IRCAM, PAF, PVF, SD2, XI from
  libsndfile; WAV, AU or CAF written to a pipe);
* an SD2 file joined to another;
* the end of a VOC file without its one-byte terminator;
* flipped bits in uncompressed samples.
"""

import codecs
import os
import re
import struct
import zlib
from itertools import pairwise
from typing import NamedTuple

from speechbrain_ext.dataio.flac_frames import walk_frames

UNKNOWN_WAV_SIZE, UNKNOWN_IFF_SIZE = 0x7FFF0000, 0x7EFF0000
"""Smallest size that means "unknown". A program that writes WAV or AIFF to a pipe does not know the size, and states a very
large one: from this size (SoX, rounded down to a whole sample) up to 0xFFFFFFFF (ffmpeg)."""

LONGEST_TRAILER = 1024
"""Largest number of unknown bytes after the samples that counts as padding. More bytes may be samples, for example if a recorder
was stopped before it updated its header."""

OGG_SOUNDS = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ", b"CELT    ", b"PCM     ")
"""First bytes of the first packet of an Ogg stream of sound. Other streams hold pictures, text or an index."""

# Ogg's CRC takes the bits of a byte in the opposite order of zlib's.
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

HEAD = 64
"""Bytes that identify the format of a file, except MP3."""


class ContainerError(ValueError):
    """A container is damaged or cannot be read.

    Arguments
    ---------
    text : str
        The problem and the remedy, as the rest of a sentence that begins with "The audio file NAME".
    reason : str
        The kind of problem, as in :class:`~speechbrain_ext.dataio.audio.AudioError`.
    """

    def __init__(self, text, reason="truncated or damaged"):
        super().__init__(text)
        self.reason = reason


class Part(NamedTuple):
    """A part of a file that is a whole audio file: bytes ``begin`` to ``end``.

    ``samples`` is the number of samples per channel if frames were counted because no header states it. ``unit`` is the number
    of bytes of samples if the header states no size, else None; it must be a whole number of samples.
    """

    begin: int
    end: int
    samples: int | None = None
    unit: int | None = None


class Chunks(NamedTuple):
    """The layout of chunks in a family of containers."""

    first: int
    """Start of the first chunk, from the start of the container."""
    head: str
    """Name and size of a chunk, in struct's format."""
    align: int = 2
    """Chunks are padded to multiples of this number of bytes."""
    own_head: int = 0
    """Bytes of the head that the stated size includes."""
    samples: bytes = b"data"
    """Name of the chunk that holds the samples."""
    lead: int = 0
    """Bytes of that chunk before the samples."""
    unknown: int = 2**62
    """Smallest size that means "unknown", from programs that write to a pipe."""


RIFF = Chunks(12, "<4sI", unknown=UNKNOWN_WAV_SIZE)
RIFX = Chunks(12, ">4sI", unknown=UNKNOWN_WAV_SIZE)
W64 = Chunks(40, "<16sQ", 8, 24, b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a")
AIFF = Chunks(12, ">4sI", samples=b"SSND", lead=8, unknown=UNKNOWN_IFF_SIZE)
SVX = Chunks(12, ">4sI", samples=b"BODY", unknown=UNKNOWN_IFF_SIZE)
CAF = Chunks(8, ">4sq", 1, samples=b"data", lead=4)


def find_parts(path, file=None):
    """Find the parts of an audio file; each part is a whole audio file.

    Arguments
    ---------
    path : str or os.PathLike
        The file. Its name decides the format if the content does not show it.
    file : binary file, optional
        Read this open file instead, and close it.

    Returns
    -------
    list of Part
        One part, from the first byte to the last, if this module does not know the container.

    Raises
    ------
    ContainerError
        If the file is truncated, damaged, or holds more than can be read.
    OSError
        If the file cannot be read.

    Example
    -------
    >>> import tempfile, numpy, soundfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.flac")
    ...     soundfile.write(path, numpy.zeros(800), 16000)
    ...     single = path.stat().st_size
    ...     _ = path.write_bytes(2 * path.read_bytes())
    ...     [(part.begin // single, part.end // single) for part in find_parts(path)]
    [(0, 1), (1, 2)]
    """
    with file or open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        begin = _after_id3(file, 0, size)
        head = _read(file, begin, HEAD)
        for pattern, _, walk in KINDS:
            if pattern.match(head):
                return walk(file, begin, size)
        frames = begin + len(head) - len(head.lstrip(b"\0"))  # some tags do not count their padding
        if _is_mpeg_sync(_read(file, frames, 4)):
            return _mpeg_parts(file, frames, size)
        if os.fsencode(path).lower().endswith(b".mp3"):  # libsndfile trusts the name
            if (frames := _first_mpeg_frame(file, begin, size)) is None:
                raise ContainerError("is not an MP3 file: its first 64 KiB hold no two frames in a row", "unreadable")
            return _mpeg_parts(file, frames, size)
        if os.fsencode(path).lower().endswith(b".gsm"):
            return _gsm_parts(file, size)
    return [Part(0, size)]


def container_name(head):
    """The name of the file format that bytes begin with. Such bytes are not raw samples.

    A few bytes may match a format by chance. Signatures shorter than four bytes therefore do not count, and a frame of MP3 or AAC
    or a packet of an MPEG transport stream counts only if others follow it. :func:`head_size` gives the number of bytes needed
    for that. Four or more bytes that are all text are not samples either.

    Arguments
    ---------
    head : bytes
        The first bytes of a file or stream.

    Returns
    -------
    str
        Empty if the bytes match no format.

    Example
    -------
    >>> container_name(b"RIFF\\x24\\0\\0\\0WAVEfmt "), container_name(b"\\0\\0\\1\\0\\2\\0\\1\\0" * 8)
    ('WAV', '')
    """
    for pattern, name, _ in KINDS:
        if name not in WEAK and pattern.match(head):
            return name
    if _is_text(head[:HEAD]):  # before the signatures, because text may begin like one
        return "HTML" if HTML.match(head) else "text"
    for pattern, name in FOREIGN:
        if pattern.match(head):
            return name
    frame = _mpeg_frame(head)
    following = _mpeg_frame(head[frame.size :]) if frame else None
    if following and following.form == frame.form:
        return "MP3"
    if (size := _adts_size(head)) and _adts_size(head[size:]) and head[size : size + 3] == head[:3]:
        return "AAC"
    if len(head) >= TS_HEAD and any(all(head[at + n * size] == 0x47 for n in range(4)) for size, at in TS_PACKETS):
        return "MPEG-TS"
    return ""


def head_size(head):
    """Number of bytes that :func:`container_name` needs for a file or stream that begins with ``head``.

    Example
    -------
    >>> head_size(b"RIFF"), head_size(b"\\xff\\xfb\\x90\\x64")
    (64, 2048)
    """
    if _is_mpeg_sync(head):
        return 2048
    if size := _adts_size(head):
        return max(HEAD, size + 7)
    return TS_HEAD if any(head[at : at + 1] == b"G" for _, at in TS_PACKETS) else HEAD


TS_PACKETS, TS_HEAD = ((188, 0), (192, 4)), 640
"""Packets of MPEG transport streams: (size, position of the mark) in bytes; and the number of bytes that hold four packets."""


def _adts_size(head):
    """The size of the AAC frame at the start of some bytes; 0 if there is none."""
    if len(head) < 7 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
        return 0
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size > 7 else 0


def _is_text(head):
    """Whether all bytes are text, in UTF-8 or in an encoding with one byte per character."""
    if len(head) < 4 or re.search(rb"[\0-\x08\x0b\x0e-\x1f\x7f]", head):
        return False
    try:
        # the last character may be cut
        return all(char.isprintable() or char.isspace() for char in codecs.getincrementaldecoder("utf-8-sig")().decode(head))
    except UnicodeDecodeError:
        return len(re.findall(rb"[ -~\s]", head)) >= 0.75 * len(head) >= 0.75 * 16


# -------------------- containers that state the size of their samples


def _walk_chunks(file, position, size, style):
    """Yield the name, begin and stated size of every chunk."""
    length = struct.calcsize(style.head)
    while position + length <= size:
        name, stated = struct.unpack(style.head, _read(file, position, length))
        stated -= style.own_head
        yield name, position + length, stated
        if stated < 0:  # a chunk up to the end, or a wrong size
            return
        position += length + stated + -stated % style.align


def _chunk_parts(style, name, to_end=False):
    """The walk over a family of containers. With ``to_end``, libsndfile reads everything up to the end as samples."""

    def walk(file, begin, size):
        large, tag = None, None
        for chunk, data, stated in _walk_chunks(file, begin + style.first, size, style):
            if chunk == b"ds64":  # the 64-bit sizes of an RF64 file: of the file, of the samples
                large = int.from_bytes(_read(file, data + 8, 8), "little")
            elif chunk == b"fmt " and style in (RIFF, RIFX):
                tag = int.from_bytes(_read(file, data, 2), "little" if style == RIFF else "big")
            elif chunk == b"LIST" and _read(file, data, 4) == b"wavl":
                raise ContainerError(
                    "keeps its samples in a list of chunks (wavl), which soundfile does not read; convert it to a plain WAV with "
                    "an audio editor",
                    "unreadable",
                )
            elif chunk == style.samples:
                if large is not None and stated == 0xFFFFFFFF:
                    stated = large
                break
        else:
            raise ContainerError("is truncated or damaged: it ends before its samples begin")
        present = size - data
        unknown = stated < 0 if style == CAF else stated >= (style.unknown if large is None else 2**62)
        if unknown and (stated < 0 or present < stated):
            # The size differs between files; with a size of 32 bits, compare only the bytes after it
            repeated = _read(file, begin, 12) if style in (W64, CAF) else _read(file, begin, 16)[8:]
            _refuse_repeated(file, repeated, data, size, name)
            end = size
        else:
            _compare(file, data + style.lead, stated - style.lead, size, style)
            end = data + stated
            pad = -stated % style.align
            if not pad or not _is_trailer(file, end, size, style):  # some programs leave out the padding
                _check_trailer(file, end + pad, size, stated - style.lead, style)
        if tag == 0x55:  # MP3 frames
            return _mpeg_parts(file, data, end)
        return [Part(begin, end if to_end else size)]

    return walk


def _stated_parts(measure, name, to_end=True):
    """The walk over containers with a stated size; ``measure`` gives the position of the samples and their size in bytes."""

    def walk(file, begin, size):
        try:
            data, stated = measure(file, begin, size)
        except (struct.error, ValueError) as error:
            if isinstance(error, ContainerError):
                raise
            raise ContainerError("is truncated or damaged: it ends before its samples begin") from error
        if name in WEAK and (stated <= 0 or data + stated > size + 2**31):
            return [Part(0, size)]  # the signature matched by chance
        if stated is None:
            _refuse_repeated(file, _read(file, begin, 12), data, size, name)
            return [Part(begin, size)]
        _compare(file, data, stated, size)
        _check_trailer(file, data + stated, size, stated)
        return [Part(begin, data + stated if to_end else size)]

    return walk


def _unstated_parts(header, name):
    """The walk over containers that state no size; ``header`` matches the bytes before the samples."""

    def walk(file, begin, size):
        match = header.match(_read(file, begin, 4096))
        if not match:
            raise ContainerError("is truncated or damaged: it ends before its samples begin")
        _refuse_repeated(file, _read(file, begin, 12), begin + match.end(), size, name)
        return [Part(begin, size, unit=size - begin - match.end())]

    return walk


def _compare(file, data, stated, size, style=None):
    """Compare the stated size of the samples with the number of bytes that follow."""
    present = size - data
    if stated > present:
        raise ContainerError(
            f"is truncated or damaged: its header states {stated} bytes of samples and only {max(0, present)} follow"
        )
    if stated <= 0 < present and not _is_trailer(file, data, size, style):
        raise ContainerError(
            f"is unfinished: its header states no samples and {present} bytes follow, as if the program that wrote it "
            "was stopped; recover it with an audio editor, as raw samples",
            "unfinished",
        )


def _check_trailer(file, position, size, stated, style=None):
    """Refuse bytes after the samples that may be samples or a second file."""
    begin = _after_tags(file, position, size)
    if not _is_trailer(file, begin, size, style) and size - begin > LONGEST_TRAILER:
        states = "its last frame or page ends" if stated is None else f"the {stated} bytes of samples that its header states end"
        raise ContainerError(
            f"holds more than can be read: {states} at byte {position}, and {size - begin} bytes that are no tags follow, as "
            "if a recording was stopped or files were joined; recover it with an audio editor",
            "unfinished",
        )


def _is_trailer(file, position, size, style=None):
    """Whether the bytes are only chunks, tags or zeros; a second file among them is refused."""
    while position < size:
        head = _read(file, position, HEAD)
        for pattern, name, _ in KINDS:
            if name not in WEAK and pattern.match(head):
                raise _joined(name, position)
        if (following := _after_tags(file, position, size)) > position:
            position = following
            continue
        if head[0] == 0:
            position += len(head) - len(head.lstrip(b"\0"))
            continue
        length = struct.calcsize(style.head) if style else size
        if position + length > size:
            return False
        name, stated = struct.unpack(style.head, head[:length])
        stated -= style.own_head
        if name == style.samples and stated > style.lead:
            raise ContainerError(
                f"holds more than one chunk of samples, and soundfile reads only one: another begins at byte {position}; "
                "convert it to WAV with an audio editor",
                "joined",
            )
        if not all(32 <= byte < 127 for byte in name[:4]) or not 0 <= stated <= size - position - length:
            return False
        position += length + stated + -stated % style.align
    return True


def _joined(name, position):
    return ContainerError(
        f"holds more than one file: the header of another {name} file is at byte {position}; write each to a separate file",
        "joined",
    )


def _refuse_repeated(file, needle, start, size, name):
    """Refuse a second header; without a stated size, it would be read as samples."""
    for position in _find(file, needle, start, size):
        raise _joined(name, position)


def _au(file, begin, size):
    layout = "<" if _read(file, begin, 4) == b"dns." else ">"
    data, stated = struct.unpack(layout + "II", _read(file, begin + 4, 8))
    return begin + data, None if stated == 0xFFFFFFFF else stated


def _nist(file, begin, size):
    text = _read(file, begin, 1024).decode("latin-1")
    coding = re.search(r"^sample_coding -s\d+ +(\S+)", text, re.M)
    if coding and "," in coding[1]:
        raise ContainerError(
            f"is compressed ({coding[1]}), which soundfile does not read; convert it to WAV, with sph2pipe", "unreadable"
        )
    fields = {name: int(value) for name, value in re.findall(r"^(\w+) -(?:i|s\d+) +(\d+)\s*$", text, re.M)}
    if not {"sample_count", "channel_count", "sample_n_bytes"} <= fields.keys():
        raise ValueError("fields are missing")
    return begin + int(text[8:16]), fields["sample_count"] * fields["channel_count"] * fields["sample_n_bytes"]


def _voc(file, begin, size):
    """Blocks with a type (1 byte) and a size (3 bytes); the last block is one byte, type 0."""
    (first,) = struct.unpack("<H", _read(file, begin + 20, 2))
    position, sound = begin + first, None
    while (head := _read(file, position, 4)) and head[0]:
        stated = int.from_bytes(head[1:].ljust(3, b"\0"), "little")
        if head[0] > 9:
            break
        if head[0] in (1, 2, 3, 6, 9):  # samples, more samples, silence, a loop, samples
            if sound:
                raise ContainerError(
                    f"holds more than one block of sound, and soundfile reads only the first: another begins at byte "
                    f"{position}; convert it to WAV with an audio editor",
                    "joined",
                )
            sound = position + 4, stated
        position += 4 + stated
        if position >= size:
            break
    if not sound:
        raise ValueError("no sound")
    # libsndfile refuses a file without the last block, and reads it as a sample at other places
    terminated = sum(sound) == size or _read(file, sum(sound), 1) == b"\0"
    return sound[0], sound[1] + (terminated and sum(sound) < size)


def _avr(file, begin, size):
    stereo, bits = struct.unpack(">hH", _read(file, begin + 12, 4))
    (frames,) = struct.unpack(">I", _read(file, begin + 26, 4))
    stated = frames * ((bits + 7) // 8)
    # Some programs count both channels, others count frames
    return begin + 128, stated if size - begin - 128 == stated else stated * (2 if stereo else 1)


def _mat4(file, begin, size):
    """Two matrices, ``samplerate`` and ``wavedata``."""
    position = begin
    for _ in range(2):
        layout = ">" if _read(file, position, 4)[:2] == b"\0\0" and _read(file, position, 4) != bytes(4) else "<"
        kind, rows, columns, _, name = struct.unpack(layout + "5I", _read(file, position, 20))
        data, stated = position + 20 + name, rows * columns * (8, 4, 4, 2, 2, 1)[min(5, kind // 10 % 10)]
        position = data + stated
    return data, stated


def _mat5(file, begin, size):
    """Two matrices, the sample rate and the samples, each of four elements: flags, dimensions, name, numbers."""
    layout, position = ("<" if _read(file, begin + 126, 2) == b"IM" else ">"), begin + 128
    for _ in range(2):
        position += 8  # the stated size is not used: libsndfile writes a wrong one
        for _ in range(4):
            kind, stated = struct.unpack(layout + "II", _read(file, position, 8))
            small = kind >> 16  # a small element lies inside its head
            data, stated = (position + 4, small) if small else (position + 8, stated)
            position = position + 8 if small else data + stated + -stated % 8
    return data, stated


def _mpc2k(file, begin, size):
    channels, frames = struct.unpack("<B8xI", _read(file, begin + 21, 13))
    return begin + 42, frames * 2 * (1 + channels)


def _wve(file, begin, size):
    return begin + 32, *struct.unpack(">I", _read(file, begin + 18, 4))


def _xi(file, begin, size):
    (stated,) = struct.unpack("<I", _read(file, begin + 298, 4))
    return begin + 338, stated or None  # libsndfile writes 0


def _htk(file, begin, size):
    count, _, width = struct.unpack(">IIH", _read(file, begin, 10))
    return begin + 12, count * width


def _sds(file, begin, size):
    """Packets of 127 bytes; 120 of these hold samples, 7 bits in each byte."""
    bits, *length = struct.unpack("<B3x3B", _read(file, begin + 6, 7))
    samples = sum(byte << 7 * index for index, byte in enumerate(length))
    if not 8 <= bits <= 28:
        raise ValueError("no number of bits")
    return begin + 21, -(-samples // (120 // -(-bits // 7))) * 127


# -------------------- containers of pages and frames


def _ogg_parts(file, begin, size):
    """Walk over the pages of an Ogg file (RFC 3533, section 6). Streams may follow each other (section 4)."""
    position, due, unfinished, starts, ends, in_heads, sounds, times = begin, {}, set(), [begin], [], True, 0, {}
    while True:
        head = _read(file, position, 27)
        if head[:4] != b"OggS" and due and not unfinished:  # between two joined files
            following = _after_tags(file, position, size)
            head = _read(file, following, 27)
            if head[:4] == b"OggS" and len(head) == 27 and head[5] & 2:
                ends.append(position)
                position = following
        if head[:4] != b"OggS":
            break
        segments = file.read(head[26]) if len(head) == 27 else b""
        body = file.read(sum(segments))
        if len(head) < 27 or len(segments) < head[26] or len(body) < sum(segments):
            break
        flags, serial, number, checksum = struct.unpack_from("<5xB8xII4s", head)
        page = head[:22] + bytes(4) + head[26:] + segments + body
        # zlib inverts the register before and after, Ogg does not
        if zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF != int.from_bytes(
            checksum.translate(REVERSED_BITS), "big"
        ):
            raise ContainerError(f"is truncated or damaged: the checksum of the Ogg page at byte {position} is wrong")
        if flags & 2 and not in_heads:  # the first page of the next stream
            if unfinished:
                raise ContainerError(f"is truncated or damaged: the Ogg stream before byte {position} has no last page")
            due, in_heads, sounds, times = {}, True, 0, {}
            if len(ends) < len(starts):
                ends.append(position)
            starts.append(position)
        in_heads = in_heads and bool(flags & 2)
        sounds += in_heads and body.startswith(OGG_SOUNDS)
        if sounds > 1:
            raise ContainerError(
                f"holds several streams of sound side by side, and soundfile reads only one: another begins at byte "
                f"{position}; write each to a separate file",
                "joined",
            )
        if number != due.get(serial, number):
            raise ContainerError(f"is truncated or damaged: Ogg pages are missing before byte {position}")
        if (time := int.from_bytes(head[6:14], "little", signed=True)) >= 0:  # -1: no packet ends on the page
            if time < times.get(serial, 0):
                raise ContainerError(
                    f"is truncated or damaged: the Ogg page at byte {position} states that it ends at sample {time}, and "
                    f"the page before it at sample {times[serial]}"
                )
            times[serial] = time
        elif flags & 4 and body:
            raise ContainerError(f"is truncated or damaged: no packet ends on its last Ogg page, which begins at byte {position}")
        due[serial] = number + 1
        unfinished.add(serial)
        if flags & 4:  # the last page of its stream
            unfinished.discard(serial)
        position += len(page)
    if unfinished or not due or _read(file, position, 4) == b"OggS":
        raise ContainerError(f"is truncated or damaged: its Ogg stream breaks off at byte {position} of {size}")
    _check_trailer(file, position, size, None)
    return [Part(*pair) for pair in zip(starts, [*ends, position], strict=True)]


def _flac_parts(file, begin, size):
    """Split at further headers (8 fixed bytes), and compare the frames of each part with its header."""
    starts = [begin]
    for needle in (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22"):
        starts += _find(file, needle, begin + 1, size)
    starts.sort()
    for start in starts:
        info = _read(file, start, 26)
        if len(info) < 26:
            raise ContainerError("is truncated or damaged: it ends before its samples begin")
        if not int.from_bytes(info[21:26], "big") & 0xFFFFFFFFF:  # 36 bits
            raise ContainerError(
                "cannot be checked: its FLAC header does not state its length, as if written to a pipe; encode it again",
                "length unknown",
            )
    parts = [Part(*pair) for pair in pairwise([*starts, size])]
    for part in parts:
        _check_flac_frames(file, part)
    return parts


def _check_flac_frames(file, part):
    """Compare the frames with the header; libsndfile would insert silence for missing frames."""
    found = walk_frames(file, part.begin, part.end)
    if found is None:
        raise ContainerError("is truncated or damaged: no frame follows its FLAC header")
    if found.gap is not None:
        raise ContainerError(
            f"is truncated or damaged: the FLAC frame at byte {found.gap} is not the one that should follow; frames are missing "
            "or repeated"
        )
    states = f"its FLAC header states {found.stated} samples, and its frames hold {found.held}"
    if found.held > found.stated:
        raise ContainerError(
            f"is unfinished: {states}, as if a recorder was stopped; recover it with an audio editor, or with flac -d -F",
            "unfinished",
        )
    if found.held < found.stated:
        raise ContainerError(f"is truncated or damaged: {states}")
    for end in found.ends:  # one of these is the true end
        try:
            return _check_trailer(file, end, part.end, None)
        except ContainerError as error:
            if error.reason == "joined":
                raise
    raise ContainerError(
        "is truncated or damaged: its last FLAC frame does not end with the right checksum; the file was cut, or bytes that are "
        "no tags follow it"
    )


class _Frame(NamedTuple):
    """The header of an MPEG audio frame: the properties that are fixed within a file, its size, samples and side information."""

    form: tuple
    size: int
    samples: int
    side: int


# kbit/s, by MPEG version and layer; MPEG 2.5 has those of MPEG 2, and its layer III has those of layer II
BIT_RATES = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _is_mpeg_sync(head):
    return len(head) >= 4 and head[0] == 0xFF and head[1] >= 0xE0 and head[1] & 0x18 != 8 and head[1] & 6 != 0


def _mpeg_frame(head):
    """The MPEG frame at the start of some bytes; None if there is none."""
    if not _is_mpeg_sync(head) or not 0 < head[2] >> 4 < 15 or head[2] & 12 == 12:
        return None
    version = (2.5, None, 2, 1)[head[1] >> 3 & 3]
    layer = 4 - (head[1] >> 1 & 3)
    rate = (44100, 48000, 32000)[head[2] >> 2 & 3] // {1: 1, 2: 2, 2.5: 4}[version]
    bits = 1000 * BIT_RATES[min(2, int(version)), layer][(head[2] >> 4) - 1]
    padding, mono = head[2] >> 1 & 1, head[3] >> 6 == 3
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 1 else 1152
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    side = (17 if mono else 32) if version == 1 else (9 if mono else 17)
    return _Frame((version, layer, rate, mono), size, samples, side)


def _mpeg_tag(file, position, frame):
    """Whether an MP3 frame holds a Xing, Info or VBRI header instead of samples, and the number of frames that it states."""
    head = _read(file, position, 64)
    if frame.form[1] != 3:
        return False, None
    if head[36:40] == b"VBRI":
        return True, int.from_bytes(head[50:54], "big")
    xing = head[4 + frame.side :]
    if xing[:4] not in (b"Xing", b"Info") or len(xing) < 12:
        return False, None
    return True, int.from_bytes(xing[8:12], "big") if xing[7] & 1 else None


def _mpeg_parts(file, begin, size):
    """Walk over the frames of an MPEG audio file.

    Without a Xing header, libsndfile estimates the length from the first frame, and reads no further. Such a part therefore gets
    the number of samples in its frames.
    """
    parts, position = [], begin
    frames, start, form = 0, None, None  # start and form: of the part
    tag, stated, count, samples, first = False, None, 0, 0, begin

    def finish():
        if start is None:
            return
        if stated is not None and stated > count:
            raise ContainerError(
                f"is truncated or damaged: its header states {stated} MPEG frames and only {count} follow",
            )
        if stated == count and _read(file, start, 64)[36:40] != b"VBRI":
            parts.append(Part(start, position))
        elif count:  # leave out a header that is wrong or states no number; then all frames are read
            parts.append(Part(first, position, count * samples))

    while position < size:
        head = _read(file, position, 4)
        frame = _mpeg_frame(head)
        if frame is None and _is_mpeg_sync(head) and not head[2] >> 4:
            raise ContainerError(
                f"cannot be checked: the MPEG frame at byte {position} has a free bit rate and states no size; "
                "convert it to WAV or FLAC",
                "length unknown",
            )
        cut = frame is not None and position + frame.size > size
        if not frames and (cut or frame is None) or frames == 1 and frame is None and not _is_trailer(file, position, size):
            raise ContainerError("is truncated, damaged or no audio: it begins like an MPEG frame, and no second one follows")
        if cut:
            raise ContainerError(
                f"is truncated or damaged: its last MPEG frame has {frame.size} bytes and only {size - position} follow"
            )
        if frame is None:
            if (following := _after_tags(file, position, size)) == position:
                break
            finish()
            start, position = None, following
            continue
        is_tag, number = _mpeg_tag(file, position, frame)
        if start is None or is_tag or frame.form != form:
            finish()
            start, form, tag, stated, count = position, frame.form, is_tag, number, 0
            first = position + frame.size if tag else position
        count += not is_tag
        samples = frame.samples
        position += frame.size
        frames += 1
    finish()
    _check_mpeg_trailer(file, position, size, counted=stated == count)
    return parts or [Part(begin, size)]


def _check_mpeg_trailer(file, position, size, counted):
    """Refuse frames or too many zeros after the last frame.

    Zeros may be frames that were never written, as in a stopped download. They are allowed if a header ``counted`` the frames.
    """
    if _is_trailer(file, position, size):
        zeros = 0 if counted else _count_zeros(file, _after_tags(file, position, size), size)
        if zeros > LONGEST_TRAILER:
            raise ContainerError(
                f"is truncated or damaged: {zeros} bytes of zeros follow its last MPEG frame, as if a download stopped, and no "
                "header states the number of frames"
            )
        return
    following = _first_mpeg_frame(file, position, size, 2**20)
    if following is not None:
        raise ContainerError(
            f"is truncated or damaged: {following - position} bytes from byte {position} on are no MPEG frames, but frames follow"
        )
    _check_trailer(file, position, size, None)


def _first_mpeg_frame(file, position, size, reach=2**16):
    """The position of the first frame that is followed by another one; None if there is none within reach."""
    data = _read(file, position, reach)
    for match in re.finditer(rb"\xff[\xe2-\xff]", data):
        frame = _mpeg_frame(data[match.start() : match.start() + 4])
        following = frame and _mpeg_frame(data[match.start() + frame.size :][:4])
        if following and following.form == frame.form:
            return position + match.start()
    return None


def _gsm_parts(file, size):
    """GSM 6.10 without a header: frames of 33 bytes that begin with the same four bits."""
    file.seek(0)
    data = file.read()
    if any(byte >> 4 != 0xD for byte in data[::33]):
        raise ContainerError("is not a GSM 6.10 file: not all of its frames of 33 bytes begin with the bits 1101; check its name")
    if size % 33:
        raise ContainerError(f"is truncated or damaged: its {size} bytes are not a whole number of GSM frames of 33 bytes")
    return [Part(0, size)]


# -------------------- reading


def _read(file, position, count):
    file.seek(position)
    return file.read(count)


def _after_id3(file, position, size):
    """The end of the ID3v2 tags at a position. Any format may follow such tags."""
    while len(head := _read(file, position, 10)) == 10 and ID3.match(head):
        high, middle, low, lowest = head[6:]  # seven bits each
        end = position + 10 + (high << 21 | middle << 14 | low << 7 | lowest) + (10 if head[5] & 16 else 0)
        if end > size:
            raise ContainerError(f"is truncated or damaged: it ends within the ID3 tag at byte {position}")
        position = end
    return position


def _after_tags(file, position, size):
    """The end of the tags at a position, by their stated sizes. Another file may follow.

    Bytes that begin like a tag but do not end like one may be samples, and do not count.
    """
    while position < size:
        end = _after_id3(file, position, size)
        if end == position:
            end = _after_tag(file, position, size)
        if not position < end <= size:
            break
        position = end
    return position


def _after_tag(file, position, size):
    """The end of a tag other than ID3v2; the position itself if there is none."""
    head = _read(file, position, 32)
    if head.startswith(b"TAG+"):  # the extension of ID3v1, always before it
        return position + 227 if _read(file, position + 227, 3) == b"TAG" else position
    if head.startswith(b"TAG"):
        return position + 128
    if head.startswith(b"3DI"):  # a footer of ID3v2
        return position + 10
    if head.startswith(b"LYRICSBEGIN"):
        text = _read(file, position, 2**20)  # enough, because its size has six digits
        for match in re.finditer(rb"(\d{6})LYRICS200|LYRICSEND", text):
            if match[1] is None or int(match[1]) == match.start():
                return position + match.end()
        return position
    if head.startswith(b"APETAGEX") and len(head) == 32:
        _, stated, _, flags = struct.unpack("<4I", head[8:24])
        return position + 32 + (stated if flags & 1 << 29 else 0)  # a header, or only a footer
    for footer in _find(file, b"APETAGEX", position, min(size, position + 2**20)):  # version 1 has no header
        if int.from_bytes(_read(file, footer + 12, 4), "little") == footer + 32 - position:
            return footer + 32
    return position


def _count_zeros(file, position, size, step=2**20):
    """The number of zero bytes at a position."""
    begin = position
    while position < size:
        block = _read(file, position, step)
        zeros = len(block) - len(block.lstrip(b"\0"))
        position += zeros
        if not block or zeros < len(block):
            break
    return position - begin


def _find(file, needle, start, size, step=2**20):
    """Yield the positions of some bytes from ``start`` on."""
    while start < size:
        block = _read(file, start, step + len(needle) - 1)  # blocks overlap, so that no match is cut
        at = block.find(needle)
        while at >= 0:
            yield start + at
            at = block.find(needle, at + 1)
        start += step


def _kind(pattern, name, walk):
    return re.compile(pattern, re.S), name, walk


ID3 = re.compile(rb"ID3[\x02-\x04][^\xff][\0-\xff][\0-\x7f]{4}", re.S)

KINDS = [
    _kind(rb"(RIFF|RF64|BW64)....WAVE", "WAV", _chunk_parts(RIFF, "WAV")),
    _kind(rb"RIFX....WAVE", "WAV", _chunk_parts(RIFX, "WAV")),
    _kind(rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0", "W64", _chunk_parts(W64, "W64", to_end=True)),
    _kind(rb"FORM....AIF[FC]", "AIFF", _chunk_parts(AIFF, "AIFF")),
    _kind(rb"FORM....(8SVX|16SV)", "SVX", _chunk_parts(SVX, "SVX", to_end=True)),
    _kind(rb"caff\0\x01", "CAF", _chunk_parts(CAF, "CAF")),
    _kind(rb"fLaC", "FLAC", _flac_parts),
    _kind(rb"OggS\0", "Ogg", _ogg_parts),
    _kind(rb"\.snd\0|dns\....\0", "AU", _stated_parts(_au, "AU")),
    _kind(rb"NIST_1A\n", "NIST", _stated_parts(_nist, "NIST")),
    _kind(rb"Creative Voice File\x1a", "VOC", _stated_parts(_voc, "VOC")),
    _kind(rb"2BIT", "AVR", _stated_parts(_avr, "AVR")),
    _kind(rb"(\0{4}|\0\0\x03\xe8).{16}samplerate\0", "MAT4", _stated_parts(_mat4, "MAT4")),
    _kind(rb"MATLAB 5\.0 MAT-file", "MAT5", _stated_parts(_mat5, "MAT5")),
    _kind(rb"ALawSoundFile\*\*\0", "WVE", _stated_parts(_wve, "WVE")),
    _kind(rb"Extended Instrument: ", "XI", _stated_parts(_xi, "XI")),
    _kind(rb"\x64\xa3[\x01-\x04]\0|\0[\x01-\x04]\xa3\x64", "IRCAM", _unstated_parts(re.compile(rb".{1024}", re.S), "IRCAM")),
    _kind(rb" paf|fap ", "PAF", _unstated_parts(re.compile(rb".{2048}", re.S), "PAF")),
    _kind(rb"PVF1\n", "PVF", _unstated_parts(re.compile(rb"PVF1\n[^\n]*\n"), "PVF")),
    _kind(rb"\xf0\x7e.\x01", "SDS", _stated_parts(_sds, "SDS", to_end=False)),
    _kind(rb"\x01\x04.{40}", "MPC2K", _stated_parts(_mpc2k, "MPC2K")),
    _kind(rb".{4}\0\0[\0-\x27].\0\x02\0\0", "HTK", _stated_parts(_htk, "HTK")),
]
"""Formats that libsndfile reads: a pattern of their first bytes, their name, and the function that walks over them."""

WEAK = {"SDS", "MPC2K", "HTK"}
"""Formats whose first bytes may be samples."""

HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html)", re.I)

FOREIGN = [
    (re.compile(pattern, re.S), name)
    for pattern, name in (
        (ID3.pattern, "MP3"),
        (rb"....(ftyp|moov|mdat|wide|free|skip)", "MP4"),
        (rb"\x1aE\xdf\xa3", "Matroska or WebM"),
        (rb"#!AMR", "AMR"),
        (rb"RIFF....AVI ", "AVI"),
        (rb"(RIFF|RIFX|FORM)....[ -~]{4}", "RIFF or IFF"),
        (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "ASF or WMA"),
        (rb"ADIF", "AAC"),
        (rb"wvpk", "WavPack"),
        (rb"MAC ", "Monkey's Audio"),
        (rb"TTA[12]", "TTA"),
        (rb"DSD |FRM8", "DSD"),
        (rb"\.SoX|XoS\.", "SoX"),
        (rb"ajkg", "Shorten"),
        (rb"MPCK|MP\+[\x07\x17\x27]", "Musepack"),
        (rb"tBaK", "TAK"),
        (rb"OFR ", "OptimFROG"),
        (rb"\.ra\xfd|\.RMF", "RealAudio"),
        (rb"\x7f\xfe\x80\x01", "DTS"),
        (rb"MThd", "MIDI"),
        (rb"FLV\x01", "FLV"),
        (rb"\0\0\x01\xba[\x20-\x7f]", "MPEG-PS"),
        (rb"APETAGEX", "APE tag"),
        (rb"\x1f\x8b\x08[\0-\x1f]", "gzip"),
        (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "zip"),
        (rb"BZh[1-9]1AY&SY", "bzip2"),
        (rb"\xfd7zXZ\0", "xz"),
        (rb"\x28\xb5\x2f\xfd", "Zstandard"),
        (rb"7z\xbc\xaf\x27\x1c", "7z"),
        (rb"Rar!\x1a\x07", "RAR"),
        (rb"\x93NUMPY", "NumPy"),
        (rb"%PDF-", "PDF"),
        (rb"\x89PNG\r\n", "PNG"),
        (rb"\xff\xd8\xff[\xdb\xe0\xe1\xee]", "JPEG"),
        (rb"\x7fELF", "ELF"),
        (rb"\xff\xfe([ -~\t\r\n]\0){8}|\xfe\xff(\0[ -~\t\r\n]){8}", "UTF-16 text"),
    )
]
"""Other formats that users may send as raw samples by mistake."""

READABLE = {name for _, name, _ in KINDS} | {"MP3"}
"""Names of the formats that can be read from files."""
