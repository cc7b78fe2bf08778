"""Cascaded encoders (Narayanan et al. 2020, https://arxiv.org/abs/2010.14606): a first pass answers at once, and a non-causal
second pass on top of it sees more. One head or decoder serves both.

Any registered encoder can be either stage. Two decisions are ours: the second stage is by default a Conformer with a third of the
blocks, and its right context comes in chunks, which does not add up over the blocks.
"""

import math

from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.encoders._base import check_input, check_sizes
from speechbrain_ext.encoders._streaming import StreamingContext
from speechbrain_ext.lobes.masks import check_chunks, zero_padding
from speechbrain_ext.registry import build_encoder, encoder_keys, encoder_passes, register_encoder
from speechbrain_ext.utils.errors import UserError, is_whole

PASSES = ("first", "second")


@register_encoder("cascade")
class CascadedEncoder(nn.Module):
    """Two encoders, one on top of the other.

    ``pass_name`` selects the pass: "second", the default, or "first", which does not run the second stage. Without a chunk
    setting, the first stage runs as in streaming (``first_chunk``), and the second stage sees ``right_context``. A chunk setting
    applies to both stages: the whole cascade streams with the latency of one chunk. To stream the first pass, and run the second
    pass on the finished utterance, stream with ``pass_name="first"`` and give the frames to :meth:`second_pass`.

    Arguments
    ---------
    d_model : int
        Width of both stages, unless ``second`` has its own.
    nhead : int
        Number of heads of both, likewise.
    num_layers : int
        Number of blocks of both together: the second stage has a third of them, or the number in ``second``, and the first stage
        the rest; each at least one.
    d_ffn : int
        Width of the feed-forward modules' hidden layer of both, likewise.
    dropout : float
        Dropout of both, likewise.
    kernel_size : int, optional
        Kernel of the depthwise convolutions of both, likewise; by default their own.
    first, second : str or dict
        Name of the encoder, or a dictionary with its name as ``encoder`` and its own keys, which override those above.
    first_chunk : int, optional
        Chunk size in frames of the first stage if the call gives no chunk setting; None for causal encoders, and for full
        context.
    right_context : int, optional
        Chunk size in frames of the second stage if the call gives no chunk setting. It sees at most this number of frames to the
        right; None = the whole utterance.
    adapter : bool
        Whether there is a linear layer with LayerNorm between the stages. Between different widths there always is.

    Raises
    ------
    ValueError
        If a name is unknown, or a size is impossible.
    TypeError
        If a stage has no such key.

    Example
    -------
    >>> import torch
    >>> encoder = CascadedEncoder(32, 4, 4, 64, second={"encoder": "squeezeformer", "d_ffn": 128}).eval()
    >>> x = torch.rand(2, 50, 32)
    >>> second, _ = encoder(x)
    >>> first, _ = encoder(x, pass_name="first")
    >>> torch.equal(encoder.second_pass(first), second)
    True
    """

    streamable = True
    passes = PASSES

    def __init__(
        self,
        d_model: int = 144,
        nhead: int = 4,
        num_layers: int = 12,
        d_ffn: int = 432,
        dropout: float = 0.1,
        kernel_size: int | None = None,
        first: str | dict = "practical_conformer",
        second: str | dict = "conformer",
        first_chunk: int | None = None,
        right_context: int | None = None,
        adapter: bool = False,
    ):
        super().__init__()
        check_sizes(d_model=d_model, nhead=nhead, num_layers=num_layers, d_ffn=d_ffn)
        usual = {"d_model": d_model, "nhead": nhead, "d_ffn": d_ffn, "dropout": dropout, "kernel_size": kernel_size}
        above = max(1, num_layers // 3)
        self.second = _build("second", second, usual | {"num_layers": above})
        above = second.get("num_layers", above) if isinstance(second, dict) else above
        self.first = _build("first", first, usual | {"num_layers": max(1, num_layers - above)})
        if self.first.d_model != d_model:
            raise UserError(f"The first stage has d_model {self.first.d_model}, and the cascade {d_model}; make them equal.")
        width = self.second.d_model
        adapts = adapter or width != d_model
        self.adapter = nn.Sequential(nn.Linear(d_model, width), nn.LayerNorm(width)) if adapts else nn.Identity()
        self.output = nn.Linear(width, d_model) if width != d_model else nn.Identity()
        self.d_model = d_model
        self.first_config = _chunks("first_chunk", first_chunk)
        self.second_config = _chunks("right_context", right_context)
        for stage, config in ((self.first, self.first_config), (self.second, self.second_config)):
            if config is not None:
                check_chunks(config, stage.chunk_multiple)

    @property
    def chunk_multiple(self) -> int:
        """A chunk length must be a multiple of it, in frames, for both passes."""
        return self._chunk_multiple(None)

    def _chunk_multiple(self, pass_name):
        return math.lcm(*(stage.chunk_multiple for stage in self._stages(pass_name)))

    def _stages(self, pass_name):
        encoder_passes(self, pass_name)  # refuses unknown names
        return [self.first] if pass_name == "first" else [self.first, self.second]

    def forward(
        self,
        src,
        src_mask=None,
        src_key_padding_mask=None,
        pos_embs=None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        pass_name: str | None = None,
    ):
        """Encode whole utterances.

        Arguments
        ---------
        src : torch.Tensor
            (B, T, D).
        src_mask, pos_embs
            Not needed. Without a chunk setting, ``src_mask`` must be None.
        src_key_padding_mask : torch.Tensor, optional
            (B, T) bool, True = padding.
        dynchunktrain_config : DynChunkTrainConfig, optional
            Restricts every frame of both stages to its chunk and the left context.
        pass_name : str, optional
            "second", the default, or "first".

        Returns
        -------
        tuple
            (B, T, D) of that pass, zero in padded frames; and an empty list.

        Raises
        ------
        ValueError
            If a shape, the type of the mask, or the chunk setting is impossible, or there is no such pass.
        """
        check_input(src, src_key_padding_mask, self.d_model, src_mask, dynchunktrain_config)
        both = len(self._stages(pass_name)) > 1
        if dynchunktrain_config is not None:
            check_chunks(dynchunktrain_config, self._chunk_multiple(pass_name))
        config = dynchunktrain_config or self.first_config
        x, _ = self.first(src, src_key_padding_mask=src_key_padding_mask, dynchunktrain_config=config)
        if both:
            x = self.second_pass(x, src_key_padding_mask, dynchunktrain_config)
        return x, []

    def second_pass(self, frames, mask=None, dynchunktrain_config: DynChunkTrainConfig | None = None):
        """Run the second stage on the frames of the first one.

        Arguments
        ---------
        frames : torch.Tensor
            (B, T, D), from :meth:`forward` or :meth:`forward_streaming` with ``pass_name="first"``.
        mask : torch.Tensor, optional
            (B, T) bool, True = padding.
        dynchunktrain_config : DynChunkTrainConfig, optional
            Replaces ``right_context``.

        Returns
        -------
        torch.Tensor
            (B, T, D), zero in padded frames.
        """
        config = dynchunktrain_config or self.second_config
        x, _ = self.second(self.adapter(frames), src_key_padding_mask=mask, dynchunktrain_config=config)
        return zero_padding(self.output(x), mask)

    def make_streaming_context(self, dynchunktrain_config: DynChunkTrainConfig, pass_name: str | None = None) -> StreamingContext:
        """The context of a new stream, with the stages that a pass needs.

        Arguments
        ---------
        dynchunktrain_config : DynChunkTrainConfig
            Chunk size in frames and left context in chunks (None = all).
        pass_name : str, optional
            "second", the default, or "first", for this stream.

        Returns
        -------
        StreamingContext

        Raises
        ------
        ValueError
            If the chunk setting is impossible, or there is no such pass.
        """
        check_chunks(dynchunktrain_config, self._chunk_multiple(pass_name))
        contexts = [stage.make_streaming_context(dynchunktrain_config) for stage in self._stages(pass_name)]
        return StreamingContext(dynchunktrain_config, contexts)

    def forward_streaming(self, src, context: StreamingContext, pos_embs=None):
        """Encode one chunk.

        Arguments
        ---------
        src : torch.Tensor
            (B, C, D); C is the configured chunk size, less only in the last chunk.
        context : StreamingContext
            Updated in place; it determines which stages run.
        pos_embs
            Not needed.

        Returns
        -------
        tuple
            (B, C, D) and an empty list.

        Raises
        ------
        ValueError
            If the chunk is too long or of another shape, or follows a shorter one.
        """
        context.accept(src, self.d_model)
        first, *second = context.layers
        x, _ = self.first.forward_streaming(src, first)
        if second:
            x, _ = self.second.forward_streaming(self.adapter(x), second[0])
            x = self.output(x)
        return x, []

    def fuse_(self):
        """Fuse both stages, in place.

        Returns
        -------
        CascadedEncoder
            Itself.
        """
        self.first.fuse_()
        self.second.fuse_()
        return self


def _build(stage, asked, usual):
    """A stage from its name, or from a dictionary with its name and keys. A ``size`` sets all sizes of the stage."""
    keys = {"encoder": asked} if isinstance(asked, str) else dict(asked) if isinstance(asked, dict) else {}
    if "encoder" not in keys:
        raise UserError(f"The {stage} stage of the cascade is {asked}; give a name, or a dictionary with the name as 'encoder'.")
    name = keys.pop("encoder")
    known = {"dropout", "kernel_size"} if "size" in keys else set(usual)
    known &= set(encoder_keys(name))
    return build_encoder(name, **{key: value for key, value in usual.items() if key in known and value is not None} | keys)


def _chunks(key, size):
    if size is None:
        return None
    if not is_whole(size, -math.inf):
        raise UserError(f"{key} is {size!r}; give a whole number of frames, or null.")
    return DynChunkTrainConfig(size)
