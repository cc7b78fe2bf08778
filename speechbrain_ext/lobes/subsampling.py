"""Front ends that turn 10 ms feature frames into 40 ms encoder frames, padding-exact.

Both halve the rate twice with kernels of 3 padded by 1, hence ceil(T / 4) frames. Output frame j of a halving sees the inputs
2j - 1 to 2j + 1, so a chunk of a multiple of 4 feature frames never looks past its own end.
"""

from torch import nn

from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask


class _Subsampling(nn.Module):
    """Two halvings with lengths carried along; subclasses build ``stages`` of layers on (B, C, T, F)."""

    factor = 4

    def forward(self, x, lengths=None):
        """Subsample.

        Arguments
        ---------
        x : torch.Tensor
            (B, T, F) features.
        lengths : torch.Tensor, optional
            (B,) relative lengths; without them all frames are valid.

        Returns
        -------
        tuple
            (B, ceil(T / 4), ``output_size``), and the relative lengths of these frames.
        """
        frames = None if lengths is None else absolute_lengths(lengths, x.shape[1])
        x = x.unsqueeze(1)  # (B, 1, T, F)
        for stage in self.stages:
            if frames is not None:
                # Zeros before each convolution, where a lone utterance meets the convolution's own zero padding.
                x = x.masked_fill(padding_mask(frames, x.shape[2])[:, None, :, None], 0.0)
                frames = (frames + 1) // 2
            x = stage(x)
        x = self._flatten(x)
        return x, None if frames is None else frames / x.shape[1]

    def _flatten(self, x):
        return x.transpose(1, 2).flatten(2)  # (B, T', C * F'), channel-major


class _FrameNorm(nn.LayerNorm):
    """LayerNorm over bins and channels of each frame of (B, C, T, F); weights lie (F, C), as in SpeechBrain."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvolutionSubsampling(_Subsampling):
    """Regular 4x convolution: twice Conv2d 3 x 3 of stride 2, LayerNorm, LeakyReLU, dropout.

    The front end of SpeechBrain's published Transformer and (Hyper)Conformer recipes (``ConvolutionFrontEnd`` with two blocks),
    with the same parameters, but padding-exact: zeros instead of reflection at the ends, masked between the layers.

    Arguments
    ---------
    input_size : int
        Number of feature bins F.
    channels : tuple of int
        Channels of both convolutions.
    dropout : float
        Dropout after each block.

    Example
    -------
    >>> import torch
    >>> features = torch.rand(2, 101, 80)
    >>> out, lengths = ConvolutionSubsampling()(features, torch.tensor([1.0, 0.5]))
    >>> out.shape
    torch.Size([2, 26, 640])
    """

    def __init__(self, input_size: int = 80, channels: tuple = (64, 32), dropout: float = 0.1):
        super().__init__()
        stages, size, previous = [], input_size, 1
        for width in channels:
            size = (size + 1) // 2
            convolution = nn.Conv2d(previous, width, 3, stride=2, padding=1)
            stages.append(nn.Sequential(convolution, _FrameNorm((size, width)), nn.LeakyReLU(), nn.Dropout(dropout)))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.output_size = size * previous

    def _flatten(self, x):
        return x.permute(0, 2, 3, 1).flatten(2)  # (B, T', F' * C), bin-major, as SpeechBrain


class DepthwiseSubsampling(_Subsampling):
    """Depthwise-separable 4x convolution: Conv2d 3 x 3 of stride 2, ReLU, depthwise 3 x 3 of stride 2, pointwise, ReLU.

    Source: Kim et al. 2022 (Squeezeformer, https://arxiv.org/abs/2206.00888), section 3.2.2.

    Arguments
    ---------
    input_size : int
        Number of feature bins F.
    channels : int
        Channels of all layers.

    Example
    -------
    >>> import torch
    >>> out, _ = DepthwiseSubsampling(80, 16)(torch.rand(2, 101, 80))
    >>> out.shape
    torch.Size([2, 26, 320])
    """

    def __init__(self, input_size: int = 80, channels: int = 144):
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU()),
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels),
                    nn.Conv2d(channels, channels, 1),
                    nn.ReLU(),
                ),
            ]
        )
        self.output_size = channels * ((input_size + 3) // 4)
