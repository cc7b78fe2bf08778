"""Lengths, padding and chunks.

Two conventions hold everywhere. Masks are boolean, and True means *blocked* (padding, or not to be attended). Lengths are
SpeechBrain's relative lengths, chosen so that ``round(relative * frames)`` is exact.
"""

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.lobes.precision import at_least_float32, widest
from speechbrain_ext.utils.errors import UserError, is_whole
from speechbrain_ext.utils.text import listing

EXACT = 2**22
"""Up to this number of frames, relative lengths in float32 are exact: 4 minutes of samples at 16 kHz."""
MOST = 1 + 1e-3
"""Greatest relative length; above 1 by no more than rounding."""


def absolute_lengths(relative: torch.Tensor, frames: int) -> torch.Tensor:
    """Relative lengths as numbers of frames.

    Arguments
    ---------
    relative : torch.Tensor
        (B,) lengths from 0 to 1.
    frames : int
        The padded length T that they refer to.

    Returns
    -------
    torch.Tensor
        (B,) int64, at most T.

    Raises
    ------
    UserError
        If a length on a CPU is not from 0 to 1. Other devices are not asked: the host would wait for them.

    Example
    -------
    >>> absolute_lengths(torch.tensor([1.0, 0.5]), 9)
    tensor([9, 4])
    """
    relative = at_least_float32(relative)
    values = _values(relative)
    if not all(0 <= value <= MOST for value in values):
        shown = listing(f"{value:g}" for value in values)
        raise UserError(f"The relative lengths are {shown}; give numbers from 0 to 1, such as frames / {frames}.")
    is_long = not torch.compiler.is_compiling() and frames > EXACT
    lengths = torch.round((widest(relative) if is_long else relative) * frames).long()
    # Rounding exceeds no number of frames up to EXACT, so a device need not clamp
    return lengths.clamp(max=frames) if values or is_long else lengths


def _values(tensor):
    """The values of a tensor on a CPU, none of those that the host would wait for or cannot see."""
    if torch.compiler.is_compiling():
        return []
    try:
        return [float(value) for value in tensor.flatten().tolist()] if tensor.device.type == "cpu" else []
    except RuntimeError:  # inside torch.func.vmap, and where tensors are traced without values
        return []


def check_lengths(relative: torch.Tensor, batch: int) -> None:
    """Refuse relative lengths that are not one number for each utterance.

    Arguments
    ---------
    relative : torch.Tensor
        The lengths.
    batch : int
        Number of utterances B.

    Raises
    ------
    UserError
        If they are no tensor (B,).

    Example
    -------
    >>> check_lengths(torch.ones(1), 2)
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: The relative lengths have the shape (1,); give a tensor (2,), one for each utterance.
    """
    if torch.compiler.is_compiling():
        return
    shape = tuple(relative.shape) if isinstance(relative, torch.Tensor) else None
    if shape != (batch,):
        found = f"are {relative!r}" if shape is None else f"have the shape {shape}"
        raise UserError(f"The relative lengths {found}; give a tensor ({batch},), one for each utterance.")


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
        If it is no such setting, the chunk size is not a positive multiple, or the left context is negative.

    Example
    -------
    >>> check_chunks(DynChunkTrainConfig(3), multiple=2)
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: The chunk size is 3 frames, but this encoder needs a positive multiple of 2.
    """
    if not isinstance(config, DynChunkTrainConfig):
        raise UserError(f"The chunk setting is {config!r}; give a DynChunkTrainConfig.")
    size, left = config.chunk_size, config.left_context_size
    if not is_whole(size, 1) or size % multiple:
        needs = "a whole number of at least 1" if multiple == 1 else f"a positive multiple of {multiple}"
        raise UserError(f"The chunk size is {size!r} frames, but this encoder needs {needs}.")
    if left is not None and not is_whole(left, 0):
        raise UserError(f"The left context is {left!r} chunks; give a whole number of at least 0, or None for all.")
