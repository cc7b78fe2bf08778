"""Subsampling of 10 ms feature frames to 40 ms encoder frames, padding-exact.

All classes halve the rate twice with kernels of 3 padded by 1, hence ceil(T / 4) frames. Output frame j of a halving sees the
inputs 2j - 1 to 2j + 1, so a chunk of a multiple of 4 feature frames never looks past its own end.

All tensors are (B, T, F, C), channels last. In this layout convolutions of few bins and many channels are fast, above all
depthwise and bfloat16 ones, and the next linear layer needs no copy of its input.
"""

import torch
import torch.nn.functional as F
from torch import nn

from speechbrain_ext.lobes.activations import ReLU
from speechbrain_ext.lobes.convolution import channels_last_conv
from speechbrain_ext.lobes.dropout import Dropout
from speechbrain_ext.lobes.fusible import MaskedBatchNorm
from speechbrain_ext.lobes.masks import absolute_lengths, check_lengths, padding_mask
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.errors import UserError, is_whole

PIECE, MIN_PIECE = 800, 128
"""Feature frames that a CPU subsamples at once without a gradient: of all utterances together, and of each at least. Larger
pieces exceed the caches, and the system clears their memory first: up to four times as long (160 s: 131 ms, in pieces 35 ms)."""


class _Halving(nn.Conv2d):
    """Convolution 3 x 3 of stride 2 on (B, T, F, C), padded by one on both sides, or by one on the right."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, padding: str = "symmetric", bias: bool = True):
        super().__init__(in_channels, out_channels, 3, stride=2, padding=int(padding == "symmetric"), groups=groups, bias=bias)

    def forward(self, x):
        before = self.padding[0]
        if self.in_channels == 1:
            # One matrix product with the 9 inputs of each output; the convolution takes 1.5 times as long, in bfloat16 6 times.
            x = F.pad(x.squeeze(-1), (before, 1, before, 1)).unfold(1, 3, 2).unfold(2, 3, 2).flatten(3)
            return F.linear(x, self.weight.flatten(1), self.bias)
        if before == 0:
            x = F.pad(x, (0, 0, 0, 1, 0, 1))
        return channels_last_conv(x, self.weight, self.bias, 2, self.padding, self.groups)


class _Subsampling(nn.Module):
    """Two halvings, with lengths; subclasses build ``stages`` of layers on (B, T, F, C)."""

    factor = 4
    is_cut = False
    """Whether up to three feature frames at the end of the batch give no frame."""

    def forward(self, x, lengths=None):
        """Subsample.

        Arguments
        ---------
        x : torch.Tensor
            (B, T, F) features.
        lengths : torch.Tensor, optional
            (B,) relative lengths; without them all frames are valid.

        Returns
        -------
        tuple
            (B, ceil(T / 4), ``output_size``), bin by bin, and the relative lengths of these frames.

        Raises
        ------
        UserError
            If the lengths are impossible.
        """
        frames = self._count(lengths, x)
        pieces = [self._subsample(*piece) for piece in self._pieces(x, frames)]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return y, None if frames is None else (frames + self.factor - 1) // self.factor / y.shape[1]

    @staticmethod
    def _count(lengths, x):
        """Relative lengths as numbers of frames; None stays."""
        if lengths is None:
            return None
        check_lengths(lengths, x.shape[0])
        return absolute_lengths(lengths, x.shape[1])

    def _pieces(self, x, frames):
        """Pieces: input (B, T', F), valid frames (B,) or None, and number of output frames to leave out."""
        size = x.shape[1]
        whole = torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != "cpu"
        if not whole and not any(module.training for module in self.modules()):  # training needs statistics of whole batches
            size = max(MIN_PIECE, PIECE // max(1, len(x)) // self.factor * self.factor)
        if size >= x.shape[1]:
            return [(x, frames, 0)]
        pieces = []
        for start in range(0, x.shape[1], size):
            # Four more frames at the left give one more output frame, the only wrong one: it lacks left neighbours.
            before = min(start, self.factor)
            piece = x[:, start - before : start + size]
            valid = None if frames is None else (frames - start + before).clamp(0, piece.shape[1])
            pieces.append((piece, valid, before // self.factor))
        return pieces

    def _subsample(self, x, frames, wrong):
        x = x.unsqueeze(-1)
        for stage in self.stages:
            if frames is not None:
                # Zeros before each convolution, as an utterance alone gets from the convolution's own zero padding.
                x = x.masked_fill(padding_mask(frames, x.shape[1])[:, :, None, None], 0.0)
                frames = (frames + 1) // 2
            x = self._run(stage, x, frames)
        return x.flatten(2)[:, wrong:]

    def stream(self, x, before=None):
        """Subsample one chunk.

        Arguments
        ---------
        x : torch.Tensor
            (B, C, F) features; C is a multiple of 4, except in the last chunk.
        before : torch.Tensor, optional
            (B, 4, F) from the last call; None or (B, 0, F) before the first chunk.

        Returns
        -------
        tuple
            (B, ceil(C / 4), ``output_size``), and ``before`` of the next call.
        """
        # Four more frames at the left give one more output frame, the only wrong one: it lacks left neighbours.
        wrong = 0 if before is None else before.shape[1] // self.factor
        y, _ = self(x) if before is None else self(torch.cat((before, x), 1))
        if torch.compiler.is_exporting():
            # The exporter cannot infer the length of a slice whose ends depend on two lengths. The padded zeros are never used:
            # no chunk follows a chunk of fewer than four frames.
            valid = torch.arange((x.shape[1] - 1) // self.factor + 1, device=x.device)
            return y[:, wrong + valid], F.pad(x, (0, 0, self.factor, 0))[:, x.shape[1] :]
        return y[:, wrong:], x[:, -self.factor :].clone()  # the caller may use the memory again

    def _run(self, stage, x, frames):
        return stage(x)


def _check_channels(channels):
    """Refuse another number of stages than two: each halves the frames."""
    if not isinstance(channels, (list, tuple)) or len(channels) != 2 or not all(is_whole(width, 1) for width in channels):
        raise UserError(f"channels is {channels!r}; give two whole numbers of at least 1.")


@loadable
class ConvolutionSubsampling(_Subsampling):
    """Regular 4x convolution: twice Conv2d 3 x 3 of stride 2, LayerNorm, LeakyReLU, dropout.

    That of SpeechBrain's published Transformer and (Hyper)Conformer recipes (``ConvolutionFrontEnd`` with two blocks), with the
    same parameters, but padding-exact: zeros instead of reflection at the ends, and masks between the layers.

    Arguments
    ---------
    input_size : int
        Number of feature bins F.
    channels : tuple of int
        Channels of both convolutions.
    dropout : float
        Dropout after each block.

    Example
    -------
    >>> import torch
    >>> features = torch.rand(2, 101, 80)
    >>> out, lengths = ConvolutionSubsampling()(features, torch.tensor([1.0, 0.5]))
    >>> out.shape
    torch.Size([2, 26, 640])
    """

    def __init__(self, input_size: int = 80, channels: tuple = (64, 32), dropout: float = 0.1):
        super().__init__()
        _check_channels(channels)
        stages, size, previous = [], input_size, 1
        for width in channels:
            size = (size + 1) // 2
            norm = nn.LayerNorm((size, width))  # over bins and channels of a frame
            stages.append(nn.Sequential(_Halving(previous, width), norm, nn.LeakyReLU(inplace=True), Dropout(dropout)))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.input_size = input_size
        self.output_size = size * previous


@loadable
class FusibleSubsampling(_Subsampling):
    """Regular 4x convolution: twice Conv2d 3 x 3 of stride 2, BatchNorm, ReLU; the BatchNorm folds into the convolution.

    The FusionFormer's version of :class:`ConvolutionSubsampling`.

    Arguments
    ---------
    input_size : int
        Number of feature bins F.
    channels : tuple of int
        Channels of both convolutions.
    momentum, eps : float
        Keys of the BatchNorm.
    fused : bool
        Whether to build it fused, for weights that were saved after :meth:`fuse_`.

    Example
    -------
    >>> import torch
    >>> features = torch.rand(2, 101, 80)
    >>> out, lengths = FusibleSubsampling()(features, torch.tensor([1.0, 0.5]))
    >>> out.shape
    torch.Size([2, 26, 640])
    """

    def __init__(
        self, input_size: int = 80, channels: tuple = (64, 32), momentum: float = 0.01, eps: float = 1e-3, fused: bool = False
    ):
        super().__init__()
        _check_channels(channels)
        stages, size, previous = [], input_size, 1
        for width in channels:
            size = (size + 1) // 2
            stages.append(
                nn.ModuleDict(
                    {
                        "convolution": _Halving(previous, width, bias=False),
                        "norm": MaskedBatchNorm(width, momentum, eps),
                        "activation": ReLU(),
                    }
                )
            )
            previous = width
        self.stages = nn.ModuleList(stages)
        self.input_size = input_size
        self.output_size = size * previous
        if fused:
            self.fuse_()

    def _run(self, stage, x, frames):
        x = stage["convolution"](x)  # (B, T', F', C)
        if "norm" in stage:
            mask = None if frames is None else padding_mask(frames, x.shape[1]).repeat_interleave(x.shape[2], dim=1)
            x = stage["norm"](x.flatten(1, 2), mask).view_as(x)
        return stage["activation"](x)

    def fuse_(self):
        """Fold the BatchNorms into the convolutions, in place; a second call changes nothing.

        Returns
        -------
        FusibleSubsampling
            Itself.
        """
        for stage in self.stages:
            if "norm" in stage:
                stage.pop("norm").fold_into_(stage["convolution"])
        return self


@loadable
class DepthwiseSubsampling(_Subsampling):
    """Depthwise-separable 4x convolution: Conv2d 3 x 3 of stride 2, ReLU, depthwise 3 x 3 of stride 2, pointwise, ReLU.

    Source: Kim et al. 2022 (Squeezeformer, https://arxiv.org/abs/2206.00888), section 3.2.2.

    Arguments
    ---------
    input_size : int
        Number of feature bins F.
    channels : int
        Channels of all layers.
    padding : str
        ``symmetric``, or ``right`` for models of the authors' code only. ``right`` gives floor(T / 4) frames and needs zeros
        after an utterance's end; its last frames depend on whether the batch has longer utterances.

    Raises
    ------
    ValueError
        If the padding is unknown; in ``forward``, if there are fewer than 4 frames with the padding ``right``.

    Example
    -------
    >>> import torch
    >>> out, _ = DepthwiseSubsampling(80, 16)(torch.rand(2, 101, 80))
    >>> out.shape
    torch.Size([2, 26, 320])
    """

    def __init__(self, input_size: int = 80, channels: int = 144, padding: str = "symmetric"):
        super().__init__()
        if padding not in ("symmetric", "right"):
            raise UserError(f"The padding is '{padding}'; the known ones are: symmetric, right.")
        self.padding, self.is_cut = padding, padding == "right"
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_Halving(1, channels, padding=padding), ReLU()),
                nn.Sequential(
                    _Halving(channels, channels, groups=channels, padding=padding),
                    nn.Linear(channels, channels),
                    ReLU(),
                ),
            ]
        )
        self.input_size = input_size
        self.output_size = channels * (input_size // 2 // 2 if padding == "right" else (input_size + 3) // 4)

    def stream(self, x, before=None):
        """See :class:`ConvolutionSubsampling`; not with the padding ``right``, which looks into the next chunk."""
        if self.padding != "symmetric":
            raise UserError(f"Subsampling with padding '{self.padding}' does not stream; train a model with padding 'symmetric'.")
        return super().stream(x, before)

    def forward(self, x, lengths=None):
        """See :class:`ConvolutionSubsampling`."""
        if self.padding == "symmetric":
            return super().forward(x, lengths)
        if x.shape[1] < 4:
            raise UserError(f"Padding 'right' gives no frame for {x.shape[1]} feature frames; give at least 4.")
        frames = self._count(lengths, x)
        x = x.unsqueeze(-1)
        for stage in self.stages:  # no masks, as in the authors' code
            x = stage(x)
            frames = None if frames is None else (frames // 2 + 1).clamp(max=x.shape[1])
        return x.flatten(2), None if frames is None else frames / x.shape[1]
