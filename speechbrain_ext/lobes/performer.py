r"""Performer attention (FAVOR+): self-attention with cost linear in length and, chunk by chunk, a state of constant size.

Softmax attention weighs key j for query i by exp(q_i k_j / sqrt(e)), e = head size. Here the weight is a product of features,

    weight(i, j) = phi(q_i)' psi(k_j),      y_i = sum_j weight(i, j) v_j / sum_j weight(i, j)

and the sums over j come before the product with the query: with

    S = sum_j psi(k_j) [v_j 1]'   of shape (m, e + 1),      [numerator denominator]_i = phi(q_i)' S

**Features.** "softmax": positive orthogonal random features, unbiased for the softmax's exponential. With x^ = x / e^(1/4), and
rows w_r of a random matrix that are Gaussian each and orthogonal in blocks of e,

    phi_r(q) = exp(w_r q^ + |w_r|^2 / 2 - max over r),      psi_r(k) = exp(-|k^ - w_r|^2 / 2 + e / 2)

The usual form is exp(w x^ - |x^|^2 / 2) for both. The form here is the same up to factors that cancel: one per query, and one per
feature, which moves from keys to queries. Keys are then bounded without a maximum over time, which would look into the future.
"relu": phi(x) = psi(x) = ReLU(w x / sqrt(e)) + 1e-3; without random features (``features`` 0) ReLU(x) + 1e-3, with m = e.

**Causal, in training.** Frames are taken in blocks of whole chunks: about 64 frames, or fewer if the left context is short. The
frames before a block enter as one running sum. Inside the block all weights are computed, and those of later frames (or chunks)
are set to zero. No loop over time, T / 64 sums.

**Recurrent.** Chunk by chunk, S is the state: heads m (e + 1) float64 numbers per utterance and layer for an unlimited left
context (266 kB for 8 heads of 64 with 64 features), whatever the length of the audio so far; with L chunks of left context, L
times half of that. This is the step of an RNN, hence "RNN attention".

Sources: Choromanski et al. 2020, https://arxiv.org/abs/2009.14794 (features, causal prefix sums); Katharopoulos et al. 2020,
https://arxiv.org/abs/2006.16236 (the recurrence).
"""

import math

import torch
import torch.nn.functional as F
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.lobes.chunk_sums import ChunkSums
from speechbrain_ext.lobes.dropout import Dropout
from speechbrain_ext.lobes.fusible import project
from speechbrain_ext.lobes.precision import at_least_float32, full_precision, widest
from speechbrain_ext.utils.errors import UserError, is_whole

BLOCK = 64
"""Frames per block of the causal form."""
RELU_FLOOR = 1e-3
"""Added to ReLU features, so that no denominator is zero; the value of Lingvo's Performer."""
KERNELS = ("softmax", "relu")


def orthogonal_gaussian(rows: int, size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Rows that are each standard Gaussian, and orthogonal to one another in blocks of ``size``.

    Arguments
    ---------
    rows : int
        Number of rows.
    size : int
        Their length.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    torch.Tensor
        (rows, size) float32.

    Example
    -------
    >>> w = orthogonal_gaussian(6, 4)
    >>> torch.allclose(w[0] @ w[1], torch.tensor(0.0), atol=1e-5)
    True
    """
    blocks = -(-rows // size)
    directions, triangle = torch.linalg.qr(torch.randn(blocks, size, size, generator=generator, dtype=torch.float32))
    directions = directions * triangle.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)  # QR alone prefers some directions
    norms = torch.randn(blocks * size, size, generator=generator, dtype=torch.float32).norm(dim=1, keepdim=True)
    return (directions.transpose(1, 2).flatten(0, 1) * norms)[:rows]


@torch.no_grad()
def redraw_features(module: nn.Module, draw: int) -> None:
    """Draw new random features for training, in all :class:`RandomFeatures` inside. Evaluation keeps its features.

    The same number gives the same features in every process and in every resumed run. The features of evaluation do not change,
    so averages of checkpoints are valid.

    Arguments
    ---------
    module : torch.nn.Module
        Any.
    draw : int
        Number of the draw.

    Example
    -------
    >>> attention = PerformerAttention(16, 2, kernel="softmax")
    >>> redraw_features(attention, 1)
    >>> torch.equal(attention.features.training_projection, attention.features.projection)
    False
    """
    generator = torch.Generator().manual_seed(draw)
    for part in module.modules():
        if isinstance(part, RandomFeatures) and part.projection is not None:
            drawn = orthogonal_gaussian(*part.projection.shape, generator)
            part.training_projection = drawn.to(part.projection)


class RandomFeatures(nn.Module):
    """Features of queries and keys.

    Arguments
    ---------
    head_size : int
        Width e of queries and keys.
    kernel : str
        "softmax" or "relu", see the module.
    features : int
        Number m of random features; 0 (relu only) = no random projection.

    Raises
    ------
    ValueError
        If the kernel is unknown, or does not support the number of features or the head size.

    Example
    -------
    >>> query, key = RandomFeatures(8, "softmax", 32)(torch.rand(2, 5, 8), torch.rand(2, 5, 8))
    >>> query.shape, bool((key > 0).all())
    (torch.Size([2, 5, 32]), True)
    """

    def __init__(self, head_size: int, kernel: str, features: int):
        super().__init__()
        if kernel not in KERNELS:
            raise UserError(f"Unknown kernel '{kernel}' of Performer attention; the known ones are: {', '.join(KERNELS)}.")
        if kernel == "softmax" and head_size > 128:
            raise UserError(
                f"The head size (d_model / nhead) is {head_size}; softmax features exceed float32's range above 128: "
                "give more heads, or the relu kernel."
            )
        least = int(kernel == "softmax")
        if not is_whole(features, least):
            raise UserError(f"features is {features!r}; the {kernel} kernel needs a whole number of at least {least}.")
        self.kernel = kernel
        self.size = features or head_size
        projection = orthogonal_gaussian(features, head_size).to(torch.get_default_dtype()) if features else None
        self.register_buffer("projection", projection)
        self.register_buffer("training_projection", None, persistent=False)

    def forward(self, query, key):
        """(..., e) each to (..., m) each, float32 or better."""
        query, key = at_least_float32(query), at_least_float32(key)
        projection = self.projection
        if self.training and self.training_projection is not None:
            projection = self.training_projection
        if projection is not None:
            projection = projection.to(query.dtype)
            scale = query.shape[-1] ** (-0.25 if self.kernel == "softmax" else -0.5)
            weight = projection * scale
            query, projected = F.linear(query, weight), F.linear(key, weight)
        if self.kernel == "relu":
            key = key if projection is None else projected
            return query.relu() + RELU_FLOOR, key.relu() + RELU_FLOOR
        half_norms = 0.5 * projection.square().sum(1)
        head_size = key.shape[-1]
        query = query + half_norms
        key_norms = key.square().sum(-1, keepdim=True) * (0.5 * head_size**-0.5)
        # exp(40) summed over hours is far below float32's maximum
        return (query - query.detach().amax(-1, keepdim=True)).exp(), (
            projected - key_norms - (half_norms - min(0.5 * head_size, 40.0))
        ).exp()


class PerformerAttention(nn.Module):
    """Multi-head Performer attention, with the methods of :class:`speechbrain_ext.lobes.attention.SelfAttention`.

    Arguments
    ---------
    d_model : int
        Width.
    nhead : int
        Number of heads.
    dropout : float
        Dropout on the output. Softmax attention applies it to attention probabilities, which do not exist here.
    kernel : str
        "softmax" or "relu", see the module.
    features : int, optional
        Number m of random features per head; 0 (relu only) = no random projection, m = head size. By default 0 for relu, and
        twice the head size for softmax.
    causal : bool
        Whether a frame sees no later frame, in full context and inside its chunk.

    Raises
    ------
    ValueError
        If the width is not a multiple of the number of heads, or the kernel is unknown.

    Example
    -------
    >>> attention = PerformerAttention(32, 4)
    >>> x = torch.rand(2, 10, 32)
    >>> attention.mix(x, attention.prepare(x, None, None)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dropout: float = 0.0,
        kernel: str = "relu",
        features: int | None = None,
        causal: bool = False,
    ):
        super().__init__()
        if d_model < 1 or nhead < 1 or d_model % nhead:
            raise UserError(f"d_model is {d_model}; give a positive multiple of nhead ({nhead}).")
        head_size = d_model // nhead
        if features is None:
            features = 2 * head_size if kernel == "softmax" else 0
        self.nhead = nhead
        self.causal = causal
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.features = RandomFeatures(head_size, kernel, features)
        self.out = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)
        for projection in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(projection)
        nn.init.zeros_(self.qkv.bias)

    @property
    def branch_end(self) -> nn.Module:
        """The last layer with weights."""
        return self.out

    def prepare(self, x, mask, config: DynChunkTrainConfig | None):
        """Return the values that all layers share in one forward: (padding mask, chunk setting)."""
        return mask, config

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
        mask, config = shared
        query, key, value = self._project(x, mask)
        with full_precision(x):
            query, key = self.features(query, key)
            if mask is not None:
                key = key.masked_fill(mask[:, None, :, None], 0.0)
            if config is None and not self.causal:
                y = query @ (key.transpose(-1, -2) @ value)
            else:
                y = _attend_in_blocks(query, key, value, config, self.causal)
        return self._finish(y, x.dtype, mask)

    def initial_state(self, config: DynChunkTrainConfig) -> ChunkSums:
        """The state before the first chunk."""
        return ChunkSums(config.left_context_size)

    def prepare_stream(self, x, state):
        """Return None: layers share nothing."""

    def stream(self, x, state: ChunkSums, shared):
        """Attend from one chunk over the frames before it and itself, and update the state.

        Arguments
        ---------
        x : torch.Tensor
            (B, C, D).
        state : ChunkSums
            Updated in place.
        shared
            Not needed.

        Returns
        -------
        torch.Tensor
            (B, C, D).
        """
        query, key, value = self._project(x, None)
        with full_precision(x):
            query, key = self.features(query, key)
            now = key.transpose(-1, -2) @ value
            if self.causal:
                y = query @ state.before(now) + self._attend_to_past(query, key, value)
            else:
                y = query @ state.add(now)
        return self._finish(y, x.dtype, None)

    def _project(self, x, mask):
        """Query and key (B, heads, T, e), and value with a one appended (B, heads, T, e + 1)."""
        query, key, value = project(self.qkv, x, mask).unflatten(-1, (3, self.nhead, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, F.pad(at_least_float32(value), (0, 1), value=1.0)

    def _attend_to_past(self, query, key, value):
        """Causal attention inside one chunk."""
        if not torch.compiler.is_exporting():
            return _attend_in_blocks(query, key, value, None, True)
        # A graph for any length would fill blocks with zeros: for chunks, blocks then cost more than they save.
        position = torch.arange(query.shape[2], device=query.device)
        return _attend_inside(query, key, value, position > position.unsqueeze(1))

    def _finish(self, y, dtype, mask):
        """From numerators and denominators (B, heads, T, e + 1) to the output (B, T, D)."""
        # Both are zero for a frame that sees only padding, and for one whose keys all underflow in float32.
        total = y[..., -1:]
        y = y[..., :-1] / total.masked_fill(total < 1e-30, float("inf"))
        return self.dropout(project(self.out, y.transpose(1, 2).flatten(2).to(dtype), mask))


def _attend_inside(query, key, value, blocked):
    """Attention with all weights computed, and those of blocked keys set to zero."""
    return (query @ key.transpose(-1, -2)).masked_fill(blocked, 0.0) @ value


def _attend_in_blocks(query, key, value, config, causal):
    """phi(q)' S for the frames that each query sees: (B, H, T, m) twice and (B, H, T, e + 1) to (B, H, T, e + 1).

    A block is a number of whole chunks. A query sees up to three parts: a sum over the frames before the block that the block's
    last chunk sees; frames of the block itself; and, with a limited left context, older frames that the block's last chunk does
    not see any more. The third part comes from the same block of keys and values, moved right by the left context and a chunk.
    Frames that the last chunk does not see any more are subtracted from the sum: the same float64 numbers that were added, so
    nothing of them remains. With a limited left context a causal block is at least as long as a chunk.
    """
    size, left = (1, None) if config is None else (config.chunk_size, config.left_context_size)
    if causal and left is None:
        size = 1  # then chunks change nothing
    frames = query.shape[2]
    compiling = torch.compiler.is_compiling()
    if not compiling:
        size = min(size, frames)
    chunks = math.ceil(BLOCK / size)
    if left is not None:
        chunks = min(chunks, left + 1)
    if not compiling:
        chunks = min(chunks, math.ceil(frames / size))
    block = chunks * size
    # A graph for any length needs more than one block, as broadcasting is another operation. A block of zeros changes nothing.
    count = frames // block + 2 if compiling else math.ceil(frames / block)
    rest = count * block - frames
    alone = not causal and chunks == 1  # a block is one chunk, which sees all its frames

    def inside():
        """(block, block) bool: frames of a block that a query must not see, and the same for the block of older frames."""
        position = torch.arange(block, device=query.device)
        chunk = position // size
        return position > position.unsqueeze(1) if causal else chunk > chunk.unsqueeze(1), chunk <= chunk.unsqueeze(1)

    if count == 1 and not alone and not rest:  # all visible frames lie in the block
        return _attend_inside(query, key, value, inside()[0])

    def cut(tensor, shift=0):
        """(B, H, T, n) to (B H blocks, block, n)."""
        shift = min(shift, frames + rest)
        return F.pad(tensor, (0, 0, shift, rest))[:, :, : frames + rest].reshape(-1, block, tensor.shape[3])

    def sums(start, end):
        """Sums over frames ``start`` to ``end`` of each block, (B, H, blocks, m, e + 1)."""
        each = torch.bmm(keys[:, start:end].transpose(1, 2), values[:, start:end])
        return widest(each.unflatten(0, (*query.shape[:2], -1)))

    def later(tensor, blocks):
        """Sums moved right by some blocks, zeros first."""
        blocks = min(blocks, count)
        return F.pad(tensor, (0, 0, 0, 0, blocks, -blocks))

    queries, keys, values = cut(query), cut(key), cut(value)
    if left == 0:
        seen = sums(0, block) * alone
    elif left is None:
        seen = sums(0, block).cumsum(2)
        seen = seen if alone else later(seen, 1)
    else:
        # The visible frames begin inside a block: each block is summed in two parts
        visible = (left + 1) * size
        blocks, cut_off = visible // block, visible % block  # torch.compile does not know divmod of symbolic numbers
        first = sums(0, block - cut_off)
        running = (first + sums(block - cut_off, block) if cut_off else first).cumsum(2)
        seen = (running if alone else later(running, 1)) - later(running, blocks + 1) - later(first, blocks)
        if not alone:
            old_keys, old_values = (cut(tensor, visible) for tensor in (key, value))
    y = torch.bmm(queries, seen.to(query.dtype).flatten(0, 2))
    if not alone:
        future, gone = inside()
        y = torch.baddbmm(y, torch.bmm(queries, keys.transpose(1, 2)).masked_fill(future, 0.0), values)
        if left and chunks > 1:
            y = torch.baddbmm(y, torch.bmm(queries, old_keys.transpose(1, 2)).masked_fill(gone, 0.0), old_values)
    return F.pad(y.reshape(*query.shape[:2], -1, value.shape[3]), (0, 0, 0, -rest))
