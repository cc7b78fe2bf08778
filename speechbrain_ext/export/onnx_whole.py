"""A trained model as one module of ONNX operations, from samples to the output of its head.

SpeechBrain's feature extraction and normalisation do not export: they use complex numbers, and round lengths again at each stage.
They are implemented again here, with the settings and statistics of the model. All other parts are the model's modules.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from speechbrain_ext.lobes.features import FLOOR, KaldiFbank, least_std
from speechbrain_ext.lobes.filter_banks import centred, front_end, kaldi_frames
from speechbrain_ext.lobes.fusible import fuse_
from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask
from speechbrain_ext.speech_encoder import SpeechEncoder
from speechbrain_ext.utils.errors import UserError


class Features(nn.Module):
    """KaldiFbank or SpeechBrain's Fbank with InputNormalization, with matrix products in place of the FFT; exact in any batch.

    Arguments
    ---------
    compute_features : KaldiFbank or speechbrain.lobes.features.Fbank
        The feature extraction.
    normalize : speechbrain.processing.features.InputNormalization
        The normaliser, with its statistics.

    Raises
    ------
    ValueError
        If a setting is not supported here.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.processing.features import InputNormalization
    >>> fbank, normalize, wav = Fbank(n_mels=80), InputNormalization(norm_type="sentence").eval(), torch.rand(1, 1600)
    >>> features, frames = Features(fbank, normalize)(wav, torch.tensor([1600]))
    >>> features.shape, frames
    (torch.Size([1, 11, 80]), tensor([11]))
    >>> torch.allclose(features, normalize(fbank(wav)), atol=1e-3)
    True
    """

    def __init__(self, compute_features, normalize):
        super().__init__()
        _refuse_unknown(compute_features, normalize)
        front = front_end(compute_features)
        self.framing, self.hop_length = front.framing, front.framing.hop
        self.n_fft, self.top_db = front.n_fft, front.top_db
        self.removes_dc = getattr(front, "removes_dc", False)
        self.is_kaldi = isinstance(compute_features, KaldiFbank)
        if self.is_kaldi:
            window, matrix = compute_features.constants(torch.device("cpu"))
            self.power, self.amin, self.multiplier, self.reference = 2, FLOOR, math.log(10), 0.0  # the natural logarithm
        else:
            stft, filters = compute_features.compute_STFT, compute_features.compute_fbanks
            left = (self.n_fft - stft.win_length) // 2  # torch.stft centres a window that is shorter than the transform
            window = F.pad(stft.window, (left, self.n_fft - stft.win_length - left)).float()
            # Filterbank builds its matrix inside forward; without the logarithm, its output for a unit matrix is this matrix.
            linear = copy.copy(filters)
            linear.log_mel = False
            matrix = linear(torch.eye(self.n_fft // 2 + 1).unsqueeze(0))[0].detach()  # (bins, mels)
            self.power, self.amin, self.multiplier = filters.power_spectrogram, filters.amin, filters.multiplier
            self.reference = filters.multiplier * filters.db_multiplier
        inner, outer, bins = _two_stages(self.n_fft)
        self.register_buffer("window", window.clone())
        self.register_buffer("inner", inner.float())
        self.register_buffer("outer", outer.float())
        self.register_buffer("filters", torch.where(bins.unsqueeze(1) < 0, 0.0, matrix[bins]))
        self.per_sentence = normalize.norm_type == "sentence"
        self.std_norm = normalize.std_norm
        self.register_buffer("least_std", torch.as_tensor(least_std(normalize)).clone())
        if not self.per_sentence:
            std = normalize.glob_std if self.std_norm else torch.ones_like(normalize.glob_mean)
            self.register_buffer("mean", normalize.glob_mean.clone())
            self.register_buffer("std", std.clamp(min=normalize.epsilon))

    def forward(self, waveform, lengths):
        """Map samples (B, N) and their numbers (B,) to features (B, T, F), zero in padded frames, and numbers of frames (B,)."""
        waveform = waveform.masked_fill(padding_mask(lengths, waveform.shape[1]), 0.0)
        if self.removes_dc:
            waveform = centred(waveform, lengths)
        features = self.log_mel_of_windows(self.framing.extend(waveform, lengths, self.framing.before, self.framing.after))
        frames = self.framing.count(lengths)
        return self.normalized(features, frames), frames

    def normalized(self, features, frames):
        """Map log mel bins (B, T, F) with any padding, and frame counts (B,), to features (B, T, F), zero in padded frames."""
        padding = padding_mask(frames, features.shape[1]).unsqueeze(2)
        if self.top_db < math.inf:
            # The loudest bin in valid frames: the frame after the utterance's end may still contain a louder sample.
            loudest = features.masked_fill(padding, -math.inf).amax(dim=(1, 2), keepdim=True)
            features = torch.maximum(features, loudest - self.top_db)
        return self._normalize(features, padding, frames.view(-1, 1, 1)).masked_fill(padding, 0.0)

    def log_mel_of_windows(self, waveform):
        """Log mel bins (B, 1 + (N - length) // hop, F) of the windows in samples (B, N)."""
        framed = waveform.unfold(1, self.framing.length, self.hop_length)
        if self.is_kaldi:
            framed = F.pad(kaldi_frames(framed, self.window), (0, self.n_fft - self.framing.length + 1))
        else:
            framed = framed * self.window
        batch, steps, _ = framed.shape
        rows = self.inner.shape[0]  # P; n = p * Q + q
        x = framed.unflatten(2, (rows, self.n_fft // rows)).transpose(2, 3) @ self.inner  # (B, T, Q, 2R)
        x = x.unflatten(3, (2, -1)).permute(4, 0, 1, 3, 2).reshape(self.outer.shape[0], batch * steps, -1)  # (R, B * T, 2Q)
        real, imaginary = (x @ self.outer).chunk(2, dim=2)  # (R, B * T, Q)
        spectrum = (real.square() + imaginary.square()).transpose(0, 1).reshape(batch, steps, -1)
        if self.power != 2:
            spectrum = spectrum.sqrt() if self.power == 1 else spectrum.pow(self.power / 2)
        return self.multiplier * (spectrum @ self.filters).clamp(min=self.amin).log10() - self.reference

    def _normalize(self, features, padding, frames):
        if not self.per_sentence:
            return (features - self.mean) / self.std
        centred = features
        for _ in range(2):  # onnxruntime sums frames one by one in float32; the second mean removes the error of the first
            centred = centred - centred.masked_fill(padding, 0.0).sum(1, keepdim=True) / frames
        if not self.std_norm:
            return centred
        std = (centred.masked_fill(padding, 0.0).square().sum(1, keepdim=True) / frames).sqrt()
        return centred / std.maximum(self.least_std)


def _two_stages(size):
    """The discrete Fourier transform of real numbers as two matrix products, one step of the Cooley-Tukey algorithm.

    It has a sixth of the operations of one product with all sines. Its sums have tens of terms, not hundreds; sums of hundreds
    of terms in float32 lose quiet bins beside loud ones. With size = P * Q, n = p * Q + q and k = s * P + r,

        X[k] = sum over q of exp(-2 pi i q k / size) * (sum over p of x[n] exp(-2 pi i p r / P)),

    for r <= P / 2 only, as the other k are mirror images.

    Returns
    -------
    tuple
        The inner matrix (P, 2R); the outer matrices (R, 2Q, 2Q), both with real parts before imaginary ones; and the bin of each
        of the R * Q results, -1 for a repeated bin.
    """
    first = max(divisor for divisor in range(1, math.isqrt(size) + 1) if size % divisor == 0)  # P
    second = size // first
    r = torch.arange(first // 2 + 1)
    k = r.unsqueeze(1) + first * torch.arange(second)  # (R, Q)
    angle = -2 * math.pi / first * torch.outer(torch.arange(first), r).double()
    inner = torch.cat([angle.cos(), angle.sin()], dim=1)
    # The modulo keeps angles small, and their sines exact
    angle = -2 * math.pi / size * (torch.arange(second).view(1, -1, 1) * k.unsqueeze(1) % size).double()  # (R, Q, Q)
    cos, sin = angle.cos(), angle.sin()
    outer = torch.cat([torch.cat([cos, sin], dim=2), torch.cat([-sin, cos], dim=2)], dim=1)
    bins = torch.minimum(k, size - k).flatten().tolist()
    return inner, outer, torch.tensor([-1 if bin in bins[:i] else bin for i, bin in enumerate(bins)])


def _refuse_unknown(compute_features, normalize):
    settings = [("norm_type", normalize.norm_type, ("sentence", "global"))]
    if not isinstance(compute_features, KaldiFbank):
        settings += _settings_of_fbank(compute_features)
    for name, value, known in settings:
        if value not in known:
            raise UserError(
                f"The model's {name} is {value}, but export supports only {' and '.join(map(str, known))}; train it with that."
            )


def _settings_of_fbank(compute_features):
    stft, filters = compute_features.compute_STFT, compute_features.compute_fbanks
    return [
        ("deltas", compute_features.deltas, (False,)),
        ("context", compute_features.context, (False,)),
        ("center", stft.center, (True,)),
        ("pad_mode", stft.pad_mode, ("constant",)),
        ("normalized_stft", stft.normalized_stft, (False,)),
        ("onesided", stft.onesided, (True,)),
        ("log_mel", filters.log_mel, (True,)),
    ]


def without_features(encoder, head):
    """A copy of a SpeechEncoder without feature extraction, followed by a head.

    Arguments
    ---------
    encoder : speechbrain_ext.speech_encoder.SpeechEncoder
        The encoder.
    head : torch.nn.Module
        The module after the encoder.

    Returns
    -------
    speechbrain_ext.speech_encoder.SpeechEncoder
    """
    transformer = copy.deepcopy(encoder.transformer)
    if hasattr(transformer, "decoder"):
        del transformer.decoder
    return SpeechEncoder(None, None, copy.deepcopy(encoder.subsampling), transformer, copy.deepcopy(head))


class FullContext(nn.Module):
    """Whole utterances: ``waveform`` (B, N) and ``lengths`` (B,) to ``log_probs`` (B, T, V) and ``frames`` (B,).

    Arguments
    ---------
    encoder : speechbrain_ext.speech_encoder.SpeechEncoder
        The encoder. It is copied, and normalisation is fused into the weights of the copy.
    head : torch.nn.Module
        The CTC head, or a transducer's projection of frames.
    pass_name : str, optional
        The pass of a cascade to export.
    output : str
        "log_probs" for a CTC head, or "encoder_out" (B, T, J) for the unchanged output of the head.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.processing.features import InputNormalization
    >>> from speechbrain_ext.asr import SpeechEncoder, TransformerASR
    >>> from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling
    >>> net = TransformerASR(30, 640, 32, 4, 2, 0, 64, encoder_module="conformer")
    >>> encoder = SpeechEncoder(Fbank(n_mels=80), InputNormalization(norm_type="sentence"), ConvolutionSubsampling(), net)
    >>> log_probs, frames = FullContext(encoder.eval(), nn.Linear(32, 30))(torch.rand(2, 16000), torch.tensor([16000, 8000]))
    >>> log_probs.shape, frames
    (torch.Size([2, 26, 30]), tensor([26, 13]))
    """

    mode = "full"
    metadata = {}
    input_names = ("waveform", "lengths")
    dynamic_shapes = ({0: "batch", 1: "samples"}, {0: "batch"})

    def __init__(self, encoder, head, pass_name=None, output="log_probs"):
        super().__init__()
        self.pass_name = pass_name
        self.output_names, self.normalises = (output, "frames"), output == "log_probs"
        self.features = Features(encoder.compute_features, encoder.normalize)
        self.encoder = without_features(encoder, head)
        fuse_(self)
        self.eval()

    def forward(self, waveform, lengths):
        """See the class; lengths are clipped to the range from 0 to the number of samples."""
        lengths = lengths.clamp(min=0, max=waveform.shape[1])
        return self.log_probs(*self.features(waveform, lengths))

    def log_probs(self, x, frames):
        """Map features (B, T, F) and numbers of frames (B,) to log-probabilities (B, T', V) and their numbers of frames (B,)."""
        x, relative = self.encoder.encode_features(x, frames / x.shape[1], pass_name=self.pass_name)
        return x.log_softmax(dim=-1) if self.normalises else x, absolute_lengths(relative, x.shape[1])

    def example_inputs(self):
        """Inputs to trace with: two utterances, because the exporter takes an axis of size one as constant."""
        return torch.randn(2, 20000, generator=torch.Generator().manual_seed(0)), torch.tensor([20000, 12000])
