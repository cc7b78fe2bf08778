"""Attention, convolution, subsampling and activations."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import library

from speechbrain_ext.lobes import attention, subsampling
from speechbrain_ext.lobes.activations import ReLU, Swish, gelu
from speechbrain_ext.lobes.attention import RelativeSelfAttention, RotarySelfAttention
from speechbrain_ext.lobes.convolution import ConvolutionModule, channels_last_conv, depthwise_conv
from speechbrain_ext.lobes.dropout import dropout
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling, DepthwiseSubsampling, FusibleSubsampling
from speechbrain_ext.utils.errors import UserError


def textbook_attention(net, x):
    """Transformer-XL attention, score by score."""
    frames, heads = x.shape[1], net.nhead
    q, k, v = (t.transpose(0, 1) for t in net._project(x, None)[0:3])
    q, k, v = q[:, 0], k[:, 0], v[:, 0]  # (heads, T, head size)
    size = q.shape[-1]
    scores = torch.empty(heads, frames, frames)
    for i in range(frames):
        for j in range(frames):
            angle = (i - j) / 10000 ** (torch.arange(0, x.shape[2], 2) / x.shape[2])
            position = net.position(torch.stack((angle.sin(), angle.cos()), -1).flatten()).view(heads, size)
            content = (q[:, i] + net.bias_u[:, 0]) * k[:, j]
            scores[:, i, j] = (content + (q[:, i] + net.bias_v[:, 0]) * position).sum(-1) / size**0.5
    return net.out((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, frames, -1))


@torch.no_grad()
def test_relative_attention_is_transformer_xl():
    torch.manual_seed(0)
    net = RelativeSelfAttention(24, 3).eval()
    for bias in (net.bias_u, net.bias_v):
        bias.normal_()
    x = torch.randn(1, 17, 24)
    torch.testing.assert_close(net.mix(x, net.prepare(x, None, None)), textbook_attention(net, x), atol=1e-5, rtol=0)


@torch.no_grad()
def test_relative_attention_is_the_same_in_any_blocks(monkeypatch):
    net = RelativeSelfAttention(16, 2).eval()
    x = torch.randn(2, 50, 16)
    mask = torch.arange(50) >= torch.tensor([[50], [20]])
    expected = net.mix(x, net.prepare(x, mask, None))
    for block in (1, 7, 49, 64):
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)
        torch.testing.assert_close(net.mix(x, net.prepare(x, mask, None)), expected, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_compiled_relative_attention_works_in_blocks_too(half):
    net, graphs = RelativeSelfAttention(16, 2).eval(), []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    def mix(x, mask):
        return net.mix(x, net.prepare(x, mask, None))

    compiled = torch.compile(mix, fullgraph=True, dynamic=True, backend=backend)
    for batch, frames in ((2, 5), (3, 301), (4, 40)):
        x, mask = torch.randn(batch, frames, 16), torch.arange(frames) >= torch.tensor([[frames], *[[3]] * (batch - 1)])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.testing.assert_close(compiled(x, mask), mix(x, mask), atol=0.02 if half else 1e-6, rtol=0)
    assert len(graphs) == 1 and "relative_attention" in graphs[0]


@torch.no_grad()
def test_past_and_future_differ_only_with_signed_positions():
    x = torch.randn(1, 9, 16).expand(2, -1, -1).clone()
    x[1] = x[1].flip(0)
    for compatible in (False, True):
        net = RelativeSelfAttention(16, 2, speechbrain_scores=compatible).eval()
        out = net.mix(x, net.prepare(x, None, None))
        assert torch.allclose(out[1].flip(0), out[0], atol=1e-6) == compatible


@pytest.mark.parametrize("net", [RelativeSelfAttention(16, 2), RotarySelfAttention(16, 2)])
def test_attention_scales_by_the_head_size(net):
    assert net.scale == 8**-0.5


@pytest.mark.parametrize("kernel", [1, 3, 31])
def test_depthwise_layout_changes_nothing(kernel):
    x = torch.randn(3, 60, 20, requires_grad=True)
    weight, bias = torch.randn(20, 1, kernel, requires_grad=True), torch.randn(20, requires_grad=True)
    expected = F.conv1d(x.transpose(1, 2), weight, bias, groups=20).transpose(1, 2)
    out = depthwise_conv(x, weight, bias)
    torch.testing.assert_close(out, expected)
    inputs = (x, weight, bias)
    for ours, theirs in zip(
        torch.autograd.grad(out.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [4, 3.0, "3", True, None])
def test_convolution_needs_an_odd_kernel(size):
    with pytest.raises(UserError, match=f"odd, not {size!r}"):
        ConvolutionModule(8, size)


@torch.no_grad()
def test_a_batch_of_no_utterance_gives_none():
    assert ConvolutionSubsampling().eval()(torch.randn(0, 10, 80))[0].shape == (0, 3, 640)


@pytest.mark.parametrize("net", [ConvolutionSubsampling(80), DepthwiseSubsampling(80, 12), ConvolutionSubsampling(23, (4, 3))])
@torch.no_grad()
def test_subsampling_is_padding_exact(net):
    net.eval()
    bins = 23 if net.output_size == 18 else 80
    lengths = [101, 100, 99, 98, 97, 5, 4, 3, 2, 1]
    x = torch.full((len(lengths), 101, bins), 1e3)
    for i, length in enumerate(lengths):
        x[i, :length] = torch.randn(length, bins)
    out, relative = net(x, torch.tensor(lengths) / 101)
    assert out.shape == (len(lengths), 26, net.output_size)
    for i, length in enumerate(lengths):
        alone, one = net(x[i : i + 1, :length], torch.ones(1))
        frames = -(-length // 4)
        assert alone.shape[1] == frames == absolute_lengths(relative, 26)[i] and one == 1
        torch.testing.assert_close(out[i, :frames], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(net(x[i : i + 1, :length])[0], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("net", [ConvolutionSubsampling(80), DepthwiseSubsampling(80, 12)])
@torch.no_grad()
def test_subsampling_never_looks_past_a_multiple_of_four(net):
    net.eval()
    x = torch.randn(1, 80, 80)
    changed = x.clone()
    changed[:, 40:] = torch.randn(1, 40, 80)
    assert torch.equal(net(x)[0][:, :10], net(changed)[0][:, :10])


@pytest.mark.parametrize("net", [ConvolutionSubsampling(20), DepthwiseSubsampling(20, 12), FusibleSubsampling(20)])
@torch.no_grad()
def test_subsampling_in_pieces(net, monkeypatch):
    torch.manual_seed(0)
    for parameter in (*net.parameters(), *net.buffers()):
        parameter.uniform_(0.1, 0.9)
    net.eval()
    x, lengths = torch.randn(3, 133, 20), torch.tensor([1.0, 0.5, 9 / 133])
    monkeypatch.setattr(subsampling, "MIN_PIECE", 4)
    for given in (None, lengths):
        monkeypatch.setattr(subsampling, "PIECE", 1000)
        expected, relative = net(x, given)
        for piece in (12, 50, 130):
            monkeypatch.setattr(subsampling, "PIECE", 3 * piece)
            out, again = net(x, given)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
            assert (again is None and relative is None) or torch.equal(again, relative)
    with torch.enable_grad():
        assert len(net._pieces(x, None)) == 1
    net.stages[0].train()  # a BatchNorm needs the statistics of all frames
    assert len(net._pieces(x, None)) == 1


class Encoder(torch.nn.Module):
    """All subsamplings, followed by convolution and attention, which may disturb their compilation."""

    def __init__(self):
        super().__init__()
        fronts = ConvolutionSubsampling(20, (4, 3)), DepthwiseSubsampling(20, 4), FusibleSubsampling(20, (4, 3))
        self.fronts = torch.nn.ModuleList(fronts)
        self.linears = torch.nn.ModuleList(torch.nn.Linear(front.output_size, 8) for front in fronts)
        self.convolution, self.attention = ConvolutionModule(8, 31), RelativeSelfAttention(8, 2)
        for module in self.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def forward(self, x, lengths):
        frames = [front(x, lengths) for front in self.fronts]
        x, lengths = sum(linear(y) for linear, (y, _) in zip(self.linears, frames, strict=True)), frames[0][1]
        mask = torch.arange(x.shape[1]) >= absolute_lengths(lengths, x.shape[1])[:, None]
        x = x + self.convolution(x, mask)
        return self.attention.mix(x, self.attention.prepare(x, mask, None))


# Inductor takes half a minute, but it has failed where aot_eager did not.
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler (g++)")


@pytest.mark.parametrize("backend, half", [("aot_eager", True), pytest.param("inductor", False, marks=NEEDS_COMPILER)])
def test_trains_compiled_with_free_lengths(backend, half):
    torch.manual_seed(0)
    net = Encoder()
    twin = copy.deepcopy(net)
    for model in (net, torch.compile(twin, dynamic=True, fullgraph=True, backend=backend)):
        torch.manual_seed(0)
        for batch, frames in ((2, 140), (3, 75), (4, 62)):
            with torch.autocast("cpu", torch.bfloat16, enabled=half), torch._dynamo.config.patch(error_on_recompile=batch > 2):
                y = model(torch.randn(batch, frames, 20), torch.linspace(0.5, 1, batch))
            y.float().square().mean().backward()
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        tolerance = (0.1 if half else 1e-4) * ours.grad.abs().max().item() + 1e-6
        torch.testing.assert_close(theirs.grad, ours.grad, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups, stride, padding", [(1, 2, 1), (4, 2, 1), (4, 1, 0)])
def test_operator_of_compiled_convolutions(groups, stride, padding, bias, dtype):
    x, weight = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 7, 5, 4), (8, 4 // groups, 3, 3)))
    keys = [stride] * 2, [padding] * 2, groups
    inputs = (x, weight, torch.randn(8, dtype=dtype, requires_grad=True) if bias else None, *keys)
    library.opcheck(torch.ops.speechbrain_ext.conv, inputs)
    torch.autograd.gradcheck(
        lambda *tensors: torch.ops.speechbrain_ext.conv(*tensors, None, *keys), (x.double(), weight.double())
    )
    library.opcheck(torch.ops.speechbrain_ext.conv, (x.detach(), weight, *inputs[2:]))


@pytest.mark.parametrize("mask", [None, (3, 1, 1, 9), (1, 1, 300, 309)])
def test_operator_of_compiled_relative_attention(mask):
    query = torch.randn(3, 2, 300, 4)
    key, positions = torch.randn(3, 2, 309, 4), torch.randn(2, 4, 609 - 1)
    blocked = None if mask is None else torch.rand(mask[:3] + (309,)) < 0.3
    library.opcheck(torch.ops.speechbrain_ext.relative_attention, (query, query, key, key, positions, blocked, 0.5))


def test_convolution_follows_autocast():
    net = ConvolutionSubsampling(20, (4, 3)).eval()
    x = torch.randn(1, 20, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert channels_last_conv(x, torch.randn(3, 4, 3, 3)).dtype == torch.bfloat16
        assert channels_last_conv(x, torch.randn(4, 1, 3, 3), groups=4).dtype == torch.float32
        assert channels_last_conv(x.double(), torch.randn(3, 4, 3, 3).double()).dtype == torch.float64
        assert net.to("meta")(torch.randn(2, 21, 20, device="meta"))[0].shape == (2, 6, 15)
    with pytest.raises(RuntimeError, match="type"):
        channels_last_conv(x.double(), torch.randn(3, 4, 3, 3))


@pytest.mark.parametrize("channels", [(32,), (64, 32, 32), (64, 0), 64, ("a", "b")])
@pytest.mark.parametrize("subsampling", [ConvolutionSubsampling, FusibleSubsampling])
def test_another_factor_than_four_is_refused(subsampling, channels):
    with pytest.raises(UserError, match="channels is .*; give two whole numbers of at least 1"):
        subsampling(80, channels)


def test_front_end_of_the_published_recipes():
    assert sum(p.numel() for p in ConvolutionSubsampling().parameters()) == 25_504


@pytest.mark.parametrize("ours, theirs", [(ReLU(), F.relu), (Swish(), F.silu), (gelu, F.gelu)])
def test_activations_work_in_place_only_without_a_gradient(ours, theirs):
    x = torch.randn(3, 7, 5)
    with torch.no_grad():
        overwritten = x.clone()
        assert torch.equal(ours(overwritten), theirs(x)) and torch.equal(overwritten, theirs(x))
    kept = x.clone().requires_grad_()
    grad = torch.autograd.grad(ours(kept).sum(), kept)[0]
    assert torch.equal(kept, x)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs(kept).sum(), kept)[0])


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 6), (5, 5), (4, 9)])
def test_the_relative_shift_has_the_gradient_of_its_views(queries, keys):
    scores = torch.randn(2, 3, queries, queries + keys, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, queries, keys, dtype=torch.float64)
    ours, views = attention._Shift.apply(scores, keys, None), attention._relative_shift(scores, keys)
    assert torch.equal(ours, views)
    grads = [torch.autograd.grad((each * weights).sum(), scores)[0] for each in (ours, views)]
    assert torch.equal(*grads)
    assert torch.autograd.gradgradcheck(lambda x: attention._Shift.apply(x, keys, None).square(), scores)
    rows = torch.func.vmap(lambda x: attention._Shift.apply(x, keys, None))(scores)
    assert torch.equal(rows, views)
    where = torch.arange(keys) >= torch.tensor([[max(1, keys - 2)], [0]])[..., None, None]  # (B, 1, 1, K); the second blocks all
    blocked = attention._Shift.apply(scores, keys, where), views.masked_fill(where, attention._lowest(scores.dtype))
    assert torch.equal(*blocked)
    grads = [torch.autograd.grad((each.softmax(-1) * weights).sum(), scores, retain_graph=True)[0] for each in blocked]
    assert torch.equal(*grads)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_zeroes_a_share_of_independent_elements(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(501, 3, 333, dtype=dtype).transpose(0, 2).requires_grad_()
    y = dropout(x, p)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
    torch.testing.assert_close(y.max().item(), 1 / (1 - p), rtol=0.01, atol=0)
    assert len(y.unique()) == 2 and y.dtype == dtype and not torch.equal(y, dropout(x, p))
    zeros = (y == 0).double().flatten() - p  # four neighbours share a draw
    spread = 5 * p * (1 - p) / len(zeros) ** 0.5
    assert abs(zeros.mean().item()) < spread / (p * (1 - p)) ** 0.5
    for distance in (1, 2, 3, 4):
        assert abs((zeros[distance:] * zeros[:-distance]).mean().item()) < spread


def test_dropout_without_effect_and_without_rest():
    x = torch.rand(3, 5)
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="dropout probability"):
            dropout(x, wrong)
    assert dropout(x, 0.0) is x and not dropout(x, 1.0).any() and dropout(x[:0], 0.5).shape == (0, 5)
    with torch.no_grad():
        assert torch.equal(dropout(x, 1e-9), x)
    torch.manual_seed(1)
    first = dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_with_dropout_in_half_precision_sums_in_float32(dtype):
    """A row whose keys are all blocked, with scores that would fall out of float16's range, and the precision of the others."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 30, 16, dtype=dtype) for _ in range(3))
    query[:, :, 0], key[:, :, :, 0] = 5.0, -5.0
    bias = torch.randn(2, 2, 30, 30, dtype=dtype)
    bias[:, :, 0] = attention._lowest(dtype)
    dropped = attention._sdpa(query, key, value, bias, 1.0, 1e-9)
    exact = attention._sdpa(query.double(), key.double(), value.double(), bias.double(), 1.0, 0.0)
    torch.testing.assert_close(dropped[:, 1:].double(), exact[:, 1:], atol=3e-2, rtol=1e-2)
    assert dropped.isfinite().all()


@pytest.mark.parametrize("kind", [RelativeSelfAttention, RotarySelfAttention])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_dropout_is_attention_whose_probabilities_are_dropped(kind, padded):
    torch.manual_seed(0)
    net = kind(8, 2).double()
    x, weights = torch.randn(3, 70, 8, dtype=torch.float64), torch.randn(3, 70, 8, dtype=torch.float64)
    mask = torch.arange(70) >= torch.tensor([[70], [40], [11]]) if padded else None
    results = []
    for probability in (0.0, 1e-9):  # the second takes the other way, and drops nothing
        net.dropout = probability
        y = net.mix(x.requires_grad_(), net.prepare(x, mask, None))
        results += [(y, *torch.autograd.grad((y * weights).sum(), [x, *net.parameters()]))]
    for without, with_dropout in zip(*results, strict=True):
        torch.testing.assert_close(with_dropout, without)
    net.dropout = 0.3
    with torch.no_grad():
        answers = torch.stack([net.mix(x, net.prepare(x, mask, None)) for _ in range(400)])
    assert answers.std(0).min() > 0 and (answers.mean(0) - results[0][0]).abs().max() < 0.2 * results[0][0].std()
    net.dropout = 1.0
    torch.testing.assert_close(net.mix(x, net.prepare(x, mask, None)), net.out.bias.expand_as(x))
