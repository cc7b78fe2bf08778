"""From waveforms to encoder frames: features, normalisation, subsampling, encoder."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.lobes.features import FeatureStream, clip_features, normalize_features, raw_features
from speechbrain_ext.lobes.filter_banks import front_end
from speechbrain_ext.lobes.masks import absolute_lengths, check_chunks, padding_mask, zero_padding
from speechbrain_ext.lobes.precision import autocasts
from speechbrain_ext.lobes.stack import Stack, recompute
from speechbrain_ext.registry import loadable


@loadable
class SpeechEncoder(nn.Module):
    """From waveforms to encoder frames, with exact lengths at each step: the ``encoder`` of a trained model.

    Training, whole files, streams and both ONNX graphs use it.

    Arguments
    ---------
    compute_features : torch.nn.Module
        Waveforms to features, see :mod:`speechbrain_ext.lobes.features`.
    normalize : torch.nn.Module
        Feature normalisation, called with (features, relative lengths).
    subsampling : torch.nn.Module
        A module of :mod:`speechbrain_ext.lobes.subsampling`.
    transformer : TransformerASR
        Encodes the subsampled features.
    head : torch.nn.Module, optional
        Applied to the encoder frames; with a CTC head ``speechbrain.inference.ASR.EncoderASR`` decodes the output.
    chunk_size : int, optional
        Chunk size in encoder frames that the model was trained to stream with; None = it was trained in full context only.
    left_context : int, optional
        Left context in chunks that the model was trained with; None = all.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.processing.features import InputNormalization
    >>> from speechbrain_ext.asr import TransformerASR
    >>> from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling
    >>> net = TransformerASR(30, 640, 32, 4, 2, 0, 64, encoder_module="conformer")
    >>> encoder = SpeechEncoder(Fbank(n_mels=80), InputNormalization(norm_type="sentence"), ConvolutionSubsampling(), net)
    >>> encoder(torch.rand(2, 16000), torch.tensor([1.0, 0.5])).shape
    torch.Size([2, 26, 32])
    """

    def __init__(self, compute_features, normalize, subsampling, transformer, head=None, chunk_size=None, left_context=None):
        super().__init__()
        self.compute_features = compute_features
        self.normalize = normalize
        self.subsampling = subsampling
        self.transformer = transformer
        self.head = head
        self.chunk_size = chunk_size
        self.left_context = left_context

    recomputes = False

    def recompute_activations(self):
        """Let training keep only the inputs of the subsampling and of each block for the gradient, and recompute the rest.

        This takes about a third more time, and a fraction of the memory.
        """
        self.recomputes = True
        for part in self.modules():
            if isinstance(part, Stack):
                part.recomputes = True

    def forward(self, wavs, wav_lens=None):
        """Waveforms (B, N) with relative lengths to encoder frames (B, T, D). SpeechBrain's inference classes call it."""
        return self.encode(wavs, wav_lens)[0]

    def encode(
        self,
        wavs,
        wav_lens=None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        pass_name: str | None = None,
    ):
        """Encode.

        Arguments
        ---------
        wavs : torch.Tensor
            (B, N) samples.
        wav_lens : torch.Tensor, optional
            (B,) relative lengths.
        dynchunktrain_config : DynChunkTrainConfig, optional
            The chunk setting, for features and encoder: no frame then depends on audio after its chunk.
        pass_name : str, optional
            One of the encoder's ``passes``; the last one by default.

        Returns
        -------
        tuple
            (B, T, D), and the exact relative lengths (B,) of these frames.

        Raises
        ------
        UserError
            If the chunk setting is impossible, or the features do not stream.
        """
        feats, lens = self.features(wavs, wav_lens)
        feats = self.normalized(feats, lens, dynchunktrain_config)
        return self.encode_features(feats, lens, dynchunktrain_config, pass_name)

    def features(self, wavs, wav_lens=None):
        """Waveforms to features that can be cached: they depend on no chunk setting and no statistics.

        Arguments
        ---------
        wavs : torch.Tensor
            (B, N) samples.
        wav_lens : torch.Tensor, optional
            (B,) relative lengths.

        Returns
        -------
        tuple
            (B, T, F), and their relative lengths (B,).
        """
        if wav_lens is None:
            wav_lens = torch.ones(len(wavs), device=wavs.device)
        return raw_features(self.compute_features, wavs, wav_lens)

    def count_frames(self, length, is_features: bool = False):
        """Number of encoder frames for a number of samples, or of feature frames; also for a tensor of such numbers.

        With subsampling that ``is_cut``, an utterance may get one frame more in a batch.
        """
        frames = length if is_features else front_end(self.compute_features).framing.count(length)
        factor = self.subsampling.factor
        return frames // factor if getattr(self.subsampling, "is_cut", False) else -(-frames // factor)

    def normalized(self, feats, lens, dynchunktrain_config: DynChunkTrainConfig | None = None, **keys):
        """Clip and normalise features.

        Arguments
        ---------
        feats : torch.Tensor
            (B, T, F) of :meth:`features`.
        lens : torch.Tensor
            (B,) relative lengths.
        dynchunktrain_config : DynChunkTrainConfig, optional
            The chunk setting. Clipping and statistics then use only the audio up to the end of each chunk.
        **keys
            Keys of the normalisation, such as ``epoch``.

        Returns
        -------
        torch.Tensor
            (B, T, F), zero in padded frames.
        """
        chunk = None if dynchunktrain_config is None else self._feature_chunk(dynchunktrain_config)
        feats = clip_features(self.compute_features, feats, lens, chunk)
        feats = normalize_features(self.normalize, feats, lens, chunk, **keys)
        return zero_padding(feats, padding_mask(absolute_lengths(lens, feats.shape[1]), feats.shape[1]))

    def encode_features(
        self,
        feats,
        lens=None,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        pass_name: str | None = None,
    ):
        """Encode normalised features.

        Arguments
        ---------
        feats : torch.Tensor
            (B, T, F) of :meth:`normalized`.
        lens : torch.Tensor, optional
            (B,) relative lengths; without them all frames are valid.
        dynchunktrain_config : DynChunkTrainConfig, optional
            The chunk setting.
        pass_name : str, optional
            One of the encoder's ``passes``; the last one by default.

        Returns
        -------
        tuple
            (B, T', D), and the exact relative lengths (B,) of these frames or None.
        """
        feats = self._as_weights(feats)
        x, lens = recompute(self.subsampling, feats, lens) if self.recomputes else self.subsampling(feats, lens)
        x = self.transformer.encode(x, lens, dynchunktrain_config=dynchunktrain_config, pass_name=pass_name)
        return x if self.head is None else self.head(x), lens

    def make_streaming_context(self, dynchunktrain_config: DynChunkTrainConfig, encoder_kwargs: dict | None = None):
        """The context of a new stream of waveforms.

        Arguments
        ---------
        dynchunktrain_config : DynChunkTrainConfig
            Chunk size in encoder frames and left context in chunks (None = all).
        encoder_kwargs : dict, optional
            Keys of the encoder's ``make_streaming_context``.

        Returns
        -------
        SpeechStreamingContext

        Raises
        ------
        ValueError
            If the chunk setting is impossible, or the features do not stream.
        """
        encoder = self.transformer.make_streaming_context(dynchunktrain_config, encoder_kwargs or {})
        features = FeatureStream(self.compute_features, self.normalize, self._feature_chunk(dynchunktrain_config))
        return SpeechStreamingContext(features, encoder)

    def encode_streaming(self, wavs, context, last: bool = False):
        """Encode the next samples. As soon as a chunk is complete, it gives the output of :meth:`encode` with the same setting.

        Call it under ``torch.no_grad()``: otherwise the state keeps what gradients need of the whole stream.

        Arguments
        ---------
        wavs : torch.Tensor
            (B, N) samples, any number of them.
        context : SpeechStreamingContext
            Updated in place.
        last : bool
            Whether the stream ends with these samples.

        Returns
        -------
        tuple
            The output of ``forward`` for the chunks that are now complete, (B, T, ...) with T >= 0; and the same frames without
            the head (B, T, D).

        Example
        -------
        >>> from speechbrain.lobes.features import Fbank
        >>> from speechbrain.processing.features import InputNormalization
        >>> from speechbrain_ext.asr import TransformerASR
        >>> from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling
        >>> net = TransformerASR(30, 640, 32, 4, 2, 0, 64, encoder_module="hyperconformer")
        >>> normalize = InputNormalization(norm_type="sentence")
        >>> encoder = SpeechEncoder(Fbank(n_mels=80), normalize, ConvolutionSubsampling(), net).eval()
        >>> context = encoder.make_streaming_context(DynChunkTrainConfig(4, None))
        >>> [encoder.encode_streaming(torch.rand(1, 4000), context, last)[0].shape[1] for last in (False, False, True)]
        [4, 8, 7]
        """
        frames = [self._stream(chunk, context) for chunk in context.features.accept(wavs)]
        if last:
            frames += [self._stream(chunk, context) for chunk in context.features.finish()]
        x = torch.cat(frames, 1) if frames else self._as_weights(wavs.new_zeros(len(wavs), 0, self.transformer.encoder.d_model))
        return x if self.head is None else self.head(x), x

    def _stream(self, feats, context):
        x, context.tail = self.subsampling.stream(self._as_weights(feats), context.tail)
        return self.transformer.encode_streaming(x, context.encoder)

    def _as_weights(self, feats):
        """Features, which have full precision, in the type of the weights."""
        weight = next(itertools.chain(self.subsampling.parameters(), self.transformer.parameters()))
        return feats if autocasts(feats) or not weight.is_floating_point() else feats.to(weight.dtype)

    def _feature_chunk(self, config):
        check_chunks(config, getattr(self.transformer.encoder, "chunk_multiple", 1))
        return self.subsampling.factor * config.chunk_size


@dataclass
class SpeechStreamingContext:
    """All state of one stream of waveforms (or of one batch of simultaneous streams)."""

    features: FeatureStream
    encoder: Any
    """From ``TransformerASR.make_streaming_context``."""
    tail: torch.Tensor | None = None
    """The left context of the subsampling."""
