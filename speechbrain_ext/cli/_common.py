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


def add_phrases(parser):
    """What a search is to listen for."""
    parser.add_argument(
        "--phrases",
        metavar="FILE",
        help="names and words that beams listen for: one phrase per line, and after a tab its bonus (2 for each token)",
    )


def add_search(parser):
    """How a model searches."""
    parser.add_argument(
        "--search",
        metavar="NAME",
        help="ctc_greedy or ctc_beam; with a decoder also joint_beam or ctc_rescored, with a transducer transducer_greedy or "
        "transducer_beam; by default ctc_greedy, joint_beam or transducer_beam, of a stream with a decoder ctc_greedy",
    )
    add_phrases(parser)
    parser.add_argument(
        "--beam-size",
        type=int,
        metavar="N",
        help="hypotheses of a decoder's or transducer's search, 1 = greedy; by default the model's",
    )
    parser.add_argument(
        "--lm",
        metavar="LM",
        help="a language model of the model's tokens: an ARPA file, as ngram --tokens writes it, or, with a decoder, one of "
        "SpeechBrain: a folder or Hugging Face repository, such as speechbrain/asr-transformer-transformerlm-librispeech",
    )
    add_lm_settings(parser)


def add_lm_settings(parser, others=""):
    """What a language model in the search counts."""
    parser.add_argument(
        "--lm-weight", type=float, metavar="W", help=f"of its log-probabilities; 0.3 of tokens, 0.6 of SpeechBrain's{others}"
    )
    parser.add_argument("--lm-temperature", type=float, metavar="T", help="what the logits of a decoder's are divided by; 1.15")
    parser.add_argument(
        "--lodr",
        metavar="LM.arpa",
        help="beside a --lm of tokens, another one (ngram --tokens --order 2) of the transcripts that the model was trained "
        "with, which is subtracted: low-order density ratio",
    )
    parser.add_argument("--lodr-weight", type=float, metavar="W", help="of its log-probabilities; 0.15")


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


def choose_search(model, arguments):
    """Set the model's search as the arguments say."""
    with usage():
        if arguments.search is not None:
            model.choose_search(arguments.search)
        choose_phrases(model, arguments)
        if arguments.beam_size is not None:
            model.choose_beam(arguments.beam_size)
        choose_lm(model, arguments)


def choose_phrases(model, arguments):
    """Let the model's search listen for the phrases of the arguments."""
    if arguments.phrases is not None:
        from speechbrain_ext.decoders.phrases import read_phrases

        model.choose_phrases(read_phrases(arguments.phrases))


def choose_lm(model, arguments):
    """Take the language model of the arguments into the model's search."""
    options = {"lm_weight": "weight", "lm_temperature": "temperature", "lodr": "lodr"}
    options |= {"lodr_weight": "lodr_weight"}
    given = {option: getattr(arguments, option) for option in options if getattr(arguments, option) is not None}
    if arguments.lm is not None:
        model.choose_lm(arguments.lm, **{options[option]: value for option, value in given.items()})
    elif given:
        option = next(iter(given)).replace("_", "-")
        raise UsageError(f"--{option} is given, and there is no language model; give --lm, or leave it out.")
