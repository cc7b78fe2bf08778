"""Conformer (Gulati et al. 2020, https://arxiv.org/abs/2005.08100), as SpeechBrain builds it: the baseline of this collection.

A block is half a feed-forward module, a token mixer, the convolution module and half a feed-forward module, each on a residual
with LayerNorm in front, and a LayerNorm behind. LayerNorm stands in the convolution module where the paper has BatchNorm, as in
SpeechBrain.
"""

from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.encoders.streaming import StreamingContext
from speechbrain_ext.lobes.attention import ATTENTIONS
from speechbrain_ext.lobes.convolution import ConvolutionModule
from speechbrain_ext.lobes.feedforward import FeedForward
from speechbrain_ext.lobes.masks import check_chunks, zero_padding
from speechbrain_ext.registry import register_encoder


@dataclass
class ConformerLayerState:
    """What one layer remembers between chunks."""

    mixer: Any
    convolution: torch.Tensor | None = None


class ConformerLayer(nn.Module):
    """One Conformer block around any token mixer.

    Arguments
    ---------
    mixer : torch.nn.Module
        Mixes frames: ``mix(x, shared)`` and ``stream(x, state, shared)`` as in :mod:`speechbrain_ext.lobes.attention`.
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

    Example
    -------
    >>> from speechbrain_ext.lobes.attention import RotarySelfAttention
    >>> layer = ConformerLayer(RotarySelfAttention(16, 2), d_model=16, d_ffn=32)
    >>> x = torch.rand(2, 10, 16)
    >>> layer(x, layer.mixer.prepare(x, None, None)).shape
    torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        mixer: nn.Module,
        d_model: int,
        d_ffn: int,
        dropout: float = 0.0,
        kernel_size: int = 31,
        activation: type = nn.SiLU,
        bias: bool = True,
    ):
        super().__init__()
        self.ffn1 = FeedForward(d_model, d_ffn, dropout, activation)
        self.mixer_norm = nn.LayerNorm(d_model)
        self.mixer = mixer
        self.convolution = ConvolutionModule(d_model, kernel_size, dropout, activation, bias)
        self.ffn2 = FeedForward(d_model, d_ffn, dropout, activation)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x, shared, mask=None, config: DynChunkTrainConfig | None = None):
        """(B, T, D) to (B, T, D); ``shared`` is what the mixer prepared, the rest as in :class:`ConformerEncoder`."""
        x = x + 0.5 * self.ffn1(x)
        x = x + self.mixer.mix(self.mixer_norm(x), shared)
        x = x + self.convolution(x, mask, config)
        return self.norm(x + 0.5 * self.ffn2(x))

    def stream(self, x, state: ConformerLayerState, shared):
        """One chunk (B, C, D) to (B, C, D); updates the state."""
        x = x + 0.5 * self.ffn1(x)
        x = x + self.mixer.stream(self.mixer_norm(x), state.mixer, shared)
        y, state.convolution = self.convolution.stream(x, state.convolution)
        x = x + y
        return self.norm(x + 0.5 * self.ffn2(x))


@register_encoder("conformer")
class ConformerEncoder(nn.Module):
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
    >>> encoder = ConformerEncoder(d_model=32, nhead=4, num_layers=2, d_ffn=64)
    >>> mask = torch.arange(50) >= torch.tensor([[50], [30]])  # True = padding
    >>> out, _ = encoder(torch.rand(2, 50, 32), src_key_padding_mask=mask)
    >>> out.shape
    torch.Size([2, 50, 32])
    """

    chunk_multiple = 1
    streamable = True

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
        activation: type = nn.SiLU,
        bias: bool = True,
    ):
        if attention_type not in ATTENTIONS:
            raise ValueError(
                f"Unknown attention_type '{attention_type}' for a conformer; the known ones are: {', '.join(ATTENTIONS)}."
            )
        attention = ATTENTIONS[attention_type]
        mixers = [attention(d_model, nhead, dropout, speechbrain_scores) for _ in range(num_layers)]
        self._build(mixers, d_model, d_ffn, dropout, kernel_size, activation, bias)

    def _build(self, mixers, d_model, *layer_args):
        super().__init__()
        if not mixers:
            raise ValueError("An encoder needs num_layers of at least 1.")
        self.d_model = d_model
        self.layers = nn.ModuleList(ConformerLayer(mixer, d_model, *layer_args) for mixer in mixers)
        self.norm = nn.LayerNorm(d_model, eps=1e-6)

    def forward(
        self,
        src,
        src_mask=None,
        src_key_padding_mask=None,
        pos_embs=None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
    ):
        """Encode whole utterances.

        Arguments
        ---------
        src : torch.Tensor
            (B, T, D).
        src_mask, pos_embs
            Not needed: the encoder makes its own positions and, from ``dynchunktrain_config``, its own chunk mask.
        src_key_padding_mask : torch.Tensor, optional
            (B, T) bool, True = padding.
        dynchunktrain_config : DynChunkTrainConfig, optional
            Restricts every frame to its chunk and the left context.

        Returns
        -------
        tuple
            (B, T, D), zero in padded frames; and an empty list, where SpeechBrain returns attention weights.

        Raises
        ------
        ValueError
            If the chunk setting is impossible.
        """
        if dynchunktrain_config is not None:
            check_chunks(dynchunktrain_config, self.chunk_multiple)
        x = zero_padding(src, src_key_padding_mask)  # whatever lies there, NaN included
        shared = self.layers[0].mixer.prepare(x, src_key_padding_mask, dynchunktrain_config)
        for layer in self.layers:
            x = layer(x, shared, src_key_padding_mask, dynchunktrain_config)
        return zero_padding(self.norm(x), src_key_padding_mask), []

    def make_streaming_context(self, dynchunktrain_config: DynChunkTrainConfig) -> StreamingContext:
        """The context of a new stream.

        Arguments
        ---------
        dynchunktrain_config : DynChunkTrainConfig
            Chunk size in frames and left context in chunks (None = all).

        Returns
        -------
        StreamingContext

        Raises
        ------
        ValueError
            If the chunk setting is impossible.
        """
        check_chunks(dynchunktrain_config, self.chunk_multiple)
        layers = [ConformerLayerState(layer.mixer.initial_state(dynchunktrain_config)) for layer in self.layers]
        return StreamingContext(dynchunktrain_config, layers)

    def forward_streaming(self, src, context: StreamingContext, pos_embs=None):
        """Encode one chunk.

        Arguments
        ---------
        src : torch.Tensor
            (B, C, D); C is the configured chunk size, less only in the last chunk.
        context : StreamingContext
            Updated in place.
        pos_embs
            Not needed.

        Returns
        -------
        tuple
            (B, C, D) and an empty list.

        Raises
        ------
        ValueError
            If the chunk is too long, or follows a shorter one.
        """
        context.accept(src)
        shared = self.layers[0].mixer.prepare_stream(src, context.layers[0].mixer)
        x = src
        for layer, state in zip(self.layers, context.layers, strict=True):
            x = layer.stream(x, state, shared)
        return self.norm(x), []

    def fuse_(self):
        """Nothing to fold: LayerNorm depends on its input.

        Returns
        -------
        ConformerEncoder
            Itself.
        """
        return self
