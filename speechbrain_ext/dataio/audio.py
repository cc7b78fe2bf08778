"""Reading audio: any file that soundfile opens, as one channel, or one sentence that says what is wrong with it.

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

import numpy as np
import soundfile
import torch
from speechbrain.dataio.audio_io import AudioInfo

from speechbrain_ext.dataio.containers import container_flaw, has_xing_header
from speechbrain_ext.dataio.resampling import SAMPLE_RATE, Resampler, ratio, resample
from speechbrain_ext.utils.errors import UserError

LOWEST_RATE, HIGHEST_RATE = 1000, 768_000
"""Sample rates that audio has; others are those of a damaged header, and cost gigabytes to resample."""
LOUDEST = 1e12
"""Full scale is 1, or 2 ** 31 in files of integers that nobody scaled; from 1e17 on, power spectra overflow float32."""


class AudioError(UserError):
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


def load_audio(path, sample_rate=SAMPLE_RATE):
    """Read an audio file as models take it: one channel, at one rate.

    Several channels are averaged, other sample rates are resampled.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.
    sample_rate : int
        Samples per second of the result.

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
        wav = resample(wav, file.samplerate, sample_rate)
    return torch.from_numpy(wav)


def read_blocks(path, seconds=10.0, start=0, sample_rate=SAMPLE_RATE):
    """Read an audio file of any length block by block: together what :func:`load_audio` gives.

    Arguments
    ---------
    path : str or os.PathLike
        A file in any format that soundfile reads.
    seconds : float
        Audio per block.
    start : int
        Number of samples of the result to leave out in front.
    sample_rate : int
        Samples per second of the result.

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
        resampler = Resampler(file.samplerate, sample_rate)
        first, surplus = resampler.position(start)
        if first:
            file.seek(min(first, file.frames))
        for samples in _blocks(file, max(1, round(seconds * file.samplerate))):
            block = resampler.accept(samples.mean(axis=1))
            yield torch.from_numpy(block[surplus:])
            surplus = max(0, surplus - len(block))
        yield torch.from_numpy(resampler.finish()[surplus:])


def count_samples(path, sample_rate=SAMPLE_RATE):
    """Number of samples in an audio file, as its header states it.

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
        If the file cannot be opened as audio.
    """
    with _open(path) as file:
        up, down = ratio(file.samplerate, sample_rate)
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
        flaw = container_flaw(path) if is_file else ""  # opening a pipe would wait for whoever writes to it
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
    if count < file.frames and (file.format != "MP3" or has_xing_header(name)):
        raise AudioError(
            f"The audio file {name} is truncated or damaged: its header states {file.frames} samples "
            f"and only {count} can be decoded.",
            "truncated or damaged",
        )
    if not count - position and not position:
        raise _empty(name)
