"""The machine that a figure was measured on, and its memory."""

import datetime
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from speechbrain_ext.utils.distributed import is_distributed


def describe_machine(device):
    """The commit, hardware and date of a result.

    Arguments
    ---------
    device : str
        The device of the run.

    Returns
    -------
    dict
        ``commit``, ``hardware``, with the number of processes if there are several, and ``date`` (UTC).
    """
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        hardware = f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}"
    if is_distributed():
        hardware = f"{torch.distributed.get_world_size()} x {hardware}"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return {"commit": commit(), "hardware": hardware, "date": date}


def peak_memory_mib(device):
    """The peak memory of this process in MiB: GPU memory on a GPU, resident memory elsewhere."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def commit():
    """The commit of this code, with ``+changes`` if files differ from it; ``unknown`` outside a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def python_command():
    """What to type for this Python: ``python`` in an activated environment, else its path.

    Example
    -------
    >>> "python" in python_command()
    True
    """
    found = shutil.which("python")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "python"
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def emulates(precision):
    """Whether this processor is known to lack a precision, so that computing in it takes several times as long as in float32.

    Arguments
    ---------
    precision : str
        "bf16", "fp16" or "fp32".

    Example
    -------
    >>> emulates("fp32")
    False
    """
    # oneDNN's test, which means something on x86 only. AVX-512 without bf16 instructions counts as enough: it is not slow
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    return supported is not None and platform.machine() in ("x86_64", "AMD64") and not supported()


def cpu_name():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep_freed_memory():
    """Make glibc keep freed memory; called once at the start of a program.

    glibc takes a block larger than any freed so far from the system, cleared page by page, at each call. Freeing one very large
    block raises that limit to its maximum; the block is never written to. A HyperConformer then takes 0.8 s for 600 s of audio,
    not 0.9 to 1.3 s. This has no effect on other allocators, such as that of torch for aarch64.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
