"""Practical Conformer: blocks without attention, causal outputs that chunks do not change, sizes, a state that does not grow."""

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.encoders.practical_conformer import SIZES
from speechbrain_ext.lobes.attention import ATTENTIONS
from speechbrain_ext.lobes.performer import PerformerAttention
from speechbrain_ext.registry import build_encoder

SMALL = {"d_model": 32, "nhead": 4, "num_layers": 4, "d_ffn": 64, "kernel_size": 7}
MIXERS = [{"kernel": "relu"}, {"kernel": "softmax"}, *({"attention_type": name} for name in ATTENTIONS)]


def build(**keys):
    torch.manual_seed(0)
    encoder = build_encoder("practical_conformer", **{**SMALL, **keys}).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def stream(encoder, x, setting):
    context = encoder.make_streaming_context(setting)
    chunks = [encoder.forward_streaming(chunk, context)[0] for chunk in x.split(setting.chunk_size, dim=1)]
    return torch.cat(chunks, dim=1), context


@pytest.mark.parametrize("layers", [0, 1, 4])
@torch.no_grad()
def test_the_lower_blocks_have_no_attention(layers):
    encoder = build(convolution_layers=layers)
    mixing = {int(name.split(".")[1]) for name, _ in encoder.named_parameters() if ".mixer" in name}
    assert mixing == set(range(layers, 4))
    plain = sum(p.numel() for p in build_encoder("practical_conformer", **SMALL, convolution_layers=4).parameters())
    attention = 4 * 32 * 32 + 4 * 32 + 2 * 32  # four projections with biases, and the LayerNorm before them
    assert sum(p.numel() for p in encoder.parameters()) == plain + (4 - layers) * attention
    x = torch.randn(2, 37, 32)
    streamed, _ = stream(encoder, x, DynChunkTrainConfig(8))
    torch.testing.assert_close(streamed, encoder(x)[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_convolution_alone_sees_its_kernels():
    encoder = build(convolution_layers=4)
    x = torch.randn(1, 60, 32)
    changed = x.clone()
    changed[:, 10] += 1
    difference = (encoder(changed)[0] - encoder(x)[0]).abs().amax((0, 2))
    reach = 4 * (7 - 1)
    assert difference[:10].max() == 0 and difference[10 + reach] > 0 and difference[11 + reach :].max() < 1e-6


@pytest.mark.parametrize("attention_type", ["Performer", *ATTENTIONS])
def test_softmax_attention_is_one_key_away(attention_type):
    layers = build(attention_type=attention_type).layers
    kind = ATTENTIONS.get(attention_type, PerformerAttention)
    assert [type(layer.mixer) for layer in layers] == [type(None), kind, kind, kind]  # a third of four blocks


@pytest.mark.parametrize("keys", MIXERS, ids=lambda keys: next(iter(keys.values())))
@torch.no_grad()
def test_chunks_change_no_causal_answer(keys):
    encoder = build(**keys)
    x = torch.randn(2, 150, 32)
    whole, _ = encoder(x)
    for size in (1, 7, 64, 200):
        setting = DynChunkTrainConfig(size)
        torch.testing.assert_close(encoder(x, dynchunktrain_config=setting)[0], whole, atol=2e-5, rtol=0)
        torch.testing.assert_close(stream(encoder, x, setting)[0], whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("keys", MIXERS, ids=lambda keys: next(iter(keys.values())))
@pytest.mark.parametrize("chunks", [None, (8, None), (8, 1), (8, 20)])
@torch.no_grad()
def test_causal_frames_see_no_future(keys, chunks):
    encoder, setting = build(**keys), None if chunks is None else DynChunkTrainConfig(*chunks)
    x = torch.randn(1, 150, 32)
    before, _ = encoder(x, dynchunktrain_config=setting)
    for end in (1, 67, 128):
        changed = x.clone()
        changed[:, end:] = 5 * torch.randn_like(changed[:, end:])
        after, _ = encoder(changed, dynchunktrain_config=setting)
        torch.testing.assert_close(after[:, :end], before[:, :end], atol=1e-6, rtol=0)
        assert (after[:, end] - before[:, end]).abs().max() > 1e-3


@pytest.mark.parametrize("keys", MIXERS, ids=lambda keys: next(iter(keys.values())))
@torch.no_grad()
def test_without_causality_frames_see_all_of_their_chunk(keys):
    encoder = build(**keys, causal=False)
    x = torch.randn(1, 40, 32)
    for setting, end in ((None, 40), (DynChunkTrainConfig(8), 24)):
        changed = x.clone()
        changed[:, end - 1] = 3 * torch.randn(32)
        difference = encoder(changed, dynchunktrain_config=setting)[0] - encoder(x, dynchunktrain_config=setting)[0]
        difference = difference.abs().amax((0, 2))
        assert difference[16] > 1e-5
        assert difference[0] > 1e-5 if setting is None else difference[:16].max() < 1e-6


@pytest.mark.parametrize("kernel, features, m", [("relu", None, 8), ("softmax", None, 16), ("relu", 12, 12)])
@torch.no_grad()
def test_the_state_stays_constant_over_ten_thousand_frames(kernel, features, m):
    encoder = build(kernel=kernel, features=features)
    context = encoder.make_streaming_context(DynChunkTrainConfig(100))
    sizes = set()
    for _ in range(100):
        out, _ = encoder.forward_streaming(torch.randn(1, 100, 32), context)
        sizes.add(context.state_bytes())
    assert out.isfinite().all()
    assert sizes == {4 * (7 - 1) * 32 * 4 + 3 * 4 * m * (32 // 4 + 1) * 8}


@torch.no_grad()
def test_nan_in_padding_stays_there():
    mask = torch.arange(70) >= torch.tensor([[70], [1]])
    for keys in MIXERS:
        encoder = build(**keys)
        for x in (torch.randn(2, 70, 32), 1e4 * torch.randn(2, 70, 32)):
            out, _ = encoder(x.masked_fill(mask.unsqueeze(-1), float("nan")), src_key_padding_mask=mask)
            assert out.isfinite().all() and not out[1, 1:].any()


@pytest.mark.parametrize("size, millions", [("xs", 1.4), ("s", 3.8), ("m", 14.0), ("l", 65.8)])
def test_the_size_says_all(size, millions):
    with torch.device("meta"):
        encoder = build_encoder("practical_conformer", size=size)
    row = SIZES[size]
    assert (encoder.d_model, len(encoder.layers)) == (row.d_model, row.num_layers)
    assert encoder.layers[0].ffn1[1].out_features == row.d_ffn
    assert encoder.layers[-1].mixer.nhead == row.nhead
    assert sum(layer.mixer is None for layer in encoder.layers) == row.num_layers // 3
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"size": "xl"}, "no Practical Conformer of size 'xl'.*xs, s, m, l"),
        ({"size": "xs", "d_model": 144}, "'xs' has d_model 96, not 144"),
        ({"size": "m", "num_layers": 3}, "'m' has num_layers 12, not 3"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({**SMALL, "convolution_layers": 5}, r"convolution_layers is 5; give 0 to num_layers \(4\)"),
        ({**SMALL, "convolution_layers": -1}, "convolution_layers is -1"),
        ({**SMALL, "attention_type": "hypermixing"}, "attention_type 'hypermixing'.*Performer, RelPosMHAXL, RoPEMHA"),
        ({**SMALL, "kernel": "elu"}, "Unknown kernel 'elu'"),
    ],
)
def test_impossible_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        build_encoder("practical_conformer", **keys)
