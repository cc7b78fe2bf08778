"""Trained models as graphs for sherpa-onnx, which identifies inputs and outputs by their order.

The types of model, with inputs, outputs and the length of a frame:

==========================  =========================================  ==========================  =================
type                        inputs                                     outputs                     seconds per frame
==========================  =========================================  ==========================  =================
``zipformer_ctc``           ``x`` (N, T, F), ``x_lens`` (N,)           ``log_probs``, their        0.04
                                                                       numbers of frames
``omnilingual_asr_ctc``     ``x`` (1, samples) of mean 0, variance 1   ``log_probs``               0.02
``zipformer2_ctc``          ``x`` (N, T, F) and eight states           ``log_probs``, the states   0.04
``transducer``              as ``zipformer_ctc``                       ``encoder_out``, likewise   0.04
``zipformer2``              as ``zipformer2_ctc``                      ``encoder_out``, likewise   0.04
==========================  =========================================  ==========================  =================

The last two are encoders of transducers. The runtime takes hotwords only with transducers, so CTC is exported as one for hotwords
(:mod:`speechbrain_ext.export.ctc_transducer`).

The runtime computes the features ``x``, which are those of :class:`speechbrain_ext.lobes.features.KaldiFbank`.

Source: the classes ``OfflineZipformerCtcModel``, ``OfflineOmnilingualAsrCtcModel``, ``OnlineZipformer2CtcModel``,
``OfflineTransducerModel`` and ``OnlineZipformer2TransducerModel`` of https://github.com/k2-fsa/sherpa-onnx, versions 1.12.26 to
2.0.1.
"""

import math

import torch
from torch import nn

from speechbrain_ext.export.ctc_transducer import IMPOSSIBLE
from speechbrain_ext.export.onnx_streaming import Streaming
from speechbrain_ext.export.onnx_whole import FullContext
from speechbrain_ext.utils.errors import UserError

BALLAST = [[1, None, 1, 3], [1, None, 1], [1, None, 1], [None, 4, 1], [None, 4, 1], [None, 128, 3, 19]]
"""Shapes of the unused states of ``zipformer2_ctc``, which are passed on unchanged; None is the number of streams."""
DIMENSIONS = {
    "encoder_dims": "4",
    "value_head_dims": "1",
    "num_heads": "1",
    "num_encoder_layers": "1",
    "cnn_module_kernels": "2",
    "left_context_len": "1",
}
"""Metadata from which the runtime computes these shapes: a Zipformer of one layer. The size ``query_head_dims`` of its keys,
(1, N, ``query_head_dims``), is free."""


class Answer(nn.Module):
    """Adapts log-probabilities, or a transducer's logits, to the runtime's search.

    The search writes every token except the blank. Tokens without text, such as bos and eos, therefore pass their probability
    to the blank. The text of greedy search stays the same.

    Arguments
    ---------
    vocabulary : int
        Number of tokens V.
    blank : int
        The blank's index.
    silent : list of int
        The other tokens without text.
    repeats : int
        How many times each frame is repeated, to get correct times in the runtime.

    Example
    -------
    >>> Answer(4, blank=0, silent=[1])(torch.tensor([[[-3.0, -1.0, -2.0, -4.0]]]))
    tensor([[[   -1., -1000.,    -2.,    -4.]]])
    """

    def __init__(self, vocabulary, blank, silent, repeats=1):
        super().__init__()
        self.repeats, self._has_silent = repeats, any(token != blank for token in silent)
        place = torch.arange(vocabulary)
        self.register_buffer("is_blank", place == blank)
        self.register_buffer("is_silent", torch.isin(place, torch.tensor(silent, dtype=torch.int64)) & ~self.is_blank)

    def forward(self, log_probs):
        """Map (B, T, V) to (B, T * repeats, V)."""
        if self._has_silent:
            nothing = log_probs.masked_fill(~(self.is_silent | self.is_blank), -torch.inf).amax(-1, keepdim=True)
            log_probs = torch.where(self.is_blank, nothing, log_probs.masked_fill(self.is_silent, IMPOSSIBLE))
        return log_probs if self.repeats == 1 else log_probs.repeat_interleave(self.repeats, 1)


class Frames(nn.Identity):
    """Keeps a transducer's frames unchanged, in the place of :class:`Answer`."""

    repeats = 1


class FromFeatures(FullContext):
    """Whole utterances from the runtime's features: ``zipformer_ctc``.

    Arguments
    ---------
    encoder, head, pass_name, output
        As for :class:`speechbrain_ext.export.onnx_whole.FullContext`.
    answer : Answer, Pairs or Frames
        Applied to the output.
    """

    mode = "zipformer_ctc"
    input_names = ("x", "x_lens")
    dynamic_shapes = ({0: "batch", 1: "frames"}, {0: "batch"})

    def __init__(self, encoder, head, answer, pass_name=None, output="log_probs"):
        super().__init__(encoder, head, pass_name, output)
        self.answer = answer

    def forward(self, x, lengths):
        """Run on log mel bins (N, T, F) with any padding, and numbers of frames (N,), which may be 0."""
        x = nn.functional.pad(x, (0, 0, 0, 1))  # the encoder needs a frame, even if it is padding
        log_probs, frames = self.log_probs(self.features.normalized(x, lengths), lengths)
        return self.answer(log_probs), frames * self.answer.repeats

    def example_inputs(self):
        """Inputs to trace with."""
        features = torch.randn(2, 125, self.features.filters.shape[1], generator=torch.Generator().manual_seed(0))
        return features, torch.tensor([125, 75])


class TransducerFromFeatures(FromFeatures):
    """The encoder of a transducer for whole utterances: ``transducer``."""

    mode = "transducer"

    def __init__(self, *args):
        super().__init__(*args)
        self.output_names = ("encoder_out", "frames")


class FromWaveform(FullContext):
    """Single whole utterances from samples of mean 0 and variance 1: ``omnilingual_asr_ctc``.

    Arguments
    ---------
    encoder, head, pass_name, output
        As for :class:`speechbrain_ext.export.onnx_whole.FullContext`.
    answer : Answer
        Applied to the output.
    """

    mode = "omnilingual_asr_ctc"
    input_names = ("x",)
    dynamic_shapes = ({1: "samples"},)

    def __init__(self, encoder, head, answer, pass_name=None, output="log_probs"):
        super().__init__(encoder, head, pass_name, output)
        self.answer, self.output_names = answer, self.output_names[:1]

    def forward(self, waveform):
        """Run on samples (1, N)."""
        return self.answer(super().forward(waveform, torch.ones_like(waveform, dtype=torch.int64).sum(1))[0])

    def example_inputs(self):
        """Inputs to trace with."""
        return (torch.randn(1, 20000, generator=torch.Generator().manual_seed(0)),)


class Packed(Streaming):
    """One chunk of streams of different age, from the runtime's features: ``zipformer2_ctc``.

    The first of the runtime's state tensors holds all state except counters. The last one counts the chunks of each stream, and
    the encoder's counters are computed from it. A float64 is stored as two float32, the rounded number and the rounding error.

    Arguments
    ---------
    encoder, head, config, pass_name, output
        As for :class:`speechbrain_ext.export.onnx_streaming.Streaming`.
    answer : Answer, Pairs or Frames
        Applied to the output.

    Raises
    ------
    UserError
        If the model does not stream, or its state grows with the stream.
    """

    mode = "zipformer2_ctc"

    def __init__(self, encoder, head, config, answer, pass_name=None, output="log_probs"):
        super().__init__(encoder, head, config, pass_name, output)
        self.answer = answer
        self.frames = self.encoder.subsampling.factor * config.chunk_size
        self.ballast = BALLAST
        self._packed = [_fixed(state, self.encoder.subsampling.factor) for state in self.states if not state.step]
        names = [f"state{i}" for i in range(len(self.ballast) + 1)] + ["chunks"]
        self.input_names = ("x", *names)
        self.output_names = (output, *(f"next_{name}" for name in names))

    @property
    def size(self):
        """Number of floats of state per stream."""
        return sum(_size(state) for state in self._packed)

    def zeros(self, streams):
        """The states of new streams."""
        shapes = [[1, streams, self.size], *([streams if size is None else size for size in shape] for shape in self.ballast)]
        return [*(torch.zeros(shape) for shape in shapes), torch.zeros(streams, dtype=torch.int64)]

    def forward(self, x, states):
        """Run on log mel bins (N, T, F) of one chunk, and the states."""
        state, *ballast, chunks = states
        parts = iter(self._unpack(state[0]))
        states = [chunks * known.step if known.step else next(parts) for known in self.states]
        log_probs, *following = self.encode(x, states, chunks == 0)
        kept = [tensor for tensor, known in zip(following, self.states, strict=True) if not known.step]
        return self.answer(log_probs), self._pack(kept).unsqueeze(0), *(part.clone() for part in ballast), chunks + 1

    def _pack(self, tensors):
        """Pack state tensors into (N, size)."""
        pieces = []
        for state, tensor in zip(self._packed, tensors, strict=True):
            tensor = tensor.movedim(state.shape.index("batch"), 0).flatten(1)
            pieces.append(tensor.float())
            if tensor.dtype == torch.float64:
                pieces.append((tensor - pieces[-1]).float())
        return torch.cat(pieces, 1)

    def _unpack(self, packed):
        """Unpack (N, size) into state tensors."""
        tensors = []
        for state, piece in zip(self._packed, packed.split([_size(state) for state in self._packed], 1), strict=True):
            if state.dtype == torch.float64:
                high, low = piece.double().chunk(2, 1)
                piece = high + low
            shape = [size for size in state.shape if size != "batch"]
            tensors.append(piece.to(state.dtype).reshape(-1, *shape).movedim(0, state.shape.index("batch")))
        return tensors

    def example_inputs(self):
        """Inputs to trace with: a new stream and one after some chunks."""
        x = torch.randn(2, self.frames, self.features.mels, generator=torch.Generator().manual_seed(0))
        *states, _ = self.zeros(2)
        return x, [*states, torch.tensor([0, 3])]

    @property
    def metadata(self):
        """Metadata that the runtime needs."""
        left = self.config.left_context_size
        return DIMENSIONS | {
            "query_head_dims": str(self.size),
            "T": str(self.frames),
            "decode_chunk_len": str(self.frames),
            "chunk_size": str(self.config.chunk_size),
            "left_context": str(-1 if left is None else left),
        }

    @property
    def dynamic_shapes(self):
        """Dynamic axes of the inputs."""
        batch = torch.export.Dim("batch")
        return {0: batch}, [{1: batch}, *({shape.index(None): batch} for shape in self.ballast), {0: batch}]


class PackedTransducer(Packed):
    """The encoder of a transducer for streams: ``zipformer2``."""

    mode = "zipformer2"

    def __init__(self, *args):
        super().__init__(*args)
        *others, (streams, channels, width, _) = BALLAST
        self.ballast = [*others, [streams, channels, width, ((self.features.mels - 1) // 2 - 1) // 2]]
        self.output_names = ("encoder_out", *self.output_names[1:])

    @property
    def metadata(self):
        """Metadata that the runtime needs."""
        return super().metadata | {"model_type": self.mode}


class PackedPairs(PackedTransducer):
    """A ``zipformer2`` with :class:`Pairs` as ``answer``: its state also holds the last frame's log-probabilities."""

    @property
    def size(self):
        """Number of floats of state per stream."""
        return super().size + self.answer.vocabulary

    def forward(self, x, states):
        """Run on log mel bins (N, T, F) of one chunk, and the states."""
        state, *others = states
        vocabulary, begins = self.answer.vocabulary, others[-1] == 0
        pairs, following, *others = super().forward(x, [state[..., :-vocabulary], *others])
        before = torch.where(begins.unsqueeze(1), self.answer.certain, state[0, :, -vocabulary:]).unsqueeze(1)
        now, then = pairs.chunk(2, 2)
        then = torch.cat((before, then[:, 1:]), 1)
        return torch.cat((now, then), 2), torch.cat((following, now[:, -1].unsqueeze(0)), 2), *others


def _fixed(state, factor):
    """A tensor of the state, in its size from the second chunk on."""
    if state.name == "subsampling.left":
        state.shape[1] = factor
    elif state.growth:
        raise UserError(
            f"The model's {state.name} grows with a stream, but sherpa-onnx needs a fixed size; give a --left-context."
        )
    if "batch" not in state.shape:
        raise UserError(
            f"All streams share the model's {state.name}, but sherpa-onnx batches streams of different age; keep it per stream."
        )
    return state


def _size(state):
    """Number of floats of a state tensor."""
    numbers = math.prod(size for size in state.shape if size != "batch")
    return numbers * (2 if state.dtype == torch.float64 else 1)
