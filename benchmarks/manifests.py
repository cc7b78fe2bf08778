"""Time to validate a manifest: all audio is decoded to its end and compared with the manifest.

    python benchmarks/manifests.py [--rows 100000] [--output benchmarks/results/manifests.csv]

The rows, in NeMo's JSON lines, are FLAC files of 1.2 s of noise, or segments of that length in recordings of ten minutes. Most
files are links to a few files, so that they are read from memory, not from a disk. ``again`` is the time of a second call without
changes. ``processor_seconds`` is the sum over all processes, one per processor of the machine.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.Manifest.prepare import prepare_manifests  # noqa: E402
from speechbrain_ext.utils.files import write_csv  # noqa: E402

RATE, SECONDS, PAUSE, SEGMENTS = 16000, 1.2, 0.05, 480
FIELDS = ("rows", "count", "hours", "seconds", "processor_seconds", "again_seconds")


def make(folder, name, seconds, copies):
    """Write a few files of noise, and links to them."""
    generator = np.random.default_rng(0)
    for index in range(copies):
        path = folder / f"{name}-{index}.flac"
        if index < 4:
            soundfile.write(path, 0.1 * generator.standard_normal(round(RATE * seconds)), RATE)
        else:
            os.link(folder / f"{name}-{index % 4}.flac", path)


def rows_of(form, folder, count):
    """Write audio files; yields the lines of their manifest."""
    make(
        folder,
        form,
        SECONDS if form == "files" else SEGMENTS * (SECONDS + PAUSE),
        count if form == "files" else -(-count // SEGMENTS),
    )
    for index in range(count):
        file, segment = (index, 0) if form == "files" else divmod(index, SEGMENTS)
        row = {
            "id": f"u{index}",
            "audio_filepath": f"{form}-{file}.flac",
            "duration": SECONDS,
            "text": f"Line {index}, as it is.",
        }
        yield row | ({} if form == "files" else {"offset": segment * (SECONDS + PAUSE)})


def spent():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def measure(form, count):
    """Measure a row of the results."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train, valid = folder / "train.jsonl", folder / "valid.jsonl"
        train.write_text("".join(json.dumps(row) + "\n" for row in rows_of(form, folder, count)))
        make(folder, "valid", SECONDS, 1)
        valid.write_text(json.dumps({"audio_filepath": "valid-0.flac", "text": "A line."}))
        times = []
        for _ in range(2):
            begin = time.perf_counter(), spent()
            prepare_manifests(None, folder / "save", ["train"], ["valid"], [], [train], [valid], max_skipped=0)
            times.append((time.perf_counter() - begin[0], spent() - begin[1]))
        return [form, count, *(f"{value:.1f}" for value in (count * SECONDS / 3600, *times[0], times[1][0]))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "manifests.csv")
    args = parser.parse_args()
    write_csv(args.output, FIELDS, [measure(form, args.rows) for form in ("segments", "files")])


if __name__ == "__main__":
    main()
