"""Encoders, one architecture per file.

The contract, which SpeechBrain's TransformerASR, EncoderWrapper, searchers and inference classes rely on:

``forward(src, src_mask=None, src_key_padding_mask=None, pos_embs=None, dynchunktrain_config=None)``
    (B, T, D) to ``(out (B, T, D), [])``; the mask is (B, T) bool, True = padding. An encoder makes its own positions and chunk
    masks: ``pos_embs`` and ``src_mask`` are accepted and not needed.
``make_streaming_context(dynchunktrain_config)``, ``forward_streaming(src, context, pos_embs=None)``
    One chunk in, ``(its frames, [])`` out; the context holds all state and reports its size.
``passes``
    The names of its answers, the best one last; one for all but a cascade. An encoder with several takes ``pass_name`` in
    ``forward`` and ``make_streaming_context``, and has ``second_pass(frames)``, from the first pass's frames (B, T, D) of an
    utterance to the last one's.
``fuse_()``
    Fold what inference allows into the weights, in place; encoders with nothing to fold return themselves.
``d_model``, ``chunk_multiple``, ``streamable``
    The width; what a chunk length must divide by; whether ``forward_streaming`` works.
``sizes``
    Only on classes with a constructor key ``size``: a dictionary whose keys are the values that it takes.

:class:`Encoder` has all of that around a :class:`~speechbrain_ext.lobes.stack.Stack` of blocks; start from it.

Every registered encoder is held to: padding never reaches a valid frame; chunk by chunk gives what ``forward`` gives under the
same setting; nothing looks past its chunk; any length; finite gradients for every parameter; exportable and compilable.
"""

from speechbrain_ext.encoders._base import Encoder, LayerState
from speechbrain_ext.encoders._streaming import StreamingContext

__all__ = ["Encoder", "LayerState", "StreamingContext"]
