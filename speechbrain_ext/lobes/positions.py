"""Sinusoids for positions, computed when needed: no table limits the length, and no checkpoint stores one."""

import math

import torch


def inverse_frequencies(size: int, device=None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The size/2 angular frequencies of Vaswani et al. (2017), in radians per frame.

    Arguments
    ---------
    size : int
        Number of channels, even.
    device : torch.device, optional
        Where to build them.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    torch.Tensor
        (size / 2,).

    Example
    -------
    >>> inverse_frequencies(4)
    tensor([1.0000, 0.0100])
    """
    return torch.exp(torch.arange(0, size, 2, device=device).to(dtype) * -(math.log(10000.0) / size))


def sinusoids(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Sine on even and cosine on odd channels, for any positions, negative ones included.

    Arguments
    ---------
    positions : torch.Tensor
        (..., T) positions in frames; float64 for those of a stream, as float32 would make large angles inexact.
    size : int
        Number of channels, even.

    Returns
    -------
    torch.Tensor
        (..., T, size) float32; float64 for float64 positions, except in an exported graph.

    Example
    -------
    >>> sinusoids(torch.arange(2), 2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])
    """
    dtype = torch.promote_types(positions.dtype, torch.float32)
    angles = positions.to(dtype).unsqueeze(-1) * inverse_frequencies(size, positions.device, dtype)  # (..., T, size/2)
    # is_exporting is also true in torch.compile
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if exporting and dtype == torch.float64:
        # Many builds of onnxruntime, sherpa-onnx's among them, have no cosine in float64; within one turn float32 is exact enough
        angles = (angles - 2 * math.pi * (angles / (2 * math.pi)).floor()).float()
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def stream_positions(before: int | torch.Tensor, frames: int, device=None, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Positions of the frames of a chunk.

    Arguments
    ---------
    before : int or torch.Tensor
        Number of frames before the chunk; (B,) if the streams of a batch have different ages.
    frames : int
        Number T of frames.
    device : torch.device, optional
        Where to build them.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    torch.Tensor
        (T,), or (B, T) if streams have different ages.

    Example
    -------
    >>> stream_positions(4, 2), stream_positions(torch.tensor([4, 0]), 2)
    (tensor([4, 5]), tensor([[4, 5],
            [0, 1]]))
    """
    if isinstance(before, torch.Tensor) and before.dim():
        before = before.unsqueeze(1)
    return before + torch.arange(frames, dtype=dtype, device=device)
