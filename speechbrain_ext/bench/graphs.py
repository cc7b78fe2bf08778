"""Streams with their state in the same memory for every chunk, as CUDA graphs need it.

A graph starts all kernels of a chunk with one call. It reads and writes fixed addresses. Therefore the new state of each chunk is
copied to the addresses of the old one, and counters are tensors.
"""

from dataclasses import fields, is_dataclass
from typing import get_args

import torch

from speechbrain_ext.bench.models import Unsupported


class StaticStream:
    """A stream that runs chunk after chunk in the same memory.

    Arguments
    ---------
    model : speechbrain_ext.bench.models.Model
        The model, in evaluation mode.
    context : object
        A context of ``model.make_context``, after enough chunks for its tensors to have their final sizes.
    chunk : torch.Tensor
        (B, C, D), the chunk; write other chunks into :attr:`chunk`.

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
        """Run one chunk.

        Returns
        -------
        torch.Tensor
            (B, C, D), the output.

        Raises
        ------
        Unsupported
            If the sizes of the state change.
        """
        out = self.model.stream(self.chunk, self.context)
        following = [_get(*place) for place in self.places]
        if [tensor.shape for tensor in following] != [tensor.shape for tensor in self.state]:
            raise Unsupported("left out: its state grows with the stream, and a CUDA graph has fixed sizes")
        held = {tensor.untyped_storage().data_ptr() for tensor in self.state}
        # A tensor that shares memory with the state must be read before it is overwritten
        following = [tensor.clone() if tensor.untyped_storage().data_ptr() in held else tensor for tensor in following]
        torch._foreach_copy_(self.state, following)
        self._put_back()
        return out

    def capture(self):
        """Record a chunk as a CUDA graph.

        Returns
        -------
        callable
            Replays it; all replays write their output to the same memory.
        """
        with torch.cuda.device(self.chunk.device):  # torch.cuda's streams belong to the current device
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):  # the first calls initialise libraries, which a graph must not record
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.step()
        return self.replay  # the method keeps the graph's memory alive

    def replay(self):
        """Replay the graph of :meth:`capture` on :attr:`chunk`."""
        self.graph.replay()
        return self.out

    def _put_back(self):
        for (owner, key), tensor in zip(self.places, self.state, strict=True):
            _set(owner, key, tensor)


def _items(value):
    """(owner, key, value) of all parts of a state."""
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
    """(owner, name) of integers that may also be tensors, by the annotation of their field."""
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
