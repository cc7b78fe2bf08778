"""Base of the encoders: SpeechBrain's interface around a stack of blocks, for whole utterances and chunk by chunk."""

from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.encoders._streaming import StreamingContext
from speechbrain_ext.lobes.fusible import fuse_, statistics_of
from speechbrain_ext.lobes.masks import check_chunks, zero_padding
from speechbrain_ext.lobes.stack import Stack
from speechbrain_ext.utils.errors import UserError, is_whole


def choose_size(architecture: str, sizes: dict, size: str | None, usual: str, given: dict) -> list:
    """The sizes of an encoder: the given values, and those of a named row of a table for the rest.

    Arguments
    ---------
    architecture : str
        Name of the architecture, for messages.
    sizes : dict
        Rows by name.
    size : str, optional
        Name of the row.
    usual : str
        Name of the row if ``size`` is None.
    given : dict
        Values by attribute of a row; None = the row's value.

    Returns
    -------
    list
        In the order of ``given``.

    Raises
    ------
    ValueError
        If there is no such row, a given value contradicts the named row, or a value is not positive.

    Example
    -------
    >>> from speechbrain_ext.encoders.squeezeformer import SIZES
    >>> choose_size("Squeezeformer", SIZES, None, "xs", {"d_model": 32, "nhead": None})
    [32, 4]
    """
    if size is not None and size not in list(sizes):
        raise UserError(f"There is no {architecture} of size '{size}'; the sizes are: {', '.join(sizes)}.")
    row, chosen = sizes[usual if size is None else size], []
    for key, value in given.items():
        usual_value = getattr(row, key)
        if size is not None and value not in (None, usual_value):
            raise UserError(
                f"The {architecture} of size '{size}' has {key} {usual_value}, not {value}; leave out one of the two."
            )
        chosen.append(usual_value if value is None else value)
    check_sizes(**dict(zip(given, chosen, strict=True)))
    return chosen


def check_sizes(**sizes):
    """Refuse sizes that are not whole numbers of at least 1.

    Raises
    ------
    ValueError
        If there is one.

    Example
    -------
    >>> check_sizes(d_model=144, d_ffn=0)
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: d_ffn is 0; give a whole number of at least 1.
    """
    for key, value in sizes.items():
        if not is_whole(value, 1):
            raise UserError(f"{key} is {value!r}; give a whole number of at least 1.")


def check_input(src: torch.Tensor, mask: torch.Tensor | None, width: int, src_mask=None, chunks=None) -> None:
    """Refuse whole utterances, or their masks, that no encoder takes; a compiled or exported graph cannot raise.

    Arguments
    ---------
    src : torch.Tensor
        (B, T, D), at least one frame.
    mask : torch.Tensor, optional
        (B, T) bool, True = padding.
    width : int
        The encoder's width D.
    src_mask : torch.Tensor, optional
        A mask of frames by frames, which no encoder takes. SpeechBrain's TransformerASR makes one from a chunk setting; it is
        accepted beside that.
    chunks : DynChunkTrainConfig, optional
        The chunk setting.

    Raises
    ------
    ValueError
        If a shape is another one, the padding mask is not bool, or there is a mask of frames by frames without a chunk setting.

    Example
    -------
    >>> check_input(torch.ones(2, 9, 16), torch.zeros(1, 9), 16)
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: The padding mask is torch.float32 (1, 9); give torch.bool (2, 9), True = padding.
    """
    if torch.compiler.is_compiling():
        return
    if src.dim() != 3 or src.shape[2] != width or not src.shape[1]:
        raise UserError(f"The encoder's input has the shape {tuple(src.shape)}; give (B, T, {width}) with at least one frame.")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != src.shape[:2]):
        shape, wanted = tuple(mask.shape), tuple(src.shape[:2])
        raise UserError(f"The padding mask is {mask.dtype} {shape}; give torch.bool {wanted}, True = padding.")
    if src_mask is not None and chunks is None:
        raise UserError(
            "src_mask is given, which the encoders here do not take; give the padding as src_key_padding_mask, and chunks as "
            "dynchunktrain_config."
        )


@dataclass
class LayerState:
    """State of one block between chunks."""

    mixer: Any
    convolution: torch.Tensor | None = None


class Encoder(nn.Module):
    """An encoder around a stack of blocks. Subclasses build the blocks, and may override the steps before and after them.

    Arguments
    ---------
    d_model : int
        Width.
    layers : Stack
        The blocks.

    Example
    -------
    >>> from speechbrain_ext.encoders.conformer import ConformerLayer
    >>> from speechbrain_ext.lobes.attention import RotarySelfAttention
    >>> encoder = Encoder(16, Stack([ConformerLayer(RotarySelfAttention(16, 2), d_model=16, d_ffn=32)]))
    >>> encoder(torch.rand(2, 10, 16))[0].shape
    torch.Size([2, 10, 16])
    """

    streamable = True
    passes = ("single",)

    def __init__(self, d_model: int, layers: Stack):
        super().__init__()
        self.d_model = d_model
        self.layers = layers

    @property
    def chunk_multiple(self) -> int:
        """A chunk length must be a multiple of it, in frames."""
        return self.layers.chunk_multiple

    def before_layers(self, x):
        """(B, T, D) to (B, T, D), frame by frame."""
        return x

    def after_layers(self, x, mask=None):
        """(B, T, D) to (B, T, D), frame by frame; the mask is (B, T) bool, True = padding."""
        return x

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
            Not needed: the encoder makes its own positions and, from ``dynchunktrain_config``, its own chunk mask. Without such
            a setting, ``src_mask`` must be None.
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
            If a shape, the type of the mask, or the chunk setting is impossible.
        """
        check_input(src, src_key_padding_mask, self.d_model, src_mask, dynchunktrain_config)
        if dynchunktrain_config is not None:
            check_chunks(dynchunktrain_config, self.chunk_multiple)
        with statistics_of(self):
            x = self.before_layers(zero_padding(src, src_key_padding_mask))  # padding may hold any values, also NaN
            x = self.layers(x, src_key_padding_mask, dynchunktrain_config)
            return zero_padding(self.after_layers(x, src_key_padding_mask), src_key_padding_mask), []

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
        return StreamingContext(dynchunktrain_config, self.layers.initial_state(dynchunktrain_config))

    def forward_streaming(self, src, context: StreamingContext, pos_embs=None):
        """Encode one chunk.

        Call it under ``torch.no_grad()``: otherwise the state keeps what gradients need of the whole stream.

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
            If the chunk is too long or of another shape, or follows a shorter one, or the context is another encoder's.
        """
        if len(context.layers) != len(self.layers):
            made = f"{len(context.layers)} layers, and the encoder {len(self.layers)}"
            raise UserError(f"The streaming context has {made}; make it with make_streaming_context of this encoder.")
        context.accept(src, self.d_model)
        x = self.layers.stream(self.before_layers(src), context.layers)
        return self.after_layers(x), []

    def fuse_(self):
        """Fuse the encoder for inference, in place and exactly; a second call changes nothing.

        Returns
        -------
        Encoder
            Itself.
        """
        fuse_(self)
        return self
