"""Features of whole utterances with exact lengths, and exactly the same features chunk by chunk.

Two steps of SpeechBrain's pipelines use the whole utterance: filter banks are clipped 80 dB below its maximum, and "sentence"
normalisation uses its statistics. With a chunk setting both use only the audio up to the end of the chunk, in
:func:`clip_features` and :func:`normalize_features` as in :class:`FeatureStream`. Features are therefore extracted without
clipping first (:func:`raw_features`). These do not depend on the chunk setting, and can be cached.
"""

import torch
import torch.nn.functional as F
from speechbrain.lobes.features import Fbank as SpeechBrainFbank
from speechbrain.processing.features import InputNormalization as SpeechBrainInputNormalization
from speechbrain.processing.features import make_padding_mask

from speechbrain_ext.lobes.filter_banks import Framing, front_end, kaldi_filters, kaldi_frames, povey_window
from speechbrain_ext.lobes.masks import absolute_lengths, check_lengths, padding_mask
from speechbrain_ext.lobes.precision import full_precision, widest
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.distributed import sum_over_processes
from speechbrain_ext.utils.errors import UserError

FEWEST = 16
"""Smallest number of frames to compute at once."""
BLOCK = 512
"""Frames of KaldiFbank that a CPU computes at once: 10 s take 1.5 ms instead of 3.3 ms, and 8 x 15 s 21 ms instead of 41 ms."""
FLOOR = torch.finfo(torch.float32).eps
"""Lowest energy in a filter, as in Kaldi."""


@loadable
class KaldiFbank(torch.nn.Module):
    """Kaldi's log mel filter banks, as the runtimes of k2 compute them. sherpa-onnx feeds them to models that take features.

    Frames of 25 ms every 10 ms without their mean, pre-emphasis of 0.97, Povey's window, a power spectrum of the next power of
    two, triangular filters in HTK's mel scale from 20 Hz to 400 Hz below half the sampling rate. Frame t is centred 10 t + 5 ms
    from the beginning. The signal is mirrored at its ends (``snip_edges`` false): N samples have (N + hop / 2) // hop frames, and
    at least one. Kaldi gives no frame for less than 5 ms.

    A value is the natural logarithm of the energy in a filter, for samples in [-1, 1]. It is at least ln 1.19e-7 = -15.94.
    SpeechBrain's Fbank uses 10 log10, which is 4.34 times as much, and clips 80 dB below the loudest bin of the utterance. Here
    only the constant floor clips: the features of a stream need no state except samples.

    Source: kaldi-native-fbank (https://github.com/csukuangfj/kaldi-native-fbank); the same numbers as
    ``torchaudio.compliance.kaldi.fbank(wavs, num_mel_bins=80, dither=0, snip_edges=False, low_freq=20, high_freq=-400,
    energy_floor=0)``.

    Arguments
    ---------
    sample_rate : int
        Samples per second, a multiple of 200, at least 1000.
    n_mels : int
        Number of filters F.

    Raises
    ------
    UserError
        If the sample rate or the number of filters is impossible.

    Example
    -------
    >>> fbank = KaldiFbank()
    >>> fbank(torch.rand(2, 1600), torch.tensor([1.0, 0.4])).shape
    torch.Size([2, 10, 80])
    >>> round(float(fbank(torch.zeros(1, 1600)).max()), 2)
    -15.94
    """

    top_db = torch.inf
    """Nothing is clipped relative to the loudest bin."""

    def __init__(self, sample_rate: int = 16000, n_mels: int = 80):
        super().__init__()
        if not isinstance(sample_rate, int) or sample_rate < 1000 or sample_rate % 200:
            raise UserError(f"The sample_rate of KaldiFbank is {sample_rate!r}; give a multiple of 200, at least 1000.")
        if not isinstance(n_mels, int) or n_mels < 1:
            raise UserError(f"The n_mels of KaldiFbank is {n_mels!r}; give a whole number above 0.")
        self.sample_rate, self.n_mels = sample_rate, n_mels
        hop, length = sample_rate // 100, sample_rate // 40
        self.framing = Framing(hop, length, length // 2 - hop // 2, mirrors=True)
        self.n_fft = 1 << (length - 1).bit_length()
        # By device, not as buffers: a model in half precision has its features in float32
        filters = kaldi_filters(sample_rate, self.n_fft, n_mels)
        if not filters.any(0).all():
            raise UserError(
                f"The n_mels of KaldiFbank is {n_mels}, too many at {sample_rate} Hz: a filter would lie between two "
                "frequencies of the spectrum; give fewer, such as 80 at 16000 Hz."
            )
        self._constants = {torch.device("cpu"): (povey_window(length), filters)}

    def forward(self, wavs, wav_lens=None):
        """Features.

        Arguments
        ---------
        wavs : torch.Tensor
            (B, N) samples in [-1, 1].
        wav_lens : torch.Tensor, optional
            (B,) relative lengths; without them all samples are valid.

        Returns
        -------
        torch.Tensor
            (B, T, F) float32. The valid frames of an utterance do not depend on the batch.
        """
        if wav_lens is None:
            wav_lens = torch.ones(len(wavs), device=wavs.device)
        return raw_features(self, wavs, wav_lens)[0]

    def of_utterances(self, wavs, samples):
        """Samples (B, N), zero after the end of each utterance, and their numbers (B,), to features (B, T, F)."""
        framing, frames = self.framing, self.framing.count(wavs.shape[1])
        wavs = framing.extend(wavs, samples, framing.before, framing.after)
        return self.of_windows(wavs[:, : framing.needs(frames)])

    def of_windows(self, samples):
        """Samples (B, N) to the features of the windows in them, (B, 1 + (N - length) // hop, F)."""
        with full_precision(samples):
            frames = samples.float().unfold(1, self.framing.length, self.framing.hop)
            # A CPU is twice as fast if a block fits into its cache; other devices need few launches
            blocks = -(-len(frames) * frames.shape[1] // BLOCK) if _is_eager_cpu(frames) else 1
            return torch.cat([self._of_frames(block) for block in frames.chunk(blocks, 1)], 1)

    def _of_frames(self, frames):
        window, filters = self.constants(frames.device)
        squares = torch.view_as_real(torch.fft.rfft(kaldi_frames(frames, window), self.n_fft)).square_()
        return ((squares[..., 0] + squares[..., 1]) @ filters).clamp(min=FLOOR).log()

    def constants(self, device):
        """Window (length,) and filters (n_fft / 2 + 1, F), copied to each device once."""
        if device not in self._constants:
            with torch.inference_mode(False):  # usable in training, also if inference calls first
                self._constants[device] = tuple(tensor.to(device) for tensor in self._constants[torch.device("cpu")])
        return self._constants[device]

    def check_streamable(self):
        """Accept: these features stream in any setting."""


@loadable
class Fbank(SpeechBrainFbank):
    """SpeechBrain's Fbank, with the option to subtract the samples' mean over the utterance.

    A constant offset of the recording then changes nothing. Such features need the whole utterance; they do not stream.

    Arguments
    ---------
    *args, **kwargs
        Arguments of SpeechBrain's class.
    remove_dc : bool
        Whether to subtract the mean. sherpa-onnx subtracts it for models that compute their features themselves.

    Example
    -------
    >>> wav = torch.rand(1, 1600)
    >>> bool(torch.allclose(Fbank(remove_dc=True)(wav + 0.5), Fbank(remove_dc=True)(wav), atol=0.1))
    True
    """

    def __init__(self, *args, remove_dc: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_dc = remove_dc

    def forward(self, wav):
        """Samples (B, N), all of them valid, to features (B, 1 + N // hop, F)."""
        return super().forward(wav - wav.mean(1, keepdim=True) if self.remove_dc else wav)


def _is_eager_cpu(x):
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def raw_features(compute_features, wavs, wav_lens):
    """Features without clipping and with exact lengths: an utterance has the same number of frames alone and in any batch.

    SpeechBrain's pipelines pass relative lengths on and round them at each stage: the last frame depends on the batch.

    Arguments
    ---------
    compute_features : KaldiFbank or speechbrain.lobes.features.Fbank
        The feature extraction; any other one with a centred ``compute_STFT`` is used unchanged.
    wavs : torch.Tensor
        (B, N) samples.
    wav_lens : torch.Tensor
        (B,) relative lengths.

    Returns
    -------
    tuple
        Features (B, T, F), and the relative lengths (B,) of these frames.

    Raises
    ------
    UserError
        If the features are not supported, or the samples are no (B, N), or the lengths impossible.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> feats, lens = raw_features(Fbank(), torch.rand(2, 1600), torch.tensor([1.0, 0.45]))
    >>> feats.shape, torch.round(lens * 11)
    (torch.Size([2, 11, 40]), tensor([11.,  5.]))
    """
    _check_samples(wavs)
    check_lengths(wav_lens, wavs.shape[0])
    samples = absolute_lengths(wav_lens, wavs.shape[1])
    wavs = wavs.masked_fill(padding_mask(samples, wavs.shape[1]), 0.0)
    front = front_end(compute_features)
    feats = front.of_utterances(wavs, samples)
    frames = front.framing.count(samples)
    relative = frames / feats.shape[1]
    # SpeechBrain's normalisation counts the frames below relative * T without rounding: an error must not add a frame.
    above = relative * feats.shape[1] > frames
    return feats, torch.where(above, torch.nextafter(relative, torch.zeros_like(relative)), relative)


def clip_features(compute_features, feats, lens, chunk: int | None = None):
    """Clip values that lie more than the features' range (``top_db``, 80 dB) below the loudest bin.

    Arguments
    ---------
    compute_features : KaldiFbank or speechbrain.lobes.features.Fbank
        The feature extraction; only SpeechBrain's Fbank clips.
    feats : torch.Tensor
        (B, T, F) of :func:`raw_features`.
    lens : torch.Tensor
        (B,) relative lengths; padding has no influence.
    chunk : int, optional
        Feature frames per chunk. The loudest bin is then that of the audio up to the end of the frame's chunk.

    Returns
    -------
    torch.Tensor
        (B, T, F).

    Raises
    ------
    UserError
        If there is a chunk size, and these features do not stream.
    """
    front = front_end(compute_features)
    if chunk is not None:
        front.check_streamable()
    if front.top_db == torch.inf:
        return feats
    frames = feats.shape[1]
    padding = padding_mask(absolute_lengths(lens, frames), frames).unsqueeze(2)
    feats_or_nothing = feats.masked_fill(padding, -torch.inf)
    if chunk is None:
        peaks = feats_or_nothing.amax((1, 2), keepdim=True)
    else:
        peaks = _chunked(feats_or_nothing, chunk, -torch.inf).amax((2, 3)).cummax(1).values
        peaks = peaks.repeat_interleave(chunk, 1)[:, :frames, None]
    return feats.maximum(peaks - front.top_db)


def normalize_features(normalize, feats, lens, chunk: int | None = None, **kwargs):
    """Normalise; with ``chunk``, "sentence" statistics are those of the utterance up to the end of the frame's chunk.

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
        Keys of ``normalize``.

    Returns
    -------
    torch.Tensor
        (B, T, F).

    Raises
    ------
    ValueError
        If there is no normalisation, or it needs more than one utterance.

    Example
    -------
    >>> from speechbrain.processing.features import InputNormalization
    >>> x = torch.rand(1, 9, 4)
    >>> y = normalize_features(InputNormalization(norm_type="sentence"), x, torch.ones(1), chunk=3)
    >>> torch.allclose(y[:, :3].mean(1), torch.zeros(4), atol=1e-5)
    True
    """
    if normalize is None:
        raise UserError("There is no normalisation; give a module, such as InputNormalization, or normalised features.")
    if chunk is None or not _grows(normalize):
        return normalize(feats, lens, **kwargs)
    if normalize.training:
        normalize(feats, lens, **kwargs)  # to update its statistics
    frames = feats.shape[1]
    valid = ~padding_mask(absolute_lengths(lens, frames), frames)
    feats, valid = _chunked(feats, chunk), _chunked(valid.unsqueeze(-1), chunk)
    moments = moments_of(feats, valid, 2).cumsum(2)
    return _standardized(normalize, feats, moments.unsqueeze(3)).flatten(1, 2)[:, :frames]


@loadable
class InputNormalization(SpeechBrainInputNormalization):
    """SpeechBrain's InputNormalization with its statistics as buffers: they move with the module, and are in its state dict.

    Arguments
    ---------
    norm_type : str
        "global" (the training set's statistics) or "sentence" (the utterance's own).
    update_until_epoch : int
        Training updates the statistics before this epoch.
    prior_frames : int
        For "sentence" in chunks: this number of frames with the training set's statistics counts as if they preceded the
        utterance. Training then collects these statistics as for "global".
    least_deviation : float
        For "sentence": the least deviation that a bin is divided by, as a share of the training set's, which training collects.
    **kwargs
        Keys of SpeechBrain's class.

    Example
    -------
    >>> normalize = InputNormalization()
    >>> _ = normalize(3 + torch.rand(2, 50, 4), torch.ones(2), epoch=0)
    >>> sorted(normalize.state_dict()), int(normalize.count)
    (['frames', 'glob_mean', 'glob_std'], 100)
    """

    def __init__(
        self,
        norm_type: str = "global",
        update_until_epoch: int = 2,
        prior_frames: int = 0,
        least_deviation: float = 0.0,
        **kwargs,
    ):
        super().__init__(norm_type=norm_type, update_until_epoch=update_until_epoch, **kwargs)
        self.prior_frames = prior_frames
        self.least_deviation = least_deviation
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
        else:  # SpeechBrain's constructor sets the count before the buffer exists
            self.register_buffer("frames", torch.as_tensor(value))

    def forward(self, x, lengths=None, epoch=None):
        """Normalise (B, T, F). Training updates the statistics before the epoch ``update_until_epoch``.

        Raises
        ------
        UserError
            If it needs statistics and has none yet.
        """
        if self.norm_type == "global" and not self.glob_mean.numel() and not self._should_update(epoch):
            raise UserError("The normalisation has no statistics yet; train it, or load a checkpoint.")
        if self.norm_type == "sentence":
            mask = make_padding_mask(x, lengths, length_dim=1)
            if (self.prior_frames or self.least_deviation) and self._should_update(epoch):
                self._update_global_stats(x, mask)
            # The second mean removes the rounding error of the first: a bin that never changes, as in digital silence, must be 0,
            # and not its error divided by a deviation that is itself an error.
            mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            x = x - (mean * mask if self.avoid_padding_norm else mean)
        return super().forward(x, lengths, epoch)

    def _compute_current_stats(self, x, mask, dim):
        mean, std = super()._compute_current_stats(x, mask, dim)
        return mean, std.clamp(min=least_std(self))

    @torch.no_grad()
    def _update_global_stats(self, x, mask):
        """As in SpeechBrain, without waiting for the device; over all processes of a distributed run."""
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
        for name in ("glob_mean", "glob_std"):  # their size is the number of bins, unknown before the first batch
            value = state_dict.get(prefix + name)
            if value is not None and value.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(value, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)


@loadable
class SentenceNormalization(InputNormalization):
    """ "Sentence" normalisation that knows the statistics of the training set.

    Whole utterances are normalised by their own mean and deviation, as in SpeechBrain. In chunks the statistics are those of the
    audio so far, preceded by half a second with the mean and deviation of the training set: statistics of a silent beginning
    alone do not fit speech. Both are divided by no less than a share of the training set's deviation: otherwise steady noise
    would be scaled up until it looks like speech.

    Arguments
    ---------
    prior_frames : int
        Frames that count as if they preceded the utterance. With 0, 50, 100, 200 and 400 the WER is 17.4, 8.2, 13.7, 19.1 and
        26.2 %, against 6.1 % for whole utterances (Practical Conformer on the embedded mini corpus, chunks of 160 ms).
    least_deviation : float
        The least deviation that a bin is divided by, as a share of the training set's. In 30 s of noise of seven steady kinds
        the model ``english`` then writes nothing, and with 0 eight to 27 words. With 0, 0.5, 0.6 and 0.7, an earlier ``english``
        made 51.3, 49.0, 49.0 and 52.7 % of errors in speech with pink noise 10 dB below it, and 35.5, 35.5, 35.2 and 35.3 % in
        speech without (part of dev-speechocean).
    **kwargs
        Keys of :class:`InputNormalization`, such as ``update_until_epoch``.

    Example
    -------
    >>> normalize = SentenceNormalization()
    >>> x = 3 + torch.rand(2, 50, 4)
    >>> normalize(x, torch.ones(2), epoch=0).mean().abs() < 1e-5
    tensor(True)
    >>> normalize.glob_mean.shape
    torch.Size([4])
    """

    def __init__(self, prior_frames: int = 50, least_deviation: float = 0.5, **kwargs):
        super().__init__(**{"norm_type": "sentence", **kwargs}, prior_frames=prior_frames, least_deviation=least_deviation)


def keeps_statistics(normalize):
    """Whether a normalisation has statistics of the training set that are not in its state dict.

    SpeechBrain's own class keeps them in plain attributes, which are in no weights file.
    """
    return getattr(normalize, "norm_type", None) == "global" and "glob_mean" not in dict(normalize.named_buffers())


class FeatureStream:
    """Normalised features of waveforms that come in pieces of any size.

    Arguments
    ---------
    compute_features : KaldiFbank or speechbrain.lobes.features.Fbank
        The feature extraction.
    normalize : speechbrain.processing.features.InputNormalization
        The normalisation.
    chunk : int
        Feature frames per chunk.

    Raises
    ------
    ValueError
        If these features do not stream.

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
        self._front = front_end(compute_features)
        self._front.check_streamable()
        self._framing, self._chunk = self._front.framing, chunk
        self._normalize, self._grows = normalize, _grows(normalize)
        self._samples = None  # (B, n), from the first sample of the next frame's window
        self._lead = self._framing.before  # number of samples still to add before the first one
        self._received = 0
        self._frames = 0
        self._peak = self._moments = None
        self._ended = False

    def _refuse_after_end(self):
        if self._ended:
            raise UserError("The last samples have ended this stream; make a new streaming context.")

    def accept(self, wavs):
        """Accept the next samples.

        Arguments
        ---------
        wavs : torch.Tensor
            (B, N), the next samples.

        Returns
        -------
        iterator
            Over the chunks (B, chunk, F) that are now complete.

        Raises
        ------
        UserError
            If the stream has ended, or the samples are no (B, N) with the B of the first ones.
        """
        self._refuse_after_end()
        _check_samples(wavs, "B" if self._samples is None else len(self._samples))
        self._received += wavs.shape[1]
        # A copy: the caller may use the memory again
        self._samples = wavs.clone() if self._samples is None else torch.cat((self._samples, wavs), 1)
        if self._lead and self._received >= self._lead:  # the samples to mirror have arrived
            self._extend(0)
        while self._samples.shape[1] >= self._framing.needs(self._chunk):
            yield self._take(self._chunk)

    def finish(self):
        """End the stream.

        Returns
        -------
        iterator
            Over the remaining chunks (B, <= chunk, F).
        """
        self._refuse_after_end()
        self._ended = True
        if not self._received:
            return
        frames = self._framing.count(self._received)
        # The last window's middle is no later than the last sample: the samples to mirror lie in the window itself
        self._extend(self._framing.after)
        while self._frames < frames:
            yield self._take(min(self._chunk, frames - self._frames))

    def _extend(self, after):
        lengths = torch.full((len(self._samples),), self._samples.shape[1], device=self._samples.device)
        self._samples, self._lead = self._framing.extend(self._samples, lengths, self._lead, after), 0

    def _take(self, frames):
        needs = self._framing.needs
        samples = self._samples[:, : needs(frames)]
        # Matrix products of few rows round differently: with zeros appended, a chunk has exactly the values of the whole file
        samples = F.pad(samples, (0, max(0, needs(FEWEST) - samples.shape[1])))
        feats = self._front.of_windows(samples)[:, :frames]
        self._samples = self._samples[:, frames * self._framing.hop :].clone()  # a view would keep all samples in memory
        self._frames += frames
        if self._front.top_db < torch.inf:
            peak = feats.amax((1, 2))
            self._peak = peak if self._peak is None else peak.maximum(self._peak)
            feats = feats.maximum((self._peak - self._front.top_db)[:, None, None])
        if not self._grows:
            return self._normalize(feats, torch.ones(len(feats), device=feats.device))
        moments = moments_of(feats, torch.ones_like(feats[..., :1], dtype=torch.bool), 1)
        self._moments = moments if self._moments is None else self._moments + moments
        return _standardized(self._normalize, feats, self._moments.unsqueeze(2))


def _grows(normalize):
    """Whether the statistics change during an utterance, instead of being fixed before it."""
    kind = getattr(normalize, "norm_type", type(normalize).__name__)
    if kind not in ("global", "sentence"):
        raise UserError(f"Normalisation by {kind} does not stream; give an InputNormalization with norm_type global or sentence.")
    return kind == "sentence"


def _check_samples(wavs, streams="B"):
    if wavs.dim() != 2 or streams not in ("B", len(wavs)):
        raise UserError(f"The samples have the shape {tuple(wavs.shape)}; give ({streams}, N).")


def _chunked(x, chunk, fill=0):
    """(B, T, F) to (B, chunks, chunk, F)."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % chunk), value=fill).unflatten(1, (-1, chunk))


def moments_of(feats, valid, dim):
    """Number, sum and sum of squares of the valid frames (..., F), stacked: (3, ..., F), float64."""
    feats = widest(feats).masked_fill(~valid, 0.0)
    return torch.stack((valid.sum(dim).to(feats.dtype).expand_as(feats.select(dim, 0)), feats.sum(dim), feats.square().sum(dim)))


def prior_of(normalize, moments):
    """Moments that precede those of the audio."""
    frames = getattr(normalize, "prior_frames", 0)
    if not frames or not normalize.glob_mean.numel():
        return 0.0
    mean, std = (value.to(moments) for value in (normalize.glob_mean, normalize.glob_std))
    prior = frames * torch.stack((torch.ones_like(mean), mean, mean.square() + std.square()))
    return prior.view(3, *[1] * (moments.dim() - 2), -1)


def _standardized(normalize, feats, moments):
    return standardized(feats, moments + prior_of(normalize, moments), normalize.std_norm, least_std(normalize))


def least_std(normalize):
    """The least deviation that an utterance's bins are divided by: a number, or a tensor (F,)."""
    share = getattr(normalize, "least_deviation", 0.0)
    if not share or not normalize.glob_std.numel():
        return normalize.epsilon
    return (share * normalize.glob_std).clamp(min=normalize.epsilon)


def standardized(feats, moments, std_norm, least):
    """Normalise as SpeechBrain normalises a sentence, with the given moments and the least deviation."""
    count, total, squares = moments
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=least) if std_norm else torch.ones_like(mean)
    return ((feats - mean) / std).to(feats.dtype)
