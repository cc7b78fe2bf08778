"""Conversion of other toolkits' weights to the names and layout of the encoders here."""

import re

import torch

from speechbrain_ext.lobes.temporal_unet import block_names
from speechbrain_ext.utils.errors import UserError, is_whole

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
    """Convert SpeechBrain's Conformer or HyperConformer weights for the encoders here.

    Load the result into ``hyperconformer`` for ``attention_type: hypermixing``, and otherwise into ``conformer`` with the same
    ``attention_type`` and ``speechbrain_scores=True``. The model must have ``causal: False``, as the published ones do. The
    weights do not show this: a causal model would convert, but give other output.

    Arguments
    ---------
    state_dict : dict
        State of a ``ConformerEncoder``, a ``TransformerASR``, or a list of modules with one inside, as SpeechBrain's recipes save
        it. Weights outside the encoder do not change; position tables are left out.
    nhead : int
        The encoder's number of heads.

    Returns
    -------
    dict
        The same weights, for ``load_state_dict`` of the counterpart here.

    Raises
    ------
    ValueError
        If there is no SpeechBrain Conformer inside, one with another number of heads, or one with weights that have no
        counterpart here.

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
        raise UserError("These weights hold no SpeechBrain Conformer encoder: no key ends in " + mark + ".")
    _check_heads(state_dict, prefix, nhead)
    rotary = not any(key.endswith("mha_layer.pos_bias_u") for key in state_dict)
    converted = {}
    for key, tensor in state_dict.items():
        if re.search(r"(^|\.)positional_encoding(_decoder)?\.", key):
            continue
        block = re.fullmatch(re.escape(prefix) + r"(layers\.\d+\.)(.+)", key)
        if block:
            old = next((old for old in _SPEECHBRAIN_BLOCK if block[2].startswith(old)), None)
            if old is None:
                raise UserError(
                    f"The encoder weight '{key}' has no counterpart here; only RelPosMHAXL, RoPEMHA and hypermixing convert."
                )
            key = prefix + block[1] + _SPEECHBRAIN_BLOCK[old] + block[2][len(old) :]
            if old.endswith("bottleneck.0."):
                tensor = tensor.squeeze(-1)  # a pointwise convolution's weight is a matrix
            elif old.endswith("in_proj_weight"):
                # Rows lie head by head there (query, key, value of head 0, then of head 1), projection by projection here.
                width = tensor.shape[1]
                if width % nhead:
                    raise UserError(
                        f"nhead is {nhead}, which does not divide the width {width} of these weights; give their number."
                    )
                tensor = tensor.reshape(nhead, 3, width // nhead, width).transpose(0, 1)
                if rotary:  # rotated pairs of channels are neighbours there, half a head apart here
                    pairs = tensor[:2].unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3)
                    tensor = torch.cat((pairs, tensor[2:]))
                tensor = tensor.reshape(3 * width, width)
            elif old.startswith("mha_layer.pos_bias"):
                tensor = tensor.reshape(nhead, 1, -1)  # stored (head size, heads), but read as (heads, head size)
        elif key.startswith(prefix + "norm.norm."):
            key = prefix + key[len(prefix) + len("norm.") :]
        converted[key] = tensor
    return converted


def _check_heads(state_dict, prefix, nhead):
    """Refuse another number of heads than the weights show, which would load and give wrong answers; rotary ones show none."""
    if not is_whole(nhead, 1):
        raise UserError(f"nhead is {nhead!r}; give the number of heads of these weights.")
    for name, axis in (("pos_bias_u", 1), ("hyper.w1_gen.fc1_weights", 0)):
        tensor = state_dict.get(f"{prefix}layers.0.mha_layer.{name}")
        if tensor is not None and tensor.shape[axis] != nhead:
            raise UserError(f"nhead is {nhead}, but these weights have {tensor.shape[axis]} heads; give {tensor.shape[axis]}.")


# NeMo's name inside a Squeezeformer block -> ours; the rest of the key stays.
_NEMO_BLOCK = {
    "self_attn_scale.scale": "mixer.qkv.scale",
    "self_attn_scale.bias": "mixer.qkv.shift",
    "self_attn.linear_out.": "mixer.out.",
    "self_attn.linear_pos.": "mixer.position.",
    "self_attn.pos_bias_u": "mixer.bias_u",
    "self_attn.pos_bias_v": "mixer.bias_v",
    "norm_self_att.": "mixer_norm.",
    "feed_forward1.linear1.": "ffn1.0.",
    "feed_forward1.linear2.": "ffn1.3.",
    "feed_forward1_scale.scale": "ffn1.0.scale",
    "feed_forward1_scale.bias": "ffn1.0.shift",
    "norm_feed_forward1.": "ffn1_norm.",
    "conv.pointwise_conv1.": "convolution.pointwise1.",
    "conv.depthwise_conv.": "convolution.depthwise.",
    "conv.batch_norm.": "convolution.depthwise_norm.",
    "conv.pointwise_conv2.": "convolution.pointwise2.",
    "conv_scale.scale": "convolution.pointwise1.scale",
    "conv_scale.bias": "convolution.pointwise1.shift",
    "norm_conv.": "convolution_norm.",
    "feed_forward2.linear1.": "ffn2.0.",
    "feed_forward2.linear2.": "ffn2.3.",
    "feed_forward2_scale.scale": "ffn2.0.scale",
    "feed_forward2_scale.bias": "ffn2.0.shift",
    "norm_feed_forward2.": "ffn2_norm.",
}
_NEMO_OUTSIDE = {
    "pre_encode.conv.0.": "subsampling.stages.0.0.",
    "pre_encode.conv.2.": "subsampling.stages.1.0.",
    "pre_encode.conv.3.": "subsampling.stages.1.1.",
    "pre_encode.out.": "transformer.custom_src_module.layers.0.w.",
    "pre_ln.": "transformer.encoder.norm.",
}
_NEMO_UNET = {
    "time_reduce_layer.dw_conv.": "reduction.",
    "time_reduce_layer.pw_conv.": "reduction_linear.",
    "time_recovery_layer.": "recovery.",
}


def convert_nemo(state_dict: dict[str, torch.Tensor], reduce_before: int | None = None, recover_before: int | None = None):
    """Convert NeMo's Squeezeformer weights for the encoder here.

    Load the result into a :class:`speechbrain_ext.asr.SpeechEncoder` of
    ``DepthwiseSubsampling(80, d_model)`` and ``TransformerASR(..., num_decoder_layers=0, encoder_module="squeezeformer")`` of
    the same sizes, with a ``speechbrain.nnet.linear.Linear`` as head if the weights have one. NeMo's CTC blank is the last
    output. The features must be NeMo's: this converts weights only.

    Arguments
    ---------
    state_dict : dict
        State of NeMo's ``SqueezeformerEncoder``, or of a whole model (``model_weights.ckpt`` in a ``.nemo`` archive).
    reduce_before, recover_before : int, optional
        NeMo's ``time_reduce_idx`` and ``time_recovery_idx``; by default as published, L/2 - 1 and L - 1 of L blocks.

    Returns
    -------
    dict
        For ``load_state_dict`` of the SpeechEncoder; with a head if the weights have one.

    Raises
    ------
    ValueError
        If the weights are not those of a Squeezeformer, or some have no counterpart here.

    Example
    -------
    >>> convert_nemo({"encoder.layers.0.self_attn.linear_q.weight": torch.ones(4, 4)})
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: These weights hold no Squeezeformer of NeMo: there is no key pre_ln.weight.
    """
    prefix = next((key[: -len("pre_ln.weight")] for key in state_dict if key.endswith("pre_ln.weight")), None)
    if prefix is None:
        raise UserError("These weights hold no Squeezeformer of NeMo: there is no key pre_ln.weight.")
    weights = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    blocks = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("layers.")), default=-1)
    unet = "time_recovery_layer.weight" in weights
    reduce_before = (blocks // 2 - 1 if reduce_before is None else reduce_before) if unet else None
    recover_before = (blocks - 1 if recover_before is None else recover_before) if unet else None
    names = block_names(blocks, [reduce_before] if unet else [], [recover_before] if unet else [])
    converted = {}
    for key, tensor in weights.items():
        if key.endswith("num_batches_tracked") or re.search(r"self_attn\.linear_[kv]\.", key):
            continue  # converted with the query's
        block = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
        if block and block[2].startswith("self_attn.linear_q."):
            keys = [key.replace("linear_q", f"linear_{letter}") for letter in "qkv"]
            missing = [key for key in keys if key not in weights]
            if missing:
                raise UserError(f"These weights are incomplete: there is no key '{prefix}{missing[0]}'.")
            tensor = torch.cat([weights[key] for key in keys])
            name = f"transformer.encoder.layers.{names[int(block[1])]}.mixer.qkv.{block[2].rsplit('.', 1)[1]}"
        elif block:
            name = f"transformer.encoder.layers.{names[int(block[1])]}.{_renamed(block[2], _NEMO_BLOCK, key)}"
        elif key.startswith("time_"):
            name = f"transformer.encoder.layers.{reduce_before}.{_renamed(key, _NEMO_UNET, key)}"
        else:
            name = _renamed(key, _NEMO_OUTSIDE, key)
        if "pointwise" in name or "reduction_linear." in name or "stages.1.1." in name:
            tensor = tensor.flatten(1) if tensor.dim() > 1 else tensor  # a pointwise convolution's weight is a matrix
        elif "bias_u" in name or "bias_v" in name:
            tensor = tensor.unsqueeze(1)
        elif key == "pre_encode.out.weight":  # channel by channel there, bin by bin here
            tensor = tensor.unflatten(1, (len(tensor), -1)).transpose(1, 2).flatten(1)
        converted[name] = tensor
    for key, tensor in state_dict.items():
        head = re.search(r"(?:^|\.)decoder\.decoder_layers\.0\.(weight|bias)$", key)
        if head:
            converted[f"head.w.{head[1]}"] = tensor.flatten(1) if tensor.dim() > 1 else tensor
    return converted


def _renamed(name, table, key):
    old = next((old for old in table if name.startswith(old)), None)
    if old is None:
        raise UserError(f"The weight '{key}' has no counterpart in a Squeezeformer here.")
    return table[old] + name[len(old) :]
