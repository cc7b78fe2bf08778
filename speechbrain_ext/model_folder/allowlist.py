"""Classes and functions that a model folder may name.

Classes of this package and of users are marked with :func:`speechbrain_ext.registry.loadable`. Classes of other packages are
listed here. Their arguments are numbers, names and each other; they open no file and call nothing by name.
"""

import importlib
import importlib.util

from speechbrain_ext.registry import find_loadable

PACKAGE = "speechbrain_ext"

CLASSES = {
    "sentencepiece.SentencePieceProcessor",
    "speechbrain.dataio.preprocess.AudioNormalizer",
    "speechbrain.decoders.S2STransformerBeamSearcher",
    "speechbrain.decoders.scorer.CTCScorer",
    "speechbrain.decoders.scorer.ScorerBuilder",
    "speechbrain.lobes.features.Fbank",
    "speechbrain.lobes.models.RNNLM.RNNLM",
    "speechbrain.lobes.models.transformer.TransformerLM.TransformerLM",
    "speechbrain.nnet.linear.Linear",
    "speechbrain.processing.features.InputNormalization",
    "torch.nn.Linear",
    "torch.nn.ModuleDict",
    "torch.nn.ModuleList",
}
WITHOUT_ARGUMENTS = {"sentencepiece.SentencePieceProcessor"}
"""Classes that must have no arguments, because these would name a file."""
NAMES = {
    "speechbrain.decoders.ctc.ctc_greedy_decode",
    "speechbrain.nnet.RNN.GRU",
    "speechbrain.nnet.RNN.LSTM",
    "speechbrain.nnet.activations.Swish",
    "torch.nn.GELU",
    "torch.nn.LeakyReLU",
    "torch.nn.ReLU",
    "torch.nn.SiLU",
}
"""Classes and functions that may be named, but not built."""


def find_class(path):
    """Find a class that a folder may build.

    Arguments
    ---------
    path : str
        The path of the class, such as ``torch.nn.ModuleList``.

    Returns
    -------
    type or None
        None if the folder may not name it.

    Example
    -------
    >>> find_class("torch.nn.ModuleList").__name__, find_class("os.system")
    ('ModuleList', None)
    """
    if path in CLASSES:
        return _locate(path)
    if path.startswith(f"{PACKAGE}."):  # importing a module of this package runs nothing else
        module = path.rpartition(".")[0]
        try:
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
        except ModuleNotFoundError:
            return None
    return find_loadable(path)


def find_name(path):
    """Find a class or function that a folder may name without building it; None if it may not."""
    return _locate(path) if path in NAMES else find_class(path)


def _locate(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
