"""What the benchmarks share: alternating medians, and results as CSV."""

import csv
import os
import statistics
import time


def medians(calls, rounds, warmup=1):
    """Median times in ms of calls by name, taken alternately so that a busy moment meets them all."""
    times = {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def write_csv(path, fields, rows):
    """Write rows of values, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows(rows)
    os.replace(temporary, path)
