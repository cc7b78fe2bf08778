"""Token graphs, which add to the scores of a beam search over tokens: phrases and n-grams of tokens.

A graph is a deterministic automaton. Each hypothesis is in one of its states, a number. The graph gives, for each state and next
token, the added score and the next state, and for each state the added score of the text's end. A state has entries for a few
tokens only. For the others it *backs off*: they have the score that they have in a shorter state, plus a number. Memory is
therefore that of the entries (16 bytes each, 20 if the graph rewards) and states (24 bytes), not of states times tokens.
Functions take a list of graphs, and states with a column for each graph.
"""

import torch
from torch import nn

FEW = 4
"""Steps of backing off without a look whether they are needed, for which the host would wait for a GPU."""
ROOT = 0
"""The state that has a score for each token, and backs off to none."""


class TokenGraph(nn.Module):
    """One automaton.

    Arguments
    ---------
    root : torch.Tensor
        (V,) added score of each token in state 0.
    root_following : torch.Tensor
        (V,) the state after each token in state 0.
    entries : tuple of torch.Tensor
        State times V plus token (E,), int64, ascending; the added score (E,); and the next state (E,). State 0 has none.
    shorter : torch.Tensor
        (S,) the state to which each state backs off.
    backoff : torch.Tensor
        (S, C) what is added then, for each class of tokens; 0 for state 0.
    ends : torch.Tensor
        (S,) added score of the text's end.
    classes : torch.Tensor
        (V,) the class of each token; C, one more than the last class, for tokens that add nothing and keep the state, such as the
        blank.
    start : int
        The state that begins a text.
    is_reward : bool
        Whether the scores reward what a text contains, as phrases do. Searches that divide scores by the lengths of texts do not
        divide rewards, and beams keep places for texts without rewards that the end would take back.

    Example
    -------
    >>> entries = torch.tensor([3]), torch.tensor([0.5]), torch.tensor([1])  # token 1 in state 1
    >>> graph = TokenGraph(torch.tensor([0.0, 2.0]), torch.tensor([0, 1]), entries, torch.tensor([0, 0]), torch.zeros(2, 1),
    ...     torch.tensor([0.0, -1.0]), torch.tensor([1, 0]))
    >>> places = begin([graph], 1)
    >>> added([graph], places)
    tensor([[0., 2.]])
    >>> places = advance([graph], places, torch.tensor([1]))
    >>> added([graph], places), ends([graph], places)
    (tensor([[0.0000, 0.5000]]), tensor([-1.]))
    """

    def __init__(self, root, root_following, entries, shorter, backoff, ends, classes, start=ROOT, is_reward=False):
        super().__init__()
        # A last entry that no state has, so that each lookup finds a place
        keys, values, following = (nn.functional.pad(each, (0, 1)) for each in entries)
        keys[-1] = len(root) * len(shorter)
        special = classes == backoff.shape[1]
        tables = {
            "root": root.float().masked_fill(special, 0.0),
            "root_following": root_following.int(),
            "keys": keys,
            "values": values.float(),
            "following": following.int(),
            "first": torch.searchsorted(keys, len(root) * torch.arange(len(shorter) + 1)),
            "shorter": shorter.int(),
            "backoff": nn.functional.pad(backoff.float(), (0, 1)),  # special tokens add nothing
            "ends": ends.float(),
            "classes": nn.functional.pad(classes.long(), (0, 1), value=backoff.shape[1]),  # (V + 1): the last column is no token
            "is_class": nn.functional.one_hot(classes.long(), backoff.shape[1] + 1).T.float(),  # (C + 1, V)
            "special": special,
        }
        if is_reward:
            tables |= {"root_ends": tables["ends"][root_following.long()], "ends_after": tables["ends"][following.long()]}
        # A fixed number of entries per state, because the host would have to wait for a GPU to learn any other number
        tables["steps"] = torch.arange(max(1, int(tables["first"].diff().max())))
        self.is_reward = is_reward
        self.start, self.depth, states = start, 0, shorter
        """The state that begins a text, and the most times that a state backs off, or more."""
        while states.any() and self.depth < FEW:
            self.depth, states = self.depth + 1, shorter[states]
        self.depth = len(shorter) if states.any() else self.depth + 1
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def added(self, places):
        """The added score (N, V) of each next token, for hypotheses in the states ``places`` (N,)."""
        return self._look_up(places, self.root, self.values, self.backoff)

    def settled(self, places):
        """The added score (N, V) of the text's end after each next token; only of a graph that rewards."""
        found = self._look_up(places, self.root_ends, self.ends_after, torch.zeros_like(self.backoff))
        return torch.where(self.special, self.ends[places].unsqueeze(1), found)

    def _look_up(self, places, root, values, backoff):
        """Values (N, V) of each next token: of its entry in the longest state that has one, or else of the root."""
        levels, owed = [], backoff.new_zeros(len(places), backoff.shape[1])
        for level in range(self.depth):
            if level >= FEW and not places.any():
                break
            levels.append((places, owed))
            owed, places = owed + backoff[places], self.shorter[places].long()
        out = nn.functional.pad(root + owed @ self.is_class, (0, 1))
        for places, owed in reversed(levels):  # entries of longer states replace those of shorter ones
            entry = self.first[places].unsqueeze(1) + self.steps
            beyond = entry >= self.first[places + 1].unsqueeze(1)
            entry = entry.clamp(max=len(self.keys) - 1)
            token = (self.keys[entry] % len(self.root)).masked_fill(beyond, len(self.root))
            out.scatter_(1, token, values[entry] + owed.gather(1, self.classes[token]))
        return out[:, :-1]

    def advance(self, places, tokens):
        """The states (N,) after the tokens (N,)."""
        after, at = torch.where(self.special[tokens], places, -1), places
        for level in range(self.depth + 1):
            if level >= FEW and not (after < 0).any():
                break
            keys = at * len(self.root) + tokens
            entry = torch.searchsorted(self.keys, keys)
            found = (self.keys[entry] == keys) | (at == ROOT)
            following = torch.where(at == ROOT, self.root_following[tokens], self.following[entry]).long()
            after = torch.where((after < 0) & found, following, after)
            at = self.shorter[at].long()
        return after


def begin(graphs, number, device=None):
    """The states (N, G) of hypotheses without a token."""
    for graph in graphs:
        graph.to(device)
    return torch.tensor([graph.start for graph in graphs], dtype=torch.long, device=device).repeat(number, 1)


def rewards(graphs, places):
    """The graphs that reward texts, and their columns of the states."""
    chosen = [column for column, graph in enumerate(graphs) if graph.is_reward]
    return [graphs[column] for column in chosen], places[..., chosen]


def added(graphs, places):
    """The added score (..., V) of each next token, for hypotheses in the states ``places`` (..., G)."""
    found = [graph.added(place.flatten()) for graph, place in zip(graphs, places.unbind(-1), strict=True)]
    return sum(found).view(*places.shape[:-1], -1)


def settled(graphs, places):
    """What the end after each next token (..., V) adds, as rewards that are taken back; None if no graph rewards."""
    rewarding, inside = rewards(graphs, places)
    found = [graph.settled(place.flatten()) for graph, place in zip(rewarding, inside.unbind(-1), strict=True)]
    return sum(found).view(*places.shape[:-1], -1) if found else None


def advance(graphs, places, tokens):
    """The states (..., G) after the tokens (...)."""
    if not graphs:
        return places
    flat = tokens.flatten()
    after = [graph.advance(place.flatten(), flat) for graph, place in zip(graphs, places.unbind(-1), strict=True)]
    return torch.stack(after, -1).view_as(places)


def ends(graphs, places):
    """The added score (...) of the text's end."""
    if not graphs:
        return places.new_zeros(places.shape[:-1], dtype=torch.float32)
    return sum(graph.ends[place] for graph, place in zip(graphs, places.unbind(-1), strict=True))
