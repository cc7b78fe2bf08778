"""Reading audio: any file that soundfile opens, as 16 kHz mono, or one sentence that says what is wrong with it.

libsndfile reads many broken files without a word: a truncated WAV at half its length, an Ogg stream with a hole as if
nothing had been there. Training on such a file pairs speech with words that were never said, so whatever reads audio
here (preparation, the recipe's pipeline, the command line) checks that the file is whole:

* WAV states the size of its samples, which is compared with what follows;
* every Ogg page (Opus, Vorbis) carries a checksum and a number, and the last one is marked;
* FLAC and MP3 are decoded and must give the number of samples that they state. (An MP3 without a Xing header states
  none; there a missing end cannot be seen.)
"""

import math
import os
import stat
import struct
import zlib

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from speechbrain.dataio.audio_io import AudioInfo

SAMPLE_RATE = 16000
LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Sample rates that audio has; others are those of a damaged header, and cost gigabytes to resample."""
LOUDEST = 1e12
"""Full scale is 1, or 2 ** 31 in files of integers that nobody scaled; from 1e17 on, power spectra overflow float32."""

# A program that writes WAV to a pipe cannot know the size and states the largest it can: 0x7FFF0000 (SoX, rounded down
# to a whole sample) up to 0xFFFFFFFF (ffmpeg).
UNKNOWN_WAV_SIZE = 0x7FFF0000

# Ogg's CRC runs over the bits of a byte in the other order than zlib's.
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class AudioError(ValueError):
    """A file that cannot be used as audio; the message names it and says what is wrong in one sentence.

    Arguments
    ---------
    message : str
        The sentence.
    reason : str
        The kind of trouble in a word or two, to count by: ``missing``, ``unreadable``, ``empty``, ``truncated or
        damaged``, ``NaN samples``, ``huge samples``, ``sample rate``.
    """

    def __init__(self, message, reason="unreadable"):
        super().__init__(message)
        self.reason = reason


def load_audio(path):
    """Read an audio file as the models hear it: 16 kHz, one channel.

    Several channels are averaged, other sample rates are resampled.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.

    Returns
    -------
    wav : torch.Tensor
        The samples (T,), float32.

    Raises
    ------
    AudioError
        If the file is missing, a folder or pipe, empty, not audio, truncated or damaged, holds NaN, infinite or absurdly large
        samples, or states a sample rate that no audio has.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/stereo.flac", np.zeros((44100, 2)), 44100)
    ...     load_audio(f"{folder}/stereo.flac").shape
    torch.Size([16000])
    """
    with _open(path) as file:
        wav = _decode(file).mean(axis=1)
        if file.samplerate != SAMPLE_RATE:
            wav = resample_poly(wav, *_ratio(file.samplerate))
    return torch.from_numpy(wav)


def read_blocks(path, seconds=10.0, start=0):
    """Read an audio file of any length block by block: together what :func:`load_audio` gives.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.
    seconds : float
        Audio per block.
    start : int
        Number of samples at 16 kHz to leave out in front.

    Returns
    -------
    iterator of torch.Tensor
        Blocks of samples (T,), float32.

    Raises
    ------
    AudioError
        Where :func:`load_audio` would raise it; for what is wrong inside of the file, only there.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/stereo.flac", np.zeros((44100, 2)), 44100)
    ...     [len(block) for block in read_blocks(f"{folder}/stereo.flac", 0.5)]
    [7840, 8000, 160]
    """
    with _open(path) as file:
        resampler = Resampler(file.samplerate)
        first, surplus = resampler.position(start)
        if first:
            file.seek(min(first, file.frames))
        for samples in _blocks(file, max(1, round(seconds * file.samplerate))):
            block = resampler.accept(samples.mean(axis=1))
            yield torch.from_numpy(block[surplus:])
            surplus = max(0, surplus - len(block))
        yield torch.from_numpy(resampler.finish()[surplus:])


def count_samples(path):
    """Number of samples at 16 kHz in an audio file, as its header states it.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.

    Returns
    -------
    int

    Raises
    ------
    AudioError
        If the file cannot be opened as audio.
    """
    with _open(path) as file:
        up, down = _ratio(file.samplerate)
        return -(-file.frames * up // down)


def sample_flaw(samples):
    """What no model can hear.

    Arguments
    ---------
    samples : numpy.ndarray or torch.Tensor
        Floating-point samples of any shape.

    Returns
    -------
    str
        What is wrong with them, else an empty string.

    Example
    -------
    >>> sample_flaw(torch.tensor([0.5, -torch.inf]))
    'NaN or infinite samples'
    >>> sample_flaw(np.float32([1e30])), sample_flaw(np.zeros(0))
    ('samples as large as 1e+30, where full scale is 1', '')
    """
    peak = float(abs(samples).max()) if 0 not in samples.shape else 0.0
    if not math.isfinite(peak):
        return "NaN or infinite samples"
    return f"samples as large as {peak:.3g}, where full scale is 1" if peak > LOUDEST else ""


def _ratio(rate):
    common = math.gcd(rate, SAMPLE_RATE)
    return SAMPLE_RATE // common, rate // common


class Resampler:
    """Resampling of a stream to 16 kHz: together what resampling the whole gives.

    Not torchaudio's, whose kernel takes gigabytes for rates such as 11,127 Hz.

    Arguments
    ---------
    rate : int
        Sample rate of the stream.

    Example
    -------
    >>> resampler = Resampler(48000)
    >>> [len(resampler.accept(np.zeros(4800, np.float32))) for _ in range(3)], len(resampler.finish())
    ([1589, 1600, 1600], 11)
    """

    def __init__(self, rate):
        self.up, self.down = _ratio(rate)
        # What scipy's filter sees on either side, as a multiple of what gives a whole number of samples
        self._context = self.down * math.ceil((10 * max(self.up, self.down) / self.up + 1) / self.down)
        self._samples = np.zeros(self._context, np.float32)

    def position(self, start):
        """Where to begin reading so that output sample ``start`` is exact, and how many outputs lie before it."""
        first = max(0, start // self.up * self.down - self._context)
        return first, start - first // self.down * self.up

    def accept(self, samples):
        """Take in samples (n,) float32; gives those that are complete now."""
        if self.up == self.down:
            return samples
        self._samples = np.concatenate((self._samples, samples))
        ready = (len(self._samples) - 2 * self._context) // self.down * self.down
        return self._resample(ready) if ready > 0 else samples[:0]

    def finish(self):
        """The samples that were still to come."""
        if self.up == self.down:
            return self._samples[:0]
        return self._resample(len(self._samples) - self._context)

    def _resample(self, ready):
        x = self._samples[: ready + 2 * self._context]
        y = resample_poly(x, self.up, self.down)
        self._samples = self._samples[ready:]
        begin = self._context // self.down * self.up
        return y[begin : begin + -(-ready * self.up // self.down)]


def check_audio(path):
    """Check that an audio file is whole.

    An Ogg file is checked by its checksums, which takes a fiftieth of the time that decoding it takes; the others are
    decoded.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.

    Returns
    -------
    info : speechbrain.dataio.audio_io.AudioInfo
        Sample rate, number of frames and channels.

    Raises
    ------
    AudioError
        Where :func:`load_audio` would raise it.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/a.wav", np.zeros(8000), 16000)
    ...     check_audio(f"{folder}/a.wav").duration
    0.5
    """
    with _open(path) as file:
        frames = file.frames if file.format == "OGG" else len(_decode(file))
        if not frames:
            raise _empty(path)
        return AudioInfo(file.samplerate, frames, file.channels, file.subtype, file.format)


def _empty(path):
    return AudioError(f"The audio file {path} is empty: it holds no samples.", "empty")


def _open(path):
    """Open a file whose container is whole."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raise AudioError(f"{path} is a folder, not an audio file; name a file in it.")
    try:
        status = os.stat(path)
        is_file = stat.S_ISREG(status.st_mode)
        flaw = _container_flaw(path) if is_file else ""  # opening a pipe would wait for whoever writes to it
    except FileNotFoundError:
        raise AudioError(f"There is no audio file {path}; check the path.", "missing") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise AudioError(f"The audio file {path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    if not is_file:
        raise AudioError(f"{path} is a pipe or device, which cannot be read twice; write the audio to a file first.")
    if not status.st_size:
        raise _empty(path)
    if flaw:
        raise AudioError(f"The audio file {path} is truncated or damaged: {flaw}.", "truncated or damaged")
    try:
        # soundfile encodes names strictly, and would not find one that is no UTF-8
        file = soundfile.SoundFile(os.fsencode(path) if os.name == "posix" else path)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:  # TypeError: raw samples without a header
        raise AudioError(f"{path} is not audio that soundfile can read; convert it to WAV or FLAC.") from error
    try:
        if file.frames == np.iinfo(np.int64).max:
            raise AudioError(f"The header of {path} does not state its length, as one written to a pipe; encode it again.")
        if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
            raise AudioError(
                f"The header of {path} states {file.samplerate} samples per second, where audio has {LOWEST_RATE} to "
                f"{HIGHEST_RATE}; write it again.",
                "sample rate",
            )
    except AudioError:
        file.close()
        raise
    return file


def _decode(file):
    """All samples of an open file (T, channels), float32."""
    return np.concatenate(list(_blocks(file, 2**20)))  # not at once: a damaged header may state any number of samples


def _blocks(file, frames):
    """The samples of an open file from where it stands (n, channels), float32, so many frames at a time."""
    position = count = file.tell()
    name = os.fsdecode(file.name)
    while True:
        try:
            samples = file.read(frames, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, ValueError) as error:
            raise AudioError(
                f"The audio file {name} is truncated or damaged: it cannot be decoded to its end.",
                "truncated or damaged",
            ) from error
        if not len(samples):
            break
        if flaw := sample_flaw(samples):
            reason = "NaN samples" if "NaN" in flaw else "huge samples"
            raise AudioError(f"The audio file {name} holds {flaw}; write it again.", reason)
        count += len(samples)
        yield samples
    if count < file.frames and (file.format != "MP3" or _has_xing_header(name)):
        raise AudioError(
            f"The audio file {name} is truncated or damaged: its header states {file.frames} samples "
            f"and only {count} can be decoded.",
            "truncated or damaged",
        )
    if not count - position and not position:
        raise _empty(name)


def _container_flaw(path):
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


def _has_xing_header(path):
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
