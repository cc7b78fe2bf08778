"""Rescoring of the n-best texts of CTC: the attention decoder scores each text at once, without a loop over its tokens.

This is the two-pass decoding of U2 (Zhang et al. 2020, https://arxiv.org/abs/2012.05481). The score is that of the joint search:
the weighted sum of decoder, CTC, language model and phrases.
"""

import torch

from speechbrain_ext.decoders import token_graph
from speechbrain_ext.decoders.beams import best_of
from speechbrain_ext.utils.errors import UserError

SCORERS = "ctc", "transformerlm", "rnnlm"
"""Scorers of a joint search that can also score whole texts."""


@torch.no_grad()
def rescore(search, frames, nbest, pad=0):
    """Score texts as a joint search would.

    Arguments
    ---------
    search : S2STransformerBeamSearcher
        The joint search of :mod:`speechbrain_ext.decoders.searchers`.
    frames : torch.Tensor
        (T, D) encoder frames of an utterance.
    nbest : list of Hypothesis
        N texts of :func:`speechbrain_ext.decoders.ctc_nbest.ctc_nbest`, found with the token graphs of the search.
    pad : int
        The token that pads texts.

    Returns
    -------
    list of float
        The score of each text, divided by its length if the search does so.
    int
        The index of the best text.

    Raises
    ------
    UserError
        If the search has other scorers than :data:`SCORERS`.
    """
    check_scorers(search)
    device = frames.device
    lengths = torch.tensor([len(text.tokens) for text in nbest], device=device)
    texts = torch.full((len(nbest), int(lengths.max()) + 1), pad)
    for row, text in zip(texts, nbest, strict=True):
        row[: len(text.tokens)] = torch.tensor(text.tokens, dtype=torch.long)
    texts = texts.to(device)
    begun = torch.cat((torch.full_like(texts[:, :1], search.bos_index), texts[:, :-1]), 1)  # (N, U + 1)
    wanted = texts.scatter(1, lengths.unsqueeze(1), search.eos_index)
    is_said = torch.arange(texts.shape[1], device=device) <= lengths.unsqueeze(1)
    bonus, rewards = (
        _of_graphs([graph for graph in search.graphs if graph.is_reward or not only_rewards], texts, is_said[:, 1:])
        for only_rewards in (False, True)
    )
    ctc = torch.tensor([text.score for text in nbest], device=device) - bonus

    def total(log_probs):
        return log_probs.gather(2, wanted.unsqueeze(2)).squeeze(2).masked_fill(~is_said, 0.0).sum(1)

    decoded = search.model.decode_targets(begun, frames.expand(len(nbest), -1, -1), pad_idx=pad)
    score = search.attn_weight * total(search.softmax(search.fc(decoded) / search.temperature)) + bonus
    for name, scorer in ({} if search.scorer is None else search.scorer.full_scorers | search.scorer.partial_scorers).items():
        if name == "ctc":
            score += search.scorer.weights[name] * ctc
        elif name in ("transformerlm", "rnnlm"):
            memory, steps = None, []
            scorer.lm.to(device)
            for token in begun.unbind(1):
                log_probs, memory = scorer.score(token, memory, None, None)
                steps.append(log_probs)
            score += search.scorer.weights[name] * total(torch.stack(steps, 1))
    lengths = (lengths + 1 if search.length_normalization else torch.ones_like(lengths)).tolist()
    best = best_of(lengths, score.tolist(), rewards.tolist())
    return [each / length for each, length in zip(score.tolist(), lengths, strict=True)], best


def _of_graphs(graphs, texts, is_said):
    """The scores (N,) that graphs add to whole texts (N, U + 1); ``is_said`` (N, U) is False in the padding."""
    total, places = torch.zeros(len(texts), device=texts.device), token_graph.begin(graphs, len(texts), texts.device)
    for token, counts in zip(texts.unbind(1), is_said.unbind(1), strict=False) if graphs else ():
        total += torch.where(counts, token_graph.added(graphs, places).gather(1, token.unsqueeze(1)).squeeze(1), 0.0)
        places = torch.where(counts.unsqueeze(1), token_graph.advance(graphs, places, token), places)
    return total + token_graph.ends(graphs, places)


def check_scorers(search):
    """Refuse a joint search with scorers that rescoring would leave out, such as SpeechBrain's coverage; see :func:`rescore`."""
    weights = {} if search.scorer is None else search.scorer.weights
    if others := [name for name, weight in weights.items() if weight and name not in SCORERS]:
        raise UserError(
            f"The model's search has the scorer {others[0]}, which ctc_rescored cannot use; choose joint_beam or ctc_beam."
        )
