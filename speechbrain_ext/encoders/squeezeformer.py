"""Squeezeformer (Kim et al. 2022, https://arxiv.org/abs/2206.00888), and the authors' code for details that it leaves open.

A block is attention, feed-forward, convolution, feed-forward, each on a residual of weight one with a learned scale before it and
a LayerNorm after it. The middle blocks run at half the frame rate, in a Temporal U-Net. The paper's depthwise-separable
subsampling is :class:`speechbrain_ext.lobes.subsampling.DepthwiseSubsampling`.
"""

from dataclasses import dataclass

from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.encoders._base import Encoder, LayerState, choose_size
from speechbrain_ext.lobes.attention import RelativeSelfAttention
from speechbrain_ext.lobes.convolution import SwishConvolutionModule
from speechbrain_ext.lobes.dropout import Dropout
from speechbrain_ext.lobes.feedforward import ScaledFeedForward
from speechbrain_ext.lobes.fusible import ScaledLinear
from speechbrain_ext.lobes.temporal_unet import nest
from speechbrain_ext.registry import register_encoder


@dataclass(frozen=True)
class Size:
    """A published size, with its training settings."""

    num_layers: int
    d_model: int
    nhead: int
    lr: float
    """Peak learning rate, from the header of NeMo's recipe, which follows the paper."""
    time_masks: int
    """Number of SpecAugment's time masks, from the authors' configuration files."""

    @property
    def d_ffn(self) -> int:
        """Width of the feed-forward modules' hidden layer."""
        return 4 * self.d_model


SIZES = {
    "xs": Size(16, 144, 4, 2e-3, 5),
    "s": Size(18, 196, 4, 2e-3, 5),
    "sm": Size(16, 256, 4, 1.5e-3, 5),
    "m": Size(20, 324, 4, 1.5e-3, 7),
    "ml": Size(18, 512, 8, 1e-3, 10),
    "l": Size(22, 640, 8, 5e-4, 10),
}


class SqueezeformerLayer(nn.Module):
    """One Squeezeformer block.

    Arguments
    ---------
    d_model : int
        Width.
    nhead : int
        Number of attention heads.
    d_ffn : int
        Width of the feed-forward modules' hidden layer.
    dropout : float
        Dropout on the output of every module, and in the feed-forward modules; none on the attention probabilities, as in the
        authors' code.
    kernel_size : int
        Kernel of the depthwise convolution, in frames.
    eps : float
        Epsilon of LayerNorm and BatchNorm.

    Example
    -------
    >>> import torch
    >>> layer = SqueezeformerLayer(16, 2, 64)
    >>> x = torch.rand(2, 10, 16)
    >>> layer(x, layer.prepare(x, None, None)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(self, d_model, nhead, d_ffn, dropout: float = 0.0, kernel_size: int = 31, eps: float = 1e-5):
        super().__init__()
        self.mixer = RelativeSelfAttention(d_model, nhead)
        self.mixer.qkv = ScaledLinear(d_model, 3 * d_model)
        self.dropout = Dropout(dropout)
        self.mixer_norm = nn.LayerNorm(d_model, eps)
        self.ffn1 = ScaledFeedForward(d_model, d_ffn, dropout)
        self.ffn1_norm = nn.LayerNorm(d_model, eps)
        self.convolution = SwishConvolutionModule(d_model, kernel_size, dropout, eps)
        self.convolution_norm = nn.LayerNorm(d_model, eps)
        self.ffn2 = ScaledFeedForward(d_model, d_ffn, dropout)
        self.ffn2_norm = nn.LayerNorm(d_model, eps)

    def prepare(self, x, mask, config):
        """Compute the position table and mask of all blocks at one rate."""
        return self.mixer.prepare(x, mask, config)

    def forward(self, x, shared, mask=None, config: DynChunkTrainConfig | None = None):
        """(B, T, D) to (B, T, D), as :mod:`speechbrain_ext.lobes.stack` describes it."""
        x = self.mixer_norm(x + self.dropout(self.mixer.mix(x, shared)))
        x = self.ffn1_norm(x + self.ffn1(x))
        x = self.convolution_norm(x + self.convolution(x, mask, config))
        return self.ffn2_norm(x + self.ffn2(x))

    def initial_state(self, config: DynChunkTrainConfig) -> LayerState:
        """The state before the first chunk."""
        return LayerState(self.mixer.initial_state(config))

    def prepare_stream(self, x, state: LayerState):
        """Compute the position table of all blocks at one rate."""
        return self.mixer.prepare_stream(x, state.mixer)

    def stream(self, x, state: LayerState, shared):
        """One chunk (B, C, D) to (B, C, D); updates the state."""
        x = self.mixer_norm(x + self.mixer.stream(x, state.mixer, shared))
        x = self.ffn1_norm(x + self.ffn1(x))
        y, state.convolution = self.convolution.stream(x, state.convolution)
        x = self.convolution_norm(x + y)
        return self.ffn2_norm(x + self.ffn2(x))


@register_encoder("squeezeformer")
class SqueezeformerEncoder(Encoder):
    """Squeezeformer encoder.

    Chunks must have an even number of frames (a multiple of 2^n with n nested reductions). The streaming state per block is the
    attention's cache, 2 M d numbers for M cached frames at the block's own rate, and (K - 1) / 2 frames of width 2 d of the
    convolution. The reduction keeps three frames.

    Arguments
    ---------
    d_model, nhead, num_layers : int, optional
        Width, attention heads and number of blocks; by default those of the size.
    d_ffn : int, optional
        Width of the feed-forward modules' hidden layer; 4 d_model by default.
    dropout : float
        Dropout everywhere but on the attention probabilities.
    size : str, optional
        A published size: xs (the default if no other key gives the size), s, sm, m, ml or l.
    kernel_size : int
        Kernel of the depthwise convolutions, in frames.
    reduce_before, recover_before : int or list of int, optional
        Indices of the blocks before which the frame rate halves and doubles again, see
        :func:`speechbrain_ext.lobes.temporal_unet.nest`. By default, as published, one reduction before block L/2 - 1 of L and
        the recovery before the last block; a single block has none. ``[]`` for none.
    padding : str
        Padding of the time reduction: ``symmetric``, or ``right`` for models of the authors' code, see
        :class:`speechbrain_ext.lobes.temporal_unet.TemporalUNet`.
    eps : float
        Epsilon of LayerNorm and BatchNorm; 1e-3 in the authors' code, as in Keras.

    Raises
    ------
    ValueError
        If a size is impossible, unknown, or contradicts the other keys.

    Example
    -------
    >>> import torch
    >>> encoder = SqueezeformerEncoder(d_model=32, nhead=4, num_layers=4)
    >>> encoder(torch.rand(2, 50, 32))[0].shape
    torch.Size([2, 50, 32])
    >>> SqueezeformerEncoder(size="sm").d_model
    256
    """

    sizes = SIZES

    def __init__(
        self,
        d_model: int | None = None,
        nhead: int | None = None,
        num_layers: int | None = None,
        d_ffn: int | None = None,
        dropout: float = 0.1,
        size: str | None = None,
        kernel_size: int = 31,
        reduce_before: int | list | None = None,
        recover_before: int | list | None = None,
        padding: str = "symmetric",
        eps: float = 1e-5,
    ):
        given = {"d_model": d_model, "nhead": nhead, "num_layers": num_layers, "d_ffn": d_ffn}
        d_model, nhead, num_layers, _ = choose_size("Squeezeformer", SIZES, size, "xs", given)
        d_ffn = 4 * d_model if d_ffn is None else d_ffn
        if reduce_before is None and recover_before is None and num_layers > 1:
            reduce_before, recover_before = max(0, num_layers // 2 - 1), num_layers - 1
        layers = [SqueezeformerLayer(d_model, nhead, d_ffn, dropout, kernel_size, eps) for _ in range(num_layers)]
        super().__init__(d_model, nest(layers, d_model, _indices(reduce_before), _indices(recover_before), padding))
        self.norm = nn.LayerNorm(d_model, eps)
        self.streamable = padding == "symmetric"

    def before_layers(self, x):
        """Scale by sqrt(d), and LayerNorm."""
        return self.norm(self.d_model**0.5 * x)


def _indices(value):
    return [] if value is None else list(value) if hasattr(value, "__iter__") else [value]
