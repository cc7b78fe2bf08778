"""Errors that the user can mend: their message is one sentence that says what is wrong and what to do.

The command line and ``train.py`` print such a message, and that of an operating-system error, without a traceback. Every other
exception is a bug, in this package or in the user's own code, and keeps its traceback.
"""

import sys
from pathlib import Path

from speechbrain_ext.utils.text import printable

KNOWN = {
    "speechbrain_ext",
    "numpy",
    "safetensors",
    "sentencepiece",
    "speechbrain",
    "torch",
    "torchaudio",
    *sys.stdlib_module_names,
}
"""Packages whose errors are about the values that they were given; an error of any other code may be a bug of a user's own."""


class UserError(ValueError):
    """Bad input: a value, a file or a setting. The message names it and the remedy."""


class UsageError(UserError):
    """Wrong arguments of a command, found before anything was done."""


class UserTypeError(UserError, TypeError):
    """A key or argument that does not exist."""


class UserRuntimeError(UserError, RuntimeError):
    """Something that was found only while working, such as a damaged file."""


class UserImportError(UserError, ImportError):
    """A package that is missing; the message says how to install it."""


def one_line(error, limit=300):
    """The message of any error on one line, with nothing in it that a terminal would obey.

    Arguments
    ---------
    error : BaseException or str
        The error.
    limit : int
        Longest result, in characters.

    Returns
    -------
    str
        The class's name where there is no message.

    Example
    -------
    >>> one_line(ValueError("no\\n  such file"))
    'no such file'
    >>> one_line(KeyboardInterrupt())
    'KeyboardInterrupt'
    """
    return printable(" ".join(str(error).split()))[:limit] or type(error).__name__


def yaml_problem(error):
    """What a YAML error complains of, and where.

    Arguments
    ---------
    error : ruamel.yaml.YAMLError
        The error.

    Returns
    -------
    tuple of str
        The complaint, and " in line N" or nothing.
    """
    mark = getattr(error, "problem_mark", None)
    return getattr(error, "problem", None) or one_line(error), f" in line {mark.line + 1}" if mark else ""


def raised_in(error, *packages):
    """Whether an error was raised by the code of some packages itself, and not by what that code has called.

    Arguments
    ---------
    error : BaseException
        An error that has been caught.
    *packages : str
        Their names.

    Returns
    -------
    bool
    """
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return any(package in Path(trace.tb_frame.f_code.co_filename).parts for package in packages)


def is_known(module):
    """Whether a module, by its name, is of :data:`KNOWN`, and not a user's own."""
    return str(module).partition(".")[0] in KNOWN


def runs_foreign_code(error):
    """Whether a user's own code has a part in an error that has been caught."""
    trace = error.__traceback__
    while trace is not None:
        if not is_known(trace.tb_frame.f_globals.get("__name__")):
            return True
        trace = trace.tb_next
    return False
