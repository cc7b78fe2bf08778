"""Training of the Squeezeformer."""

import torchaudio

from recipes.LibriSpeech.brain import AsrBrain


class SqueezeformerBrain(AsrBrain):
    """Trains a Squeezeformer, by CTC only as published; all that it needs is what all architectures share."""


class SpecAugment(torchaudio.transforms.SpecAugment):
    """Torchaudio's SpecAugment on batches of features, with time masks in proportion to the length and zeros in the masks.

    For features that are normalised, so that zero is their mean.

    Arguments
    ---------
    time_masks : int
        Number of time masks.
    time_mask_ratio : float
        Largest width of a time mask, as a part of the frames.
    frequency_masks : int
        Number of frequency masks.
    frequency_mask_width : int
        Frequency masks are narrower than so many bins.

    Example
    -------
    >>> import torch
    >>> feats, lens = SpecAugment(time_masks=5)(torch.ones(2, 100, 80), torch.ones(2))
    >>> feats.shape
    torch.Size([2, 100, 80])
    """

    def __init__(self, time_masks: int, time_mask_ratio: float = 0.05, frequency_masks: int = 2, frequency_mask_width: int = 27):
        unlimited = 10**6  # frames: the ratio is the limit
        super().__init__(time_masks, unlimited, frequency_masks, frequency_mask_width, p=time_mask_ratio, zero_masking=True)

    def forward(self, feats, lens):
        """Features (B, T, F) and their relative lengths, masked."""
        return super().forward(feats.transpose(1, 2)).transpose(1, 2), lens
