"""Encoders, one architecture per file.

The contract, which :class:`speechbrain_ext.asr.TransformerASR` and SpeechBrain's EncoderWrapper, searchers and inference classes
rely on:

``forward(src, src_mask=None, src_key_padding_mask=None, pos_embs=None, dynchunktrain_config=None)``
    (B, T, D) to ``(out (B, T, D), [])``; the mask is (B, T) bool, True = padding. An encoder makes its own positions and chunk
    masks: ``pos_embs`` is ignored, and so is ``src_mask`` beside a chunk setting; without one it is refused.
``make_streaming_context(dynchunktrain_config)``, ``forward_streaming(src, context, pos_embs=None)``
    One chunk in, ``(its frames, [])`` out; the context holds all state and reports its size.
``passes``
    The names of its passes, the best one last. Only a cascade has more than one. It takes ``pass_name`` in ``forward`` and
    ``make_streaming_context``, and has ``second_pass(frames)``: from the first pass's frames (B, T, D) of an utterance to the
    second pass's.
``fuse_()``
    Fuse the encoder, in place, and return it.
``d_model``, ``chunk_multiple``, ``streamable``
    The width; the number that a chunk length must be a multiple of; whether ``forward_streaming`` works.
``sizes``
    Only on classes with a constructor key ``size``: a dictionary with the accepted sizes as keys.

:class:`Encoder` implements this around a :class:`~speechbrain_ext.lobes.stack.Stack` of blocks; start from it.

Tests check every registered encoder: padding never reaches a valid frame; streaming gives the same frames as ``forward`` with the
same chunk setting; no frame sees past its chunk; any length works; every parameter gets a finite gradient; the encoder can be
exported and compiled.
"""

from speechbrain_ext.encoders._base import Encoder, LayerState
from speechbrain_ext.encoders._streaming import StreamingContext

__all__ = ["Encoder", "LayerState", "StreamingContext"]
