"""SpeechBrain's searchers for Transformers, with a decoder that decodes each token once.

Same constructors, hypotheses and scores. What scorers are given as attention is (B * K, T), that of the newest token, as from
SpeechBrain's RNN searchers; SpeechBrain's Transformer searchers give that of the whole prefix again, (B * K, U, T), and with
``using_max_attn_shift`` look for its peak over the prefix, where these look over the encoder frames.
"""

import torch
from speechbrain.decoders import seq2seq

from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.errors import UserError, UserTypeError


@loadable
class S2STransformerBeamSearcher(seq2seq.S2STransformerBeamSearcher):
    """SpeechBrain's beam search for Transformers with keys and values kept: the same answer, many times sooner.

    Arguments
    ---------
    modules, temperature, **kwargs
        As in ``speechbrain.decoders.S2STransformerBeamSearcher``; the first of the modules is a
        :class:`speechbrain_ext.asr.TransformerASR`. The ratios of steps to frames are those of each utterance's own frames: its
        answer does not depend on its batch.
    excluded : list of int
        Tokens that no text has: blank, the one that begins, the unknown one.

    Raises
    ------
    TypeError
        If the first module is no such TransformerASR.
    UserError
        If a ratio or the beam size is impossible.

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

    def __init__(self, modules, *args, excluded=(), **kwargs):
        super().__init__(_checked(modules), *args, **kwargs)
        self.excluded = list(excluded)
        if not 0 <= self.min_decode_ratio <= self.max_decode_ratio:
            raise UserError(
                f"min_decode_ratio is {self.min_decode_ratio} and max_decode_ratio {self.max_decode_ratio}; give shares of the "
                "frames, the first one 0 or more and not above the second one."
            )
        if not isinstance(self.beam_size, int) or self.beam_size < 1:
            raise UserError(f"beam_size is {self.beam_size!r}; give a whole number of 1 or more.")

    def init_beam_search_data(self, enc_states, wav_len):
        """As in SpeechBrain, but the numbers of steps are those of each utterance, not of the padded length."""
        data = super().init_beam_search_data(enc_states, wav_len)
        frames = absolute_lengths(wav_len, enc_states.shape[1])
        steps = [(frames * ratio).long() for ratio in (self.min_decode_ratio, self.max_decode_ratio)]
        self._fewest, self._most = (each.repeat_interleave(self.beam_size) for each in (steps[0], steps[1].clamp(min=1)))
        self.max_decode_steps = int(steps[1].clamp(min=1).max())
        return data

    def _set_eos_minus_inf_step(self, log_probs, step, min_decode_steps):
        log_probs[:, self.excluded] = self.minus_inf
        log_probs[:, self.eos_index].masked_fill_(step < self._fewest, self.minus_inf)
        return log_probs

    def search_step(self, alived_hyps, inp_tokens, log_probs, ended, *args):
        """As in SpeechBrain; an utterance that has had its steps ends here with what it has, as it does alone."""
        step = args[-1]
        alived_hyps, *others, scores = super().search_step(alived_hyps, inp_tokens, log_probs, ended, *args)
        last = step + 1 == self._most
        if last.any():
            unfinished = torch.tensor([len(beams) < self.beam_size for beams in ended], device=last.device)
            last = last & unfinished.repeat_interleave(self.beam_size)
            tokens = torch.where(last, self.eos_index, self.eos_index + 1)
            self._update_hyps_and_scores_if_eos_token(tokens, alived_hyps, ended, scores)
            alived_hyps.sequence_scores.masked_fill_(step + 1 == self._most, -torch.inf)
        return alived_hyps, *others, scores

    def forward_step(self, inp_tokens, memory, enc_states, enc_lens):
        """Log-probabilities (B * K, V) of the tokens that follow ``inp_tokens`` (B * K,), the cache, and the attention."""
        if memory is None:
            each = self.beam_size  # SpeechBrain repeats the frames of an utterance for each of its hypotheses
            memory = self.model.make_decoder_cache(enc_states[::each], enc_lens[::each], each)
        out, attention = self.model.decode_step(inp_tokens, memory)
        return self.softmax(self.fc(out) / self.temperature), memory, attention

    def permute_mem(self, memory, index):
        """The cache of the hypotheses ``index`` (B * K,)."""
        memory.reorder(index)
        return memory


def _checked(modules):
    if not isinstance(modules[0], TransformerASR):
        raise UserTypeError(
            f"The first of the modules is a {type(modules[0]).__module__}.{type(modules[0]).__name__}, which cannot decode token "
            "by token; take speechbrain_ext.asr.TransformerASR, or the searcher of speechbrain.decoders."
        )
    return modules
