"""Parts of the transducer: a predictor over the tokens so far, and the joint network over frames and tokens.

Source: Graves 2012, https://arxiv.org/abs/1211.3711; the stateless predictor is that of Ghodsi et al. 2020
(https://doi.org/10.1109/ICASSP40776.2020.9054419), as in icefall.

A predictor's state is a tuple of tensors with the hypotheses on the first axis. A search selects and replaces states along this
axis, and needs no other knowledge of them.
"""

import math

import torch
from speechbrain.nnet.embedding import Embedding
from speechbrain.nnet.RNN import LSTM
from speechbrain.nnet.transducer.transducer_joint import Transducer_joint
from torch import nn

from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.errors import UserError, is_whole

CHANNELS_PER_GROUP = 4
"""Channels per group of the stateless predictor's convolution, as in icefall."""


class StatelessPredictor(nn.Module):
    """An embedding and a convolution over the last tokens. Its state is these tokens.

    Positions before the text are zeros, in training and in search.

    Arguments
    ---------
    vocab_size : int
        Number of tokens V.
    size : int
        Width P of its output, a multiple of 4.
    context : int
        Number of tokens that it sees.
    blank_index : int
        The blank, which fills positions before the text.

    Raises
    ------
    UserError
        If the size or the context is impossible.

    Example
    -------
    >>> predictor = StatelessPredictor(vocab_size=30, size=8)
    >>> tokens = torch.tensor([[5, 7]])
    >>> state = predictor.begin(1)
    >>> for token in tokens.unbind(1):
    ...     state = predictor.advance(state, token)
    >>> torch.allclose(predictor.output(state), predictor(tokens)[:, -1])
    True
    """

    def __init__(self, vocab_size, size=512, context=2, blank_index=0):
        super().__init__()
        if not is_whole(size, 1) or size % CHANNELS_PER_GROUP:
            raise UserError(f"predictor_size is {size!r}; give a multiple of {CHANNELS_PER_GROUP} for the stateless predictor.")
        if not is_whole(context, 1):
            raise UserError(f"predictor_context is {context!r}; give a number of tokens of 1 or more.")
        self.context, self.blank_index = context, blank_index
        self.embedding = nn.Embedding(vocab_size, size, padding_idx=blank_index)
        self.convolution = nn.Conv1d(size, size, context, groups=size // CHANNELS_PER_GROUP, bias=False)

    def forward(self, tokens):
        """Tokens (B, U) to outputs (B, U + 1, P): before the first token, and after each."""
        return self._outputs(nn.functional.pad(tokens, (self.context, 0), value=self.blank_index))

    def begin(self, number):
        """The states of a number of hypotheses without tokens."""
        device = self.embedding.weight.device
        return (torch.full((number, self.context), self.blank_index, dtype=torch.long, device=device),)

    def advance(self, state, tokens):
        """The states after one more token (N,) for each."""
        return (torch.cat((state[0][:, 1:], tokens.unsqueeze(1)), 1),)

    def output(self, state):
        """Outputs (N, P) of states."""
        return self._outputs(state[0]).squeeze(1)

    def _outputs(self, tokens):
        return self.convolution(self.embedding(tokens).transpose(1, 2)).relu().transpose(1, 2)


class LstmPredictor(nn.Module):
    """SpeechBrain's embedding and LSTM over all tokens so far; the blank begins a text.

    Arguments
    ---------
    vocab_size : int
        Number of tokens V.
    size : int
        Width P of embedding and output.
    layers : int
        Number of layers.
    blank_index : int
        The blank, whose embedding is zero.

    Example
    -------
    >>> predictor = LstmPredictor(vocab_size=30, size=8)
    >>> tokens = torch.tensor([[5, 7]])
    >>> state = predictor.begin(1)
    >>> for token in tokens.unbind(1):
    ...     state = predictor.advance(state, token)
    >>> torch.allclose(predictor.output(state), predictor(tokens)[:, -1], atol=1e-6)
    True
    """

    def __init__(self, vocab_size, size=512, layers=1, blank_index=0):
        super().__init__()
        if not is_whole(size, 1) or not is_whole(layers, 1):
            raise UserError(f"The LSTM predictor has size {size!r} and {layers!r} layers; give 1 or more of both.")
        self.blank_index = blank_index
        self.embedding = Embedding(vocab_size, embedding_dim=size, consider_as_one_hot=False, blank_id=blank_index)
        self.lstm = LSTM(hidden_size=size, input_size=size, num_layers=layers)

    def forward(self, tokens):
        """Tokens (B, U) to outputs (B, U + 1, P): before the first token, and after each."""
        with torch.autocast(tokens.device.type, enabled=False):  # small, and not every device has it in float16
            return self.lstm(self.embedding(nn.functional.pad(tokens, (1, 0), value=self.blank_index)))[0]

    def begin(self, number):
        """The states of a number of hypotheses without tokens: hidden and cell (N, layers, P)."""
        rnn = self.lstm.rnn
        zeros = rnn.weight_hh_l0.new_zeros(number, rnn.num_layers, rnn.hidden_size)
        return self.advance((zeros, zeros), torch.full((number,), self.blank_index, device=zeros.device))

    def advance(self, state, tokens):
        """The states after one more token (N,) for each."""
        # By hand: the library's LSTM rearranges its weights in each call, which takes most of the time of one step
        x, rnn, after = self.embedding(tokens), self.lstm.rnn, []
        for layer, (hidden, cell) in enumerate(zip(*(part.unbind(1) for part in state), strict=True)):
            weights = (getattr(rnn, f"{name}_l{layer}") for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh"))
            from_input, input_bias, from_hidden, hidden_bias = weights
            gates = nn.functional.linear(x, from_input, input_bias) + nn.functional.linear(hidden, from_hidden, hidden_bias)
            enter, keep, new, leave = gates.chunk(4, 1)
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            x = leave.sigmoid() * cell.tanh()
            after.append((x, cell))
        return tuple(torch.stack(parts, 1) for parts in zip(*after, strict=True))

    def output(self, state):
        """Outputs (N, P) of states."""
        return state[0][:, -1]


PREDICTORS = ("stateless", "lstm")


@loadable
class Transducer(nn.Module):
    """Predictor and joint network: the head that turns encoder frames into tokens.

    Arguments
    ---------
    d_model : int
        Width D of encoder frames.
    vocab_size : int
        Number of tokens V, the blank among them.
    predictor : str
        "stateless" or "lstm".
    predictor_size : int
        Width P of the predictor.
    predictor_context : int
        Number of tokens that the stateless predictor sees.
    predictor_layers : int
        Number of layers of the LSTM.
    joint_size : int
        Width J of the joint network.
    blank_index : int
        The blank.

    Raises
    ------
    UserError
        If the predictor is unknown, or a size is impossible.

    Example
    -------
    >>> transducer = Transducer(d_model=16, vocab_size=30, predictor_size=8, joint_size=12)
    >>> frames = transducer.project_frames(torch.rand(2, 50, 16)).unsqueeze(2)  # (B, T, 1, J)
    >>> predicted = transducer.project_outputs(transducer.predictor(torch.randint(1, 30, (2, 7)))).unsqueeze(1)
    >>> transducer.join(frames, predicted).shape
    torch.Size([2, 50, 8, 30])
    """

    def __init__(
        self,
        d_model,
        vocab_size,
        predictor="stateless",
        predictor_size=512,
        predictor_context=2,
        predictor_layers=1,
        joint_size=512,
        blank_index=0,
    ):
        super().__init__()
        if predictor not in PREDICTORS:
            raise UserError(f"Unknown predictor '{predictor}'; the known ones are: {', '.join(PREDICTORS)}.")
        if not is_whole(joint_size, 1):
            raise UserError(f"joint_size is {joint_size!r}; give 1 or more.")
        if not is_whole(blank_index, 0, vocab_size - 1):
            raise UserError(f"blank_index is {blank_index!r} and there are {vocab_size} tokens; give the index of the blank.")
        self.blank_index = blank_index
        if predictor == "stateless":
            self.predictor = StatelessPredictor(vocab_size, predictor_size, predictor_context, blank_index)
        else:
            self.predictor = LstmPredictor(vocab_size, predictor_size, predictor_layers, blank_index)
        self.project_frames = nn.Linear(d_model, joint_size)
        self.project_outputs = nn.Linear(predictor_size, joint_size)
        self.joint = Transducer_joint(joint="sum", nonlinearity=nn.Tanh)
        self.out = nn.Linear(joint_size, vocab_size)
        with torch.no_grad():
            # Half of the probability at first: if all tokens had the same, searches would give a token in every frame
            self.out.bias[blank_index] += math.log(vocab_size)

    def join(self, frames, predicted):
        """Logits (..., V) of projected frames and projected outputs of the predictor (..., J), which are broadcast."""
        return self.out(self.joint(frames, predicted))

    def predict(self, state):
        """Projected outputs (N, J) of the predictor's states."""
        return self.project_outputs(self.predictor.output(state))
