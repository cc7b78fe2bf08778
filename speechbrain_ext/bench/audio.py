"""Recognition and training from audio: all steps except the encoder, the same for all compared models."""

from pathlib import Path

import numpy as np
import soundfile
import torch
from speechbrain.lobes.features import Fbank
from torch import nn
from torch.utils.data import DataLoader, Dataset

from speechbrain_ext.bench.models import FEATURES
from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.dataio.datasets import Batch
from speechbrain_ext.dataio.resampling import SAMPLE_RATE
from speechbrain_ext.lobes.features import InputNormalization, clip_features, normalize_features, raw_features

TOKENS = 5000
"""Number of tokens, as in SpeechBrain's published recipes."""
TOKENS_PER_SECOND = 4
WORKERS = 4
"""Processes that read audio, as in the recipes."""
BATCHES = 8
"""Batches per timed call. Their time is divided by this number, because workers start with each call, and then read ahead."""


class Recognizer(nn.Module):
    """Filter banks, normalisation, a net and a CTC head, from samples (B, N) with relative lengths (B,) to log-probabilities.

    Arguments
    ---------
    net : speechbrain_ext.bench.models.WithFrontEnd
        The net after the features.
    d_model : int
        Width of its output.

    Example
    -------
    >>> from speechbrain_ext.bench.models import Dimensions, Model, groups, with_front_end
    >>> from speechbrain_ext.registry import build_encoder
    >>> candidate = groups(["conformer"], [], Dimensions(), own_sizes=False)[0][0]
    >>> net = with_front_end(candidate, Model(build_encoder("conformer", d_model=16, nhead=2, num_layers=1, d_ffn=32)), 16)
    >>> log_probs, lens = Recognizer(net, 16)(torch.rand(2, 16000), torch.tensor([1.0, 0.5]))
    >>> log_probs.shape
    torch.Size([2, 26, 5000])
    """

    def __init__(self, net, d_model):
        super().__init__()
        self.compute_features = Fbank(n_mels=FEATURES)
        self.normalize = InputNormalization(norm_type="sentence")
        self.net = net
        self.head = nn.Linear(d_model, TOKENS)

    def forward(self, wavs, lens):
        """Log-probabilities (B, T, V), and their relative lengths."""
        feats, lens = raw_features(self.compute_features, wavs, lens)
        feats = clip_features(self.compute_features, feats, lens)
        logits = self.head(self.net(normalize_features(self.normalize, feats, lens), lens))
        return logits.float().log_softmax(-1), lens


def write_files(folder, seconds, lens):
    """Write FLAC files of noise.

    Arguments
    ---------
    folder : str
        The folder of the files.
    seconds : int
        Length of the longest file.
    lens : list of float
        Length of each file, relative to the longest.

    Returns
    -------
    list of pathlib.Path
    """
    generator, paths = np.random.default_rng(0), []
    for number, share in enumerate(lens):
        paths.append(Path(folder, f"{seconds}-{len(lens)}-{number}.flac"))
        soundfile.write(paths[-1], 0.1 * generator.standard_normal(round(share * seconds * SAMPLE_RATE)), SAMPLE_RATE)
    return paths


class _Speech(Dataset):
    """Samples and tokens, in the form of the recipes' datasets."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return BATCHES * len(self.paths)

    def __getitem__(self, index):
        sig = load_audio(self.paths[index % len(self.paths)], SAMPLE_RATE)
        tokens = torch.randint(1, TOKENS, (max(1, TOKENS_PER_SECOND * len(sig) // SAMPLE_RATE),))
        return {"sig": sig, "tokens": tokens}


def make_loader(paths, device):
    """A loader of :data:`BATCHES` batches, each of all files.

    Arguments
    ---------
    paths : list of pathlib.Path
        Audio files.
    device : str
        The device of the batches.

    Returns
    -------
    torch.utils.data.DataLoader
        Loads :class:`speechbrain_ext.dataio.datasets.Batch`.
    """
    return DataLoader(
        _Speech(paths),
        batch_size=len(paths),
        collate_fn=Batch,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=torch.device(device).type == "cuda",
    )
