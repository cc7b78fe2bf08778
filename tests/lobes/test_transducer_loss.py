"""The transducer's loss compared with plain dynamic programming in float64, its pruning, and its memory."""

import pytest
import torch
from torchaudio.functional import rnnt_loss

from speechbrain_ext.lobes.transducer import PREDICTORS, Transducer
from speechbrain_ext.lobes.transducer_loss import TransducerLoss, lattice_loss, pruning_band, simple_arcs
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.measure import peak_memory

D, P, J, V = 6, 8, 10, 9
LENGTHS, TARGETS = torch.tensor([12, 7, 12, 5, 3]), torch.tensor([5, 3, 0, 5, 4])  # the last one has more tokens than frames


def plain_loss(log_probs, targets):
    """The loss of one utterance (T, U + 1, V) by the forward recursion, step by step."""
    frames, labels = len(log_probs), len(targets)
    alpha = [[None] * (labels + 1) for _ in range(frames)]
    for t in range(frames):
        for u in range(labels + 1):
            ways = [alpha[t - 1][u] + log_probs[t - 1, u, 0]] if t else []
            ways += [alpha[t][u - 1] + log_probs[t, u - 1, targets[u - 1]]] if u else []
            alpha[t][u] = torch.stack(ways).logsumexp(0) if ways else log_probs.new_zeros(())
    return -(alpha[-1][-1] + log_probs[-1, -1, 0])


def plain_logits(transducer, frames, targets):
    outputs = transducer.project_outputs(transducer.predictor(targets)).unsqueeze(1)
    return transducer.join(transducer.project_frames(frames).unsqueeze(2), outputs)


@pytest.fixture(params=PREDICTORS)
def transducer(request):
    torch.manual_seed(0)
    net = Transducer(D, V, request.param, predictor_size=P, joint_size=J)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)  # far from uniform
    return net


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(5, 12, D, generator=generator).requires_grad_()
    return frames, LENGTHS, torch.randint(1, V, (5, 5), generator=generator), TARGETS


def expected(transducer, frames, lengths, targets, target_lengths):
    """Mean loss and gradients."""
    twin = Transducer(D, V, "lstm" if hasattr(transducer.predictor, "lstm") else "stateless", predictor_size=P, joint_size=J)
    twin.load_state_dict(transducer.state_dict())
    twin, wide, losses = twin.double(), frames.detach().double().requires_grad_(), []
    for x, length, tokens, count in zip(wide, lengths, targets, target_lengths, strict=True):
        log_probs = plain_logits(twin, x[:length].unsqueeze(0), tokens[:count].unsqueeze(0))[0].log_softmax(-1)
        losses.append(plain_loss(log_probs, tokens[:count].tolist()))
    loss = sum(losses) / len(frames)
    return loss, torch.autograd.grad(loss, [wide, *twin.parameters()])


WIDTHS = [("full", {}), ("full", {"joint_memory": 0.002}), ("pruned", {"prune_range": 6}), ("pruned", {"prune_range": 50})]


@pytest.mark.parametrize("kind, keys", WIDTHS)
def test_loss_and_gradients_are_those_of_the_recursion(transducer, batch, kind, keys):
    loss_of = TransducerLoss(D, P, V, kind, **keys).eval()
    loss = loss_of(transducer, *batch)
    gradients = torch.autograd.grad(loss, [batch[0], *transducer.parameters()])
    wanted, wanted_gradients = expected(transducer, *batch)
    torch.testing.assert_close(loss.double(), wanted, atol=1e-5, rtol=0)
    for found, right in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(found.double(), right, atol=2e-5, rtol=0)
    assert gradients[0][4].any() and not gradients[0][1, 7:].any()  # more tokens than frames, and padding


def test_a_lattice_is_that_of_torchaudio():
    """With utterances of any length, one of them without labels, and with any values after their ends."""
    torch.manual_seed(0)
    frames, labels = torch.tensor([50, 31, 1, 12]), torch.tensor([20, 0, 1, 17])
    arcs = torch.randn(4, 50, 21, 3).log_softmax(-1)[..., :2].contiguous().requires_grad_()
    kernel = {"blank": 0, "reduction": "none", "fused_log_softmax": False}
    wanted = rnnt_loss(arcs, torch.ones(4, 20, dtype=torch.int32), frames.int(), labels.int(), **kernel)
    (gradient,) = torch.autograd.grad(wanted.sum(), arcs)
    spoiled = arcs.detach().clone()
    for row, count, label in zip(spoiled, frames, labels, strict=True):
        row[count:], row[:, label + 1 :], row[:, label, 1] = torch.nan, torch.inf, torch.nan
    for given in (arcs, spoiled.requires_grad_()):
        losses, posteriors = lattice_loss(given, frames, labels)
        torch.testing.assert_close(losses, wanted, atol=1e-4, rtol=1e-6)
        torch.testing.assert_close(posteriors, -gradient, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(losses.sum(), given)[0], -posteriors, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["full", "pruned"])
def test_more_tokens_than_frames(kind):
    """The loss is torchaudio's if there is an alignment, and else 0: without frames, or with too many tokens for a band."""
    torch.manual_seed(0)
    net, loss_of = Transducer(D, V, predictor_size=P, joint_size=J), TransducerLoss(D, P, V, kind, prune_range=4).eval()
    for frames, tokens in ((2, 5), (2, 6), (2, 7), (1, 3), (1, 4), (0, 1)):
        x, lengths = torch.randn(1, max(1, frames), D), torch.tensor([frames])
        targets, counts = torch.randint(1, V, (1, tokens)), torch.tensor([tokens])
        fits = frames > 0 and (kind == "full" or tokens <= 3 * frames)
        assert bool(loss_of.fits(lengths, counts)) == loss_of.fits(frames, tokens) == fits
        found = loss_of(net, x, lengths, targets, counts)
        if not fits:
            assert found == 0
            continue
        wanted = rnnt_loss(plain_logits(net, x, targets), targets.int(), lengths.int(), counts.int(), blank=0)
        assert found < 100 and found >= wanted - 1e-4
        if kind == "full":
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    loss_of.train()(net, x, lengths, targets, counts).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


def test_padding_has_no_influence(transducer, batch):
    frames, lengths, targets, target_lengths = batch
    loss_of, wider = TransducerLoss(D, P, V).eval(), torch.nn.functional.pad(frames.detach(), (0, 0, 0, 4))
    others = targets.clone()
    for i, (length, count) in enumerate(zip(lengths, target_lengths, strict=True)):
        wider[i, length:] = 1e3
        others[i, count:] = 0
    loss = loss_of(transducer, wider, lengths, others, target_lengths)
    torch.testing.assert_close(loss, loss_of(transducer, *batch), atol=1e-5, rtol=0)
    alone = [
        loss_of(transducer, frames[i : i + 1, :length], lengths[i : i + 1], targets[i : i + 1, :count], target_lengths[i : i + 1])
        for i, (length, count) in enumerate(zip(lengths.tolist(), target_lengths.tolist(), strict=True))
    ]
    torch.testing.assert_close(sum(alone) / 5, loss_of(transducer, *batch), atol=1e-4, rtol=0)


def test_a_band_can_only_raise_the_loss(transducer, batch):
    full = TransducerLoss(D, P, V, "full").eval()(transducer, *batch)
    pruned = [TransducerLoss(D, P, V, prune_range=width).eval()(transducer, *batch) for width in (2, 3, 4, 5)]
    assert all(loss >= full - 1e-5 for loss in pruned) and all(loss < 1e3 for loss in pruned)


def test_bands_lead_from_nothing_to_the_last_label():
    torch.manual_seed(0)
    for width in (2, 3, 5, 9):
        frames, labels = torch.tensor([30, 17, 30, 9]), torch.tensor([8, 8, 0, 7])
        _, posteriors = lattice_loss((5 * torch.randn(4, 30, 9, 2)).log_softmax(-1), frames, labels)
        first = pruning_band(posteriors, frames, labels, width)
        for row, count, label in zip(first, frames, labels, strict=True):
            steps = row[:count].diff()
            assert row[0] == 0 and row[count - 1] == max(label - width + 1, 0)
            assert steps.min() >= 0 and steps.max() <= width - 1


def test_posteriors_count_each_label_once():
    arcs = torch.randn(2, 10, 5, 2).log_softmax(-1)
    _, posteriors = lattice_loss(arcs, torch.tensor([10, 6]), torch.tensor([4, 2]))
    torch.testing.assert_close(posteriors[..., 1].sum(1), torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]))
    assert not posteriors[1, 6:].any() and not posteriors[1, :, 3:].any()


def test_the_simple_joint_network_is_the_sum():
    torch.manual_seed(0)
    frame_scores, label_scores = 9 * torch.randn(2, 7, V), 9 * torch.randn(2, 4, V)
    log_probs = (frame_scores.unsqueeze(2) + label_scores.unsqueeze(1)).log_softmax(-1)
    targets = torch.randint(1, V, (2, 3))
    arcs = simple_arcs(frame_scores, label_scores, targets)
    torch.testing.assert_close(arcs[..., 0], log_probs[..., 0], atol=1e-4, rtol=0)
    for u in range(3):
        wanted = torch.stack([log_probs[b, :, u, targets[b, u]] for b in range(2)])
        torch.testing.assert_close(arcs[:, :, u, 1], wanted, atol=1e-4, rtol=0)


def test_fastemit_changes_the_gradients_of_labels_alone(transducer, batch):
    plain, eager = (TransducerLoss(D, P, V, "full", fastemit=share).eval() for share in (0.0, 0.5))
    torch.testing.assert_close(plain(transducer, *batch), eager(transducer, *batch))
    arcs, lengths = torch.randn(2, 6, 4, 2).log_softmax(-1).requires_grad_(), (torch.tensor([6, 5]), torch.tensor([3, 2]))
    gradients = []
    for loss_of in (plain, eager):
        losses, _ = lattice_loss(loss_of._earlier(arcs, lengths[0]), *lengths)
        gradients.append(torch.autograd.grad(losses.sum(), arcs)[0])
    torch.testing.assert_close(gradients[1][..., 0], gradients[0][..., 0])
    torch.testing.assert_close(gradients[1][..., 1], 1.5 * gradients[0][..., 1])


def test_the_delay_penalty_wants_labels_early(transducer, batch):
    frames, _, targets, _ = batch
    penalty = 0.3
    log_probs = plain_logits(transducer, frames[:1], targets[:1])[0].log_softmax(-1).double()
    late = torch.arange(12) - (12 - 1) / 2
    log_probs[..., 1:] -= penalty * late[:, None, None]
    loss = TransducerLoss(D, P, V, "full", delay_penalty=penalty).eval()
    found = loss(transducer, frames[:1], torch.tensor([12]), targets[:1], torch.tensor([5]))
    torch.testing.assert_close(found.double(), plain_loss(log_probs, targets[0].tolist()), atol=1e-5, rtol=0)


def test_the_warm_up_goes_from_the_simple_loss_to_the_pruned_one(transducer, batch):
    loss_of = TransducerLoss(D, P, V, prune_range=6, warmup=10)
    first, middle, last, later = (loss_of(transducer, *batch, step=step).item() for step in (0, 5, 10, 99))
    pruned = loss_of.eval()(transducer, *batch).item()
    simple = (last - pruned) / 0.5
    assert last == later and first == pytest.approx(simple + 0.1 * pruned, rel=1e-5)
    assert middle == pytest.approx((first + last) / 2, rel=1e-5)
    assert simple > 0


def test_without_a_warm_up_the_simple_loss_teaches_itself_alone(transducer, batch):
    loss_of, parts = TransducerLoss(D, P, V, prune_range=6, warmup=None), [batch[0], *transducer.parameters()]
    loss = loss_of(transducer, *batch, step=0)
    found = torch.autograd.grad(loss, [*parts, *loss_of.parameters()])
    pruned = loss_of.eval()(transducer, *batch)
    torch.testing.assert_close(loss, pruned, rtol=0.05, atol=0)
    wanted = torch.autograd.grad(pruned, parts)
    for gradient, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(gradient, other)
    assert all(gradient.any() for gradient in found[len(parts) :])


def test_the_band_of_a_ctc_head_holds_its_alignment():
    """Frames that CTC is sure of: the simple loss chooses their labels before any training."""
    torch.manual_seed(0)
    head, loss = torch.nn.Linear(V, V), TransducerLoss(V, P, V, prune_range=2)
    with torch.no_grad():
        head.weight.copy_(9 * torch.eye(V))
        head.bias.zero_()
        for parameter in loss.parameters():
            parameter.mul_(99)  # a band of its own
    loss.start_from(head)
    assert not any(parameter.any() for parameter in loss.label_scores.parameters())
    alignment = torch.tensor([0, 3, 0, 0, 5, 0, 2, 0])  # blanks and tokens
    scores = loss.frame_scores(torch.nn.functional.one_hot(alignment, V).float()[None]), loss.label_scores(torch.randn(1, 4, P))
    lengths = torch.tensor([8]), torch.tensor([3])
    _, posteriors = lattice_loss(simple_arcs(*scores, torch.tensor([[3, 5, 2]])), *lengths)
    band = pruning_band(posteriors, *lengths, 2)[0]
    said = (alignment > 0).cumsum(0)
    assert ((band <= said - (alignment > 0).long()) & (said <= band + 1)).all()


@pytest.mark.parametrize("head", [torch.nn.Linear(D, V, bias=False), torch.nn.Linear(D, V - 1), torch.nn.LayerNorm(D)])
def test_nothing_is_taken_from_another_head(head):
    loss = TransducerLoss(D, P, V)
    before = [parameter.clone() for parameter in loss.parameters()]
    loss.start_from(head)
    assert all(map(torch.equal, loss.parameters(), before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["pruned", "full"])
def test_every_parameter_gets_a_finite_gradient_in_any_precision(transducer, batch, kind, dtype):
    loss_of = TransducerLoss(D, P, V, kind)
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(transducer, *batch, step=0)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in [*transducer.named_parameters(), *loss_of.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    exact = loss_of.eval()(transducer, *batch)
    torch.testing.assert_close(loss_of(transducer, *batch), exact)


def test_nothing_is_said_in_a_batch_of_empty_transcripts(transducer, batch):
    frames, lengths, targets, target_lengths = batch
    for kind in ("pruned", "full"):
        loss = TransducerLoss(D, P, V, kind).eval()(transducer, frames, lengths, targets, 0 * target_lengths)
        blanks = plain_logits(transducer, frames, targets[:, :0]).log_softmax(-1)[:, :, 0, 0]
        wanted = sum(-row[:length].sum() for row, length in zip(blanks, lengths, strict=True)) / 5
        torch.testing.assert_close(loss, wanted)


def test_slices_keep_to_the_memory_that_is_stated():
    net, megabytes = Transducer(16, 400, predictor_size=32, joint_size=64), 4
    frames, lengths = torch.randn(2, 150, 16, requires_grad=True), torch.tensor([150, 150])
    targets, counts = torch.randint(1, 400, (2, 20)), torch.tensor([20, 20])
    peaks = {}
    for memory in (megabytes, 1000):
        loss = TransducerLoss(16, 32, 400, "full", joint_memory=memory)
        loss(net, frames, lengths, targets, counts).backward()
        peaks[memory] = peak_memory(lambda loss=loss: loss(net, frames, lengths, targets, counts).backward())
    assert peaks[megabytes] < 1.5 * megabytes < peaks[1000] / 3


def test_the_pruned_loss_takes_a_quarter_of_the_memory():
    """At V 500, B 4, T 250, U 60, compared with torchaudio's kernel on all logits (time: benchmarks/transducer_loss.py)."""
    net, loss = Transducer(64, 500, predictor_size=512, joint_size=512), TransducerLoss(64, 512, 500)
    frames, lengths = torch.randn(4, 250, 64, requires_grad=True), torch.full((4,), 250)
    targets, counts = torch.randint(1, 500, (4, 60)), torch.full((4,), 60)
    logits = 4 * 4 * 250 * 61 * (500 + 512) / 2**20  # of logits and hidden layer alone, in MiB
    peak = peak_memory(lambda: loss(net, frames, lengths, targets, counts).backward())
    assert peak < 2 * logits / 4  # the kernel's gradient is another copy of the logits


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"kind": "fused"}, "Unknown transducer_loss 'fused'; the known ones are: pruned, full."),
        ({"prune_range": 1}, "prune_range is 1; give 2 labels or more"),
        ({"prune_range": 5.5}, "prune_range is 5.5; give 2 labels or more"),
        ({"fastemit": -1}, "fastemit is -1"),
        ({"fastemit": float("nan")}, "fastemit is nan; give a number of 0 or more"),
        ({"delay_penalty": "a"}, "delay_penalty is 'a'"),
        ({"warmup": float("inf")}, "transducer_warmup is inf"),
        ({"joint_memory": 0}, "joint_memory is 0; give a number of MiB above 0"),
        ({"joint_memory": "2GB"}, "joint_memory is '2GB'"),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        TransducerLoss(D, P, V, **keys)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"predictor": "gru"}, "Unknown predictor 'gru'; the known ones are: stateless, lstm."),
        ({"predictor_size": 6}, "predictor_size is 6; give a multiple of 4"),
        ({"predictor_size": "a"}, "predictor_size is 'a'"),
        ({"predictor_context": 0}, "predictor_context is 0"),
        ({"predictor_context": 1.5}, "predictor_context is 1.5"),
        ({"predictor": "lstm", "predictor_layers": 0}, "0 layers"),
        ({"predictor": "lstm", "predictor_size": True}, "size True"),
        ({"joint_size": 0}, "joint_size is 0"),
        ({"joint_size": None}, "joint_size is None"),
        ({"blank_index": 9}, "blank_index is 9 and there are 9 tokens"),
    ],
)
def test_what_no_transducer_can_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        Transducer(D, V, **keys)
