"""Find and read trained weights for a warm start, and give them the names of a model folder."""

import contextlib
import io
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import ruamel.yaml
import safetensors
import safetensors.torch
import torch
from sentencepiece import SentencePieceProcessor
from speechbrain.utils.distributed import run_on_main

from speechbrain_ext.convert import convert_nemo, convert_speechbrain
from speechbrain_ext.hparams import merge_hparams, parse_overrides
from speechbrain_ext.model_folder import FILES, HYPERPARAMS, TOKENIZER, WEIGHTS
from speechbrain_ext.model_folder.build import parse
from speechbrain_ext.model_folder.fetch import HUB_ID, download, is_shipped, split_revision
from speechbrain_ext.model_folder.tokenizer_file import check_tokenizer
from speechbrain_ext.utils.errors import UserError, UserRuntimeError, one_line
from speechbrain_ext.utils.files import file_digest

SPEECHBRAIN_WEIGHTS = ("asr.ckpt", "model.ckpt")
FETCHED = (*FILES, *SPEECHBRAIN_WEIGHTS, "normalizer.ckpt", "*.nemo")
"""Files that are fetched from a repository; language models and audio are not."""
_SPEECHBRAIN_PARTS = {"0": "subsampling", "1": "transformer", "2": "seq_lin", "3": "ctc_lin"}
"""Names for the items of the module list that SpeechBrain's recipes save."""
_PLACES = {"sample_rate": "sample_rate", "n_mels": "n_mels", "input_size": "n_mels", "dropout": "dropout"}
"""Keys of training hparams by the arguments of features and front end that refer to them."""


class Source(NamedTuple):
    """A trained model, or a part of one."""

    name: str
    """The name that the user gave; a repository with its commit."""
    kind: str
    """The kind of source, for messages."""
    weights: dict
    """Tensors by their names in a model folder."""
    digest: str
    """SHA-256 of the file of weights."""
    tokenizer: bytes | None = None
    """A SentencePiece model that :func:`checked_tokenizer` has accepted."""
    blank: int = 0
    """Index of CTC's blank."""
    settings: dict | None = None
    """The content of ``hyperparams.yaml`` of a model folder."""


def locate(given, before=None):
    """Find a model, and fetch it if necessary.

    Arguments
    ---------
    given : str
        A folder or file, a repository of Hugging Face, ``user/model`` or ``user/model@revision``, or ``english``, the model of
        the package.
    before : str, optional
        The name of the model when the run began. The same commit of a repository is used again.

    Returns
    -------
    name : str
        The given name; for a repository, with its commit after it.
    path : pathlib.Path

    Raises
    ------
    FileNotFoundError
        If there is no such model.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> locate(folder) == (folder, Path(folder))
    True
    """
    repository, revision = split_revision(given)
    if is_shipped(given):
        return given, download(given, None, FETCHED)
    if Path(given).exists():
        return given, Path(given)
    if not HUB_ID.fullmatch(repository):
        raise FileNotFoundError(f"There is no model {given}; give a folder or file, or user/model of Hugging Face.")
    if before and (before == given or not revision and split_revision(before)[0] == repository):
        revision = split_revision(before)[1]
    folder = download(repository, revision, FETCHED)
    return f"{repository}@{folder.name}", folder


def architecture_of(hparams_file, init_from=None):
    """The architecture of the initial model, for an hparams file that states no encoder.

    Arguments
    ---------
    hparams_file : str
        An hparams file.
    init_from : str, optional
        The initial model; by default the one in the file.

    Returns
    -------
    list
        The path of the hparams file of the initial model, and a mapping of the keys that the model states itself; both for
        :func:`speechbrain_ext.hparams.merge_hparams`. Empty if the file states an encoder.

    Raises
    ------
    UserError
        If there is no initial model, or its hparams file is not beside this one.
    """
    tree = parse_overrides(merge_hparams(hparams_file))
    if "encoder" in tree:
        return []
    init_from = init_from or tree.get("init_from")
    if not isinstance(init_from, str):
        raise UserError(f"{hparams_file} states no architecture, and there is no initial model; give --init_from MODEL.")
    run_on_main(locate, [init_from])
    file, keys = read_architecture(*locate(init_from))
    path = Path(hparams_file).parent / file
    if not path.is_file():
        raise UserError(
            f"{init_from} was trained with {file}, which is not beside {hparams_file}; write a file that extends the file of its "
            "architecture and finetune.yaml."
        )
    return [str(path), keys]


def read_architecture(name, path):
    """Read the architecture of a model folder as keys of training hparams.

    Arguments
    ---------
    name : str
        The name of the model in messages.
    path : str or os.PathLike
        The folder.

    Returns
    -------
    hparams : str
        The name of its hparams file.
    keys : dict
        Features, sizes and encoder.

    Raises
    ------
    UserError
        If it is not a model folder, or does not state its hparams file.
    """
    path = Path(path) / HYPERPARAMS
    remedy = "write a file that extends the file of its architecture and finetune.yaml, see the top of hparams/finetune.yaml."
    if not path.is_file() or not path.with_name(WEIGHTS).is_file():
        raise UserError(f"{name} is not a model folder of this package, so its architecture is unknown; {remedy}")
    tree = _settings(name, path)
    origin = tree.get("provenance")
    file = origin.get("hparams") if isinstance(origin, dict) else None
    if not file or not isinstance(file, str):
        raise UserError(f"The model {name} does not state its hparams file; {remedy}")
    model, encoder, features = tree["Transformer"], tree["speech_encoder"], tree["compute_features"]
    bins = {"n_mels": features["n_mels"]} if isinstance(features, dict) and "n_mels" in features else {}
    names = ("encoder_kwargs", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "d_ffn", "dropout", "kernel_size")
    keys = bins | {key: tree[key] for key in ("sample_rate", "compute_features", "normalize", "subsampling")}
    for part in (keys["compute_features"], keys["subsampling"]):
        for key, place in _PLACES.items() if isinstance(part, dict) else ():
            if key in part:  # replace the value by a reference, so that the user can change the key
                part[key] = ruamel.yaml.YAML().load(f"!ref <{place}>")
    keys |= {"encoder": model["encoder_module"]} | {key: model[key] for key in names if key in model}
    head = tree.get("transducer")
    names = ("predictor", "predictor_size", "predictor_context", "predictor_layers", "joint_size")
    keys |= {key: head[key] for key in names if key in head} if isinstance(head, dict) else {}
    keys |= {"streaming_chunk_size": encoder.get("chunk_size"), "streaming_left_context": encoder.get("left_context")}
    return Path(file).name, keys


def read_source(name, path, nhead):
    """Read weights, statistics of features and tokenizer. No code in the files is run.

    Arguments
    ---------
    name : str
        The name of the model in messages.
    path : str or os.PathLike
        A model folder, a folder of SpeechBrain, a ``.nemo`` file or a folder with one, or a state file (``.safetensors``, or
        tensors that ``torch.save`` wrote).
    nhead : int
        Attention heads of this model. The layout of SpeechBrain's weights depends on it, but their shapes do not show it.

    Returns
    -------
    Source

    Raises
    ------
    UserError
        If the path holds no known kind of weights, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        if (path / WEIGHTS).is_file() and (path / HYPERPARAMS).is_file():
            return _model_folder(name, path, nhead)
        for weights in SPEECHBRAIN_WEIGHTS:
            if (path / weights).is_file():
                return _speechbrain_folder(name, path, path / weights, nhead)
        archives = sorted(path.glob("*.nemo"))
        if len(archives) != 1:
            raise UserError(
                f"{name} is not the folder of a model: it has neither {WEIGHTS} with {HYPERPARAMS}, nor "
                f"{' or '.join(SPEECHBRAIN_WEIGHTS)}, nor one .nemo file; give the folder 'pretrained' of a training run."
            )
        path = archives[0]
    if path.suffix == ".nemo":
        return _nemo(name, path)
    weights = _load(name, path)
    if any("convolution_module" in key for key in weights):
        return Source(name, "weights of SpeechBrain", _of_speechbrain(name, weights, nhead), file_digest(path))
    if any(key.endswith("pre_ln.weight") for key in weights):
        return Source(name, "weights of NeMo", _of_nemo(name, weights), file_digest(path))
    return Source(name, "a state file", _plain_names(weights), file_digest(path))


def checked_tokenizer(data, name):
    """Check that SentencePiece can read an untrusted tokenizer without harm.

    Arguments
    ---------
    data : bytes or None
        A SentencePiece model.
    name : str
        The name of the tokenizer in messages.

    Returns
    -------
    bytes or None
        The same data.

    Raises
    ------
    UserError
        If the tokenizer is damaged or harmful.
    """
    try:
        if data is not None:
            check_tokenizer(data)
            SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        what = str(error) if isinstance(error, UserRuntimeError) else "is damaged, or not a SentencePiece model"
        raise UserError(f"The tokenizer {name} {what}; give another one.") from error
    return data


def _model_folder(name, path, nhead):
    """Read a model folder of this package."""
    settings = _settings(name, path / HYPERPARAMS)
    blank = settings["blank_index"]
    _check_heads(name, settings["Transformer"].get("nhead", nhead), nhead)
    fused = any(_is_fused(settings[key]) for key in ("subsampling", "Transformer"))
    if fused:
        raise UserError(
            f"The model {name} is fused: its BatchNorms are folded into the weights and cannot be trained; give the folder "
            "'pretrained_unfused' beside it."
        )
    tokenizer = _tokenizer_in(name, path)
    return Source(name, "a model folder", _load(name, path / WEIGHTS), file_digest(path / WEIGHTS), tokenizer, blank, settings)


def _tokenizer_in(name, folder):
    path = folder / TOKENIZER
    return checked_tokenizer(path.read_bytes() if path.is_file() else None, f"of {name}")


def _settings(name, path):
    """Read and check the settings of a model folder, as plain values."""
    needed = {"subsampling", "Transformer", "compute_features", "normalize", "speech_encoder", "sample_rate", "blank_index"}
    try:
        text = path.read_text(encoding="utf-8")
        if missing := needed - parse(text).keys():
            raise UserError(f"it has no {min(missing)}")
        tree = ruamel.yaml.YAML().load(text)
        for key, wanted in (("Transformer", "encoder_module"), ("speech_encoder", "transformer")):
            if not isinstance(tree[key], dict) or wanted not in tree[key]:
                raise UserError(f"its {key} has no {wanted}")
    except (UserError, UnicodeError) as error:
        raise UserRuntimeError(
            f"The {HYPERPARAMS} of {name} describes no model of this package ({one_line(error, 100)})."
        ) from error
    return tree


def _is_fused(settings):
    return isinstance(settings, dict) and (bool(settings.get("fused")) or _is_fused(settings.get("encoder_kwargs")))


def _load(name, path):
    """Load tensors by name."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return _tensors(name, torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except (safetensors.SafetensorError, OSError) as error:
        raise UserRuntimeError(f"{name} is damaged, or not a file of weights ({one_line(error, 150)}).") from error
    except Exception as error:  # unpickling can raise any error, also for refused classes
        raise UserError(
            f"{name} is damaged, or holds more than tensors, which could run code ({one_line(error, 100)}); give a file that "
            "holds only weights, preferably .safetensors."
        ) from error


def _tensors(name, state):
    """The state of a model in a file of ``torch.save``: the file itself, or the value of a usual key."""
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    state = state if isinstance(state, dict) else {}
    found = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and isinstance(key, str)}
    if not found:
        raise UserError(f"{name} holds no weights by name; give the state of a model.")
    return found


def _plain_names(weights):
    """Change the names of a checkpoint, from one process or several, to those of a model folder."""
    return {re.sub(r"^(module\.)?(speech_encoder\.)?", "", key): value for key, value in weights.items()}


@contextlib.contextmanager
def _converting(name):
    """Turn errors of unexpected names and shapes into one sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name} cannot be loaded: {one_line(error)}") from error
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"{name} has weights with unknown names or wrong shapes ({one_line(error, 100)}); give another file."
        ) from error


def _speechbrain_folder(name, path, weights, nhead):
    """Read a folder of SpeechBrain's inference, a checkpoint of its recipes, or a checkpoint of this package."""
    settings = path / HYPERPARAMS
    text = settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
    stated = re.search(r"^nhead: *(\d+)", text, re.MULTILINE)
    _check_heads(name, int(stated[1]) if stated else nhead, nhead)
    state = _load(name, weights)
    if any(key.startswith("speech_encoder.") for key in state):
        return Source(name, "a checkpoint of a run", _plain_names(state), file_digest(weights))
    state = _of_speechbrain(name, state, nhead)
    normalizer = path / "normalizer.ckpt"
    if normalizer.is_file():
        state |= {f"normalize.{key}": value for key, value in _load_statistics(name, normalizer).items()}
    # Blank and unknown are token 0 in SpeechBrain's recipes
    return Source(name, "a folder of SpeechBrain", state, file_digest(weights), _tokenizer_in(name, path), 0)


def _check_heads(name, theirs, nhead):
    if theirs != nhead:  # the weights would load, but give wrong answers
        raise UserError(f"{name} has {theirs} attention heads, but nhead is {nhead}; give --nhead {theirs}.")


def _load_statistics(name, path):
    """Load the state of SpeechBrain's InputNormalization with the names of this package's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        statistics = {"glob_mean": state["glob_mean"].flatten(), "glob_std": state["glob_std"].flatten()}
        return statistics | {"frames": torch.as_tensor(state["count"]).long()}
    except Exception as error:  # unpickling can raise any error
        raise UserError(f"{path.name} of {name} holds no statistics of features; remove it from the folder.") from error


def _of_speechbrain(name, weights, nhead):
    """Change the names of SpeechBrain's recipes (a list of front end, Transformer and two heads, or a part) to ours."""
    weights, found = {key.removeprefix("module."): value for key, value in weights.items()}, {}
    whole = any(key.partition(".")[0] in _SPEECHBRAIN_PARTS for key in weights)
    alone = "transformer." if any(key.startswith("encoder.") for key in weights) else "transformer.encoder."
    with _converting(name):
        converted = convert_speechbrain(weights, nhead)
    for key, value in converted.items():
        place, _, rest = key.partition(".")
        block = re.fullmatch(r"convblock_(\d)\.convs\.(conv|norm)_0\.(?:conv|norm)\.(\w+)", rest)
        if block:
            rest = f"stages.{block[1]}.{int(block[2] == 'norm')}.{block[3]}"
            if value.dim() == 4:  # from (bins, frames) to (frames, bins)
                value = value.transpose(2, 3)
        found[f"{_SPEECHBRAIN_PARTS.get(place, place)}.{rest}" if whole else alone + key] = value
    return found


def _nemo(name, path):
    """Read a NeMo model: an archive of weights, settings and a tokenizer."""
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: archive.extractfile(member).read() for member in archive if _is_wanted(member)}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserRuntimeError(f"{name} is damaged, or not an archive of NeMo ({one_line(error, 100)}).") from error
    if "model_weights.ckpt" not in members:
        raise UserError(f"{name} is not an archive of NeMo: it holds no model_weights.ckpt; give another one.")
    try:
        weights = torch.load(io.BytesIO(members["model_weights.ckpt"]), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise any error
        raise UserRuntimeError(f"{name} is damaged, or holds more than tensors ({one_line(error, 100)}).") from error
    try:
        settings = ruamel.yaml.YAML(typ="safe").load(members.get("model_config.yaml", b"encoder: {}"))["encoder"]
        places = {"reduce_before": settings.get("time_reduce_idx"), "recover_before": settings.get("time_recovery_idx")}
        if wrong := [place for place in places.values() if not isinstance(place, int | None)]:
            raise UserError(f"{wrong[0]!r} is not the number of a block")
    except Exception as error:  # parsing can raise any error
        raise UserError(f"The model_config.yaml of {name} states no encoder of NeMo ({one_line(error, 100)}).") from error
    weights = _of_nemo(name, _tensors(name, weights), **places)
    tokenizers = [content for member, content in members.items() if member.endswith("tokenizer.model")]
    head = weights.get("ctc_lin.w.weight")
    blank = 0 if head is None else len(head) - 1  # the last output
    tokenizer = checked_tokenizer(tokenizers[0] if len(tokenizers) == 1 else None, f"of {name}")
    return Source(name, "a model of NeMo", weights, file_digest(path), tokenizer, blank)


def _is_wanted(member):
    """Whether a member of an archive is needed. Members are read into memory; nothing is written."""
    return member.isfile() and member.name.endswith(("model_weights.ckpt", "model_config.yaml", "tokenizer.model"))


def _of_nemo(name, weights, **places):
    with _converting(name):
        converted = convert_nemo(weights, **places)
    return {re.sub("^head", "ctc_lin", key): value for key, value in converted.items()}
