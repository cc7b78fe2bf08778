"""Squeezeformer compared with the authors' model (golden vectors), the published counts, and NeMo's weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from speechbrain_ext.asr import SpeechEncoder, TransformerASR
from speechbrain_ext.convert import convert_nemo
from speechbrain_ext.encoders.squeezeformer import SIZES
from speechbrain_ext.lobes import attention
from speechbrain_ext.lobes.subsampling import DepthwiseSubsampling
from speechbrain_ext.registry import build_encoder

# Trainable parameters, and 10^9 multiply-accumulates for 3,000 feature frames, of subsampling and encoder together. The counts
# of the authors' model and of NeMo's agree.
COUNTS = {
    "xs": (9_013_248, 8.913826),
    "s": (18_540_424, 16.522991),
    "sm": (28_151_808, 23.448007),
    "m": (55_580_256, 43.524911),
    "ml": (124_959_744, 90.786705),
    "l": (236_171_520, 165.244909),
}


def model(d_model, padding="symmetric", head=None, device=None, **keys):
    """Subsampling and encoder as one module, on features."""
    subsampling = DepthwiseSubsampling(80, d_model, padding)
    published = {"nhead": 4, "num_layers": 4, **keys}
    transformer = TransformerASR(
        tgt_vocab=128,
        input_size=subsampling.output_size,
        d_model=d_model,
        nhead=published.pop("nhead"),
        num_encoder_layers=published.pop("num_layers"),
        num_decoder_layers=0,
        d_ffn=4 * d_model,
        encoder_module="squeezeformer",
        encoder_kwargs={"padding": padding, **published},
    )
    return SpeechEncoder(None, None, subsampling, transformer, head).eval()


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).resolve().parents[1] / "data" / "squeezeformer_golden.npz")


def tensors(golden, prefix):
    return {name.removeprefix(prefix): torch.from_numpy(golden[name]) for name in golden.files if name.startswith(prefix)}


def tiny(golden, padding, eps):
    """The golden model: width 16, 4 blocks, the middle two at half rate."""
    net = model(16, padding, reduce_before=1, recover_before=3, kernel_size=5, eps=eps)
    net.load_state_dict(convert_nemo(tensors(golden, "common/w/"), 1, 3))
    return net


def stages(net, x, lengths):
    """All stages of one forward that the golden file has, by their names in it."""
    encoder, seen = net.transformer.encoder, {}
    first, unet, last = encoder.layers

    def keep(name, module, inputs=False):
        def hook(_, arguments, output):
            seen[name] = arguments[0] if inputs else output

        module.register_forward_hook(hook)

    keep("subsample_flat_f_major", net.transformer.custom_src_module, inputs=True)
    keep("input_linear", net.transformer.custom_src_module)
    keep("pre_ln", encoder.norm)
    keep("block0.after_mhsa_residual", first.mixer_norm, inputs=True)
    keep("block0.after_MF", first.ffn1_norm)
    keep("block0.after_conv_residual", first.convolution_norm, inputs=True)
    keep("block0", first)
    keep("time_reduced", unet.layers, inputs=True)
    keep("block1", unet.layers[0])
    keep("block2", unet.layers[1])
    keep("time_recovered", unet)
    keep("block3", last)
    out, relative = net.encode_features(x, lengths / x.shape[1])
    return {**seen, "final": out}, relative


@pytest.mark.parametrize("kind, eps", [("keras_eps1e-3", 1e-3), ("torch_eps1e-5", 1e-5)])
@torch.no_grad()
def test_every_stage_is_the_authors(golden, kind, eps):
    common, expected = tensors(golden, "common/"), tensors(golden, f"authors/{kind}/")
    actual, relative = stages(tiny(golden, "right", eps), common["x"], common["lens"])
    valid = {15: expected.pop("pad_mask"), 8: expected.pop("pad_mask_reduced")}
    assert torch.equal(torch.round(relative * 15), valid[15].sum(1).float())
    table, _ = attention.RelativeSelfAttention(16, 4)._table(15, 0, 0, torch.zeros(1, 1, 16))
    torch.testing.assert_close(table[:29], expected.pop("pos_emb")[0], atol=1e-5, rtol=0)
    assert set(expected) == set(actual)
    for name, golden_stage in expected.items():
        mask = valid[golden_stage.shape[1]]
        torch.testing.assert_close(
            actual[name][mask], golden_stage[mask], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@torch.no_grad()
def test_nemo_weights_give_nemo_s_answer(golden):
    common, nemo = tensors(golden, "common/"), tensors(golden, "nemo/")
    out, relative = tiny(golden, "symmetric", 1e-5).encode_features(common["x"], common["lens"] / 61)
    assert torch.equal(torch.round(relative * out.shape[1]).long(), nemo["ol"])
    for i, length in enumerate(nemo["ol"]):
        torch.testing.assert_close(out[i, :length], nemo["y"][i, :length], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "module."])
@torch.no_grad()
def test_a_whole_nemo_model_converts(golden, prefix):
    weight, bias = torch.randn(9, 16, 1), torch.randn(9)
    weights = {f"{prefix}encoder.{name}": tensor for name, tensor in tensors(golden, "common/w/").items()}
    weights |= {
        f"{prefix}decoder.decoder_layers.0.weight": weight,
        f"{prefix}decoder.decoder_layers.0.bias": bias,
        f"{prefix}preprocessor.featurizer.fb": torch.zeros(1),
    }
    head = torch.nn.Module()
    head.w = torch.nn.Linear(16, 9)
    head.forward = lambda x: head.w(x)
    net = model(16, reduce_before=1, recover_before=3, kernel_size=5, head=head)
    net.load_state_dict(convert_nemo(weights))  # 4 blocks: 1 and 3 are the published places
    x = torch.randn(1, 40, 80)
    frames, _ = tiny(golden, "symmetric", 1e-5).encode_features(x)
    expected = frames @ weight.squeeze(-1).T + bias
    torch.testing.assert_close(net.encode_features(x)[0], expected, atol=1e-5, rtol=0)


def test_weights_without_a_counterpart_are_named(golden):
    weights = tensors(golden, "common/w/")
    with pytest.raises(ValueError, match="'layers.0.conv.wrong.weight' has no counterpart"):
        convert_nemo({**weights, "layers.0.conv.wrong.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="'elsewhere' has no counterpart"):
        convert_nemo({**weights, "elsewhere": torch.ones(1)})
    del weights["layers.2.self_attn.linear_v.bias"]
    with pytest.raises(ValueError, match="no key 'layers.2.self_attn.linear_v.bias'"):
        convert_nemo(weights)


@pytest.mark.parametrize("size", COUNTS)
def test_counts_are_the_published_ones(size, monkeypatch):
    published = SIZES[size]
    with torch.device("meta"):
        net = model(published.d_model, nhead=published.nhead, num_layers=published.num_layers, size=size)
    parameters, gmac = COUNTS[size]
    assert sum(p.numel() for p in net.parameters()) == parameters
    monkeypatch.setattr(attention, "QUERY_BLOCK", 750)  # all scores per distance, as the authors compute them
    x = torch.empty(1, 3000, 80, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net.encode_features(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_the_size_says_all(size):
    with torch.device("meta"):
        encoder = build_encoder("squeezeformer", size=size)
    front_end = 21 * encoder.d_model**2 + 22 * encoder.d_model
    assert sum(p.numel() for p in encoder.parameters()) == COUNTS[size][0] - front_end
    assert len(encoder.layers) == SIZES[size].num_layers // 2 + 1  # the U-Net is one of them


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="no Squeezeformer of size 'xl'.*xs, s, sm, m, ml, l"):
        build_encoder("squeezeformer", size="xl")
    with pytest.raises(ValueError, match="'xs' has d_model 144, not 256"):
        build_encoder("squeezeformer", size="xs", d_model=256)
    with pytest.raises(ValueError, match="'xs' has d_ffn 576, not 2048"):
        build_encoder("squeezeformer", size="xs", d_ffn=2048)
    with pytest.raises(ValueError, match="d_ffn is 0"):
        build_encoder("squeezeformer", d_ffn=0)


def test_odd_chunks_are_refused():
    encoder = build_encoder("squeezeformer", d_model=16, nhead=2, num_layers=4)
    for use in (encoder.make_streaming_context, lambda setting: encoder(torch.randn(1, 9, 16), dynchunktrain_config=setting)):
        with pytest.raises(ValueError, match="chunk size is 3 frames, but this encoder needs a positive multiple of 2"):
            use(DynChunkTrainConfig(3, 1))


def test_looking_ahead_does_not_stream():
    encoder = build_encoder("squeezeformer", d_model=16, nhead=2, num_layers=4, padding="right")
    assert not encoder.streamable
    for use in (encoder.make_streaming_context, lambda setting: encoder(torch.randn(1, 9, 16), dynchunktrain_config=setting)):
        with pytest.raises(ValueError, match="'right' looks 3 frames past its chunk.*'symmetric'"):
            use(DynChunkTrainConfig(4, 1))


@torch.no_grad()
def test_right_padding_takes_any_length():
    encoder = build_encoder("squeezeformer", d_model=16, nhead=2, num_layers=4, padding="right").eval()
    for frames in (1, 2, 3, 10):
        out, _ = encoder(torch.randn(2, frames, 16))
        assert out.shape == (2, frames, 16) and out.isfinite().all()


@torch.no_grad()
def test_state_is_kept_at_its_own_rate():
    encoder = build_encoder("squeezeformer", d_model=16, nhead=2, num_layers=4, kernel_size=5).eval()
    context = encoder.make_streaming_context(DynChunkTrainConfig(8, 2))
    for _ in range(5):
        encoder.forward_streaming(torch.randn(1, 8, 16), context)
    unet, *full = context.layers[1], context.layers[0], context.layers[2]
    assert [state.mixer.keys.shape[2] for state in full] == [16, 16]
    assert [state.mixer.keys.shape[2] for state in unet.layers] == [8, 8]
    assert unet.reduction.shape == (1, 3, 16)


@torch.no_grad()
def test_fused_holds_neither_scales_nor_batch_norm():
    torch.manual_seed(0)
    encoder = build_encoder("squeezeformer", d_model=32, nhead=4, num_layers=4)
    for p in encoder.parameters():
        p.add_(0.1 * torch.randn_like(p))
    encoder(torch.randn(4, 50, 32))  # other statistics than 0 and 1
    encoder.eval()
    x, setting = torch.randn(2, 33, 32), DynChunkTrainConfig(8, 2)
    before = encoder(x)[0], encoder(x, dynchunktrain_config=setting)[0]
    names = set(encoder.fuse_().state_dict())
    assert not [name for name in names if "scale" in name or "shift" in name or "running" in name or "depthwise_norm" in name]
    torch.testing.assert_close(encoder(x)[0], before[0], atol=1e-5, rtol=0)
    context = encoder.make_streaming_context(setting)
    streamed = torch.cat([encoder.forward_streaming(chunk, context)[0] for chunk in x.split(8, dim=1)], dim=1)
    torch.testing.assert_close(streamed, before[1], atol=1e-4, rtol=0)
