"""Errors that the user can fix. The message is one sentence: what is wrong and what to do.

The command line and ``train.py`` print these messages, and those of operating-system errors, without a traceback. Every other
exception is a bug in this package or in the user's code, and keeps its traceback.
"""

import math
import numbers
import os
import re
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
"""Packages whose errors are about the values passed to them. An error in any other code may be a bug of the user's code."""


class UserError(ValueError):
    """A wrong value, file or setting. The message names it and the remedy."""


class UsageError(UserError):
    """Wrong arguments of a command; the command has done nothing yet."""


class UserTypeError(UserError, TypeError):
    """A key or argument that does not exist."""


class UserRuntimeError(UserError, RuntimeError):
    """A problem that only shows during the work, such as a damaged file."""


class UserImportError(UserError, ImportError):
    """A missing package; the message says how to install it."""


def one_line(error, limit=300):
    """The message of any error on one line, without control characters.

    Arguments
    ---------
    error : BaseException or str
        The error.
    limit : int
        Greatest length of the result, in characters.

    Returns
    -------
    str
        The class's name if there is no message.

    Example
    -------
    >>> one_line(ValueError("no\\n  such file"))
    'no such file'
    >>> one_line(KeyboardInterrupt())
    'KeyboardInterrupt'
    """
    text = str(error)
    if text.startswith("Caught ") and (cause := re.search(r".*^[\w.]+: (.+)", text, re.DOTALL | re.MULTILINE)):
        text = cause[1]  # of a process that loads data; PyTorch's message holds the whole traceback
    return printable(" ".join(text.split()))[:limit] or type(error).__name__


def yaml_problem(error):
    """The problem of a YAML error, and its line.

    Arguments
    ---------
    error : ruamel.yaml.YAMLError
        The error.

    Returns
    -------
    tuple of str
        The problem, and " in line N" or an empty string.
    """
    mark = getattr(error, "problem_mark", None)
    return getattr(error, "problem", None) or one_line(error), f" in line {mark.line + 1}" if mark else ""


def raised_in(error, *packages):
    """Whether the code of some packages raised an error itself; code that it called does not count.

    Arguments
    ---------
    error : BaseException
        A caught error.
    *packages : str
        Names of the packages.

    Returns
    -------
    bool
    """
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return any(package in Path(trace.tb_frame.f_code.co_filename).parts for package in packages)


def is_known(module):
    """Whether a module name belongs to a package of :data:`KNOWN`."""
    return str(module).partition(".")[0] in KNOWN


def runs_foreign_code(error):
    """Whether the traceback of a caught error goes through the user's code."""
    trace = error.__traceback__
    while trace is not None:
        if not is_known(trace.tb_frame.f_globals.get("__name__")):
            return True
        trace = trace.tb_next
    return False


def forget_output():
    """After an error of standard output: without this, Python would report it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_whole(value, least, most=math.inf):
    """Whether a setting is a whole number from ``least`` to ``most``; booleans do not count, numpy's numbers do."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= value <= most


def is_number(value, least=-1e30, most=1e30):
    """Whether a setting is a number from ``least`` to ``most``; text, booleans, NaN and infinity do not count."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and least <= value <= most
