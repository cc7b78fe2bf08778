"""Loading a trained model, from a folder or from Hugging Face."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml
from sentencepiece import SentencePieceProcessor
from speechbrain.decoders.ctc import ctc_greedy_decode
from speechbrain.decoders.seq2seq import S2SBeamSearcher
from speechbrain.utils.distributed import infer_device
from speechbrain.utils.run_opts import RunOptions

from speechbrain_ext.decoders.alignment import FRAME_SECONDS
from speechbrain_ext.decoders.searchers import LARGEST_BEAM
from speechbrain_ext.decoders.transducer import TransducerSearch
from speechbrain_ext.inference.models import CLASSES, CtcModel, JointModel, TransducerModel
from speechbrain_ext.inference.streaming import LARGEST_CHUNK
from speechbrain_ext.lobes.filter_banks import front_end
from speechbrain_ext.model_folder import CONFIG, FILES, FORMAT_VERSION, HYPERPARAMS, TOKENIZER, WEIGHTS
from speechbrain_ext.model_folder.build import LARGEST_TEXT, Refused, build
from speechbrain_ext.model_folder.fetch import ENGLISH, download, is_shipped
from speechbrain_ext.model_folder.weights import load_tokenizer, load_weights, weights_size
from speechbrain_ext.utils.errors import UserError, UserRuntimeError, is_known, is_number, is_whole, one_line, runs_foreign_code
from speechbrain_ext.utils.files import file_digest, read_bytes

KEYS = ("modules", "asr_model", "ctc_lin", "tokenizer", "blank_index", "sample_rate")
"""Keys of hyperparams.yaml that loading needs."""
OPTIONS = {field.name for field in dataclasses.fields(RunOptions)}
"""SpeechBrain's options of a run, such as the device; hyperparams.yaml must not set them."""
LARGEST_RATIO = 10
"""Most tokens per frame of a search. Trained models have at most 1, transducers 5."""


def load_model(source=ENGLISH, device=None, pass_name=None, revision=None, trust=False):
    """Load a trained model.

    Only classes that a model needs are built, see :mod:`speechbrain_ext.model_folder.build`. A folder that names any other class
    is refused, even a local one.

    Arguments
    ---------
    source : str
        A folder that training wrote, or the name of a Hugging Face repository with the same files, ``user/model``. If no model
        folder has that name, ``english`` is the small model that comes with the package.
    device : str or torch.device, optional
        For example ``cpu`` or ``cuda:0``; by default an accelerator if there is one.
    pass_name : str, optional
        The pass of a cascade that gives the text: "second", the default, or "first".
    revision : str, optional
        Commit, tag or branch of a repository; by default its newest commit. All files come from one commit. A model that was
        loaded once also loads offline.
    trust : bool
        Whether ``hyperparams.yaml`` may name any class or function, and so run any code.

    Returns
    -------
    CtcModel, JointModel or TransducerModel
        With ``transcribe_file(path)``, ``transcribe_files(paths)``, ``align(wav, text)``, and SpeechBrain's methods.

    Raises
    ------
    FileNotFoundError
        If there is no such model, or no such revision.
    UserError
        If the folder holds no speech recogniser, names a class that is not allowed, is damaged or has files of different models;
        if the model has no such pass; if ``revision`` is given for a local folder; or if there is no such device.

    Example
    -------
    >>> load_model("/no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: There is no model folder /no/such/folder; give the folder 'pretrained' of a training run, or english.
    """
    source = os.fspath(source)
    folder = Path(source)
    is_local = bool(source) and folder.is_dir() and not is_shipped(source)
    device = _device_name(device)
    if not is_local:
        folder = download(source, revision, FILES)
    elif revision is not None:
        raise UserError(f"{source} is a folder and has no revision {revision}; leave the revision out.")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        remedy = "give a folder 'pretrained' that training wrote"
        if is_local and (folder / "pretrained").is_dir():
            remedy = f"give {folder / 'pretrained'}"
        elif is_local and (folder / HYPERPARAMS).is_file():
            remedy = "copy the model again"
        elif not is_local:  # offline, the cache may hold a part
            remedy = "if its download was interrupted, load it once with a connection"
        raise FileNotFoundError(f"{source} is no model folder because it has no {missing[0]}; {remedy}.")
    kind = CLASSES[_interface(source, folder)]
    values = _build(source, folder, trust)
    _check_keys(source, values, kind)
    if not trust:
        _refuse_options(source, values)
    if kind is JointModel and isinstance(values["modules"]["decoder"], TransducerSearch):
        kind = TransducerModel
    own = trust or _has_own_code(values)
    with _blaming(source, own):
        try:
            load_weights(values["asr_model"], folder / WEIGHTS)
            load_tokenizer(values["tokenizer"], folder / TOKENIZER)
        except UserError as error:
            raise _damaged(source, error) from error
        _check_decoding_function(source, values, kind, own)
        model = kind(modules=values["modules"], hparams=values, run_opts={"device": device})
        # SpeechBrain moves only its modules, and the CTC head may be inside a searcher's scorer
        model.hparams.asr_model.to(model.device)
        _check_answer(source, model)
    model.fingerprint = hashlib.sha256("".join(file_digest(folder / name) for name in FILES).encode()).hexdigest()
    if pass_name is not None:
        model.choose_pass(pass_name)
    return model


def _device_name(device):
    """The device as text, a GPU with its number, as SpeechBrain needs it; for None, an accelerator if there is one."""
    device = infer_device() if device is None else device
    try:
        place = torch.zeros(1, device=device)
        place.item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no driver, PyTorch without CUDA, or "meta"
        cause = " ".join(str(error).split(". ")[0].split())[:100]
        raise UserError(f"The device {device} cannot be used here ({cause}); give cpu or a device of this machine.") from error
    return str(place.device)


def _interface(source, folder):
    """The name of SpeechBrain's class that the folder is for."""
    try:
        config = json.loads(read_bytes(folder / CONFIG, LARGEST_TEXT).decode())
    except UserError as error:
        raise _damaged(source, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The {CONFIG} of {source} is not JSON ({one_line(error, 100)}); copy the model again.") from error
    config = config if isinstance(config, dict) else {}
    version, interface = config.get("format_version"), config.get("speechbrain_interface")
    if not isinstance(interface, str) or interface not in CLASSES:
        raise UserError(
            f"The {CONFIG} of {source} is for SpeechBrain's {one_line(interface, 100)}; give a model for one of these: "
            f"{', '.join(CLASSES)}."
        )
    if not is_whole(version, 1, FORMAT_VERSION):
        remedy = "update the package" if is_whole(version, 1) else "copy the model again"
        raise UserError(
            f"{source} has the format version {version!r:.50}, but this speechbrain_ext reads 1 to {FORMAT_VERSION}; {remedy}."
        )
    return interface


def _build(source, folder, trust):
    """The objects of hyperparams.yaml."""
    try:
        weights = weights_size(folder / WEIGHTS)
        data = read_bytes(folder / HYPERPARAMS, LARGEST_TEXT)
    except UserError as error:
        raise _damaged(source, error) from error
    try:
        text = data.decode("utf-8-sig")
        return load_hyperpyyaml(text) if trust else build(text, weights)
    except Refused as error:
        raise UserError(
            f"The {HYPERPARAMS} of {source} has {error}, which no shipped recipe writes and which could run any code. If it is "
            "your own class, mark it with speechbrain_ext.registry.loadable and import its module; else read the file "
            f"({folder / HYPERPARAMS}), and if you trust it, load it with trust=True (--trust)."
        ) from error
    except (UserError, UnicodeDecodeError) as error:
        raise _damaged(source, f"{HYPERPARAMS}: {error}") from error


def _check_keys(source, values, kind):
    """Refuse a hyperparams.yaml that lacks a key or has a value of the wrong kind."""
    needed = [*KEYS, *kind.HPARAMS_NEEDED]
    missing = [key for key in needed if key not in values]
    modules = values.get("modules")
    if not missing:
        if not isinstance(modules, dict):
            missing = ["modules"]
        else:
            missing = [name for name in kind.MODULES_NEEDED if not isinstance(modules.get(name), torch.nn.Module)]
            missing += [key for key in ("asr_model", "ctc_lin") if not isinstance(values[key], torch.nn.Module)]
            # load_tokenizer calls its load with a file name
            missing += [] if isinstance(values["tokenizer"], SentencePieceProcessor) else ["tokenizer"]
    if missing:
        needs = next(name for name, made in CLASSES.items() if made is kind)
        raise UserError(
            f"The {HYPERPARAMS} of {source} has no {missing[0]}, which {needs} needs; it is damaged or its {CONFIG} is from "
            "another model; copy or train it again."
        )


def _refuse_options(source, values):
    """Refuse keys that SpeechBrain reads as options of the run, such as device, precision and compilation."""
    for key in values:
        if key in OPTIONS:
            raise UserError(
                f"The {HYPERPARAMS} of {source} has the key {key}, which a model folder may not set; delete it from the file or, "
                "if you trust the file, load it with trust=True (--trust)."
            )


def _has_own_code(values):
    """Whether objects of hyperparams.yaml, or their submodules, have classes of the user."""
    parts = list(values.values())
    parts += [part for value in parts if isinstance(value, dict) for part in value.values()]
    parts += [part for value in parts if isinstance(value, torch.nn.Module) for part in value.modules()]
    return not all(is_known(type(part).__module__) for part in parts)


@contextlib.contextmanager
def _blaming(source, own):
    """Turn errors into "the model is damaged", except those in the user's code, which keep their traceback."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if own or runs_foreign_code(error):
            raise
        raise _damaged(source, error) from error


def _check_decoding_function(source, values, kind, own):
    """Refuse a decoding function other than ctc_greedy_decode."""
    function = values.get("decoding_function")
    if kind is CtcModel and not own and getattr(function, "func", None) is not ctc_greedy_decode:
        raise _damaged(source, f"{HYPERPARAMS}: its decoding_function is not ctc_greedy_decode with a blank_id")


def _check_answer(source, model):
    """Refuse a model whose parts load but do not fit together."""
    encoder, rate = model.mods.encoder, model.sample_rate
    front = front_end(encoder.compute_features)
    if not isinstance(rate, int) or front.sample_rate != rate:
        raise UserError(
            f"The model {source} has a sample_rate of {rate!r}, but its features have {front.sample_rate}; train it again."
        )
    step = encoder.subsampling.factor * front.framing.hop / rate
    if step != FRAME_SECONDS:
        raise UserError(f"The model {source} has a frame every {1000 * step:g} ms; train it with {1000 * FRAME_SECONDS:g} ms.")
    if front.n_fft > rate:  # the spectrum of a frame would have more values than a second has samples
        raise _damaged(source, f"its features have an n_fft of {front.n_fft}")
    _check_chunks(source, encoder)
    if not any(model.ctc_head is part for part in model.hparams.asr_model.modules()):
        raise UserError(f"The model {source} has no CTC head, because its ctc_lin has no weights; train it with a CTC head.")
    statistics, features = getattr(encoder.normalize, "glob_mean", torch.empty(0)), front.n_mels
    if statistics.numel() not in (0, features):
        raise UserError(
            f"The model {source} has statistics of {statistics.numel()} features, but computes {features}; train it again."
        )
    if encoder.normalize.norm_type == "global" and not statistics.numel():
        raise UserError(f"The model {source} has no feature statistics, which norm_type global needs; copy or train it again.")
    log_probs = model.frames(torch.zeros(1, rate // 10), torch.ones(1))[0][0]
    tokens = model.tokenizer.vocab_size()
    if log_probs.shape[1] != tokens:
        raise UserError(
            f"The {TOKENIZER} of {source} has {tokens} tokens, but the model has {log_probs.shape[1]}; give the tokenizer of its "
            "training."
        )
    if not is_whole(model.blank, 0, tokens - 1):
        raise UserError(f"The blank_index of {source} is {model.blank}; give one of its {tokens} tokens, mostly 0.")
    if not log_probs.isfinite().all():
        raise UserError(f"The model {source} gives NaN, because of its weights or statistics; take an earlier checkpoint.")
    _check_search(source, model, tokens)
    try:
        model.transcribe_batch(torch.zeros(1, rate // 10), torch.ones(1))
    except UserError as error:
        raise _damaged(source, error) from error


def _check_chunks(source, encoder):
    """Refuse a chunk size or left context that a stream cannot use."""
    size, left, multiple = encoder.chunk_size, encoder.left_context, getattr(encoder.transformer.encoder, "chunk_multiple", 1)
    if size is not None and not (is_whole(size, 1, LARGEST_CHUNK) and size % multiple == 0):
        raise _damaged(source, f"its chunk_size is {size!r}; chunks have 1 to {LARGEST_CHUNK} frames, a multiple of {multiple}")
    if left is not None and not is_whole(left, 0, math.inf):
        raise _damaged(source, f"its left_context is {left!r}, not a number of chunks")


def _check_search(source, model, tokens):
    """Refuse search settings that would fail only in the middle of a file, or give wrong texts."""
    function, search = getattr(model, "decoding_function", None), getattr(model.mods, "decoder", None)
    if isinstance(function, functools.partial) and function.func is ctc_greedy_decode:
        blank = function.keywords.get("blank_id", -1)
        if not is_whole(blank, -tokens, tokens - 1) or blank % tokens != model.blank:
            raise _damaged(source, f"its blank_index is {model.blank}, but the blank_id of its decoding_function is {blank!r}")
    if isinstance(search, TransducerSearch):
        _check_transducer(source, model, search, tokens)
    if not isinstance(search, S2SBeamSearcher):
        return
    for name in ("bos_index", "eos_index"):
        if not is_whole(getattr(search, name), 0, tokens - 1):
            raise _damaged(source, f"its {name} is {getattr(search, name)!r}, not one of its {tokens} tokens")
    if not all(is_whole(token, 0, tokens - 1) for token in getattr(search, "excluded", ())):
        raise _damaged(source, f"its search excludes {search.excluded}, which are not all among its {tokens} tokens")
    if not is_whole(search.beam_size, 1, LARGEST_BEAM):
        raise _damaged(source, f"its beam_size is {search.beam_size!r}; searches have 1 to {LARGEST_BEAM} hypotheses")
    if not is_number(search.max_decode_ratio, 0, LARGEST_RATIO):
        raise _damaged(source, f"its max_decode_ratio is {search.max_decode_ratio!r}, not a number from 0 to {LARGEST_RATIO}")
    temperature = getattr(search, "temperature", 1)  # only searchers for Transformers have one
    if not is_number(temperature, 1e-3, 1e3):
        raise _damaged(source, f"its temperature is {temperature!r}, not a number from 0.001 to 1000")
    scorer = getattr(search, "scorer", None)
    for part in [*getattr(scorer, "full_scorers", {}).values(), *getattr(scorer, "partial_scorers", {}).values()]:
        for name, stated in (("blank_index", model.blank), ("eos_index", search.eos_index)):
            if getattr(part, name, stated) != stated:
                raise _damaged(source, f"its {name} is {stated}, but that of a scorer is {getattr(part, name)!r}")
    for name, weight in getattr(scorer, "weights", {}).items():
        if not is_number(weight, -1e3, 1e3):
            raise _damaged(source, f"its scorer {name} has the weight {weight!r}, not a number from -1000 to 1000")


def _check_transducer(source, model, search, tokens):
    head = search.transducer
    if not any(head is part for part in model.hparams.asr_model.modules()):
        raise UserError(f"The model {source} has a transducer without weights, outside its asr_model; train it again.")
    for name, found, stated in (
        ("tokens", head.out.out_features, tokens),
        ("blank_index", head.blank_index, model.blank),
    ):
        if found != stated:
            raise _damaged(source, f"its {name} is {stated}, but that of its transducer is {found}")
    if search.max_symbols > LARGEST_RATIO:
        raise _damaged(
            source, f"its max_symbols is {search.max_symbols}; searches have at most {LARGEST_RATIO} tokens in a frame"
        )
    frames = model.mods.encoder(torch.zeros(1, model.sample_rate // 10, device=model.device))
    if not search(frames, torch.ones(1, device=model.device))[2].isfinite().all():
        raise UserError(f"The transducer of {source} gives NaN, because of its weights; take an earlier checkpoint.")


def _damaged(source, error):
    return UserRuntimeError(f"The model {source} is damaged: {one_line(error).rstrip('.')}; copy or train it again.")
