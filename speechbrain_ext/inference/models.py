"""Trained models: SpeechBrain's inference classes, with exact lengths, files of any length, and times of words."""

import torch
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR

from speechbrain_ext.dataio.audio import load_audio, sample_flaw
from speechbrain_ext.dataio.samples import as_samples
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.decoders.alignment import align, greedy_tokens, group_words, make_segment, within
from speechbrain_ext.inference.transcribe import transcribe_files
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.registry import encoder_passes
from speechbrain_ext.utils.errors import UserError


class _ExactLengths:
    """What both classes below change of SpeechBrain's: lengths are those of the encoder frames, and so exact in any batch."""

    fingerprint = ""
    """A digest of all files that the model was loaded from."""
    pass_name = None
    """Of a cascade, the pass that answers; None = the last one."""

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
        """Of a cascade, choose the pass that answers.

        Raises
        ------
        UserError
            If there is no such pass.
        """
        encoder_passes(self.mods.encoder.transformer.encoder, pass_name)
        self.pass_name = pass_name

    def load_audio(self, path, savedir=None):
        """Read an audio file as samples (T,) of one channel, at the model's rate."""
        del savedir  # nothing is fetched
        return load_audio(path, self.sample_rate).to(self.device)

    def transcribe_file(self, path, **keys):
        """The text of an audio file of any length; see :meth:`transcribe_files`."""
        return self.transcribe_files([path], **keys)[0]

    def transcribe_files(self, paths, **keys):
        """The texts of audio files of any length.

        Files of up to a minute are read whole, several at a time. Longer ones go through the model in pieces: as a stream, if it
        was trained to stream, else in windows that overlap. The command line prints the same texts.

        Arguments
        ---------
        paths : list of str or os.PathLike
            Audio files in any format that soundfile reads.
        **keys
            ``output``, ``streaming``, ``subtitle_options`` and ``progress`` of
            :func:`speechbrain_ext.inference.transcribe.transcribe_files`, which also gives segments with times, and goes on where
            a file is bad.

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
            tokens = self._search(*self._encode(wavs, wav_lens))
        # A word boundary is a token of its own, and may come twice
        return [" ".join(self.tokenizer.decode_ids(ids).split()) for ids in tokens], tokens

    @torch.no_grad()
    def transcribe_segments(self, wavs, wav_lens):
        """As :meth:`transcribe_batch`; returns a :class:`Segment` with the times of the words for each, None without words."""
        enc, lens = self._encode(wavs, wav_lens)
        seconds = (absolute_lengths(wav_lens, wavs.shape[1]) / self.sample_rate).tolist()
        segments = [
            make_segment(log_probs, tokens, self.tokenizer, self.blank)
            for log_probs, tokens in zip(self._valid(self._log_probs(enc), lens), self._search(enc, lens), strict=True)
        ]
        return [segment and within(segment, end) for segment, end in zip(segments, seconds, strict=True)]

    @torch.no_grad()
    def align(self, wav, text):
        """When the words of a given text are said.

        Arguments
        ---------
        wav : torch.Tensor
            (N,) samples at the model's rate.
        text : str
            What is said.

        Returns
        -------
        tuple of Word
            With times in seconds, and the confidence of the CTC head that the word is said there.

        Raises
        ------
        UserError
            If the audio is too short for the text, or the text has characters that the model does not know.
        """
        wav = as_samples(wav)
        if wav.dim() != 1:
            raise UserError(f"The samples have the shape {tuple(wav.shape)}; give one channel, (N,).")
        text = normal_form(text)
        unknown = [piece for piece in self.tokenizer.encode_as_pieces(text) if self.tokenizer.is_unknown(self.tokenizer[piece])]
        if unknown:
            raise UserError(
                f"The model does not know {', '.join(unknown[:3])[:40]!r} of the text; write it as its transcripts are."
            )
        enc, _ = self._encode(wav.unsqueeze(0), torch.ones(1))
        tokens = self.tokenizer.encode_as_ids(text)
        words = group_words(tokens, align(self._log_probs(enc)[0], tokens, self.blank), self.tokenizer)
        return tuple(within(word, len(wav) / self.sample_rate) for word in words)

    def encode_batch(self, wavs, wav_lens):
        """As in SpeechBrain, with samples of any kind that :meth:`transcribe_batch` takes."""
        return super().encode_batch(as_samples(wavs), wav_lens)

    @torch.no_grad()
    def frames(self, wavs, wav_lens):
        """Log-probabilities (T, V) of each waveform, and what :meth:`search_segment` takes."""
        enc, lens = self._encode(wavs, wav_lens)
        searched = self._valid(enc, lens) if self.search_segment else [None] * len(enc)
        return self._valid(self._log_probs(enc), lens), searched

    search_segment = None
    """From frames (T, D) to tokens and log-probabilities (T, V), where that is another search than greedy CTC."""

    def _encode(self, wavs, wav_lens):
        wavs = as_samples(wavs)
        if wavs.dim() != 2 or not len(wavs) or wav_lens.shape != wavs.shape[:1]:
            shapes = f"{tuple(wavs.shape)} and {tuple(wav_lens.shape)}"
            raise UserError(f"Waveforms and relative lengths have the shapes {shapes}; give (B, N) and (B,), B > 0.")
        if not ((wav_lens >= 0) & (wav_lens <= 1)).all():
            raise UserError(f"The relative lengths are {wav_lens.tolist()}; give shares of the longest waveform, from 0 to 1.")
        if flaw := sample_flaw(wavs):
            raise UserError(f"The waveforms hold {flaw}; leave out or mend what they were read from.")
        enc, lens = self.mods.encoder.encode(wavs.to(self.device), wav_lens.to(self.device), pass_name=self.pass_name)
        # Features have a frame even where there is no sample, and nothing is said in it
        return enc, lens.masked_fill(absolute_lengths(wav_lens, wavs.shape[1]).to(lens.device) == 0, 0.0)

    def _log_probs(self, enc):
        return (self.ctc_head(enc) if self.mods.encoder.head is None else enc).float().log_softmax(-1)

    @staticmethod
    def _valid(x, lens):
        return [row[:length] for row, length in zip(x, absolute_lengths(lens, x.shape[1]).tolist(), strict=True)]


class JointModel(_ExactLengths, EncoderDecoderASR):
    """A model with a decoder, searched jointly by CTC and attention."""

    def _search(self, enc, lens):
        return self.mods.decoder(enc, lens)[0]

    def search_segment(self, frames):
        """Joint search on frames (T, D); returns tokens and CTC log-probabilities (T, V)."""
        enc = frames.unsqueeze(0)
        return self._search(enc, torch.ones(1, device=enc.device))[0], self._log_probs(enc)[0]


class CtcModel(_ExactLengths, EncoderASR):
    """A model without a decoder."""

    def _search(self, logits, lens):
        if getattr(self.decoding_function, "func", None) is ctc_greedy_decode:
            return greedy_tokens(logits, lens, self.blank)
        return self.decoding_function(logits, lens)


CLASSES = {"EncoderDecoderASR": JointModel, "EncoderASR": CtcModel}
"""By the class of SpeechBrain that loads the same folder."""
