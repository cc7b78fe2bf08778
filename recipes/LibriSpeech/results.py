"""The results table: one row for each test set and search of each run, as CSV."""

import csv
import datetime
import fcntl
import os
import platform
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch


def append_rows(path, rows):
    """Append rows to a CSV file, complete or not at all, also where several runs write to it at once.

    Columns that only the new rows have are added at the end, and are empty in the rows that were there.

    Arguments
    ---------
    path : str
        The file; it is made where it is missing.
    rows : list of dict
        The rows.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.csv"
    >>> append_rows(path, [{"model": "a", "WER": 5.0}])
    >>> append_rows(path, [{"model": "b", "WER": 4.0, "steps": 100}])
    >>> print(path.read_text().strip())
    model,WER,steps
    a,5.0,
    b,4.0,100
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        earlier, columns = [], []
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                earlier, columns = list(reader), list(reader.fieldnames or ())
        columns += [column for column in dict.fromkeys(key for row in rows for key in row) if column not in columns]
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*earlier, *rows])
        os.replace(temporary, path)


def describe_machine(device):
    """What a result was made with: commit, hardware and date.

    Arguments
    ---------
    device : str
        The device of the run.

    Returns
    -------
    dict
    """
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    return {"commit": _commit(), "hardware": hardware, "date": date}


def peak_memory_mib(device):
    """The most memory that this process has had: GPU memory on a GPU, else resident memory; in MiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere


def _commit():
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def _locked(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
