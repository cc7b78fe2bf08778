"""Streams whose state lies in the same memory for every chunk, so that a CUDA graph can replay one.

A graph starts all kernels of a chunk by one call. It reads and writes fixed addresses: so what a chunk leaves behind is copied to
where the next one reads it, and counters are tensors.
"""

from dataclasses import fields, is_dataclass
from typing import get_args

import torch

from speechbrain_ext.bench.models import Unsupported


class StaticStream:
    """The next chunk of a stream, again and again.

    Arguments
    ---------
    model : speechbrain_ext.bench.models.Model
        In evaluation mode.
    context : object
        Of ``model.make_context``, after so many chunks that its tensors have the sizes that they keep.
    chunk : torch.Tensor
        (B, C, D), the chunk; write others into :attr:`chunk`.

    Example
    -------
    >>> from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
    >>> from speechbrain_ext.bench.models import Model
    >>> from speechbrain_ext.registry import build_encoder
    >>> model = Model(build_encoder("hyperconformer", d_model=16, nhead=2, num_layers=1, d_ffn=32)).eval()
    >>> context, chunk = model.make_context(DynChunkTrainConfig(4, None)), torch.rand(1, 4, 16)
    >>> with torch.no_grad():
    ...     _ = model.stream(chunk, context)
    ...     StaticStream(model, context, chunk).step().shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, model, context, chunk):
        self.model, self.context, self.chunk = model, context, chunk.clone()
        for owner, key in _counters(context.layers):
            setattr(owner, key, torch.tensor(getattr(owner, key), device=chunk.device))
        self.places = list(_places(context.layers))
        self.state = [_get(*place).clone() for place in self.places]
        self._put_back()

    def step(self):
        """One chunk.

        Returns
        -------
        torch.Tensor
            (B, C, D).

        Raises
        ------
        Unsupported
            If the state has other sizes than before.
        """
        out = self.model.stream(self.chunk, self.context)
        following = [_get(*place) for place in self.places]
        if [tensor.shape for tensor in following] != [tensor.shape for tensor in self.state]:
            raise Unsupported("left out: its state grows with the stream, and a CUDA graph has fixed sizes")
        held = {tensor.untyped_storage().data_ptr() for tensor in self.state}
        # What only moves on must be read before it is written over
        following = [tensor.clone() if tensor.untyped_storage().data_ptr() in held else tensor for tensor in following]
        torch._foreach_copy_(self.state, following)
        self._put_back()
        return out

    def capture(self):
        """Record a chunk as a CUDA graph.

        Returns
        -------
        callable
            Replays it; the output lies where that of the last replay did.
        """
        with torch.cuda.device(self.chunk.device):  # streams are those of the current one
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # libraries set themselves up in the first calls, which a graph must not record
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.step()
        return self.replay  # with it lives the memory that the graph reads and writes

    def replay(self):
        """What :meth:`capture` has recorded, once more; of what is in :attr:`chunk`."""
        self.graph.replay()
        return self.out

    def _put_back(self):
        for (owner, key), tensor in zip(self.places, self.state, strict=True):
            _set(owner, key, tensor)


def _items(value):
    """(owner, key, value) of all that a state is made of."""
    if is_dataclass(value):
        items = [(entry.name, getattr(value, entry.name)) for entry in fields(value)]
    elif isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield value, key, item
        yield from _items(item)


def _places(state):
    return ((owner, key) for owner, key, value in _items(state) if isinstance(value, torch.Tensor))


def _counters(state):
    """Numbers that may be tensors, by the annotation of their field."""
    for owner in {id(owner): owner for owner, _, _ in _items(state) if is_dataclass(owner)}.values():
        for entry in fields(owner):
            if torch.Tensor in get_args(entry.type) and isinstance(getattr(owner, entry.name), int):
                yield owner, entry.name


def _get(owner, key):
    return getattr(owner, key) if is_dataclass(owner) else owner[key]


def _set(owner, key, value):
    if is_dataclass(owner):
        setattr(owner, key, value)
    else:
        owner[key] = value
