"""Sums over the processes of distributed training."""

import torch


def sum_over_processes(*tensors):
    """Vectors summed over the processes of distributed training, in one message; alone they are as they were.

    Arguments
    ---------
    *tensors : torch.Tensor
        Each (N,), of one type and on one device.

    Returns
    -------
    tuple of torch.Tensor

    Example
    -------
    >>> sum_over_processes(torch.ones(2))
    (tensor([1., 1.]),)
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensors
    message = torch.cat(tensors)
    torch.distributed.all_reduce(message)
    return message.split([tensor.numel() for tensor in tensors])
