"""CTC as a transducer, for runtimes that take hotwords only with transducers.

The encoder's output has the log-probabilities of each frame, followed by those of the frame before it (:class:`Pairs`). The
:class:`CtcDecoder` encodes the last token. The :class:`CtcJoiner` uses the frame before to decide whether the last token
continues or is a new token. The interface is that of :mod:`speechbrain_ext.export.onnx_transducer`.
"""

import torch
from torch import nn
from torch.nn.functional import softplus

IMPOSSIBLE = -1e3
"""Log-probability of a token that never occurs."""


class Pairs(nn.Module):
    """Log-probabilities of each frame, followed by those of the frame before it; a blank precedes the first frame.

    Arguments
    ---------
    answer : speechbrain_ext.export.sherpa_graphs.Answer
        Applied to the log-probabilities first.

    Example
    -------
    >>> from speechbrain_ext.export.sherpa_graphs import Answer
    >>> Pairs(Answer(2, blank=0, silent=[]))(torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]]))[0]
    tensor([[   -1.,    -2.,     0., -1000.],
            [   -3.,    -4.,    -1.,    -2.]])
    """

    def __init__(self, answer):
        super().__init__()
        self.answer, self.repeats, self.vocabulary = answer, answer.repeats, len(answer.is_blank)
        self.register_buffer("certain", torch.where(answer.is_blank, 0.0, IMPOSSIBLE))

    def forward(self, log_probs):
        """Map (B, T, V) to (B, T * repeats, 2 V)."""
        now = self.answer(log_probs)
        before = torch.cat((self.certain.expand(now.shape[0], 1, -1), now), 1)[:, :-1]  # also correct for T = 0
        return torch.cat((now, before), 2)


class CtcDecoder(nn.Module):
    """The last token (N, 1) as a one-hot vector (N, V); zeros for the blank, token 0.

    Arguments
    ---------
    vocabulary : int
        Number of tokens V.

    Example
    -------
    >>> CtcDecoder(3)(torch.tensor([[2], [0]]))
    tensor([[0., 0., 1.],
            [0., 0., 0.]])
    """

    input_names = ("y",)
    output_names = ("decoder_out",)
    dynamic_shapes = ({0: "batch"},)
    blank = 0

    def __init__(self, vocabulary):
        super().__init__()
        self.metadata = {"vocab_size": str(vocabulary), "context_size": "1"}
        self.register_buffer("tokens", torch.arange(vocabulary))

    def forward(self, y):
        """See the class."""
        return ((y == self.tokens) & (self.tokens > 0)).float()

    def example_inputs(self):
        """Inputs to trace with."""
        return (torch.zeros(2, 1, dtype=torch.int64),)


class CtcJoiner(nn.Module):
    """Joint network of CTC: the continuation of the last token in the next frame counts as a blank.

    If the last token is l, the frame before was l with probability p(l) or blank with p(blank). Therefore the share
    p(l) / (p(l) + p(blank)) of the current probability of l is a continuation, and is added to the blank. The rest is a new l.

    Arguments
    ---------
    vocabulary : int
        Number of tokens V; token 0 is the blank.

    Example
    -------
    >>> now, before = torch.tensor([[0.2, 0.7, 0.1]]).log(), torch.tensor([[0.2, 0.6, 0.2]]).log()
    >>> CtcJoiner(3)(torch.cat((now, before), 1), torch.tensor([[0.0, 1.0, 0.0]])).exp()
    tensor([[0.7250, 0.1750, 0.1000]])
    """

    input_names = ("encoder_out", "decoder_out")
    output_names = ("logit",)
    dynamic_shapes = ({0: "batch"}, {0: "batch"})
    metadata = {}

    def __init__(self, vocabulary):
        super().__init__()
        self.register_buffer("is_blank", torch.arange(vocabulary) == 0)

    def forward(self, encoder_out, decoder_out):
        """Log-probabilities (N, V), from outputs (N, 2 V) of :class:`Pairs` and (N, V) of :class:`CtcDecoder`."""
        now, before = encoder_out.chunk(2, 1)
        last, last_before = ((part * decoder_out).sum(1, keepdim=True) for part in (now, before))
        lead, blank = last_before - before[:, :1], now[:, :1]
        # Softplus, because runtimes compute the sigmoid of a large number too coarsely for its logarithm
        goes_on = last - softplus(-lead) + IMPOSSIBLE * (1 - decoder_out.sum(1, keepdim=True))
        new = last - softplus(lead)
        blank = torch.maximum(blank, goes_on) + softplus(-(blank - goes_on).abs())
        return torch.where(self.is_blank, blank, torch.where(decoder_out > 0, new, now))

    def example_inputs(self):
        """Inputs to trace with."""
        size = len(self.is_blank)
        return torch.randn(2, 2 * size).log_softmax(1), torch.eye(2, size)
