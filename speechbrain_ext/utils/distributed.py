"""Sums and vectors over the processes of distributed training."""

import torch


def is_distributed():
    """Whether this is one process of a distributed training."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_number():
    """The number of this process in a distributed training; 0 without one, also if SLURM numbers its processes."""
    return torch.distributed.get_rank() if is_distributed() else 0


def sum_over_processes(*tensors):
    """Sum vectors over the processes of distributed training, in one message. One process alone returns them unchanged.

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
    if not is_distributed():
        return tensors
    message = torch.cat(tensors)
    torch.distributed.all_reduce(message)
    return message.split([tensor.numel() for tensor in tensors])


def gather_from_processes(*tensors):
    """Gather vectors from all processes, in one message.

    Arguments
    ---------
    *tensors : torch.Tensor
        Each (N,), of one type and on one device.

    Returns
    -------
    tuple of torch.Tensor
        Each (processes, N).

    Example
    -------
    >>> gather_from_processes(torch.ones(2))
    (tensor([[1., 1.]]),)
    """
    if not is_distributed():
        return tuple(tensor.unsqueeze(0) for tensor in tensors)
    message = torch.cat(tensors)
    parts = [torch.empty_like(message) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, message)
    return torch.stack(parts).split([tensor.numel() for tensor in tensors], dim=1)
