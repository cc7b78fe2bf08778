"""SpecAugment in proportion to each utterance's own length."""

import torch

from speechbrain_ext.lobes.masks import absolute_lengths


class SpecAugment:
    """SpecAugment with time masks in proportion to each utterance's own length, and zeros in the masks.

    For features that are normalised, so that zero is their mean. Torchaudio's and SpeechBrain's know only the length of the
    batch, so that its short utterances lose too much or nothing.

    Source: Park et al. 2020, https://arxiv.org/abs/1912.05533, section 3.1, with the settings of the Squeezeformer's authors.

    Arguments
    ---------
    time_masks : int
        Number of time masks.
    time_mask_ratio : float
        Time masks are narrower than this part of the utterance.
    frequency_masks : int
        Number of frequency masks.
    frequency_mask_width : int
        Frequency masks are narrower than so many bins.

    Example
    -------
    >>> feats, lens = SpecAugment(time_masks=5)(torch.ones(2, 100, 80), torch.tensor([1.0, 0.5]))
    >>> feats.shape
    torch.Size([2, 100, 80])
    """

    def __init__(self, time_masks: int, time_mask_ratio: float = 0.05, frequency_masks: int = 2, frequency_mask_width: int = 27):
        self.time_masks = time_masks
        self.time_mask_ratio = time_mask_ratio
        self.frequency_masks = frequency_masks
        self.frequency_mask_width = frequency_mask_width

    def __call__(self, feats, lens):
        """Mask.

        Arguments
        ---------
        feats : torch.Tensor
            (B, T, F).
        lens : torch.Tensor
            (B,) relative lengths.

        Returns
        -------
        tuple
            The masked features and the same lengths.
        """
        frames, bins = absolute_lengths(lens, feats.shape[1]), torch.full_like(lens, feats.shape[2])
        time = _masks(self.time_masks, self.time_mask_ratio * frames, frames, feats.shape[1])
        frequency = _masks(self.frequency_masks, torch.full_like(bins, self.frequency_mask_width), bins, feats.shape[2])
        return feats.masked_fill(time.unsqueeze(2) | frequency.unsqueeze(1), 0.0), lens


def _masks(count, limits, sizes, length):
    """(B, length) bool, True in ``count`` masks narrower than (B,) limits, anywhere in the first (B,) sizes."""
    widths = (torch.rand(len(limits), count, device=limits.device) * limits.unsqueeze(1)).floor()
    starts = (torch.rand_like(widths) * (sizes.unsqueeze(1) - widths + 1)).floor().unsqueeze(2)
    position = torch.arange(length, device=limits.device)
    return ((position >= starts) & (position < starts + widths.unsqueeze(2))).any(1)
