"""Weights of other toolkits' encoders, renamed and laid out for the encoders here."""

import re

import torch

# SpeechBrain's name inside an encoder block -> ours; the rest of the key stays.
_SPEECHBRAIN_BLOCK = {
    "ffn_module1.0.": "ffn1.0.",
    "ffn_module1.1.ffn.0.": "ffn1.1.",
    "ffn_module1.1.ffn.3.": "ffn1.4.",
    "ffn_module2.0.": "ffn2.0.",
    "ffn_module2.1.ffn.0.": "ffn2.1.",
    "ffn_module2.1.ffn.3.": "ffn2.4.",
    "norm1.norm.": "mixer_norm.",
    "norm2.norm.": "norm.",
    "convolution_module.layer_norm.": "convolution.norm.",
    "convolution_module.bottleneck.0.": "convolution.pointwise1.",
    "convolution_module.conv.": "convolution.depthwise.",
    "convolution_module.after_conv.0.": "convolution.depthwise_norm.",
    "convolution_module.after_conv.2.": "convolution.pointwise2.",
    "mha_layer.hyper.": "mixer.hyper.",
    "mha_layer.layer_norm.": "mixer.layer_norm.",
    "mha_layer.in_proj_weight": "mixer.qkv.weight",
    "mha_layer.out_proj.": "mixer.out.",
    "mha_layer.linear_pos.": "mixer.position.",
    "mha_layer.pos_bias_u": "mixer.bias_u",
    "mha_layer.pos_bias_v": "mixer.bias_v",
}


def convert_speechbrain(state_dict: dict[str, torch.Tensor], nhead: int) -> dict[str, torch.Tensor]:
    """SpeechBrain's Conformer or HyperConformer weights for the encoders here.

    The encoder that takes them is ``hyperconformer`` for ``attention_type: hypermixing``, and otherwise ``conformer`` with the
    same ``attention_type`` and ``speechbrain_scores=True``. For models with ``causal: False``, as published: the weights do
    not tell, and a causal one would convert and answer otherwise.

    Arguments
    ---------
    state_dict : dict
        Of a ``ConformerEncoder``, a ``TransformerASR``, or a list of modules with one inside, as SpeechBrain's recipes save it;
        everything outside the encoder is passed through, position tables excepted.
    nhead : int
        The encoder's number of heads.

    Returns
    -------
    dict
        The same weights, for ``load_state_dict`` of the counterpart here.

    Raises
    ------
    ValueError
        If there is no SpeechBrain Conformer inside, or one with weights that have no counterpart here.

    Example
    -------
    >>> from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
    >>> from speechbrain_ext.registry import build_encoder
    >>> published = ConformerEncoder(2, 32, 64, 4, attention_type="hypermixing")
    >>> encoder = build_encoder("hyperconformer", d_model=32, nhead=4, num_layers=2, d_ffn=64)
    >>> encoder.load_state_dict(convert_speechbrain(published.state_dict(), nhead=4))
    <All keys matched successfully>
    """
    mark = "layers.0.convolution_module.layer_norm.weight"
    prefix = next((key[: -len(mark)] for key in state_dict if key.endswith(mark)), None)
    if prefix is None:
        raise ValueError("These weights hold no SpeechBrain Conformer encoder: no key ends in " + mark + ".")
    converted = {}
    for key, tensor in state_dict.items():
        if re.search(r"(^|\.)positional_encoding(_decoder)?\.", key):
            continue
        block = re.fullmatch(re.escape(prefix) + r"(layers\.\d+\.)(.+)", key)
        if block:
            old = next((old for old in _SPEECHBRAIN_BLOCK if block[2].startswith(old)), None)
            if old is None:
                raise ValueError(
                    f"The encoder weight '{key}' has no counterpart here; only RelPosMHAXL, RoPEMHA and hypermixing convert."
                )
            key = prefix + block[1] + _SPEECHBRAIN_BLOCK[old] + block[2][len(old) :]
            if old.endswith("bottleneck.0."):
                tensor = tensor.squeeze(-1)  # a pointwise convolution's weight is a matrix
            elif old.endswith("in_proj_weight"):
                # Rows lie head by head there (query, key, value of head 0, then of head 1), projection by projection here.
                width = tensor.shape[1]
                tensor = tensor.reshape(nhead, 3, width // nhead, width).transpose(0, 1).reshape(3 * width, width)
            elif old.startswith("mha_layer.pos_bias"):
                tensor = tensor.reshape(nhead, 1, -1)  # stored (head size, heads), but read as (heads, head size)
        elif key.startswith(prefix + "norm.norm."):
            key = prefix + key[len(prefix) + len("norm.") :]
        converted[key] = tensor
    return converted
