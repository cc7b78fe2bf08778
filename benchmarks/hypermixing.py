"""Time and memory of HyperMixing here and in SpeechBrain, by length, with the same weights, input and output.

    python benchmarks/hypermixing.py [--threads N] [--output benchmarks/results/hypermixing.csv]

Times are medians of alternating calls in one process; a ratio above 1 means that SpeechBrain's module takes more. Peak memory is
the growth of a process's resident set over one call, in MiB, in a new process for each call. SpeechBrain's module is built with
``max_length`` equal to the length of the input, above its default of 3,000 frames.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from speechbrain.nnet.hypermixing import HyperMixing as SpeechBrainHyperMixing

from speechbrain_ext.lobes.hypermixing import HyperMixing
from speechbrain_ext.utils.files import write_csv
from speechbrain_ext.utils.measure import medians

WIDTH, HIDDEN, HEADS = 144, 576, 8  # the published 8M HyperConformer
FRAMES = (250, 500, 1000, 2000, 4000, 8000)
FIELDS = ("frames", "ours_ms", "speechbrain_ms", "time_ratio", "ours_mib", "speechbrain_mib", "memory_ratio", "difference")


def build(name, frames):
    """One of the two modules; both have the same weights."""
    torch.manual_seed(0)
    theirs = SpeechBrainHyperMixing(WIDTH, HIDDEN, False, HEADS, max_length=frames).eval()
    if name == "speechbrain":
        return theirs
    ours = HyperMixing(WIDTH, HIDDEN, num_heads=HEADS).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours


def resident(field):
    """The memory of this process in MiB, from Linux: VmRSS is the current one, VmHWM the peak."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024


@torch.no_grad()
def peak(name, frames):
    """Growth of this process's resident set by one call, in MiB."""
    net = build(name, frames)
    x = torch.randn(1, frames, WIDTH)
    short = x[:, :8]
    net(short, short, short)  # allocates the buffers of libraries
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    net(x, x, x)
    return resident("VmHWM") - before


@torch.no_grad()
def compare(frames, rounds):
    """Medians of alternating calls, in ms, and the largest difference of the outputs."""
    nets = {name: build(name, frames) for name in ("ours", "speechbrain")}
    x = torch.randn(1, frames, WIDTH)
    answers = {name: net(x, x, x)[0] for name, net in nets.items()}
    ms = medians({name: lambda net=net: net(x, x, x) for name, net in nets.items()}, rounds, warmup=0)
    difference = (answers["ours"] - answers["speechbrain"]).abs().max().item()
    return ms["ours"], ms["speechbrain"], difference


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "hypermixing.csv")
    parser.add_argument("--peak", nargs=2, metavar=("MODULE", "FRAMES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(arguments.peak[0], int(arguments.peak[1])))
        return
    rows = []
    print(("{:>16}" * len(FIELDS)).format(*FIELDS))
    for frames in FRAMES:
        ours, theirs, difference = compare(frames, arguments.rounds)
        command = [sys.executable, __file__, "--threads", str(arguments.threads), "--peak"]
        memory = [
            max(0.1, float(subprocess.run([*command, name, str(frames)], check=True, capture_output=True, text=True).stdout))
            for name in ("ours", "speechbrain")
        ]
        row = (frames, round(ours, 3), round(theirs, 3), round(theirs / ours, 2))
        row += (*(round(value, 1) for value in memory), round(memory[1] / memory[0], 1), f"{difference:.1e}")
        print(("{:>16}" * len(FIELDS)).format(*row), flush=True)
        rows.append(row)
    write_csv(arguments.output, FIELDS, rows)


if __name__ == "__main__":
    main()
