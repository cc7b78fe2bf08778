"""TransformerASR with its encoder taken from the registry, and the way from waveforms to encoder frames."""

from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR as SpeechBrainTransformerASR
from speechbrain.lobes.models.transformer.TransformerASR import get_key_padding_mask, get_lookahead_mask
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.lobes.attention import ATTENTIONS
from speechbrain_ext.lobes.decoder_cache import DecoderCache
from speechbrain_ext.lobes.features import FeatureStream, extract_features, normalize_features
from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask, zero_padding
from speechbrain_ext.registry import build_encoder, encoder_keys

_SPEECHBRAIN_ATTENTIONS = (*ATTENTIONS, "hypermixing")


class TransformerASR(SpeechBrainTransformerASR):
    """SpeechBrain's TransformerASR with any registered encoder; its decoder, searchers and wrappers work unchanged.

    A drop-in for ``speechbrain.lobes.models.transformer.TransformerASR.TransformerASR`` in a recipe's YAML. What differs:
    ``encoder_module`` is a registered name; the answer does not depend on the padding of the batch; the encoder has no length
    limit; ``forward`` takes a chunk setting; ``causal=None`` means not causal; ``decode_step`` decodes token by token, for
    :mod:`speechbrain_ext.inference.searchers`.

    Arguments
    ---------
    tgt_vocab : int
        Number of output tokens.
    input_size : int
        Feature size of ``src``.
    d_model, nhead, d_ffn, dropout
        Sizes of encoder and decoder.
    num_encoder_layers : int
        Number of encoder blocks.
    num_decoder_layers : int
        Number of decoder blocks; 0 = encoder only (CTC).
    activation : type
        Class of the decoder's activation.
    positional_encoding : str or None
        Accepted and not needed: encoders make their own positions, the decoder uses sinusoids.
    normalize_before : bool
        Whether the decoder normalises before its modules.
    kernel_size, bias, conformer_activation : optional
        Passed on to encoders with the keys ``kernel_size``, ``bias`` and ``activation``; None leaves the encoder's default.
    encoder_module : str
        A registered name.
    attention_type : str, optional
        As in SpeechBrain, for encoders with this key; ``encoder_module="conformer"`` with ``"hypermixing"``, as SpeechBrain's
        recipes spell it, is the ``hyperconformer``. None leaves the encoder's default.
    max_length : int
        Longest target sequence, in tokens.
    causal : bool, optional
        Whether every frame sees the past only: each frame (each ``chunk_multiple`` of them) is a chunk of its own, with
        unlimited left context.
    branchformer_activation, csgu_linear_units, gate_activation, use_linear_after_conv
        Accepted for compatibility; only SpeechBrain's Branchformer uses them.
    output_hidden_states, layerdrop_prob
        Not offered by the encoders here: anything but the default is refused.
    encoder_kwargs : dict, optional
        Further keys of the encoder; they win over the arguments above.

    Raises
    ------
    ValueError
        If the encoder or the attention is unknown (the message lists those that exist), or a size is impossible.
    TypeError
        If the encoder has no such key.

    Example
    -------
    >>> net = TransformerASR(tgt_vocab=30, input_size=640, d_model=32, nhead=4, num_encoder_layers=2, num_decoder_layers=1,
    ...     d_ffn=64, encoder_module="hyperconformer")
    >>> enc_out, dec_out = net(torch.rand(2, 50, 640), torch.randint(1, 30, (2, 7)), torch.tensor([1.0, 0.6]))
    >>> enc_out.shape, dec_out.shape
    (torch.Size([2, 50, 32]), torch.Size([2, 7, 32]))
    """

    def __init__(
        self,
        tgt_vocab,
        input_size,
        d_model=512,
        nhead=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        d_ffn=2048,
        dropout=0.1,
        activation=nn.ReLU,
        positional_encoding="fixed_abs_sine",
        normalize_before=False,
        kernel_size: int | None = None,
        bias: bool | None = None,
        encoder_module: str = "conformer",
        conformer_activation: type | None = None,
        branchformer_activation: type | None = None,
        attention_type: str | None = None,
        max_length: int = 2500,
        causal: bool | None = None,
        csgu_linear_units: int | None = None,
        gate_activation: type | None = None,
        use_linear_after_conv: bool | None = None,
        output_hidden_states=False,
        layerdrop_prob=0.0,
        encoder_kwargs: dict | None = None,
    ):
        if output_hidden_states or layerdrop_prob:
            raise ValueError("The encoders here offer neither output_hidden_states nor layerdrop_prob; leave both unset.")
        if attention_type not in (None, *_SPEECHBRAIN_ATTENTIONS):
            raise ValueError(
                f"Unknown attention_type '{attention_type}'; the known ones are: {', '.join(_SPEECHBRAIN_ATTENTIONS)}."
            )
        if encoder_module == "conformer" and attention_type == "hypermixing":
            encoder_module = "hyperconformer"
        keys = encoder_keys(encoder_module)
        encoder = build_encoder(
            encoder_module,
            **{
                "d_model": d_model,
                "nhead": nhead,
                "num_layers": num_encoder_layers,
                "d_ffn": d_ffn,
                "dropout": dropout,
                **{
                    key: value
                    for key, value in {
                        "kernel_size": kernel_size,
                        "bias": bias,
                        "activation": conformer_activation,
                        "attention_type": attention_type,
                    }.items()
                    if value is not None and key in keys
                },
                **(encoder_kwargs or {}),
            },
        )
        if encoder.d_model != d_model:
            raise ValueError(f"The encoder has d_model {encoder.d_model}, and TransformerASR {d_model}; give it once.")
        # SpeechBrain's constructor builds front linear and decoder. "RoPEMHA" is its value for encoders that need no positions;
        # it refuses to build nothing, so that without a decoder it builds a small encoder, which ours replaces.
        super().__init__(
            tgt_vocab,
            input_size,
            d_model=d_model,
            nhead=nhead,
            num_encoder_layers=0 if num_decoder_layers else 1,
            num_decoder_layers=num_decoder_layers,
            d_ffn=d_ffn if num_decoder_layers else 1,
            dropout=dropout,
            activation=activation,
            positional_encoding=None,
            normalize_before=normalize_before,
            attention_type="RoPEMHA" if num_decoder_layers else "regularMHA",
            max_length=max_length,
            causal=bool(causal),
        )
        self.encoder = encoder
        if num_decoder_layers:
            # The sinusoid table is no knowledge: with it, max_length would decide which checkpoints load.
            table = self.positional_encoding_decoder
            table.register_buffer("pe", table.pe, persistent=False)

    def forward(self, src, tgt, wav_len=None, pad_idx=0, dynchunktrain_config: DynChunkTrainConfig | None = None):
        """Encode, and decode with teacher forcing.

        Arguments
        ---------
        src : torch.Tensor
            (B, T, F) features, or (B, T, F, C).
        tgt : torch.Tensor, optional
            (B, U) tokens; None = encode only.
        wav_len : torch.Tensor, optional
            (B,) relative lengths of ``src``.
        pad_idx : int
            Token that pads ``tgt``.
        dynchunktrain_config : DynChunkTrainConfig, optional
            The chunk setting of the encoder.

        Returns
        -------
        tuple
            Encoder output (B, T, D), and decoder output (B, U, D) or None where there is no target or no decoder.
        """
        encoder_out = self.encode(src, wav_len, pad_idx, dynchunktrain_config)
        if tgt is None or not hasattr(self, "decoder"):
            return encoder_out, None
        lengths = None if wav_len is None else absolute_lengths(wav_len, encoder_out.shape[1])
        decoder_out, _ = self._decode(tgt, encoder_out, lengths, get_key_padding_mask(tgt, pad_idx=pad_idx))
        return encoder_out, decoder_out

    def encode(self, src, wav_len=None, pad_idx=0, dynchunktrain_config: DynChunkTrainConfig | None = None):
        """Encode whole utterances.

        Arguments
        ---------
        src : torch.Tensor
            (B, T, F) features, or (B, T, F, C).
        wav_len : torch.Tensor, optional
            (B,) relative lengths of ``src``.
        pad_idx : int
            Not needed.
        dynchunktrain_config : DynChunkTrainConfig, optional
            The chunk setting.

        Returns
        -------
        torch.Tensor
            (B, T, D).
        """
        if dynchunktrain_config is None and self.causal:
            dynchunktrain_config = DynChunkTrainConfig(self.encoder.chunk_multiple)
        src = self._flat(src)
        frames = src.shape[1]
        mask = None if wav_len is None else padding_mask(absolute_lengths(wav_len, frames), frames)
        encoder_out, _ = self.encoder(
            self.custom_src_module(zero_padding(src, mask)),
            src_key_padding_mask=mask,
            dynchunktrain_config=dynchunktrain_config,
        )
        return encoder_out

    @torch.no_grad()
    def decode(self, tgt, encoder_out, enc_len=None):
        """One step of a search; as in SpeechBrain, but for any precision, and where no utterance fills the encoder output.

        Arguments
        ---------
        tgt : torch.Tensor
            (B, U) prefixes.
        encoder_out : torch.Tensor
            (B, T, D).
        enc_len : torch.Tensor, optional
            (B,) numbers of valid encoder frames.

        Returns
        -------
        tuple
            Decoder output (B, U, D), and the last layer's attention on the encoder frames.
        """
        return self._decode(tgt, encoder_out, enc_len)

    @torch.no_grad()
    def make_decoder_cache(self, encoder_out, enc_len=None, beam_size=1):
        """What :meth:`decode_step` needs: a search that decodes each token once, where :meth:`decode` takes whole prefixes.

        Arguments
        ---------
        encoder_out : torch.Tensor
            (B, T, D), once per utterance.
        enc_len : torch.Tensor, optional
            (B,) numbers of valid encoder frames.
        beam_size : int
            Number of hypotheses K per utterance.

        Returns
        -------
        DecoderCache
        """
        if not hasattr(self, "decoder"):
            raise ValueError("There is no decoder to search with: num_decoder_layers is 0; give at least 1, or search by CTC.")
        return DecoderCache(self.decoder, encoder_out, self._memory_mask(encoder_out, enc_len), beam_size)

    @torch.no_grad()
    def decode_step(self, tokens, cache):
        """The last position of what :meth:`decode` gives for prefixes that end with ``tokens``.

        Arguments
        ---------
        tokens : torch.Tensor
            (B * K,) the next token of each hypothesis.
        cache : DecoderCache
            From :meth:`make_decoder_cache`; updated in place. ``cache.reorder(index)`` goes on with other hypotheses.

        Returns
        -------
        tuple
            Decoder output (B * K, D), and the last layer's attention on the encoder frames (B * K, T).

        Raises
        ------
        ValueError
            If there have been ``max_length`` tokens.

        Example
        -------
        >>> net = TransformerASR(tgt_vocab=30, input_size=8, d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=2,
        ...     d_ffn=64, encoder_module="conformer").eval()
        >>> encoder_out, prefix = torch.rand(2, 20, 32), torch.randint(30, (2, 5))
        >>> cache = net.make_decoder_cache(encoder_out)
        >>> for tokens in prefix.unbind(1):
        ...     out, attention = net.decode_step(tokens, cache)
        >>> torch.allclose(out, net.decode(prefix, encoder_out)[0][:, -1], atol=1e-5)
        True
        """
        table = self.positional_encoding_decoder.pe[0]
        if cache.length == len(table):
            raise ValueError(f"A hypothesis has {cache.length} tokens; build TransformerASR with a larger max_length.")
        embedded = self.custom_tgt_module(tokens)
        return cache.step(embedded + table[cache.length].to(embedded.dtype))

    def encode_streaming(self, src, context):
        """Encode one chunk.

        Arguments
        ---------
        src : torch.Tensor
            (B, C, F) features, or (B, C, F, C').
        context : TransformerASRStreamingContext
            From ``make_streaming_context(dynchunktrain_config)``; updated in place.

        Returns
        -------
        torch.Tensor
            (B, C, D).

        Example
        -------
        >>> net = TransformerASR(tgt_vocab=30, input_size=8, d_model=32, nhead=4, num_encoder_layers=2, num_decoder_layers=0,
        ...     d_ffn=64, encoder_module="hyperconformer")
        >>> context = net.make_streaming_context(DynChunkTrainConfig(16, 4))
        >>> net.encode_streaming(torch.rand(1, 16, 8), context).shape
        torch.Size([1, 16, 32])
        """
        return self.encoder.forward_streaming(self.custom_src_module(self._flat(src)), context.encoder_context)[0]

    @staticmethod
    def _flat(src):
        return src.flatten(2) if src.dim() == 4 else src

    def _decode(self, tgt, encoder_out, lengths, tgt_padding=None):
        """Decoder output, and the last layer's attention on the encoder frames."""
        embedded = self.custom_tgt_module(tgt)
        out, _, attention = self.decoder(
            tgt=embedded + self.positional_encoding_decoder(embedded).to(embedded.dtype),
            memory=encoder_out,
            tgt_mask=get_lookahead_mask(tgt).bool(),  # -inf = blocked = True, the type of the padding masks
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=self._memory_mask(encoder_out, lengths),
        )
        return out, attention[-1]

    @staticmethod
    def _memory_mask(encoder_out, lengths):
        if lengths is None:
            return None
        mask = padding_mask(lengths, encoder_out.shape[1])
        mask[:, 0] = False  # an utterance of no frames attends to a zero, not to nothing, which would be NaN
        return mask


class SpeechEncoder(nn.Module):
    """From waveforms to encoder frames, with exact lengths all the way: the ``encoder`` of a pretrained model.

    Arguments
    ---------
    compute_features : torch.nn.Module
        Waveforms to features, see :func:`extract_features`.
    normalize : torch.nn.Module
        Feature normalisation, called with (features, relative lengths).
    subsampling : torch.nn.Module
        A front end of :mod:`speechbrain_ext.lobes.subsampling`.
    transformer : TransformerASR
        Encodes the subsampled features.
    head : torch.nn.Module, optional
        Applied to the encoder frames; with a CTC head ``speechbrain.inference.ASR.EncoderASR`` decodes the output.
    chunk_size : int, optional
        Chunk size in encoder frames that the model was trained to stream with; None = it was trained in full context only.
    left_context : int, optional
        Likewise, the left context in chunks; None = all.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from speechbrain.processing.features import InputNormalization
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

    def forward(self, wavs, wav_lens=None):
        """Waveforms (B, N) with relative lengths to encoder frames (B, T, D); what SpeechBrain's inference classes call."""
        return self.encode(wavs, wav_lens)[0]

    def encode(self, wavs, wav_lens=None, dynchunktrain_config: DynChunkTrainConfig | None = None):
        """Encode.

        Arguments
        ---------
        wavs : torch.Tensor
            (B, N) samples.
        wav_lens : torch.Tensor, optional
            (B,) relative lengths.
        dynchunktrain_config : DynChunkTrainConfig, optional
            The chunk setting, for features and encoder: no frame then depends on what follows its chunk.

        Returns
        -------
        tuple
            (B, T, D), and the exact relative lengths (B,) of these frames.

        Raises
        ------
        ValueError
            If the chunk setting is impossible, or the features cannot be had chunk by chunk.
        """
        if wav_lens is None:
            wav_lens = torch.ones(len(wavs), device=wavs.device)
        chunk = None if dynchunktrain_config is None else self._feature_chunk(dynchunktrain_config)
        feats, lens = extract_features(self.compute_features, wavs, wav_lens, chunk)
        feats = normalize_features(self.normalize, feats, lens, chunk)
        feats = zero_padding(feats, padding_mask(absolute_lengths(lens, feats.shape[1]), feats.shape[1]))
        return self.encode_features(feats, lens, dynchunktrain_config)

    def encode_features(self, feats, lens=None, dynchunktrain_config: DynChunkTrainConfig | None = None):
        """Encode what the features and their normalisation gave.

        Arguments
        ---------
        feats : torch.Tensor
            (B, T, F) normalised features.
        lens : torch.Tensor, optional
            (B,) relative lengths; without them all frames are valid.
        dynchunktrain_config : DynChunkTrainConfig, optional
            The chunk setting.

        Returns
        -------
        tuple
            (B, T', D), and the exact relative lengths (B,) of these frames or None.
        """
        x, lens = self.subsampling(feats, lens)
        x = self.transformer.encode(x, lens, dynchunktrain_config=dynchunktrain_config)
        return x if self.head is None else self.head(x), lens

    def make_streaming_context(self, dynchunktrain_config: DynChunkTrainConfig, encoder_kwargs: dict | None = None):
        """The context of a new stream of waveforms.

        Arguments
        ---------
        dynchunktrain_config : DynChunkTrainConfig
            Chunk size in encoder frames and left context in chunks (None = all).
        encoder_kwargs : dict, optional
            For the encoder's ``make_streaming_context``.

        Returns
        -------
        SpeechStreamingContext

        Raises
        ------
        ValueError
            If the chunk setting is impossible, or the features cannot be had chunk by chunk.
        """
        encoder = self.transformer.make_streaming_context(dynchunktrain_config, encoder_kwargs or {})
        features = FeatureStream(self.compute_features, self.normalize, self._feature_chunk(dynchunktrain_config))
        return SpeechStreamingContext(features, encoder)

    def encode_streaming(self, wavs, context, last: bool = False):
        """Encode the next samples: what :meth:`encode` gives under the same chunk setting, as soon as a chunk is complete.

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
            What ``forward`` gives for the frames of the chunks that are complete now, (B, T, ...) with T >= 0; and these
            frames without the head (B, T, D).

        Example
        -------
        >>> from speechbrain.lobes.features import Fbank
        >>> from speechbrain.processing.features import InputNormalization
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
        x = torch.cat(frames, 1) if frames else wavs.new_zeros(len(wavs), 0, self.transformer.encoder.d_model)
        return x if self.head is None else self.head(x), x

    def _stream(self, feats, context):
        x, context.tail = self.subsampling.stream(feats, context.tail)
        return self.transformer.encode_streaming(x, context.encoder)

    def _feature_chunk(self, config):
        return self.subsampling.factor * config.chunk_size


@dataclass
class SpeechStreamingContext:
    """All state of one stream of waveforms (or one batch of streams in step)."""

    features: FeatureStream
    encoder: Any
    """Of ``TransformerASR.make_streaming_context``."""
    tail: torch.Tensor | None = None
    """The front end's left context."""
