"""Trained models: SpeechBrain's inference classes, with exact lengths, files of any length, and times of words."""

import copy
import functools

import torch
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR

from speechbrain_ext.dataio.audio import load_audio, sample_flaw
from speechbrain_ext.dataio.samples import as_samples
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.dataio.tokenizer import is_special
from speechbrain_ext.decoders import (
    BEAM,
    GREEDY,
    JOINT,
    RESCORED,
    TRANSDUCER_BEAM,
    TRANSDUCER_GREEDY,
)
from speechbrain_ext.decoders.alignment import align, greedy_tokens, group_words, make_segment, within
from speechbrain_ext.decoders.ctc_nbest import ctc_nbest
from speechbrain_ext.decoders.lm import LM_TEMPERATURE, LM_WEIGHT, make_scorer
from speechbrain_ext.decoders.rescoring import check_scorers, rescore
from speechbrain_ext.inference.choices import NBEST, LanguageModel, SearchChoices
from speechbrain_ext.inference.transcribe import transcribe_files
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.model_folder.lm import load_lm
from speechbrain_ext.registry import encoder_passes
from speechbrain_ext.utils.errors import UserError


class _ExactLengths(SearchChoices):
    """Changes of all models to SpeechBrain's classes: lengths are those of encoder frames, so they are exact in any batch."""

    fingerprint = ""
    """A digest of all files that the model was loaded from."""
    pass_name = None
    """The pass of a cascade that gives the text; None = the last one."""

    @property
    def blank(self):
        """The CTC head's blank token."""
        return self.hparams.blank_index

    @property
    def ctc_head(self):
        """From encoder frames (B, T, D) to CTC logits (B, T, V)."""
        return self.hparams.ctc_lin

    @property
    def sample_rate(self):
        """Samples per second that the model takes."""
        return self.hparams.sample_rate

    def choose_pass(self, pass_name):
        """Choose the pass of a cascade that gives the text.

        Raises
        ------
        UserError
            If there is no such pass.
        """
        encoder_passes(self.mods.encoder.transformer.encoder, pass_name)
        self.pass_name = pass_name

    def load_audio(self, path, savedir=None):
        """Read an audio file as samples (T,) of one channel, at the model's rate."""
        del savedir  # an argument of SpeechBrain; nothing is downloaded here
        return load_audio(path, self.sample_rate).to(self.device)

    def transcribe_file(self, path, **keys):
        """Transcribe an audio file of any length; see :meth:`transcribe_files`."""
        return self.transcribe_files([path], **keys)[0]

    def transcribe_files(self, paths, **keys):
        """Transcribe audio files of any length.

        Files of up to a minute are processed whole, in batches, and longer ones in windows that overlap. The command line prints
        the same texts.

        Arguments
        ---------
        paths : list of str or os.PathLike
            Audio files in any format that soundfile reads.
        **keys
            ``output``, ``streaming``, ``subtitle_options`` and ``progress`` of
            :func:`speechbrain_ext.inference.transcribe.transcribe_files`. That function also gives segments with times, and
            continues after a bad file.

        Returns
        -------
        list of str
            In the order of the files.

        Raises
        ------
        AudioError
            If a file cannot be read.
        """
        texts = []
        for transcript in transcribe_files(self, paths, **keys):
            if transcript.error is not None:
                raise transcript.error
            texts.append(transcript.text)
        return texts

    def transcribe_batch(self, wavs, wav_lens):
        """Transcribe waveforms (B, N) with relative lengths (B,) from 0 to 1; returns texts and token ids."""
        with torch.no_grad():
            tokens = self.search(*self._encode(wavs, wav_lens))
        # A word boundary can be a separate token, and may come twice
        return [" ".join(self.tokenizer.decode_ids(ids).split()) for ids in tokens], tokens

    @torch.no_grad()
    def transcribe_segments(self, wavs, wav_lens):
        """Transcribe as :meth:`transcribe_batch`; returns a :class:`Segment` with word times for each, None without words."""
        wav_lens = torch.as_tensor(wav_lens)
        enc, lens = self._encode(wavs, wav_lens)
        seconds = (absolute_lengths(wav_lens, wavs.shape[1]) / self.sample_rate).tolist()
        segments = [
            make_segment(log_probs, tokens, self.tokenizer, self.blank)
            for log_probs, tokens in zip(self._valid(self._log_probs(enc), lens), self.search(enc, lens), strict=True)
        ]
        return [segment and within(segment, end) for segment, end in zip(segments, seconds, strict=True)]

    @torch.no_grad()
    def align(self, wav, text):
        """Find the times of the words of a given text.

        Arguments
        ---------
        wav : torch.Tensor
            (N,) samples at the model's rate.
        text : str
            The spoken text.

        Returns
        -------
        tuple of Word
            With times in seconds, and the CTC head's confidence in the word at that place.

        Raises
        ------
        UserError
            If the audio is too short for the text, or the model has no token for a character of the text.
        """
        wav = as_samples(wav)
        if wav.dim() != 1:
            raise UserError(f"The samples have the shape {tuple(wav.shape)}; give one channel, (N,).")
        text = normal_form(text)
        unknown = [piece for piece in self.tokenizer.encode_as_pieces(text) if self.tokenizer.is_unknown(self.tokenizer[piece])]
        if unknown:
            raise UserError(
                f"The model has no token for {', '.join(unknown[:3])[:40]!r} of the text; write it as in its transcripts."
            )
        enc, lens = self._encode(wav.unsqueeze(0), torch.ones(1))
        (log_probs,), tokens = self._valid(self._log_probs(enc), lens), self.tokenizer.encode_as_ids(text)
        words = group_words(tokens, align(log_probs, tokens, self.blank), self.tokenizer)
        return tuple(within(word, len(wav) / self.sample_rate) for word in words)

    def encode_batch(self, wavs, wav_lens):
        """Encode waveforms as SpeechBrain does; takes the kinds of samples that :meth:`transcribe_batch` takes."""
        return super().encode_batch(as_samples(wavs), wav_lens)

    def search_ctc(self, log_probs, lens):
        """Tokens of the best text of each utterance under CTC, language model and phrases, from log-probabilities (B, T, V)."""
        lm = self.choices.lm
        if lm and lm.words:
            return lm.words.tokens(log_probs, lens)
        return [texts[0].tokens for texts in self.nbest(log_probs, lens)]

    def nbest(self, log_probs, lens):
        """The best texts of each utterance under CTC and the token graphs, see :mod:`speechbrain_ext.decoders.ctc_nbest`."""
        excluded = [token for token in range(self.tokenizer.vocab_size()) if is_special(self.tokenizer, token)]
        return ctc_nbest(log_probs, lens, self.blank, self.beam_size or NBEST, excluded, self.graphs)

    @torch.no_grad()
    def frames(self, wavs, wav_lens):
        """Log-probabilities (T, V) of each waveform, and its frames for ``search_segment``, or None without one."""
        enc, lens = self._encode(wavs, wav_lens)
        searched = self._valid(enc, lens) if self.search_segment else [None] * len(enc)
        return self._valid(self._log_probs(enc), lens), searched

    search_segment = None
    """Search from frames (T, D) and log-probabilities (T, V) to tokens and log-probabilities; None = greedy CTC search."""
    search_stream = None
    """Returns a search that takes frames as they arrive; None = greedy CTC search."""
    search_ended = None
    """The search that rewrites a stream's segment when it has ended, with the arguments of ``search_segment``; or None."""

    def _encode(self, wavs, wav_lens):
        wavs, wav_lens = as_samples(wavs), torch.as_tensor(wav_lens)
        if wavs.dim() != 2 or not len(wavs) or wav_lens.shape != wavs.shape[:1]:
            shapes = f"{tuple(wavs.shape)} and {tuple(wav_lens.shape)}"
            raise UserError(f"Waveforms and relative lengths have the shapes {shapes}; give (B, N) and (B,), B > 0.")
        if not ((wav_lens >= 0) & (wav_lens <= 1)).all():
            raise UserError(f"The relative lengths are {wav_lens.tolist()}; give lengths from 0 to 1.")
        if flaw := sample_flaw(wavs):
            raise UserError(f"The waveforms hold {flaw}; repair the audio, or leave it out.")
        enc, lens = self.mods.encoder.encode(wavs.to(self.device), wav_lens.to(self.device), pass_name=self.pass_name)
        # Features have a frame even for a waveform without samples; it holds no speech
        return enc, lens.masked_fill(absolute_lengths(wav_lens, wavs.shape[1]).to(lens.device) == 0, 0.0)

    def _log_probs(self, enc):
        return (self.ctc_head(enc) if self.mods.encoder.head is None else enc).float().log_softmax(-1)

    @staticmethod
    def _valid(x, lens):
        return [row[:length] for row, length in zip(x, absolute_lengths(lens, x.shape[1]).tolist(), strict=True)]


class JointModel(_ExactLengths, EncoderDecoderASR):
    """A model with an attention decoder; its default is a joint search with CTC."""

    searches = GREEDY, BEAM, JOINT, RESCORED

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._own = {name: getattr(self.mods.decoder, name, None) for name in ("beam_size", "scorer")}
        self._scorer = None

    def usual_search(self):
        return JOINT

    def usual_beam(self, search):
        return self._own["beam_size"] if search == JOINT else NBEST

    def neural_lm(self, source, weight, temperature=LM_TEMPERATURE):
        weight = LM_WEIGHT if weight is None else weight
        scorer = make_scorer(load_lm(source, self.tokenizer), temperature)
        settings = {"lm_weight": weight, "lm_temperature": temperature}
        return LanguageModel(source, (JOINT, RESCORED), settings, scorer=scorer) if weight else None

    def check_choices(self, before):
        super().check_choices(before)
        chosen, names = self.choices, self.own_searches
        if chosen.beam_size is not None and JOINT in names:
            self._search_with("beam_size", "other number of hypotheses")
        if self.graphs and {JOINT, RESCORED} & set(names):
            self._search_with("graphs", "phrases or n-grams")
        if chosen.lm and chosen.lm.scorer is not None:
            self._search_with("add_scorer", "language model")
        if RESCORED in names:
            check_scorers(self._search_with("graphs", "texts to score"))

    def use_choices(self):
        super().use_choices()
        search, lm = self.mods.decoder, self.choices.lm
        if hasattr(search, "graphs"):
            search.graphs = self.graphs
        if JOINT not in self.searches:
            return
        if self._own["beam_size"] is not None:
            search.beam_size = self.beam_of(JOINT)
        scorer = lm.scorer if lm else None
        if scorer is not self._scorer:
            self._scorer, search.scorer = scorer, copy.copy(self._own["scorer"])
            if scorer is not None:
                search.add_scorer(scorer, lm.settings["lm_weight"])

    def _search_with(self, attribute, what):
        search = self.mods.decoder
        if not hasattr(search, attribute):
            name = f"{type(search).__module__}.{type(search).__name__}"
            raise UserError(f"The search of this model is a {name}, which takes no {what}; leave it out, or train again.")
        return search

    def search(self, enc, lens, name=None):
        """Tokens of encoder frames (B, T, D) with relative lengths (B,), by the named search, or else the model's."""
        name = name or self.own_search
        if name == JOINT:
            return self.mods.decoder(enc, lens)[0]
        if name == GREEDY:
            return greedy_tokens(self._log_probs(enc), lens, self.blank)
        if name == BEAM:
            return self.search_ctc(self._log_probs(enc), lens)
        search, texts, found = self._search_with("graphs", "texts to score"), self.nbest(self._log_probs(enc), lens), []
        for frames, each in zip(self._valid(enc, lens), texts, strict=True):
            best = rescore(search, frames, each, self.blank)[1] if len(frames) else 0
            found.append(each[best].tokens)
        return found

    def search_segment(self, frames, log_probs):
        """The model's search on frames (T, D); returns its tokens and the CTC head's log-probabilities (T, V)."""
        return self.search(frames.unsqueeze(0), torch.ones(1, device=frames.device))[0], log_probs

    @property
    def search_ended(self):
        """The model's search, if a setting of it was chosen; else None, and the stream's greedy CTC search is the result."""
        return self.search_segment if any(self.choices) and self.own_search != GREEDY else None


class TransducerModel(JointModel):
    """A model with a transducer, which finds the words; its CTC head finds their times, and whether there is speech."""

    searches = GREEDY, BEAM, TRANSDUCER_GREEDY, TRANSDUCER_BEAM
    neural_lm = _ExactLengths.neural_lm

    def usual_search(self):
        return TRANSDUCER_GREEDY if self.beam_of(TRANSDUCER_BEAM) == 1 else TRANSDUCER_BEAM

    def usual_beam(self, search):
        return self._own["beam_size"] if search == TRANSDUCER_BEAM else NBEST

    def search(self, enc, lens, name=None):
        """Tokens of encoder frames (B, T, D) with relative lengths (B,), by the named search, or else the model's."""
        name = name or self.own_search
        if name in (GREEDY, BEAM):
            return super().search(enc, lens, name)
        found = self.mods.decoder.hypotheses(enc, lens, self.beam_of(name))
        # In silence a transducer invents words, but CTC predicts only blanks
        spoken = greedy_tokens(self._log_probs(enc), lens, self.blank)
        return [best.tokens if tokens else [] for best, tokens in zip(found, spoken, strict=True)]

    @property
    def search_ended(self):
        """The CTC beam search, if chosen; else None, because the transducer's search has already run in the stream."""
        return self.search_segment if self.own_search == BEAM else None

    @property
    def search_stream(self):
        """Returns a new :class:`speechbrain_ext.decoders.transducer.TransducerStream`, which searches encoder frames."""
        if self.own_search in (GREEDY, BEAM):
            return None
        return functools.partial(self.mods.decoder.stream, self.beam_of(self.own_search))


class CtcModel(_ExactLengths, EncoderASR):
    """A model with a CTC head alone."""

    searches = GREEDY, BEAM

    def usual_search(self):
        return BEAM if self.choices.phrases or self.choices.lm else GREEDY

    def search(self, logits, lens):
        """Tokens of CTC logits (B, T, V) with relative lengths (B,), by the model's search."""
        if self.own_search == BEAM:
            return self.search_ctc(self._log_probs(logits), lens)
        if getattr(self.decoding_function, "func", None) is ctc_greedy_decode:
            return greedy_tokens(logits, lens, self.blank)
        return self.decoding_function(logits, lens)

    @property
    def search_segment(self):
        """The CTC beam search of a segment, if chosen; else None."""
        return self._search_segment if self.own_search == BEAM else None

    def _search_segment(self, frames, log_probs):
        return self.search_ctc(log_probs.unsqueeze(0), torch.ones(1, device=log_probs.device))[0], log_probs

    search_ended = search_segment


CLASSES = {"EncoderDecoderASR": JointModel, "EncoderASR": CtcModel}
"""Classes here by the name of SpeechBrain's class that loads the same folder."""
