"""Test all encoders on a GPU in one command with a time limit: correctness, speed and training.

    python benchmarks/gpu.py --minutes 9 --data FOLDER [FOLDER ...] --test FOLDER [FOLDER ...] [--dev FOLDER] --out FOLDER
    python benchmarks/gpu.py --minutes 9 --parts contract,table --out FOLDER
    python benchmarks/gpu.py --minutes 2 --tiny

contract  outputs and gradients of every encoder, compared with the CPU's (gpu_contract.py): contract.csv
table     time and peak memory of training steps, batches and streams, for our encoders and for those of SpeechBrain and
          torchaudio at the size of the published 8M models, then at our encoders' published sizes (as
          ``python -m speechbrain_ext bench``): table.csv
train     training of five architectures at once on ``--data`` in the remaining time, and their word error rates on
          ``--test`` (gpu_training.py): training.csv, and for each an archive with its model folder

Rows are written as soon as they are measured; those of the table when all models of a comparison are measured. Each part is a
separate process, so that a failure does not stop the others. The folders hold speech in LibriSpeech layout, 5 to 15 hours for
training. The exit status is 0 if all parts finish. If the time ends during the table, the file has the rows measured so far.
``--tiny`` runs all parts in a minute with small encoders. It uses tones with sentences if no folders are given, and the CPU if
there is no GPU.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE), str(ROOT / "tests")]
PARTS = ("contract", "table", "train")
SHARES = {"contract": 0.25, "table": 0.35}
"""Largest share of the remaining time for a part, if training follows."""
RESERVE = 45
"""Seconds after the training for the last validation, tests and model folders; at most a third of the time."""
LAST = 10
"""All processes end this number of seconds before the limit."""
STEP = {"parts": ("training",), "inputs": ("front end",), "train_seconds": 15, "train_batch": 40}
TABLE = (
    STEP | {"precision": ("bfloat16",)},
    {"parts": ("inference",), "inputs": ("audio",), "precision": ("float32", "bfloat16"), "batch": (32,), "seconds": (15,)},
    {"parts": ("streaming",), "stream_seconds": (30,), "left_context": (10, -1), "graphs": True},
    STEP | {"precision": ("float32", "tf32", "float16")},
    {"parts": ("training",), "inputs": ("audio",), "precision": ("bfloat16",), "train_seconds": 15, "train_batch": 40},
    {"parts": ("inference",), "inputs": ("front end",), "batch": (1,), "seconds": (10, 60), "precision": ("float32",)},
    STEP | {"precision": ("bfloat16",), "own_sizes": True, "peers": ()},
)
"""Parts of the table, the most important first: settings of speechbrain_ext.bench.run."""
TINY = {"d_model": 16, "nhead": 2, "num_layers": 1, "d_ffn": 32, "kernel_size": 3, "rounds": 1, "seconds": (1,), "batch": (2,)}
TINY |= {"train_seconds": 1, "train_batch": 2, "stream_seconds": (2,), "precision": ("float32",), "own_sizes": False}
TINY |= {"encoders": ("hyperconformer", "fusionformer"), "peers": (), "forms": ("plain", "fused")}
ENDED = "it was stopped at the time limit"


class Failed(Exception):
    """A part, or one of its processes, did not finish."""


def run(commands, until):
    """Run processes in parallel until they end or the time is over; returns the exit status of each, None if it was stopped.

    If this process gets SIGTERM, the processes are also stopped; by default SIGTERM runs no ``finally``.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(commands)))} | os.environ
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    ends, before = [], signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    started = []
    try:
        for command in commands:
            command = [sys.executable, *map(str, command)]
            started.append(subprocess.Popen(command, env=environment, start_new_session=True))
        for process in started:
            try:
                ends.append(process.wait(max(0.1, until - time.time())))
            except subprocess.TimeoutExpired:
                ends.append(None)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the process and its workers
                process.wait()
        signal.signal(signal.SIGTERM, before)
    return ends


def contract(arguments, until):
    """Measure the rows of the contract."""
    command = [HERE / "gpu_contract.py", "--device", arguments.device, "--output", arguments.out / "contract.csv"]
    (end,) = run([command + ["--first"] * arguments.tiny], until)
    if end != 0:
        raise Failed(ENDED if end is None else f"it ended with {end}")


def table(arguments, until):
    """Measure the rows of the table; returns a remark if the time limit stopped it."""
    options = ["--out", arguments.out, "--device", arguments.device, *["--tiny"] * arguments.tiny]
    (end,) = run([[__file__, "--only-table", *options]], until)
    if end:
        raise Failed(f"it ended with {end}")
    return "was stopped at the time limit, with the rows measured so far," if end is None else None


def measure(arguments):
    """Measure the table; runs in a separate process."""
    from speechbrain_ext.bench.run import Settings
    from speechbrain_ext.bench.run import run as bench

    failed = 0
    for settings in TABLE:
        settings = {"own_sizes": False, "device": arguments.device, "rounds": 15, "budget": 10.0} | settings
        settings |= TINY if arguments.tiny else {}
        if arguments.device == "cpu":  # without CUDA graphs and TensorFloat-32
            chosen = settings.get("precision", ("float32",))
            settings |= {"graphs": False, "precision": tuple(precision for precision in chosen if precision != "tf32")}
        rows = bench(Settings(**settings), arguments.out / "table.csv").added
        for row in (row for row in rows if row["note"].startswith("failed")):
            failed += 1
            print(f"gpu.py: {row['encoder']}, {row['task']}, {row['precision']}: {row['note']}", flush=True)
    return int(failed > 0)


def train(arguments, until):
    """Train, and write rows and models."""
    from gpu_training import ARCHITECTURES

    script = HERE / "gpu_training.py"
    with tempfile.TemporaryDirectory() as work:
        data, test = arguments.data, arguments.test
        if not data:
            from tiny import make_corpus

            corpus = make_corpus(Path(work, "tiny"))
            data, test = [corpus / "train-tiny"], [corpus / "test-tiny"]
        usual = ["--work", Path(work, "run"), "--device", arguments.device, *["--tiny"] * arguments.tiny]
        dev = ["--dev", arguments.dev] if arguments.dev else []
        (end,) = run([[script, "prepare", *usual, "--data", *data, "--test", *test, *dev]], until)
        if end != 0:
            raise Failed(f"before training, {ENDED}" if end is None else f"preparing the data ended with {end}")
        left = until - time.time()
        usual += ["--until", until - min(RESERVE, left / 3), "--out", arguments.out]
        usual += ["--precision", "bf16" if arguments.device.startswith("cuda") else "fp32"]
        ends = run([[script, name, *usual] for name in ARCHITECTURES], until)
    faults = {
        name: ENDED if end is None else f"it ended with {end}" for name, end in zip(ARCHITECTURES, ends, strict=True) if end != 0
    }
    if failed := [f"{name}: {fault}" for name, fault in faults.items()]:
        raise Failed("; ".join(failed))


def parse(argv):
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="time limit of all parts; default 9")
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="speech to train on, in LibriSpeech layout")
    parser.add_argument("--test", nargs="+", metavar="FOLDER", help="speech to test on")
    parser.add_argument("--dev", metavar="FOLDER", help="speech for validation; by default some speakers of --data")
    parser.add_argument("--out", type=Path, default=Path("gpu"), metavar="FOLDER", help="folder of the results; default gpu")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="PART,PART", help=f"some of {', '.join(PARTS)}; default all")
    parser.add_argument("--device", help="cuda, cuda:N or cpu; by default the GPU")
    parser.add_argument("--tiny", action="store_true", help="small encoders and a few utterances, to try the script")
    parser.add_argument("--only-table", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    parts = [part for part in arguments.parts.split(",") if part]
    if not parts or set(parts) - set(PARTS):
        parser.error(f"--parts is {arguments.parts!r}; give some of {','.join(PARTS)}")
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes:g}; give a number above 0")
    if "train" in parts and not arguments.only_table:
        if bool(arguments.data) != bool(arguments.test) or not (arguments.data or arguments.tiny):
            parser.error("training needs both --data and --test; give them, or leave train out of --parts")
        for folder in [*(arguments.data or ()), *(arguments.test or ()), *filter(None, [arguments.dev])]:
            if not Path(folder).is_dir():
                parser.error(f"{folder} is not a folder; give one with speech in LibriSpeech layout")
        if arguments.dev and not arguments.data:
            parser.error("--dev is given without --data; give both, or none")
        if arguments.dev and Path(arguments.dev).resolve() in {Path(folder).resolve() for folder in arguments.data}:
            parser.error(f"{arguments.dev} is in --data and is --dev; give other speech for validation")
    arguments.parts = [part for part in PARTS if part in parts]
    if arguments.device is None:
        import torch

        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments.device == "cpu" and not arguments.tiny:
            parser.error("PyTorch finds no GPU; give --tiny to try the script, or --device cpu to measure this CPU")
    return arguments


def main(argv=None):
    """Run the parts; the exit status is 0 if all finish."""
    arguments = parse(argv)
    until = time.time() + 60 * arguments.minutes - LAST
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only_table:
        return measure(arguments)
    failed = []
    for part, call in ((part, globals()[part]) for part in arguments.parts):
        began = time.time()
        share = SHARES.get(part, 1) if "train" in arguments.parts else {"contract": 0.6}.get(part, 1)
        try:
            ending = call(arguments, began + share * (until - began)) or "finished"
        except Failed as error:
            failed.append(part)
            ending = f"failed: {error}"
        print(f"gpu.py: {part} {ending} after {time.time() - began:.0f} s", flush=True)
    print(f"gpu.py: results are in {arguments.out}: {', '.join(sorted(path.name for path in arguments.out.iterdir()))}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
