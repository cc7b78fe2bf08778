"""The machine: what a figure was measured on, and its memory."""

import datetime
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch


def describe_machine(device):
    """What a result was made with.

    Arguments
    ---------
    device : str
        The device of the run.

    Returns
    -------
    dict
        ``commit``, ``hardware`` and ``date`` (UTC).
    """
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} threads"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return {"commit": commit(), "hardware": hardware, "date": date}


def peak_memory_mib(device):
    """The most memory that this process has had: GPU memory on a GPU, else resident memory; in MiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def commit():
    """The commit of this code, with ``+changes`` where files differ from it; ``unknown`` outside of a clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def cpu_name():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep_freed_memory():
    """Make glibc keep the memory that is freed; called once when a program of ours starts.

    Until a block of some size has been freed, glibc takes larger ones from the system again for each call, cleared page by page.
    From this one, which is never written to, it learns to keep all that it can: a HyperConformer takes 0.8 s for 600 s of audio,
    not 0.9 to 1.3 s. Other allocators (torch has one of its own for aarch64) learn nothing from it.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
