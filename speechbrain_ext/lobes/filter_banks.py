"""Feature extraction frame by frame: the samples of a frame, and the features that are computed from them.

Here a feature extraction has ``framing``, ``sample_rate``, ``n_fft``, ``n_mels``, ``top_db`` and three methods: ``of_utterances``
for whole utterances, ``of_windows`` for the windows in a piece of a stream, and ``check_streamable``.
:class:`speechbrain_ext.lobes.features.KaldiFbank` has them; :func:`front_end` adds them to SpeechBrain's classes.
"""

import copy
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from speechbrain.lobes.features import Fbank

from speechbrain_ext.lobes.masks import padding_mask
from speechbrain_ext.lobes.precision import full_precision
from speechbrain_ext.utils.errors import UserError

PREEMPHASIS = 0.97
"""Kaldi's ``preemph_coeff``."""
LOWEST, BELOW_NYQUIST = 20.0, 400.0
"""In Hz: where Kaldi's filters begin, and how far below half the sampling rate they end, in k2's recipes and in sherpa-onnx."""


@dataclass(frozen=True)
class Framing:
    """The samples of each frame: frame t has the ``length`` samples from ``t * hop - before`` on.

    An utterance has all frames whose middle is no later than its end, and at least one.

    Arguments
    ---------
    hop : int
        Samples from one frame to the next.
    length : int
        Samples of a frame.
    before : int
        Samples of the first frame that precede the utterance.
    mirrors : bool
        Whether the signal is mirrored at its ends (1 0 | 0 1 2 | 2 1) instead of extended by zeros.

    Example
    -------
    >>> framing = Framing(hop=2, length=4, before=1, mirrors=True)
    >>> framing.count(5), framing.extend(torch.arange(1, 6.0).view(1, 5), torch.tensor([5]), 1, 3)
    (3, tensor([[1., 1., 2., 3., 4., 5., 5., 4., 3.]]))
    """

    hop: int
    length: int
    before: int
    mirrors: bool = False

    @property
    def after(self):
        """Largest number of samples of the last frame that follow the utterance."""
        return self.length - self.before

    def count(self, samples):
        """Number of frames for a number of samples, or for a tensor of such numbers."""
        frames = (samples + self.before - self.length // 2) // self.hop + 1
        return frames.clamp(min=1) if isinstance(frames, torch.Tensor) else max(1, frames)

    def needs(self, frames):
        """Number of samples in a number of frames."""
        return (frames - 1) * self.hop + self.length

    def extend(self, wavs, samples, before, after):
        """Extend utterances at both ends.

        Arguments
        ---------
        wavs : torch.Tensor
            (B, N) samples, zero after the end of each utterance.
        samples : torch.Tensor
            (B,) numbers of samples.
        before : int
            Number of samples to add before the beginning.
        after : int
            Number of samples to add after the end.

        Returns
        -------
        torch.Tensor
            (B, before + N + after).
        """
        x = F.pad(wavs, (before, after))
        if not self.mirrors:
            return x
        place = torch.arange(before + after, device=wavs.device) - before
        outside = place + samples.unsqueeze(1) * (place >= 0)  # (B, before + after), counted from the first sample
        period = 2 * samples.clamp(min=1).unsqueeze(1)  # a short utterance is mirrored several times
        inside = outside.remainder(period)
        inside = torch.minimum(inside, period - 1 - inside)
        return x.scatter(1, outside + before, x.gather(1, inside + before))


def povey_window(length):
    """Kaldi's window: a symmetric Hann window to the power of 0.85.

    Arguments
    ---------
    length : int
        Number of samples.

    Returns
    -------
    torch.Tensor
        (length,) float32.

    Example
    -------
    >>> povey_window(5)
    tensor([0.0000, 0.5548, 1.0000, 0.5548, 0.0000])
    """
    return torch.hann_window(length, periodic=False, dtype=torch.float64, device="cpu").pow(0.85).float()


def kaldi_filters(sample_rate, n_fft, n_mels):
    """Kaldi's mel filters: triangles of height 1, linear in HTK's mel scale, from 20 Hz to 400 Hz below half the sampling rate.

    Arguments
    ---------
    sample_rate : int
        Samples per second.
    n_fft : int
        Length of the Fourier transform.
    n_mels : int
        Number of filters.

    Returns
    -------
    torch.Tensor
        (n_fft / 2 + 1, n_mels) float32.

    Example
    -------
    >>> filters = kaldi_filters(16000, 512, 80)
    >>> filters.shape, int(filters.argmax(0)[40]) * 31.25  # Hz, the middle of a filter
    (torch.Size([257, 80]), 1781.25)
    """
    hertz = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * sample_rate / n_fft
    ends = torch.tensor([LOWEST, sample_rate / 2 - BELOW_NYQUIST], dtype=torch.float64, device="cpu")
    mels, (low, high) = _mel(hertz).unsqueeze(1), _mel(ends).tolist()
    edges = torch.linspace(low, high, n_mels + 2, dtype=torch.float64, device="cpu")
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((mels - left) / (middle - left), (right - mels) / (right - middle)).clamp(min=0).float()


def _mel(hertz):
    return 1127.0 * (1.0 + hertz / 700.0).log()


def kaldi_frames(frames, window):
    """Frames without their mean, pre-emphasised and windowed.

    The mean is subtracted first: pre-emphasis of samples far from zero would round a quiet signal away.

    Arguments
    ---------
    frames : torch.Tensor
        (B, T, L) samples.
    window : torch.Tensor
        (L,), whose first value is zero.

    Returns
    -------
    torch.Tensor
        (B, T, L - 1): without the first sample, which the window makes zero.

    Example
    -------
    >>> kaldi_frames(torch.tensor([[[1.0, 2.0, 3.0, 2.0, 2.0]]]), povey_window(5))
    tensor([[[ 0.5381,  1.0000, -0.5381,  0.0000]]])
    """
    centred = frames - frames.mean(2, keepdim=True)
    return torch.sub(centred[..., 1:], centred[..., :-1], alpha=PREEMPHASIS).mul_(window[1:])


def centred(wavs, samples):
    """Utterances without their means.

    Arguments
    ---------
    wavs : torch.Tensor
        (B, N) samples, zero after the end of each utterance.
    samples : torch.Tensor
        (B,) numbers of samples.

    Returns
    -------
    torch.Tensor
        (B, N), also zero after the end of each utterance.

    Example
    -------
    >>> centred(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([2]))
    tensor([[-1.,  1.,  0.]])
    """
    mean = wavs.sum(1, keepdim=True) / samples.clamp(min=1).unsqueeze(1)
    return (wavs - mean).masked_fill(padding_mask(samples, wavs.shape[1]), 0.0)


def front_end(compute_features):
    """A feature extraction with the methods of this module: KaldiFbank unchanged, SpeechBrain's classes wrapped.

    Arguments
    ---------
    compute_features : torch.nn.Module
        KaldiFbank, SpeechBrain's Fbank, or another of SpeechBrain's with a centred ``compute_STFT``. Only the first two stream.

    Returns
    -------
    object
        The feature extraction.

    Raises
    ------
    UserError
        If it is any other module.

    Example
    -------
    >>> front_end(Fbank(n_mels=80)).framing
    Framing(hop=160, length=400, before=200, mirrors=False)
    """
    if hasattr(compute_features, "of_windows"):
        return compute_features
    if not hasattr(compute_features, "compute_STFT"):
        name = type(compute_features).__name__
        raise UserError(f"Features of the class {name} are not supported; give an Fbank, a KaldiFbank, or a subclass of one.")
    return _SpeechBrain(compute_features)


class _SpeechBrain:
    """Wraps SpeechBrain's Fbank, without clipping, or another of its classes, unchanged."""

    def __init__(self, compute_features):
        self._features, stft, fbanks = compute_features, compute_features.compute_STFT, compute_features.compute_fbanks
        self.framing = Framing(stft.hop_length, stft.n_fft, stft.n_fft // 2)
        self.sample_rate, self.n_fft, self.n_mels = stft.sample_rate, stft.n_fft, fbanks.n_mels
        self.removes_dc = getattr(compute_features, "remove_dc", False)
        self._is_plain = isinstance(compute_features, Fbank) and not (compute_features.deltas or compute_features.context)
        self.top_db = fbanks.top_db if self._is_plain else torch.inf
        self._of_windows = None

    def of_utterances(self, wavs, samples):
        """Samples (B, N), zero after the end of each utterance, and their numbers (B,), to features (B, 1 + N // hop, F)."""
        if self.removes_dc:
            wavs = centred(wavs, samples)
        return _without_clipping(self._features, wavs.device)(wavs.float()) if self._is_plain else self._features(wavs)

    def of_windows(self, samples):
        """Samples (B, N) to the features of the windows in them, (B, 1 + (N - n_fft) // hop, F)."""
        if self._of_windows is None:
            self._of_windows = _without_clipping(self._features, samples.device)
            self._of_windows.compute_STFT.center = False  # the caller cuts the samples of each frame
        return self._of_windows(samples.float())

    def check_streamable(self):
        """Refuse features that do not stream; the message names the setting to change."""
        if self.removes_dc:
            raise UserError("Fbank with remove_dc looks at the whole utterance and does not stream; leave remove_dc out.")
        if not self._is_plain:
            raise UserError(f"{type(self._features).__name__} features do not stream; give Fbank without deltas and context.")
        stft = self._features.compute_STFT
        if stft.n_fft % 2 or stft.hop_length > stft.n_fft:
            raise UserError(
                f"Features with n_fft {stft.n_fft} and hops of {stft.hop_length} samples do not stream; give an even n_fft "
                "of at least the hop."
            )
        if not stft.center:
            raise UserError("Features whose STFT is not centred do not stream; leave center at True.")


def _without_clipping(compute_features, device):
    """A view of a feature extraction that clips nothing, with the same filters and window, on the device."""
    view, fbanks = _view(compute_features), compute_features.compute_fbanks
    view.compute_STFT, view.compute_fbanks = _view(view.compute_STFT), _view(fbanks)
    view.compute_fbanks.top_db = torch.inf
    view.remove_dc = False  # the mean is that of the utterance, but the input may be windows of it
    if fbanks.freeze and not fbanks.param_rand_factor:  # other filters change in each call
        view.compute_STFT.window, matrix = _constants(compute_features, device)
        view.compute_fbanks = _Filters(view.compute_fbanks, matrix)
    return view


_CONSTANTS = weakref.WeakKeyDictionary()


def _constants(compute_features, device):
    """Window and filters, computed once per device: SpeechBrain computes the filters again in each call, on the CPU."""
    kept = {} if torch.compiler.is_compiling() else _CONSTANTS.setdefault(compute_features, {})
    if device not in kept:
        fbanks, window = compute_features.compute_fbanks, compute_features.compute_STFT.window
        with torch.inference_mode(False), torch.no_grad():  # usable in training, also if inference calls first
            centres, bands = (part.unsqueeze(1).expand_as(fbanks.all_freqs_mat) for part in (fbanks.f_central, fbanks.band))
            kept[device] = window.to(device), fbanks._create_fbank_matrix(centres, bands).to(device)
    return kept[device]


class _Filters(torch.nn.Module):
    """SpeechBrain's filter banks with a given matrix."""

    def __init__(self, fbanks, matrix):
        super().__init__()
        self.fbanks, self.matrix = fbanks, matrix

    def forward(self, spectrogram):
        """(B, T, n_fft / 2 + 1) to (B, T, F)."""
        with full_precision(spectrogram):
            feats = spectrogram @ self.matrix
        return self.fbanks._amplitude_to_DB(feats) if self.fbanks.log_mel else feats


def _view(module):
    """A copy of a module with separate settings, and the same parameters, buffers and parts."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view
