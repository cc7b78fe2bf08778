"""HyperConformer (Mai et al. 2023, https://arxiv.org/abs/2305.18281): a Conformer with HyperMixing, linear in length."""

from speechbrain_ext.encoders._base import check_sizes
from speechbrain_ext.encoders.conformer import ConformerEncoder
from speechbrain_ext.lobes.activations import Swish
from speechbrain_ext.lobes.hypermixing import HyperMixing
from speechbrain_ext.registry import register_encoder


@register_encoder("hyperconformer")
class HyperConformerEncoder(ConformerEncoder):
    """HyperConformer encoder.

    Time and memory are linear in length. Its streaming state per layer is HyperMixing's running sum, d (d / heads + 1) float64
    numbers for an unlimited left context (see :mod:`speechbrain_ext.lobes.hypermixing`), and (K - 1) / 2 frames of the
    convolution. It does not grow with the stream.

    Arguments
    ---------
    d_model : int
        Width.
    nhead : int
        Number of HyperMixing heads.
    num_layers : int
        Number of blocks.
    d_ffn : int
        Width of the hidden layer of the feed-forward modules, and of the token-mixing MLPs over all heads.
    dropout : float
        Dropout in the feed-forward and convolution modules.
    kernel_size : int
        Kernel of the depthwise convolution, in frames.
    tied : bool
        Whether both layers of the token-mixing MLPs use the same generated weights.
    activation : type
        Class of the activation in the feed-forward and convolution modules.
    bias : bool
        Whether the convolution modules have biases.

    Raises
    ------
    ValueError
        If a size is impossible.

    Example
    -------
    >>> import torch
    >>> encoder = HyperConformerEncoder(d_model=32, nhead=4, num_layers=2, d_ffn=64)
    >>> out, _ = encoder(torch.rand(2, 50, 32))
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
        tied: bool = False,
        activation: type = Swish,
        bias: bool = True,
    ):
        check_sizes(d_model=d_model, nhead=nhead, num_layers=num_layers, d_ffn=d_ffn, kernel_size=kernel_size)
        mixers = [HyperMixing(d_model, d_ffn, tied=tied, num_heads=nhead) for _ in range(num_layers)]
        self._build(mixers, d_model, d_ffn, dropout, kernel_size, activation, bias)
