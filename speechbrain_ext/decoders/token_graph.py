"""Tables that add to the scores of a beam search by tokens: phrases that matter to the user, and n-grams of tokens.

A graph is a deterministic automaton with a state for each hypothesis, a number. It says what each next token adds to the score
and where it leads, and what the end of the text adds. Several graphs are a list of them, with a column of states each.
"""

import torch
from torch import nn

LARGEST_TABLE = 50_000_000
"""States times tokens, 600 MB."""


class TokenGraph(nn.Module):
    """One automaton.

    Arguments
    ---------
    following : torch.Tensor
        (S, V) int32: the state after each token; state 0 begins a text.
    added : torch.Tensor
        (S, V) what each token adds to the score, 0 for the blank.
    ends : torch.Tensor
        (S,) what the end of the text adds.

    Example
    -------
    >>> graph = TokenGraph(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.0, 2.0], [0.0, 0.5]]), torch.tensor([0.0, -1.0]))
    >>> places = begin([graph], 1)
    >>> added([graph], places)
    tensor([[0., 2.]])
    >>> ends([graph], advance([graph], places, torch.tensor([1])))
    tensor([-1.])
    """

    def __init__(self, following, added, ends):
        super().__init__()
        for name, table in (("following", following.int()), ("added", added.float()), ("ends", ends.float())):
            self.register_buffer(name, table, persistent=False)


def begin(graphs, number, device=None):
    """The states (N, G) of hypotheses without a token."""
    for graph in graphs:
        graph.to(device)
    return torch.zeros(number, len(graphs), dtype=torch.long, device=device)


def added(graphs, places):
    """What each next token adds (..., V) to hypotheses in these states (..., G)."""
    return sum(graph.added[place] for graph, place in zip(graphs, places.unbind(-1), strict=True))


def advance(graphs, places, tokens):
    """The states after these tokens (...)."""
    if not graphs:
        return places
    after = [graph.following[place, tokens] for graph, place in zip(graphs, places.unbind(-1), strict=True)]
    return torch.stack(after, -1).long()


def ends(graphs, places):
    """What the end of the text adds (...)."""
    if not graphs:
        return places.new_zeros(places.shape[:-1], dtype=torch.float32)
    return sum(graph.ends[place] for graph, place in zip(graphs, places.unbind(-1), strict=True))
