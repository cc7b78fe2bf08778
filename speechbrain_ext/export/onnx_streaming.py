"""A trained model as one module that takes a stream chunk by chunk, with its state as inputs and outputs.

An encoder keeps its streaming state in tensors and counters inside dataclasses, lists and dictionaries. Export streams some
chunks to find the inputs: all tensors that exist then, and all integers that have changed. An encoder needs no code for export.
But its output must be the same if its state begins

* with zeros in place of None, in the final size of the state, or with no entries along an axis that always grows;
* with counters that are tensors.
"""

import copy
import json
import math
from dataclasses import dataclass, field, fields, is_dataclass

import torch
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASRStreamingContext
from torch import nn

from speechbrain_ext.export.onnx_whole import Features, without_features
from speechbrain_ext.lobes.features import moments_of, prior_of, standardized
from speechbrain_ext.lobes.filter_banks import front_end
from speechbrain_ext.lobes.fusible import fuse_
from speechbrain_ext.registry import encoder_passes
from speechbrain_ext.utils.errors import UserError

LARGEST_LEFT = 15_000
"""Most frames of a limited left context, ten minutes."""


class StreamingFeatures(Features):
    """The features of a stream chunk by chunk, as :class:`speechbrain_ext.lobes.features.FeatureStream` computes them.

    Arguments
    ---------
    compute_features : KaldiFbank or speechbrain.lobes.features.Fbank
        The feature extraction.
    normalize : speechbrain.processing.features.InputNormalization
        The normaliser, with its statistics.

    Raises
    ------
    ValueError
        If a setting is not supported here, or the features do not stream.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.processing.features import InputNormalization
    >>> features = StreamingFeatures(Fbank(n_mels=80), InputNormalization(norm_type="sentence").eval())
    >>> x, peak, moments = features(torch.rand(2, 3 * 160 + 400), torch.zeros(2), torch.zeros(3, 2, 80, dtype=torch.float64))
    >>> x.shape
    torch.Size([2, 4, 80])
    """

    def __init__(self, compute_features, normalize):
        super().__init__(compute_features, normalize)
        front = front_end(compute_features)
        front.check_streamable()
        self.mels = front.n_mels
        self.silence = self.multiplier * math.log10(self.amin) - self.reference
        prior = torch.zeros(3, 1, self.mels, dtype=torch.float64)
        self.register_buffer("prior", prior + prior_of(normalize, prior) if self.per_sentence else None)

    def states(self):
        """The state that one chunk passes to the next, in the order of :meth:`forward`'s ``state``."""
        states = [State("features.peak", ["batch"])] if self.top_db < math.inf else []
        if self.per_sentence:
            states.append(State("features.moments", [3, "batch", self.mels], torch.float64))
        return states

    def forward(self, waveform, *state):
        """Compute the features of one chunk.

        Arguments
        ---------
        waveform : torch.Tensor
            (B, N) samples in the windows of the chunk's frames.
        *state : torch.Tensor
            If features are clipped, the peak (B,), which is the loudest bin so far in dB above silence. With sentence statistics,
            the moments (3, B, F) float64: number, sum and sum of squares of the frames so far.

        Returns
        -------
        tuple
            Features (B, T, F), and the new state.
        """
        return self.following(self.log_mel_of_windows(waveform), *state)

    def following(self, features, *state):
        """Compute the features of one chunk from log mel bins (B, T, F)."""
        state, following = list(state), []
        if self.top_db < math.inf:
            peak = state.pop(0).maximum(features.amax((1, 2)) - self.silence)
            features = features.maximum((peak + (self.silence - self.top_db))[:, None, None])
            following.append(peak)
        if not self.per_sentence:
            return (features - self.mean) / self.std, *following
        moments = state.pop(0) + moments_of(features, torch.ones_like(features[..., :1], dtype=torch.bool), 1)
        moments_of_all = (moments + self.prior).unsqueeze(2)
        return standardized(features, moments_of_all, self.std_norm, self.least_std.double()), *following, moments


@dataclass
class State:
    """One tensor of a stream's state.

    Arguments
    ---------
    name : str
        Name of the input.
    shape : list
        Shape for the first chunk, with "batch" for the batch size.
    dtype : torch.dtype
        Type of its zeros.
    growth : dict
        Growth per chunk of each growing axis, by the index of the axis.
    step : int
        Growth per chunk of a counter.
    """

    name: str
    shape: list
    dtype: torch.dtype = torch.float32
    growth: dict = field(default_factory=dict)
    step: int = 0

    def example(self, batch, chunks):
        """Zeros in the shape after a number of chunks."""
        sizes = (batch if size == "batch" else size + chunks * self.growth.get(axis, 0) for axis, size in enumerate(self.shape))
        return torch.zeros(tuple(sizes), dtype=self.dtype)

    def dynamic(self, batch):
        """Dynamic dimensions for the exporter; axes with the same growth have the same length."""
        owner = self.name.partition(".")[0]
        free = {axis: torch.export.Dim(f"{owner}_{growth}") for axis, growth in self.growth.items()}
        return free | {axis: batch for axis, size in enumerate(self.shape) if size == "batch"}

    def described(self):
        """The description for the metadata."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"input": self.name, "output": f"next.{self.name}", "shape": self.shape, "type": dtype}


class Streaming(nn.Module):
    """One chunk of a stream: ``waveform`` (B, N) and the state to ``log_probs`` (B, T, V) and the next state.

    The samples are those in the windows of the chunk's feature frames. For chunk i, they are the ``samples`` samples from
    ``i * step``, in the stream padded as its features need it, with zeros or mirrored samples. N is smaller only in the last
    chunk.

    Arguments
    ---------
    encoder : speechbrain_ext.speech_encoder.SpeechEncoder
        The encoder. It is copied, and normalisation is fused into the weights of the copy.
    head : torch.nn.Module
        The CTC head, or a transducer's projection of frames.
    config : DynChunkTrainConfig
        Chunk size in encoder frames and left context in chunks (None = all).
    pass_name : str, optional
        The pass of a cascade to export.
    output : str
        "log_probs" for a CTC head, or "encoder_out" (B, T, J) for the unchanged output of the head.

    Raises
    ------
    ValueError
        If the model does not stream, or its state cannot be found as the module describes.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.processing.features import InputNormalization
    >>> from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
    >>> from speechbrain_ext.asr import SpeechEncoder, TransformerASR
    >>> from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling
    >>> net = TransformerASR(30, 640, 32, 4, 2, 0, 64, encoder_module="hyperconformer")
    >>> normalize = InputNormalization(norm_type="sentence")
    >>> encoder = SpeechEncoder(Fbank(n_mels=80), normalize, ConvolutionSubsampling(), net).eval()
    >>> graph = Streaming(encoder, nn.Linear(32, 30), DynChunkTrainConfig(4, 2))
    >>> log_probs, *state = graph(*graph.example_inputs())
    >>> log_probs.shape, len(state) == len(graph.states)
    (torch.Size([2, 4, 30]), True)
    """

    mode = "streaming"

    def __init__(self, encoder, head, config, pass_name=None, output="log_probs"):
        super().__init__()
        size, left = config.chunk_size, config.left_context_size or 0
        if size > 0 and size * left > LARGEST_LEFT:  # every chunk of it is computed, to find the size of the state
            most = LARGEST_LEFT // size
            raise UserError(
                f"The left context is {left} chunks of {size} frames; for an export give at most {most}, or -1 for all."
            )
        self.config, self.pass_name = config, pass_name
        self.features = StreamingFeatures(encoder.compute_features, encoder.normalize)
        self.encoder = without_features(encoder, head)
        fuse_(self)
        self.eval()
        frames, hop = self.encoder.subsampling.factor * config.chunk_size, self.features.hop_length
        self.step, self.samples = frames * hop, self.features.framing.needs(frames)
        own = self.features.states()
        own.append(State("subsampling.left", ["batch", 0, self.features.mels], growth={1: self.encoder.subsampling.factor}))
        self._own = len(own)
        self._template, self._parts, encoder_states = self._find_states()
        self.states = own + encoder_states
        self.input_names = ("waveform", *(state.name for state in self.states))
        self.normalises = output == "log_probs"
        self.output_names = (output, *(state.described()["output"] for state in self.states))

    def forward(self, waveform, states):
        """See the class; the states are in the order of ``states``."""
        return self.encode(self.features.log_mel_of_windows(waveform), states)

    def encode(self, features, states, begins=None):
        """Encode a chunk of log mel bins.

        Arguments
        ---------
        features : torch.Tensor
            (B, T, F), of one chunk.
        states : list of torch.Tensor
            In the order of ``states``.
        begins : torch.Tensor, optional
            (B,) bool, True for streams that begin with this chunk; needed if their state already has its full size.

        Returns
        -------
        tuple
            Log-probabilities (B, T', V), and the new states.
        """
        own, others = states[: self._own], states[self._own :]
        x, *carried = self.features.following(features, *own[:-1])
        y, left = self.encoder.subsampling.stream(x, own[-1])
        if begins is not None:  # nothing precedes their first frame, which is not the same as silence
            alone, _ = self.encoder.subsampling(x[:, : self.encoder.subsampling.factor])
            y = torch.cat((torch.where(begins.view(-1, 1, 1), alone, y[:, :1]), y[:, 1:]), 1)
        given = {part: state for parts, state in zip(self._parts, others, strict=True) for part in parts}
        context = _rebuilt(self._template, given)
        x = self.encoder.transformer.encode_streaming(y, TransformerASRStreamingContext(self.config, context))
        left_behind = dict(_leaves(context))
        following = [left_behind[parts[0]] for parts in self._parts]
        x = self.encoder.head(x)
        return x.log_softmax(dim=-1) if self.normalises else x, *carried, left, *following

    def example_inputs(self):
        """Inputs to trace with: two streams after some chunks, because the exporter takes an axis of size one as constant."""
        waveform = torch.randn(2, self.samples, generator=torch.Generator().manual_seed(0))
        return waveform, [state.example(2, 1 if state.name == "subsampling.left" else 3) for state in self.states]

    @property
    def metadata(self):
        """Settings of chunks and states for the caller, all text."""
        left = self.config.left_context_size
        return {
            "chunk_size": str(self.config.chunk_size),
            "left_context": str(-1 if left is None else left),
            "chunk_samples": str(self.samples),
            "chunk_step": str(self.step),
            "window": str(self.features.framing.length),
            "before": str(self.features.framing.before),
            "ends": "mirrored" if self.features.framing.mirrors else "zeros",
            "state": json.dumps([state.described() for state in self.states]),
        }

    @property
    def dynamic_shapes(self):
        """Dynamic axes of the inputs."""
        batch = torch.export.Dim("batch")
        samples = torch.export.Dim("samples", min=self.features.framing.length, max=self.samples)
        return {0: batch, 1: samples}, [state.dynamic(batch) for state in self.states]

    @torch.no_grad()
    def _find_states(self):
        """Stream some chunks, and find the tensors and counters of the state.

        Returns
        -------
        tuple
            A context with all its tensors; for each state, the names of its parts in the context, several if counters of layers
            are equal; and the states.
        """
        name = type(self.encoder.transformer.encoder).__name__
        if not getattr(self.encoder.transformer.encoder, "streamable", True):
            raise UserError(f"{name} does not stream; export it without --streaming.")
        _, first, before, last = self._stream_noise(2)
        context, _, _, wider = self._stream_noise(3)
        constants, counters, parts, states = {}, {}, [], []
        for part, value in last.items():
            start = first.get(part)
            if isinstance(value, torch.Tensor):
                if isinstance(start, torch.Tensor) and start.any():
                    raise UserError(f"{name} starts a stream with a {part} other than zeros; start with zeros to export it.")
                if not value.numel():  # for example a left context of no frames
                    constants[part] = start
                    continue
                parts.append([part])
                states.append(_state(f"encoder.{part}", before[part], value, wider[part]))
            elif isinstance(value, int) and value != start and not isinstance(value, bool) and not start:
                course = before[part], value
                if course in counters:
                    counters[course].append(part)
                    continue
                counters[course] = [part]
                parts.append(counters[course])
                states.append(State(f"encoder.{part}", [], torch.int64, step=value - before[part]))
            elif value != start:
                raise UserError(f"{name} keeps its {part} between chunks as {value!r}; keep it in a tensor to export it.")
        return _rebuilt(context, constants), parts, states

    def _stream_noise(self, batch):
        """A context after some chunks, and its contents before the first chunk, before the last chunk, and now."""
        name = type(self.encoder.transformer.encoder).__name__
        keys = encoder_passes(self.encoder.transformer.encoder, self.pass_name)
        context = self.encoder.transformer.make_streaming_context(self.config, keys)
        first = before = last = dict(_leaves(context.encoder_context, name))
        for _ in range(3 + (self.config.left_context_size or 0)):  # enough chunks for the final size of all but the growing axes
            features = torch.randn(batch, self.encoder.subsampling.factor * self.config.chunk_size, self.features.mels)
            self.encoder.transformer.encode_streaming(self.encoder.subsampling.stream(features)[0], context)
            before, last = last, dict(_leaves(context.encoder_context, name))
        return context.encoder_context, first, before, last


def _state(name, before, tensor, wider):
    """The State of a tensor, found by comparison with the tensor one chunk earlier and with that of a larger batch."""
    growth, shape = {}, []
    for axis, (old, size, other) in enumerate(zip(before.shape, tensor.shape, wider.shape, strict=True)):
        if size != old:
            growth[axis] = size - old
        shape.append("batch" if size != other else 0 if axis in growth else size)
    return State(name, shape, tensor.dtype, growth)


def _leaves(value, encoder="", name=""):
    """(name, value) of all tensors and plain values in a context."""
    if is_dataclass(value):
        items = [(entry.name, getattr(value, entry.name)) for entry in fields(value)]
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif value is None or isinstance(value, (torch.Tensor, torch.SymInt, int, float, str)):
        yield name, value
        return
    else:
        kind = type(value).__name__
        raise UserError(f"{encoder} keeps its streaming state in a {kind}, which export cannot read; make it a dataclass.")
    for key, item in items:
        yield from _leaves(item, encoder, f"{name}.{key}" if name else str(key))


def _rebuilt(value, given, name=""):
    """A copy of a context in which the values of ``given``, by name, replace the original ones."""

    def part(key, item):
        return _rebuilt(item, given, f"{name}.{key}" if name else str(key))

    if name in given:
        return given[name]
    if is_dataclass(value):
        new = copy.copy(value)
        for entry in fields(value):
            setattr(new, entry.name, part(entry.name, getattr(value, entry.name)))
        return new
    if isinstance(value, dict):
        return {key: part(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(part(i, item) for i, item in enumerate(value))
    return value
