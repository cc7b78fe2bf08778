"""SpeechBrain's beam searcher for Transformers, with a decoder that decodes each token once.

Constructor, hypotheses and scores are the same. The attention that scorers get is (B * K, T), that of the newest token, as in
SpeechBrain's RNN searchers. SpeechBrain's Transformer searchers give that of the whole prefix, (B * K, U, T). With
``using_max_attn_shift`` they take the peak over the prefix; here it is over the encoder frames.
"""

import torch
from speechbrain.decoders import seq2seq
from speechbrain.decoders.scorer import ScorerBuilder

from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.decoders import token_graph
from speechbrain_ext.decoders.beams import best_of, choose
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.errors import UserError, UserTypeError, is_number, is_whole, one_line, runs_foreign_code

# Frames of the utterances that check() searches: enough for a few steps, which run all parts of a search.
CHECKED_FRAMES = 5
LARGEST_BEAM = 1000
"""Largest beam size of a loaded model. Trained models have at most 66."""
LARGEST_WEIGHT = 100
"""Largest weight of a language model: its scores then still count less than ``minus_inf``, the score of excluded tokens."""


def _is_bool(value):
    return isinstance(value, bool)


def _is_token(value):
    return is_whole(value, 0)


def _are_tokens(value):
    return isinstance(value, (list, tuple, set, frozenset, range)) and all(map(_is_token, value))


# The check of each setting, and the end of its error message.
SETTINGS = {
    "bos_index": (_is_token, "the index of a token"),
    "eos_index": (_is_token, "the index of a token"),
    "excluded": (_are_tokens, "a list of indices of tokens"),
    # More tokens per frame would overflow
    "min_decode_ratio": (lambda value: is_number(value, 0, 100), "a share of the frames, 0 or more"),
    "max_decode_ratio": (lambda value: is_number(value, 0, 100) and value > 0, "a share of the frames, more than 0"),
    "beam_size": (lambda value: is_whole(value, 1), "a whole number of 1 or more"),
    "topk": (lambda value: is_whole(value, 1), "a whole number of 1 or more"),
    "temperature": (lambda value: is_number(value, 0) and value > 0, "a positive number"),
    # Log-probabilities are negative, so with less than 1 no text could end
    "eos_threshold": (lambda value: is_number(value, 1), "a number of 1 or more"),
    # The shift of the peak must be below this number; with 0, the peak could not stay in its frame
    "max_attn_shift": (lambda value: is_whole(value, 1), "a whole number of 1 or more"),
    # Below the score of any possible text, and not so low that sums overflow
    "minus_inf": (lambda value: is_number(value, -1e30, -1e4), "a number from -1e30 to -1e4"),
    "scorer": (lambda value: value is None or isinstance(value, ScorerBuilder), "a ScorerBuilder, or null"),
} | dict.fromkeys(
    ("return_topk", "using_eos_threshold", "length_normalization", "using_max_attn_shift"), (_is_bool, "True or False")
)


@loadable
class S2STransformerBeamSearcher(seq2seq.S2STransformerBeamSearcher):
    """SpeechBrain's beam search for Transformers with a cache of keys and values: the same texts, many times faster.

    Arguments
    ---------
    modules, temperature, **kwargs
        As in ``speechbrain.decoders.S2STransformerBeamSearcher``; the first of the modules is a
        :class:`speechbrain_ext.asr.TransformerASR`. The ratios of steps to frames apply to each utterance's frames without
        padding, so a text does not depend on the batch.
    excluded : list of int
        Tokens that are not allowed in texts: blank, bos and the unknown token.

    Raises
    ------
    TypeError
        If the first module is not such a TransformerASR.
    UserError
        If a setting is not valid, or does not fit the other settings, the output layer or the scorer.

    Example
    -------
    >>> import torch
    >>> from speechbrain.decoders.scorer import ScorerBuilder
    >>> from speechbrain.nnet.linear import Linear
    >>> from speechbrain_ext.asr import TransformerASR
    >>> from speechbrain_ext.decoders.ctc_prefix import CTCScorer
    >>> net = TransformerASR(30, 8, d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1, d_ffn=64).eval()
    >>> seq_lin, ctc_lin = Linear(input_size=32, n_neurons=30), Linear(input_size=32, n_neurons=30)
    >>> scorer = ScorerBuilder(partial_scorers=[CTCScorer(ctc_lin, blank_index=0, eos_index=2)], weights={"ctc": 0.4})
    >>> search = S2STransformerBeamSearcher([net, seq_lin], bos_index=1, eos_index=2, min_decode_ratio=0.0,
    ...     max_decode_ratio=0.5, beam_size=4, scorer=scorer)
    >>> tokens, lengths, scores, log_probs = search(torch.rand(3, 20, 32), torch.tensor([1.0, 0.5, 0.9]))
    >>> len(tokens)
    3
    """

    def __init__(self, modules, temperature=1.0, *, excluded=(), **kwargs):
        for name, value in {"temperature": temperature, "excluded": excluded, **kwargs}.items():
            if name in SETTINGS and not SETTINGS[name][0](value):
                raise UserError(f"{name} is {value!r}; give {SETTINGS[name][1]}.")
        if kwargs.get("scorer") is not None:  # before SpeechBrain checks it, because SpeechBrain's errors name no setting
            _check_scorer(**kwargs)
        super().__init__(_checked(modules), temperature, **kwargs)
        self.excluded = list(excluded)
        self.graphs = []
        """Token graphs that add to the scores."""
        if self.min_decode_ratio > self.max_decode_ratio:
            raise UserError(
                f"min_decode_ratio is {self.min_decode_ratio} and max_decode_ratio {self.max_decode_ratio}; give a "
                "min_decode_ratio that is not above max_decode_ratio."
            )
        if self.topk > self.beam_size:
            raise UserError(f"topk is {self.topk} and beam_size {self.beam_size}; give a topk that is not above beam_size.")
        if self.using_max_attn_shift and not self.attn_weight:
            raise UserError(
                "using_max_attn_shift is True, but the weight of ctc is 1, so there is no attention; change one of the two."
            )
        self._check_tokens()

    def _check_tokens(self):
        """Refuse token indices that do not fit the output layer or each other."""
        scorers = {} if self.scorer is None else {**self.scorer.full_scorers, **self.scorer.partial_scorers}
        tokens = [("bos_index", self.bos_index), ("eos_index", self.eos_index)]
        tokens += [("excluded", token) for token in self.excluded]
        if "ctc" in scorers:
            tokens.append(("blank_index of the scorer", scorers["ctc"].blank_index))
        count = self.set_n_out()
        for name, token in tokens:
            if not _is_token(token) or token >= count:
                raise UserError(f"{name} is {token!r}, but there are {count} tokens; give an index from 0 to {count - 1}.")
        if self.eos_index in self.excluded:
            raise UserError(f"excluded is {self.excluded} and holds eos_index {self.eos_index}, which ends a text; remove it.")

    def check(self):
        """Search a few random frames, to find errors before a training. Without a decoder it does nothing.

        The random state and the training mode do not change.

        Raises
        ------
        UserError
            If the search fails, or returns more than the best text.
        """
        if not hasattr(self.model, "decoder"):
            return
        if self.return_topk:
            raise UserError("return_topk of test_search is True, but a training run takes only the best text; set it to False.")
        modes = [(module, module.training) for module in self.modules()]
        ratios = self.min_decode_ratio, self.max_decode_ratio
        # An untrained model may never end a text, so the ratio is limited
        self.min_decode_ratio, self.max_decode_ratio = (min(ratio, 1.0) for ratio in ratios)
        device = next(self.parameters()).device
        width = self.model.positional_encoding_decoder.pe.shape[-1]
        enc = torch.rand(2, CHECKED_FRAMES, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)
        try:
            self.eval()
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                scores = self(enc, torch.tensor([1.0, 0.6], device=device))[2]
            if not scores.isfinite().all():
                raise UserError("its scores are not finite")
        except Exception as error:
            if runs_foreign_code(error):
                raise  # a bug in a decoder or scorer of the user
            cause = one_line(error).rstrip(".")
            raise UserError(f"test_search cannot search: {cause}; change its setting.") from error
        finally:
            self.min_decode_ratio, self.max_decode_ratio = ratios
            for module, training in modes:
                module.training = training

    def add_scorer(self, scorer, weight):
        """Add a scorer, such as a language model. It does not belong to the modules, and is not in checkpoints.

        Arguments
        ---------
        scorer : speechbrain.decoders.scorer.BaseScorerInterface
            A scorer of all tokens; it replaces a scorer of the same kind.
        weight : float
            Weight of its scores.

        Raises
        ------
        UserError
            If the weight is not a number from 0 to 100.
        """
        if not is_number(weight, 0, LARGEST_WEIGHT):
            raise UserError(f"The weight of the language model is {weight!r}; give a number from 0 to {LARGEST_WEIGHT}.")
        self.scorer = ScorerBuilder() if self.scorer is None else self.scorer
        name = type(scorer).__name__.lower().removesuffix("scorer")
        self.scorer.full_scorers = {**self.scorer.full_scorers, name: scorer}
        self.scorer.weights = {**self.scorer.weights, name: weight}

    def init_beam_search_data(self, enc_states, wav_len):
        """Begin a search as SpeechBrain does, but with numbers of steps from each utterance's length, not the padded one."""
        for scorer in () if self.scorer is None else self.scorer.full_scorers.values():
            if isinstance(getattr(scorer, "lm", None), torch.nn.Module):  # it does not move with the model
                scorer.lm.to(enc_states.device)
        self._places = self._at_end = None
        self._rewards = enc_states.new_zeros(len(enc_states) * self.beam_size, dtype=torch.float32)
        data = super().init_beam_search_data(enc_states, wav_len)
        frames = absolute_lengths(wav_len, enc_states.shape[1])
        steps = [(frames * ratio).long() for ratio in (self.min_decode_ratio, self.max_decode_ratio)]
        self._fewest, self._most = (each.repeat_interleave(self.beam_size) for each in (steps[0], steps[1].clamp(min=1)))
        self.max_decode_steps = int(steps[1].clamp(min=1).max())
        return data

    def _attn_weight_step(self, inp_tokens, memory, enc_states, enc_lens, attn, log_probs):
        if not self.attn_weight:  # without a decoder, SpeechBrain adds the scores of earlier steps at each step
            log_probs = torch.zeros_like(log_probs)
        return super()._attn_weight_step(inp_tokens, memory, enc_states, enc_lens, attn, log_probs)

    def _set_eos_minus_inf_step(self, log_probs, step, min_decode_steps):
        log_probs[:, self.excluded] = self.minus_inf
        log_probs[:, self.eos_index].masked_fill_(step < self._fewest, self.minus_inf)
        return log_probs

    def _scorer_step(self, inp_tokens, scorer_memory, attn, log_probs):
        if self.graphs:
            if self._places is None:
                self._places = token_graph.begin(self.graphs, len(inp_tokens), inp_tokens.device)
            else:
                self._places = token_graph.advance(self.graphs, self._places, inp_tokens)
            log_probs = log_probs + self._added(self.graphs, self._places)
            for graph in self.graphs:
                if not graph.is_reward:  # a language model gives special tokens no score, which is better than that of most
                    special = graph.special.clone()
                    special[self.eos_index] = False
                    log_probs = log_probs.masked_fill(special, self.minus_inf)
            self._at_end = token_graph.settled(self.graphs, self._places)
            if self._at_end is not None:
                self._gained = self._added(*token_graph.rewards(self.graphs, self._places))
                self._at_end[:, self.eos_index] = self.minus_inf  # the kept places are for texts that continue
        return super()._scorer_step(inp_tokens, scorer_memory, attn, log_probs)

    def _added(self, graphs, places):
        added = token_graph.added(graphs, places)
        added[:, self.eos_index] = token_graph.ends(graphs, places)
        return added

    def _compute_scores_and_next_inp_tokens(self, alived_hyps, log_probs, step):
        if self._at_end is None:
            return super()._compute_scores_and_next_inp_tokens(alived_hyps, log_probs, step)
        scores = (alived_hyps.sequence_scores.unsqueeze(1) + log_probs).view(self.batch_size, -1)
        candidates = choose(scores, self._at_end.view(self.batch_size, -1), self.beam_size)
        alived_hyps.sequence_scores = scores = scores.gather(1, candidates).flatten()
        predecessors = (candidates // self.n_out + self.beam_offset.unsqueeze(1)).flatten()
        shown = scores / (step + 1) if self.length_normalization else scores.clone()
        return shown, candidates, predecessors, (candidates % self.n_out).flatten(), alived_hyps

    def _scorer_permute_memory_step(self, scorer_memory, predecessors, candidates):
        if self.graphs:
            self._places = self._places[predecessors]
        if self._at_end is not None:
            said = candidates.flatten() % self.n_out
            self._rewards = self._rewards[predecessors] + self._gained[predecessors, said]
        return super()._scorer_permute_memory_step(scorer_memory, predecessors, candidates)

    def search_step(self, alived_hyps, inp_tokens, log_probs, ended, *args):
        """Search a step as SpeechBrain does; an utterance ends after its number of steps, as it does outside a batch."""
        step = args[-1]
        alived_hyps, *others, scores = super().search_step(alived_hyps, inp_tokens, log_probs, ended, *args)
        last = step + 1 == self._most
        if last.any():
            unfinished = torch.tensor([len(beams) < self.beam_size for beams in ended], device=last.device)
            last = last & unfinished.repeat_interleave(self.beam_size)
            tokens, before = torch.where(last, self.eos_index, self.eos_index + 1), self._rewards
            added, rewarded = self._ends(others[0])
            self._rewards = before + rewarded
            added = added / (step + 1) if self.length_normalization else added
            self._update_hyps_and_scores_if_eos_token(tokens, alived_hyps, ended, scores + added)
            self._rewards = before
            alived_hyps.sequence_scores.masked_fill_(step + 1 == self._most, -torch.inf)
        return alived_hyps, *others, scores

    def _ends(self, tokens):
        """What the end after the newest tokens adds to scores and rewards; nothing after a token that is the end."""
        if not self.graphs:
            return 0.0, 0.0
        places = token_graph.advance(self.graphs, self._places, tokens)
        parts = (self.graphs, places), token_graph.rewards(self.graphs, places)
        return [token_graph.ends(*part).masked_fill(tokens == self.eos_index, 0.0) for part in parts]

    def _update_hyps_and_scores_if_eos_token(self, inp_tokens, alived_hyps, ended, scores):
        # SpeechBrain keeps the row of a text that ends
        pairs = torch.stack((scores, self._rewards.to(scores)), 1)
        return super()._update_hyps_and_scores_if_eos_token(inp_tokens, alived_hyps, ended, pairs)

    def _get_topk_prediction(self, ended):
        """The best texts, as SpeechBrain returns them; see :func:`speechbrain_ext.decoders.beams.best_of` for phrases."""
        plain = [[(text, log_probs, score[0]) for text, log_probs, score in texts] for texts in ended]
        if self._at_end is None or not self.length_normalization:
            return super()._get_topk_prediction(plain)
        ranked, found = [], []
        for texts in ended:
            lengths, pairs = [len(text) for text, *_ in texts], torch.stack([score for *_, score in texts])
            scores = [score * length for score, length in zip(pairs[:, 0].tolist(), lengths, strict=True)]
            left, rewards, order = list(range(len(texts))), pairs[:, 1].tolist(), []
            while left:
                order.append(left.pop(best_of(*([values[index] for index in left] for values in (lengths, scores, rewards)))))
            ranked.append([(*texts[index][:2], pairs.new_tensor(-float(place))) for place, index in enumerate(order)])
            found.append(pairs[order[: self.topk], 0])
        texts, lengths, _, log_probs = super()._get_topk_prediction(ranked)
        return texts, lengths, torch.stack(found), log_probs

    def forward_step(self, inp_tokens, memory, enc_states, enc_lens):
        """Log-probabilities (B * K, V) of the tokens that follow ``inp_tokens`` (B * K,), the cache, and the attention."""
        if memory is None:
            each = self.beam_size  # SpeechBrain repeats the frames of an utterance for each hypothesis
            memory = self.model.make_decoder_cache(enc_states[::each], enc_lens[::each], each)
        out, attention = self.model.decode_step(inp_tokens, memory)
        return self.softmax(self.fc(out) / self.temperature), memory, attention

    def permute_mem(self, memory, index):
        """The cache of the hypotheses ``index`` (B * K,)."""
        memory.reorder(index)
        return memory


def _checked(modules):
    if not isinstance(modules, (list, tuple, torch.nn.ModuleList)) or len(modules) != 2:
        raise UserError(f"modules is {one_line(repr(modules))}; give a list of a TransformerASR and its output layer.")
    if not isinstance(modules[0], TransformerASR):
        raise UserTypeError(
            f"The first of the modules is a {type(modules[0]).__module__}.{type(modules[0]).__name__}, which cannot decode token "
            "by token; use speechbrain_ext.asr.TransformerASR, or the searcher of speechbrain.decoders."
        )
    if not hasattr(getattr(modules[1], "w", None), "out_features"):
        raise UserTypeError(
            f"The second of the modules is a {type(modules[1]).__module__}.{type(modules[1]).__name__}, without a number of "
            "tokens; use speechbrain.nnet.linear.Linear."
        )
    return modules


def _check_scorer(scorer, bos_index=None, eos_index=None, length_normalization=True, **_):
    """Refuse weights without a scorer, and settings of scorers that do not fit the search."""
    scorers = {**scorer.full_scorers, **scorer.partial_scorers}
    for name, weight in scorer.weights.items():
        if not is_number(weight):
            raise UserError(f"The weight of the scorer {name} is {weight!r}; give a number.")
        if weight and name not in scorers:
            raise UserError(f"The weights have {name} {weight}, but the scorers are: {', '.join(scorers)}; name one of them.")
    scale = scorer.scorer_beam_scale
    if not is_number(scale, 0) or not scale:
        raise UserError(f"scorer_beam_scale is {scale!r}; give a positive number.")
    if length_normalization and scorer.weights["length"] > 0:
        raise UserError(
            f"length_normalization is True and the weight of the scorer length is {scorer.weights['length']}; set "
            "length_normalization to False, or leave the scorer out."
        )
    if not scorer.weights["ctc"]:
        return
    ctc = scorers["ctc"]
    if ctc.eos_index != eos_index:
        raise UserError(f"eos_index is {eos_index}, but that of the scorer is {ctc.eos_index!r}; give both the same.")
    if ctc.blank_index in (bos_index, eos_index) or bos_index == eos_index:
        raise UserError(
            f"bos_index is {bos_index}, eos_index is {eos_index} and blank_index of the scorer is {ctc.blank_index}; give three "
            "different indices."
        )
