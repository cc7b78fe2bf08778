"""Performer attention against its definition and against softmax attention, its recurrence, its state, its random features."""

import copy

import pytest
import torch
from speechbrain.utils.checkpoints import Checkpointer, average_checkpoints
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.lobes.masks import chunk_mask
from speechbrain_ext.lobes.performer import (
    RELU_FLOOR,
    PerformerAttention,
    RandomFeatures,
    orthogonal_gaussian,
    redraw_features,
)

KERNELS = [("softmax", 24), ("relu", 24), ("relu", 0)]
# A block is several chunks, one chunk, or part of what a chunk sees; 123 frames of left context are no whole number of blocks.
CHUNKS = [(1, None), (5, None), (200, None), (1, 0), (1, 70), (5, 0), (5, 2), (7, 1), (3, 40), (100, 0), (70, 1)]


def build(kernel="relu", features=None, causal=False, d_model=24, nhead=3, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    attention = PerformerAttention(d_model, nhead, kernel=kernel, features=features, causal=causal).eval()
    for name, parameter in attention.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return attention.to(dtype)


def split(attention, x):
    """Query, key and value, each (B, heads, T, e)."""
    return attention.qkv(x).unflatten(-1, (3, attention.nhead, -1)).permute(2, 0, 3, 1, 4)


def textbook(attention, x):
    """The features of queries and keys in the papers' form."""
    query, key, _ = split(attention, x)
    features, size = attention.features, query.shape[-1]
    if features.kernel == "softmax":
        query, key = query * size**-0.25, key * size**-0.25
        return [(y @ features.projection.T - 0.5 * y.square().sum(-1, keepdim=True)).exp() for y in (query, key)]
    if features.projection is not None:
        query, key = (y @ features.projection.T * size**-0.5 for y in (query, key))
    return query.relu() + RELU_FLOOR, key.relu() + RELU_FLOOR


def quadratic(attention, x, mask=None, setting=None):
    """Attention with the weights of all pairs of frames."""
    query, key = textbook(attention, x)
    weights = query @ key.transpose(-1, -2)
    if setting is not None or attention.causal:
        weights = weights.masked_fill(chunk_mask(x.shape[1], setting or DynChunkTrainConfig(1), None, attention.causal), 0.0)
    if mask is not None:
        weights = weights.masked_fill(mask[:, None, None], 0.0)
    y = weights / weights.sum(-1, keepdim=True) @ split(attention, x)[2]
    return attention.out(y.transpose(1, 2).flatten(2))


def mix(attention, x, mask=None, setting=None):
    return attention.mix(x, attention.prepare(x, mask, setting))


def stream(attention, x, setting, sizes):
    state = attention.initial_state(setting)
    return torch.cat([attention.stream(chunk, state, None) for chunk in x.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("kernel, features", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunks", [None, *CHUNKS])
@torch.no_grad()
def test_mixing_is_the_definition(kernel, features, causal, chunks):
    attention = build(kernel, features, causal)
    setting = None if chunks is None else DynChunkTrainConfig(*chunks)
    for frames in (1, 64, 203):
        x = 2 * torch.randn(2, frames, 24, dtype=torch.float64)
        torch.testing.assert_close(
            mix(attention, x, None, setting), quadratic(attention, x, None, setting), atol=1e-10, rtol=1e-8
        )
        length = (frames + 2) // 3
        mask = torch.arange(frames) >= torch.tensor([[frames], [length]])
        out, expected = mix(attention, x, mask, setting), quadratic(attention, x, mask, setting)
        assert out.isfinite().all()
        for ours, theirs, valid in zip(out, expected, ~mask, strict=True):
            torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kernel, features", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunks", CHUNKS)
@torch.no_grad()
def test_the_recurrence_is_the_mixing(kernel, features, causal, chunks):
    attention, setting = build(kernel, features, causal), DynChunkTrainConfig(*chunks)
    x = torch.randn(2, 107, 24, dtype=torch.float64)
    streamed = stream(attention, x, setting, setting.chunk_size)
    torch.testing.assert_close(streamed, mix(attention, x, None, setting), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kernel, features", KERNELS)
@torch.no_grad()
def test_a_causal_recurrence_takes_frames_in_any_portions(kernel, features):
    attention = build(kernel, features, causal=True)
    x = torch.randn(2, 90, 24, dtype=torch.float64)
    whole = mix(attention, x)
    for sizes in (1, 7, [1, 70, 3, 16]):
        torch.testing.assert_close(stream(attention, x, DynChunkTrainConfig(90), sizes), whole, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("left", [0, 1, 9, 20])
@torch.no_grad()
def test_a_frame_of_great_weight_is_forgotten_with_its_chunk(left):
    """In float32, where the rounding error of a large weight must not remain: the quiet frame weighs 10^9 times the others."""
    attention, setting = build("softmax", 24, dtype=torch.float32), DynChunkTrainConfig(8, left)
    x = 5 * torch.randn(1, 500, 24)
    x[:, 3] *= 0.02
    expected = quadratic(copy.deepcopy(attention).double(), x.double(), None, setting).float()
    torch.testing.assert_close(stream(attention, x, setting, 8), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(mix(attention, x, None, setting), expected, atol=1e-3, rtol=0)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operators and keeps the size of their largest result."""

    count, largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += 1
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunks", [None, (16, None), (16, 2)])
@torch.no_grad()
def test_no_loop_over_time_and_linear_memory(causal, chunks):
    attention = build("softmax", 16, causal, dtype=torch.float32)
    seen = []
    for frames in (1024, 2048, 4096):
        with Operators() as mode:
            mix(attention, torch.randn(1, frames, 24), None, None if chunks is None else DynChunkTrainConfig(*chunks))
        seen.append((mode.count, mode.largest / frames))
    assert seen[0][0] == seen[1][0] == seen[2][0]
    assert seen[0][1] == pytest.approx(seen[1][1], rel=0.1) == pytest.approx(seen[2][1], rel=0.1)


@pytest.mark.parametrize("left", [None, 0, 3])
@pytest.mark.parametrize(
    "d_model, nhead, kernel, features, m", [(512, 8, "relu", None, 64), (512, 8, "softmax", None, 128), (24, 3, "relu", 5, 5)]
)
@torch.no_grad()
def test_the_state_is_what_the_docstring_says(d_model, nhead, kernel, features, m, left):
    attention = build(kernel, features, d_model=d_model, nhead=nhead, dtype=torch.float32)
    full = nhead * m * (d_model // nhead + 1)
    assert full * 8 == 266_240 or (d_model, kernel) != (512, "relu")
    state = attention.initial_state(DynChunkTrainConfig(4, left))
    for turn in range(1, 7):
        attention.stream(torch.randn(1, 4, d_model), state, None)
        expected = full * (8 if left is None else 4 * min(left, turn))
        assert state.sums.numel() * state.sums.element_size() == expected
        assert state.sums.untyped_storage().nbytes() == expected


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_hours_of_stream_keep_the_newest_frames(causal):
    """Ten hours of 40 ms frames in the state, then a chunk that must still count."""
    attention = build(causal=causal, dtype=torch.float32)
    state = attention.initial_state(DynChunkTrainConfig(8))
    attention.stream(torch.randn(1, 8, 24), state, None)
    state.sums = state.sums * (900_000 / 8)
    before, quiet = state.sums.clone(), 1e-3 * torch.randn(1, 8, 24)
    attention.stream(quiet, state, None)
    _, key, value = split(attention, quiet)
    _, key = attention.features(key, key)
    torch.testing.assert_close(
        (state.sums - before)[0, ..., :-1], key.double().transpose(-1, -2) @ value.double(), atol=1e-6, rtol=1e-3
    )


# ---------------------------------------------------------------------- against softmax attention


def errors(projections, query, key, value):
    """Relative errors of Performer against softmax attention, one for each projection."""
    features = RandomFeatures(query.shape[-1], "softmax", 1).double()
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    found = []
    for projection in projections:
        features.projection = projection.double()
        phi, psi = features(query, key)
        weights = phi @ psi.transpose(-1, -2)
        found.append(((weights @ value / weights.sum(-1, keepdim=True) - exact).norm() / exact.norm()).item())
    return torch.tensor(found)


@pytest.fixture
def attended():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 100, 16, dtype=torch.float64)
    return 0.5 * query, 0.5 * key, value


def test_more_features_come_closer_to_softmax_attention(attended):
    medians = [errors((orthogonal_gaussian(m, 16) for _ in range(25)), *attended).median().item() for m in (16, 64, 256, 1024)]
    assert all(after < 0.75 * before for before, after in zip(medians, medians[1:], strict=False)), medians
    assert medians[-1] < 0.12, medians


@pytest.mark.parametrize("m", [16, 64, 256])
def test_orthogonal_features_have_the_smaller_error(m, attended):
    orthogonal = errors((orthogonal_gaussian(m, 16) for _ in range(200)), *attended).mean()
    independent = errors((torch.randn(m, 16) for _ in range(200)), *attended).mean()
    assert orthogonal < independent


def test_the_softmax_kernel_is_unbiased(attended):
    """With many features the error is as small as that of independent features; that of a biased kernel would not be."""
    orthogonal, independent = (errors([draw(2**16, 16)], *attended) for draw in (orthogonal_gaussian, torch.randn))
    assert orthogonal < 1.5 * independent and orthogonal < 0.02


@torch.no_grad()
def test_the_layer_itself_approximates_softmax_attention():
    attention = build("softmax", 16384)
    x = 0.5 * torch.randn(2, 50, 24, dtype=torch.float64)
    y = torch.nn.functional.scaled_dot_product_attention(*split(attention, x))
    expected = attention.out(y.transpose(1, 2).flatten(2))
    assert (mix(attention, x) - expected).norm() < 0.03 * expected.norm()


def test_orthogonal_rows_are_gaussian_each():
    torch.manual_seed(0)
    w = torch.stack([orthogonal_gaussian(20, 8) for _ in range(500)])  # (500, 20, 8)
    for block in (w[:, :8], w[:, 8:16], w[:, 16:]):
        products = block @ block.transpose(1, 2)
        assert (products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert (w[:, :8] @ w[:, 8:16].transpose(1, 2)).abs().max() > 1
    assert w.mean(0).abs().max() < 0.2  # 4.5 standard errors
    assert w.var().item() == pytest.approx(1, abs=0.03)
    assert w.flatten().pow(4).mean().item() == pytest.approx(3, abs=0.15)
    assert w.square().sum(-1).var().item() == pytest.approx(16, rel=0.1)  # chi-squared with 8 degrees of freedom


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("kernel, features", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunks", [None, (5, None), (5, 2)])
def test_large_logits_stay_finite(kernel, features, causal, chunks):
    attention = build(kernel, features, causal, dtype=torch.float32).train()
    setting = None if chunks is None else DynChunkTrainConfig(*chunks)
    for scale in (30.0, 1e3, 1e6):
        x = (scale * torch.randn(2, 40, 24)).requires_grad_()
        mask = torch.arange(40) >= torch.tensor([[40], [3]])
        out = mix(attention, x, mask, setting)
        out[~mask].sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()
        if setting is not None:
            assert stream(attention, x.detach(), setting, 5).isfinite().all()


@pytest.mark.parametrize("size, loudness", [(8, 3.0), (64, 1.0), (64, 3.0), (128, 1.0)])
@torch.no_grad()
def test_a_frame_that_sees_one_frame_answers_with_its_value(size, loudness):
    """Even if the weight of this frame would be small beside others."""
    attention = build("softmax", d_model=size, nhead=1, causal=True, dtype=torch.float32)
    x = loudness * torch.randn(50, 1, size)
    expected = attention.out(split(attention, x)[2].transpose(1, 2).flatten(2))
    torch.testing.assert_close(mix(attention, x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernel, features", KERNELS)
@pytest.mark.parametrize("causal, chunks", [(False, None), (True, None), (False, (2, 1)), (True, (3, 1))])
def test_gradients(kernel, features, causal, chunks):
    attention = build(kernel, features and 4, causal, d_model=4, nhead=2)
    setting = None if chunks is None else DynChunkTrainConfig(*chunks)
    x = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(7) >= torch.tensor([[7], [4]])
    weights = dict(attention.named_parameters())
    valid = (~mask).unsqueeze(-1)

    def call(x, *values):
        shared = attention.prepare(x, mask, setting)
        attention.forward = lambda x: attention.mix(x, shared) * valid
        return torch.func.functional_call(attention, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights.values()))


# ---------------------------------------------------------------------- random features


@torch.no_grad()
def test_new_features_change_training_only():
    attention = build("softmax", 24)
    x = torch.randn(1, 20, 24, dtype=torch.float64)
    before, kept = mix(attention, x), attention.features.projection.clone()
    for draw in (1, 2):
        redraw_features(attention, draw)
        assert torch.equal(mix(attention.eval(), x), before)
        assert not torch.allclose(mix(attention.train(), x), before)
    assert torch.equal(attention.features.projection, kept)
    assert attention.features.training_projection.dtype == torch.float64


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_the_same_number_gives_the_same_features(kernel):
    nets = [torch.nn.ModuleList(build(kernel, 24, seed=seed) for _ in range(2)) for seed in (1, 2)]
    redraw_features(nets[0], 7)
    redraw_features(nets[1], 3)
    other = nets[1][0].features.training_projection
    torch.manual_seed(99)
    state = torch.get_rng_state()
    redraw_features(nets[1], 7)
    assert torch.equal(torch.get_rng_state(), state)  # the random numbers of dropout and augmentation do not change
    for one, two in zip(*nets, strict=True):
        assert torch.equal(one.features.training_projection, two.features.training_projection)
    assert not torch.equal(nets[1][0].features.training_projection, other)
    assert not torch.equal(nets[1][0].features.training_projection, nets[1][1].features.training_projection)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_softmax_kernel_is_built_under_any_default_type(dtype):
    torch.manual_seed(0)
    expected = RandomFeatures(8, "softmax", 32).projection.to(dtype)
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        assert torch.equal(RandomFeatures(8, "softmax", 32).projection, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_random_features_there_is_nothing_to_redraw():
    attention = build("relu", 0)
    redraw_features(attention, 1)
    assert not dict(attention.named_buffers())


@torch.no_grad()
def test_features_survive_a_round_trip_and_the_average_of_checkpoints(tmp_path):
    attention = build("softmax", 24, dtype=torch.float32)
    x, kept = torch.randn(1, 20, 24), attention.features.projection.clone()
    checkpointer = Checkpointer(tmp_path, {"model": attention})
    for draw in range(1, 4):
        redraw_features(attention, draw)
        attention.qkv.weight += 0.01 * torch.randn_like(attention.qkv.weight)
        checkpointer.save_checkpoint(name=f"draw_{draw}")
    other = build("softmax", 24, seed=5, dtype=torch.float32)
    other.load_state_dict(attention.state_dict(), strict=True)
    assert torch.equal(mix(other, x), mix(attention, x))
    average = average_checkpoints(checkpointer.find_checkpoints(max_num_checkpoints=3), "model")
    torch.testing.assert_close(average["features.projection"], kept, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"kernel": "cosine"}, "Unknown kernel 'cosine'.*softmax, relu"),
        ({"kernel": "softmax", "features": 0}, "features is 0; the softmax kernel needs a whole number of at least 1"),
        ({"features": -1}, "features is -1; the relu kernel needs a whole number of at least 0"),
        ({"nhead": 5}, r"d_model is 24; give a positive multiple of nhead \(5\)"),
        ({"nhead": 0}, r"nhead \(0\)"),
    ],
)
def test_impossible_sizes(keys, message):
    with pytest.raises(ValueError, match=message):
        PerformerAttention(**{"d_model": 24, "nhead": 3, **keys})
