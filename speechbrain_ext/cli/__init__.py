"""The command line: ``python -m speechbrain_ext COMMAND ...``, a file per command.

Results go to standard output, all else to standard error. The exit status is 0 only when all went well, 2 for wrong usage,
1 otherwise.
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading

from speechbrain_ext.cli import bench, evaluate, export, ngram, publish, stream, transcribe
from speechbrain_ext.cli._common import say
from speechbrain_ext.utils.errors import UsageError, UserError

COMMANDS = (transcribe, stream, evaluate, ngram, export, publish, bench)


def main(argv=None):
    """Run a command.

    Arguments
    ---------
    argv : list of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="speechbrain_ext", description="Speech recognition with speechbrain_ext's models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    arguments = parser.parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # a name or word that the terminal cannot show is no reason to stop
            output.reconfigure(errors="backslashreplace")
    try:
        with _stopped_in_order():
            return _run(arguments)
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _stopped_in_order():
    """A context in which a stop by the system (SIGTERM) still removes what is half-written."""
    if threading.current_thread() is not threading.main_thread():  # no other may
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments):
    try:
        return arguments.run(arguments)
    except UsageError as error:
        say(error)
        return 2
    except UserError as error:
        say(error)
        return 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # such as "| head", which needs no more
            place = error.filename or "Standard input or output"
            say(f"{place} cannot be read or written: {error.strerror}; what is done is kept.")
        if error.filename is None:  # without this, Python complains again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
