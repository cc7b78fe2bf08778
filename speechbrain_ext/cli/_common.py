"""Options and helpers of several commands."""

import sys
from contextlib import contextmanager, redirect_stdout

from speechbrain_ext.model_folder.fetch import ENGLISH
from speechbrain_ext.utils.errors import UsageError, UserError
from speechbrain_ext.utils.text import printable


def say(message):
    """Print one line on standard error."""
    print(f"speechbrain_ext: {printable(' '.join(str(message).split()))}", file=sys.stderr)


@contextmanager
def usage():
    """Turn user errors into wrong usage, and send the output of libraries to standard error."""
    with redirect_stdout(sys.stderr):
        try:
            yield
        except OSError as error:
            said = error.strerror is not None and error.filename is not None
            name = error.filename or "''"
            cause = f"{name} cannot be read or written: {error.strerror}; give another path." if said else str(error)
            raise UsageError(cause) from error
        except UserError as error:
            raise UsageError(str(error)) from error


def add_model(parser):
    """Add the option for the model."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        default=ENGLISH,
        help=f"a model folder that training wrote, or a Hugging Face repository, user/model; by default {ENGLISH}, the small "
        "model that comes with the package",
    )
    add_trust(parser)


def add_trust(parser):
    """Add the option that lets a model run code."""
    parser.add_argument("--trust", action="store_true", help="allow the model's hyperparams.yaml to name, and so run, any code")


def add_pass(parser):
    """Add the option for the pass of a cascade."""
    parser.add_argument("--pass", dest="pass_name", metavar="NAME", help="the pass of a cascade that answers: first or second")


def add_search(parser, is_repeated=False):
    """Add the options for the search, or for several searches."""
    usual = (
        "by default ctc_greedy (with phrases or a language model ctc_beam), joint_beam or transducer_beam; for a stream with a "
        "decoder ctc_greedy"
    )
    if is_repeated:
        usual = "may be repeated; by default the search of transcribe, and also ctc_beam with a language model of words"
    parser.add_argument(
        "--search",
        metavar="NAME",
        help="ctc_greedy or ctc_beam; with a decoder also joint_beam or ctc_rescored, with a transducer transducer_greedy or "
        f"transducer_beam; {usual}",
        **({"action": "append"} if is_repeated else {}),
    )
    parser.add_argument(
        "--phrases",
        metavar="FILE",
        help="names and words that beam searches prefer: one phrase per line; after a tab the bonus of the whole phrase",
    )
    parser.add_argument(
        "--phrase-bonus", type=float, metavar="B", help="bonus per token of phrases without a bonus of their own (2)"
    )
    parser.add_argument(
        "--beam-size",
        type=int,
        metavar="N",
        help="hypotheses of a beam; by default the value of a decoder's or transducer's search, 100 for ctc_beam with a language "
        "model of words, and else 16",
    )
    parser.add_argument(
        "--lm",
        metavar="LM",
        help="a language model: an ARPA file from ngram, of words for ctc_beam, or of tokens (ngram --tokens) for any beam; with "
        "a decoder also a folder or Hugging Face repository of SpeechBrain with the model's tokens, such as "
        "speechbrain/asr-transformer-transformerlm-librispeech",
    )
    parser.add_argument(
        "--lm-weight",
        type=float,
        metavar="W",
        help="weight of its log-probabilities (0.3 for tokens, 0.5 for words, 0.6 for SpeechBrain's); 0 = no language model",
    )
    parser.add_argument("--lm-temperature", type=float, metavar="T", help="divisor of the logits of SpeechBrain's --lm (1.15)")
    parser.add_argument("--word-score", type=float, metavar="S", help="bonus per word, with a language model of words (1.5)")
    parser.add_argument(
        "--lodr",
        metavar="LM.arpa",
        help="low-order density ratio: a second model of tokens (ngram --tokens --order 2), made from the training transcripts "
        "of the model; its score is subtracted from that of --lm",
    )
    parser.add_argument("--lodr-weight", type=float, metavar="W", help="weight of its log-probabilities (0.15)")


def add_device(parser):
    """Add the options for device and revision."""
    parser.add_argument("--device", help="such as cpu or cuda:0; by default a GPU if there is one")
    parser.add_argument("--revision", help="commit, tag or branch of a Hugging Face repository")


def load(arguments):
    """Load the model of the arguments."""
    with usage():
        from speechbrain_ext.inference import load_model
        from speechbrain_ext.utils.machine import keep_freed_memory

        keep_freed_memory()
        return load_model(arguments.model, arguments.device, arguments.pass_name, arguments.revision, arguments.trust)


def choose_search(model, arguments, *names):
    """Set the model's search, or the named ones, from the arguments."""
    with usage(), model.choosing():
        model.choose_search(*(names or [arguments.search]))
        model.choose_beam(arguments.beam_size)
        if arguments.phrases is not None:
            from speechbrain_ext.decoders.phrases import read_phrases

            model.choose_phrases(read_phrases(arguments.phrases, model.tokenizer, arguments.phrase_bonus))
        elif arguments.phrase_bonus is not None:
            raise UsageError("--phrase-bonus is given, but there are no phrases; give --phrases, or leave it out.")
        options = {"lm_weight": "weight", "lm_temperature": "temperature", "lodr": "lodr", "lodr_weight": "lodr_weight"}
        options |= {"word_score": "word_score"}
        given = {option: getattr(arguments, option) for option in options if getattr(arguments, option) is not None}
        if arguments.lm is not None:
            model.choose_lm(arguments.lm, **{options[option]: value for option, value in given.items()})
        elif given:
            option = next(iter(given)).replace("_", "-")
            raise UsageError(f"--{option} is given, but there is no language model; give --lm, or leave it out.")
