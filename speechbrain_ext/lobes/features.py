"""Features of whole utterances with exact lengths, and chunk by chunk exactly the same.

Two steps of SpeechBrain's pipelines look at the whole utterance: filter banks are clipped 80 dB below its maximum, and "sentence"
normalisation takes its statistics. With a chunk setting both look only at what came until the end of the chunk, in
:func:`clip_features` and :func:`normalize_features` as in :class:`FeatureStream`. So features are extracted without clipping
first (:func:`raw_features`); these do not depend on the chunk setting, and can be cached.
"""

import copy
import weakref

import torch
import torch.nn.functional as F
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization as SpeechBrainInputNormalization
from speechbrain.processing.features import make_padding_mask

from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask
from speechbrain_ext.lobes.precision import widest
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.distributed import sum_over_processes
from speechbrain_ext.utils.errors import UserError

FEWEST = 16
"""Frames that are computed at once at least."""


def raw_features(compute_features, wavs, wav_lens):
    """Features without clipping and with exact lengths: an utterance has the same number of frames alone and in any batch.

    SpeechBrain's pipelines pass relative lengths on and round them at each stage, so that the batch decides about the last frame.

    Arguments
    ---------
    compute_features : speechbrain.lobes.features.Fbank
        The feature extraction; any other with a centred ``compute_STFT`` is taken as it is.
    wavs : torch.Tensor
        (B, N) samples.
    wav_lens : torch.Tensor
        (B,) relative lengths.

    Returns
    -------
    tuple
        Features (B, T, F), and the relative lengths (B,) of these frames.

    Example
    -------
    >>> feats, lens = raw_features(Fbank(), torch.rand(2, 1600), torch.tensor([1.0, 0.45]))
    >>> feats.shape, torch.round(lens * 11)
    (torch.Size([2, 11, 40]), tensor([11.,  5.]))
    """
    samples = absolute_lengths(wav_lens, wavs.shape[1])
    wavs = wavs.masked_fill(padding_mask(samples, wavs.shape[1]), 0.0)
    feats = (_without_clipping(compute_features, wavs.device) if clips(compute_features) else compute_features)(wavs)
    frames = 1 + samples // compute_features.compute_STFT.hop_length  # the STFT is centred: one frame per hop, and one more
    relative = frames / feats.shape[1]
    # SpeechBrain's normalisation counts the frames below relative * T without rounding: rounding must never push that up.
    above = relative * feats.shape[1] > frames
    return feats, torch.where(above, torch.nextafter(relative, torch.zeros_like(relative)), relative)


def clip_features(compute_features, feats, lens, chunk: int | None = None):
    """Clip what is quieter than the loudest bin by more than the features' range (``top_db``, 80 dB).

    Arguments
    ---------
    compute_features : speechbrain.lobes.features.Fbank
        The feature extraction; others than Fbank clip nothing here.
    feats : torch.Tensor
        (B, T, F) of :func:`raw_features`.
    lens : torch.Tensor
        (B,) relative lengths: the padding decides nothing.
    chunk : int, optional
        Feature frames per chunk: the loudest bin is that until the end of the frame's chunk; without it, of the utterance.

    Returns
    -------
    torch.Tensor
        (B, T, F).

    Raises
    ------
    UserError
        If there is a chunk setting, and these features cannot be had chunk by chunk.
    """
    if chunk is not None:
        check_streamable(compute_features)
    if not clips(compute_features):
        return feats
    frames = feats.shape[1]
    padding = padding_mask(absolute_lengths(lens, frames), frames).unsqueeze(2)
    feats_or_nothing = feats.masked_fill(padding, -torch.inf)
    if chunk is None:
        peaks = feats_or_nothing.amax((1, 2), keepdim=True)
    else:
        peaks = _chunked(feats_or_nothing, chunk, -torch.inf).amax((2, 3)).cummax(1).values
        peaks = peaks.repeat_interleave(chunk, 1)[:, :frames, None]
    return feats.maximum(peaks - compute_features.compute_fbanks.top_db)


def normalize_features(normalize, feats, lens, chunk: int | None = None, **kwargs):
    """Normalise; with ``chunk``, "sentence" statistics are those of the utterance until the end of the frame's chunk.

    Arguments
    ---------
    normalize : speechbrain.processing.features.InputNormalization
        The normalisation, here or SpeechBrain's.
    feats : torch.Tensor
        (B, T, F).
    lens : torch.Tensor
        (B,) relative lengths.
    chunk : int, optional
        Feature frames per chunk.
    **kwargs
        For ``normalize``.

    Returns
    -------
    torch.Tensor
        (B, T, F).

    Raises
    ------
    ValueError
        If the normalisation needs more than one utterance.

    Example
    -------
    >>> from speechbrain.processing.features import InputNormalization
    >>> x = torch.rand(1, 9, 4)
    >>> y = normalize_features(InputNormalization(norm_type="sentence"), x, torch.ones(1), chunk=3)
    >>> torch.allclose(y[:, :3].mean(1), torch.zeros(4), atol=1e-5)
    True
    """
    if chunk is None or not _grows(normalize):
        return normalize(feats, lens, **kwargs)
    if normalize.training:
        normalize(feats, lens, **kwargs)  # for what it learns
    frames = feats.shape[1]
    valid = ~padding_mask(absolute_lengths(lens, frames), frames)
    feats, valid = _chunked(feats, chunk), _chunked(valid.unsqueeze(-1), chunk)
    moments = moments_of(feats, valid, 2).cumsum(2)
    return standardized(normalize, feats, moments.unsqueeze(3)).flatten(1, 2)[:, :frames]


@loadable
class InputNormalization(SpeechBrainInputNormalization):
    """SpeechBrain's InputNormalization, whose statistics are buffers: they move with the module, and are in its state.

    Arguments
    ---------
    norm_type : str
        "global" (the training set's statistics) or "sentence" (the utterance's own).
    update_until_epoch : int
        Training updates the statistics before this epoch.
    prior_frames : int
        With "sentence", in chunks: so many frames with the training set's statistics count as if they had come before. It needs
        statistics, which are then learned as with "global".
    **kwargs
        For SpeechBrain's class.

    Example
    -------
    >>> normalize = InputNormalization()
    >>> _ = normalize(3 + torch.rand(2, 50, 4), torch.ones(2), epoch=0)
    >>> sorted(normalize.state_dict()), int(normalize.count)
    (['frames', 'glob_mean', 'glob_std'], 100)
    """

    def __init__(self, norm_type: str = "global", update_until_epoch: int = 2, prior_frames: int = 0, **kwargs):
        super().__init__(norm_type=norm_type, update_until_epoch=update_until_epoch, **kwargs)
        self.prior_frames = prior_frames
        for name in ("glob_mean", "glob_std"):
            value = getattr(self, name)
            delattr(self, name)
            self.register_buffer(name, value)

    @property
    def count(self):
        """Number of frames in the statistics, as a tensor."""
        return self.frames

    @count.setter
    def count(self, value):
        if "frames" in self._buffers:
            self.frames = torch.as_tensor(value, device=self.frames.device)
        else:  # SpeechBrain's constructor sets it first
            self.register_buffer("frames", torch.as_tensor(value))

    def forward(self, x, lengths=None, epoch=None):
        """(B, T, F) to (B, T, F), normalised; in training, until ``update_until_epoch``, it learns statistics."""
        if self.norm_type == "sentence" and self.prior_frames and self._should_update(epoch):
            self._update_global_stats(x, make_padding_mask(x, lengths, length_dim=1))
        return super().forward(x, lengths, epoch)

    @torch.no_grad()
    def _update_global_stats(self, x, mask):
        """As in SpeechBrain, without a wait for the device; the same over all processes of a distributed run."""
        x = x.float().masked_fill(~mask, 0.0)
        number, total = sum_over_processes(mask.sum().view(1).to(x), x.sum((0, 1)))
        mean = total / number.clamp(min=1)
        (squares,) = sum_over_processes((x - mean).masked_fill(~mask, 0.0).square().sum((0, 1)))
        if not self.glob_mean.numel():
            self.glob_mean, self.glob_std = torch.zeros_like(mean), torch.zeros_like(mean)
        before = self.count.to(x)
        share = number / (before + number).clamp(min=1)
        difference = mean - self.glob_mean
        variance = (1 - share) * self.glob_std.square() + squares / (before + number).clamp(min=1)
        variance = variance + share * (1 - share) * difference.square()
        self.glob_mean = self.glob_mean + share * difference
        self.glob_std = variance.clamp(min=self.epsilon).sqrt()
        self.count = self.count + number.long().squeeze()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("glob_mean", "glob_std"):  # their size is that of the features, known from the first batch on
            value = state_dict.get(prefix + name)
            if value is not None and value.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(value, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)


@loadable
class SentenceNormalization(InputNormalization):
    """ "Sentence" normalisation that knows, when a stream begins, how speech usually sounds.

    Whole utterances are normalised by their own mean and deviation, as in SpeechBrain. In chunks these are taken over what came
    so far and, as if it had come before, half a second with the mean and deviation of the training set: a beginning that is
    silent says nothing of speech.

    Arguments
    ---------
    prior_frames : int
        Frames that count as if they had come before: of 0, 50, 100, 200 and 400, 50 lost least against whole utterances (17.4,
        8.2, 13.7, 19.1 and 26.2 % WER against 6.1 %; Practical Conformer on the embedded mini corpus, chunks of 160 ms).
    **kwargs
        For :class:`InputNormalization`, such as ``update_until_epoch``.

    Example
    -------
    >>> normalize = SentenceNormalization()
    >>> x = 3 + torch.rand(2, 50, 4)
    >>> normalize(x, torch.ones(2), epoch=0).mean().abs() < 1e-5
    tensor(True)
    >>> normalize.glob_mean.shape
    torch.Size([4])
    """

    def __init__(self, prior_frames: int = 50, **kwargs):
        super().__init__(**{"norm_type": "sentence", **kwargs}, prior_frames=prior_frames)


def keeps_statistics(normalize):
    """Whether a normalisation has statistics of the training set that its state does not hold.

    SpeechBrain's own class keeps them in plain attributes, which no weights file has.
    """
    return getattr(normalize, "norm_type", None) == "global" and "glob_mean" not in dict(normalize.named_buffers())


class FeatureStream:
    """Normalised features of waveforms that come in pieces of any size.

    Arguments
    ---------
    compute_features : speechbrain.lobes.features.Fbank
        The feature extraction.
    normalize : speechbrain.processing.features.InputNormalization
        The normalisation.
    chunk : int
        Feature frames per chunk.

    Raises
    ------
    ValueError
        If these features cannot be had chunk by chunk.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.processing.features import InputNormalization
    >>> stream = FeatureStream(Fbank(), InputNormalization(norm_type="sentence"), chunk=16)
    >>> [chunk.shape[1] for chunk in stream.accept(torch.rand(1, 6000))]
    [16, 16]
    >>> [chunk.shape[1] for chunk in stream.finish()]
    [6]
    """

    def __init__(self, compute_features, normalize, chunk: int):
        check_streamable(compute_features)
        self._features, self._top_db = compute_features, compute_features.compute_fbanks.top_db
        self._compute = None
        stft = compute_features.compute_STFT
        self._hop, self._window, self._chunk = stft.hop_length, stft.n_fft, chunk
        self._normalize, self._grows = normalize, _grows(normalize)
        self._samples = None  # (B, n), from the beginning of the next frame's window on
        self._heard = 0
        self._frames = 0
        self._peak = self._moments = None

    def accept(self, wavs):
        """Take samples in.

        Arguments
        ---------
        wavs : torch.Tensor
            (B, N), the next samples.

        Returns
        -------
        iterator
            Of the chunks (B, chunk, F) that they complete.
        """
        self._heard += wavs.shape[1]
        before = F.pad(wavs[:, :0], (self._window // 2, 0)) if self._samples is None else self._samples
        self._samples = torch.cat((before, wavs), 1)
        while self._samples.shape[1] >= self._needs(self._chunk):
            yield self._take(self._chunk)

    def finish(self):
        """End the stream.

        Returns
        -------
        iterator
            Of the chunks (B, <= chunk, F) that were still to come.
        """
        if not self._heard:
            return
        frames = 1 + self._heard // self._hop
        self._samples = F.pad(self._samples, (0, self._window // 2))
        while self._frames < frames:
            yield self._take(min(self._chunk, frames - self._frames))

    def _needs(self, frames):
        return (frames - 1) * self._hop + self._window

    def _take(self, frames):
        samples = self._samples[:, : self._needs(frames)]
        if self._compute is None:
            self._compute = _without_clipping(self._features, samples.device)
            self._compute.compute_STFT.center = False  # this class cuts what each frame needs out of the stream
        # Matrix products of few rows round in another way: with zeros behind, a chunk has the bits of the whole file
        samples = F.pad(samples, (0, max(0, self._needs(FEWEST) - samples.shape[1])))
        feats = self._compute(samples)[:, :frames]
        self._samples = self._samples[:, frames * self._hop :].clone()  # a view would keep what has been heard
        self._frames += frames
        peak = feats.amax((1, 2))
        self._peak = peak if self._peak is None else peak.maximum(self._peak)
        feats = feats.maximum((self._peak - self._top_db)[:, None, None])
        if not self._grows:
            return self._normalize(feats, torch.ones(len(feats), device=feats.device))
        moments = moments_of(feats, torch.ones_like(feats[..., :1], dtype=torch.bool), 1)
        self._moments = moments if self._moments is None else self._moments + moments
        return standardized(self._normalize, feats, self._moments.unsqueeze(2))


def clips(compute_features):
    """Whether features are clipped below the utterance's loudest bin."""
    return isinstance(compute_features, Fbank) and not (compute_features.deltas or compute_features.context)


def check_streamable(compute_features):
    """Refuse features that cannot be had chunk by chunk.

    Raises
    ------
    UserError
        If they cannot; the message says which setting is in the way.
    """
    if not clips(compute_features):
        raise UserError(f"{type(compute_features).__name__} features do not stream; give Fbank without deltas and context.")
    stft = compute_features.compute_STFT
    if stft.n_fft % 2 or stft.hop_length > stft.n_fft:
        raise UserError(
            f"Features with n_fft {stft.n_fft} and hops of {stft.hop_length} samples do not stream; give an even n_fft, no less."
        )
    if not stft.center:
        raise UserError("Features whose STFT is not centred do not stream; leave center at True.")


def _without_clipping(compute_features, device):
    """A view of the features that clips nothing, with the same filters and window, which lie on the device."""
    view, fbanks = _view(compute_features), compute_features.compute_fbanks
    view.compute_STFT, view.compute_fbanks = _view(view.compute_STFT), _view(fbanks)
    view.compute_fbanks.top_db = torch.inf
    if fbanks.freeze and not fbanks.param_rand_factor:  # others are new in each call
        view.compute_STFT.window, matrix = _constants(compute_features, device)
        view.compute_fbanks = _Filters(view.compute_fbanks, matrix)
    return view


_CONSTANTS = weakref.WeakKeyDictionary()


def _constants(compute_features, device):
    """Window and filters, made once for each device: SpeechBrain makes the filters anew in each call, on the CPU."""
    kept = {} if torch.compiler.is_compiling() else _CONSTANTS.setdefault(compute_features, {})
    if device not in kept:
        fbanks, window = compute_features.compute_fbanks, compute_features.compute_STFT.window
        with torch.inference_mode(False), torch.no_grad():  # for training, too, whoever asks first
            centres, bands = (part.unsqueeze(1).expand_as(fbanks.all_freqs_mat) for part in (fbanks.f_central, fbanks.band))
            kept[device] = window.to(device), fbanks._create_fbank_matrix(centres, bands).to(device)
    return kept[device]


class _Filters(torch.nn.Module):
    """SpeechBrain's filter banks with the matrix that is given."""

    def __init__(self, fbanks, matrix):
        super().__init__()
        self.fbanks, self.matrix = fbanks, matrix

    def forward(self, spectrogram):
        """(B, T, n_fft / 2 + 1) to (B, T, F)."""
        feats = spectrogram @ self.matrix
        return self.fbanks._amplitude_to_DB(feats) if self.fbanks.log_mel else feats


def _view(module):
    """A copy of a module with settings of its own, and the same parameters, buffers and parts."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


def _grows(normalize):
    """Whether statistics grow with the utterance; others are known before it."""
    if normalize.norm_type not in ("global", "sentence"):
        raise UserError(f"Normalisation by {normalize.norm_type} does not stream; give norm_type global or sentence.")
    return normalize.norm_type == "sentence"


def _chunked(x, chunk, fill=0):
    """(B, T, F) to (B, chunks, chunk, F)."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % chunk), value=fill).unflatten(1, (-1, chunk))


def moments_of(feats, valid, dim):
    """Number, sum and sum of squares of the valid frames (..., F), one behind the other: (3, ..., F), float64."""
    feats = widest(feats).masked_fill(~valid, 0.0)
    return torch.stack((valid.sum(dim).to(feats.dtype).expand_as(feats.select(dim, 0)), feats.sum(dim), feats.square().sum(dim)))


def prior_of(normalize, moments):
    """What statistics begin with."""
    frames = getattr(normalize, "prior_frames", 0)
    if not frames or not normalize.glob_mean.numel():
        return 0.0
    mean, std = (value.to(moments) for value in (normalize.glob_mean, normalize.glob_std))
    prior = frames * torch.stack((torch.ones_like(mean), mean, mean.square() + std.square()))
    return prior.view(3, *[1] * (moments.dim() - 2), -1)


def standardized(normalize, feats, moments):
    """As SpeechBrain normalises a sentence, with the given moments."""
    count, total, squares = moments + prior_of(normalize, moments)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt() if normalize.std_norm else torch.ones_like(mean)
    return ((feats - mean) / std.clamp(min=normalize.epsilon)).to(feats.dtype)
