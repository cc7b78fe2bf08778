"""TransformerASR with an encoder from the registry."""

import threading

import torch
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR as SpeechBrainTransformerASR
from speechbrain.lobes.models.transformer.TransformerASR import get_key_padding_mask, get_lookahead_mask
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from speechbrain.utils.logger import get_logger
from torch import nn

from speechbrain_ext.lobes.attention import ATTENTIONS, any_length
from speechbrain_ext.lobes.decoder_cache import DecoderCache
from speechbrain_ext.lobes.masks import absolute_lengths, check_lengths, padding_mask, zero_padding
from speechbrain_ext.lobes.stack import begin_as_identity
from speechbrain_ext.registry import build_encoder, encoder_keys, encoder_passes, loadable
from speechbrain_ext.speech_encoder import SpeechEncoder
from speechbrain_ext.utils.errors import UserError, is_whole

__all__ = ["SpeechEncoder", "TransformerASR"]

logger = get_logger(__name__)

_SPEECHBRAIN_ATTENTIONS = (*ATTENTIONS, "hypermixing")


@loadable
class TransformerASR(SpeechBrainTransformerASR):
    """SpeechBrain's TransformerASR with any registered encoder; its decoder, searchers and wrappers work unchanged.

    A drop-in for ``speechbrain.lobes.models.transformer.TransformerASR.TransformerASR`` in a recipe's YAML, except:
    ``encoder_module`` is a registered name; the output does not depend on the padding of the batch; the encoder has no length
    limit; ``forward`` takes a chunk setting; ``causal=None`` means not causal; ``decode_step`` decodes token by token, for
    :mod:`speechbrain_ext.decoders.searchers`.

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
        Accepted and ignored: encoders make their own positions, the decoder uses sinusoids.
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
        Whether every frame sees the past only: each frame (or each ``chunk_multiple`` frames) is a chunk, with unlimited left
        context. A chunk setting replaces it: frames then see their whole chunk, so stream with this smallest chunk.
    branchformer_activation, csgu_linear_units, gate_activation, use_linear_after_conv
        Accepted for compatibility; only SpeechBrain's Branchformer uses them.
    output_hidden_states, layerdrop_prob
        Not supported by the encoders here: other values than the defaults are refused.
    encoder_kwargs : dict, optional
        Further keys of the encoder; they override the arguments above.
    identity_init : bool
        Whether the encoder's residual branches begin at zero: see :func:`speechbrain_ext.lobes.stack.begin_as_identity`.

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
        identity_init: bool = False,
    ):
        if not is_whole(num_decoder_layers, 0):
            raise UserError(f"num_decoder_layers is {num_decoder_layers!r}; give a whole number of at least 0, 0 for none.")
        if output_hidden_states or layerdrop_prob:
            raise UserError("The encoders here support neither output_hidden_states nor layerdrop_prob; leave both out.")
        if encoder_module == "conformer" and attention_type == "hypermixing":
            encoder_module = "hyperconformer"
        keys = encoder_keys(encoder_module)
        if attention_type is not None and "attention_type" not in keys:
            if attention_type not in _SPEECHBRAIN_ATTENTIONS:
                raise UserError(
                    f"Unknown attention_type '{attention_type}'; the known ones are: {', '.join(_SPEECHBRAIN_ATTENTIONS)}."
                )
            if (encoder_module, attention_type) != ("hyperconformer", "hypermixing"):
                told = "attention_type %s has no effect on %s, which has no such key; leave it out, or give encoder_kwargs."
                logger.warning(told, attention_type, encoder_module)
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
        if identity_init:
            begin_as_identity(encoder)
        if encoder.d_model != d_model:
            raise UserError(f"The encoder has d_model {encoder.d_model}, and TransformerASR {d_model}; make them equal.")
        if num_decoder_layers and (d_model % 2 or d_model % nhead):
            raise UserError(f"A decoder needs an even d_model that nhead divides, but d_model is {d_model}, and nhead {nhead}.")
        # SpeechBrain's constructor builds the input layer and the decoder. "RoPEMHA" is its value for encoders that need no
        # positions. It must build an encoder or a decoder: without a decoder it builds a small encoder, which ours replaces.
        super().__init__(
            tgt_vocab,
            input_size,
            d_model=d_model,
            nhead=nhead if num_decoder_layers else 1,
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
            # The table is deterministic; saving it would tie checkpoints to max_length.
            table = self.positional_encoding_decoder
            table.register_buffer("pe", table.pe, persistent=False)
            for attention in self._decoder_attentions():
                attention.register_forward_pre_hook(_weights_if_wanted, with_kwargs=True)

    def forward(
        self,
        src,
        tgt,
        wav_len=None,
        pad_idx=0,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        pass_name: str | None = None,
    ):
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
        pass_name : str, optional
            One of the encoder's ``passes``; the last one by default.

        Returns
        -------
        tuple
            Encoder output (B, T, D), and decoder output (B, U, D) or None if there is no target or no decoder.
        """
        encoder_out = self.encode(src, wav_len, pad_idx, dynchunktrain_config, pass_name)
        return encoder_out, self.decode_targets(tgt, encoder_out, wav_len, pad_idx)

    def decode_targets(self, tgt, encoder_out, wav_len=None, pad_idx=0):
        """Decode with teacher forcing.

        Arguments
        ---------
        tgt : torch.Tensor, optional
            (B, U) tokens.
        encoder_out : torch.Tensor
            (B, T, D).
        wav_len : torch.Tensor, optional
            (B,) relative lengths of ``encoder_out``.
        pad_idx : int
            Token that pads ``tgt``.

        Returns
        -------
        torch.Tensor or None
            (B, U, D); None if there is no target or no decoder.

        Raises
        ------
        ValueError
            If a target has more than ``max_length`` tokens.
        """
        if tgt is None or not hasattr(self, "decoder"):
            return None
        lengths = None if wav_len is None else absolute_lengths(wav_len, encoder_out.shape[1])
        return self._decode(tgt, encoder_out, lengths, get_key_padding_mask(tgt, pad_idx=pad_idx))[0]

    def encode(
        self,
        src,
        wav_len=None,
        pad_idx=0,
        dynchunktrain_config: DynChunkTrainConfig | None = None,
        pass_name: str | None = None,
    ):
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
        pass_name : str, optional
            One of the encoder's ``passes``; the last one by default.

        Returns
        -------
        torch.Tensor
            (B, T, D).

        Raises
        ------
        UserError
            If the encoder has no such pass, or the lengths or the chunk setting are impossible.
        """
        if dynchunktrain_config is None and self.causal:
            dynchunktrain_config = DynChunkTrainConfig(self.encoder.chunk_multiple)
        src = self._flat(src)
        frames = src.shape[1]
        mask = None
        if wav_len is not None:
            check_lengths(wav_len, src.shape[0])
            mask = padding_mask(absolute_lengths(wav_len, frames), frames)
        encoder_out, _ = self.encoder(
            self.custom_src_module(zero_padding(src, mask)),
            src_key_padding_mask=mask,
            dynchunktrain_config=dynchunktrain_config,
            **encoder_passes(self.encoder, pass_name),
        )
        return encoder_out

    @torch.no_grad()
    def decode(self, tgt, encoder_out, enc_len=None):
        """One step of a search, as in SpeechBrain, but in any precision, and with more encoder frames than any utterance has.

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

        Raises
        ------
        ValueError
            If there is no decoder, or a prefix has more than ``max_length`` tokens.
        """
        self._need_decoder()
        _WANTED.weights = True
        try:
            return self._decode(tgt, encoder_out, enc_len)
        finally:
            _WANTED.weights = False

    @torch.no_grad()
    def make_decoder_cache(self, encoder_out, enc_len=None, beam_size=1):
        """Make the cache for :meth:`decode_step`, which decodes each token once; :meth:`decode` takes whole prefixes.

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

        Raises
        ------
        ValueError
            If there is no decoder.
        """
        self._need_decoder()
        return DecoderCache(self.decoder, encoder_out, self._memory_mask(encoder_out, enc_len), beam_size)

    @torch.no_grad()
    def decode_step(self, tokens, cache):
        """Decode one token: the last position of the output of :meth:`decode` for prefixes that end with ``tokens``.

        Arguments
        ---------
        tokens : torch.Tensor
            (B * K,) the next token of each hypothesis.
        cache : DecoderCache
            From :meth:`make_decoder_cache`; updated in place. ``cache.reorder(index)`` continues with other hypotheses.

        Returns
        -------
        tuple
            Decoder output (B * K, D), and the last layer's attention on the encoder frames (B * K, T).

        Raises
        ------
        ValueError
            If there is no decoder, or the hypotheses already have ``max_length`` tokens.

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
        self._need_decoder()
        self._need_positions(cache.length + 1)
        embedded = self.custom_tgt_module(tokens)
        return cache.step(embedded + self.positional_encoding_decoder.pe[0, cache.length].to(embedded.dtype))

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

    def _need_decoder(self):
        if not hasattr(self, "decoder"):
            raise UserError("There is no decoder to search with: num_decoder_layers is 0; give at least 1, or search by CTC.")

    def _need_positions(self, tokens):
        longest = self.positional_encoding_decoder.pe.shape[1]
        if tokens > longest:
            raise UserError(f"A text has more than {longest} tokens; build TransformerASR with a larger max_length.")

    def _decoder_attentions(self):
        return [attention.att for layer in self.decoder.layers for attention in (layer.self_attn, layer.multihead_attn)]

    def _decode(self, tgt, encoder_out, lengths, tgt_padding=None):
        """Decoder output, and the last layer's attention on the encoder frames or None."""
        self._need_positions(tgt.shape[1])
        embedded = self.custom_tgt_module(tgt)
        with any_length(embedded):
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
        mask[:, 0] = False  # an utterance without frames attends to one zero frame: attention to no frame gives NaN
        return mask


_WANTED = threading.local()
"""Whether this thread is in ``decode``."""


def _weights_if_wanted(attention, args, kwargs):
    """Hook of the decoder's attention: only ``decode`` needs the weights; without them the attention is one fused kernel."""
    return args, kwargs | {"need_weights": getattr(_WANTED, "weights", False)}
