"""The parts of a transducer as modules to export, and greedy search with them in PyTorch or onnxruntime.

Names are those of icefall and sherpa-onnx: an encoder that gives ``encoder_out`` (N, T, J), a decoder (the predictor) that turns
the last tokens ``y`` into ``decoder_out`` (N, J), and a joiner that turns rows of both into ``logit`` (N, V). Encoder and decoder
include the projections to the joint network's width J.
"""

import json

import numpy as np
import torch
from torch import nn

from speechbrain_ext.inference.models import TransducerModel

MAX_SYMBOLS = 5
"""Most tokens per frame in greedy search, as in :class:`speechbrain_ext.decoders.transducer.TransducerSearch`."""


def transducer_of(model):
    """A model's transducer, or None."""
    return model.mods.decoder.transducer if isinstance(model, TransducerModel) else None


def head_of(model):
    """The module after the encoder in a model's graph: its CTC head, or its transducer's projection of frames."""
    transducer = transducer_of(model)
    return model.ctc_head if transducer is None else transducer.project_frames


class Decoder(nn.Module):
    """The predictor: ``y`` (N, context) int64 to ``decoder_out`` (N, J).

    For an LSTM, ``y`` (N, 1) is the last token, and the state is an input and an output: ``hidden`` and ``cell``
    (N, layers, P), zeros at first. A text begins with the blank. A negative number, which sherpa-onnx uses, counts as the blank.

    Arguments
    ---------
    transducer : speechbrain_ext.lobes.transducer.Transducer
        The head.

    Example
    -------
    >>> from speechbrain_ext.lobes.transducer import Transducer
    >>> decoder = Decoder(Transducer(d_model=16, vocab_size=30, predictor_size=8, joint_size=12))
    >>> decoder(*decoder.example_inputs()).shape, decoder.metadata["context_size"]
    (torch.Size([2, 12]), '2')
    """

    def __init__(self, transducer):
        super().__init__()
        self.transducer = transducer
        self.has_state = not hasattr(transducer.predictor, "context")
        self.context = 1 if self.has_state else transducer.predictor.context
        self.blank = transducer.blank_index
        state = ("hidden", "cell") if self.has_state else ()
        self.input_names, self.output_names = ("y", *state), ("decoder_out", *(f"next.{name}" for name in state))
        self.dynamic_shapes = tuple({0: "batch"} for _ in self.input_names)
        self.eval()

    def forward(self, tokens, hidden=None, cell=None):
        """See the class."""
        tokens = tokens.masked_fill(tokens < 0, self.blank)
        if not self.has_state:
            return self.transducer.predict((tokens,))
        state = self.transducer.predictor.advance((hidden, cell), tokens.squeeze(1))
        return self.transducer.predict(state), *state

    def example_inputs(self):
        """Inputs to trace with."""
        state = ()
        if self.has_state:
            state = tuple(torch.zeros_like(part) for part in self.transducer.predictor.begin(2))
        return torch.full((2, self.context), self.blank), *state

    @property
    def metadata(self):
        """Settings for the caller, all text."""
        about = {"context_size": str(self.context), "vocab_size": str(self.transducer.out.out_features)}
        return about | ({"state_shape": json.dumps(self.example_inputs()[1].shape[1:])} if self.has_state else {})


class Joiner(nn.Module):
    """The joint network: ``encoder_out`` (N, J) and ``decoder_out`` (N, J) to ``logit`` (N, V).

    Arguments
    ---------
    transducer : speechbrain_ext.lobes.transducer.Transducer
        The head.
    answer : torch.nn.Module, optional
        Applied to the logits.

    Example
    -------
    >>> from speechbrain_ext.lobes.transducer import Transducer
    >>> joiner = Joiner(Transducer(d_model=16, vocab_size=30, predictor_size=8, joint_size=12))
    >>> joiner(*joiner.example_inputs()).shape
    torch.Size([2, 30])
    """

    input_names, output_names = ("encoder_out", "decoder_out"), ("logit",)
    dynamic_shapes = ({0: "batch"}, {0: "batch"})

    def __init__(self, transducer, answer=None):
        super().__init__()
        self.transducer, self.answer = transducer, answer or nn.Identity()
        self.metadata = {"joiner_dim": str(transducer.out.in_features)}
        self.eval()

    def forward(self, frames, predicted):
        """See the class."""
        return self.answer(self.transducer.join(frames, predicted))

    def example_inputs(self):
        """Inputs to trace with."""
        return torch.zeros(2, self.transducer.out.in_features), torch.ones(2, self.transducer.out.in_features)


class InPyTorch:
    """A module with the interface of onnxruntime's session.

    Arguments
    ---------
    graph : Decoder or Joiner
        The module.
    """

    def __init__(self, graph):
        self.graph = graph

    @torch.no_grad()
    def run(self, outputs, inputs):
        """Run the module, as a session does; returns all outputs in order."""
        found = self.graph(*(torch.from_numpy(inputs[name]) for name in self.graph.input_names))
        return [part.numpy() for part in (found if isinstance(found, tuple) else (found,))]


class Search:
    """Greedy search of one utterance, with sessions of a decoder and a joiner.

    Arguments
    ---------
    decoder, joiner : onnxruntime.InferenceSession or InPyTorch
        Sessions of the two graphs.
    graph : Decoder
        Gives the names of the decoder's inputs and their first values.
    max_symbols : int
        Most tokens per frame.

    Example
    -------
    >>> from speechbrain_ext.decoders.transducer import TransducerSearch
    >>> from speechbrain_ext.lobes.transducer import Transducer
    >>> transducer = Transducer(d_model=16, vocab_size=30, predictor_size=8, joint_size=12)
    >>> decoder, frames = Decoder(transducer), torch.randn(1, 20, 16)
    >>> search = Search(InPyTorch(decoder), InPyTorch(Joiner(transducer)), decoder)
    >>> said, log_probs = search(transducer.project_frames(frames)[0].detach().numpy())
    >>> sum(said, []) == TransducerSearch(transducer, beam_size=1)(frames, torch.ones(1))[0][0], log_probs.shape
    (True, (20, 30))
    """

    def __init__(self, decoder, joiner, graph, max_symbols=MAX_SYMBOLS):
        self.decoder, self.joiner, self.graph, self.max_symbols = decoder, joiner, graph, max_symbols

    def __call__(self, frames, known=None):
        """Search, or follow the tokens of another search.

        Arguments
        ---------
        frames : numpy.ndarray
            (T, J) output of the encoder's graph.
        known : list of list of int, optional
            The tokens of each frame to follow.

        Returns
        -------
        tuple
            The tokens of each frame, and the last log-probabilities (T, V) in each frame.
        """
        blank, names = self.graph.blank, self.graph.input_names
        given = dict(zip(names, (part[:1].numpy() for part in self.graph.example_inputs()), strict=True))
        predicted, *state = self.decoder.run(None, given)
        said, left = [], []
        for time, frame in enumerate(frames):
            said.append([])
            while True:
                (logits,) = self.joiner.run(None, {"encoder_out": frame[None], "decoder_out": predicted})
                token = int(logits[0].argmax()) if known is None else [*known[time], blank][len(said[-1])]
                if token == blank or len(said[-1]) == self.max_symbols:
                    break
                said[-1].append(token)
                given = dict(zip(names, (np.append(given["y"][:, 1:], [[token]], 1), *state), strict=True))
                predicted, *state = self.decoder.run(None, given)
            left.append(logits[0] - np.logaddexp.reduce(logits[0]))
        return said, np.stack(left)
