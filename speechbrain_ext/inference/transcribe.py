"""Transcription of audio files, for Python and for the command line."""

import dataclasses
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from speechbrain_ext.dataio.audio import count_samples, load_audio, split_location
from speechbrain_ext.decoders.alignment import within
from speechbrain_ext.inference.long_audio import SegmentFile, settings_of, transcribe_long
from speechbrain_ext.inference.segments import split_at_pauses
from speechbrain_ext.utils.errors import UserError, one_line

WINDOW = 256  # files that are sorted by length together: enough for full batches, few enough for early results
BATCH_SECONDS = 120  # of audio, padding included
LONG_SECONDS = 60  # longer files are processed in pieces


@dataclasses.dataclass(frozen=True)
class Transcript:
    """Segments of a file, or its error."""

    file: str
    segments: list
    error: UserError | None = None
    """Why there are no segments."""
    is_from_before: bool = False
    """Whether an earlier call wrote it to the output folder."""

    @property
    def text(self):
        """The text of all segments, on one line."""
        return " ".join(word for segment in self.segments for word in segment.text.split())  # edited texts may have lines


def transcribe_files(model, files, output=None, streaming=False, progress=False, subtitle_options=None):
    """Transcribe audio files of any length.

    Files of up to a minute are processed whole, in batches of about the same length, or one by one if memory is too small for a
    batch. Longer files are processed in pieces, see :func:`speechbrain_ext.inference.long_audio.transcribe_long`.

    Arguments
    ---------
    model : CtcModel or JointModel
        From :func:`speechbrain_ext.inference.load_model`.
    files : list of str or os.PathLike
        Audio files.
    output : str or os.PathLike, optional
        A folder for ``NAME.jsonl``, ``NAME.srt`` and ``NAME.vtt`` of each file. Files that an earlier call finished there are not
        transcribed again; unfinished files are continued.
    streaming : bool
        Whether to process all files as streams, with the delay and the errors of a stream.
    progress : bool
        Whether to show bars on standard error.
    subtitle_options : SubtitleOptions, optional
        How subtitles are divided into cues, from :mod:`speechbrain_ext.inference.subtitles`; by default two lines of 42
        characters and 7 s. If given, subtitles of finished files are written again, from ``NAME.jsonl``.

    Returns
    -------
    iterator of Transcript
        In the order of the files. A file that cannot be transcribed has an ``error``, and the others are still transcribed.

    Raises
    ------
    UserError
        If two files would have the same name in the output folder, if a name is too long, if one names a part of a file,
        if the output folder holds a transcript of other audio or settings, or if subtitle options are given without an output
        folder.
    OSError
        If the output folder cannot be created. A transcript that cannot be written, for example on a full disk, has an ``error``.
    """
    if isinstance(files, str | bytes | os.PathLike):
        raise UserError(f"files is {one_line(repr(files), 60)}; give a list of files.")
    files = [os.fsdecode(file) for file in files]
    if output is None and subtitle_options is not None:
        raise UserError("subtitle_options need an output folder; give output, or leave out subtitle_options.")
    outputs = _outputs(model, files, output, streaming, subtitle_options) if output is not None else {}
    return _transcripts(_Run(model, streaming, outputs, progress), files)


def _transcripts(run, files):
    with tqdm(total=len(files), unit=" files", disable=not run.progress or len(files) < 2) as run.bar:
        for start in range(0, len(files), WINDOW):
            yield from run.transcripts(files[start : start + WINDOW])


@contextmanager
def beside_bars(file):
    """A context for printing while progress bars are shown; no printed line then begins after a bar."""
    with tqdm.external_write_mode(file=file):
        yield


def _outputs(model, files, output, streaming, subtitle_options):
    """A SegmentFile for each file."""
    if not os.fspath(output):
        raise UserError("The output folder has no name; give one.")
    names = {}
    for file in dict.fromkeys(files):
        name = Path(file).stem
        if name in names:
            raise UserError(
                f"{names[name]} and {file} would both be written to {output}/{name}.jsonl; give each another output folder."
            )
        if split_location(file)[1] is not None:
            raise UserError(f"{file} is not a whole file; copy it to a file, or give no output folder.")
        names[name] = file
    settings = settings_of(model, streaming)
    return {file: SegmentFile(output, file, settings, subtitle_options) for file in names.values() if os.path.isfile(file)}


class _Run:
    """Transcribes the files of one call, window by window."""

    def __init__(self, model, streaming, outputs, progress):
        self.model, self.streaming, self.outputs, self.progress = model, streaming, outputs, progress
        self.bar = None

    def transcripts(self, files):
        """Transcripts in the order of the files. Short files are collected, up to the next long one."""
        found, wavs, waiting = {}, {}, []
        for file in files:
            waiting.append(file)
            if file in found or file in wavs:
                self.bar.update()
                continue
            with self._keeping_errors(file, found):
                seconds = count_samples(file, self.model.sample_rate) / self.model.sample_rate
                if file in self.outputs and self.outputs[file].finished:
                    self.outputs[file].write_subtitles(seconds)
                    found[file] = self._done(file, self.outputs[file].segments, is_from_before=True)
                elif seconds <= LONG_SECONDS and not self.streaming:
                    wavs[file] = load_audio(file, self.model.sample_rate)  # batches go to the device, not the whole window
            if file in found or file in wavs:
                continue
            found |= self._short(wavs)
            yield from map(found.__getitem__, waiting[:-1])
            wavs, waiting = {}, [file]
            with self._keeping_errors(file, found):
                found[file] = self._long(file, seconds)
        found |= self._short(wavs)
        yield from map(found.__getitem__, waiting)

    @contextmanager
    def _keeping_errors(self, file, found):
        """A context in which an error of the audio, of the output folder or of the memory becomes the file's transcript."""
        try:
            yield
        except (UserError, OSError) as error:
            found[file] = self._failed(file, error)
        except (RuntimeError, MemoryError) as error:
            found[file] = self._failed(file, _of_memory(error))

    def _short(self, wavs):
        """Transcripts of short files, from their samples, by file."""
        return {file: transcript for batch in self._batches(wavs) for file, transcript in self._batch(batch, wavs).items()}

    def _batches(self, wavs):
        """Batches of about the same length, the longest first, because an error for lack of memory then occurs at once."""
        limit, batches = BATCH_SECONDS * self.model.sample_rate, []
        for file in sorted(wavs, key=lambda file: len(wavs[file])):
            if not batches or (len(batches[-1]) + 1) * len(wavs[file]) > limit:
                batches.append([])
            batches[-1].append(file)
        return reversed(batches)

    def _batch(self, files, wavs):
        try:
            segments = self._segments([wavs[file] for file in files])
        except (RuntimeError, MemoryError) as error:
            _of_memory(error)
            if len(files) == 1:
                return {files[0]: self._failed(files[0], error)}
            segments = None
        if segments is None:  # out of memory: try the files one by one; here the error no longer holds the batch's memory
            return {file: transcript for one in files for file, transcript in self._batch([one], wavs).items()}
        return {
            file: self._keep(file, [] if segment is None else split_at_pauses(segment), len(wavs[file]) / self.model.sample_rate)
            for file, segment in zip(files, segments, strict=True)
        }

    def _segments(self, wavs):
        lengths = torch.tensor([len(wav) for wav in wavs])
        return self.model.transcribe_segments(pad_sequence(wavs, batch_first=True), lengths / lengths.max())

    def _long(self, file, seconds):
        kept = self.outputs.get(file)
        if kept is None:
            return self._done(file, list(self._pieces(file, seconds, 0.0)))
        with kept.opened():
            for segment in self._pieces(file, seconds, kept.start):
                kept.add(segment)
            kept.finish(kept.segments, seconds)
        return self._done(file, kept.segments)

    def _pieces(self, file, seconds, start):
        name = Path(file).name.encode("unicode_escape").decode()
        with tqdm(total=math.ceil(seconds), initial=int(start), unit=" s", desc=name, disable=not self.progress) as bar:
            for segment in transcribe_long(self.model, file, self.streaming, start, bar.update):
                yield within(segment, seconds)

    def _keep(self, file, segments, seconds):
        segments = [within(segment, seconds) for segment in segments]
        if file in self.outputs:
            try:
                with self.outputs[file].opened():
                    self.outputs[file].finish(segments, seconds)
            except (UserError, OSError) as error:
                return self._failed(file, error)
        return self._done(file, segments)

    def _done(self, file, segments, **keys):
        self.bar.update()
        return Transcript(file, list(segments), **keys)

    def _failed(self, file, error):
        self.bar.update()
        if isinstance(error, OSError) and error.filename is not None:
            error = UserError(f"{error.filename} cannot be written: {error.strerror}; fix this and run again to continue.")
        elif not isinstance(error, UserError):
            error = UserError(f"{file} cannot be transcribed: {one_line(error)}")
        return Transcript(file, [], error)


def _of_memory(error):
    """The error, if it is a lack of memory; any other is a bug, and is raised again with its traceback."""
    if isinstance(error, MemoryError) or re.search(r"(?<!illegal )memory|ALLOC_FAILED", str(error)):
        return error
    raise error
