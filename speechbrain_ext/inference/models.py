"""Trained models: SpeechBrain's inference classes, with exact lengths, files of any length, and times of words."""

import functools
import os

import torch
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR

from speechbrain_ext.dataio.audio import load_audio, sample_flaw
from speechbrain_ext.dataio.samples import as_samples
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.decoders import BEAM, GREEDY, JOINT, RESCORED, TRANSDUCER_BEAM, TRANSDUCER_GREEDY
from speechbrain_ext.decoders.alignment import align, greedy_tokens, group_words, make_segment, within
from speechbrain_ext.decoders.ctc_nbest import ctc_nbest
from speechbrain_ext.decoders.lm import LM_TEMPERATURE, LM_WEIGHT, make_scorer
from speechbrain_ext.decoders.phrases import phrase_graph
from speechbrain_ext.decoders.rescoring import rescore
from speechbrain_ext.decoders.searchers import LARGEST_BEAM, is_number, is_whole
from speechbrain_ext.decoders.token_ngram import LODR_WEIGHT, NGRAM_WEIGHT, is_arpa, ngram_graph
from speechbrain_ext.inference.transcribe import transcribe_files
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.model_folder.lm import load_lm
from speechbrain_ext.registry import encoder_passes
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import file_digest

NBEST = 16
"""Number of best texts under CTC, unless a beam size is chosen."""


class _ExactLengths:
    """Changes of all models to SpeechBrain's classes: lengths are those of encoder frames, so they are exact in any batch."""

    fingerprint = ""
    """A digest of all files that the model was loaded from."""
    pass_name = None
    """The pass of a cascade that gives the text; None = the last one."""
    searches = ()
    """Names of the searches that the model has."""
    own_search = None
    """The search that it uses."""
    beam_size = None
    """The chosen number of hypotheses; None = the search's default."""
    phrases = ()
    """Phrases that the search prefers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.graphs = []
        """Token graphs of phrases and language models, for the beams."""
        self.search_settings = {}
        """Chosen settings of the search, for files that depend on them."""

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

    def choose_search(self, name):
        """Choose the search that the model uses.

        Raises
        ------
        UserError
            If the model has no such search.
        """
        if name not in self.searches:
            raise UserError(f"The model has no search {name}; it has {', '.join(self.searches)}.")
        self.own_search = self.search_settings["search"] = name

    def choose_beam(self, beam_size):
        """Choose the number of hypotheses of the beams.

        Raises
        ------
        UserError
            If it is not a valid number, or the model uses greedy search.
        """
        if self.own_search == GREEDY:
            raise UserError(
                f"The beam size is {beam_size}, but the model uses {GREEDY}, which has no beam; leave the beam size out."
            )
        if not is_whole(beam_size, 1, LARGEST_BEAM):
            raise UserError(f"The beam size is {beam_size!r}; give a whole number from 1 to {LARGEST_BEAM}.")
        self.beam_size = self.search_settings["beam"] = beam_size

    def choose_phrases(self, phrases):
        """Prefer phrases in the beams. A model that uses greedy search uses a beam from now on.

        Arguments
        ---------
        phrases : dict
            A bonus for each phrase, None = 2 per token; as :func:`speechbrain_ext.decoders.phrases.read_phrases` reads them.

        Raises
        ------
        UserError
            If the tokenizer cannot write a phrase.
        """
        self._listen([phrase_graph(phrases, self.tokenizer)])
        self.phrases, self.search_settings["phrases"] = tuple(phrases), phrases

    def choose_lm(self, source, weight=None, temperature=None, lodr=None, lodr_weight=LODR_WEIGHT):
        """Add a language model to the beams. A model that uses greedy search uses a beam from now on.

        Arguments
        ---------
        source : str
            An ARPA file of the model's tokens, as ``ngram --tokens`` writes them; for the joint search also a folder or Hugging
            Face repository of SpeechBrain, see :func:`speechbrain_ext.model_folder.lm.load_lm`.
        weight : float, optional
            Weight of its log-probabilities; by default 0.3 for an ARPA file, else 0.6.
        temperature : float, optional
            Divides the logits of SpeechBrain's language models; by default 1.15.
        lodr : str, optional
            An ARPA file to subtract: a 2-gram of tokens, of the model's training transcripts.
        lodr_weight : float
            Weight of the log-probabilities of ``lodr``.

        Raises
        ------
        FileNotFoundError
            If there is no such file or repository.
        UserError
            If it is for other tokens or cannot be used, or the model's search takes no language model.
        """
        if not is_arpa(source):
            raise UserError(
                f"The language model is {source}, but a model without an attention decoder takes only ARPA files; give one."
            )
        if temperature is not None:
            raise UserError(f"The language model {source} is an ARPA file, which has no temperature; leave temperature out.")
        weight = NGRAM_WEIGHT if weight is None else weight
        graphs = [ngram_graph(source, self.tokenizer, weight)]
        if lodr is not None:
            if not is_number(lodr_weight, 0):
                raise UserError(f"The weight of the language model {lodr} is {lodr_weight!r}; give a number of 0 or more.")
            graphs.append(ngram_graph(lodr, self.tokenizer, -lodr_weight))
        self._listen(graphs)
        self.search_settings["lm"] = [*map(file_digest, [source] if lodr is None else [source, lodr]), weight, lodr_weight]

    def _listen(self, graphs):
        """Add token graphs to the beams, and use a beam."""
        self.graphs = self.graphs + graphs
        self.own_search = BEAM if self.own_search == GREEDY else self.own_search

    def load_audio(self, path, savedir=None):
        """Read an audio file as samples (T,) of one channel, at the model's rate."""
        del savedir  # an argument of SpeechBrain; nothing is downloaded here
        return load_audio(path, self.sample_rate).to(self.device)

    def transcribe_file(self, path, **keys):
        """Transcribe an audio file of any length; see :meth:`transcribe_files`."""
        return self.transcribe_files([path], **keys)[0]

    def transcribe_files(self, paths, **keys):
        """Transcribe audio files of any length.

        Files of up to a minute are processed whole, in batches. The model processes longer files in pieces: as a stream, if it
        was trained to stream, else in windows that overlap. The command line prints the same texts.

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
        enc, _ = self._encode(wav.unsqueeze(0), torch.ones(1))
        tokens = self.tokenizer.encode_as_ids(text)
        words = group_words(tokens, align(self._log_probs(enc)[0], tokens, self.blank), self.tokenizer)
        return tuple(within(word, len(wav) / self.sample_rate) for word in words)

    def encode_batch(self, wavs, wav_lens):
        """Encode waveforms as SpeechBrain does; takes the kinds of samples that :meth:`transcribe_batch` takes."""
        return super().encode_batch(as_samples(wavs), wav_lens)

    def search_ctc(self, log_probs, lens):
        """Tokens of the best text of each utterance under CTC and the token graphs, from log-probabilities (B, T, V)."""
        return [texts[0].tokens for texts in self.nbest(log_probs, lens)]

    def nbest(self, log_probs, lens):
        """The best texts of each utterance under CTC and the token graphs, see :mod:`speechbrain_ext.decoders.ctc_nbest`."""
        tokenizer = self.tokenizer
        excluded = [
            token for token in range(tokenizer.vocab_size()) if tokenizer.is_control(token) or tokenizer.is_unknown(token)
        ]
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
        wavs = as_samples(wavs)
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
    own_search = JOINT

    def choose_beam(self, beam_size):
        """Choose the number of hypotheses of all beams, the joint one included."""
        super().choose_beam(beam_size)
        self._search_with("beam_size", "other number of hypotheses").beam_size = beam_size

    def choose_lm(self, source, weight=None, temperature=None, lodr=None, lodr_weight=LODR_WEIGHT):
        """Add a language model to the beams: an ARPA file, or a model of SpeechBrain for the joint search."""
        if is_arpa(source):
            super().choose_lm(source, weight, temperature, lodr, lodr_weight)
            return
        if lodr is not None:
            raise UserError(f"lodr is {lodr}, but the language model {source} is not an ARPA file; give one, or leave lodr out.")
        weight, temperature = (LM_WEIGHT if weight is None else weight), (LM_TEMPERATURE if temperature is None else temperature)
        scorer = make_scorer(load_lm(source, self.tokenizer), temperature)
        self._search_with("add_scorer", "language model").add_scorer(scorer, weight)
        self.search_settings["lm"] = [os.fspath(source), weight, temperature]

    def _listen(self, graphs):
        search = self._search_with("graphs", "phrases or n-grams")
        super()._listen(graphs)
        search.graphs = self.graphs

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
        texts = self.nbest(self._log_probs(enc), lens)
        if name == BEAM:
            return [each[0].tokens for each in texts]
        search, found = self._search_with("graphs", "texts to score"), []
        for frames, each in zip(self._valid(enc, lens), texts, strict=True):
            scores = rescore(search, frames, each, self.blank) if len(frames) else [0.0]
            found.append(each[scores.index(max(scores))].tokens)
        return found

    def search_segment(self, frames, log_probs):
        """The model's search on frames (T, D); returns its tokens and the CTC head's log-probabilities (T, V)."""
        return self.search(frames.unsqueeze(0), torch.ones(1, device=frames.device))[0], log_probs

    @property
    def search_ended(self):
        """The model's search, if a setting of it was chosen; else None, and the stream's greedy CTC search is the result."""
        return self.search_segment if self.search_settings and self.own_search != GREEDY else None


class TransducerModel(JointModel):
    """A model with a transducer, which finds the words; its CTC head finds their times."""

    searches = GREEDY, BEAM, TRANSDUCER_GREEDY, TRANSDUCER_BEAM
    own_search = TRANSDUCER_BEAM

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.mods.decoder.beam_size == 1:
            self.own_search = TRANSDUCER_GREEDY

    def choose_beam(self, beam_size):
        """Choose the number of hypotheses of the search; 1 is greedy search."""
        _ExactLengths.choose_beam(self, beam_size)
        if self.own_search in (TRANSDUCER_GREEDY, TRANSDUCER_BEAM):
            self.own_search = TRANSDUCER_GREEDY if beam_size == 1 else TRANSDUCER_BEAM

    def _listen(self, graphs):
        if self.own_search == TRANSDUCER_GREEDY:
            raise UserError(
                f"The model uses {TRANSDUCER_GREEDY}, which takes no phrases or language models; give a beam size above 1."
            )
        super()._listen(graphs)

    choose_lm = _ExactLengths.choose_lm

    def search(self, enc, lens, name=None):
        """Tokens of encoder frames (B, T, D) with relative lengths (B,), by the named search, or else the model's."""
        name = name or self.own_search
        if name in (GREEDY, BEAM):
            return super().search(enc, lens, name)
        return [best.tokens for best in self.mods.decoder.hypotheses(enc, lens, self._beam_of(name))]

    def _beam_of(self, name):
        return 1 if name == TRANSDUCER_GREEDY else self.beam_size

    @property
    def search_ended(self):
        """The CTC beam search, if chosen; else None, because the transducer's search has already run in the stream."""
        return self.search_segment if self.own_search == BEAM else None

    @property
    def search_stream(self):
        """Returns a new :class:`speechbrain_ext.decoders.transducer.TransducerStream`, which searches encoder frames."""
        if self.own_search in (GREEDY, BEAM):
            return None
        return functools.partial(self.mods.decoder.stream, self._beam_of(self.own_search))


class CtcModel(_ExactLengths, EncoderASR):
    """A model with a CTC head alone."""

    searches = GREEDY, BEAM
    own_search = GREEDY

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
