"""Samples in memory, of any numeric type, converted to float32 of full scale 1."""

import numpy as np
import torch

from speechbrain_ext.utils.errors import UserTypeError

FULL_SCALE = {torch.int16: 2**15, torch.int32: 2**31}


def as_samples(wav):
    """Convert samples to a float32 tensor of full scale 1.

    Arguments
    ---------
    wav : torch.Tensor or numpy.ndarray
        Floating-point samples of full scale 1, or integers of 16 or 32 bits, which are scaled by their type.

    Returns
    -------
    torch.Tensor
        float32, of the same shape and on the same device.

    Raises
    ------
    UserTypeError
        If they have another type, whose full scale is not known.

    Example
    -------
    >>> as_samples(np.array([-32768, 16384], dtype=np.int16))
    tensor([-1.0000,  0.5000])
    """
    if isinstance(wav, np.ndarray):
        kind = wav.dtype.newbyteorder("=")
        known = kind.kind == "f" or kind in (np.int16, np.int32)
        if known:
            wav = np.ascontiguousarray(wav, dtype=np.float32 if kind.kind == "f" else kind)
            wav = torch.from_numpy(wav if wav.flags.writeable else wav.copy())  # PyTorch warns of a buffer of bytes
    if isinstance(wav, torch.Tensor) and wav.is_floating_point():
        return wav.float()
    if isinstance(wav, torch.Tensor) and wav.dtype in FULL_SCALE:
        return wav.float() / FULL_SCALE[wav.dtype]
    kind = getattr(wav, "dtype", type(wav).__name__)
    raise UserTypeError(f"The samples are {kind}; give a tensor or an array of floats of full scale 1, or of int16 or int32.")
