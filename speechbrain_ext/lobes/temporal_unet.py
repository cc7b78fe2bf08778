"""The Temporal U-Net of the Squeezeformer (Kim et al. 2022, https://arxiv.org/abs/2206.00888, section 3.1.1).

Neighbouring frames of the middle blocks are alike. These blocks run at half the frame rate, where a block costs less than half.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.lobes.convolution import depthwise_conv
from speechbrain_ext.lobes.masks import zero_padding
from speechbrain_ext.lobes.stack import Stack
from speechbrain_ext.utils.errors import UserError, is_whole

KERNEL = 5
"""Kernel of the reduction, in frames: 5 in the authors' code and checkpoints (3 in the paper's text)."""


@dataclass
class TemporalUNetState:
    """State of a Temporal U-Net between chunks."""

    layers: list
    """The states of the blocks inside, at their own rate."""
    reduction: torch.Tensor | None = None
    """(B, 3, D), the last inputs of the reduction."""


class TemporalUNet(nn.Module):
    """Runs a stack of blocks at half the frame rate. It is itself a block: U-Nets can be nested, and used in any encoder.

    A depthwise convolution (kernel 5, stride 2) and a pointwise one halve the input. The output of the blocks goes through a
    linear layer, is repeated twice, cut to length and added to the input.

    A chunk must have an even number of frames. The streaming state is three frames of the reduction, and the states of the blocks
    at half the rate.

    Arguments
    ---------
    layers : iterable of torch.nn.Module
        Blocks as :mod:`speechbrain_ext.lobes.stack` describes them.
    d_model : int
        Width.
    padding : str
        ``symmetric``: reduced frame i sees the frames 2 i - 3 to 2 i + 1, as in NeMo. Padding has no influence, and no frame
        after the pair 2 i, 2 i + 1 is needed. ``right``, for models of the authors' code: frame i sees the frames 2 i to
        2 i + 4, and a zero frame follows an odd number of frames. It looks ahead, and does not support chunks. The output for an
        utterance with an odd number of frames depends on whether the batch has longer ones.

    Raises
    ------
    ValueError
        If the padding is unknown; in ``forward``, if there is a chunk setting with the padding ``right``.

    Example
    -------
    >>> from speechbrain_ext.registry import build_encoder
    >>> encoder = build_encoder("conformer", d_model=16, nhead=2, num_layers=6, d_ffn=32)
    >>> encoder.layers = nest(encoder.layers, 16, reduce_before=[2], recover_before=[5])  # 2 blocks, 3 at half rate, 1
    >>> encoder(torch.rand(2, 11, 16))[0].shape
    torch.Size([2, 11, 16])
    """

    def __init__(self, layers, d_model: int, padding: str = "symmetric"):
        super().__init__()
        if padding not in ("symmetric", "right"):
            raise UserError(f"The padding is '{padding}'; the known ones are: symmetric, right.")
        self.padding = padding
        self.layers = Stack(layers)
        self.reduction = nn.Conv1d(d_model, d_model, KERNEL, stride=2, groups=d_model)
        self.reduction_linear = nn.Linear(d_model, d_model)
        self.recovery = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.recovery.weight)  # the authors' choice
        nn.init.zeros_(self.recovery.bias)

    @property
    def branch_end(self) -> nn.Module:
        """The last layer with weights."""
        return self.recovery

    @property
    def chunk_multiple(self) -> int:
        """A chunk length must be a multiple of it, in frames of the input."""
        return 2 * self.layers.chunk_multiple

    def prepare(self, x, mask, config):
        """Return None: the blocks inside have another rate, and share their own values."""

    def forward(self, x, shared=None, mask=None, config: DynChunkTrainConfig | None = None):
        """Run the blocks.

        Arguments
        ---------
        x : torch.Tensor
            (B, T, D).
        shared
            Not needed.
        mask : torch.Tensor, optional
            (B, T) bool, True = padding.
        config : DynChunkTrainConfig, optional
            The chunk setting, in frames of the input.

        Returns
        -------
        torch.Tensor
            (B, T, D).
        """
        half = None if config is None else self._half(config)
        y = zero_padding(x, mask)
        if torch.compiler.is_exporting():
            # A graph for any length cannot treat one frame at half rate as a special case: add one more, as padding.
            y = F.pad(y, (0, 0, 0, 2))
            mask = F.pad(torch.zeros_like(x[..., 0], dtype=torch.bool) if mask is None else mask, (0, 2), value=True)
        if self.padding == "symmetric":
            y = self._reduce(F.pad(y, (0, 0, KERNEL - 2, 1)))
        else:
            y = self._reduce(F.pad(y, (0, 0, 0, KERNEL - 1)))
            whole = 2 * torch.arange(y.shape[1], device=x.device) + 1 < x.shape[1]
            y = y * whole.unsqueeze(-1)
        if mask is not None:
            mask = mask[:, 2 * torch.arange(y.shape[1], device=x.device)]
        return self._recover(self.layers(y, mask, half), x)

    def initial_state(self, config: DynChunkTrainConfig) -> TemporalUNetState:
        """The state before the first chunk."""
        return TemporalUNetState(self.layers.initial_state(self._half(config)))

    def prepare_stream(self, x, state: TemporalUNetState):
        """Return None, see :meth:`prepare`."""

    def stream(self, x, state: TemporalUNetState, shared=None):
        """One chunk (B, C, D) to (B, C, D), C even except in the last chunk; updates the state."""
        left = KERNEL - 2
        y = F.pad(x, (0, 0, left, 0)) if state.reduction is None else torch.cat((state.reduction, x), dim=1)
        state.reduction = y[:, -left:].clone()
        return self._recover(self.layers.stream(self._reduce(F.pad(y, (0, 0, 0, 1))), state.layers), x)

    def _half(self, config):
        """The chunk setting at half rate. The left context is counted in chunks, and does not change."""
        if self.padding == "right":
            raise UserError(
                "A Temporal U-Net with padding 'right' looks 3 frames past its chunk, so it neither streams nor trains in "
                "chunks; build it with padding 'symmetric'."
            )
        return DynChunkTrainConfig(config.chunk_size // 2, config.left_context_size)

    def _reduce(self, x):
        return self.reduction_linear(depthwise_conv(x, self.reduction.weight, self.reduction.bias, stride=2))

    def _recover(self, y, x):
        y = self.recovery(y)  # before repeating it, at half the cost
        frames = x.shape[1]
        if torch.compiler.is_exporting():  # the slice below would tie the graph to even lengths
            return x + y[:, torch.arange(frames, device=x.device) // 2]
        return x + y.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1, 2)[:, :frames]


def nest(layers, d_model: int, reduce_before=(), recover_before=(), padding: str = "symmetric") -> Stack:
    """Put ranges of blocks into Temporal U-Nets.

    Arguments
    ---------
    layers : iterable of torch.nn.Module
        The blocks.
    d_model : int
        Width.
    reduce_before : iterable of int
        Indices (from 0) of the blocks before which the rate halves.
    recover_before : iterable of int
        Indices of the blocks before which it doubles again; the number of blocks means after the last one. Each recovery ends
        the most recent reduction that is still open.
    padding : str
        See :class:`TemporalUNet`.

    Returns
    -------
    Stack

    Raises
    ------
    ValueError
        If a reduction is not recovered, a recovery has no reduction, or an index is out of range.

    Example
    -------
    >>> blocks = [nn.Identity() for _ in range(8)]
    >>> outer = nest(blocks, 4, reduce_before=[1, 3], recover_before=[5, 7])
    >>> [len(outer), len(outer[1].layers), len(outer[1].layers[2].layers)]
    [3, 5, 2]
    """
    layers, reduce_before, recover_before = list(layers), list(reduce_before), list(recover_before)
    known = f"reduce_before {reduce_before} and recover_before {recover_before} of {len(layers)} blocks"
    for index in (*reduce_before, *recover_before):
        if not is_whole(index, 0, len(layers)):
            raise UserError(f"There is no block {index!r}: {known}; give indices from 0 to {len(layers)}.")
    open_spans = [[]]
    for index in range(len(layers) + 1):
        for _ in range(recover_before.count(index)):
            if len(open_spans) == 1 or not open_spans[-1]:
                raise UserError(
                    f"The recovery before block {index} ends no block at half rate: {known}; reduce before an earlier block, or "
                    "leave it out."
                )
            span = open_spans.pop()
            open_spans[-1].append(TemporalUNet(span, d_model, padding))
        open_spans += [[] for _ in range(reduce_before.count(index))]
        open_spans[-1] += layers[index : index + 1]
    if len(open_spans) > 1:
        raise UserError(f"Not every reduction is recovered: {known}; give one index in recover_before for each.")
    return Stack(open_spans[0])


def block_names(num_layers: int, reduce_before=(), recover_before=()) -> list[str]:
    """The place that :func:`nest` gives each block, as a prefix of names in the state dict.

    Arguments
    ---------
    num_layers : int
        Number of blocks.
    reduce_before, recover_before : iterable of int
        As in :func:`nest`.

    Returns
    -------
    list of str

    Example
    -------
    >>> block_names(4, [1], [3])
    ['0', '1.layers.0', '1.layers.1', '2']
    """
    blocks = [nn.Identity() for _ in range(num_layers)]
    names = {module: name for name, module in nest(blocks, 1, reduce_before, recover_before).named_modules()}
    return [names[block] for block in blocks]
