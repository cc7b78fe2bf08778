"""The transducer's loss, pruned or full, on a lattice of two symbols.

The sum over alignments needs only the log-probabilities of a blank and of the next label at each frame and label,
(B, T, U + 1, 2). Its gradient is minus the posterior of each arc. The logits (B, T, U + 1, V) and their gradient therefore never
exist as a whole, and PyTorch code can change the arcs. ``torchaudio.functional.rnnt_loss`` gives the same values. On CUDA the
host waits three times in each of its calls, to compare lengths; the sums here do not wait.

The pruned loss is that of k2 (Kuang et al. 2022, https://arxiv.org/abs/2206.13236). A joint network that only adds two linear
layers has a lattice that costs two matrix products. Its posteriors show the few labels that are likely at each frame, and the
real joint network is computed for these labels only.
"""

import itertools
import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from speechbrain_ext.lobes.precision import widest
from speechbrain_ext.utils.errors import UserError, is_number, is_whole

KINDS = ("pruned", "full")
UNREACHABLE = -1e4
"""Log-probability of arcs outside of a band: sums stay finite, and gradients are zero there."""
OUTSIDE = -1e5
"""Log-probability of arcs outside of an utterance, lower than that of arcs outside of a band."""
SIMPLE_SCALE, FIRST_PRUNED_SCALE = 0.5, 0.1
"""Final weight of the simple loss, and first weight of the pruned loss, as in icefall."""
ALONE = 0.01
"""Weight of the simple loss if it teaches only its own weights: enough for Adam, and too little to change a clipped gradient."""
COPIES = 2, 3
"""Largest number of copies of logits, and of the joint network's hidden layer, in forward and backward of a slice."""


class _Lattice(torch.autograd.Function):
    """Losses, and the posteriors of the arcs. The gradient is minus the posteriors."""

    @staticmethod
    def forward(ctx, arcs, frames, labels):
        losses, posteriors = _sums(arcs, frames, labels)
        ctx.save_for_backward(posteriors)
        ctx.mark_non_differentiable(posteriors)
        return losses, posteriors

    @staticmethod
    def backward(ctx, losses, _):
        (posteriors,) = ctx.saved_tensors
        return -losses.view(-1, 1, 1, 1) * posteriors, None, None


def _sums(arcs, frames, labels):
    """Losses (B,) and posteriors (B, T, U + 1, 2)."""
    frames, labels = frames.unsqueeze(1), labels.unsqueeze(1)
    time, place = (torch.arange(size, device=arcs.device) for size in arcs.shape[1:3])
    inside = (time < frames).unsqueeze(2) & (place <= labels).unsqueeze(1)
    following = inside & (place < labels).unsqueeze(1)
    # Values after the end of an utterance may be anything, also NaN
    blanks, emitted = (torch.where(*pair, OUTSIDE) for pair in zip((inside, following), widest(arcs).unbind(-1), strict=True))

    def turned(x):
        """Reverse frames and labels of each utterance. Twice gives the original."""
        x = x.gather(1, (frames - 1 - time).clamp(min=0).unsqueeze(2).expand_as(x))
        return x.gather(2, (labels - place).clamp(min=0).unsqueeze(1).expand_as(x))

    # Sums from the beginning and from the end are one computation on a batch of twice the size, frame by frame: with E(u) the
    # sum of the labels' arcs up to u, x(u) = score(u) - E(u) is a cumulative sum over the labels
    blanks_before = torch.cat((nn.functional.pad(blanks[:, :-1], (0, 0, 1, 0)), turned(blanks)))
    emitted_before = torch.cat((nn.functional.pad(emitted[..., :-1], (1, 0)), turned(emitted)))
    emitted_before[..., 0] = 0.0
    base = emitted_before.cumsum(2)
    steps = blanks_before + nn.functional.pad(base[:, :-1], (0, 0, 1, 0)) - base
    x, sums = torch.full_like(base[:, 0], -math.inf), []
    x[:, 0] = 0.0
    for step in steps.unbind(1):
        x = (x + step).logcumsumexp(1)
        sums.append(x)
    before, after = (torch.stack(sums, 1) + base).chunk(2)
    after = turned(after).masked_fill(~inside, -math.inf)
    total = after[:, :1, :1]
    ends = (time == frames - 1).unsqueeze(2) & (place == labels).unsqueeze(1)
    behind_blanks = nn.functional.pad(after[:, 1:], (0, 0, 0, 1), value=-math.inf).masked_fill(ends, 0.0)
    behind_labels = nn.functional.pad(after[..., 1:], (0, 1), value=-math.inf)
    through = torch.stack((before + blanks + behind_blanks, before + emitted + behind_labels), -1)
    posteriors = (through - total.unsqueeze(3)).exp().masked_fill(~inside.unsqueeze(3), 0.0)
    return -total.flatten().to(arcs.dtype), posteriors.to(arcs.dtype)


@torch.compiler.disable
def lattice_loss(arcs, frames, labels):
    """Minus the log-probability of all alignments together.

    Arguments
    ---------
    arcs : torch.Tensor
        (B, T, U + 1, 2) log-probabilities, at each frame and number of labels, of the blank and of the next label. Values after
        an utterance's frames or labels have no influence, and get no gradient.
    frames : torch.Tensor
        (B,) numbers of frames, from 1 to T.
    labels : torch.Tensor
        (B,) numbers of labels, from 0 to U.

    Returns
    -------
    tuple
        Losses (B,), and the posteriors (B, T, U + 1, 2) of the arcs, which carry no gradient.

    Example
    -------
    >>> arcs = torch.full((1, 2, 2, 2), 0.5).log()  # one label in two frames: two alignments of three arcs
    >>> losses, posteriors = lattice_loss(arcs, torch.tensor([2]), torch.tensor([1]))
    >>> losses.neg().exp().item(), posteriors[0, :, 0, 1].tolist()
    (0.25, [0.5, 0.5])
    """
    return _Lattice.apply(arcs.float(), frames, labels)


def simple_arcs(frame_scores, label_scores, targets, blank=0):
    """Arcs of a joint network that adds its inputs, without a tensor (B, T, U + 1, V).

    Arguments
    ---------
    frame_scores : torch.Tensor
        (B, T, V).
    label_scores : torch.Tensor
        (B, U + 1, V).
    targets : torch.Tensor
        (B, U).
    blank : int
        The blank token.

    Returns
    -------
    torch.Tensor
        (B, T, U + 1, 2), as in :func:`lattice_loss`.

    Example
    -------
    >>> frame_scores, label_scores, targets = torch.randn(2, 6, 9), torch.randn(2, 4, 9), torch.randint(1, 9, (2, 3))
    >>> log_probs = (frame_scores.unsqueeze(2) + label_scores.unsqueeze(1)).log_softmax(-1)
    >>> torch.allclose(simple_arcs(frame_scores, label_scores, targets)[..., 0], log_probs[..., 0], atol=1e-5)
    True
    """
    high, low = frame_scores.amax(-1, keepdim=True), label_scores.amax(-1, keepdim=True)  # exp() neither over- nor underflows
    product = (frame_scores - high).exp() @ (label_scores - low).exp().transpose(1, 2)
    norm = (product + torch.finfo(product.dtype).tiny).log() + high + low.transpose(1, 2)
    following = nn.functional.pad(targets, (0, 1))  # no label follows the last one, and the value is not used
    blanks = frame_scores[..., blank].unsqueeze(2) + label_scores[..., blank].unsqueeze(1)
    emitted = frame_scores.gather(2, following.unsqueeze(1).expand(-1, frame_scores.shape[1], -1))
    emitted = emitted + label_scores.gather(2, following.unsqueeze(2)).transpose(1, 2)
    return torch.stack((blanks - norm, emitted - norm), -1)


def pruning_band(posteriors, frames, labels, width):
    """The first label of each frame's window.

    Each frame takes the window of ``width`` labels with most of its posterior. The first window begins before the first label,
    the last window ends at the last label. Windows never move back, and they overlap: there is always a path through them.

    Arguments
    ---------
    posteriors : torch.Tensor
        (B, T, U + 1, 2) of :func:`lattice_loss`.
    frames, labels : torch.Tensor
        (B,) numbers of frames and labels.
    width : int
        Number of labels, from 2 to U + 1.

    Returns
    -------
    torch.Tensor
        (B, T).

    Example
    -------
    >>> arcs = torch.full((1, 4, 4, 2), 0.5).log()
    >>> frames, labels = torch.tensor([4]), torch.tensor([3])
    >>> pruning_band(lattice_loss(arcs, frames, labels)[1], frames, labels, width=2)
    tensor([[0, 1, 2, 2]])
    """
    blanks, emitted = posteriors.unbind(-1)
    sums = nn.functional.pad(blanks.cumsum(2), (1, 0))
    inside = sums[..., width:] - sums[..., :-width]  # (B, T, U + 2 - width), blanks inside the window
    entered = nn.functional.pad(emitted, (1, 0))[..., : inside.shape[2]]  # the label that enters the window
    first = (inside - entered).argmax(2)
    last = (labels - width + 1).clamp(min=0).unsqueeze(1)
    time = torch.arange(first.shape[1], device=first.device)
    first = torch.where(time < (frames - 1).unsqueeze(1), first.minimum(last), last)
    first = first.flip(1).cummin(1).values.flip(1)  # windows never move back
    # Windows move on by at most width - 1 labels per frame, from no label in the first frame
    slack = (width - 1) * time - first
    return (width - 1) * time - slack.flip(1).cummin(1).values.flip(1).clamp(min=0)


class TransducerLoss(nn.Module):
    """The loss of a :class:`speechbrain_ext.lobes.transducer.Transducer`, mean over utterances.

    Arguments
    ---------
    d_model : int
        Width D of encoder frames.
    predictor_size : int
        Width P of the predictor.
    vocab_size : int
        Number of tokens V.
    kind : str
        "pruned" or "full".
    prune_range : int
        Number of labels per frame in the pruned loss.
    warmup : int, optional
        Optimizer steps in which weight moves from the simple to the pruned loss. At first the posteriors are random. None is for
        a transducer that is trained already: the pruned loss has its full weight at once, and the simple one chooses its labels
        and teaches neither encoder nor predictor.
    fastemit : float
        FastEmit (Yu et al. 2021, https://arxiv.org/abs/2010.11148): the gradient of labels is larger by this share, and
        labels come earlier; 0.001 to 0.01, 0 = off.
    delay_penalty : float
        Added to the log-probability of a label for each frame before the middle of the utterance, and subtracted after it. It
        also makes labels come earlier (Kang et al. 2022, https://arxiv.org/abs/2211.00490); 0.001 to 0.01, 0 = off.
    joint_memory : float
        MiB that logits and hidden layer of the joint network may take. If they need more, frames are computed in slices, and
        again for the gradient: a third more time.

    Raises
    ------
    UserError
        If the kind of loss is unknown, or a number is impossible.

    Example
    -------
    >>> from speechbrain_ext.lobes.transducer import Transducer
    >>> transducer = Transducer(d_model=16, vocab_size=30, predictor_size=8, joint_size=12)
    >>> loss = TransducerLoss(d_model=16, predictor_size=8, vocab_size=30)
    >>> frames, lengths, targets = torch.rand(2, 50, 16), torch.tensor([50, 40]), torch.randint(1, 30, (2, 7))
    >>> loss(transducer, frames, lengths, targets, torch.tensor([6, 7])).backward()
    """

    def __init__(
        self,
        d_model,
        predictor_size,
        vocab_size,
        kind="pruned",
        prune_range=5,
        warmup=2000,
        fastemit=0.0,
        delay_penalty=0.0,
        joint_memory=2048.0,
    ):
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"Unknown transducer_loss '{kind}'; the known ones are: {', '.join(KINDS)}.")
        if not is_whole(prune_range, 2):
            raise UserError(f"prune_range is {prune_range!r}; give 2 labels or more, as a frame has to reach the next one.")
        numbers = {"fastemit": fastemit, "delay_penalty": delay_penalty, "transducer_warmup": 0 if warmup is None else warmup}
        for name, value in numbers.items():
            if not is_number(value, 0):
                raise UserError(f"{name} is {value!r}; give a number of 0 or more.")
        if not is_number(joint_memory, 0) or not joint_memory:
            raise UserError(f"joint_memory is {joint_memory!r}; give a number of MiB above 0.")
        self.prune_range, self.warmup, self.joint_memory = prune_range, warmup, joint_memory
        self.fastemit, self.delay_penalty = fastemit, delay_penalty
        self.is_pruned = kind == "pruned"
        if self.is_pruned:
            self.frame_scores = nn.Linear(d_model, vocab_size)
            self.label_scores = nn.Linear(predictor_size, vocab_size)

    @torch.no_grad()
    def start_from(self, ctc_head):
        """Choose the labels of the pruned loss with a trained CTC head, where they would be random at first.

        Arguments
        ---------
        ctc_head : torch.nn.Module
            A linear layer from frames (B, T, D) to the scores of tokens (B, T, V). Of any other head nothing is taken.

        Example
        -------
        >>> loss, head = TransducerLoss(d_model=16, predictor_size=8, vocab_size=30), nn.Linear(16, 30)
        >>> loss.start_from(head)
        >>> torch.equal(loss.frame_scores.weight, head.weight)
        True
        """
        given = list(ctc_head.parameters())
        if self.is_pruned and [value.shape for value in given] == [own.shape for own in self.frame_scores.parameters()]:
            for own, value in zip(self.frame_scores.parameters(), given, strict=True):
                own.copy_(value)
            for own in self.label_scores.parameters():
                own.zero_()

    def fits(self, frames, tokens):
        """Whether numbers of frames have an alignment with numbers of tokens, as ints or tensors. An alignment has any number of
        tokens per frame, and in the pruned loss one less than ``prune_range``."""
        return (frames > 0) & (tokens <= frames * (self.prune_range - 1 if self.is_pruned else math.inf))

    def forward(self, transducer, frames, lengths, targets, target_lengths, step=None):
        """The loss.

        The loss of utterances without an alignment counts as 0, as in SpeechBrain's CTC loss; see :meth:`fits`.

        Arguments
        ---------
        transducer : Transducer
            Predictor and joint network.
        frames : torch.Tensor
            (B, T, D) encoder frames.
        lengths : torch.Tensor
            (B,) numbers of frames.
        targets : torch.Tensor
            (B, U) tokens, padded with any token.
        target_lengths : torch.Tensor
            (B,) numbers of tokens.
        step : int, optional
            Optimizer steps so far, for the warm-up; without it the final weights apply.

        Returns
        -------
        torch.Tensor
            (), float32. With the pruned kind, training gives the sum with the simple loss, evaluation the pruned loss alone.
        """
        fits = self.fits(lengths, target_lengths)
        sizes = lengths.clamp(min=1), target_lengths
        outputs = transducer.predictor(targets)  # (B, U + 1, P)
        projected = transducer.project_frames(frames).unsqueeze(2), transducer.project_outputs(outputs)
        if not self.is_pruned:
            arcs = self._arcs(transducer, *projected, targets)
            return self._mean(*sizes, arcs, fits)
        with torch.autocast(frames.device.type, enabled=False):
            given = (frames.detach(), outputs.detach()) if self.warmup is None else (frames, outputs)
            scores = self.frame_scores(given[0].float()), self.label_scores(given[1].float())
            arcs = self._earlier(simple_arcs(*scores, targets, transducer.blank_index), lengths)
            simple, posteriors = lattice_loss(arcs, *sizes)
            first = pruning_band(posteriors, *sizes, min(self.prune_range, targets.shape[1] + 1))
        arcs = self._arcs(transducer, *projected, targets, first)
        pruned = self._mean(*sizes, arcs, fits)
        if not self.training:
            return pruned
        simple = torch.where(lengths > 0, simple, 0.0).mean()
        if self.warmup is None:
            return pruned + ALONE * simple
        share = 1.0 if step is None else min(1.0, step / max(1, self.warmup))
        return (1 - share * (1 - SIMPLE_SCALE)) * simple + (FIRST_PRUNED_SCALE + share * (1 - FIRST_PRUNED_SCALE)) * pruned

    def _mean(self, lengths, target_lengths, arcs, fits):
        losses, _ = lattice_loss(self._earlier(arcs, lengths), lengths, target_lengths)
        return torch.where(fits, losses, 0.0).mean()

    def _earlier(self, arcs, lengths):
        """Arcs that make labels come earlier."""
        if not self.fastemit and not self.delay_penalty:
            return arcs
        blanks, emitted = arcs.unbind(-1)
        emitted = emitted + self.fastemit * (emitted - emitted.detach())
        late = torch.arange(arcs.shape[1], device=arcs.device) - (lengths.unsqueeze(1) - 1) / 2
        return torch.stack((blanks, emitted - self.delay_penalty * late.unsqueeze(2)), -1)

    def _arcs(self, transducer, frames, outputs, targets, first=None):
        """Arcs (B, T, U + 1, 2) of the joint network on frames (B, T, 1, J) and outputs (B, U + 1, J). With the first label
        (B, T) of a band, only arcs in that band are computed."""
        count, width = frames.shape[1], outputs.shape[1]
        following = nn.functional.pad(targets, (0, 1))
        if first is None:
            places, outputs, following = None, outputs.unsqueeze(1), following.unsqueeze(1).expand(-1, count, -1)
        else:
            places = first.unsqueeze(2) + torch.arange(min(self.prune_range, width), device=first.device)  # (B, T, R)
            flat = places.flatten(1)
            following = following.gather(1, flat).view_as(places)
            outputs = outputs.gather(1, flat.unsqueeze(2).expand(-1, -1, outputs.shape[2])).unflatten(1, places.shape[1:])
        copies = COPIES[0] * transducer.out.out_features + COPIES[1] * transducer.out.in_features
        frame_bytes = 4 * following[:, 0].numel() * copies
        size = max(1, int(self.joint_memory * 2**20 / frame_bytes))
        if size >= count:
            arcs = _joint_arcs(transducer, frames, outputs, following)
        else:
            sliced = frames.split(size, 1), outputs.split(size, 1), following.split(size, 1)
            sliced = zip(*(parts if len(parts) > 1 else itertools.repeat(parts[0]) for parts in sliced), strict=False)
            keys = {"use_reentrant": False, "preserve_rng_state": False}  # no random numbers are drawn
            arcs = torch.cat([checkpoint(_joint_arcs, transducer, *parts, **keys) for parts in sliced], 1)
        if places is None:
            return arcs
        whole = arcs.new_full((len(arcs), count, width, 2), UNREACHABLE)
        return whole.scatter(2, places.unsqueeze(3).expand(-1, -1, -1, 2), arcs)


def _joint_arcs(transducer, frames, outputs, following):
    """Log-probabilities (B, T, R, 2) of the blank and of the following labels (B, T, R)."""
    return _PairOfLogProbs.apply(transducer.join(frames, outputs).float(), following, transducer.blank_index)


class _PairOfLogProbs(torch.autograd.Function):
    """The log-probabilities of two tokens, with one tensor (..., V) for the gradient instead of PyTorch's four."""

    @staticmethod
    def forward(ctx, logits, following, blank):
        norm = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, norm, following.unsqueeze(-1))
        ctx.blank = blank
        return torch.cat((logits[..., blank : blank + 1], logits.gather(-1, following.unsqueeze(-1))), -1) - norm

    @staticmethod
    def backward(ctx, arcs):
        logits, norm, following = ctx.saved_tensors
        gradient = (logits - norm).exp_().mul_(-arcs.sum(-1, keepdim=True))
        gradient[..., ctx.blank] += arcs[..., 0]
        return gradient.scatter_add_(-1, following, arcs[..., 1:]), None, None
