"""Augmentation of waveforms and features on their own device, without waiting for the device.

Both classes take a batch and relative lengths, and return a batch and relative lengths. SpeechBrain's Augmenter takes them too.
"""

import torch
from speechbrain.augment import time_domain

from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.utils.errors import UserError, is_number, is_whole


class SpeedPerturb(time_domain.SpeedPerturb):
    """SpeechBrain's SpeedPerturb on the device of the waveforms. It resamples a batch to make it slower or faster.

    Arguments
    ---------
    orig_freq : int
        Samples per second.
    speeds : list of int
        Speeds to draw from, in percent.

    Raises
    ------
    UserError
        If there is no speed, or one is not a positive whole number.

    Example
    -------
    >>> wavs, lens = SpeedPerturb(16000, [110])(torch.rand(2, 11000), torch.tensor([1.0, 0.5]))
    >>> wavs.shape
    torch.Size([2, 10000])
    """

    keeps_lengths = True  # relative lengths do not change

    def __init__(self, orig_freq, speeds=(90, 100, 110)):
        if not isinstance(speeds, (list, tuple)) or not speeds or not all(is_whole(speed, 1) for speed in speeds):
            raise UserError(f"speeds is {speeds!r}; give a list of whole numbers of percent, such as [95, 100, 105].")
        super().__init__(orig_freq, list(speeds))

    def forward(self, wavs, lengths=None):
        """(B, N) samples to (B, N'); the relative lengths (B,) stay."""
        self.device = wavs.device
        for resampler in self.resamplers:  # all in the first step, not when a speed is drawn for the first time
            resampler.resampler.to(wavs.device)
        return super().forward(wavs), lengths


class SpecAugment(torch.nn.Module):
    """SpecAugment with time masks in proportion to each utterance's own length, and zeros in the masks.

    Use it on normalised features, whose mean is zero. The versions of torchaudio and SpeechBrain use only the length of the
    batch: short utterances lose too much or nothing.

    Source: Park et al. 2020, https://arxiv.org/abs/1912.05533, section 3.1, with the settings of the Squeezeformer's authors.

    Arguments
    ---------
    time_masks : int
        Number of time masks.
    time_mask_ratio : float
        Time masks are narrower than this share of the utterance.
    frequency_masks : int
        Number of frequency masks.
    frequency_mask_width : int or list of int
        Frequency masks are narrower than this number of bins. Of two numbers the first is the narrowest width.
    time_mask_width : int or list of int, optional
        The same for time masks, in frames. ``time_mask_ratio`` still limits them.
    time_warp : int
        Before masking, one frame of each utterance moves by up to this number of frames, and the rest is stretched; 0 = off.
    frequency_warp : int
        The same for bins, to imitate another length of the vocal tract; 0 = off.

    Raises
    ------
    UserError
        If a number of masks or frames is not whole or negative, a share is not from 0 to 1, or a width is neither a number nor a
        pair of numbers, the second larger than the first; or, with features, if the narrowest mask hides all bins.

    Example
    -------
    >>> feats, lens = SpecAugment(time_masks=5)(torch.ones(2, 100, 80), torch.tensor([1.0, 0.5]))
    >>> feats.shape
    torch.Size([2, 100, 80])
    """

    keeps_lengths = True
    makes_views = True  # it takes a number of views

    def __init__(
        self,
        time_masks: int,
        time_mask_ratio: float = 0.05,
        frequency_masks: int = 2,
        frequency_mask_width=27,
        time_mask_width=None,
        time_warp: int = 0,
        frequency_warp: int = 0,
    ):
        super().__init__()
        counts = {"time_masks": time_masks, "frequency_masks": frequency_masks}
        for name, count in (counts | {"time_warp": time_warp, "frequency_warp": frequency_warp}).items():
            if not is_whole(count, 0):
                raise UserError(f"{name} is {count!r}; give a whole number, 0 = off.")
        if not is_number(time_mask_ratio, 0, 1):
            raise UserError(f"time_mask_ratio is {time_mask_ratio!r}; give a share from 0 to 1.")
        self.time_masks = time_masks
        self.time_mask_ratio = time_mask_ratio
        self.time_mask_width = (0, torch.inf) if time_mask_width is None else _width("time_mask_width", time_mask_width)
        self.frequency_masks = frequency_masks
        self.frequency_mask_width = _width("frequency_mask_width", frequency_mask_width)
        self.time_warp = time_warp
        self.frequency_warp = frequency_warp

    def forward(self, feats, lengths, views=1):
        """Warp and mask.

        Arguments
        ---------
        feats : torch.Tensor
            (B, T, F).
        lengths : torch.Tensor
            (B,) relative lengths.
        views : int
            Number of versions of each utterance, with equal time warps: frame t is the same sound in all of them.

        Returns
        -------
        feats : torch.Tensor
            (views B, T, F), one version of the batch after the other.
        lengths : torch.Tensor
            (views B,) the same relative lengths.
        """
        if self.frequency_masks and self.frequency_mask_width[0] >= feats.shape[2]:
            raise UserError(
                f"frequency_mask_width is {list(self.frequency_mask_width)}, which hides all {feats.shape[2]} bins; give less."
            )
        frames = absolute_lengths(lengths, feats.shape[1])
        if self.time_warp:
            feats = _warp(feats, frames, self.time_warp)
        feats, lengths, frames = (repeated(each, views) for each in (feats, lengths, frames))
        bins = torch.full_like(lengths, feats.shape[2])
        if self.frequency_warp:
            feats = _warp(feats.transpose(1, 2), bins, self.frequency_warp).transpose(1, 2)
        time = _masks(self.time_masks, self.time_mask_width, self.time_mask_ratio * frames, frames, feats.shape[1])
        frequency = _masks(self.frequency_masks, self.frequency_mask_width, bins, bins, feats.shape[2])
        return feats.masked_fill(time.unsqueeze(2) | frequency.unsqueeze(1), 0.0), lengths


def repeated(batch, views):
    """A tensor (B, ...) repeated ``views`` times along its first axis, or None."""
    return batch if batch is None or views == 1 else torch.cat([batch] * views)


def _width(name, value):
    """The narrowest width, and the limit below which all widths lie."""
    low, high = value if isinstance(value, (list, tuple)) and len(value) == 2 else (0, value)
    if not is_number(low, 0) or not is_number(high) or low >= high:
        raise UserError(f"{name} is {value!r}; give the limit of widths, or the narrowest width and the limit: [15, 25].")
    return low, high


def _masks(count, width, limits, sizes, length):
    """(B, length) bool, True in ``count`` masks of widths in (low, high), below (B,) limits, within the first (B,) sizes."""
    high = limits.clamp(max=width[1]).unsqueeze(1)
    low = high.clamp(max=width[0])
    widths = (low + torch.rand(len(limits), count, device=limits.device) * (high - low)).floor()
    starts = (torch.rand_like(widths) * (sizes.unsqueeze(1) - widths + 1)).floor().unsqueeze(2)
    position = torch.arange(length, device=limits.device)
    return ((position >= starts) & (position < starts + widths.unsqueeze(2))).any(1)


def _warp(feats, frames, most):
    """Stretch and squeeze features (B, T, F) around one frame each, by linear interpolation. Padding does not change."""
    last = (frames - 1).unsqueeze(1).float()  # the last frame does not move, like the first; half precision cannot count frames
    free = (last - 2 * most).clamp(min=0)
    anchor = most + torch.rand_like(free) * free
    moved = anchor + torch.where(free > 0, torch.rand_like(free) * (2 * most) - most, 0.0)
    position = torch.arange(feats.shape[1], device=feats.device, dtype=torch.float32).unsqueeze(0)
    before = position * anchor / moved.clamp(min=1e-6)
    behind = anchor + (position - moved) * (last - anchor) / (last - moved).clamp(min=1e-6)
    source = torch.where(position > last, position, torch.where(position < moved, before, behind))
    source = torch.where(free > 0, source, position)
    left = source.floor().clamp(0, feats.shape[1] - 1)
    part = (source - left).unsqueeze(2).clamp(0, 1).to(feats.dtype)
    left = left.long().unsqueeze(2).expand_as(feats)
    right = (left + 1).clamp(max=feats.shape[1] - 1)
    return torch.lerp(feats.gather(1, left), feats.gather(1, right), part)
