"""Measurements for benchmarks: alternating times, peak memory, operations, and the machine's rate."""

import contextlib
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SHORT = 500
"""Milliseconds. For longer calls the state of the caches does not matter."""


def alternate(calls, rounds, warmup=0, device="cpu", failed=None):
    """Time calls alternately, so that a busy moment affects all of them.

    A short call runs once, untimed, before each timed call. Otherwise the other models would have evicted its weights from the
    caches, which does not happen in real use.

    Arguments
    ---------
    calls : dict
        Callables by name.
    rounds : int or dict
        Number of timed rounds, for all calls or by name. With different numbers, the last rounds have fewer calls.
    warmup : int
        Number of untimed rounds before these.
    device : str
        Where the calls run. On a GPU each time ends when the GPU has finished.
    failed : dict, optional
        Receives the errors of failing calls by name; the other calls continue. Without it an error is raised.

    Returns
    -------
    dict
        Lists of times in ms by name, without the failed calls.

    Example
    -------
    >>> times = alternate({"a": lambda: None, "b": lambda: None}, rounds={"a": 3, "b": 1})
    >>> len(times["a"]), len(times["b"])
    (3, 1)
    """
    rounds = rounds if isinstance(rounds, dict) else dict.fromkeys(calls, rounds)
    times = {name: [] for name in calls}
    for turn in range(-warmup, max(rounds.values(), default=0)):
        for name in list(times):
            if turn < rounds[name]:
                try:
                    if not times[name] or times[name][-1] < SHORT:
                        calls[name]()
                    milliseconds = timed(calls[name], device)
                except Exception as error:
                    if failed is None:
                        raise
                    failed[name] = error
                    del times[name]
                    continue
                if turn >= 0:
                    times[name].append(milliseconds)
    return times


def medians(calls, rounds, warmup=1):
    """Median times in ms of calls by name, taken alternately."""
    return {name: statistics.median(times) for name, times in alternate(calls, rounds, warmup).items()}


def timed(call, device="cpu"):
    """Time of one call in ms."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device):
    """Wait until a GPU has finished; does nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(times):
    """Median, lower and upper quartile of a list of numbers.

    Example
    -------
    >>> quartiles([1, 2, 3, 4, 5])
    (3.0, 2.0, 4.0)
    """
    if len(times) == 1:
        return times[0], times[0], times[0]
    lower, middle, upper = statistics.quantiles(times, n=4, method="inclusive")
    return middle, lower, upper


def peak_memory(call, device="cpu"):
    """The peak memory of tensors during a call, minus their memory before it, in MiB.

    On a CPU the figure comes from PyTorch's allocator and is the same each time. It excludes memory that libraries allocate
    themselves, and memory that earlier calls have left in the process.

    Arguments
    ---------
    call : callable
        What to measure.
    device : str
        Where it runs.

    Returns
    -------
    float

    Example
    -------
    >>> round(peak_memory(lambda: torch.ones(2**18) + 1), 1)
    2.0
    """
    if torch.device(device).type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    held = highest = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        highest = max(highest, held)
    return highest / 2**20


def available_memory(device="cpu"):
    """Available memory in MiB; None if the system does not report it."""
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # reserved by PyTorch
        return (torch.cuda.mem_get_info(device)[0] + unused) / 2**20
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # the limit of a container; "max" if it has none
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))  # freed when memory is needed
        free = max(0.0, min(free, (limit - used + cached) / 2**20))
    return free


def count_macs(net, x):
    """Multiply-accumulates of matrix products, convolutions and attention in one forward pass.

    Arguments
    ---------
    net : torch.nn.Module
        The network; it runs once.
    x : torch.Tensor
        Its input.

    Returns
    -------
    int

    Example
    -------
    >>> count_macs(torch.nn.Linear(10, 20), torch.rand(3, 10))
    600
    """
    # The counter does not count fused attention on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() // 2


def gemm_rate(device="cpu", precision="float32", rounds=20):
    """The rate of this machine in a large matrix product, with the current number of threads.

    Arguments
    ---------
    device : str
        Where to multiply.
    precision : str
        "float32", "bfloat16" or "float16".
    rounds : int
        Number of products; the median of their times counts.

    Returns
    -------
    float
        10^9 multiply-accumulates per second.
    """
    size = 4096 if torch.device(device).type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, precision)).unbind()
    times = alternate({"gemm": lambda: a @ b}, rounds, warmup=3, device=device)["gemm"]
    return size**3 / 1e6 / statistics.median(times)
