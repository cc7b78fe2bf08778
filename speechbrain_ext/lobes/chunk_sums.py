"""Sums over the frames that a chunk sees, for whole utterances and chunk by chunk. Linear mixers use them.

Sums over long audio are kept in float64: a float32 sum over hours would lose the newest frames.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from speechbrain_ext.lobes.precision import widest


def window_sum(sums: torch.Tensor, left_chunks: int | None) -> torch.Tensor:
    """Sum over each chunk and its left context.

    Arguments
    ---------
    sums : torch.Tensor
        (..., chunks, N, M), the sums of the chunks.
    left_chunks : int, optional
        The left context; None = all.

    Returns
    -------
    torch.Tensor
        (..., chunks, N, M).

    Example
    -------
    >>> window_sum(torch.ones(4, 1, 1), 1).flatten()
    tensor([1., 2., 2., 2.])
    """
    running = widest(sums).cumsum(-3)
    if left_chunks is not None:
        before = min(left_chunks + 1, sums.shape[-3])
        running = running - F.pad(running, (0, 0, 0, 0, before, 0))[..., : sums.shape[-3], :, :]
    return running.to(sums.dtype)


@dataclass
class ChunkSums:
    """The same sums for a stream. The state has a constant size, whatever the length of the audio so far.

    Example
    -------
    >>> window = ChunkSums(left_chunks=1)
    >>> [window.add(torch.ones(1)).item() for _ in range(4)]
    [1.0, 2.0, 2.0, 2.0]
    """

    left_chunks: int | None
    sums: torch.Tensor | None = None
    """Unlimited left context: (1, ...) float64 running sum; limited: (<= L, ...) sums of the last chunks."""

    def add(self, now: torch.Tensor) -> torch.Tensor:
        """Add the sum of a chunk, and return the sum over the chunk and its left context.

        Arguments
        ---------
        now : torch.Tensor
            Any shape.

        Returns
        -------
        torch.Tensor
            The same shape.
        """
        return self.before(now) + now

    def before(self, now: torch.Tensor) -> torch.Tensor:
        """Add the sum of a chunk, and return the sum over its left context alone."""
        if self.sums is None:
            before = torch.zeros_like(now)
            self.sums = widest(now).unsqueeze(0) if self.left_chunks is None else now.unsqueeze(0)[: self.left_chunks].clone()
            return before
        before = (self.sums[0] if self.left_chunks is None else self.sums.sum(0)).to(now.dtype)
        if self.left_chunks is None:
            self.sums = self.sums + now
        else:
            window = torch.cat((self.sums, now.unsqueeze(0)))
            self.sums = window[max(0, len(window) - self.left_chunks) :].clone()  # a view would keep all sums in memory
        return before
