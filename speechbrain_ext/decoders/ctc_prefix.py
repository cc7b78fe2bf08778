"""CTC scores of the prefixes of a joint search (Watanabe et al. 2017, https://www.merl.com/publications/docs/TR2017-190.pdf).

The score of a prefix g followed by a token c is the probability of all alignments that begin with it. It takes two sums over
frames t. With r(t) the probability that the frames up to t are an alignment of g, which ends in c or blank::

    score of g + c:        psi = sum over t of phi(t - 1) * p(c, t)            phi = r of g, or if g ends in c, r of g in blank
    alignments of g + c:   r_c(t) = (r_c(t - 1) + phi(t - 1)) * p(c, t)
                           r_blank(t) = (r_blank(t - 1) + r_c(t - 1)) * p(blank, t)

SpeechBrain runs the recursion of the second and third line for every candidate c, frame by frame in Python. But only the score
ranks candidates, so the recursion is needed only for the chosen ones, one per hypothesis. It is linear: with P(t) the product of
p up to t, r_c(t) = P(t) * sum over s <= t of phi(s - 1) / P(s - 1). That is a cumulative sum over all frames at once, here of
logarithms and in float64 because P gets small. SpeechBrain's recursion rounds to float32 in each frame. For scores of minus
several hundred, its recursion in float64 agrees with this one; in float32 it may find another hypothesis.
"""

from types import SimpleNamespace

import torch
from speechbrain.decoders import scorer

from speechbrain_ext.lobes.masks import padding_mask
from speechbrain_ext.lobes.precision import widest
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.errors import UserError

_MINUS_INF = -1e20  # SpeechBrain's score of impossible tokens
_NEVER = -1e7  # replaces -inf in a cumulative sum, where -inf would make all later values useless


class PrefixScores:
    """CTC scores of the hypotheses of a search, step by step.

    Arguments
    ---------
    log_probs : torch.Tensor
        (B, T, V) log-probabilities of the CTC head.
    lengths : torch.Tensor
        (B,) numbers of valid frames.
    blank_index, eos_index : int
        Tokens.

    Example
    -------
    >>> log_probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]).log()
    >>> prefixes = PrefixScores(log_probs.unsqueeze(0), torch.tensor([2]), blank_index=0, eos_index=2)
    >>> prefixes.score(torch.tensor([2]))[:, 1].exp()  # that the text begins with token 1: by 0.3, or by 0.6 * 0.7
    tensor([0.7200])
    """

    def __init__(self, log_probs, lengths, blank_index, eos_index):
        self.blank_index, self.eos_index = blank_index, eos_index
        self.padding = padding_mask(lengths, log_probs.shape[1])  # (B, T)
        # Frames are the last axis, so that those of a candidate are contiguous
        self.log_probs = log_probs.transpose(1, 2).contiguous().masked_fill(self.padding.unsqueeze(1), 0.0)  # (B, V, T)
        self.last_frame = (lengths.long() - 1) % log_probs.shape[1]
        self.in_blank = None
        """(B * K, T) log-probability that the frames up to t are an alignment of the prefix that ends in blank."""
        self.in_token = None
        """(B * K, T) the same for alignments that end in the last token."""
        self.psi = 0.0
        """(B * K, 1) log-probability of the prefix."""

    def score(self, tokens, candidates=None):
        """The change of each hypothesis's score by each token.

        Arguments
        ---------
        tokens : torch.Tensor
            (B * K,) the last token of each hypothesis, at first bos.
        candidates : torch.Tensor, optional
            (B * K, C) tokens to score, others are impossible; None = all.

        Returns
        -------
        torch.Tensor
            (B * K, V) log-probabilities.
        """
        batch, vocab, frames = self.log_probs.shape
        beam = len(tokens) // batch
        is_empty = self.in_blank is None
        if is_empty:
            self.batch = torch.arange(batch, device=tokens.device).repeat_interleave(beam)  # (B * K,)
            self.in_blank = self._blank_log_probs().cumsum(-1)
            self.in_token = torch.full_like(self.in_blank, -torch.inf)
        self.tokens = tokens
        ends = torch.logaddexp(self.in_token, self.in_blank)
        self.before = self._shift(ends, 0.0 if is_empty else -torch.inf)
        self.before_same = self._shift(self.in_blank, 0.0 if is_empty else -torch.inf)

        rows = self.log_probs.flatten(0, 1)  # (B * V, T)
        same = self._sum(self.before_same, rows[self.batch * vocab + tokens].unsqueeze(1))
        if candidates is None:
            candidates = torch.arange(vocab, device=tokens.device)
            per_utterance = self.before.unflatten(0, (batch, beam))
            psi = self._sum(per_utterance, self.log_probs.unsqueeze(1)).flatten(0, 1)
            self.psi_next = torch.where(candidates == tokens.unsqueeze(1), same, psi)
        else:
            psi = self._sum(self.before, rows[self.batch.unsqueeze(1) * vocab + candidates])
            psi = torch.where(candidates == tokens.unsqueeze(1), same, psi)
            self.psi_next = psi.new_full((len(tokens), vocab), _MINUS_INF).scatter_(1, candidates, psi)
        # At the end of the text, all frames are an alignment of the prefix
        self.psi_next[:, self.eos_index] = ends.gather(1, self.last_frame[self.batch].unsqueeze(1)).squeeze(1)
        if self.eos_index != self.blank_index:
            self.psi_next[:, self.blank_index] = _MINUS_INF
        self.psi_next.clamp_(min=_MINUS_INF)
        return (self.psi_next - self.psi).to(self.log_probs.dtype)

    def extend(self, index):
        """Extend the chosen hypotheses by their next tokens, after :meth:`score`.

        Arguments
        ---------
        index : torch.Tensor
            (B, K) hypotheses with their next token, as ``hypothesis * V + token``; hypotheses count within the utterance.
        """
        batch, vocab, _ = self.log_probs.shape
        offset = torch.arange(batch, device=index.device).unsqueeze(1) * index.shape[1]
        hypotheses, tokens = (index // vocab + offset).flatten(), (index % vocab).flatten()
        self.psi = self.psi_next[hypotheses, tokens].unsqueeze(1)
        is_same = (tokens == self.tokens[hypotheses]).unsqueeze(1)
        before = torch.where(is_same, self.before_same[hypotheses], self.before[hypotheses])
        log_probs = widest(self.log_probs.flatten(0, 1)[self.batch * vocab + tokens])
        self.in_token = _linear_recursion(before, log_probs)
        self.in_blank = _linear_recursion(self._shift(self.in_token, -torch.inf), self._blank_log_probs())

    def _blank_log_probs(self):
        return widest(self.log_probs[:, self.blank_index])[self.batch]

    def _shift(self, x, first):
        """x(t - 1) from x(t); minus infinity in the padding."""
        shifted = torch.cat([torch.full_like(x[:, :1], first), x[:, :-1]], 1)
        return shifted.masked_fill(self.padding[self.batch], -torch.inf)

    @staticmethod
    def _sum(before, rows):
        """Log of the sum over frames of ``before`` (..., K, T) times ``rows`` (..., C, T) or with K before C: (..., K, C)."""
        # float32 is enough because errors do not add up over steps; relative to the peak because long prefixes have large scores
        peak = before.amax(-1, keepdim=True).clamp_min(_MINUS_INF)
        terms = rows + (before - peak).to(rows.dtype).unsqueeze(-2)
        largest = terms.amax(-1, keepdim=True).clamp_min_(_MINUS_INF)
        # On a CPU, denormal exponentials take 90 times as long; e^-80 adds nothing to a sum that contains 1
        total = (terms - largest).clamp_min_(-80.0).exp_().sum(-1)
        return widest(total.log_() + largest.squeeze(-1)) + peak


@loadable
class CTCScorer(scorer.CTCScorer):
    """SpeechBrain's CTCScorer without loops over frames and hypotheses; the scores are the same.

    Arguments
    ---------
    ctc_fc : torch.nn.Module
        The CTC head.
    blank_index, eos_index : int
        Tokens.
    ctc_window_size : int
        Must be 0: a window of frames would change the scores, and all frames take little time here.

    Raises
    ------
    ValueError
        If ``ctc_window_size`` is not 0.

    Example
    -------
    >>> from speechbrain.decoders.scorer import ScorerBuilder
    >>> head = torch.nn.Linear(8, 30)
    >>> ours = ScorerBuilder(full_scorers=[CTCScorer(head, 0, 2)], weights={"ctc": 0.4})
    >>> theirs = ScorerBuilder(full_scorers=[scorer.CTCScorer(head, 0, 2)], weights={"ctc": 0.4})
    >>> frames, lengths, bos, log_probs = torch.rand(1, 20, 8), torch.tensor([20]), torch.tensor([1]), torch.zeros(1, 30)
    >>> memories = [each.reset_scorer_mem(frames, lengths) for each in (ours, theirs)]
    >>> scores = [each.score(bos, memory, None, log_probs.clone(), 1)[0] for each, memory in zip((ours, theirs), memories)]
    >>> torch.allclose(*scores, atol=1e-4)
    True
    """

    ctc_score = SimpleNamespace(minus_inf=_MINUS_INF)  # all that ScorerBuilder reads; the state of a search is in its memory

    def __init__(self, ctc_fc, blank_index, eos_index, ctc_window_size=0):
        if ctc_window_size:
            raise UserError(f"ctc_window_size is {ctc_window_size}, but this scorer uses all frames; set it to 0.")
        super().__init__(ctc_fc, blank_index, eos_index)

    @torch.no_grad()
    def reset_mem(self, x, enc_lens):
        """The memory of a search over encoder frames ``x`` (B, T, D) with ``enc_lens`` (B,) valid ones."""
        return PrefixScores(self.ctc_fc(x).float().log_softmax(-1), enc_lens, self.blank_index, self.eos_index)

    @torch.no_grad()
    def score(self, inp_tokens, memory, candidates, attn):
        """The score (B * K, V) that each token adds, and the memory."""
        return memory.score(inp_tokens, candidates), memory

    @torch.no_grad()
    def permute_mem(self, memory, index):
        """The memory of the hypotheses ``index`` (B, K), ``hypothesis * V + token``."""
        memory.extend(index)
        return memory


def _linear_recursion(new, log_factor):
    """r(t) = (r(t - 1) + new(t)) * factor(t) along the last axis, in logarithms; both (..., T) in float64."""
    log_factor = log_factor.clamp_min(_NEVER)
    product = log_factor.cumsum(-1)
    r = product + (new - (product - log_factor)).logcumsumexp(-1)
    return r.masked_fill_(r < _NEVER / 2, -torch.inf)
