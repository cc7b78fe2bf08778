"""Sinusoids for positions, computed for the frames at hand, so that no table ends and none is stored in a checkpoint."""

import math

import torch


def inverse_frequencies(size: int, device=None) -> torch.Tensor:
    """The size/2 angular frequencies of Vaswani et al. (2017), in radians per frame.

    Arguments
    ---------
    size : int
        Number of channels, even.
    device : torch.device, optional
        Where to build them.

    Returns
    -------
    torch.Tensor
        (size / 2,) float32.

    Example
    -------
    >>> inverse_frequencies(4)
    tensor([1.0000, 0.0100])
    """
    return torch.exp(torch.arange(0, size, 2, device=device).float() * -(math.log(10000.0) / size))


def sinusoids(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Sine on even and cosine on odd channels, for any positions, negative ones included.

    Arguments
    ---------
    positions : torch.Tensor
        (T,) positions in frames.
    size : int
        Number of channels, even.

    Returns
    -------
    torch.Tensor
        (T, size) float32.

    Example
    -------
    >>> sinusoids(torch.arange(2), 2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])
    """
    angles = positions.float().unsqueeze(1) * inverse_frequencies(size, positions.device)  # (T, size/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
