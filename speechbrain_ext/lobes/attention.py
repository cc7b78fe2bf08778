"""Self-attention on ``scaled_dot_product_attention``, with relative (Transformer-XL) or rotary positions.

Both stream with cached projected keys and values. A chunk of C frames with M cached frames costs 4 C d^2 + 2 C (C + M) d
multiply-accumulates (plus the position projection of the relative form). The state is 2 M d numbers per utterance and layer.
With an unlimited left context M grows with the audio.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import library, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from speechbrain_ext.lobes.dropout import dropout, shares_draws
from speechbrain_ext.lobes.fusible import project
from speechbrain_ext.lobes.masks import chunk_mask
from speechbrain_ext.lobes.positions import sinusoids, stream_positions
from speechbrain_ext.lobes.precision import widest_dtype
from speechbrain_ext.utils.errors import UserError

QUERY_BLOCK = 256
"""Queries that the relative form handles at once on a CPU: its scores take heads x QUERY_BLOCK x 2 T numbers, not
heads x T x 2 T. In a batch it handles a quarter as many of each utterance (8 x 20 s: 0.44 s; with QUERY_BLOCK 0.50 s)."""
MOST_SCORES = 2**28
"""Scores that the relative form computes at once on other devices, where each launch costs host time: 1 GiB in float32."""
ALIGNMENT = 8
"""Fused CUDA kernels need head sizes and bias rows that are multiples of this number; in float32 half of it is enough."""
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for compiled graphs. cuDNN's kernel is left out: PyTorch would take it first, but it makes a plan for each new length,
and batches of speech have all lengths."""


@dataclass
class AttentionState:
    """State of one layer between chunks."""

    left_frames: int | None
    """How many frames to keep; None = all."""
    frames: int | torch.Tensor = 0
    """Number of frames so far; in a graph a tensor, (B,) if the streams have different ages. There a limited cache always has
    ``left_frames`` frames, zeros at first."""
    keys: torch.Tensor | None = None
    """(B, heads, M, head size), rotated where positions are rotary."""
    values: torch.Tensor | None = None
    """(B, heads, M, head size)."""


class SelfAttention(nn.Module):
    """Base of both attentions: projections, masks and cache.

    Arguments
    ---------
    d_model : int
        Width.
    nhead : int
        Number of heads.
    dropout : float
        Dropout on the attention probabilities.
    speechbrain_scores : bool
        Reproduce SpeechBrain's scores, for its published checkpoints. They are scaled by the model width instead of the head
        size, and in the relative form they ignore the sign of the distance.
    causal : bool
        Whether a frame sees no later frame, in full context and inside its chunk.

    Raises
    ------
    ValueError
        If the width is not a multiple of the number of heads.
    """

    def __init__(self, d_model: int, nhead: int, dropout: float = 0.0, speechbrain_scores: bool = False, causal: bool = False):
        super().__init__()
        if d_model < 1 or nhead < 1 or d_model % nhead:
            raise UserError(f"d_model is {d_model}; give a positive multiple of nhead ({nhead}).")
        self.nhead = nhead
        self.dropout = dropout
        self.speechbrain_scores = speechbrain_scores
        self.causal = causal
        self.scale = (d_model if speechbrain_scores else d_model // nhead) ** -0.5
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model)
        for projection in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(projection)

    @property
    def branch_end(self) -> nn.Module:
        """The last layer with weights."""
        return self.out

    def prepare(self, x, mask, config):
        """Compute the values that all layers share in one forward: (position table, blocked keys, padding mask).

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
            The second value is a :class:`_Blocked`, or None if nothing is blocked.
        """
        frames = x.shape[1]
        blocked = None if mask is None else mask[:, None, None, :]
        if config is not None or self.causal:
            chunks = chunk_mask(frames, config or DynChunkTrainConfig(1), x.device, self.causal)[None, None]
            blocked = chunks if blocked is None else blocked | chunks
        return self._table(frames, 0, 0, x), _Blocked.of(blocked), mask

    def mix(self, x, shared):
        """Attend over a whole utterance.

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
        table, blocked, mask = shared
        return project(self.out, self._attend(*self._project(x, table, mask), table, blocked), mask)

    def initial_state(self, config: DynChunkTrainConfig) -> AttentionState:
        """The state before the first chunk.

        Arguments
        ---------
        config : DynChunkTrainConfig
            The chunk setting.

        Returns
        -------
        AttentionState
        """
        return AttentionState(None if config.is_infinite_left_context() else config.left_context_size_frames())

    def prepare_stream(self, x, state: AttentionState):
        """Compute the values that all layers share for one chunk: the position table, and the blocked keys or None.

        Arguments
        ---------
        x : torch.Tensor
            (B, C, D), for its shape and device.
        state : AttentionState
            The state of any layer.

        Returns
        -------
        tuple
        """
        cached, frames = 0 if state.keys is None else state.keys.shape[2], x.shape[1]
        blocked = None
        if self.causal:
            blocked = x.new_ones(frames, cached + frames, dtype=torch.bool).triu(cached + 1)[None, None]
        if cached and state.left_frames is not None and isinstance(state.frames, torch.Tensor):
            missing = (state.left_frames - state.frames).view(-1, 1, 1, 1)
            empty = torch.arange(cached + frames, device=x.device) < missing
            blocked = empty if blocked is None else blocked | empty
        return self._table(frames, cached, state.frames, x), _Blocked.of(blocked)

    def stream(self, x, state: AttentionState, shared):
        """Attend from one chunk over the cache and itself, and update the cache.

        Arguments
        ---------
        x : torch.Tensor
            (B, C, D).
        state : AttentionState
            Updated in place.
        shared : tuple
            From :meth:`prepare_stream`.

        Returns
        -------
        torch.Tensor
            (B, C, D).
        """
        query, key, value = self._project(x, shared[0])
        state.frames = state.frames + x.shape[1]
        if state.keys is not None:
            key, value = torch.cat((state.keys, key), dim=2), torch.cat((state.values, value), dim=2)
        drop = 0 if state.left_frames is None else max(0, key.shape[2] - state.left_frames)
        # Clone after a cut: a view would keep the dropped frames in memory.
        state.keys, state.values = (t[:, :, drop:].clone() if drop else t for t in (key, value))
        return self.out(self._attend(query, key, value, *shared))

    def _project(self, x, table, mask=None):
        """(B, T, D) to query, key and value, each (B, heads, T, head size)."""
        return self._project_all(x, mask).unbind(0)

    def _project_all(self, x, mask):
        return project(self.qkv, x, mask).unflatten(-1, (3, self.nhead, -1)).permute(2, 0, 3, 1, 4)

    def _table(self, frames: int, cached: int, before: int, x):
        """Positions of ``frames`` frames. ``before`` frames precede them, ``cached`` of these are in the cache."""
        raise NotImplementedError

    def _attend(self, query, key, value, table, blocked):
        raise NotImplementedError


class _Blocked:
    """Keys that queries must not see, computed once for all layers.

    Arguments
    ---------
    where : torch.Tensor
        Bool, broadcasts to (B, heads, Q, K). On a GPU its rows may be longer, see :data:`ALIGNMENT`; the rest is blocked.
    keys : int
        K.
    """

    def __init__(self, where, keys):
        self.where, self.keys = where, keys
        self._bias = None

    @classmethod
    def of(cls, where):
        """Build from a tensor with rows of K, or from None."""
        if where is None:
            return None
        keys = where.shape[3]
        if _has_fused_kernels(where) and not torch.compiler.is_compiling():
            where = F.pad(where, (0, -keys % ALIGNMENT), value=True)
        return cls(where, keys)

    def rows(self, start, end):
        """The blocked keys of some queries."""
        return self if self.where.shape[2] == 1 else _Blocked(self.where[:, :, start:end], self.keys)

    def bias(self, dtype):
        """The blocked keys as a bias on scores."""
        if self._bias is None or self._bias.dtype != dtype:
            self._bias = torch.zeros_like(self.where, dtype=dtype).masked_fill(self.where, _lowest(dtype))[..., : self.keys]
        return self._bias


def _has_fused_kernels(x):
    return x.device.type not in ("cpu", "meta")


def any_length(x):
    """Context in which attention on CUDA uses no kernel that makes a plan for each length; see :data:`KERNELS`."""
    if not x.is_cuda:
        return nullcontext()
    return sdpa_kernel(KERNELS) if torch.compiler.is_compiling() else _WithoutCudnn()


class _WithoutCudnn:
    """Switches off cuDNN's kernel only, outside of graphs, in a tenth of the host time that ``sdpa_kernel`` takes per layer."""

    def __enter__(self):
        self.before = torch.backends.cuda.cudnn_sdp_enabled()
        if self.before:
            torch.backends.cuda.enable_cudnn_sdp(False)

    def __exit__(self, *error):
        if self.before:
            torch.backends.cuda.enable_cudnn_sdp(True)


def _sdpa(query, key, value, bias, scale, probability):
    in_full = query.dtype.itemsize >= 4 and not torch.is_autocast_enabled("cpu")  # below, PyTorch keeps the sums in float32
    if probability and in_full and shares_draws(query):
        scores = (query * scale) @ key.transpose(2, 3)
        scores = scores if bias is None else scores.add_(bias)
        return (dropout(scores.softmax(-1), probability) @ value).transpose(1, 2).flatten(2)
    size = query.shape[-1]
    if _has_fused_kernels(query) and size % ALIGNMENT:  # zeros change nothing, as the scale is given
        query, key, value = (F.pad(part, (0, -size % ALIGNMENT)) for part in (query, key, value))
    with any_length(query):
        y = F.scaled_dot_product_attention(query, key, value, bias, probability, scale=scale)
    return y[..., :size].transpose(1, 2).flatten(2)


def _lowest(dtype):
    # Finite: a query whose keys are all blocked (padding under a limited left context) averages instead of giving NaN.
    return torch.finfo(dtype).min


class RelativeSelfAttention(SelfAttention):
    """Self-attention with Transformer-XL relative positions. They are signed: past and future differ.

    The score of query i and key j is ``((q_i + u) k_j + (q_i + v) W p(i - j)) / sqrt(head size)``, with the sinusoid p of the
    signed distance. Source: Dai et al. 2019, https://arxiv.org/abs/1901.02860, section 3.3.

    Arguments
    ---------
    d_model : int
        Width, even.
    nhead : int
        Number of heads.
    dropout : float
        Dropout on the attention probabilities.
    speechbrain_scores : bool
        Reproduce SpeechBrain's ``RelPosMHAXL``, see :class:`SelfAttention`.
    causal : bool
        Whether a frame sees no later frame.

    Raises
    ------
    ValueError
        If the width is odd, or not a multiple of the number of heads.

    Example
    -------
    >>> attention = RelativeSelfAttention(32, 4)
    >>> x = torch.rand(2, 10, 32)
    >>> attention.mix(x, attention.prepare(x, None, None)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, d_model: int, nhead: int, dropout: float = 0.0, speechbrain_scores: bool = False, causal: bool = False):
        super().__init__(d_model, nhead, dropout, speechbrain_scores, causal)
        if d_model % 2:
            raise UserError(f"Relative positions need an even d_model for their sinusoids, not {d_model}.")
        self.position = nn.Linear(d_model, d_model, bias=False)
        self.bias_u = nn.Parameter(torch.zeros(nhead, 1, d_model // nhead))
        self.bias_v = nn.Parameter(torch.zeros(nhead, 1, d_model // nhead))

    def _table(self, frames, cached, before, x):
        """Sinusoids of the distances keys-1, ..., -queries, and memory for scores that the layers share. The last distance only
        fills a row, see :func:`_relative_shift`."""
        distances = torch.arange(cached + frames - 1, -frames - 1, -1, device=x.device)
        if self.speechbrain_scores:
            distances = distances.abs()
        return sinusoids(distances, x.shape[2]).to(x.dtype), _Scratch()

    def _attend(self, query, key, value, table, blocked):
        table, scratch = table
        positions = self.position(table).unflatten(-1, (self.nhead, -1)).permute(1, 2, 0)  # (heads, head size, queries+keys)
        query_v, query_u = (query + self.bias_v) * self.scale, query + self.bias_u
        tensors = query_u, query_v, key, value, positions
        dropout = self.dropout if self.training else 0.0
        if not torch.compiler.is_compiling():
            return _attend_in_blocks(*tensors, blocked, scratch, self.scale, dropout)
        # A traced graph cannot loop over a free length: all queries are one block in it. A compiled graph calls the loop as a
        # custom operator; an exported graph cannot. (In torch 2.11 ``is_exporting`` is also true inside torch.compile, and
        # ``is_dynamo_compiling`` is also true in a strict export.)
        if not torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() or self.training:
            return _attend(*tensors, blocked, scratch, self.scale, dropout)
        tensors = (tensor.to(value.dtype) for tensor in tensors)  # autocast does not cast for a custom operator
        return torch.ops.speechbrain_ext.relative_attention(*tensors, None if blocked is None else blocked.where, self.scale)


def _attend(query_u, query_v, key, value, positions, blocked, scratch, scale, dropout):
    """Attention of all queries at once."""
    scores, keys = scratch.product(query_v, positions), key.shape[2]
    # Columns beyond the keys align the rows; the shifted scores have queries - 1 of them
    where = None if blocked is None else blocked.where[..., : keys + min(blocked.where.shape[3] - keys, query_v.shape[2] - 1)]
    columns = keys if where is None else where.shape[3]
    if scores.requires_grad and not torch.compiler.is_compiling():
        bias = _Shift.apply(scores, columns, where)
    else:
        bias = _relative_shift(scores, columns)
        if where is not None:
            # Fused kernels need the aligned rows of a copy; a CPU does not
            in_place = not (torch.compiler.is_compiling() or _has_fused_kernels(scores))
            bias = (bias.masked_fill_ if in_place else bias.masked_fill)(where, _lowest(bias.dtype))
    bias = bias if where is None else bias[..., :keys]  # a cut of nothing would fix lengths in an exported graph
    return _sdpa(query_u, key, value, bias, scale, dropout)


def _attend_in_blocks(query_u, query_v, key, value, positions, blocked, scratch, scale, dropout):
    """Attention of one block of queries after the other."""
    queries, keys = query_u.shape[2], key.shape[2]
    if key.device.type == "cpu":
        block = QUERY_BLOCK if len(key) == 1 else max(1, QUERY_BLOCK // 4)
    else:
        block = max(1, MOST_SCORES // (key.shape[0] * key.shape[1] * positions.shape[2]))
    if queries <= block:
        return _attend(query_u, query_v, key, value, positions, blocked, scratch, scale, dropout)
    blocks = []
    for start in range(0, queries, block):
        end = min(start + block, queries)
        rows = None if blocked is None else blocked.rows(start, end)
        seen = positions[..., queries - end : queries - start + keys]
        some = query_u[:, :, start:end], query_v[:, :, start:end], key, value, seen, rows
        blocks.append(_attend(*some, scratch, scale, dropout))
    return torch.cat(blocks, dim=1)


@library.custom_op("speechbrain_ext::relative_attention", mutates_args=())
def _compiled(
    query_u: torch.Tensor,
    query_v: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    blocked: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Operator of compiled graphs on a CPU without a gradient. All queries at once take a Conformer 2.3 times as long (40 s)."""
    return _attend_in_blocks(query_u, query_v, key, value, positions, _Blocked.of(blocked), _Scratch(), scale, 0.0)


@_compiled.register_fake
def _(query_u, query_v, key, value, positions, blocked, scale):
    return value.new_empty(value.shape[0], query_u.shape[2], value.shape[1] * value.shape[3])


class _Scratch:
    """Memory for the scores of one block of queries, which the next block and the next layer reuse without a gradient.

    Memory that is released after each block may return to the system, which clears it page by page before the next use. For one
    utterance of 160 s that took two thirds of the time (torch 2.11, glibc 2.36).
    """

    def __init__(self):
        self.memory = None

    def product(self, query, positions):
        """(B, heads, Q, head size) times (heads, head size, W); overwrites the result of the last call."""
        on_cpu = query.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not on_cpu:
            return query @ positions
        batch, heads, queries, _ = query.shape
        size = batch * heads * queries * positions.shape[2]
        if self.memory is None or len(self.memory) < size:
            self.memory = query.new_empty(size)
        # Batch and queries are one axis: the positions are the same for all utterances
        scores = self.memory[:size].view(heads, batch * queries, -1)
        torch.bmm(query.transpose(0, 1).flatten(1, 2), positions, out=scores)
        return scores.unflatten(1, (batch, queries)).transpose(0, 1)


def _relative_shift(scores, keys: int):
    """From scores per distance (..., Q, Q+K), distances K-1 .. -Q, to scores per key (..., Q, K).

    Row i must start Q-1-i columns further right. Flat scores, read in rows that are one shorter, give that: a view, no copy.
    """
    queries, width = scores.shape[-2:]
    flat = scores.flatten(-2)[..., queries - 1 : queries - 1 + queries * (width - 1)]
    rows = flat.unflatten(-1, (queries, width - 1))
    # If both lengths are free, the exporter cannot infer the length of a slice.
    return F.pad(rows, (0, 1 - queries)) if torch.compiler.is_exporting() else rows[..., :keys]


class _Shift(torch.autograd.Function):
    """:func:`_relative_shift`, with blocked scores lowered, and one gradient of the scores' size; autograd makes one for each
    view, and one for the lowering."""

    generate_vmap_rule = True

    @staticmethod
    def forward(scores, keys, where):
        shifted = _relative_shift(scores, keys)
        return shifted if where is None else shifted.masked_fill(where, _lowest(scores.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        scores, (where,) = grad.new_zeros(ctx.shape), ctx.saved_tensors
        shifted = _relative_shift(scores, grad.shape[-1]).copy_(grad)
        if where is not None:
            shifted.masked_fill_(where, 0.0)
        return scores, None, None


class RotarySelfAttention(SelfAttention):
    """Self-attention with rotary positions (RoPE). It makes no T x T tensor without a chunk setting: use it for long audio.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, equation 34.

    Arguments
    ---------
    d_model : int
        Width.
    nhead : int
        Number of heads; the head size must be even.
    dropout : float
        Dropout on the attention probabilities.
    speechbrain_scores : bool
        Reproduce SpeechBrain's ``RoPEMHA``, see :class:`SelfAttention`.
    causal : bool
        Whether a frame sees no later frame.

    Raises
    ------
    ValueError
        If the width is not a multiple of the number of heads, or the head size is odd.

    Example
    -------
    >>> attention = RotarySelfAttention(32, 4)
    >>> x = torch.rand(2, 10, 32)
    >>> attention.mix(x, attention.prepare(x, None, None)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, d_model: int, nhead: int, dropout: float = 0.0, speechbrain_scores: bool = False, causal: bool = False):
        super().__init__(d_model, nhead, dropout, speechbrain_scores, causal)
        if (d_model // nhead) % 2:
            raise UserError(f"Rotary positions need an even head size, not {d_model // nhead} (d_model / nhead).")

    def _table(self, frames, cached, before, x):
        """Cosines and signed sines, (2, frames, head size); (2, B, 1, frames, head size) for streams of different ages."""
        positions = stream_positions(before, frames, x.device, widest_dtype(x.device))
        if positions.dim() == 2:
            positions = positions.unsqueeze(1)  # the heads
        sine, cosine = sinusoids(positions, x.shape[2] // self.nhead).to(x.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)))

    def _project(self, x, table, mask=None):
        turned, value = self._project_all(x, mask).split((2, 1))
        query, key = _rotate(turned, table.to(turned.dtype)).unbind(0)
        return query, key, value.squeeze(0)

    def _attend(self, query, key, value, table, blocked):
        bias = None if blocked is None else blocked.bias(query.dtype)
        return _sdpa(query, key, value, bias, self.scale, self.dropout if self.training else 0.0)


def _rotate(x, table):
    """Turn the pairs of channels (c, c + half) of (..., T, head size) by their position's angles.

    The paper pairs neighbouring channels. These pairs differ only in the order of the projections' rows, and take half the time.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * table[0], torch.cat((second, first), dim=-1), table[1])


ATTENTIONS = {"RelPosMHAXL": RelativeSelfAttention, "RoPEMHA": RotarySelfAttention}
"""SpeechBrain's names, as its hparams files use them."""


def build_attention(attention_type: str, *args, **kwargs) -> SelfAttention:
    """Build an attention by SpeechBrain's name.

    Arguments
    ---------
    attention_type : str
        "RelPosMHAXL" or "RoPEMHA".
    *args, **kwargs
        Arguments of :class:`SelfAttention`.

    Returns
    -------
    SelfAttention

    Raises
    ------
    ValueError
        If the name is unknown, or a size is impossible.

    Example
    -------
    >>> build_attention("relative", 32, 4)
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: Unknown attention_type 'relative'; the known ones are: RelPosMHAXL, RoPEMHA.
    """
    if attention_type not in ATTENTIONS:
        raise UserError(f"Unknown attention_type '{attention_type}'; the known ones are: {', '.join(ATTENTIONS)}.")
    return ATTENTIONS[attention_type](*args, **kwargs)
