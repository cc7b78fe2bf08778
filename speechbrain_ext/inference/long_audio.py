"""Audio of any length in constant memory: segment by segment, to files that an interrupted run can continue.

Files are cut into windows of 30 s that overlap by 8 s. Only the inner frames of each window are kept, those with at least 4 s
of audio on both sides. Joined, they are close to the frames of the whole file at once. On request, files are read as streams.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from speechbrain_ext.dataio.audio import read_blocks
from speechbrain_ext.decoders.alignment import FRAME_SECONDS, Segment, Word
from speechbrain_ext.inference.segments import Segmenter
from speechbrain_ext.inference.streaming import StreamingRecognizer, chunk_config, frame_samples
from speechbrain_ext.inference.subtitles import subtitles
from speechbrain_ext.registry import passes_of
from speechbrain_ext.utils.errors import UserError, is_number
from speechbrain_ext.utils.files import file_digest, locked, write_text

CORE = 550
"""Frames of a window that are kept, 22 s."""
MARGIN = 100
"""Frames on either side of those, 4 s."""
BATCH = 4
"""Windows per batch."""
LONGEST_NAME = 255
"""Bytes of the name of a file, on the file systems of Linux and macOS."""


def window_frames(model, blocks, start=0):
    """Log-probabilities of audio of any length from overlapping windows.

    Arguments
    ---------
    model : CtcModel or JointModel
        The model.
    blocks : iterable of torch.Tensor
        Samples (N,). The first one belongs to frame ``window_start(start)``, see :func:`window_start`.
    start : int
        Frames to leave out at the start.

    Returns
    -------
    iterator of tuple
        Log-probabilities (T, V) of consecutive frames, and the frames (T, D) if the model's search needs them, else None.
    """
    samples, core = frame_samples(model), start // CORE
    wav, begin, batch = torch.zeros(0), samples * window_start(start), []

    def run():
        wavs = [window for window, *_ in batch]
        lengths = torch.tensor([len(window) for window in wavs])
        for (_, first, last), log_probs, frames in zip(
            batch, *model.frames(pad_sequence(wavs, batch_first=True), lengths / lengths.max()), strict=True
        ):
            last = len(log_probs) if last is None else last
            yield log_probs[first:last], None if frames is None else frames[first:last]
        batch.clear()

    for block in blocks:
        wav = torch.cat((wav, block))
        while len(wav) > samples * ((core + 1) * CORE + MARGIN) - begin:
            first = max(start, core * CORE)
            end = samples * ((core + 1) * CORE + MARGIN) - begin
            batch.append((wav[:end], first - begin // samples, (core + 1) * CORE - begin // samples))
            core += 1
            wav, begin = wav[samples * max(0, core * CORE - MARGIN) - begin :], samples * max(0, core * CORE - MARGIN)
            if len(batch) == BATCH:
                yield from run()
    batch.append((wav, max(start, core * CORE) - begin // samples, None))
    yield from run()


def window_start(frame):
    """The first frame of the window from which a frame is taken."""
    return max(0, frame // CORE * CORE - MARGIN)


@torch.inference_mode()
def transcribe_long(model, path, streaming=False, start=0.0, progress=None):
    """Segments of an audio file of any length, one by one.

    Arguments
    ---------
    model : CtcModel or JointModel
        The model.
    path : str or os.PathLike
        An audio file.
    streaming : bool
        Whether to read the file as a stream, which makes more errors, also with models that were trained to stream.
    start : float
        Seconds to leave out at the start: ``resume`` of the last known segment.
    progress : callable, optional
        Called with the seconds of audio after ``start`` that have been read since the last call.

    Returns
    -------
    iterator of Segment

    Raises
    ------
    AudioError
        If the file cannot be read. The error comes when reading reaches the bad part.
    """
    frame = round(start / FRAME_SECONDS)

    def read(first):
        end = FRAME_SECONDS * first  # a window begins before its first segment
        for block in read_blocks(path, start=first * frame_samples(model), sample_rate=model.sample_rate):
            seconds = len(block) / model.sample_rate
            end += seconds
            if progress is not None:
                progress(min(seconds, max(0.0, end - start)))
            yield block

    if streaming:
        recognizer = StreamingRecognizer(model, start=start)
        for block in read(frame):
            yield from recognizer.accept(block)
        yield from recognizer.finish()
        return
    segmenter = Segmenter(model.tokenizer, model.blank, search=model.search_segment, start=frame)
    for log_probs, frames in window_frames(model, read(window_start(frame)), frame):
        yield from segmenter.accept(log_probs, frames)
    yield from segmenter.finish()


class SegmentFile:
    """Segments of one audio file as JSON lines, with subtitles at the end.

    ``NAME.jsonl.partial`` holds the segments of an unfinished file. A later run with the same audio, model and settings continues
    there, and its result is the same as that of one run. A finished file is not changed; ``.NAME.jsonl.from`` states its audio,
    model and settings. With other ones, both are refused. Subtitles can be written again from the segments with other options.

    Arguments
    ---------
    folder : str or os.PathLike
        Where to write ``NAME.jsonl``, ``NAME.srt`` and ``NAME.vtt``; created if it is missing.
    path : str or os.PathLike
        The audio file.
    settings : dict
        The settings that the segments depend on, from :func:`settings_of`.
    subtitle_options : SubtitleOptions, optional
        How subtitles are divided into cues.

    Raises
    ------
    OSError
        If the folder cannot be written to.
    UserError
        If there is a transcript of other audio, another model or other settings, if it is damaged, if the folder holds subtitles
        from elsewhere, or if the name of the audio file is too long.
    """

    def __init__(self, folder, path, settings, subtitle_options=None):
        self._subtitle_options = subtitle_options
        self._final = Path(folder) / f"{Path(path).stem}.jsonl"
        self._partial = self._final.with_name(self._final.name + ".partial")
        self._final.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(self._final.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(self._final.parent))
        self._made_of = self._final.with_name(f".{self._final.name}.from")
        if len(os.fsencode(self._made_of.name)) + len("..4194304.tmp") > LONGEST_NAME:  # while it is written
            raise UserError(f"The name of {path} is too long for the files beside its transcript; rename it.")
        file = os.stat(path)
        self._audio = {"audio": os.path.abspath(path), "bytes": file.st_size, "time": file.st_mtime_ns}
        self._settings = json.loads(json.dumps(settings, default=lambda number: number.item()))  # they may be numbers of numpy
        self.segments = []
        """All segments so far."""
        self.finished = self._final.exists()
        if self.finished:
            self._refuse_other()
            self._partial.unlink(missing_ok=True)  # a run was stopped after it wrote the final file
            lines = self._final.read_bytes().rstrip(b"\n").split(b"\n")
            lines = lines if lines[0] else []
            self.segments = _parse(lines)
            if len(self.segments) < len(lines):
                raise UserError(
                    f"Line {len(self.segments) + 1} of {self._final} is not a segment; delete the file and transcribe again."
                )
        elif not self._made_of.exists() and not self._partial.exists():
            for path in filter(Path.exists, self._subtitles):
                raise UserError(f"{path} exists, but this command did not write it; move it away, or give another folder.")
        elif self._partial.exists():
            self._known(self._partial.read_bytes())

    def _refuse_other(self):
        if other := self._other(self._made_of.read_bytes() if self._made_of.exists() else b""):
            raise UserError(f"{self._final} is of {other}; move it away, or give another folder.")

    @functools.cached_property
    def _sha256(self):
        """The digest of the audio; None for a pipe, and for a file that may not be read, whose own error comes later."""
        path = self._audio["audio"]
        return file_digest(path) if os.path.isfile(path) and os.access(path, os.R_OK) else None

    @property
    def _header(self):
        return json.dumps(self._audio | {"sha256": self._sha256} | self._settings)

    def _other(self, header):
        """What a file with this header is made of, if it is other audio, another model or other settings; else empty."""
        try:
            before = json.loads(header)
            audio, digest = ({key: before.pop(key) for key in self._audio}, before.pop("sha256"))
            is_another = audio["audio"] != self._audio["audio"] and os.path.exists(audio["audio"])  # it was not moved
        except (ValueError, KeyError, TypeError, AttributeError):  # not written by this version
            return "other audio"
        if audio != self._audio and (is_another or digest != self._sha256):
            return "other audio"
        for key in self._settings | before:
            old, new = before.get(key), self._settings.get(key)
            if old != new:
                return "another model" if key == "model" else f"other settings ({key} {old}, now {new})"
        return ""

    def _known(self, content):
        """The segments of an unfinished file, and the number of bytes up to their end, without a line that a stop has cut."""
        header, *lines = content.split(b"\n")[:-1] or [b""]
        segments = _parse(lines)
        other = self._other(header)
        if not other:
            return segments, sum(len(line) + 1 for line in (header, *lines[: len(segments)]))
        if segments:
            raise UserError(f"{self._partial} is of {other}; move it away, or give another folder.")
        return [], 0

    @property
    def _subtitles(self):
        return [self._final.with_suffix(f".{style}") for style in ("srt", "vtt")]

    @contextlib.contextmanager
    def opened(self):
        """A context in which segments can be added after those of an earlier run.

        Raises
        ------
        UserError
            If another process is writing the same file, or has begun it with other settings.
        """
        taken = f"Another process is writing {self._partial}; wait for it, or give another folder."
        with locked(self._partial, taken):
            if not self.finished and self._final.exists():  # another process or call has finished it meanwhile
                self._refuse_other()
            with open(self._partial, "r+b") as file:
                self.segments, length = self._known(file.read())
                file.truncate(length)
            if not length:
                self._append(self._header)
            try:
                yield
            finally:
                if not self.segments or self._final.exists():
                    self._partial.unlink(missing_ok=True)

    @property
    def start(self):
        """Seconds of audio that are done."""
        return self.segments[-1].resume if self.segments else 0.0

    def add(self, segment):
        """Add a segment, inside the context of :meth:`opened`."""
        self.segments.append(segment)
        self._append(_line(segment))

    def _append(self, line):
        try:
            with open(self._partial, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # such as a full disk
            error.filename = os.fspath(self._partial)
            raise

    def write_subtitles(self, seconds=None):
        """Write the subtitles of all segments, for audio of a length in seconds.

        Subtitles of a finished file are kept, because they may have been corrected by hand, unless options are given.
        """
        for path in self._subtitles:
            if not self.finished or self._subtitle_options is not None or not path.exists():
                write_text(path, subtitles(self.segments, path.suffix[1:], self._subtitle_options, seconds))

    def finish(self, segments, seconds=None):
        """Write all segments and their subtitles, for audio of a length in seconds."""
        self.segments = list(segments)
        write_text(self._made_of, self._header)
        self.write_subtitles(seconds)
        write_text(self._final, "".join(_line(dataclasses.replace(segment, resume=None)) + "\n" for segment in self.segments))


def settings_of(model, streaming=False):
    """The settings that the segments of an audio file depend on, for :class:`SegmentFile`.

    Arguments
    ---------
    model : CtcModel or JointModel
        The model.
    streaming : bool
        As for :func:`transcribe_long`.

    Returns
    -------
    dict
    """
    if not model.fingerprint:
        raise UserError("The model has no fingerprint, but an output folder needs one; load it with load_model.")
    config = chunk_config(model)
    chunks = (config.chunk_size, config.left_context_size)
    name = model.pass_name or passes_of(model.mods.encoder.transformer.encoder)[-1]
    settings = {"model": model.fingerprint, "pass": name, "streaming": streaming, "chunks": chunks}
    searched_again = {"ended": model.search_ended is not None} if streaming else {}  # when a segment ends
    return settings | searched_again | model.search_settings


def _line(segment):
    record = dataclasses.asdict(segment)
    if segment.resume is None:
        del record["resume"]
    return json.dumps(record, ensure_ascii=False)


def _parse(lines):
    """The segments in lines, up to the first line that is not one."""
    segments = []
    for line in lines:
        try:
            record = json.loads(line)
            segment = Segment(**{**record, "words": tuple(Word(**word) for word in record["words"])})
        except (ValueError, TypeError, KeyError):  # not JSON, not an object, or other keys
            break
        if not all(map(_is_whole, (segment, *segment.words))):
            break
        segments.append(segment)
    return segments


def _is_whole(part):
    """Whether a segment or word has a text, and finite numbers."""
    numbers = (part.start, part.end, part.confidence, getattr(part, "resume", None) or 0.0)
    return isinstance(part.text, str) and all(is_number(number) for number in numbers)
