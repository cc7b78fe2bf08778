"""The Temporal U-Net around blocks of any kind; tests/conftest.py has one around Conformer blocks held to the whole contract."""

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch import nn

from speechbrain_ext.lobes.temporal_unet import TemporalUNet, block_names, nest
from speechbrain_ext.registry import build_encoder


class Same(nn.Module):
    """A block that changes nothing and keeps the number of frames."""

    def prepare(self, x, mask, config):
        self.frames = x.shape[1]
        self.mask = mask

    def forward(self, x, shared, mask, config):
        return x


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 7, 8])
def test_reduction_sees_two_i_minus_three_to_two_i_plus_one(frames):
    """Compared with a convolution and a repetition, with the symmetric padding of NeMo."""
    unet = TemporalUNet([Same()], 4)
    x = torch.randn(2, frames, 4)
    reduced = nn.functional.conv1d(
        x.transpose(1, 2), unet.reduction.weight, unet.reduction.bias, stride=2, padding=3, groups=4
    ).transpose(1, 2)[:, :-1]
    expected = x + unet.recovery(unet.reduction_linear(reduced)).repeat_interleave(2, dim=1)[:, :frames]
    torch.testing.assert_close(unet(x), expected, atol=1e-6, rtol=0)
    assert unet.layers[0].frames == (frames + 1) // 2


@torch.no_grad()
def test_half_rate_has_the_mask_of_every_second_frame():
    unet = TemporalUNet([Same()], 4)
    mask = torch.arange(7) >= torch.tensor([[7], [4], [3], [1]])
    unet(torch.randn(4, 7, 4), mask=mask)
    assert torch.equal(unet.layers[0].mask, mask[:, ::2])


@pytest.mark.parametrize("name", ["conformer", "hyperconformer", "squeezeformer"])
@torch.no_grad()
def test_any_encoder_in_any_nesting(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, d_model=16, nhead=2, num_layers=8, d_ffn=32, kernel_size=5, dropout=0.0).eval()
    blocks = [block for layer in encoder.layers for block in (layer.layers if isinstance(layer, TemporalUNet) else [layer])]
    for reduce_before, recover_before, multiple in (
        ([0], [8], 2),
        ([1, 5], [3, 7], 2),
        ([1, 2, 3], [4, 6, 8], 8),
        ([2, 2], [3, 3], 4),
    ):
        encoder.layers = nest(blocks, 16, reduce_before, recover_before)
        assert encoder.chunk_multiple == multiple
        x = torch.randn(2, 37, 16)
        mask = torch.arange(37) >= torch.tensor([[37], [11]])
        batched, _ = encoder(x, src_key_padding_mask=mask)
        torch.testing.assert_close(batched[1, :11], encoder(x[1:, :11])[0][0], atol=1e-5, rtol=0)
        setting = DynChunkTrainConfig(2 * multiple, 1)
        context = encoder.make_streaming_context(setting)
        streamed = torch.cat([encoder.forward_streaming(c, context)[0] for c in x.split(2 * multiple, dim=1)], dim=1)
        torch.testing.assert_close(streamed, encoder(x, dynchunktrain_config=setting)[0], atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match=f"positive multiple of {multiple}"):
            encoder.make_streaming_context(DynChunkTrainConfig(3 * multiple // 2, 1))


@pytest.mark.parametrize(
    "reduce_before, recover_before, message",
    [
        ([1], [], "Not every reduction is recovered"),
        ([], [2], "ends no block at half rate"),
        ([3], [2], "ends no block at half rate"),
        ([2], [2], "ends no block at half rate"),
        ([1, 2], [3], "Not every reduction is recovered"),
        ([-1], [2], "no block -1"),
        ([1], [5], "no block 5"),
        ([1.0], [2], "no block 1.0"),
    ],
)
def test_impossible_nesting_is_refused(reduce_before, recover_before, message):
    with pytest.raises(ValueError, match=message):
        nest([Same() for _ in range(4)], 4, reduce_before, recover_before)


def test_block_names_are_those_of_the_state_dict():
    encoder = build_encoder("squeezeformer", d_model=8, nhead=2, num_layers=6, reduce_before=[1, 2], recover_before=[4, 6])
    names = block_names(6, [1, 2], [4, 6])
    assert names == ["0", "1.layers.0", "1.layers.1.layers.0", "1.layers.1.layers.1", "1.layers.2", "1.layers.3"]
    assert all(f"layers.{name}.mixer.out.weight" in encoder.state_dict() for name in names)


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="padding is 'left'; the known ones are: symmetric, right"):
        TemporalUNet([Same()], 4, padding="left")
