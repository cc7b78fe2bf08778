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
        If names or shapes are not those of the model, all of them.
    safetensors.SafetensorError
        If the file is damaged.
    """
    model.load_state_dict(safetensors.torch.load_file(path), strict=True)


class SafetensorsPretrainer(Pretrainer):
    """SpeechBrain's Pretrainer for a folder of ours: it would look for ``asr.ckpt``, and only warn of weights that do not fit.

    Arguments
    ---------
    asr : torch.nn.Module
        The model, whose weights are ``asr.safetensors``.
    normalizer : speechbrain.processing.features.InputNormalization
        The normaliser, whose statistics are ``normalizer.ckpt``: numbers only, as torch.load reads nothing else by default.
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer, which is ``tokenizer.ckpt``.
    """

    def __init__(self, asr, normalizer, tokenizer):
        loadables = {"asr": asr, "normalizer": normalizer, "tokenizer": tokenizer}
        super().__init__(loadables=loadables, custom_hooks={"asr": load_weights})

    def collect_files(self, default_source=None, *args, **kwargs):
        """As in SpeechBrain; the weights come from where the other files do."""
        if isinstance(default_source, FetchSource):
            path = FetchSource(default_source.FetchFrom, f"{default_source.path}/{WEIGHTS}")
        else:
            path = f"{default_source}/{WEIGHTS}"
        self.add_paths({"asr": path})
        return super().collect_files(default_source, *args, **kwargs)
