"""Whether the container of an audio file is whole, by what it says of itself."""

import os
import struct
import zlib

# A program that writes WAV to a pipe cannot know the size and states the largest it can: 0x7FFF0000 (SoX, rounded down
# to a whole sample) up to 0xFFFFFFFF (ffmpeg).
UNKNOWN_WAV_SIZE = 0x7FFF0000

# Ogg's CRC runs over the bits of a byte in the other order than zlib's.
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def container_flaw(path):
    """What is wrong with the container of a WAV or Ogg file, else an empty string."""
    with open(path, "rb") as file:
        magic = file.read(12)
        if magic[:4] in (b"RIFF", b"RIFX") and magic[8:] == b"WAVE":
            return _wav_flaw(file, "<4sI" if magic[:4] == b"RIFF" else ">4sI")
        if magic[:4] == b"OggS":
            return _ogg_flaw(magic + file.read())
    return ""


def _wav_flaw(file, layout):
    """Compare the size of the samples that a WAV file states with what follows; ``file`` stands at the first chunk."""
    while len(head := file.read(8)) == 8:
        name, stated = struct.unpack(layout, head)
        if name == b"data":
            present = os.fstat(file.fileno()).st_size - file.tell()
            if present < stated < UNKNOWN_WAV_SIZE:
                return f"its header states {stated} bytes of samples and only {present} follow"
            return ""
        file.seek(stated + stated % 2, os.SEEK_CUR)  # chunks are padded to an even size
    return "it ends before its samples begin"


def _ogg_flaw(data):
    """Walk over the pages of an Ogg file (RFC 3533, section 6)."""
    position, due, unfinished = 0, {}, set()
    while data[position : position + 4] == b"OggS":
        head = position + 27
        if head > len(data) or (body := head + data[head - 1]) > len(data):
            break
        end = body + sum(data[head:body])
        if end > len(data):
            break
        flags, serial, number, checksum = struct.unpack_from("<5xB8xII4s", data, position)
        page = data[position : position + 22] + bytes(4) + data[position + 26 : end]
        # zlib inverts the register before and after, Ogg does not
        if zlib.crc32(page.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF != int.from_bytes(
            checksum.translate(REVERSED_BITS), "big"
        ):
            return f"the checksum of the Ogg page at byte {position} is wrong"
        if number != due.get(serial, number):
            return f"Ogg pages are missing before byte {position}"
        due[serial] = number + 1
        unfinished.add(serial)
        if flags & 4:  # the last page of its stream
            unfinished.discard(serial)
        position = end
    return f"its Ogg stream breaks off at byte {position} of {len(data)}" if unfinished or not due else ""


def has_xing_header(path):
    """Whether the first frame of an MP3 file states its length; without it, libsndfile estimates one from the size."""
    with open(path, "rb") as file:
        start = file.read(10)
        if start[:3] == b"ID3":
            high, middle, low, lowest = start[6:]  # seven bits each
            file.seek(high << 21 | middle << 14 | low << 7 | lowest, os.SEEK_CUR)
        else:
            file.seek(0)
        frame = file.read(64)  # the mark stands within the first 40 bytes
    return b"Xing" in frame or b"Info" in frame
