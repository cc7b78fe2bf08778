"""``bench``: all encoders on this machine."""

import argparse
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from speechbrain_ext.cli._common import say
from speechbrain_ext.utils.errors import UsageError, UserError


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure all encoders and their alternatives on this machine",
        description="Measure all registered encoders, and those of SpeechBrain and torchaudio, at equal sizes: parameters and "
        "operations, inference by length and batch, training, streams. Results go to a CSV file, with tables and plots beside "
        "it; tables also go to standard output. After an interruption, the same command continues.",
        argument_default=argparse.SUPPRESS,  # the defaults are those of speechbrain_ext.bench.run.Settings
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes on two cores")
    parser.add_argument("--output", metavar="FILE.csv", help="by default results/bench/MACHINE.csv, or MACHINE-quick.csv")
    parser.add_argument("--report", action="store_true", help="measure nothing; --output may be a folder with a file per machine")
    parser.add_argument("--readme", metavar="FILE.md", help="also write the tables between its marks bench:begin and bench:end")
    parser.add_argument("--wer", metavar="FILE.csv", help="results of trainings with these sizes, to plot against cost")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--encoders", nargs="+", metavar="NAME", help="registered names; by default all")
    what.add_argument("--peers", nargs="*", metavar="NAME", help="encoders of others; by default all; without a name none")
    what.add_argument(
        "--equal-only", dest="own_sizes", action="store_false", help="do not measure encoders at their published sizes"
    )
    for key, usual in (("d-model", 144), ("nhead", 8), ("num-layers", 10), ("d-ffn", 576), ("kernel-size", 31)):
        what.add_argument(f"--{key}", type=int, metavar="N", help=f"for all encoders at equal sizes ({usual})")
    how = parser.add_argument_group("how")
    how.add_argument("--parts", nargs="+", metavar="PART", help="any of size, inference, training, streaming")
    how.add_argument("--inputs", nargs="+", metavar="INPUT", help="'encoder' alone, with 'front end', or from 'audio'")
    how.add_argument("--forms", nargs="+", metavar="FORM", help="any of plain, fused, int8")
    how.add_argument("--device", help="cpu or cuda (cpu)")
    how.add_argument("--threads", type=int, metavar="N")
    how.add_argument("--precision", nargs="+", metavar="TYPE", help="any of float32, tf32 (GPU), bfloat16, float16 (autocast)")
    how.add_argument("--compiled", action="store_true", help="also measure compiled models; on a CPU, needs a C++ compiler")
    how.add_argument("--graphs", action="store_true", help="also measure streams as CUDA graphs; needs a GPU")
    how.add_argument("--seconds", type=int, nargs="+", metavar="N", help="seconds of audio (5 10 20 40 80 160)")
    how.add_argument("--batch", type=int, nargs="+", metavar="N", help="utterances (1 8)")
    how.add_argument("--train-seconds", type=int, metavar="N", help="seconds of audio per utterance of a training step (10)")
    how.add_argument("--train-batch", type=int, metavar="N", help="utterances of a training step (8)")
    how.add_argument("--padding", type=int, metavar="PERCENT", help="padding of the shortest of a batch (10); 0 = no mask")
    how.add_argument("--stream-seconds", type=int, nargs="+", metavar="N", help="times in a stream to measure at (60 600)")
    how.add_argument("--chunk-size", type=int, metavar="FRAMES", help="frames of 40 ms per chunk (16)")
    how.add_argument("--left-context", type=int, nargs="+", metavar="CHUNKS", help="chunks of left context, -1 = all (-1 10)")
    how.add_argument("--rounds", type=int, metavar="N", help="repetitions; the median is reported (15)")
    how.add_argument("--retry", action="store_true", help="measure rows again that have a note in place of figures")
    how.add_argument("--budget", type=float, metavar="SECONDS", help="time limit for one model in one cell (120)")
    parser.set_defaults(run=run)


def run(arguments):
    """Measure, and print the tables."""
    given = vars(arguments)
    options = {key: given.pop(key, None) for key in ("quick", "output", "report", "readme", "wer")}
    del given["run"]
    # Silence PyTorch's profiler (about missing GPUs) and C++ warnings (about earlier memory); torch reads both at import
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with redirect_stdout(sys.stderr):  # for messages of libraries
        from speechbrain_ext.bench import report
        from speechbrain_ext.bench.models import EqualityError
        from speechbrain_ext.bench.run import QUICK, Settings, Table, check, machine, origin
        from speechbrain_ext.bench.run import run as measure

        settings = Settings(
            **(QUICK if options["quick"] else {})
            | {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        )
        try:
            check(settings)
            if options["readme"]:
                report.check_readme(options["readme"])
            path = Path(options["output"] or f"results/bench/{machine(settings)}{'-quick' * bool(options['quick'])}.csv")
            wers = report.read_wers(options["wer"], settings.dims) if options["wer"] else ()
            if options["report"]:
                report.files(path)
            elif path.exists():
                Table(path).check_origin(origin(settings))
        except (FileNotFoundError, UserError) as error:
            raise UsageError(str(error)) from error
        try:
            added = () if options["report"] else measure(settings, path).added
        except EqualityError as error:
            say(error)
            return 1
        tables = report.write(path)
        failed = sum(row["note"].startswith("failed") for row in added)
        if failed:
            say(f"{failed} rows of {path} failed, and have a note in place of figures; --retry measures them again.")
        status = int(failed > 0)
        try:
            report.plot(path, wers)
        except ImportError as error:
            say(error)
            status |= bool(options["report"])
        if options["readme"]:
            report.write_readme(options["readme"], path)
    print(tables)
    return status
