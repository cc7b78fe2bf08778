"""Read audio of any format that soundfile opens, and refuse damaged files with one sentence.

libsndfile reads many broken files without an error: a truncated WAV at half its length, or an Ogg stream with missing pages.
Training on such a file pairs speech with the wrong words. Preparation, the recipe's pipeline and the command line
therefore check that each file is whole:

* The header is compared with the content of the file, for every container that libsndfile reads.
  :mod:`speechbrain_ext.dataio.containers` lists the faults that this does not show.
* The file is decoded from its first sample to its last, and must give the number of samples that the header states. Ogg
  pages have checksums, so an Ogg file is decoded only when it is read.
* Joined Ogg, MP3 and FLAC files are read part after part.

Of a file that was checked before, only the segment is decoded, if libsndfile can seek exactly in its codec.

The path ``shard.tar?offset=512&size=81234`` names a range of bytes in a file, such as a member of an uncompressed tar
file. It is read like a file.
"""

import io
import logging
import math
import os
import re
import stat
from functools import lru_cache

import numpy as np
import soundfile
import torch
from speechbrain.dataio.audio_io import AudioInfo

from speechbrain_ext.dataio.containers import ContainerError, Part, find_parts
from speechbrain_ext.dataio.resampling import SAMPLE_RATE, Resampler, ratio, resample
from speechbrain_ext.utils.errors import UserError

logger = logging.getLogger(__name__)

LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Range of valid sample rates. Other rates come from damaged headers; resampling them can take gigabytes."""
CANCELLED = 1e-3
"""Power of the mean of all channels, as a share of that of the loudest one, below which they cancel each other out."""
LOUDEST = 1e12
"""Largest valid sample. Full scale is 1, or 2 ** 31 for integers that were not scaled. Power spectra overflow float32 from
1e17 on."""

BLOCK = 2**20
"""Samples of all channels to decode at a time; limited because a damaged header may state any number."""
LOCATION = re.compile(r"(.+)\?offset=(\d+)&size=(\d+)", re.DOTALL)
"""A part of a file: path, first byte, number of bytes."""
WIDTHS = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1}
"""Bytes per sample of uncompressed codecs."""
SEEKABLE = {*WIDTHS, "IMA_ADPCM", "MS_ADPCM", "ALAC_16", "ALAC_20", "ALAC_24", "ALAC_32", "VORBIS"}
"""Codecs in which libsndfile seeks exactly: it decodes the same samples as from the start."""
WHOLE = {"PAF", "SDS"}
"""Formats whose last block libsndfile can only decode as a whole."""
VORBIS_PAGE = 2**20
"""Largest number of samples on a page, 255 packets of 4096. libsndfile cannot seek on the last page, which may end early."""
LEADS = {"MPEG_LAYER_I": 0.5, "MPEG_LAYER_II": 0.5, "MPEG_LAYER_III": 0.5, "OPUS": 0.5}
"""Seconds to decode before a segment, by codec, because frames depend on earlier ones. The result differs from decoding the
whole file by 1e-7 for MPEG, and by noise of up to 5e-3 for Opus; a longer lead does not reduce that noise."""
LONG = 64
"""Factor on the stated length of an MP3 without a Xing header; it makes libsndfile read all of the file."""


class AudioError(UserError):
    """A file that cannot be used as audio. The message names the file and the problem in one sentence.

    Arguments
    ---------
    message : str
        The sentence.
    reason : str
        The kind of problem, for counts: ``missing``, ``unreadable``, ``empty``, ``truncated or
        damaged``, ``unfinished``, ``joined``, ``length unknown``, ``NaN samples``, ``huge samples``, ``sample rate``.
    """

    def __init__(self, message, reason="unreadable"):
        super().__init__(message)
        self.reason = reason


def load_audio(path, sample_rate=SAMPLE_RATE, start=0, stop=None, channel=None):
    """Read an audio file, or a segment of it, as one channel at one sample rate.

    Several channels are averaged, other sample rates are resampled. A segment gives the same result as a file that holds only
    these samples, except for the noise of Opus. If the codec allows it, only the segment is decoded; use :func:`check_audio` to
    check the rest.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.
    sample_rate : int
        Samples per second of the result.
    start, stop : int
        The first sample, and the one after the last, counted at the file's rate. A ``stop`` of None means the end.
    channel : int, optional
        Take only this channel, counted from 0.

    Returns
    -------
    wav : torch.Tensor
        The samples (T,), float32.

    Raises
    ------
    AudioError
        If the file is missing, a folder or pipe, empty, not audio, truncated or damaged; if it holds NaN, infinite or huge
        samples or an invalid sample rate; or if it ends before the segment.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/stereo.flac", np.zeros((44100, 2)), 44100)
    ...     load_audio(f"{folder}/stereo.flac").shape, load_audio(f"{folder}/stereo.flac", start=22050, channel=1).shape
    (torch.Size([16000]), torch.Size([8000]))
    """
    if start or stop is not None:
        recording = _checked_recording(path, stop)
        stop = recording.frames if stop is None else stop
    else:
        recording = _Recording(path)
    wav = np.concatenate(list(recording.blocks(first=start, stop=stop, channel=channel)))
    return torch.from_numpy(resample(wav, recording.samplerate, sample_rate))


def read_blocks(path, seconds=10.0, start=0, sample_rate=SAMPLE_RATE):
    """Read an audio file of any length in blocks. Together they equal the result of :func:`load_audio`.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.
    seconds : float
        Audio per block.
    start : int
        Number of samples of the result to leave out at the beginning.
    sample_rate : int
        Samples per second of the result.

    Returns
    -------
    iterator of torch.Tensor
        Blocks of samples (T,), float32.

    Raises
    ------
    AudioError
        In the same cases as :func:`load_audio`. A fault in the samples raises it when the reading arrives there.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/stereo.flac", np.zeros((44100, 2)), 44100)
    ...     [len(block) for block in read_blocks(f"{folder}/stereo.flac", 0.5)]
    [7840, 8000, 160]
    """
    recording = _Recording(path)
    resampler = Resampler(recording.samplerate, sample_rate)
    first, surplus = resampler.position(start)
    for samples in recording.blocks(max(1, round(seconds * recording.samplerate)), first):
        block = resampler.accept(samples)
        yield torch.from_numpy(block[surplus:])
        surplus = max(0, surplus - len(block))
    yield torch.from_numpy(resampler.finish()[surplus:])


def count_samples(path, sample_rate=SAMPLE_RATE):
    """Number of samples in an audio file, from its headers or by counting its frames.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.
    sample_rate : int
        Samples per second of the result.

    Returns
    -------
    int

    Raises
    ------
    AudioError
        If the file cannot be opened as audio, or is truncated in a way that shows without decoding.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/a.wav", np.zeros(8000), 8000)
    ...     count_samples(f"{folder}/a.wav")
    16000
    """
    recording = _Recording(path)
    up, down = ratio(recording.samplerate, sample_rate)
    return -(-recording.frames * up // down)


def sample_flaw(samples, loudest=LOUDEST):
    """What makes samples unusable for any model: NaN, infinite or huge values.

    Arguments
    ---------
    samples : numpy.ndarray or torch.Tensor
        Floating-point samples of any shape.
    loudest : float
        The largest allowed value.

    Returns
    -------
    str
        The problem; empty if there is none.

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
    return f"samples as large as {peak:.3g}, where full scale is 1" if peak > loudest else ""


def check_audio(path):
    """Check that an audio file is whole.

    An Ogg file is checked by its checksums, 50 times faster than by decoding. Other files are decoded.

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
        In the same cases as :func:`load_audio`.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     soundfile.write(f"{folder}/a.wav", np.zeros(8000), 16000)
    ...     check_audio(f"{folder}/a.wav").duration
    0.5
    """
    recording = _Recording(path)
    decodes = recording.format != "OGG"
    frames = sum(map(len, recording.blocks())) if decodes else recording.frames
    if not frames:
        raise _empty(path)
    return AudioInfo(recording.samplerate, frames, recording.channels, recording.subtype, recording.format)


def split_location(path):
    """Split a path into the file and, if it names only a part, the range of bytes.

    Arguments
    ---------
    path : str

    Returns
    -------
    file : str
    offset, size : int or None
        The first byte and the number of bytes of the part; None for the whole file.

    Example
    -------
    >>> split_location("a/shard.tar?offset=512&size=81234"), split_location("a/b.wav")
    (('a/shard.tar', 512, 81234), ('a/b.wav', None, None))
    """
    match = LOCATION.fullmatch(path) if isinstance(path, str) else None
    return (match[1], int(match[2]), int(match[3])) if match and not os.path.exists(path) else (path, None, None)


def _empty(path):
    return AudioError(f"The audio file {path} is empty: it holds no samples.", "empty")


@lru_cache(4096)
def _tell_cancelled(path):
    """Warn once of each file, and not in processes that load data for training: its preparation has read the file."""
    if torch.utils.data.get_worker_info() is None:
        logger.warning("The channels of %s cancel each other out; write one of them to a file of its own.", path)


def _damaged(path, flaw):
    return AudioError(f"The audio file {path} is truncated or damaged: {flaw}.", "truncated or damaged")


class _SoundFile(soundfile.SoundFile):
    """A sound file that soundfile does not seek in by itself.

    soundfile seeks after every read in a seekable file, and that fails for GSM 6.10 and G.721.
    """

    source = None
    """The _Slice that the file is read from; None if libsndfile opened the file itself."""

    def seekable(self):
        return False

    def close(self):
        super().close()
        if self.source:
            self.source.close()


class _Slice(io.RawIOBase):
    """A part of a file as a file object for soundfile; ``length`` is the length that it reports."""

    def __init__(self, path, begin, end, length):
        self._file, self._begin, self._end, self._length = open(path, "rb"), begin, end, length
        self._position = 0
        self.error = None

    def close(self):
        self._file.close()
        super().close()

    def seek(self, offset, whence=os.SEEK_SET):
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def tell(self):
        return self._position

    def readable(self):
        return True

    def seekable(self):
        return True

    def readinto(self, buffer):
        position = self._begin + self._position
        wanted = min(len(buffer), max(0, self._end - position))
        data = b""
        try:
            self._file.seek(position)
            data = self._file.read(wanted) if wanted else b""
        except OSError as error:  # libsndfile cannot pass it on
            self.error = error
        if self._end - self._begin < self._length and self._position >= self._length - 128:
            data = bytes(min(len(buffer), max(0, self._length - self._position)))  # libsndfile looks for a tag there
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _checked_recording(path, stop):
    """A recording from a file that was checked before. It is not walked over again if libsndfile can seek in it."""
    try:
        recording = _Recording(path, walk=False)
        if stop is not None and stop <= recording.frames and not recording.subtype.startswith("MPEG"):
            return recording
    except AudioError:  # such as a file of joined parts
        pass
    try:
        status = os.stat(split_location(path)[0])
    except (OSError, ValueError):
        return _Recording(path)  # raises the full message
    return _walked_recording(os.fspath(path), status.st_size, status.st_mtime_ns)


@lru_cache(4096)
def _walked_recording(path, size, modified):
    return _Recording(path)


class _Recording:
    """An open audio file with a checked container.

    Arguments
    ---------
    path : str or os.PathLike
    walk : bool
        If False, do not walk over the container, and trust the length that libsndfile finds.

    Raises
    ------
    AudioError
        If the file cannot be opened, or its container is not whole.
    """

    def __init__(self, path, walk=True):
        self.path = os.fspath(path)
        self._file, self._begin, self._size = split_location(self.path)
        self._parts = self._find_parts(walk)
        self.frames, self._lengths = 0, []
        self.samplerate = None
        for part in self._parts:
            with self._open(part) as file:
                self._check_header(part, file)
                if self.samplerate not in (None, file.samplerate):
                    raise AudioError(
                        f"The audio file {self.path} has joined parts with {self.samplerate} and {file.samplerate} samples "
                        "per second; write each part to a separate file.",
                        "joined",
                    )
                if self.samplerate is None:
                    self.samplerate, self.channels = file.samplerate, file.channels
                    self.subtype, self.format = file.subtype, file.format
                self.channels = min(self.channels, file.channels)
                self._lengths.append(file.frames if part.samples is None else part.samples)
        self.frames = sum(self._lengths)

    def blocks(self, frames=None, first=0, stop=None, channel=None):
        """Decode the samples from ``first`` up to ``stop`` in blocks: one channel, or the mean of all channels.

        Yields
        ------
        numpy.ndarray
            Samples (n,), float32.
        """
        if channel is not None and not 0 <= channel < self.channels:
            raise AudioError(f"{self.path} has {self.channels} channels and no channel {channel}; the first one is 0.")
        if stop is not None and not first < stop <= self.frames:
            raise AudioError(f"{self.path} has {self.frames} samples, and none from {first} up to {stop}; check the segment.")
        count, skipped, left = 0, first, math.inf if stop is None else stop
        powers = np.zeros(2)  # of the mean of all channels, and of the loudest one
        for part, length in zip(self._parts, self._lengths, strict=True):
            if skipped and skipped >= length:
                skipped -= length
                left -= length
                continue
            for samples in self._decode(part, length, frames, skipped, left):
                count += len(samples)
                chosen = samples.mean(axis=1) if channel is None else samples[:, channel]
                if channel is None and samples.shape[1] > 1:
                    powers += np.square(chosen).sum(), np.square(samples).sum(axis=0).max()
                yield chosen
            skipped = 0
            left -= length
            if left <= 0:
                break
        if not count and not first:
            raise _empty(self.path)
        if powers[0] < CANCELLED * powers[1]:
            _tell_cancelled(str(self.path))

    def _find_parts(self, walk):
        path = self.path
        if os.path.isdir(path):
            raise AudioError(f"{path} is a folder, not an audio file; name a file in it.")
        try:
            status = os.stat(self._file)
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would block until something writes to it
                raise AudioError(
                    f"{path} is a pipe or device, which cannot be read twice; write the audio to a file first.",
                )
            if self._size is None:
                self._begin, self._size = 0, status.st_size
            elif self._begin + self._size > status.st_size:
                raise _damaged(path, f"the file has only {status.st_size} bytes")
            if not self._size:
                raise _empty(path)
            if not walk:
                return [Part(0, self._size)]
            if self._file == path:
                return find_parts(path)
            source = self._slice(Part(0, self._size))
            parts = find_parts(path, io.BufferedReader(source))
            if source.error:
                raise source.error
            return parts
        except AudioError:
            raise
        except FileNotFoundError:
            raise AudioError(f"There is no audio file {self._file}; check the path.", "missing") from None
        except ContainerError as error:
            raise AudioError(f"The audio file {path} {error}.", error.reason) from error
        except Exception as error:  # such as ValueError for a name with a zero byte
            raise AudioError(f"The audio file {path} cannot be read: {_words(error)}.") from error

    def _slice(self, part):
        length = (part.end - part.begin) * (1 if part.samples is None else LONG)
        return _Slice(self._file, self._begin + part.begin, self._begin + part.end, length)

    def _open(self, part):
        source = None
        try:
            if part.samples is None and not part.begin and self._file == self.path and part.end == os.path.getsize(self.path):
                # soundfile encodes names strictly, and does not find a name that is not valid UTF-8
                return _SoundFile(os.fsencode(self.path) if os.name == "posix" else self.path)
            source = self._slice(part)
            file = _SoundFile(source)
            file.source = source
            return file
        except Exception as error:
            if source:
                source.close()
            if isinstance(error, (soundfile.SoundFileError, TypeError)):  # TypeError: raw samples without a header
                raise AudioError(
                    f"{self.path} is not audio that soundfile can read, or its header is damaged; convert it to WAV or FLAC."
                ) from error
            raise AudioError(f"The audio file {self.path} cannot be opened: {_words(error)}.") from error

    def _check_header(self, part, file):
        if file.format == "RAW" and file.subtype != "GSM610":
            raise AudioError(f"{self.path} has no header, and its format cannot be known from its name; convert it to WAV.")
        if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
            raise AudioError(
                f"The header of {self.path} states {file.samplerate} samples per second, outside of {LOWEST_RATE} to "
                f"{HIGHEST_RATE}; write it again.",
                "sample rate",
            )
        if part.samples is None and file.frames == np.iinfo(np.int64).max:
            raise AudioError(
                f"The header of {self.path} does not state its length, as when it was written to a pipe; encode it again.",
                "length unknown",
            )
        unit = part.end - part.begin if file.format == "SD2" else part.unit
        width = WIDTHS.get(file.subtype, 1) * file.channels
        if file.format == "PAF" and file.subtype == "PCM_24":
            width = 32 * file.channels  # blocks of ten samples
        if unit is not None and unit % width:
            raise _damaged(self.path, f"its {unit} bytes of samples are not a whole number of {width} bytes each")

    def _decode(self, part, length, frames, skipped, stop):
        with self._open(part) as file:
            limit = max(1, BLOCK // file.channels)
            wanted = limit if frames is None else min(frames, 16 * limit)
            whole = file.format in WHOLE
            count = 0
            if skipped and file.subtype in SEEKABLE and not whole:
                latest = length - VORBIS_PAGE if file.subtype == "VORBIS" else skipped
                count = self._call(file, file.seek, max(0, min(skipped, latest)))
            elif skipped and file.subtype in LEADS and stop < math.inf:
                count = self._call(file, file.seek, max(0, skipped - round(LEADS[file.subtype] * file.samplerate)))
            while count < stop:
                ahead = skipped - count if count < skipped and not whole else wanted
                due = (length if whole else min(length, stop)) - count
                samples = self._call(file, file.read, max(1, min(ahead, wanted, due)), "float32", True)
                if not len(samples):
                    break
                begin, count = count, count + len(samples)
                samples = samples[max(0, skipped - begin) : min(stop, count) - begin]
                if not len(samples):
                    continue
                if flaw := sample_flaw(samples, LOUDEST / 16):  # resampling raises some peaks
                    reason = "NaN samples" if "NaN" in flaw else "huge samples"
                    raise AudioError(f"The audio file {self.path} holds {flaw}; write it again.", reason)
                yield samples
            if count < min(length, stop):
                states = "its header states" if part.samples is None else "its frames should hold"
                raise _damaged(self.path, f"{states} {length} samples and only {count} can be decoded")

    def _call(self, file, function, *arguments):
        """Call a function of soundfile, and turn its errors into an AudioError."""
        try:
            result = function(*arguments)
            if file.source and file.source.error:
                raise file.source.error
            return result
        except (soundfile.SoundFileError, ValueError) as error:
            raise _damaged(self.path, f"it cannot be decoded to its end ({_words(error)})") from error
        except Exception as error:
            raise AudioError(f"The audio file {self.path} cannot be decoded: {_words(error)}.") from error


def _words(error):
    """The message of an error without the file name and the full stop."""
    words = getattr(error, "strerror", None) or getattr(error, "error_string", None) or str(error) or type(error).__name__
    return words.removeprefix("Error : ").rstrip(".\n").replace("\n", " ")
