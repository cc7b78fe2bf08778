"""Speech recognition of a stream, with bounded latency and memory."""

import logging
import math
import sys
import time
from collections import deque

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.dataio.audio import AudioError, sample_flaw
from speechbrain_ext.dataio.samples import as_samples
from speechbrain_ext.decoders.alignment import FRAME_SECONDS, collapse, within
from speechbrain_ext.inference.segments import Segmenter
from speechbrain_ext.registry import passes_of
from speechbrain_ext.utils.errors import UserError, is_number, is_whole

logger = logging.getLogger(__name__)

CHUNK_SIZE = 16
"""Encoder frames per chunk (640 ms) of models without a chunk size."""
LEFT_CONTEXT = 16
"""Left context of these models in chunks, 10 s."""
LARGEST_CHUNK = 1500
"""Most frames per chunk, a minute."""
PIECE = 0.01
"""Seconds of audio to collect before any computation."""
UNSCALED = 100
"""Larger samples are integers that were not scaled. The statistics of a whole file remove the level; those of a stream cannot."""


class StreamingRecognizer:
    """Takes waveforms in pieces of any size, and gives words with low latency.

    Words come from greedy CTC search, which never changes them later, or from a transducer's search. A segment ends at a pause,
    or at its greatest length. The encoder state is then reset, so neither state nor statistics grow with the stream. Within a
    segment, the frames are those that ``forward`` gives for the whole waveform under the same chunk setting. In a cascade, the
    first pass streams, and the second pass, if chosen, rewrites each segment when it has ended.

    Arguments
    ---------
    model : CtcModel, JointModel or TransducerModel
        From :func:`speechbrain_ext.inference.load_model`. A model with an attention decoder streams with its CTC head alone. If a
        search, phrases or a language model was chosen, greedy CTC search shows the words, and the chosen search rewrites each
        segment when it has ended.
    chunk_size : int, optional
        Encoder frames (40 ms) per chunk; by default the model's, or 16.
    left_context : int, optional
        Left context in chunks; by default the model's, or 16; -1 = all, and then the state of attention grows until the end of a
        segment.
    endpoint : float
        Seconds of silence that end a segment.
    longest : float
        Seconds after which a segment without such a pause ends before its last word.
    start : float
        Time of the first sample in seconds, a multiple of 0.04.

    Raises
    ------
    ValueError
        If a setting is not valid, or the model cannot stream.

    Example
    -------
    >>> model = load_model("results/demo/pretrained")                   # doctest: +SKIP
    >>> recognizer = StreamingRecognizer(model)                         # doctest: +SKIP
    >>> for samples in microphone:                                      # doctest: +SKIP
    ...     for segment in recognizer.accept(samples):
    ...         print(segment.start, segment.end, segment.text)
    ...     print(recognizer.text, end="\r")
    >>> recognizer.finish()                                             # doctest: +SKIP
    """

    def __init__(self, model, chunk_size=None, left_context=None, endpoint=0.8, longest=30.0, start=0.0):
        self._model, self._encoder = model, model.mods.encoder
        self._config = chunk_config(model, chunk_size, left_context)
        encoder = self._encoder.transformer.encoder
        # In a cascade the first pass streams; _cascade is set if the last pass rewrites segments
        passes = passes_of(encoder)
        self._cascade = encoder if len(passes) > 1 and model.pass_name in (None, passes[-1]) else None
        self._pass = passes[0] if len(passes) > 1 else None
        self._samples = frame_samples(model)
        self._segmenting = (model.tokenizer, model.blank, endpoint, longest)
        self.reset(start)
        self._patience = longest / FRAME_SECONDS

    @property
    def sample_rate(self):
        """Samples per second that :meth:`accept` takes."""
        return self._model.sample_rate

    @property
    def chunk_seconds(self):
        """Audio per chunk in seconds; a word waits at most this long for the end of its chunk."""
        return FRAME_SECONDS * self._config.chunk_size

    @property
    def text(self):
        """Text of the current segment so far."""
        return self._segmenter.text

    @property
    def stable_text(self):
        """The words of ``text`` that will not change: all but the last, which may get longer. With a beam, all but the last of
        the words that all hypotheses share."""
        return self._segmenter.stable_text

    @property
    def token_ends(self):
        """End times of the tokens of ``text``, in seconds."""
        return [FRAME_SECONDS * (self._segmenter.start + frame + 1) for _, frame in self._segmenter.tokens]

    def state_bytes(self):
        """Current size of the encoder state."""
        return self._context.encoder.encoder_context.state_bytes()

    @torch.inference_mode()
    def accept(self, wav):
        """Process the next samples.

        Arguments
        ---------
        wav : torch.Tensor or numpy.ndarray
            (N,) samples at the model's rate, N >= 0: floats of full scale 1, or int16 or int32.

        Returns
        -------
        list of Segment
            Segments that have ended.

        Raises
        ------
        UserError
            If the stream has ended, the samples have another shape, or a value is not finite or far too large for audio.
        """
        if self.finished:
            raise UserError("This stream has ended; call reset() to start the next one.")
        wav = as_samples(wav)
        if wav.dim() != 1:
            raise UserError(f"The samples have the shape {tuple(wav.shape)}; give one channel, (N,).")
        if flaw := sample_flaw(wav):
            raise AudioError(f"The piece holds {flaw}; none of it was processed; repair the audio, or leave it out.")
        if not self._loud and (flaw := sample_flaw(wav, UNSCALED)):
            self._loud = True
            logger.warning(
                "The stream holds %s, so its words will be wrong; give integers as int16 or int32, or divide them by their "
                "full scale.",
                flaw,
            )
        self._small.append(wav.to(self._model.device, copy=True).unsqueeze(0))  # the caller may reuse the buffer
        self._small_samples += len(wav)
        self._received += len(wav)
        return self._run(False) if self._small_samples >= PIECE * self._model.sample_rate else []

    @torch.inference_mode()
    def finish(self):
        """End the stream; a second call returns an empty list.

        Returns
        -------
        list of Segment
            The remaining segments.
        """
        if self.finished:
            return []
        segments = self._run(True) + self._segmenter.finish()
        self.finished = True
        return [within(segment, self._start + self._received / self._model.sample_rate) for segment in segments]

    def reset(self, start=0.0):
        """Begin a new stream with the same settings, and with the search that the model uses now.

        Arguments
        ---------
        start : float
            Time of its first sample in seconds.
        """
        if not is_number(start, 0, sys.float_info.max):
            raise UserError(f"start is {start!r}; give a number of seconds, 0 or more.")
        search = self._model.search_ended if self._cascade is None else self._second_pass
        keys = {"restarts": True, "start": round(start / FRAME_SECONDS), "search_stream": self._model.search_stream}
        self._segmenter = Segmenter(*self._segmenting, search, **keys)
        self._small, self._small_samples = [], 0
        self._audio = torch.zeros(1, 0, device=self._model.device)
        self._audio_start = self._segmenter.start
        self._start, self._received = FRAME_SECONDS * self._segmenter.start, 0
        self._context = self._new_context()
        self._loud = False
        self.finished = False
        """Whether the stream has ended."""

    def _run(self, last):
        wav, segments = torch.cat((self._audio[:, :0], *self._small), 1), []
        self._small, self._small_samples = [], 0
        self._audio = torch.cat((self._audio, wav), 1)
        # Chunk by chunk, because the place of a cut must not depend on the size of the pieces.
        pieces = deque(wav.split(self._samples * self._config.chunk_size, 1))
        while pieces:
            piece = pieces.popleft()
            segments += self._step(piece, last and not pieces)
            self._trim()
            if not self._spoken and self._frames >= self._patience:
                self._segmenter.skip_silence()
                self._trim()
            if self._segmenter.restart:
                self._segmenter.restart = False
                self._context = self._new_context()
                pieces = deque(self._audio.split(self._samples * self._config.chunk_size, 1))
        return segments

    def _trim(self):
        """Keep the audio from the segmenter's start; after a reset, the encoder computes it again."""
        self._audio = self._audio[:, self._samples * (self._segmenter.start - self._audio_start) :]
        self._audio_start = self._segmenter.start

    def _new_context(self):
        self._frames, self._spoken = 0, False
        keys = {} if self._pass is None else {"pass_name": self._pass}
        return self._encoder.make_streaming_context(self._config, keys)

    def _step(self, wav, last):
        logits, frames = self._encoder.encode_streaming(wav, self._context, last)
        if not frames.shape[1]:
            return []
        if self._encoder.head is None:
            logits = self._model.ctc_head(frames)
        segments, size = [], self._config.chunk_size
        # The last samples may complete a chunk and begin another; the search must still get them one by one
        for log_probs, chunk in zip(logits[0].float().log_softmax(-1).split(size), frames[0].split(size), strict=True):
            segments += self._segmenter.accept(log_probs, chunk)
            if self._segmenter.restart:
                break
        self._frames += frames.shape[1]
        self._spoken = self._spoken or bool(segments or self._segmenter.tokens)
        return segments

    def _second_pass(self, frames, log_probs):
        frames = self._cascade.second_pass(frames.unsqueeze(0))[0]
        log_probs = self._model.ctc_head(frames).float().log_softmax(-1)
        if self._model.search_stream is not None or self._model.search_ended is not None:
            return self._model.search_segment(frames, log_probs)
        return [token for token, _ in collapse(log_probs.argmax(-1).tolist(), self._model.blank)], log_probs


def frame_samples(model):
    """Samples per encoder frame of a model."""
    return round(model.sample_rate * FRAME_SECONDS)


def chunk_config(model, chunk_size=None, left_context=None):
    """The chunk setting of a model's streams.

    Arguments
    ---------
    model : CtcModel or JointModel
        The model.
    chunk_size : int, optional
        Encoder frames per chunk; by default those of the model's training, or 16.
    left_context : int, optional
        Left context in chunks, -1 = all; by default that of the model's training, or 16.

    Returns
    -------
    speechbrain.utils.dynamic_chunk_training.DynChunkTrainConfig
        The setting.

    Raises
    ------
    UserError
        If one of them is no whole number, the left context is below -1, or the chunk is longer than a minute.
    """
    for name, value in (("chunk_size", chunk_size), ("left_context", left_context)):
        if value is not None and not is_whole(value, -math.inf):
            raise UserError(f"{name} is {value!r}; give a whole number.")
    if left_context is not None and left_context < -1:
        raise UserError(f"The left context is {left_context} chunks; give 0 or more, or -1 for all.")
    encoder = model.mods.encoder
    size, left = (CHUNK_SIZE, LEFT_CONTEXT) if encoder.chunk_size is None else (encoder.chunk_size, encoder.left_context)
    if left_context is not None:
        left = None if left_context == -1 else left_context
    size = size if chunk_size is None else chunk_size
    if size > LARGEST_CHUNK:
        raise UserError(f"The chunk size is {size} frames of {FRAME_SECONDS} s; give at most {LARGEST_CHUNK}.")
    return DynChunkTrainConfig(size, left)


class Timer:
    """Runs a recogniser and measures its latency.

    A token's latency is the time from its end in the audio until it is first shown. It contains the rest of the chunk, the
    look-ahead of front end and encoder, and the computation. If samples arrive faster than they are spoken, it is computed as if
    they arrived at the speed of speech.

    Arguments
    ---------
    recognizer : StreamingRecognizer
        The recogniser.
    pace : bool
        Whether to wait, so that samples arrive at the speed of speech.

    Attributes
    ----------
    latencies : list of float
        Latencies of all tokens so far, in seconds.
    computing : float
        Seconds of computation.
    """

    def __init__(self, recognizer, pace=False):
        self._recognizer, self._pace = recognizer, pace
        self._audio = self.computing = 0.0
        self.latencies, self._shown = [], 0.0
        self._begin = time.perf_counter()

    def accept(self, wav):
        """Call the recogniser's ``accept``, and measure it."""
        self._audio += len(wav) / self._recognizer.sample_rate
        if self._pace:
            time.sleep(max(0.0, self._audio - (time.perf_counter() - self._begin)))
        return self._measure(lambda: self._recognizer.accept(wav))

    def finish(self):
        """Call the recogniser's ``finish``, and measure it."""
        return self._measure(self._recognizer.finish)

    def _measure(self, call):
        began = time.perf_counter()
        segments = call()
        seconds = time.perf_counter() - began
        self.computing += seconds
        ends = [word.end for segment in segments for word in segment.words] + self._recognizer.token_ends
        for end in ends:
            if end > self._shown + 0.02:  # not yet counted
                self.latencies.append(max(0.0, self._audio - end) + seconds)
                self._shown = end
        return segments

    def report(self):
        """Audio length, real-time factor and latency on one line."""
        if not self._audio:
            return "there was no audio."
        line = f"{self._audio:.1f} s of audio, real-time factor {self.computing / self._audio:.3f}"
        if self.latencies:
            latencies = sorted(self.latencies)
            median, late = latencies[len(latencies) // 2], latencies[int(0.95 * (len(latencies) - 1))]
            line += (
                f"; tokens are shown {median:.2f} s after they are spoken (median; 95 % within {late:.2f} s, "
                f"the first one after {self.latencies[0]:.2f} s), in chunks of {self._recognizer.chunk_seconds:.2f} s"
            )
        return line + "."
