"""The context that holds all state of a streaming encoder between chunks."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.utils.errors import UserError


@dataclass
class StreamingContext:
    """All state of one stream (or of one batch of simultaneous streams).

    Arguments
    ---------
    dynchunktrain_config : DynChunkTrainConfig
        Chunk size in frames and left context in chunks.
    layers : list
        The state of each layer.

    Example
    -------
    >>> from speechbrain_ext.registry import build_encoder
    >>> encoder = build_encoder("hyperconformer", d_model=16, nhead=2, num_layers=2, d_ffn=32, kernel_size=3).eval()
    >>> context = encoder.make_streaming_context(DynChunkTrainConfig(8, None))
    >>> _ = encoder.forward_streaming(torch.rand(1, 8, 16), context)
    >>> context.state_bytes()
    2432
    """

    dynchunktrain_config: DynChunkTrainConfig
    layers: list
    ended: bool = False
    batch = None
    """Number of streams, known from the first chunk on. It is no field: exports carry all fields as state."""

    def __copy__(self):
        return replace(self)  # without the number of streams: an export's copies take any number

    def state_bytes(self) -> int:
        """Size of the state held now, in bytes, over all layers.

        Returns
        -------
        int
        """
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self.layers))

    def accept(self, chunk: torch.Tensor, width: int | None = None) -> None:
        """Check the shape of the next chunk: all have the configured size, only the last may be shorter.

        Arguments
        ---------
        chunk : torch.Tensor
            (B, C, D).
        width : int, optional
            The encoder's width D, to check that of the chunk.

        Raises
        ------
        ValueError
            If the chunk is empty or too long, has another width or other streams, or a shorter chunk has already ended the
            stream. The chunk is then not taken.
        """
        if torch.compiler.is_exporting():
            return  # a graph cannot raise; its caller must give chunks of the right size
        size = self.dynchunktrain_config.chunk_size
        if chunk.dim() != 3 or width not in (None, chunk.shape[2]):
            raise UserError(f"The chunk has the shape {tuple(chunk.shape)}; give (streams, frames, {width or 'D'}).")
        batch, frames, _ = chunk.shape
        if not 1 <= frames <= size:
            raise UserError(f"The chunk has {frames} frames, but this streaming context takes chunks of {size}.")
        if self.ended:
            raise UserError(
                f"A chunk shorter than {size} frames has ended this stream; make a new streaming context for the next one."
            )
        if self.batch not in (None, batch):
            raise UserError(f"The chunk has {batch} streams, but this streaming context has {self.batch}; make a new one.")
        self.batch, self.ended = batch, frames < size


def _tensors(value: Any):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
