"""Cascaded encoders: what each pass trains and sees, and that a streamed first pass and the second pass give the whole."""

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.registry import build_encoder, list_encoders

SMALL = {"d_model": 32, "nhead": 4, "num_layers": 6, "d_ffn": 64, "kernel_size": 7}
STACKED = [
    {},
    {"adapter": True},
    {"first": "hyperconformer", "second": "squeezeformer", "first_chunk": 8},
    {"second": {"encoder": "hyperconformer", "d_model": 48, "d_ffn": 96, "num_layers": 2}},
    {"first": {"encoder": "practical_conformer", "attention_type": "RoPEMHA"}, "right_context": 16},
]


def build(**keys):
    torch.manual_seed(0)
    encoder = build_encoder("cascade", **{**SMALL, **keys}).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def stream(encoder, x, setting, pass_name=None):
    context = encoder.make_streaming_context(setting, pass_name)
    return torch.cat([encoder.forward_streaming(chunk, context)[0] for chunk in x.split(setting.chunk_size, dim=1)], dim=1)


@pytest.mark.parametrize("keys", STACKED, ids=str)
@torch.no_grad()
def test_first_streamed_then_second_is_the_whole(keys):
    encoder = build(**keys)
    x = torch.randn(2, 91, 32)
    whole, _ = encoder(x)
    first = stream(encoder, x, DynChunkTrainConfig(8), "first")
    torch.testing.assert_close(first, encoder(x, pass_name="first")[0], atol=1e-5, rtol=0)
    second = encoder.second_pass(first)
    torch.testing.assert_close(second, whole, atol=1e-4, rtol=0)
    assert second.shape == first.shape and not torch.allclose(second, first, atol=0.1)


@pytest.mark.parametrize("keys", STACKED, ids=str)
def test_each_pass_trains_its_own(keys):
    encoder = build(**keys).train()
    for pass_name, untouched in (("first", ["second", "adapter", "output"]), ("second", [])):
        encoder.zero_grad(set_to_none=True)
        (encoder(torch.randn(2, 40, 32), pass_name=pass_name)[0] * torch.randn(2, 40, 32)).sum().backward()
        for name, parameter in encoder.named_parameters():
            assert (parameter.grad is None) == (name.split(".")[0] in untouched), name


@torch.no_grad()
def test_the_first_pass_alone_runs_and_remembers_nothing_of_the_second():
    encoder = build()
    calls = []
    encoder.second.register_forward_hook(lambda *_: calls.append(1))
    sizes = {}
    for pass_name in encoder.passes:
        encoder(torch.randn(1, 20, 32), pass_name=pass_name)
        assert bool(calls) == (pass_name == "second")
        context = encoder.make_streaming_context(DynChunkTrainConfig(8), pass_name)
        encoder.forward_streaming(torch.randn(1, 8, 32), context)
        sizes[pass_name] = context.state_bytes()
    context = encoder.first.make_streaming_context(DynChunkTrainConfig(8))
    encoder.first.forward_streaming(torch.randn(1, 8, 32), context)
    assert sizes["first"] == context.state_bytes() < sizes["second"]


def influenced(encoder, frames, changed_from, pass_name=None):
    """The first output frame that changes when the frames from ``changed_from`` on change."""
    x = torch.randn(1, frames, 32)
    other = x.clone()
    other[:, changed_from:] = 5 * torch.randn_like(other[:, changed_from:])
    difference = (encoder(other, pass_name=pass_name)[0] - encoder(x, pass_name=pass_name)[0]).abs().amax((0, 2))
    return int((difference > 1e-5).nonzero()[0])


@pytest.mark.parametrize("second", ["conformer", "hyperconformer", "squeezeformer"])
@torch.no_grad()
def test_the_right_context_limits_what_the_second_pass_sees(second):
    encoder = build(second=second, right_context=16)
    assert [influenced(encoder, 80, start) for start in (32, 47, 48)] == [32, 32, 48]
    encoder = build(second=second)
    assert influenced(encoder, 80, 79) < 16
    assert influenced(encoder, 80, 47, "first") == 47


@torch.no_grad()
def test_the_first_stage_runs_in_its_chunks():
    encoder = build(first="hyperconformer", first_chunk=16)
    assert [influenced(encoder, 80, start, "first") for start in (32, 47, 48)] == [32, 32, 48]
    x = torch.randn(1, 50, 32)
    torch.testing.assert_close(
        encoder(x, pass_name="first")[0], encoder.first(x, dynchunktrain_config=DynChunkTrainConfig(16))[0]
    )
    given = DynChunkTrainConfig(8, 1)
    first, _ = encoder(x, dynchunktrain_config=given, pass_name="first")
    torch.testing.assert_close(first, encoder.first(x, dynchunktrain_config=given)[0])
    assert influenced(build(first="hyperconformer"), 80, 79, "first") < 16  # full context without it


@pytest.mark.parametrize("keys", STACKED, ids=str)
@torch.no_grad()
def test_padding_reaches_neither_pass(keys):
    encoder = build(**keys)
    lengths = (57, 31, 2)
    x, mask = torch.randn(3, 57, 32), torch.arange(57) >= torch.tensor(lengths).unsqueeze(1)
    frames, _ = encoder(x, src_key_padding_mask=mask, pass_name="first")
    dirty = frames.masked_fill(mask.unsqueeze(-1), float("nan"))
    second = encoder.second_pass(dirty, mask)
    torch.testing.assert_close(second, encoder(x, src_key_padding_mask=mask)[0], atol=1e-5, rtol=0)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(second[i, :length], encoder(x[i : i + 1, :length])[0][0], atol=1e-5, rtol=0)
        assert not second[i, length:].any()


def test_an_adapter_stands_between_where_it_must_or_should():
    assert isinstance(build().adapter, torch.nn.Identity)
    linear, _ = build(adapter=True).adapter
    assert linear.weight.shape == (32, 32)
    encoder = build(second={"encoder": "conformer", "d_model": 48})
    assert encoder.adapter[0].weight.shape == (48, 32) and encoder.output.weight.shape == (32, 48)
    assert encoder.d_model == 32


def test_how_many_blocks_each_stage_has():
    for keys, expected in (
        ({"num_layers": 12}, (8, 4)),
        ({"num_layers": 12, "second": {"encoder": "conformer", "num_layers": 2}}, (10, 2)),
        ({"num_layers": 12, "first": {"encoder": "conformer", "num_layers": 3}}, (3, 4)),
        ({"d_model": 96, "num_layers": 12, "first": {"encoder": "practical_conformer", "size": "xs"}}, (8, 4)),
    ):
        encoder = build_encoder("cascade", **{**SMALL, **keys})
        assert (len(encoder.first.layers), len(encoder.second.layers)) == expected


@pytest.mark.parametrize("stage", ["first", "second"])
@pytest.mark.parametrize("name", list_encoders())
@torch.no_grad()
def test_any_encoder_is_either_stage(name, stage):
    encoder = build(**{stage: name})
    x, size = torch.randn(2, 40, 32), 4 * encoder.chunk_multiple
    setting = DynChunkTrainConfig(size, 2)
    masked, _ = encoder(x, dynchunktrain_config=setting)
    torch.testing.assert_close(stream(encoder, x, setting), masked, atol=1e-4, rtol=0)
    setting = DynChunkTrainConfig(size)
    first = stream(encoder, x, setting, "first")
    whole, _ = encoder(x, dynchunktrain_config=setting, pass_name="first")
    torch.testing.assert_close(first, whole, atol=1e-4, rtol=0)
    assert encoder.second_pass(first).isfinite().all()


@torch.no_grad()
def test_the_first_pass_streams_in_the_chunks_it_was_trained_with():
    """The chunk multiple of the second stage does not restrict it."""
    encoder = build(first="hyperconformer", second="squeezeformer", first_chunk=5)
    x = torch.randn(1, 23, 32)
    streamed = stream(encoder, x, DynChunkTrainConfig(5), "first")
    torch.testing.assert_close(streamed, encoder(x, pass_name="first")[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "keys, error, message",
    [
        ({"first": "conformator"}, ValueError, "Unknown encoder 'conformator'"),
        ({"second": {"d_model": 16}}, ValueError, "second stage of the cascade is .*'encoder'"),
        ({"second": {"encoder": "conformer", "n_layers": 1}}, TypeError, "no key 'n_layers'"),
        ({"first": {"encoder": "practical_conformer", "size": "s"}}, ValueError, "first stage has d_model 144.*cascade 32"),
        ({"right_context": 0}, ValueError, "chunk size is 0"),
        ({"second": "squeezeformer", "right_context": 5}, ValueError, "chunk size is 5.*multiple of 2"),
        ({"first": "squeezeformer", "first_chunk": 3}, ValueError, "chunk size is 3.*multiple of 2"),
    ],
)
def test_impossible_keys(keys, error, message):
    with pytest.raises(error, match=message):
        build_encoder("cascade", **{**SMALL, **keys})


def test_a_stream_of_the_first_pass_takes_chunks_of_the_first_stage():
    encoder = build_encoder("cascade", d_model=16, nhead=2, num_layers=6, d_ffn=32, second="squeezeformer").eval()
    context = encoder.make_streaming_context(DynChunkTrainConfig(3), "first")  # no multiple of the Squeezeformer's 2
    assert len(context.layers) == 1
    with pytest.raises(ValueError, match="chunk size is 3"):
        encoder.make_streaming_context(DynChunkTrainConfig(3))


def test_an_unknown_pass_is_refused():
    encoder, x = build(), torch.randn(1, 4, 32)
    for call in (
        lambda: encoder(x, pass_name="third"),
        lambda: encoder.make_streaming_context(DynChunkTrainConfig(4), "third"),
    ):
        with pytest.raises(ValueError, match="The pass is 'third'; give first or second"):
            call()
