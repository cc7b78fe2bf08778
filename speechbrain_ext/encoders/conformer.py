"""Conformer (Gulati et al. 2020, https://arxiv.org/abs/2005.08100), as SpeechBrain builds it: the baseline of this collection.

A block is half a feed-forward module, a mixer, the convolution module and half a feed-forward module, each on a residual with a
LayerNorm before it, and a final LayerNorm. As in SpeechBrain, the convolution module has a LayerNorm instead of the paper's
BatchNorm.
"""

from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.encoders._base import Encoder, LayerState, check_sizes
from speechbrain_ext.lobes.activations import Swish
from speechbrain_ext.lobes.attention import build_attention
from speechbrain_ext.lobes.convolution import ConvolutionModule
from speechbrain_ext.lobes.feedforward import FeedForward
from speechbrain_ext.lobes.stack import Stack
from speechbrain_ext.registry import register_encoder
from speechbrain_ext.utils.errors import UserError


class ConformerLayer(nn.Module):
    """One Conformer block around any mixer.

    Arguments
    ---------
    mixer : torch.nn.Module, optional
        Mixes frames: ``mix(x, shared)`` and ``stream(x, state, shared)`` as in :mod:`speechbrain_ext.lobes.attention`. None =
        only the convolution mixes.
    d_model : int
        Width.
    d_ffn : int
        Width of the feed-forward modules' hidden layer.
    dropout : float
        Dropout in the feed-forward and convolution modules.
    kernel_size : int
        Kernel of the depthwise convolution, in frames.
    activation : type
        Class of the activation in the feed-forward and convolution modules.
    bias : bool
        Whether the convolution module has biases.
    causal : bool
        Whether the convolution sees nothing to the right.

    Example
    -------
    >>> from speechbrain_ext.lobes.attention import RotarySelfAttention
    >>> import torch
    >>> layer = ConformerLayer(RotarySelfAttention(16, 2), d_model=16, d_ffn=32)
    >>> x = torch.rand(2, 10, 16)
    >>> layer(x, layer.prepare(x, None, None)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        mixer: nn.Module | None,
        d_model: int,
        d_ffn: int,
        dropout: float = 0.0,
        kernel_size: int = 31,
        activation: type = Swish,
        bias: bool = True,
        causal: bool = False,
    ):
        super().__init__()
        self.ffn1 = FeedForward(d_model, d_ffn, dropout, activation)
        self.mixer_norm = nn.LayerNorm(d_model) if mixer else None
        self.mixer = mixer
        self.convolution = ConvolutionModule(d_model, kernel_size, dropout, activation, bias, causal)
        self.ffn2 = FeedForward(d_model, d_ffn, dropout, activation)
        self.norm = nn.LayerNorm(d_model)

    def prepare(self, x, mask, config):
        """Compute the values that the mixers of all layers share in one forward."""
        return self.mixer.prepare(x, mask, config) if self.mixer else None

    def forward(self, x, shared, mask=None, config: DynChunkTrainConfig | None = None):
        """(B, T, D) to (B, T, D), as :mod:`speechbrain_ext.lobes.stack` describes it."""
        x = x.add(self.ffn1(x), alpha=0.5)
        if self.mixer:
            x = x + self.mixer.mix(self.mixer_norm(x), shared)
        x = x + self.convolution(x, mask, config)
        return self.norm(x.add(self.ffn2(x), alpha=0.5))

    def initial_state(self, config: DynChunkTrainConfig) -> LayerState:
        """The state before the first chunk."""
        return LayerState(self.mixer.initial_state(config) if self.mixer else None)

    def prepare_stream(self, x, state: LayerState):
        """Compute the values that the mixers of all layers share for one chunk."""
        return self.mixer.prepare_stream(x, state.mixer) if self.mixer else None

    def stream(self, x, state: LayerState, shared):
        """One chunk (B, C, D) to (B, C, D); updates the state."""
        x = x.add(self.ffn1(x), alpha=0.5)
        if self.mixer:
            x = x + self.mixer.stream(self.mixer_norm(x), state.mixer, shared)
        y, state.convolution = self.convolution.stream(x, state.convolution)
        x = x + y
        return self.norm(x.add(self.ffn2(x), alpha=0.5))


@register_encoder("conformer")
class ConformerEncoder(Encoder):
    """Conformer encoder with self-attention.

    Its streaming state per layer is the attention's cache (2 M d numbers for M cached frames) and (K - 1) / 2 frames of the
    convolution. With an unlimited left context the cache grows with the audio; limit it for endless streams.

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
        Kernel of the depthwise convolution, in frames.
    attention_type : str
        "RelPosMHAXL" (Transformer-XL relative positions) or "RoPEMHA" (rotary positions), SpeechBrain's names.
    speechbrain_scores : bool
        Score as SpeechBrain does (scaled by the model width; relative positions without sign), for its checkpoints:
        see :mod:`speechbrain_ext.convert`.
    activation : type
        Class of the activation in the feed-forward and convolution modules.
    bias : bool
        Whether the convolution modules have biases.

    Raises
    ------
    ValueError
        If the attention type is unknown or a size is impossible.

    Example
    -------
    >>> import torch
    >>> encoder = ConformerEncoder(d_model=32, nhead=4, num_layers=2, d_ffn=64)
    >>> mask = torch.arange(50) >= torch.tensor([[50], [30]])  # True = padding
    >>> out, _ = encoder(torch.rand(2, 50, 32), src_key_padding_mask=mask)
    >>> out.shape
    torch.Size([2, 50, 32])
    """

    def __init__(
        self,
        d_model: int = 144,
        nhead: int = 8,
        num_layers: int = 10,
        d_ffn: int = 576,
        dropout: float = 0.1,
        kernel_size: int = 31,
        attention_type: str = "RelPosMHAXL",
        speechbrain_scores: bool = False,
        activation: type = Swish,
        bias: bool = True,
    ):
        check_sizes(d_model=d_model, nhead=nhead, num_layers=num_layers, d_ffn=d_ffn, kernel_size=kernel_size)
        mixers = [build_attention(attention_type, d_model, nhead, dropout, speechbrain_scores) for _ in range(num_layers)]
        self._build(mixers, d_model, d_ffn, dropout, kernel_size, activation, bias)

    def _build(self, mixers, d_model, d_ffn, dropout, kernel_size, activation, bias):
        if not callable(activation) or isinstance(activation, nn.Module):
            raise UserError(f"activation is {activation!r}; give its class, such as torch.nn.ReLU.")
        layer_args = d_model, d_ffn, dropout, kernel_size, activation, bias
        super().__init__(d_model, Stack(ConformerLayer(mixer, *layer_args) for mixer in mixers))
        self.norm = nn.LayerNorm(d_model, eps=1e-6)

    def after_layers(self, x, mask=None):
        """LayerNorm."""
        return self.norm(x)
