"""Trained models as folders: written at the end of training, loaded by SpeechBrain's inference classes or in one line here.

Such a folder holds ``hyperparams.yaml`` (how to build the model, and nothing of its training), ``asr.safetensors`` (weights),
``normalizer.ckpt``, ``tokenizer.ckpt``, ``config.json`` (which class of SpeechBrain loads it) and ``README.md``. Folders written
before there were safetensors hold ``asr.ckpt``, and load as well.
"""

import json
import os
import re
import shutil
from io import StringIO
from pathlib import Path

import ruamel.yaml
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from ruamel.yaml.comments import CommentedMap
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR

from speechbrain_ext.hparams import needed_keys
from speechbrain_ext.inference.audio import SAMPLE_RATE, load_audio, sample_flaw
from speechbrain_ext.inference.model_card import model_card
from speechbrain_ext.inference.segments import FRAME_SECONDS, align, group_words, make_segment
from speechbrain_ext.inference.trust import check_hparams
from speechbrain_ext.inference.weights import WEIGHTS, save_weights
from speechbrain_ext.lobes.masks import absolute_lengths

FILES = ("hyperparams.yaml", "config.json", WEIGHTS, "normalizer.ckpt", "tokenizer.ckpt")
KEYS = ("modules", "pretrainer", "asr_model", "ctc_lin", "tokenizer", "blank_index")  # of hyperparams.yaml, which loading needs
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

# All refer to keys of the recipes' hparams.
_PRETRAINER = """
pretrainer: !new:speechbrain_ext.inference.weights.SafetensorsPretrainer
    asr: !ref <asr_model>
    normalizer: !ref <normalize>
    tokenizer: !ref <tokenizer>
"""
_ENCODER = """
speech_encoder: !new:speechbrain_ext.asr.SpeechEncoder
    compute_features: !ref <compute_features>
    normalize: !ref <normalize>
    subsampling: !ref <subsampling>
    transformer: !ref <Transformer>
    chunk_size: !ref <streaming_chunk_size>
    left_context: !ref <streaming_left_context>
"""
_WITH_DECODER = f"""{_ENCODER}
modules:
    encoder: !ref <speech_encoder>
    decoder: !ref <test_search>
asr_model: !new:torch.nn.ModuleList
    - [!ref <subsampling>, !ref <Transformer>, !ref <seq_lin>, !ref <ctc_lin>]
"""
_CTC_ONLY = f"""{_ENCODER}
    head: !ref <ctc_lin>
modules:
    encoder: !ref <speech_encoder>
decoding_function: !name:speechbrain.decoders.ctc.ctc_greedy_decode
    blank_id: !ref <blank_index>
asr_model: !new:torch.nn.ModuleList
    - [!ref <subsampling>, !ref <Transformer>, !ref <ctc_lin>]
"""


def write_pretrained(folder, hparams_text, model, normalize, tokenizer_file, rows=(), fused=False):
    """Write a trained model as a folder; the folder is there completely or not at all.

    Arguments
    ---------
    folder : str
        The folder; one that is there is replaced.
    hparams_text : str
        The merged hparams of the training run, see :func:`speechbrain_ext.hparams.merge_hparams`.
    model : torch.nn.ModuleList
        The weights: subsampling, Transformer, seq_lin (with a decoder only), ctc_lin.
    normalize : speechbrain.processing.features.InputNormalization
        The normaliser with its statistics.
    tokenizer_file : str
        The SentencePiece model.
    rows : list of dict
        Results for the model card.
    fused : bool
        Whether the weights are as ``fuse_()`` leaves them; subsampling and encoder are then built with their key ``fused``.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tree = ruamel.yaml.YAML().load(hparams_text)
    interface = "EncoderDecoderASR" if tree["num_decoder_layers"] else "EncoderASR"
    if fused:
        if tree["encoder_kwargs"] is None:
            tree["encoder_kwargs"] = CommentedMap()
        tree["subsampling"]["fused"] = tree["encoder_kwargs"]["fused"] = True
    (partial / "hyperparams.yaml").write_text(_inference_hparams(tree), encoding="utf-8")
    save_weights(model, partial / WEIGHTS)
    normalize._save(partial / "normalizer.ckpt")
    shutil.copyfile(tokenizer_file, partial / "tokenizer.ckpt")
    config = {"speechbrain_interface": interface, "library_name": "speechbrain_ext"}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(model_card(tree, interface, rows), encoding="utf-8")

    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


class _ExactLengths:
    """What both classes below change of SpeechBrain's: lengths are those of the encoder frames, and so exact in any batch."""

    @property
    def blank(self):
        """The CTC head's blank token."""
        return self.hparams.blank_index

    @property
    def ctc_head(self):
        """From encoder frames (B, T, D) to CTC logits (B, T, V)."""
        return self.hparams.asr_model[-1]

    def load_audio(self, path, savedir=None):
        """Read an audio file as 16 kHz mono samples (T,)."""
        del savedir  # nothing is fetched
        return load_audio(path).to(self.device)

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
        return [
            make_segment(log_probs, tokens, self.tokenizer, self.blank)
            for log_probs, tokens in zip(self._valid(self._log_probs(enc), lens), self._search(enc, lens), strict=True)
        ]

    @torch.no_grad()
    def align(self, wav, text):
        """When the words of a given text are said.

        Arguments
        ---------
        wav : torch.Tensor
            (N,) samples at 16 kHz.
        text : str
            What is said.

        Returns
        -------
        tuple of Word
            With times in seconds, and the confidence of the CTC head that the word is said there.

        Raises
        ------
        ValueError
            If the audio is too short for the text, or the text has characters that the model does not know.
        """
        if wav.dim() != 1:
            raise ValueError(f"The samples have the shape {tuple(wav.shape)}; give one channel, (N,).")
        unknown = [piece for piece in self.tokenizer.encode_as_pieces(text) if self.tokenizer.is_unknown(self.tokenizer[piece])]
        if unknown:
            raise ValueError(
                f"The model does not know {', '.join(unknown[:3])[:40]!r} of the text; write it as its transcripts are."
            )
        enc, _ = self._encode(wav.unsqueeze(0), torch.ones(1))
        tokens = self.tokenizer.encode_as_ids(text)
        return group_words(tokens, align(self._log_probs(enc)[0], tokens, self.blank), self.tokenizer)

    @torch.no_grad()
    def frames(self, wavs, wav_lens):
        """Log-probabilities (T, V) of each waveform, and what :meth:`search_segment` takes."""
        enc, lens = self._encode(wavs, wav_lens)
        searched = self._valid(enc, lens) if self.search_segment else [None] * len(enc)
        return self._valid(self._log_probs(enc), lens), searched

    search_segment = None
    """From frames (T, D) to tokens and log-probabilities (T, V), where that is another search than greedy CTC."""

    def _encode(self, wavs, wav_lens):
        if wavs.dim() != 2 or not len(wavs) or wav_lens.shape != wavs.shape[:1]:
            shapes = f"{tuple(wavs.shape)} and {tuple(wav_lens.shape)}"
            raise ValueError(f"Waveforms and relative lengths have the shapes {shapes}; give (B, N) and (B,), B > 0.")
        if not ((wav_lens >= 0) & (wav_lens <= 1)).all():
            raise ValueError(f"The relative lengths are {wav_lens.tolist()}; give shares of the longest waveform, from 0 to 1.")
        wavs = wavs.float()
        if flaw := sample_flaw(wavs):
            raise ValueError(f"The waveforms hold {flaw}; leave out or mend what they were read from.")
        return self.mods.encoder.encode(wavs.to(self.device), wav_lens.to(self.device))

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
        return self.decoding_function(logits, lens)


_CLASSES = {"EncoderDecoderASR": JointModel, "EncoderASR": CtcModel}


def load_model(source, device=None, answer=None, revision=None, trust=False):
    """Load a trained model.

    Loading builds what ``hyperparams.yaml`` names, which may be anything that Python can import. So a model from Hugging Face is
    refused where that is more than the parts that training writes; of a folder nothing is refused.

    Arguments
    ---------
    source : str
        A folder that training left behind, or the name of a Hugging Face repository with the same files, ``user/model``.
    device : str, optional
        Such as ``cpu`` or ``cuda:0``; by default an accelerator if there is one.
    answer : str, optional
        Of a cascade, the pass that answers: "second", the default, or "first".
    revision : str, optional
        Of a repository, the commit, tag or branch; by default what it holds now. All files are those of one commit. What was
        loaded once is there without a network, too.
    trust : bool
        Whether a model from Hugging Face may name anything in its ``hyperparams.yaml``, and so run any code.

    Returns
    -------
    JointModel or CtcModel
        With SpeechBrain's methods, such as ``transcribe_file(path)`` and ``transcribe_batch(wavs, wav_lens)``.

    Raises
    ------
    FileNotFoundError
        If there is no such model, or no such revision.
    ValueError
        If it is not a speech recogniser, names more than may be built, its files do not belong together, ``answer`` or
        ``revision`` is given for one that has no choice of it, or there is no such device.
    RuntimeError
        If it is damaged, or names what is not installed.

    Example
    -------
    >>> load_model("/no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: There is no model folder /no/such/folder; give the folder 'pretrained' of a training run.
    """
    source = os.fspath(source)
    folder = Path(source).expanduser()
    is_local = bool(source) and folder.is_dir()
    _check_device(device)
    if not is_local:
        folder = _download(source, revision)
    elif revision is not None:
        raise ValueError(f"{source} is a folder, which has no revision {revision}; leave the revision out.")
    for name in FILES:
        if not (folder / name).is_file() and not (name == WEIGHTS and (folder / "asr.ckpt").is_file()):
            raise FileNotFoundError(f"{source} is no model folder, as it has no {name}; give a folder that training wrote.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The config.json of {source} is no JSON: {error}.") from error
    interface = config.get("speechbrain_interface") if isinstance(config, dict) else None
    if not isinstance(interface, str) or interface not in _CLASSES:
        raise ValueError(f"{source} is for SpeechBrain's {interface}; the known ones are: {', '.join(_CLASSES)}.")
    if not is_local and not trust:
        _check_origin(source, folder)
    _check_keys(source, folder, interface)
    try:
        model = _CLASSES[interface].from_hparams(source=str(folder), run_opts={"device": device} if device else None)
        # SpeechBrain moves its modules only, and a searcher hides the CTC head in its scorers
        model.hparams.asr_model.to(model.device)
        log_probs = model.frames(torch.zeros(1, SAMPLE_RATE // 10), torch.ones(1))[0][0]
    except Exception as error:  # pickle, YAML, sentencepiece and what the YAML names each raise their own
        raise _damaged(source, error) from error
    _check_answer(source, model, log_probs)
    if answer is not None:
        encoder = model.mods.encoder.transformer.encoder
        if not hasattr(encoder, "answer"):
            raise ValueError(f"The model {source} is no cascade: it gives one answer; leave out the choice of a pass.")
        encoder.answer = answer
    return model


def _download(source, revision):
    """The folder in Hugging Face's cache that holds a model as one commit has it."""
    if not HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"There is no model folder {source}; give the folder 'pretrained' of a training run.")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=[*FILES, "asr.ckpt"]))
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"The model {source} has no revision {revision}; give a commit, tag or branch of it.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder nor a model on Hugging Face that you may read; if it is private, run hf auth login."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        version = f"{source} at revision {revision}" if revision else source
        raise FileNotFoundError(
            f"{version} is neither a folder nor in the cache, and Hugging Face cannot be reached; load it once with a network "
            "(HF_HUB_OFFLINE unset)."
        ) from error


def _check_device(device):
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # such as no driver, PyTorch without it, and "meta"
        cause = " ".join(str(error).split(". ")[0].split())[:100]
        raise ValueError(f"The device {device} cannot be used here ({cause}); give cpu, or a device that there is.") from error


def _check_keys(source, folder, interface):
    """What would otherwise show as a KeyError of whoever reads the key first."""
    try:
        tree = ruamel.yaml.YAML().load((folder / "hyperparams.yaml").read_text(encoding="utf-8"))
    except (ValueError, ruamel.yaml.YAMLError) as error:
        cause = f"{error.problem} in line {error.problem_mark.line + 1}" if hasattr(error, "problem_mark") else str(error)
        cause = " ".join(cause.split())
        raise ValueError(f"The hyperparams.yaml of {source} is no YAML: {cause}; copy or train the model again.") from error
    needed = [*KEYS, *_CLASSES[interface].HPARAMS_NEEDED]
    missing = needed if not isinstance(tree, dict) else [key for key in needed if key not in tree]
    if not missing:
        missing = [name for name in _CLASSES[interface].MODULES_NEEDED if name not in (tree["modules"] or ())]
    if missing:
        raise ValueError(
            f"The hyperparams.yaml of {source} has no {missing[0]}, which {interface} needs; it is "
            "damaged, or its config.json is that of another model."
        )


def _check_answer(source, model, log_probs):
    """What loads may still not belong together: refused now, and not heard as words that nobody said."""
    rate, tokens = getattr(model.hparams, "sample_rate", SAMPLE_RATE), model.tokenizer.vocab_size()
    if rate != SAMPLE_RATE:
        raise ValueError(f"The model {source} hears {rate} samples per second; only models of {SAMPLE_RATE} are supported.")
    encoder = model.mods.encoder
    step = encoder.subsampling.factor * encoder.compute_features.compute_STFT.hop_length / SAMPLE_RATE
    if step != FRAME_SECONDS:
        raise ValueError(
            f"The model {source} has a frame every {1000 * step:g} ms; only {1000 * FRAME_SECONDS:g} ms are supported."
        )
    if model.ctc_head is not model.hparams.ctc_lin:
        raise ValueError(f"The model {source} has no CTC head, as the last of its asr_model is not ctc_lin; train it with one.")
    if log_probs.shape[1] != tokens:
        raise ValueError(
            f"The tokenizer.ckpt of {source} has {tokens} tokens and the model {log_probs.shape[1]}; give it the one that it was "
            "trained with."
        )
    if model.blank not in range(tokens):
        raise ValueError(f"The blank_index of {source} is {model.blank}; give one of its {tokens} tokens, in training mostly 0.")
    if not log_probs.isfinite().all():
        raise ValueError(f"The model {source} answers NaN: its weights or statistics are no numbers; take an earlier checkpoint.")


def _check_origin(source, folder):
    try:
        check_hparams((folder / "hyperparams.yaml").read_text(encoding="utf-8"))
    except ValueError as error:
        named = " ".join(str(error).split())[:100]
        raise ValueError(
            f"The hyperparams.yaml of {source} has {named}, which is none of the parts of a model that training writes and could "
            f"run any code: read it ({folder}), and if you trust it, call load_model with trust=True."
        ) from error
    except Exception as error:  # YAML raises many
        raise _damaged(source, error) from error


def _damaged(source, error):
    # HyperPyYAML puts the place in front of the error's arguments
    text = ": ".join(map(str, error.args)) if isinstance(error, TypeError) else str(error)
    cause = " ".join(text.split())[:300].rstrip(".") or type(error).__name__
    return RuntimeError(f"The model {source} is damaged, or needs what is not installed: {cause}; copy or train it again.")


def _inference_hparams(tree):
    """The part of training hparams that inference needs, with the classes around it, as text."""
    own = ruamel.yaml.YAML().load((_WITH_DECODER if tree["num_decoder_layers"] else _CTC_ONLY) + _PRETRAINER)
    needed = needed_keys(tree, own)
    picked = CommentedMap((key, value) for key, value in tree.items() if key in needed)
    _drop_comments(picked)
    text = StringIO()
    ruamel.yaml.YAML().dump(picked, text)
    ruamel.yaml.YAML().dump(own, text)
    return "# Written at the end of training: the trained model, for inference.\n" + text.getvalue()


def _drop_comments(node):
    """Comments of training hparams explain training, and ruamel ties those of the next section to the value before it."""
    if isinstance(node, (dict, list)):
        node.ca.items.clear()
        node.ca.comment = None
        for child in node.values() if isinstance(node, dict) else node:
            _drop_comments(child)
