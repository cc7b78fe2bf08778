"""Masked BatchNorm and learned scales."""

import copy
import os

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from speechbrain.nnet.adapters import LoRA

from speechbrain_ext.lobes import fusible
from speechbrain_ext.lobes.fusible import (
    MaskedBatchNorm,
    NormLinear,
    ScaledLinear,
    batch_statistics,
    fuse_,
    reestimate_statistics,
)
from speechbrain_ext.utils.errors import UserError

LENGTHS = (9, 4, 1)


def batch(dtype=torch.float32):
    """(3, 9, 6) frames far from mean 0 and variance 1, and their mask."""
    torch.manual_seed(0)
    x = 3 * torch.randn(3, 9, 6, dtype=dtype) + torch.arange(6) * 10
    return x, torch.arange(9) >= torch.tensor(LENGTHS).unsqueeze(1)


def pair(size=6, momentum=0.2):
    """Ours and PyTorch's with the same weights."""
    ours, theirs = MaskedBatchNorm(size, momentum), torch.nn.BatchNorm1d(size, momentum=momentum)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2)
        theirs.bias.normal_()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if "num" not in name})
    return ours, theirs


def test_it_is_batch_norm_of_the_valid_frames():
    x, mask = batch()
    ours, theirs = pair()
    garbage = x.masked_fill(mask.unsqueeze(-1), float("nan")).requires_grad_()
    packed = x[~mask].requires_grad_()
    weights = torch.randn(len(packed), 6)
    for _ in range(2):
        out, expected = ours(garbage, mask), theirs(packed)
        torch.testing.assert_close(out[~mask], expected, atol=1e-5, rtol=1e-5)
    (out[~mask] * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(garbage.grad[~mask], packed.grad, atol=1e-5, rtol=1e-4)
    assert not garbage.grad[mask].any()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, atol=1e-4, rtol=1e-4)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, mask)[~mask], theirs(packed), atol=1e-4, rtol=1e-5)


def test_without_a_mask_all_frames_count():
    x, _ = batch()
    ours, theirs = pair()
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_function():
    x, mask = batch(torch.float64)
    norm = pair()[0].double()
    for given in (None, mask):

        def valid_frames(x, weight, bias, given=given):
            out = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, given))
            return out if given is None else out[~given]

        assert torch.autograd.gradcheck(valid_frames, (x.requires_grad_(), norm.weight, norm.bias))


def test_one_frame_and_no_frame_at_all():
    norm = MaskedBatchNorm(4)
    assert torch.equal(norm(torch.randn(1, 1, 4)), torch.zeros(1, 1, 4))
    assert norm.running_var.isfinite().all()
    assert norm(torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)).isfinite().all()
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()


def test_statistics_are_float32_under_bfloat16():
    """For 4,096 numbers of about 100, whose sums in bfloat16 would be wrong by percents."""
    x = 100 + torch.randn(8, 512, 2)
    norm = MaskedBatchNorm(2, momentum=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x.bfloat16(), torch.zeros(8, 512, dtype=torch.bool))
    assert out.dtype is torch.bfloat16
    expected = x.bfloat16().float().flatten(0, 1)
    torch.testing.assert_close(norm.running_mean, expected.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(norm.running_var, expected.var(0), atol=1e-3, rtol=0)


def _process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, mask = batch()
    norm, _ = pair()
    rows = slice(0, 1) if rank == 0 else slice(1, 3)
    mine, messages = x[rows].clone().requires_grad_(), []
    for name in ("all_gather", "all_reduce"):
        send = getattr(torch.distributed, name)
        setattr(torch.distributed, name, lambda *args, send=send, name=name: (messages.append(name), send(*args)))
    out = norm(mine, mask[rows])
    out.masked_fill(mask[rows].unsqueeze(-1), 0.0).sin().sum().backward()
    torch.save((out, mine.grad, norm.running_mean, norm.running_var, messages), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_statistics_of_one(tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    x, mask = batch()
    norm, _ = pair()
    x.requires_grad_()
    out = norm(x, mask)
    out.masked_fill(mask.unsqueeze(-1), 0.0).sin().sum().backward()
    torch.set_rng_state(state)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    expected = (out.detach(), x.grad)
    for i, whole in enumerate(expected):
        torch.testing.assert_close(torch.cat([part[i].detach() for part in parts]), whole, atol=1e-5, rtol=1e-4)
    for part in parts:
        torch.testing.assert_close(part[2], norm.running_mean)
        torch.testing.assert_close(part[3], norm.running_var)
        assert part[4] == ["all_gather", "all_reduce"]  # one message each way


@pytest.mark.parametrize(
    "layer", [torch.nn.Linear(5, 6), torch.nn.Conv1d(6, 6, 3, groups=6, padding=1), torch.nn.Conv1d(5, 6, 3, padding=1)]
)
@torch.no_grad()
def test_it_folds_into_the_layer_before(layer):
    norm = pair()[0].eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    linear = isinstance(layer, torch.nn.Linear)
    x = torch.randn(2, 7, layer.in_features if linear else layer.in_channels)

    def run(layer):
        return layer(x) if linear else layer(x.transpose(1, 2)).transpose(1, 2)

    expected = norm(run(layer))
    folded = copy.deepcopy(layer)
    norm.fold_into_(folded)
    torch.testing.assert_close(run(folded), expected, atol=1e-5, rtol=1e-5)


def test_fused_in_inference_mode_the_weights_may_still_change():
    layer = NormLinear(5, 6).eval()
    with torch.inference_mode():
        fuse_(torch.nn.ModuleList([layer]))
    layer(torch.ones(1, 1, 5)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert not layer.linear.bias.is_inference() and len(list(layer.parameters())) == 2


def test_adapters_have_to_be_merged_before_fusing():
    layer = NormLinear(4, 4)
    layer.linear = LoRA(layer.linear, 2)
    with pytest.raises(UserError, match="LoRA is in the place of a linear layer; merge adapters before fusing"):
        layer.fuse_()


def test_scaled_linear_is_scale_then_linear():
    layer = ScaledLinear(5, 7)
    with torch.no_grad():
        layer.scale.uniform_(0.5, 2)
        layer.shift.normal_()
    x = torch.randn(2, 3, 5, requires_grad=True)
    inputs = (x, layer.scale, layer.shift, layer.weight, layer.bias)
    out, expected = layer(x), F.linear(layer.scale * x + layer.shift, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in (out, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    net = torch.nn.Sequential(layer)
    for _ in range(2):
        fuse_(net)
        assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias"]
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)


def test_statistics_of_one_pass_are_updated_together_at_its_end():
    torch.manual_seed(0)
    norms, x = torch.nn.ModuleList(MaskedBatchNorm(6, momentum) for momentum in (0.2, 0.2, 0.5)), batch()
    expected = copy.deepcopy(norms)
    for norm in expected:
        norm(*x)
    with batch_statistics():
        with batch_statistics():
            for norm in norms:
                norm(*x)
        assert not any(norm.running_mean.any() for norm in norms)
    with batch_statistics(updates=False):
        norms[0](*x)
    for norm, other in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm.running_mean, other.running_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(norm.running_var, other.running_var, atol=1e-5, rtol=1e-6)
    before = norms[0].running_mean.clone()
    with pytest.raises(RuntimeError), batch_statistics():
        norms[0](*x)
        raise RuntimeError
    assert torch.equal(norms[0].running_mean, before)  # a forward that failed changes nothing


def test_a_norm_that_runs_twice_is_updated_twice():
    """As in tied blocks."""
    norm, x = MaskedBatchNorm(6, momentum=0.5), batch()[0]
    expected = copy.deepcopy(norm)
    for each in (x, 3 * x):
        expected(each)
    with batch_statistics():
        for each in (x, 3 * x):
            norm(each)
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)


@pytest.mark.parametrize("distributed", [False, True])
def test_one_update_is_for_all_norms_of_a_mask(distributed, monkeypatch):
    """Also in each of several processes; here there is one."""
    monkeypatch.setattr(fusible, "is_distributed", lambda: distributed)
    updated, update = [], fusible._update
    monkeypatch.setattr(fusible, "_update", lambda group: (updated.append(len(group)), update(group)))
    norms, (x, mask) = [MaskedBatchNorm(6, momentum=0.2) for _ in range(3)], batch()
    with batch_statistics():
        for norm in norms:
            norm(x, mask)
    assert updated == [3]
    torch.testing.assert_close(norms[2].running_mean, 0.2 * x[~mask].mean(0))
    torch.testing.assert_close(norms[2].running_var, 0.8 + 0.2 * x[~mask].var(0))


@torch.no_grad()
def test_averaged_weights_need_statistics_of_their_own():
    """After a ReLU, the statistics of averaged weights are not the average of the statistics."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 200, 6) for _ in range(3)]

    def build():
        return torch.nn.ModuleList([NormLinear(6, 8, momentum=1.0), NormLinear(8, 8, momentum=1.0)])

    def run(net, x):
        return net[1](net[0](x).relu())

    nets = [build() for _ in range(2)]
    for net in nets:
        reestimate_statistics(net, batches, lambda x, net=net: run(net, x))
    average = build()
    average.load_state_dict({name: (value + nets[1].state_dict()[name]) / 2 for name, value in nets[0].state_dict().items()})
    average.eval()

    def spread():
        return torch.cat([run(average, x) for x in batches]).flatten(0, 1).var(0)

    assert (spread() - 1).abs().max() > 0.2
    reestimate_statistics(average, batches, lambda x: run(average, x))
    torch.testing.assert_close(spread(), torch.ones(8), atol=0.03, rtol=0)
    assert average[0].norm.momentum == 1.0 and not average.training


def test_statistics_are_the_plain_mean_over_batches_of_valid_frames():
    norm = MaskedBatchNorm(2)
    mask = torch.tensor([[False, False, True]])
    batches = [torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, 99.0]]]), torch.tensor([[[5.0, 6.0], [5.0, 6.0], [99.0, 99.0]]])]
    reestimate_statistics(norm, batches, lambda x: norm(x, mask))
    torch.testing.assert_close(norm.running_mean, torch.tensor([3.5, 4.5]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.0, 1.0]))


def test_a_linear_layer_with_its_norm_folds_and_begins_as_nothing():
    torch.manual_seed(0)
    layer = NormLinear(5, 7, zero_init=True)
    x = torch.randn(2, 9, 5)
    assert not layer(x).any()
    torch.nn.init.normal_(layer.norm.weight)
    layer.eval()
    expected = layer(x)
    for _ in range(2):
        layer.fuse_()
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert not list(layer.buffers()) and layer.norm is None


def test_a_batch_that_is_not_finite_leaves_no_trace():
    norm = MaskedBatchNorm(2)
    batches = [torch.randn(1, 9, 2) for _ in range(2)]
    bad = torch.full((1, 9, 2), float("inf"))
    for x in (batches[0], bad, torch.full_like(bad, float("nan"))):
        norm(x)
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()
    before = norm.running_mean.clone()
    norm(bad, torch.ones(1, 9, dtype=torch.bool))  # no valid frame
    assert torch.equal(norm.running_mean, before)
    norm.running_mean.fill_(float("nan"))
    reestimate_statistics(norm, [bad, *batches], norm)
    torch.testing.assert_close(norm.running_mean, torch.cat(batches).mean((0, 1)))
    with pytest.raises(ValueError, match="no batch"):
        reestimate_statistics(norm, [], norm)
    before = norm.running_mean.clone()
    with pytest.raises(ValueError, match="None of 2 batches .* finite"):
        reestimate_statistics(norm, [bad, bad], norm)
    assert torch.equal(norm.running_mean, before)


def test_evaluation_in_bfloat16_does_not_cancel():
    torch.manual_seed(0)
    norm = MaskedBatchNorm(8, momentum=1.0)
    x = 50 + torch.randn(4, 500, 8)
    norm(x)
    norm.eval()
    low = norm(x.bfloat16())
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), norm(x.bfloat16().float()), atol=0.02, rtol=0)


def test_statistics_survive_a_pass_that_fails():
    norm = MaskedBatchNorm(2)
    norm(torch.randn(1, 9, 2))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.raises(RuntimeError):
        reestimate_statistics(norm, [torch.randn(1, 9, 3)], norm)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("keys", [{"momentum": 0}, {"momentum": 5}, {"momentum": None}, {"eps": 0.0}, {"eps": "1"}])
def test_impossible_settings_are_refused(keys):
    with pytest.raises(ValueError, match="momentum .* eps"):
        MaskedBatchNorm(2, **keys)
