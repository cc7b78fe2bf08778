"""What the commands share."""

import sys
from contextlib import contextmanager, redirect_stdout

from speechbrain_ext.utils.errors import UsageError, UserError
from speechbrain_ext.utils.text import printable


def say(message):
    """One line on standard error."""
    print(f"speechbrain_ext: {printable(' '.join(str(message).split()))}", file=sys.stderr)


@contextmanager
def usage():
    """Take what the user can mend for wrong usage, and standard output for the results alone, whatever the libraries say."""
    with redirect_stdout(sys.stderr):
        try:
            yield
        except OSError as error:
            said = error.strerror is not None and error.filename is not None
            cause = f"{error.filename} cannot be read or written: {error.strerror}; give another place." if said else str(error)
            raise UsageError(cause) from error
        except UserError as error:
            raise UsageError(str(error)) from error


def add_model(parser, help="a model folder that training wrote, or a Hugging Face repository, user/model"):
    """The model of a command."""
    parser.add_argument("--model", metavar="MODEL", required=True, help=help)
    parser.add_argument("--trust", action="store_true", help="let the model's hyperparams.yaml name, and so run, any code")


def add_pass(parser):
    """Which pass of a cascade."""
    parser.add_argument("--pass", dest="pass_name", metavar="NAME", help="of a cascade, which pass answers: first or second")


def add_device(parser):
    """Where a model runs, and which version of it."""
    parser.add_argument("--device", help="such as cpu or cuda:0; by default a GPU if there is one")
    parser.add_argument("--revision", help="of a Hugging Face repository, the commit, tag or branch")


def load(arguments):
    """The model that the arguments name."""
    with usage():
        from speechbrain_ext.inference import load_model
        from speechbrain_ext.utils.machine import keep_freed_memory

        keep_freed_memory()
        return load_model(arguments.model, arguments.device, arguments.pass_name, arguments.revision, arguments.trust)
