"""Searches of a transducer: greedy search, and a beam that merges equal texts; for batches of utterances and for streams.

In greedy search each utterance has a separate position (label looping, Xu et al. 2024, https://arxiv.org/abs/2406.06220): one
call of the joint network computes the next frames of each utterance, up to the first label. The beam is icefall's modified beam
search: at most one label per frame, so all hypotheses of an utterance are at the same frame (Kang et al. 2022,
https://arxiv.org/abs/2211.00484). The text of an utterance does not depend on its batch.
"""

import itertools
import math

import torch
from torch import nn

from speechbrain_ext.decoders import token_graph
from speechbrain_ext.decoders.beams import HASH, Hypothesis, best_of, choose, trace
from speechbrain_ext.decoders.searchers import CHECKED_FRAMES, LARGEST_BEAM
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.lobes.transducer import Transducer
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.errors import UserError, UserTypeError, is_number, is_whole, one_line

WINDOW = 8
"""Frames per call of the joint network. There is a label about every six frames, so few frames are computed twice."""


@loadable
class TransducerSearch(nn.Module):
    """The search of a transducer, with the interface of SpeechBrain's searchers.

    Arguments
    ---------
    transducer : Transducer
        Predictor and joint network.
    beam_size : int
        Number of hypotheses; 1 is greedy search.
    beam_threshold : float
        Labels with a score lower than the best hypothesis by more than this are not tried.
    max_symbols : int
        Most tokens per frame in greedy search; the beam has at most one.

    Raises
    ------
    UserError
        If a number is not valid.

    Example
    -------
    >>> search = TransducerSearch(Transducer(d_model=16, vocab_size=30, predictor_size=8, joint_size=12), beam_size=4).eval()
    >>> tokens, lengths, scores, _ = search(torch.randn(2, 20, 16), torch.tensor([1.0, 0.5]))
    >>> len(tokens), lengths.tolist() == [len(ids) for ids in tokens]
    (2, True)
    """

    def __init__(self, transducer, beam_size=4, beam_threshold=8.0, max_symbols=5):
        super().__init__()
        if not isinstance(transducer, Transducer):
            raise UserTypeError(f"transducer is {one_line(repr(transducer), 60)}; give one of speechbrain_ext.lobes.transducer.")
        if not is_whole(beam_size, 1, LARGEST_BEAM):
            raise UserError(f"beam_size is {beam_size!r}; give a whole number from 1 to {LARGEST_BEAM}.")
        if not is_whole(max_symbols, 1):
            raise UserError(f"max_symbols is {max_symbols!r}; give a whole number of 1 or more.")
        if not is_number(beam_threshold, 0) or not beam_threshold:
            raise UserError(f"beam_threshold is {beam_threshold!r}; give a positive number.")
        self.transducer, self.max_symbols = transducer, max_symbols
        self.beam_size, self.beam_threshold = beam_size, beam_threshold
        self.graphs = []
        """Token graphs that add to the scores of the beam; greedy search ignores them."""

    def forward(self, frames, lens):
        """Search a batch.

        Arguments
        ---------
        frames : torch.Tensor
            (B, T, D) encoder frames.
        lens : torch.Tensor
            (B,) relative lengths.

        Returns
        -------
        tuple
            Lists of tokens, their lengths (B,), log-probabilities (B,), and None, as SpeechBrain's searchers return them.
        """
        best = self.hypotheses(frames, lens)
        return [each.tokens for each in best], *self._summary(best), None

    @torch.no_grad()
    def hypotheses(self, frames, lens, beam_size=None):
        """The best hypothesis of each utterance.

        Arguments
        ---------
        frames : torch.Tensor
            (B, T, D) encoder frames.
        lens : torch.Tensor
            (B,) relative lengths.
        beam_size : int, optional
            Used in place of the search's beam size.

        Returns
        -------
        list of Hypothesis
        """
        lengths = absolute_lengths(lens, frames.shape[1])
        with torch.autocast(frames.device.type, enabled=False):
            projected = self.transducer.project_frames(frames.float())
            if (beam_size or self.beam_size) == 1:
                said, times, scores, _ = self._greedy(projected, lengths)
                return [Hypothesis(*texts, score) for *texts, score in zip(said, times, scores, strict=True)]
            state = self._begin(len(frames), beam_size or self.beam_size)
            texts, state = self._beam(projected, lengths, state)
            scores = self._scores(state)
        return [_best(*each) for each in zip(texts, *scores, strict=True)]

    def stream(self, beam_size=None):
        """Begin the search of a stream, see :class:`TransducerStream`."""
        return TransducerStream(self, beam_size or self.beam_size)

    def check(self):
        """Search a few random frames, to find errors before a training; the random state does not change.

        Raises
        ------
        UserError
            If the search fails.
        """
        weight = self.transducer.project_frames.weight
        frames = torch.rand(2, CHECKED_FRAMES, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
        self(frames, torch.tensor([1.0, 0.6], device=weight.device))

    def _summary(self, best):
        device = self.transducer.out.weight.device
        return torch.tensor([len(each.tokens) for each in best]), torch.tensor([each.score for each in best], device=device)

    def _greedy(self, frames, lengths, state=None):
        """Tokens, their frames and the score of each utterance, from projected frames (B, T, J), and the predictor's state."""
        batch, count, _ = frames.shape
        device, blank = frames.device, self.transducer.blank_index
        state = self.transducer.predictor.begin(batch) if state is None else state
        predicted = self.transducer.predict(state).unsqueeze(1)  # (B, 1, J)
        rows, window = torch.arange(batch, device=device).unsqueeze(1), torch.arange(WINDOW, device=device)
        at, symbols = lengths.new_zeros(batch), lengths.new_zeros(batch)
        score, said, last = frames.new_zeros(batch), [], max(0, count - 1)
        for _ in _steps(at, lengths, count):
            places = at.unsqueeze(1) + window  # (B, W)
            valid = places < lengths.unsqueeze(1)
            seen = frames[rows, places.clamp(max=last)]
            values, tokens = self.transducer.join(seen, predicted).log_softmax(-1).max(-1)
            labels = (tokens != blank) & valid
            labels[:, 0] &= symbols < self.max_symbols
            found, first = labels.any(1), labels.int().argmax(1)
            # If max_symbols turned a label into a blank, the label's probability is used for the blank
            passed = valid & ((window < first.unsqueeze(1)) | ~found.unsqueeze(1))
            token, value = (part.gather(1, first.unsqueeze(1)).squeeze(1) for part in (tokens, values))
            score = score + torch.where(passed, values, 0.0).sum(1) + torch.where(found, value, 0.0)
            at += torch.where(found, first, WINDOW)
            symbols = torch.where(found, torch.where(first == 0, symbols, 0) + 1, 0)
            said.append(torch.stack((torch.where(found, token, -1), at)))
            following = self.transducer.predictor.advance(state, token)
            state = tuple(_where(found, new, old) for new, old in zip(following, state, strict=True))
            predicted = self.transducer.predict(state).unsqueeze(1)
        said = torch.stack(said, -1).tolist() if said else [[[]] * batch] * 2  # (2, B, steps)
        pairs = [[pair for pair in zip(*row, strict=True) if pair[0] >= 0] for row in zip(*said, strict=True)]
        return [[t for t, _ in row] for row in pairs], [[f for _, f in row] for row in pairs], score.tolist(), state

    def _begin(self, batch, beam_size):
        """The state of beams without a token.

        It is a tuple of scores (B, K), hashes (B, K), predictor states, graph states (B * K, G), rewards in scores (B, K) and the
        graphs, so that a stream keeps those of its first frames.
        """
        graphs = list(self.graphs)
        state = self.transducer.predictor.begin(batch * beam_size)
        scores = state[0].new_full((batch, beam_size), -math.inf, dtype=torch.float32)
        scores[:, 0] = 0.0
        graph = token_graph.begin(graphs, batch * beam_size, scores.device)
        return scores, torch.zeros_like(scores, dtype=torch.long), state, graph, torch.zeros_like(scores), graphs

    def _scores(self, state):
        """Scores of each utterance's hypotheses, if they end here, and the rewards in them."""
        scores, _, _, graph, rewards, graphs = state
        scores = scores + token_graph.ends(graphs, graph).view_as(scores)
        return scores.tolist(), (rewards + token_graph.ends(*token_graph.rewards(graphs, graph)).view_as(scores)).tolist()

    def _beam(self, frames, lengths, state):
        """Extend the hypotheses of ``state``; returns the new (token, frame) pairs of each hypothesis, and the next state.

        The first item of each text is the number of the hypothesis of ``state`` that it extends. A frame without a label close to
        the best hypothesis changes only scores. Several such frames are processed at once, up to the next frame with a label.
        With a language model, special tokens are left out: it gives them no score, which is better than that of most tokens.
        """
        scores, hashes, predictor, graph, rewards, graphs = state
        (batch, beam), blank, device = scores.shape, self.transducer.blank_index, scores.device
        rows, own = torch.arange(batch, device=device).unsqueeze(1), torch.arange(beam, device=device)
        window, order = torch.arange(WINDOW, device=device), torch.arange(2 * beam, device=device)
        at, steps, last = lengths.new_zeros(batch), [], max(0, frames.shape[1] - 1)
        left_out = next((each.special.clone() for each in graphs if not each.is_reward), None)
        if left_out is not None:
            left_out[blank] = False
        for _ in _steps(at, lengths, frames.shape[1]):
            places = at.unsqueeze(1) + window  # (B, W)
            valid = (places < lengths.unsqueeze(1)).unsqueeze(1)
            seen = frames[rows, places.clamp(max=last)].unsqueeze(1)
            predicted = self.transducer.predict(predictor).unflatten(0, (batch, beam)).unsqueeze(2)
            log_probs = self.transducer.join(seen, predicted).log_softmax(-1)  # (B, K, W, V)
            if graphs:
                log_probs = log_probs + token_graph.added(graphs, graph).view(batch, beam, 1, -1)
            if left_out is not None:
                log_probs = log_probs.masked_fill(left_out, -math.inf)
            blanks = log_probs[..., blank].masked_fill(~valid, 0.0)
            after = scores.unsqueeze(2) + blanks.cumsum(2)  # scores after blanks alone
            labels = log_probs.index_fill(3, torch.tensor([blank], device=device), -math.inf).amax(3)
            near = (after - blanks + labels).amax(1) > after.amax(1) - self.beam_threshold
            near &= valid.squeeze(1)
            found, first = near.any(1), near.int().argmax(1)
            place = first.view(-1, 1, 1)
            here = log_probs.gather(2, place.unsqueeze(3).expand(-1, beam, 1, log_probs.shape[3])).squeeze(2)  # (B, K, V)
            before = (after - blanks).gather(2, place.expand(-1, beam, 1))
            values, at_end = (before + here).flatten(1), token_graph.settled(graphs, graph)
            at_end = None if at_end is None else at_end.view(batch, -1)
            candidates = choose(values, at_end, 2 * beam)
            values, at_end = values.gather(1, candidates), None if at_end is None else at_end.gather(1, candidates)
            parents, said = candidates // here.shape[2], candidates % here.shape[2]
            keys = hashes.gather(1, parents)
            keys = torch.where(said == blank, keys, keys * HASH + said + 1)
            # Merge equal texts, at the place of the best one
            same = keys.unsqueeze(2) == keys.unsqueeze(1)
            summed = values.unsqueeze(1).masked_fill(~same, -math.inf).logsumexp(2)
            is_first = same.int().argmax(2) == order
            summed = summed.masked_fill(~is_first, -math.inf)
            kept = choose(summed, at_end, beam)
            values = summed.gather(1, kept)
            takes = found.unsqueeze(1)
            parents = torch.where(takes, parents.gather(1, kept), own)
            said = torch.where(takes, said.gather(1, kept), blank)
            scores = torch.where(takes, values, after[..., -1])
            hashes = torch.where(takes, keys.gather(1, kept), hashes)
            chosen = (rows * beam + parents).flatten()
            predictor, graph = tuple(part[chosen] for part in predictor), graph[chosen]
            rewards, (rewarding, inside) = rewards.gather(1, parents), token_graph.rewards(graphs, graph)
            if rewarding:
                rewards = rewards + token_graph.added(rewarding, inside).gather(1, said.view(-1, 1)).view_as(rewards)
            following = self.transducer.predictor.advance(predictor, said.flatten())
            is_label = said.flatten() != blank
            predictor = tuple(_where(is_label, new, old) for new, old in zip(following, predictor, strict=True))
            graph = _where(is_label, token_graph.advance(graphs, graph, said.flatten()), graph)
            steps.append(torch.cat((parents, said, (at + first).unsqueeze(1)), 1))
            at += torch.where(found, first + 1, WINDOW)
        steps = torch.stack(steps, 1).tolist() if steps else [[]] * batch  # (B, steps, 2 K + 1)
        texts = [[trace(each, place, beam, blank) for place in range(beam)] for each in steps]
        return texts, (scores, hashes, predictor, graph, rewards, graphs)


class TransducerStream:
    """The search of one stream, with the tokens so far and the number of final ones.

    Arguments
    ---------
    search : TransducerSearch
        The search.
    beam_size : int
        Number of hypotheses; 1 is greedy search, which never changes earlier tokens.

    Example
    -------
    >>> search = TransducerSearch(Transducer(d_model=16, vocab_size=30, predictor_size=8, joint_size=12)).eval()
    >>> frames, stream = torch.randn(20, 16), search.stream()
    >>> for piece in frames.split(7):
    ...     stream.accept(piece)
    >>> [token for token, _ in stream.tokens] == search(frames.unsqueeze(0), torch.ones(1))[0][0]
    True
    """

    def __init__(self, search, beam_size):
        self._search, self._beam_size = search, beam_size
        self._state, self._start = None, 0
        self._texts, self._scores, self._rewards = [[]], [0.0], [0.0]

    @torch.no_grad()
    def accept(self, frames):
        """Search the next encoder frames (T, D)."""
        lengths = torch.tensor([len(frames)], device=frames.device)
        with torch.autocast(frames.device.type, enabled=False):
            projected = self._search.transducer.project_frames(frames.float()).unsqueeze(0)
            if self._beam_size == 1:
                (said,), (times,), _, self._state = self._search._greedy(projected, lengths, self._state)
                self._texts[0] += [(token, self._start + time) for token, time in zip(said, times, strict=True)]
            else:
                state = self._search._begin(1, self._beam_size) if self._state is None else self._state
                (texts,), self._state = self._search._beam(projected, lengths, state)
                known = self._texts * (self._beam_size // len(self._texts))
                (self._scores,), (self._rewards,) = self._search._scores(self._state)
                self._texts = [known[parent] + [(token, self._start + time) for token, time in said] for parent, *said in texts]
        self._start += len(frames)

    @property
    def tokens(self):
        """(token, frame) of the best hypothesis; the frames count from the start of the stream."""
        return self._texts[_best_of(self._texts, self._scores, self._rewards)]

    @property
    def certain(self):
        """The number of tokens that will not change: all hypotheses begin with them."""
        texts = [text for text, score in zip(self._texts, self._scores, strict=True) if score > -math.inf]
        columns = zip(*([token for token, _ in text] for text in texts), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    def forget(self, frames):
        """Move the start of the frame count forward by ``frames``; earlier tokens get frame 0."""
        self._start -= frames
        self._texts = [[(token, max(0, time - frames)) for token, time in text] for text in self._texts]


def _steps(at, lengths, most):
    """Iterate until all utterances have ended; the caller updates their positions ``at`` in place.

    A step processes at most a window of frames. This gives a least number of steps, between which positions stay on the device.
    """
    left = most
    while left > 0:
        yield from range(-(-left // WINDOW))
        left = int((lengths - at).max())


def _where(condition, new, old):
    """The rows (N, ...) of ``new`` where the condition (N,) holds, else of ``old``."""
    return torch.where(condition.view(-1, *[1] * (new.dim() - 1)), new, old)


def _best_of(texts, scores, rewards):
    return best_of([1 + len(text) for text in texts], scores, rewards)  # bos counts, as in SpeechBrain and icefall


def _best(texts, scores, rewards):
    texts = [text for _, *text in texts]
    best = _best_of(texts, scores, rewards)
    return Hypothesis([token for token, _ in texts[best]], [time for _, time in texts[best]], scores[best])
