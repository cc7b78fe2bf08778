"""The most probable token sequences under CTC, for rescoring and with token graphs.

Prefix beam search (Hannun et al. 2014, https://arxiv.org/abs/1408.2873) of all utterances of a batch at once. The searches of
:mod:`speechbrain_ext.decoders.ctc_beam` give one text, and take no token graphs.
"""

import math

import torch

from speechbrain_ext.decoders import token_graph
from speechbrain_ext.decoders.beams import HASH, Hypothesis, choose, trace
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.utils.errors import UserError

TOKENS_PER_FRAME = 16
"""Number of tokens that are tried in a frame, as in the other searches."""
UNUSED = torch.iinfo(torch.long).max
"""In place of the hashes of unused places of a beam."""


@torch.no_grad()
def ctc_nbest(log_probs, lens, blank=0, beam_size=16, excluded=(), graphs=()):
    """Find the most probable texts of each utterance with a prefix beam search.

    Arguments
    ---------
    log_probs : torch.Tensor
        (B, T, V) log-probabilities of a CTC model.
    lens : torch.Tensor
        (B,) relative lengths.
    blank : int
        The blank token.
    beam_size : int
        Number of texts that are kept.
    excluded : sequence of int
        Tokens that are not allowed in texts.
    graphs : sequence of TokenGraph
        Their scores are added to the log-probabilities.

    Returns
    -------
    list of list of Hypothesis
        The texts of each utterance, the best first.

    Raises
    ------
    UserError
        If a frame holds NaN.

    Example
    -------
    >>> frame = torch.tensor([0.6, 0.4]).log()  # the blank, and "A"
    >>> (texts,) = ctc_nbest(frame.expand(1, 2, 2), torch.ones(1))
    >>> [(text.tokens, round(math.exp(text.score), 2)) for text in texts]
    [([1], 0.64), ([], 0.36)]
    """
    (batch, count, tokens), device, log_probs = log_probs.shape, log_probs.device, log_probs.float()
    lengths = absolute_lengths(lens, count).to(device)
    labels = log_probs.index_fill(2, torch.tensor([blank, *excluded], device=device), -math.inf)
    values, candidates = labels.topk(min(TOKENS_PER_FRAME, tokens), -1)  # (B, T, C)
    in_blank = torch.full((batch, beam_size), -math.inf, device=device)
    in_blank[:, 0] = 0.0
    in_label, bonus = torch.full_like(in_blank, -math.inf), torch.zeros_like(in_blank)
    hashes, last = torch.zeros_like(in_blank, dtype=torch.long), torch.full_like(in_blank, blank, dtype=torch.long)
    places = token_graph.begin(graphs, batch * beam_size, device).view(batch, beam_size, -1)
    own, steps = torch.arange(beam_size, device=device).expand(batch, -1), []
    for frame in range(count):
        tried, said = values[:, frame].unsqueeze(1), candidates[:, frame].unsqueeze(1).expand(-1, beam_size, -1)  # (B, K, C)
        total = in_blank.logaddexp(in_label)
        stays = in_label + log_probs[:, frame].gather(1, last).masked_fill(last == blank, -math.inf)
        goes = torch.where(said == last.unsqueeze(2), in_blank.unsqueeze(2), total.unsqueeze(2)) + tried
        keys = hashes.unsqueeze(2) * HASH + said + 1
        # Merge an extended text with the same text if it is already in the beam; at most one is the same
        in_beam, member = hashes.masked_fill(total == -math.inf, UNUSED).sort(1)
        flat, wanted = goes.flatten(1), keys.flatten(1)
        found = torch.searchsorted(in_beam, wanted).clamp(max=beam_size - 1)
        same = (in_beam.gather(1, found) == wanted) & (wanted != UNUSED)
        merged = torch.full_like(stays, -math.inf)
        merged.scatter_reduce_(1, member.gather(1, found), flat.masked_fill(~same, -math.inf), "amax")
        stays = stays.logaddexp(merged)
        flat = flat.masked_fill(same, -math.inf)
        blanks = total + log_probs[:, frame, blank].unsqueeze(1)
        gained = token_graph.added(graphs, places).gather(2, said).flatten(1) if graphs else torch.zeros_like(flat)
        gained = gained + bonus.repeat_interleave(said.shape[2], 1)
        ranked = torch.cat((blanks.logaddexp(stays) + bonus, flat + gained), 1)
        at_end = token_graph.settled(graphs, places)
        if at_end is not None:  # after the blank, it is that of the state
            at_end = torch.cat((at_end[..., blank], at_end.gather(2, said).flatten(1)), 1)
        chosen = choose(ranked, at_end, beam_size)  # K that stay, K * C that are extended
        goes_on = chosen >= beam_size
        place = (chosen - beam_size).clamp(min=0)
        parents = torch.where(goes_on, place // said.shape[2], chosen.clamp(max=beam_size - 1))
        token = torch.where(goes_on, said.flatten(1).gather(1, place), blank)
        valid = (frame < lengths).unsqueeze(1)
        goes_on, parents, token = goes_on & valid, torch.where(valid, parents, own), torch.where(valid, token, blank)
        # Finished utterances do not change
        blanks, stays = torch.where(valid, blanks, in_blank), torch.where(valid, stays, in_label)
        choice = goes_on, place, parents
        in_blank, in_label = _follow(*choice, torch.full_like(flat, -math.inf), blanks), _follow(*choice, flat, stays)
        bonus, hashes = _follow(*choice, gained, bonus), _follow(*choice, keys.flatten(1), hashes)
        last = _follow(*choice, said.flatten(1), last)
        places = places.gather(1, parents.unsqueeze(2).expand_as(places))
        places = torch.where(goes_on.unsqueeze(2), token_graph.advance(graphs, places, token), places)
        steps.append(torch.cat((parents, token, torch.full_like(parents[:, :1], frame)), 1))
    scores = in_blank.logaddexp(in_label) + bonus + token_graph.ends(graphs, places)
    steps = torch.stack(steps, 1).tolist() if steps else [[]] * batch
    found = []
    for row, row_steps in zip(scores.tolist(), steps, strict=True):
        texts = []
        for rank in sorted((k for k in range(beam_size) if row[k] > -math.inf), key=lambda k: -row[k]):
            said = trace(row_steps, rank, beam_size, blank)[1:]
            texts.append(Hypothesis([token for token, _ in said], [at for _, at in said], row[rank]))
        if not texts:
            raise UserError("The log-probabilities hold NaN or infinity; take an earlier checkpoint of the model.")
        found.append(texts)
    return found


def _follow(goes_on, place, parents, going, staying):
    """Values (B, K) of the chosen hypotheses, from those of extended texts (B, K * C) and of texts that stay (B, K)."""
    return torch.where(goes_on, going.gather(1, place), staying.gather(1, parents))
