"""Tools for computations that half precision would harm."""

import functools
import threading
from contextlib import nullcontext

import torch

WITHOUT_FLOAT64 = {"mps"}
"""Devices that have no float64."""


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast would change the type of a tensor in a matrix product. It never changes float64.

    Arguments
    ---------
    x : torch.Tensor
        Any tensor.

    Returns
    -------
    bool

    Example
    -------
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocasts(torch.ones(1)), autocasts(torch.ones(1, dtype=torch.float64))
    (True, False)
    """
    return x.dtype != torch.float64 and _enabled(x.device.type)


def _enabled(device):
    # Devices such as "meta" have no autocast, and asking whether it is on raises.
    return (device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def full_precision(x: torch.Tensor):
    """Context in which float32 stays float32: without autocast, and on CUDA without TF32 products.

    Where neither applies, it does nothing, and adds nothing to a graph. PyTorch keeps the TF32 setting for the whole
    process: other threads compute without TF32 meanwhile, and gradients, which are computed later, with it.

    Arguments
    ---------
    x : torch.Tensor
        Any tensor on the device in question.

    Returns
    -------
    context manager

    Example
    -------
    >>> x = torch.rand(2, 2)
    >>> with torch.autocast("cpu", torch.bfloat16), full_precision(x):
    ...     (x @ x).dtype
    torch.float32
    """
    device = x.device.type
    if device == "cuda" and not torch.compiler.is_compiling():
        return _WithoutTF32()
    return torch.autocast(device, enabled=False) if _enabled(device) else nullcontext()


@functools.cache
def _tf32_switches():
    """PyTorch's settings that allow CUDA to round to TF32: module, attribute, and the value that forbids it."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):
        return (backends.cuda.matmul, "fp32_precision", "ieee"), (backends.cudnn.conv, "fp32_precision", "ieee")
    return (backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)  # before torch 2.9


class _WithoutTF32:
    """Switches TF32 off. The last of several open contexts, in one thread or in several, restores what SpeechBrain or the user
    had set through either of PyTorch's two interfaces."""

    lock, count, before = threading.Lock(), 0, ()

    def __enter__(self):
        shared = _WithoutTF32
        with self.lock:
            if not shared.count:
                shared.before = [getattr(module, key) for module, key, _ in _tf32_switches()]
                for module, key, forbidden in _tf32_switches():
                    setattr(module, key, forbidden)
            shared.count += 1
        self.autocast = torch.autocast("cuda", enabled=False) if _enabled("cuda") else nullcontext()
        self.autocast.__enter__()

    def __exit__(self, *error):
        shared = _WithoutTF32
        self.autocast.__exit__(*error)
        with self.lock:
            shared.count -= 1
            if not shared.count:
                for (module, key, _), value in zip(_tf32_switches(), shared.before, strict=True):
                    setattr(module, key, value)


def widest(x: torch.Tensor) -> torch.Tensor:
    """A tensor as float64, for sums over hours; as float32 on Apple's devices, which have no float64.

    Arguments
    ---------
    x : torch.Tensor
        Any tensor.

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> widest(torch.ones(1)).dtype
    torch.float64
    """
    return x.to(widest_dtype(x.device))


def widest_dtype(device) -> torch.dtype:
    """The type that :func:`widest` gives on a device."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half types as float32, others as they are.

    Arguments
    ---------
    x : torch.Tensor
        Any floating tensor.

    Returns
    -------
    torch.Tensor

    Example
    -------
    >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
