"""Weights as safetensors. Such a file holds only numbers, while a pickle may hold code."""

from pathlib import Path

import safetensors.torch
import torch
from sentencepiece import SentencePieceProcessor
from speechbrain.utils.fetching import FetchSource
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_ext.model_folder import TOKENIZER, WEIGHTS
from speechbrain_ext.model_folder.fetch import download, is_shipped, split_revision
from speechbrain_ext.model_folder.tokenizer_file import LARGEST_FILE, check_tokenizer
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.errors import UserRuntimeError, UserTypeError, one_line
from speechbrain_ext.utils.files import read_bytes
from speechbrain_ext.utils.text import listing

TOKENIZERS = "give a model folder, a repository or a SentencePiece model"
PRECISIONS = ("fp32", "fp16")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_weights(model, path, precision="fp32"):
    """Write the weights and buffers of a model.

    Arguments
    ---------
    model : torch.nn.Module
        The model. Tensors that share memory are written separately; the file has every name of the model's state.
    path : str or os.PathLike
        The file.
    precision : str
        "fp32" writes all values as they are. "fp16" writes parameters in half precision, except those that float16 cannot hold;
        statistics stay as they are.

    Example
    -------
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), WEIGHTS)
    >>> first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    >>> save_weights(first, path)
    >>> load_weights(second, path)
    >>> torch.equal(first.weight, second.weight)
    True
    """
    state, halved = model.state_dict(), _halved(model, precision)
    state = {
        name: value.cpu().to(torch.float16 if name in halved else value.dtype).clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    Path(path).write_bytes(safetensors.torch.save(state))  # save_file would make it readable only for its owner


def round_weights(model, precision):
    """Round the weights of a model in place, to those that :func:`save_weights` writes.

    Example
    -------
    >>> linear = torch.nn.Linear(3, 2)
    >>> round_weights(linear, "fp16")
    >>> torch.equal(linear.weight, linear.weight.half().float())
    True
    """
    with torch.no_grad():
        for value in _halved(model, precision).values():
            value.copy_(value.half())


def _halved(model, precision):
    """The parameters of a model that are written in half precision, by name."""
    limit = torch.finfo(torch.float16).max
    parameters = model.named_parameters(remove_duplicate=False) if precision == "fp16" else ()
    return {name: value for name, value in parameters if value.dtype == torch.float32 and value.abs().max() <= limit}


def weights_size(path):
    """Bytes and number of the weights in a file, without reading them.

    Raises
    ------
    UserRuntimeError
        If the file is damaged or not a safetensors file.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, "pt") as file:  # checks the length of the file against its header
            return path.stat().st_size, len(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        raise UserRuntimeError(f"{path.name} is damaged, or not a safetensors file ({error})") from error


def load_weights(model, path):
    """Load a file of :func:`save_weights`. Floating-point weights in the file may have another precision than the model's.

    Arguments
    ---------
    model : torch.nn.Module
        The model.
    path : str or os.PathLike
        The file.

    Raises
    ------
    UserRuntimeError
        If the file is damaged or not a safetensors file, or its names, shapes or types are not those of the model.
    """
    name, wanted = Path(path).name, model.state_dict()
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = set(file.keys())
        groups = {"Missing": wanted.keys() - names, "Unexpected": names - wanted.keys()}
        quoted = {what: [f'"{key}"' for key in sorted(group)] for what, group in groups.items() if group}
        flaws = [f"{what} key(s) in state_dict: {listing(keys, most=2):.150}" for what, keys in quoted.items()]
        if flaws:  # refuse before reading, as there may be many weights
            raise UserRuntimeError(f"{name} holds the weights of another model ({'; '.join(flaws)})")
        state = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserRuntimeError(f"{name} is damaged, or not a safetensors file ({error})") from error
    for key, value in wanted.items():  # PyTorch would convert only some of them
        if key in state and value.is_floating_point() and state[key].dtype in FLOATS:
            state[key] = state[key].to(value.dtype)
        elif key in state and state[key].dtype != value.dtype:
            kinds = f"{state[key].dtype} instead of {value.dtype}".replace("torch.", "")
            raise UserRuntimeError(f"{name} holds the weights of another model ({key} is {kinds})")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # its message has a line per name or group of names
        flaws = listing([" ".join(line.split()) for line in str(error).splitlines()[1:]], most=2)
        raise UserRuntimeError(f"{name} holds the weights of another model ({flaws[:300]})") from error


def load_tokenizer(tokenizer, path):
    """Load a SentencePiece model.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer that loads the model.
    path : str or os.PathLike
        The file.

    Raises
    ------
    UserRuntimeError
        If the file is damaged or harmful.
    """
    name = Path(path).name
    data = read_bytes(path, LARGEST_FILE)
    try:
        check_tokenizer(data)
    except UserRuntimeError as error:
        raise UserRuntimeError(f"{name} {error}") from error
    try:
        tokenizer.load_from_serialized_proto(data)
    except (RuntimeError, OSError) as error:
        raise UserRuntimeError(f"{name} is damaged, or not a SentencePiece model") from error
    if not tokenizer.vocab_size():
        raise UserRuntimeError(f"{name} is an empty SentencePiece model")


def read_tokenizer(source):
    """The tokenizer of a model.

    Arguments
    ---------
    source : str or os.PathLike
        A model folder, a Hugging Face repository, or a SentencePiece model.

    Returns
    -------
    sentencepiece.SentencePieceProcessor

    Raises
    ------
    FileNotFoundError
        If there is no tokenizer.
    UserRuntimeError
        If the tokenizer is damaged.
    """
    path, tokenizer = Path(source), SentencePieceProcessor()
    if not path.is_file():
        missing = f"There is no model or tokenizer {{}}; {TOKENIZERS}."
        path = (
            path if path.is_dir() and not is_shipped(source) else download(*split_revision(str(source)), (TOKENIZER,), missing)
        ) / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {TOKENIZER}; {TOKENIZERS}.")
    try:
        load_tokenizer(tokenizer, path)
    except UserRuntimeError as error:
        raise UserRuntimeError(f"The tokenizer {source} cannot be used ({one_line(error)}); {TOKENIZERS}.") from error
    return tokenizer


@loadable
class SafetensorsPretrainer(Pretrainer):
    """SpeechBrain's Pretrainer for a model folder; SpeechBrain's loader (``EncoderASR.from_hparams``) uses it.

    Arguments
    ---------
    asr : torch.nn.Module
        The model; its weights come from ``asr.safetensors``.
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer; it is loaded from ``tokenizer.ckpt``.

    Raises
    ------
    UserTypeError
        If an argument has another type.
    """

    def __init__(self, asr, tokenizer):
        for value, kind in ((asr, torch.nn.Module), (tokenizer, SentencePieceProcessor)):
            if not isinstance(value, kind):
                raise UserTypeError(f"A model folder loads a {kind.__name__}, but this is a {type(value).__name__}.")
        super().__init__(
            loadables={"asr": asr, "tokenizer": tokenizer}, custom_hooks={"asr": load_weights, "tokenizer": load_tokenizer}
        )

    def collect_files(self, default_source=None, *args, **kwargs):
        """Collect files as SpeechBrain does, with weights and tokenizer from the source of the other files."""
        for key, name in (("asr", WEIGHTS), ("tokenizer", TOKENIZER)):
            if isinstance(default_source, FetchSource):
                path = FetchSource(default_source.FetchFrom, f"{default_source.path}/{name}")
            else:
                path = f"{default_source}/{name}"
            self.add_paths({key: path})
        return super().collect_files(default_source, *args, **kwargs)
