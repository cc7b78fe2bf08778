"""Weights as safetensors: a file of numbers, whose reading runs nothing, where a pickle may hold code."""

from pathlib import Path

import safetensors.torch
import torch
from speechbrain.utils.fetching import FetchSource
from speechbrain.utils.parameter_transfer import Pretrainer

WEIGHTS = "asr.safetensors"


def save_weights(model, path):
    """Write the weights and buffers of a model.

    Arguments
    ---------
    model : torch.nn.Module
        The model. Tensors that share memory are written one by one, so that every name of its state is in the file.
    path : str or os.PathLike
        The file.

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
    state = model.state_dict()
    state = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    Path(path).write_bytes(safetensors.torch.save(state))  # its save_file would make a file that only its owner can read


def load_weights(model, path):
    """Load what :func:`save_weights` wrote.

    Arguments
    ---------
    model : torch.nn.Module
        The model.
    path : str or os.PathLike
        The file.

    Raises
    ------
    RuntimeError
        If names or shapes are not those of the model, all of them; the message names the first few.
    safetensors.SafetensorError
        If the file is damaged.
    """
    state, own = safetensors.torch.load_file(path), model.state_dict()
    shapes = [f"{name} {list(state[name].shape)}" for name in own if name in state and state[name].shape != own[name].shape]
    flaws = {
        "Missing keys": [name for name in own if name not in state],
        "Unexpected keys": [name for name in state if name not in own],
        "Other shapes than the model's": shapes,
    }
    told = [
        f"{flaw}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for flaw, names in flaws.items()
        if names
    ]
    if told:
        raise RuntimeError(f"these are weights of another model ({'; '.join(told)})")
    model.load_state_dict(state)


def load_statistics(normalizer, path):
    """Load the statistics of a normaliser, which are numbers only: torch.load reads nothing else by default.

    Arguments
    ---------
    normalizer : speechbrain.processing.features.InputNormalization
        The normaliser.
    path : str or os.PathLike
        The file.

    Raises
    ------
    RuntimeError
        If it is damaged, or holds anything else.
    """
    try:
        normalizer._load(path)
    # What a broken pickle raises is anything, and torch's text advises to read it as a program
    except Exception as error:
        raise RuntimeError("these are no statistics of features") from error


def _naming(load):
    """The same, but errors begin with the name of the file."""

    def load_named(target, path):
        try:
            load(target, path)
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise RuntimeError(f"{Path(path).name}: {error}") from error

    return load_named


class SafetensorsPretrainer(Pretrainer):
    """SpeechBrain's Pretrainer for a folder of ours: it would look for ``asr.ckpt``, and only warn of weights that do not fit.

    Arguments
    ---------
    asr : torch.nn.Module
        The model, whose weights are ``asr.safetensors``.
    normalizer : speechbrain.processing.features.InputNormalization
        The normaliser, whose statistics are ``normalizer.ckpt``.
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer, which is ``tokenizer.ckpt``.
    """

    def __init__(self, asr, normalizer, tokenizer):
        loadables = {"asr": asr, "normalizer": normalizer, "tokenizer": tokenizer}
        hooks = {"asr": load_weights, "normalizer": load_statistics, "tokenizer": lambda target, path: target.load(str(path))}
        super().__init__(loadables=loadables, custom_hooks={name: _naming(load) for name, load in hooks.items()})

    def collect_files(self, default_source=None, *args, **kwargs):
        """As in SpeechBrain; the weights come from where the other files do."""
        if isinstance(default_source, FetchSource):
            path = FetchSource(default_source.FetchFrom, f"{default_source.path}/{WEIGHTS}")
        else:
            path = f"{default_source}/{WEIGHTS}"
        self.add_paths({"asr": path})
        return super().collect_files(default_source, *args, **kwargs)
