"""A stack of blocks that run at one frame rate, and the protocol of the blocks.

``prepare(x, mask, config)``
    Returns the values that all blocks of a kind share in one forward, such as position tables and masks, or None.
``forward(x, shared, mask, config)``
    (B, T, D) to (B, T, D); ``mask`` is (B, T) bool or None, True = padding; ``config`` is the chunk setting or None.
``initial_state(config)``, ``prepare_stream(x, state)``, ``stream(x, state, shared)``
    The same chunk by chunk; the state is updated in place. It is a dataclass, dict, list or tuple of tensors, plain values or
    more of these; nothing else is counted in its size, or exported.
``chunk_multiple`` (optional attribute)
    A chunk length must be a multiple of it.

A module of a residual branch names its last layer with weights in ``branch_end``, see :func:`begin_as_identity`.
"""

import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speechbrain_ext.lobes.fusible import batch_statistics
from speechbrain_ext.utils.errors import UserError


class Stack(nn.ModuleList):
    """Blocks one after the other. The values that they share are computed once.

    Arguments
    ---------
    layers : iterable of torch.nn.Module
        The blocks, at least one. Blocks that share values share all of them: use one kind of mixer in a stack.

    Raises
    ------
    ValueError
        If there are no blocks.

    Example
    -------
    >>> import torch
    >>> from speechbrain_ext.encoders.conformer import ConformerLayer
    >>> from speechbrain_ext.lobes.attention import RotarySelfAttention
    >>> stack = Stack(ConformerLayer(RotarySelfAttention(16, 2), d_model=16, d_ffn=32) for _ in range(2))
    >>> stack(torch.rand(2, 10, 16)).shape
    torch.Size([2, 10, 16])
    """

    recomputes = False
    """Whether training keeps only the input of each block for the gradient, and recomputes the rest."""

    def __init__(self, layers):
        super().__init__(layers)
        if not len(self):
            raise UserError("An encoder needs num_layers of at least 1.")

    @property
    def chunk_multiple(self) -> int:
        """A chunk length must be a multiple of it, in frames."""
        return math.lcm(*(getattr(layer, "chunk_multiple", 1) for layer in self))

    def forward(self, x, mask=None, config=None):
        """(B, T, D) to (B, T, D)."""
        shared = None
        for layer in self:
            if shared is None:
                shared = layer.prepare(x, mask, config)
            again = self.recomputes and not any(isinstance(part, Stack) for part in layer.modules())  # else its blocks do
            x = recompute(layer, x, shared, mask, config) if again else layer(x, shared, mask, config)
        return x

    def initial_state(self, config) -> list:
        """The states of the blocks before the first chunk."""
        return [layer.initial_state(config) for layer in self]

    def stream(self, x, states: list):
        """One chunk (B, C, D) to (B, C, D); updates the states."""
        shared = None
        for layer, state in zip(self, states, strict=True):
            if shared is None:
                shared = layer.prepare_stream(x, state)
            x = layer.stream(x, state, shared)
        return x


def recompute(module, *args):
    """Call a module with activation checkpointing: keep only its inputs for the gradient, and recompute the rest.

    Random numbers are the same the second time, and statistics are updated once.

    Arguments
    ---------
    module : torch.nn.Module
        The module.
    *args
        Its arguments.

    Returns
    -------
    The output of the module.

    Example
    -------
    >>> x = torch.ones(2, requires_grad=True)
    >>> recompute(nn.GELU(), x).sum().backward()
    >>> x.grad.shape
    torch.Size([2])
    """
    if not (module.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():  # a compiler decides itself
        return module(*args)
    return checkpoint(module, *args, use_reentrant=False, context_fn=_contexts)


def _contexts():
    return nullcontext(), batch_statistics(updates=False)


@torch.no_grad()
def begin_as_identity(encoder: nn.Module) -> None:
    """Let every residual branch begin at zero, in place: the encoder then begins as the identity.

    Use it to train from random weights with CTC. In a deep stack of random blocks with LayerNorms the frames of an utterance
    become alike: after ten blocks their mean over time is 82 % of a Conformer's output, and 95 % of a HyperConformer's. CTC
    begins by predicting blanks only, and with such frames it continues to do so for long.

    Arguments
    ---------
    encoder : torch.nn.Module
        Any encoder, or a stack of blocks.

    Raises
    ------
    UserError
        If no part of it has a ``branch_end``.

    Example
    -------
    >>> from speechbrain_ext.registry import build_encoder
    >>> encoder, x = build_encoder("conformer", d_model=16, nhead=2, num_layers=2, d_ffn=32), torch.randn(1, 9, 16)
    >>> begin_as_identity(encoder)
    >>> torch.equal(encoder.layers(x), encoder.layers[1].norm(encoder.layers[0].norm(x)))
    True
    """
    ends = [part.branch_end for part in encoder.modules() if hasattr(part, "branch_end")]
    if not ends:
        name = type(encoder).__name__
        raise UserError(f"No part of {name} has a branch_end, so it cannot begin as the identity; leave identity_init out.")
    for end in ends:
        for parameter in (getattr(end, "norm", None) or end).parameters():  # those of the norm after a linear layer
            parameter.zero_()
