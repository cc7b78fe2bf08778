"""The position-wise feed-forward modules."""

from torch import nn

from speechbrain_ext.lobes.activations import Swish
from speechbrain_ext.lobes.dropout import Dropout
from speechbrain_ext.lobes.fusible import ScaledLinear


class FeedForward(nn.Sequential):
    """The Conformer's module: LayerNorm, Linear, Swish, dropout, Linear, dropout; without the residual.

    Arguments
    ---------
    d_model : int
        Width of input and output.
    d_ffn : int
        Width of the hidden layer.
    dropout : float
        Dropout after both layers.
    activation : type
        Class of the activation.

    Example
    -------
    >>> import torch
    >>> FeedForward(16, 64)(torch.rand(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, d_model: int, d_ffn: int, dropout: float = 0.0, activation: type = Swish):
        super().__init__(
            nn.LayerNorm(d_model),
            nn.Linear(d_model, d_ffn),
            activation(),
            Dropout(dropout),
            nn.Linear(d_ffn, d_model),
            Dropout(dropout),
        )

    @property
    def branch_end(self) -> nn.Module:
        """The last layer with weights."""
        return self[-2]


class ScaledFeedForward(nn.Sequential):
    """The Squeezeformer's module: learned scale and Linear, Swish, dropout, Linear, dropout; without the residual.

    Arguments
    ---------
    d_model : int
        Width of input and output.
    d_ffn : int
        Width of the hidden layer.
    dropout : float
        Dropout after both layers.

    Example
    -------
    >>> import torch
    >>> ScaledFeedForward(16, 64)(torch.rand(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, d_model: int, d_ffn: int, dropout: float = 0.0):
        super().__init__(ScaledLinear(d_model, d_ffn), Swish(), Dropout(dropout), nn.Linear(d_ffn, d_model), Dropout(dropout))

    @property
    def branch_end(self) -> nn.Module:
        """The last layer with weights."""
        return self[-2]
