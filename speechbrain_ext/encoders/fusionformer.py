"""FusionFormer (Song et al. 2022, https://arxiv.org/abs/2210.17079): a Conformer without normalisation at inference.

The paper replaces LayerNorm by a BatchNorm after every linear and convolution layer, and Swish and GLU by ReLU. For inference all
BatchNorms are folded into the weights. We worked from the paper's abstract; these decisions are ours:

* the Conformer's order, and half-weighted feed-forward modules;
* a first pointwise layer of width d, as no GLU halves it;
* one BatchNorm over queries, keys and values, which is the same as three;
* no BatchNorm after the projection of relative positions, whose input is no data, and none after TransformerASR's input layer;
* a last linear layer with a BatchNorm: the output has unit variance, as with the Conformer's LayerNorm;
* an initial gain of zero for the last BatchNorm of every residual branch;
* eps 1e-3, and statistics with a momentum of 0.01.
"""

from dataclasses import dataclass
from functools import partial

from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.encoders._base import Encoder, LayerState, check_sizes
from speechbrain_ext.lobes.activations import ReLU, Swish
from speechbrain_ext.lobes.attention import build_attention
from speechbrain_ext.lobes.convolution import DepthwiseModule
from speechbrain_ext.lobes.dropout import Dropout
from speechbrain_ext.lobes.fusible import MaskedBatchNorm, NormLinear, Unchanged, project
from speechbrain_ext.lobes.precision import autocasts
from speechbrain_ext.lobes.stack import Stack
from speechbrain_ext.registry import register_encoder
from speechbrain_ext.utils.errors import UserError


@dataclass(frozen=True)
class Variant:
    """Places of normalisation, and activations."""

    before: str | None
    """Norm before each module, between depthwise convolution and activation, and at the ends: layer, batch or None."""
    behind: bool
    """Whether a BatchNorm follows each linear and convolution layer."""
    relu: bool
    """Whether ReLU replaces Swish and GLU."""


VARIANTS = {
    "fusionformer": Variant(None, True, True),
    "batch_norm_behind_each": Variant(None, True, False),
    "batch_norm_in_place": Variant("batch", False, False),
    "layer_norm": Variant("layer", False, False),
    "no_norm": Variant(None, False, False),
}


class _LayerNorm(nn.LayerNorm):
    def forward(self, x, mask=None):
        return super().forward(x)


class _Parts:
    """Builds the layers of a variant."""

    def __init__(self, variant: Variant, momentum: float, eps: float):
        self.variant = variant
        self.batch_norm = partial(MaskedBatchNorm, momentum=momentum, eps=eps)
        self.norm_linear = partial(NormLinear, momentum=momentum, eps=eps)

    def before(self, size):
        """The module in the place of a Conformer's LayerNorm."""
        return {"layer": _LayerNorm, "batch": self.batch_norm, None: lambda size: Unchanged()}[self.variant.before](size)

    def linear(self, inputs, outputs, last=False):
        """A linear layer, with a BatchNorm if the variant has one; ``last`` = the last one of its residual branch."""
        if self.variant.behind:
            return self.norm_linear(inputs, outputs, zero_init=last)
        return nn.Linear(inputs, outputs)

    def activation(self):
        """The activation of feed-forward and convolution modules."""
        return ReLU() if self.variant.relu else Swish()


class FusionFeedForward(nn.Module):
    """Linear, activation, dropout, Linear, dropout, with the variant's normalisation; without the residual."""

    def __init__(self, parts: _Parts, d_model: int, d_ffn: int, dropout: float):
        super().__init__()
        self.norm = parts.before(d_model)
        self.linear1 = parts.linear(d_model, d_ffn)
        self.activation = parts.activation()
        self.linear2 = parts.linear(d_ffn, d_model, last=True)
        self.dropout = Dropout(dropout)

    @property
    def branch_end(self) -> nn.Module:
        """The last layer with weights."""
        return self.linear2

    def forward(self, x, mask=None):
        """(B, T, D) to (B, T, D)."""
        x = self.dropout(self.activation(project(self.linear1, self.norm(x, mask), mask)))
        return self.dropout(project(self.linear2, x, mask))


class FusionConvolution(DepthwiseModule):
    """Pointwise, activation or GLU, depthwise, activation, pointwise, dropout, with the variant's normalisation."""

    def __init__(self, parts: _Parts, d_model: int, kernel_size: int, dropout: float):
        super().__init__(kernel_size)
        relu, behind = parts.variant.relu, parts.variant.behind
        self.norm = parts.before(d_model)
        self.pointwise1 = parts.linear(d_model, d_model if relu else 2 * d_model)
        self.gate = parts.activation() if relu else nn.GLU(dim=-1)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model, bias=not behind)
        self.depthwise_norm = parts.batch_norm(d_model) if behind else parts.before(d_model)
        self.activation = parts.activation()
        self.pointwise2 = parts.linear(d_model, d_model, last=True)
        self.dropout = Dropout(dropout)

    def _before(self, x, mask):
        return self.gate(project(self.pointwise1, self.norm(x, mask), mask))

    def _after(self, x, mask):
        x = self.activation(self.depthwise_norm(x, mask))
        return self.dropout(project(self.pointwise2, x, mask))


class FusionFormerLayer(nn.Module):
    """One block: half a feed-forward module, attention, convolution and half a feed-forward module, each on a residual.

    Arguments
    ---------
    parts : _Parts
        Builds the layers.
    attention : SelfAttention
        From :mod:`speechbrain_ext.lobes.attention`; the variant's projections replace its own.
    d_model, d_ffn : int
        Widths.
    dropout : float
        Dropout on the output of every module and in the feed-forward modules.
    kernel_size : int
        Kernel of the depthwise convolution, in frames.
    """

    def __init__(self, parts, attention, d_model: int, d_ffn: int, dropout: float = 0.0, kernel_size: int = 31):
        super().__init__()
        self.ffn1 = FusionFeedForward(parts, d_model, d_ffn, dropout)
        self.mixer_norm = parts.before(d_model)
        self.mixer = attention
        if parts.variant.behind:
            attention.qkv = parts.linear(d_model, 3 * d_model)
            attention.out = parts.linear(d_model, d_model, last=True)
        self.dropout = Dropout(dropout)
        self.convolution = FusionConvolution(parts, d_model, kernel_size, dropout)
        self.ffn2 = FusionFeedForward(parts, d_model, d_ffn, dropout)
        self.norm = parts.before(d_model)

    def prepare(self, x, mask, config):
        """Compute the positions and masks of all blocks."""
        return self.mixer.prepare(x, mask, config)

    def forward(self, x, shared, mask=None, config: DynChunkTrainConfig | None = None):
        """(B, T, D) to (B, T, D), as :mod:`speechbrain_ext.lobes.stack` describes it."""
        x = x.add(self.ffn1(x, mask), alpha=0.5)
        x = x + self.dropout(self.mixer.mix(self.mixer_norm(x, mask), shared))
        x = x + self.convolution(x, mask, config)
        return self.norm(x.add(self.ffn2(x, mask), alpha=0.5), mask)

    def initial_state(self, config: DynChunkTrainConfig) -> LayerState:
        """The state before the first chunk."""
        return LayerState(self.mixer.initial_state(config))

    def prepare_stream(self, x, state: LayerState):
        """Compute the positions of all blocks."""
        return self.mixer.prepare_stream(x, state.mixer)

    def stream(self, x, state: LayerState, shared):
        """One chunk (B, C, D) to (B, C, D); updates the state."""
        x = x.add(self.ffn1(x), alpha=0.5)
        x = x + self.mixer.stream(self.mixer_norm(x), state.mixer, shared)
        y, state.convolution = self.convolution.stream(x, state.convolution)
        x = x + y
        return self.norm(x.add(self.ffn2(x), alpha=0.5))


@register_encoder("fusionformer")
class FusionFormerEncoder(Encoder):
    """FusionFormer encoder, and the variants that the paper compares it with.

    After :meth:`fuse_` it has no normalisation, and gives the same output in fewer and cheaper steps. Only the variants with a
    normalisation before the modules, "batch_norm_in_place" and "layer_norm", keep it. The streaming state per block is the
    attention's cache, 2 M d numbers for M cached frames, and (K - 1) / 2 frames of the convolution.

    Arguments
    ---------
    d_model : int
        Width.
    nhead : int
        Number of attention heads.
    num_layers : int
        Number of blocks.
    d_ffn : int
        Width of the feed-forward modules' hidden layer.
    dropout : float
        Dropout everywhere.
    kernel_size : int
        Kernel of the depthwise convolutions, in frames.
    attention_type : str
        "RoPEMHA" (rotary positions) or "RelPosMHAXL" (Transformer-XL relative positions), SpeechBrain's names.
    variant : str
        "fusionformer"; for comparison "batch_norm_behind_each" (the same with Swish and GLU), "batch_norm_in_place" (BatchNorm
        where the Conformer has LayerNorm), "no_norm", and "layer_norm" (the Conformer).
    momentum, eps : float
        Keys of the BatchNorms.
    fused : bool
        Whether to build it fused, for weights that were saved after :meth:`fuse_`.

    Raises
    ------
    ValueError
        If the variant or the attention type is unknown, or a size is impossible.

    Example
    -------
    >>> import torch
    >>> encoder = FusionFormerEncoder(d_model=32, nhead=4, num_layers=2, d_ffn=64).eval()
    >>> x = torch.rand(2, 50, 32)
    >>> before, _ = encoder(x)
    >>> torch.allclose(encoder.fuse_()(x)[0], before, atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int = 144,
        nhead: int = 8,
        num_layers: int = 10,
        d_ffn: int = 576,
        dropout: float = 0.1,
        kernel_size: int = 31,
        attention_type: str = "RoPEMHA",
        variant: str = "fusionformer",
        momentum: float = 0.01,
        eps: float = 1e-3,
        fused: bool = False,
    ):
        if not isinstance(variant, str) or variant not in VARIANTS:
            raise UserError(f"Unknown variant '{variant}' of the fusionformer; the known ones are: {', '.join(VARIANTS)}.")
        check_sizes(d_model=d_model, nhead=nhead, num_layers=num_layers, d_ffn=d_ffn, kernel_size=kernel_size)
        parts = _Parts(VARIANTS[variant], momentum, eps)
        attentions = [build_attention(attention_type, d_model, nhead, dropout) for _ in range(num_layers)]
        super().__init__(
            d_model, Stack(FusionFormerLayer(parts, attention, d_model, d_ffn, dropout, kernel_size) for attention in attentions)
        )
        self.output = parts.linear(d_model, d_model) if parts.variant.behind else parts.before(d_model)
        if fused:
            self.fuse_()

    def before_layers(self, x):
        """Under autocast make the residual stream float32, as LayerNorm does in a Conformer. The branches are not float32."""
        return x.float() if autocasts(x) else x

    def after_layers(self, x, mask=None):
        """The last layer."""
        return self.output(x, mask)
