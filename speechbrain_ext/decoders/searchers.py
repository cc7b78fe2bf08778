"""SpeechBrain's searchers for Transformers, with a decoder that decodes each token once.

Same constructors, hypotheses and scores. What scorers are given as attention is (B * K, T), that of the newest token, as from
SpeechBrain's RNN searchers; SpeechBrain's Transformer searchers give that of the whole prefix again, (B * K, U, T), and with
``using_max_attn_shift`` look for its peak over the prefix, where these look over the encoder frames.
"""

from speechbrain.decoders import seq2seq

from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.registry import loadable
from speechbrain_ext.utils.errors import UserTypeError


@loadable
class S2STransformerBeamSearcher(seq2seq.S2STransformerBeamSearcher):
    """SpeechBrain's beam search for Transformers with keys and values kept: the same answer, many times sooner.

    Arguments
    ---------
    modules, temperature, **kwargs
        As in ``speechbrain.decoders.S2STransformerBeamSearcher``; the first of the modules is a
        :class:`speechbrain_ext.asr.TransformerASR`.

    Raises
    ------
    TypeError
        If it is not.

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

    def __init__(self, modules, *args, **kwargs):
        super().__init__(_checked(modules), *args, **kwargs)

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
