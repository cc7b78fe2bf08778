"""Token graphs, which add to the scores of a beam search over tokens: phrases and n-grams of tokens.

A graph is a deterministic automaton. Each hypothesis is in one of its states, a number. Tables give, for each state and next
token, the added score and the next state, and for each state the added score of the text's end. Functions take a list of graphs,
and states with a column for each graph.
"""

import torch
from torch import nn

LARGEST_TABLE = 50_000_000
"""Most states times tokens, 600 MB."""


class TokenGraph(nn.Module):
    """One automaton.

    Arguments
    ---------
    following : torch.Tensor
        (S, V) int32, the state after each token; state 0 begins a text.
    added : torch.Tensor
        (S, V) added score of each token, 0 for the blank.
    ends : torch.Tensor
        (S,) added score of the text's end.

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
    """The added score (..., V) of each next token, for hypotheses in the states ``places`` (..., G)."""
    return sum(graph.added[place] for graph, place in zip(graphs, places.unbind(-1), strict=True))


def advance(graphs, places, tokens):
    """The states (..., G) after the tokens (...)."""
    if not graphs:
        return places
    after = [graph.following[place, tokens] for graph, place in zip(graphs, places.unbind(-1), strict=True)]
    return torch.stack(after, -1).long()


def ends(graphs, places):
    """The added score (...) of the text's end."""
    if not graphs:
        return places.new_zeros(places.shape[:-1], dtype=torch.float32)
    return sum(graph.ends[place] for graph, place in zip(graphs, places.unbind(-1), strict=True))
