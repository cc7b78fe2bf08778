"""Lengths, padding and chunks.

Two conventions hold everywhere. Masks are boolean, and True means *blocked* (padding, or not to be attended). Lengths are
SpeechBrain's relative lengths, chosen so that ``round(relative * frames)`` is exact.
"""

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.lobes.precision import widest
from speechbrain_ext.utils.errors import UserError

EXACT = 2**24
"""Whole numbers up to here are exact in float32: 17 minutes of samples at 16 kHz."""


def absolute_lengths(relative: torch.Tensor, frames: int) -> torch.Tensor:
    """Relative lengths as numbers of frames.

    Arguments
    ---------
    relative : torch.Tensor
        (B,) lengths in (0, 1].
    frames : int
        The padded length T that they refer to.

    Returns
    -------
    torch.Tensor
        (B,) int64.

    Example
    -------
    >>> absolute_lengths(torch.tensor([1.0, 0.5]), 9)
    tensor([9, 4])
    """
    if not torch.compiler.is_compiling() and frames > EXACT:
        return torch.round(widest(relative) * frames).long().clamp(max=frames)
    return torch.round(relative * frames).long()


def padding_mask(lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Mask of the padded frames.

    Arguments
    ---------
    lengths : torch.Tensor
        (B,) numbers of valid frames.
    frames : int
        The padded length T.

    Returns
    -------
    torch.Tensor
        (B, T) bool, True = padding.

    Example
    -------
    >>> padding_mask(torch.tensor([3, 1]), 3)
    tensor([[False, False, False],
            [False,  True,  True]])
    """
    return torch.arange(frames, device=lengths.device) >= lengths.unsqueeze(1)


def zero_padding(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Set padded frames to zero, as is necessary before each operation that mixes frames.

    Arguments
    ---------
    x : torch.Tensor
        (B, T, D).
    mask : torch.Tensor, optional
        (B, T) bool, True = padding.

    Returns
    -------
    torch.Tensor
        (B, T, D).

    Example
    -------
    >>> zero_padding(torch.ones(1, 2, 1), torch.tensor([[False, True]])).flatten()
    tensor([1., 0.])
    """
    return x if mask is None else x.masked_fill(mask.unsqueeze(-1), 0.0)


def chunk_mask(frames: int, config: DynChunkTrainConfig, device=None, causal: bool = False) -> torch.Tensor:
    """Attention mask of chunked processing: a frame sees its own chunk and the left context, nothing to the right.

    Arguments
    ---------
    frames : int
        T.
    config : DynChunkTrainConfig
        Chunk size in frames; left context in chunks, None = all.
    device : torch.device, optional
        Where to build the mask.
    causal : bool
        Whether a frame sees no later frame of its own chunk either.

    Returns
    -------
    torch.Tensor
        (T, T) bool, True = blocked; rows are queries.

    Example
    -------
    >>> chunk_mask(4, DynChunkTrainConfig(2, 0)).int()
    tensor([[0, 0, 1, 1],
            [0, 0, 1, 1],
            [1, 1, 0, 0],
            [1, 1, 0, 0]], dtype=torch.int32)
    """
    frame = torch.arange(frames, device=device)
    chunk = frame // config.chunk_size
    query, key = chunk.unsqueeze(1), chunk.unsqueeze(0)
    blocked = frame > frame.unsqueeze(1) if causal else key > query
    if not config.is_infinite_left_context():
        blocked = blocked | (key < query - config.left_context_size)
    return blocked


def chunk_length(config: DynChunkTrainConfig, frames: int) -> int:
    """Number of frames per chunk of a whole utterance: the chunk size, but at most the utterance's length.

    Arguments
    ---------
    config : DynChunkTrainConfig
        The chunk setting.
    frames : int
        T.

    Returns
    -------
    int

    Example
    -------
    >>> chunk_length(DynChunkTrainConfig(16), 10)
    10
    """
    # A graph would keep the smaller of the two numbers in its example
    return config.chunk_size if torch.compiler.is_exporting() else min(config.chunk_size, frames)


def check_chunks(config: DynChunkTrainConfig, multiple: int = 1) -> None:
    """Refuse impossible chunk settings.

    Arguments
    ---------
    config : DynChunkTrainConfig
        The setting.
    multiple : int
        The chunk size must be a multiple of it (an encoder's ``chunk_multiple``).

    Raises
    ------
    ValueError
        If the chunk size is not a positive multiple, or the left context is negative.

    Example
    -------
    >>> check_chunks(DynChunkTrainConfig(3), multiple=2)
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: The chunk size is 3 frames, but this encoder needs a positive multiple of 2.
    """
    if config.chunk_size < 1 or config.chunk_size % multiple:
        needs = "at least 1" if multiple == 1 else f"a positive multiple of {multiple}"
        raise UserError(f"The chunk size is {config.chunk_size} frames, but this encoder needs {needs}.")
    if config.left_context_size is not None and config.left_context_size < 0:
        raise UserError(f"The left context is {config.left_context_size} chunks; give 0 or more, or None for all.")
