"""Language models of SpeechBrain in the joint search."""

import torch
from speechbrain.decoders import scorer
from speechbrain.lobes.models.RNNLM import RNNLM
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM

from speechbrain_ext.lobes.decoder_cache import EncoderCache
from speechbrain_ext.utils.errors import UserError, is_number

LM_WEIGHT, LM_TEMPERATURE = 0.6, 1.15
"""Values of SpeechBrain's published results on LibriSpeech."""


class TransformerLMScorer(scorer.TransformerLMScorer):
    """SpeechBrain's scorer with a cache of keys and values: the same scores, many times faster.

    Arguments
    ---------
    language_model : speechbrain.lobes.models.transformer.TransformerLM.TransformerLM
        A model without a decoder, and with plain attention. Texts may not contain token 0, its padding.
    temperature : float
        Divides the logits.

    Raises
    ------
    UserError
        If the language model has a decoder or another attention.

    Example
    -------
    >>> lm = TransformerLM(vocab=30, d_model=16, nhead=2, num_encoder_layers=2, d_ffn=32)
    >>> ours, theirs = TransformerLMScorer(lm), scorer.TransformerLMScorer(lm)
    >>> memories = [None, None]
    >>> for token in (1, 7, 5):
    ...     tokens = torch.tensor([token, 9])
    ...     (found, memories[0]), (right, memories[1]) = (
    ...         each.score(tokens, memory, None, None) for each, memory in zip((ours, theirs), memories)
    ...     )
    >>> torch.allclose(found, right, atol=1e-5)
    True
    """

    def __init__(self, language_model, temperature=1.0):
        super().__init__(language_model, temperature)
        if language_model.num_decoder_layers or language_model.attention_type != "regularMHA":
            raise UserError(
                f"The language model has {language_model.num_decoder_layers} decoder layers and the attention "
                f"{language_model.attention_type}; give one without decoder layers, and with regularMHA."
            )

    @torch.no_grad()
    def score(self, inp_tokens, memory, candidates, attn):
        """Log-probabilities (N, V) of the tokens that follow ``inp_tokens`` (N,), and the memory."""
        lm, x = self.lm, self.lm.custom_src_module(inp_tokens)
        if lm.embedding_proj is not None:
            x = lm.embedding_proj(x)
        memory = EncoderCache(lm.encoder, len(x), x) if memory is None else memory
        table = lm.positional_encoding.pe[0]
        if memory.length == len(table):
            raise UserError(
                f"A hypothesis has {memory.length} tokens, the most that the language model takes; lower max_decode_ratio."
            )
        logits = lm.output_proj(memory.step(x + table[memory.length]).unsqueeze(1)).squeeze(1)
        return self.softmax(logits / self.temperature), memory

    def permute_mem(self, memory, index):
        """The memory of the hypotheses ``index`` (N,)."""
        memory.reorder(index)
        return memory


def make_scorer(language_model, temperature=LM_TEMPERATURE):
    """The scorer of a language model.

    Arguments
    ---------
    language_model : TransformerLM or RNNLM
        SpeechBrain's language model.
    temperature : float
        Divides the logits.

    Returns
    -------
    TransformerLMScorer or speechbrain.decoders.scorer.RNNLMScorer

    Raises
    ------
    UserError
        If the temperature is not valid, or the language model is of another kind.
    """
    if not is_number(temperature, 0) or not temperature:
        raise UserError(f"lm_temperature is {temperature!r}; give a positive number.")
    language_model.requires_grad_(False)
    if isinstance(language_model, TransformerLM):
        return TransformerLMScorer(language_model, temperature)
    if isinstance(language_model, RNNLM) and language_model.return_hidden:
        return scorer.RNNLMScorer(language_model, temperature)
    raise UserError(f"The language model is a {type(language_model).__name__}; give SpeechBrain's TransformerLM or RNNLM.")
