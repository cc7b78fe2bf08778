"""CTC beam search for the most probable text, with or without a word language model.

Greedy search takes the best token of each frame; a beam search sums over the alignments of a text. There are two backends, which
find the same text if the beam is wide enough:

* flashlight's (https://arxiv.org/abs/2201.12465) through ``torchaudio.models.decoder.ctc_decoder``, in C++. It needs the package
  flashlight-text, and is the only one that takes language models of words.
* SpeechBrain's :class:`~speechbrain.decoders.ctc.CTCBeamSearcher`, in Python, which needs no other package.

Trained models use this search for language models of words only; without one, their search is
:mod:`speechbrain_ext.decoders.ctc_nbest`.

flashlight's search with a word list is not used. It does not allow repeated frames for the last token of a word, which is
correct only if every word ends with a boundary token; SentencePiece puts the boundary first. Instead, the language model is
called at each word boundary of the search without a word list, which also allows words that the model has not seen.
"""

import importlib
import math
import os

import torch
from sentencepiece import SentencePieceProcessor
from speechbrain.decoders.ctc import CTCBeamSearcher

from speechbrain_ext.dataio.tokenizer import is_special
from speechbrain_ext.decoders.searchers import CHECKED_FRAMES, LARGEST_WEIGHT
from speechbrain_ext.decoders.word_lm import (
    arpa_words,
    check_arpa,
    check_spelling,
    flashlight_lm,
)
from speechbrain_ext.utils.errors import UserError, UserImportError, is_number, is_whole, one_line

FLASHLIGHT, SPEECHBRAIN = "flashlight", "speechbrain"
INSTALL = "run, with Python 3.11 or 3.12: pip install flashlight-text"

# Tokens that are tried in a frame: SpeechBrain's search takes those above a log-probability (its default), flashlight's a fixed
# number. Time grows with the number; on peaked posteriors over 128 tokens, 16 find the same best path as all 128.
TOKEN_FLOOR = -5.0
TOKENS_PER_FRAME = 16

WORD_BEAM, WORD_LM_WEIGHT, WORD_SCORE = 100, 0.5, 1.5
"""Default number of hypotheses, weight of a language model of words, and bonus per word."""

# Used in place of log(0), as minus infinity can lead to NaN.
LOG_ZERO = -1e4


class CtcBeamSearch:
    """Beam search for the most probable text under CTC.

    The constructor checks packages, files and settings, so that errors appear before a training. The tokenizer may still be
    empty, because the search is built at the first call.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        Of type char, bpe or unigram, loaded before the first call. Texts never contain its control symbols and unknown token.
    blank_index : int
        Index of the blank.
    beam_size : int
        Number of hypotheses that are kept after each frame. A text with alignments that end in a blank, and the same text with
        alignments that do not, count as two.
    beam_threshold : float
        Hypotheses with a log score lower than the best one's by more than this are dropped.
    lm_file : str, optional
        A word language model in ARPA format, plain or gzipped.
    lm_weight : float
        Weight of the language model's natural log-probabilities (`alpha` in SpeechBrain).
    word_score : float
        Added for each word (`beta` in SpeechBrain), only with a language model, because its cost grows with each word.
    backend : str, optional
        ``flashlight`` or ``speechbrain``; by default the first one if it is installed.

    Raises
    ------
    FileNotFoundError
        If there is no `lm_file`.
    ImportError
        If a package is missing.
    ValueError
        If `lm_file` is not in ARPA format, or an argument is not valid.

    Example
    -------
    >>> import io
    >>> import torch
    >>> from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    >>> model = io.BytesIO()
    >>> SentencePieceTrainer.train(
    ...     sentence_iterator=iter(["A"]), model_writer=model, model_type="char", vocab_size=6,
    ...     pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    ... )
    >>> tokenizer = SentencePieceProcessor()
    >>> search = CtcBeamSearch(tokenizer, beam_size=10)
    >>> _ = tokenizer.LoadFromSerializedProto(model.getvalue())
    >>> tokenizer.id_to_piece(4)
    'A'
    >>> frame = torch.tensor([0.6, 0, 0, 0, 0.4, 0])
    >>> # "" has the best alignment, of probability 0.36; the alignments of "A" have 0.64 together
    >>> search(frame.log().repeat(1, 2, 1), torch.ones(1))
    ['A']
    """

    def __init__(
        self,
        tokenizer,
        blank_index=0,
        beam_size=WORD_BEAM,
        beam_threshold=25.0,
        lm_file=None,
        lm_weight=WORD_LM_WEIGHT,
        word_score=WORD_SCORE,
        backend=None,
    ):
        if not isinstance(tokenizer, SentencePieceProcessor):
            raise UserError(f"tokenizer is {one_line(repr(tokenizer))}; give a sentencepiece.SentencePieceProcessor.")
        if not is_whole(beam_size, 1):
            raise UserError(f"beam_size is {beam_size!r}; give a whole number of 1 or more.")
        if not is_whole(blank_index, 0):
            raise UserError(f"blank_index is {blank_index!r}; give the index of a token.")
        if not is_number(lm_weight, 0, LARGEST_WEIGHT):
            raise UserError(f"lm_weight is {lm_weight!r}; give a number from 0 to {LARGEST_WEIGHT}.")
        if not is_number(word_score, -LARGEST_WEIGHT, LARGEST_WEIGHT):
            raise UserError(f"word_score is {word_score!r}; give a number from {-LARGEST_WEIGHT} to {LARGEST_WEIGHT}.")
        if not is_number(beam_threshold):
            raise UserError(f"beam_threshold is {beam_threshold!r}; give a number.")
        if not beam_threshold > 0:
            raise UserError(f"beam_threshold is {beam_threshold}; give a positive number.")
        if backend not in (None, FLASHLIGHT, SPEECHBRAIN):
            raise UserError(f"There is no backend {backend}; the known ones are: {FLASHLIGHT}, {SPEECHBRAIN}.")
        if lm_file is not None:
            if not isinstance(lm_file, (str, os.PathLike)):
                raise UserError(f"lm_file is {lm_file!r}; give the path of a file.")
            lm_file = os.fspath(lm_file)
            check_arpa(lm_file)
        self.backend = _choose_backend(backend, lm_file)
        self.tokenizer = tokenizer
        self.blank_index = blank_index
        self.beam_size = beam_size
        self.beam_threshold = beam_threshold
        self.lm_file = lm_file
        self.lm_weight = lm_weight
        self.word_score = word_score
        self._kept, self._search = None, None

    def check(self):
        """Build the search with the loaded tokenizer, read the whole language model, and search a few random frames.

        The random state does not change.

        Raises
        ------
        UserError
            If the language model is damaged or spelled differently from the tokens, or if the search fails.
        """
        try:
            self._build()
            log_probs = torch.rand(2, CHECKED_FRAMES, self.tokenizer.vocab_size(), generator=torch.Generator().manual_seed(0))
            self(log_probs.log_softmax(-1), torch.tensor([1.0, 0.6]))
        except (UserError, OSError):  # these messages already name the remedy
            raise
        except Exception as error:
            raise UserError(f"ctc_search cannot search: {one_line(error).rstrip('.')}; change its setting.") from error

    def __call__(self, log_probs, lengths):
        """Search each utterance of a batch separately.

        Arguments
        ---------
        log_probs : torch.Tensor
            Log-probabilities (B, T, V) on any device, V the size of the tokenizer.
        lengths : torch.Tensor
            Relative lengths (B,); frames after an utterance's end are ignored.

        Returns
        -------
        texts : list of str
            The best text of each utterance, its words separated by one space.

        Raises
        ------
        ValueError
            If shapes do not fit, or a frame holds NaN.
        """
        return [text for text, _ in self._best(log_probs, lengths)]

    def tokens(self, log_probs, lengths):
        """Search as a call does; returns the tokens of each text."""
        return [tokens for _, tokens in self._best(log_probs, lengths)]

    def use_beam(self, beam_size):
        """Use another beam size from now on."""
        if beam_size != self.beam_size:
            self.beam_size, self._search = beam_size, None

    def _best(self, log_probs, lengths):
        """The best text and its tokens, of each utterance."""
        if log_probs.dim() != 3 or lengths.shape != log_probs.shape[:1]:
            raise UserError(
                f"Log-probabilities have the shape {tuple(log_probs.shape)} and lengths {tuple(lengths.shape)}; "
                "give (B, T, V) and (B,)."
            )
        lengths = lengths.detach().cpu().double()
        if not ((lengths >= 0) & (lengths <= 1.001)).all():
            raise UserError(f"The lengths are {lengths.tolist()}; give relative lengths from 0 to 1.")
        tokens = self.tokenizer.vocab_size()
        if log_probs.shape[2] != tokens:
            raise UserError(
                f"There are log-probabilities of {log_probs.shape[2]} tokens, but the tokenizer has {tokens}; "
                "load the tokenizer that the model was trained with."
            )
        self._build()
        frames = (lengths * log_probs.shape[1]).round().long().clamp(max=log_probs.shape[1]).tolist()
        return [self._best_text(utterance[:count]) for utterance, count in zip(log_probs.detach(), frames, strict=True)]

    def _best_text(self, log_probs):
        """The text and the tokens of one utterance (T, V) without padding."""
        if not len(log_probs):
            return "", []
        log_probs = log_probs.float().cpu()
        if not (log_probs < math.inf).all():
            raise UserError("The log-probabilities hold NaN or infinity; take an earlier checkpoint of the model.")
        log_probs = log_probs[:, self._kept].clamp(min=LOG_ZERO).contiguous()
        nothing = log_probs.amax(1) <= LOG_ZERO  # only excluded tokens are probable: unknown, begin, end
        log_probs[nothing, self._kept.index(self.blank_index)] = 0.0
        return self._search(log_probs)

    def _build(self):
        """Build the search once; the tokenizer must be loaded."""
        if self._search is not None:
            return
        tokenizer = self.tokenizer
        tokens = tokenizer.vocab_size()
        if not tokens:
            raise UserError("The tokenizer of the CTC search is empty; load it before the search.")
        if self.blank_index >= tokens:
            raise UserError(f"blank_index is {self.blank_index}, but there are {tokens} tokens; give the index of the blank.")
        self._kept = [
            index
            for index in range(tokens)
            if index == self.blank_index or not (is_special(tokenizer, index) or tokenizer.is_unused(index))
        ]
        words = None if self.lm_file is None else arpa_words(self.lm_file)
        if words is not None:
            check_spelling(words, tokenizer, self.lm_file)
        build = self._flashlight if self.backend == FLASHLIGHT else self._speechbrain
        try:
            self._search = build(words)
        except (RuntimeError, OSError) as error:  # KenLM's errors begin with a place in its source
            if words is None:
                raise
            cause = " ".join(str(error).split()).rsplit("threw ", 1)[-1].rstrip(".)")
            raise UserError(f"The language model {self.lm_file} cannot be read; write it again ({cause}).") from error

    def _flashlight(self, words):
        from torchaudio.models.decoder import ctc_decoder

        pieces = [self.tokenizer.id_to_piece(index) for index in self._kept]
        blank = pieces[self._kept.index(self.blank_index)]
        lm = None if words is None else flashlight_lm(self.lm_file, words, pieces, self.lm_weight, self.word_score)
        decoder = ctc_decoder(
            lexicon=None,
            tokens=pieces,
            lm=lm,
            lm_weight=1.0,  # WordLm already weights the scores
            nbest=self.beam_size,
            beam_size=self.beam_size,
            beam_size_token=min(TOKENS_PER_FRAME, len(pieces)),
            beam_threshold=self.beam_threshold,
            log_add=True,
            blank_token=blank,
            sil_token=blank,  # any other token would be removed at the start of an utterance
        )

        def search(log_probs):  # (T, V)
            scores, tokens = {}, {}
            for hypothesis in decoder(log_probs[None])[0]:  # the best one first
                ids = [self._kept[token] for token in hypothesis.tokens.tolist()]
                text = " ".join(self.tokenizer.decode_ids(ids).split())
                # Several token sequences may give the same text
                scores[text] = _log_add(scores.get(text, -math.inf), hypothesis.score)
                tokens.setdefault(text, [id for id in ids if id != self.blank_index])
            if lm is not None:
                lm.forget()
            best = max(scores, key=scores.get)
            return best, tokens[best]

        return search

    def _speechbrain(self, words):
        searcher = CTCBeamSearcher(
            blank_index=self._kept.index(self.blank_index),
            vocab_list=[self.tokenizer.id_to_piece(index) for index in self._kept],
            beam_size=self.beam_size,
            beam_prune_logp=-self.beam_threshold,
            token_prune_min_logp=TOKEN_FLOOR,
            prune_history=False,  # pruning would drop alignments of the best text, and hypotheses from the beam
        )

        def search(log_probs):  # (T, V)
            # In float64, because numpy in float32 would lose digits of a long utterance's score
            best = searcher.decode_log_probs(log_probs.double().numpy(), len(log_probs))[0]
            text = " ".join(best.text.split())
            return text, self.tokenizer.encode_as_ids(text)

        return search


def _choose_backend(backend, lm_file):
    """The name of a backend that is installed completely."""
    try:
        from torchaudio.models.decoder import ctc_decoder  # noqa: F401

        flashlight = True
    except (ImportError, RuntimeError):  # torchaudio raises RuntimeError in place of ImportError
        flashlight = False
    if backend == FLASHLIGHT and not flashlight:
        raise UserImportError(f"The backend flashlight needs the package flashlight-text, which is missing; {INSTALL}")
    if backend == FLASHLIGHT or (backend is None and flashlight):
        if lm_file is not None and not _importable("flashlight.lib.text.decoder.kenlm"):
            raise UserImportError(
                f"The installed flashlight-text was built without KenLM and cannot read {lm_file}; run: "
                "pip install --force-reinstall flashlight-text"
            )
        return FLASHLIGHT
    if lm_file is not None:
        raise UserImportError(f"The language model {lm_file} needs a package that is missing; {INSTALL}")
    return SPEECHBRAIN


def _importable(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _log_add(a, b):
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))
