r"""Multi-head HyperMixing, linear in time and memory, for any length, and streaming.

Each head computes, for inputs x_t of width e = d / heads over the frames t of an utterance:

    u_t = x_t + PE(t)                              the weight generators see positions, the mixed values do not
    g_t = GELU(A1 u_t + a1),  w1_t = B1 g_t + b1   first generator; w1_t has k numbers
    h_t = GELU(A2 u_t + a2),  w2_t = B2 h_t + b2   second generator (the first one again when tied)
    Z   = sum_t x_t w1_t'                          (e, k) hidden layer of the token-mixing MLP: a *sum over frames*
    y_t = GELU(Z) w2_t                             and LayerNorm over the concatenated heads

**Linear, with small constants.** As written above, T x k weights are generated and multiplied twice. Sums commute with the
generators' second layers, so neither weight matrix has to be built:

    Z   = (sum_t x_t g_t') B1' + (sum_t x_t) b1'   = S [B1 b1]',   S = sum_t x_t [g_t 1]' of shape (e, e + 1)
    y_t = (GELU(Z) B2) h_t + GELU(Z) b2

Per frame this costs 4 d^2/heads multiply-accumulates (tied: 3) instead of 2 d^2/heads + 4 d k, and 2 d^2 k/heads once per
utterance (k per head); the result is the same up to rounding. Nothing of size T x T or T x k is allocated; with chunks of C
frames, Z takes T/C times d k numbers.

**Streaming.** S is a sum over frames, so chunk c, with its left context of L chunks, uses

    S_c = sum over the frames of chunks c-L .. c   = P_c - P_{c-L-1},   P_c = running sum up to chunk c

and mixes its own frames with Z_c = S_c [B1 b1]'. No frame after the chunk enters. In :meth:`HyperMixing.stream` the state is

* unlimited left context: P_c, d (d/heads + 1) float64 numbers per utterance, whatever the length of the audio so far
  (22 kB per layer for d = 144, 8 heads);
* L chunks of left context: the last L chunk sums, L times half of that (float32).

A chunk of C frames costs C 4 d^2/heads + 2 d^2 k/heads multiply-accumulates, and L sums of the state, whatever the length of the
audio so far. Running sums are kept in float64: a float32 sum over hours of audio would lose the newest frames.

Sources: Mai et al. 2022 (HyperMixer, https://arxiv.org/abs/2203.03691), Mai et al. 2023 (HyperConformer,
https://arxiv.org/abs/2305.18281); parameter names and layout as in ``speechbrain.nnet.hypermixing``.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.lobes.activations import gelu
from speechbrain_ext.lobes.chunk_sums import ChunkSums, window_sum
from speechbrain_ext.lobes.masks import chunk_length, zero_padding
from speechbrain_ext.lobes.positions import sinusoids, stream_positions
from speechbrain_ext.lobes.precision import at_least_float32, full_precision, widest_dtype
from speechbrain_ext.utils.errors import UserError

ROUNDED = 3000
"""Length of the table of sinusoids in SpeechBrain's class, from positions in float32. Rounded ones add noise in long streams."""


class _Generator(nn.Module):
    """One two-layer MLP per head, from a frame to k weights; it only holds parameters, see :class:`HyperMixing`."""

    def __init__(self, heads: int, head_dim: int, hidden: int):
        super().__init__()
        self.fc1_weights = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.fc1_biases = nn.Parameter(torch.empty(heads, head_dim))
        self.fc2_weights = nn.Parameter(torch.empty(heads, hidden, head_dim))
        self.fc2_biases = nn.Parameter(torch.empty(heads, hidden))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter, gain=math.sqrt(2.0))

    def second_layer(self) -> torch.Tensor:
        """[B b], (heads, k, e + 1)."""
        return torch.cat((self.fc2_weights, self.fc2_biases.unsqueeze(-1)), dim=-1)


class _Generators(nn.Module):
    def __init__(self, heads: int, head_dim: int, hidden: int, tied: bool):
        super().__init__()
        self.w1_gen = _Generator(heads, head_dim, hidden)
        self.w2_gen = self.w1_gen if tied else _Generator(heads, head_dim, hidden)


@dataclass
class HyperMixingState(ChunkSums):
    """State of one layer between chunks: sums of (heads, B, e, e + 1)."""

    frames: int | torch.Tensor = 0


class HyperMixing(nn.Module):
    """Multi-head HyperMixing: a token-mixing MLP whose weights are generated from the tokens, in place of self-attention.

    A drop-in for ``speechbrain.nnet.hypermixing.HyperMixing``: same constructor, call, parameters and result, but with chunks,
    without a length limit, and without a (B, T, T) tensor of zeros. The module's text has equations, cost and streaming state.

    Arguments
    ---------
    input_output_dim : int
        Width d of the input and output.
    hypernet_size : int
        Size of the token-mixing MLPs' hidden layers, over all heads: k = hypernet_size / num_heads.
    tied : bool
        Whether both layers of the token-mixing MLP use the same generated weights.
    num_heads : int
        Number of parallel token-mixing MLPs.
    fix_tm_hidden_size : bool
        Whether each head has ``hypernet_size`` hidden units, not ``hypernet_size / num_heads``.
    max_length : int
        Accepted for compatibility and not needed: any length works.

    Raises
    ------
    ValueError
        If a size is not a multiple of the number of heads, or the width is odd.

    Example
    -------
    >>> inputs = torch.rand(8, 60, 512)
    >>> net = HyperMixing(512, 2048, num_heads=8)
    >>> outputs, _ = net(inputs, inputs, inputs)
    >>> outputs.shape
    torch.Size([8, 60, 512])
    """

    def __init__(
        self,
        input_output_dim: int,
        hypernet_size: int,
        tied: bool = False,
        num_heads: int = 1,
        fix_tm_hidden_size: bool = False,
        max_length: int = 3000,
    ):
        super().__init__()
        if input_output_dim % 2:
            raise UserError(f"HyperMixing needs an even width for its sinusoids, not {input_output_dim}.")
        for what, size in (("width (d_model)", input_output_dim), ("hidden size (d_ffn)", hypernet_size)):
            if num_heads < 1 or size < 1 or size % num_heads:
                raise UserError(f"HyperMixing's {what} is {size}; give a positive multiple of its number of heads ({num_heads}).")
        self.input_output_dim = input_output_dim
        self.num_heads = num_heads
        self.head_dim = input_output_dim // num_heads
        self.tied = tied
        hidden = hypernet_size if fix_tm_hidden_size else hypernet_size // num_heads
        self.hyper = _Generators(num_heads, self.head_dim, hidden, tied)
        self.layer_norm = nn.LayerNorm(input_output_dim)

    @property
    def branch_end(self) -> nn.Module:
        """The last layer with weights."""
        return self.layer_norm

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # SpeechBrain saves the sinusoid table of every layer (17 MB of an 8M checkpoint), although it is deterministic.
        state_dict.pop(prefix + "positional_encoding.pe", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self,
        query,
        key=None,
        value=None,
        attn_mask=None,
        key_padding_mask=None,
        return_attn_weights=True,
        pos_embs=None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
    ):
        """Mix tokens, with the arguments of SpeechBrain's attentions.

        Arguments
        ---------
        query : torch.Tensor
            (B, T, D).
        key, value, attn_mask, return_attn_weights, pos_embs
            Accepted because the module can replace an attention; without effect, as in SpeechBrain.
        key_padding_mask : torch.Tensor, optional
            (B, T) bool, True = padding.
        dynchunktrain_config : DynChunkTrainConfig, optional
            Restricts each frame to its chunk and the left context.

        Returns
        -------
        tuple
            Output (B, T, D), and None in place of attention weights.
        """
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.bool()
        shared = self.prepare(query, key_padding_mask, dynchunktrain_config)
        return self.mix(query, shared), None

    # The interface for encoders: prepare once per forward, mix in each layer.

    def prepare(self, x, mask, config):
        """Compute the values that all layers share in one forward: (sinusoids (1, T, D), padding mask, chunk setting).

        Arguments
        ---------
        x : torch.Tensor
            (B, T, D), for its shape and device.
        mask : torch.Tensor, optional
            (B, T) bool, True = padding.
        config : DynChunkTrainConfig, optional
            The chunk setting.

        Returns
        -------
        tuple
        """
        return self._table(0, x), mask, config

    def mix(self, x, shared):
        """Mix a whole utterance.

        Arguments
        ---------
        x : torch.Tensor
            (B, T, D).
        shared : tuple
            From :meth:`prepare`.

        Returns
        -------
        torch.Tensor
            (B, T, D).
        """
        table, mask, config = shared
        batch, frames, width = x.shape
        x = zero_padding(x, mask)
        if config is None:
            values, first, second = self._generate(x, table)
            with full_precision(x):  # sums over time exceed the range and the resolution of half types
                y = self._mix_tokens(_chunk_sum(values, first), second)
            y = y.permute(1, 2, 0, 3).reshape(batch, frames, width)
        else:
            # Chunks become a separate axis; zero frames fill the last chunk and add nothing.
            size = chunk_length(config, frames)
            fill = -frames % size
            x, table = F.pad(x, (0, 0, 0, fill)), F.pad(table, (0, 0, 0, fill))
            values, first, second = (
                tensor.unflatten(2, (-1, size)) for tensor in self._generate(x, table)
            )  # (heads, B, chunks, size, e)
            with full_precision(x):  # sums over time exceed the range and the resolution of half types
                y = self._mix_tokens(window_sum(_chunk_sum(values, first), config.left_context_size), second)
            y = y.flatten(2, 3).permute(1, 2, 0, 3).reshape(batch, frames + fill, width)[:, :frames]
        return self._norm(zero_padding(y, mask)).to(x.dtype)

    def initial_state(self, config: DynChunkTrainConfig) -> HyperMixingState:
        """The state before the first chunk.

        Arguments
        ---------
        config : DynChunkTrainConfig
            The chunk setting.

        Returns
        -------
        HyperMixingState
        """
        return HyperMixingState(config.left_context_size)

    def prepare_stream(self, x, state: HyperMixingState):
        """Compute the values that all layers share for one chunk: the sinusoids of its absolute positions.

        Arguments
        ---------
        x : torch.Tensor
            (B, C, D), for its shape and device.
        state : HyperMixingState
            The state of any layer.

        Returns
        -------
        torch.Tensor
            (1, C, D), or (B, C, D) if the streams have different ages.
        """
        return self._table(state.frames, x)

    def _table(self, before, x):
        """Sinusoids of a piece: of the first positions rounded as in SpeechBrain's table, and exact of later ones."""
        frames, width = x.shape[1:]
        positions = stream_positions(before, frames, x.device)
        table = sinusoids(positions, width)
        # Both in graphs, which are for all lengths
        if torch.compiler.is_compiling() or isinstance(before, torch.Tensor) or before + frames > ROUNDED:
            exact = sinusoids(positions.to(widest_dtype(x.device)), width).float()
            table = torch.where((positions < ROUNDED).unsqueeze(-1), table, exact)
        return table if table.dim() == 3 else table.unsqueeze(0)

    def stream(self, x, state: HyperMixingState, shared):
        """Mix one chunk and update the state.

        Arguments
        ---------
        x : torch.Tensor
            (B, C, D).
        state : HyperMixingState
            Updated in place.
        shared : torch.Tensor
            From :meth:`prepare_stream`.

        Returns
        -------
        torch.Tensor
            (B, C, D).
        """
        values, first, second = self._generate(x, shared)
        with full_precision(x):  # sums over time exceed the range and the resolution of half types
            y = self._mix_tokens(state.add(_chunk_sum(values, first)), second)
        state.frames = state.frames + x.shape[1]
        return self._norm(y.permute(1, 2, 0, 3).flatten(2)).to(x.dtype)

    def _generate(self, x, table):
        """Values and both generators' hidden layers, head by head: three (heads, B, T, e) tensors."""
        batch, frames, width = x.shape
        heads, size = self.num_heads, width // self.num_heads
        # One copy makes the heads a batch axis: everything below is a batched matmul on contiguous rows.
        values = x.reshape(batch, frames, heads, size).permute(2, 0, 1, 3).contiguous()  # (heads, B, T, e)
        table = table.to(x.dtype).unflatten(2, (heads, size)).permute(2, 0, 1, 3)  # (heads, 1 or B, T, e)
        generators = [self.hyper.w1_gen] if self.tied else [self.hyper.w1_gen, self.hyper.w2_gen]
        weights = torch.cat([g.fc1_weights for g in generators], dim=1)  # (heads, e or 2e, e)
        biases = torch.cat([g.fc1_biases for g in generators], dim=1).unsqueeze(1)
        hidden = gelu(torch.baddbmm(biases, (values + table).flatten(1, 2), weights.transpose(1, 2)))
        hidden = hidden.reshape(heads, batch, frames, len(generators) * size)
        first, second = (hidden, hidden) if self.tied else hidden.chunk(2, dim=-1)
        return values, first, second

    def _mix_tokens(self, sums, second):
        """Sums S (heads, B, ..., e, e+1) and the second hidden layer (heads, B, ..., T, e) to outputs (heads, B, ..., T, e)."""
        first_layer = self.hyper.w1_gen.second_layer().to(sums.dtype)
        second_layer = self.hyper.w2_gen.second_layer().to(sums.dtype)
        # One matmul per head over all rows: broadcasting would copy the layers for every utterance and chunk.
        hidden = gelu(torch.bmm(sums.flatten(1, -2), first_layer.transpose(1, 2)))  # (heads, B ... e, k)
        mixing = torch.bmm(hidden, second_layer).reshape(sums.shape)
        mixing = mixing.flatten(0, -3)
        y = torch.baddbmm(mixing[:, None, :, -1], second.to(sums.dtype).flatten(0, -3), mixing[..., :-1].transpose(1, 2))
        return y.view(second.shape)

    def _norm(self, y):
        norm = self.layer_norm
        return F.layer_norm(y, norm.normalized_shape, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)


def _chunk_sum(values, first):
    """S = sum over frames of x_t [g_t 1]', (..., T, e) twice to (..., e, e+1), in float32 or better."""
    values, first = at_least_float32(values), at_least_float32(first)
    return torch.cat((values.transpose(-1, -2) @ first, values.sum(-2).unsqueeze(-1)), dim=-1)
