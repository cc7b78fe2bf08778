"""HyperMixing compared with SpeechBrain's, its memory and its streaming."""

import pytest
import torch
from speechbrain.nnet.hypermixing import HyperMixing as SpeechBrainHyperMixing
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.lobes.hypermixing import HyperMixing
from speechbrain_ext.lobes.positions import sinusoids

SIZES = [(144, 576, 8, False), (144, 576, 1, False), (64, 128, 4, True), (64, 256, 16, False), (36, 36, 3, True)]


def pair(width, hidden, heads, tied, fix):
    reference = SpeechBrainHyperMixing(width, hidden, tied, heads, fix).eval()
    ours = HyperMixing(width, hidden, tied, heads, fix).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)  # also its position tables
    return reference, ours


@pytest.mark.parametrize("width, hidden, heads, tied", SIZES)
@pytest.mark.parametrize("fix", [False, True])
@torch.no_grad()
def test_equals_speechbrain(width, hidden, heads, tied, fix):
    torch.manual_seed(heads)
    reference, ours = pair(width, hidden, heads, tied, fix)
    for frames in (1, 2, 75, 3000):
        x = torch.randn(3, frames, width)
        mask = torch.arange(frames) >= torch.tensor([frames, (frames + 1) // 2, 1]).unsqueeze(1)
        for padding in (None, mask):
            expected, _ = reference(x, x, x, key_padding_mask=padding)
            torch.testing.assert_close(ours(x, x, x, key_padding_mask=padding)[0], expected, atol=1e-5, rtol=0)


def test_positions_of_long_streams_are_exact():
    """The first ones are those of SpeechBrain's table. Whole inputs, streams, and streams of different ages agree."""
    mixing, x, week = HyperMixing(36, 36, 3), torch.zeros(2, 3100, 36), 7 * 24 * 3600 * 25
    state = mixing.initial_state(DynChunkTrainConfig(4, None))
    whole = mixing.prepare(x, None, None)[0]
    assert torch.equal(whole[0, :3000], sinusoids(torch.arange(3000), 36))
    for age in (0, 2996, 3000, 3050, week):
        exact = sinusoids(age + torch.arange(4, dtype=torch.float64), 36)
        for state.frames in (age, torch.tensor([age, 0]), torch.tensor(age)):
            table = mixing.prepare_stream(x[:, :4], state)
            torch.testing.assert_close(table[0].double(), exact, atol=1e-3 if age < 3000 else 1e-6, rtol=0)
            assert table.dtype == torch.float32 and (age > 3096 or torch.equal(table[0], whole[0, age : age + 4]))


def test_gradients_equal_speechbrain():
    reference, ours = pair(32, 64, 4, False, False)
    x = torch.randn(2, 50, 32)
    for net in (reference, ours):
        net(x, x, x)[0].square().sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-3, rtol=1e-3)


def test_parameters_as_published():
    # The counts of SpeechBrain's module.
    assert sum(p.numel() for p in HyperMixing(144, 576, num_heads=8).parameters()) == 27_648
    assert sum(p.numel() for p in HyperMixing(144, 576, num_heads=8, tied=True).parameters()) == 13_968
    assert sum(p.numel() for p in HyperMixing(144, 576, num_heads=8, fix_tm_hidden_size=True).parameters()) == 180_864


@pytest.mark.parametrize("chunks", [None, DynChunkTrainConfig(64, None), DynChunkTrainConfig(64, 2)])
@torch.no_grad()
def test_memory_is_linear(chunks):
    """No tensor that the operators produce grows faster than the input."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    net = HyperMixing(16, 32, num_heads=4).eval()
    largest = []
    for frames in (1024, 2048, 4096):
        with Largest() as mode:
            net(torch.randn(1, frames, 16), dynchunktrain_config=chunks)
        largest.append(mode.numel / frames)
    assert largest[0] == pytest.approx(largest[1], rel=0.1) == pytest.approx(largest[2], rel=0.1)


@pytest.mark.parametrize("left", [None, 0, 1, 7])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_chunks_mix_themselves_and_their_left_context(left, tied):
    """Compared with the definition: each chunk mixes as in an utterance of its left context and itself."""
    net = HyperMixing(24, 48, num_heads=3, tied=tied).eval()
    size, frames = 5, 48
    x = torch.randn(2, frames, 24)
    out, _ = net(x, dynchunktrain_config=DynChunkTrainConfig(size, left))
    positions = net.prepare(x, None, None)[0]
    for start in range(0, frames, size):
        first = 0 if left is None else max(0, start - left * size)
        part = slice(first, start + size)
        alone = net.mix(x[:, part], (positions[:, part], None, None))
        torch.testing.assert_close(out[:, start : start + size], alone[:, start - first :], atol=1e-5, rtol=0)


@torch.no_grad()
def test_state_is_what_the_docstring_says():
    net = HyperMixing(144, 576, num_heads=8).eval()
    for left, expected in ((None, 144 * (18 + 1) * 8), (3, 3 * 144 * (18 + 1) * 4)):
        state = net.initial_state(DynChunkTrainConfig(8, left))
        for _ in range(6):
            x = torch.randn(1, 8, 144)
            net.stream(x, state, net.prepare_stream(x, state))
        assert state.sums.numel() * state.sums.element_size() == expected


@torch.no_grad()
def test_hours_of_stream_keep_the_newest_frames():
    """Ten hours of 40 ms frames in the running sum, then a chunk that must still count."""
    net = HyperMixing(8, 16, num_heads=2).eval()
    setting = DynChunkTrainConfig(8, None)
    state = net.initial_state(setting)
    x = torch.randn(1, 8, 8)
    net.stream(x, state, net.prepare_stream(x, state))
    state.sums *= 900_000 / 8
    before = state.sums.clone()
    small = 1e-3 * torch.randn(1, 8, 8)
    table = net.prepare_stream(small, state)
    net.stream(small, state, table)
    values, first, _ = net._generate(small, table)
    expected = values.double().transpose(-1, -2) @ first.double()
    torch.testing.assert_close((state.sums - before)[0, ..., :-1], expected, atol=1e-6, rtol=1e-3)


def test_autocast_keeps_long_sums_finite():
    net = HyperMixing(16, 32, num_heads=4)
    x = 30 + torch.randn(1, 4000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = net(x.bfloat16())
    assert out.isfinite().all()
    reference, _ = net(x)
    assert (out.float() - reference).abs().mean() < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((15, 30), "even width"),
        ((16, 32, False, 3), r"is 16; give a positive multiple of its number of heads \(3\)"),
        ((16, 34, False, 4), r"is 34; give a positive multiple of its number of heads \(4\)"),
    ],
)
def test_impossible_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        HyperMixing(*arguments)
