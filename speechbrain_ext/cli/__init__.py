"""The command line: ``python -m speechbrain_ext COMMAND ...``, with a file for each command.

Results go to standard output, all other messages to standard error. The exit status is 0 for success, 2 for wrong usage, and 1
for any other failure.
"""

import argparse
import contextlib
import io
import itertools
import signal
import sys
import threading

from speechbrain_ext.cli import bench, evaluate, export, ngram, publish, stream, transcribe
from speechbrain_ext.cli._common import say
from speechbrain_ext.utils.errors import UsageError, UserError, forget_output

GROUPS = {
    "Audio to text": (transcribe, stream),
    "Error rates and language models": (evaluate, ngram),
    "Models elsewhere": (export, publish),
    "Encoders on this machine": (bench,),
}
"""The commands by group; the first line of each file describes the command."""


class _Parser(argparse.ArgumentParser):
    """A parser whose help lists the commands by group."""

    def format_help(self):
        lines = [self.format_usage(), self.description]
        for title, commands in GROUPS.items():
            lines.append(f"\n{title}:")
            for command in commands:
                name, _, what = command.__doc__.partition("\n")[0].rstrip(".").partition(": ")
                lines.append(f"  {name.strip('`'):12}{what}")
        return "\n".join([*lines, f"\n{self.epilog}\n"])


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
    parser = _Parser(
        prog="speechbrain_ext",
        description="Speech recognition with speechbrain_ext's models. train.py trains them.",
        epilog="COMMAND --help lists the options. MODEL is a folder that training wrote, or user/model of Hugging Face.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser)
    for command in itertools.chain.from_iterable(GROUPS.values()):
        command.add(commands)
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # print names and words that the terminal cannot show with escapes
            output.reconfigure(errors="backslashreplace")
    try:
        with _stopped_in_order():
            return _run(arguments)
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _stopped_in_order():
    """A context in which a stop by the system (SIGTERM) removes incomplete files."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
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
        if not isinstance(error, BrokenPipeError):  # "| head" closes the pipe early; that is no error
            place = error.filename or "Standard input or output"
            say(f"{place} cannot be read or written: {error.strerror}; the results so far are kept.")
        if error.filename is None:
            forget_output()
        return 1
