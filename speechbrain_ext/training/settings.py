"""The settings of a training run, from hparams files and the command line, checked before anything is done."""

import copy
import dataclasses
import inspect
import os
import re
import tempfile
from pathlib import Path

import ruamel.yaml
import torch
from speechbrain.utils.checkpoints import DEFAULT_LOAD_HOOKS, DEFAULT_SAVE_HOOKS, get_default_hook
from speechbrain.utils.distributed import ddp_init_group, get_local_rank, if_main_process
from speechbrain.utils.logger import get_logger
from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

from speechbrain_ext.dataio.text import CASES
from speechbrain_ext.dataio.tokenizer import TOKEN_TYPES
from speechbrain_ext.hparams import (
    as_plain,
    check_known,
    load_hparams,
    merge_hparams,
    merged_tree,
    near_key,
    needed_keys,
    own_keys,
    parse_overrides,
    pop_extended,
    resolve_hparams,
    tag_of,
)
from speechbrain_ext.lobes.features import InputNormalization
from speechbrain_ext.model_folder.allowlist import PACKAGE
from speechbrain_ext.model_folder.weights import PRECISIONS
from speechbrain_ext.training.checkpoints import RandomStates
from speechbrain_ext.training.report import check_logger
from speechbrain_ext.training.sources import architecture_of
from speechbrain_ext.training.warm_start import ROLES
from speechbrain_ext.utils.errors import UsageError, UserError, is_number, one_line, runs_foreign_code
from speechbrain_ext.utils.prefixes import begins_with
from speechbrain_ext.utils.text import listing

logger = get_logger(__name__)

WHOLE = "a whole number above 0"
RANGES = {
    **dict.fromkeys(
        (
            "number_of_epochs",
            "training_steps",
            "optimizer_step_limit",
            "average_checkpoints",
            "statistics_batches",
            "vocab_size",
            "sample_rate",
            "grad_accumulation_factor",
            "warmup_steps",
            "d_model",
            "nhead",
            "num_encoder_layers",
            "d_ffn",
            "n_mels",
            "streaming_chunk_size",
            "predictor_size",
            "joint_size",
            "transducer_beam",
        ),
        (1, 10**9, WHOLE),
    ),
    **dict.fromkeys(("num_workers", "num_decoder_layers", "seed", "freeze_steps"), (0, 2**32 - 1, "a whole number, 0 or more")),
    "streaming_left_context": (-1, 10**9, "a number of chunks, or -1 for all"),
    "lr": (1e-12, 1e3, "a number above 0"),
    "dropout": (0, 0.999, "a number from 0 to less than 1"),
    "max_skipped": (0, 1, "a share from 0 to 1"),
    "max_duration": (1e-3, 1e9, "seconds above 0"),
    "ctc_weight": (0, 1, "a share from 0 to 1"),
    "consistency": (0, 1e3, "a weight, 0 = off"),
    "augment_warmup": (0, 10**9, "a number of steps, 0 or more"),
    "chunk_sampler: chunkwise_prob": (0, 1, "a share from 0 to 1"),
    "chunk_sampler: limited_left_context_prob": (0, 1, "a share from 0 to 1"),
    "label_smoothing": (0, 0.999, "a number from 0 to less than 1"),
    "train_batch_sampler: max_batch_length": (1e-3, 1e9, "seconds above 0"),
    "eval_batch_sampler: max_batch_length": (1e-3, 1e9, "seconds above 0"),
}
"""Lowest and highest value by key, and words for the range."""
PATHS = ("data_folder", "output_folder", "results_file", "init_from", "tokenizer_from")
"""Keys whose values are taken literally: they are not read as YAML, and nothing is expanded."""
MANIFESTS = ("train_manifest", "valid_manifest", "test_manifest")
"""Keys of the same kind with several values."""
TEXTS = ("train_splits", "test_splits", "init_include", "init_exclude", "freeze")
"""Keys whose values are lists of text."""
OF_DECODER = ("seq_lin", "seq_cost", "label_smoothing")
"""Keys without which a decoder cannot be trained."""
NULLABLE = ("optimizer_step_limit", "streaming_chunk_size", "streaming_left_context", "max_duration", "label_smoothing")
"""Keys of :data:`RANGES` that may be null."""
PARTS = """
    experiment corpus prepare dev_split train_splits test_splits brain train_batch_sampler eval_batch_sampler mix
    compute_features normalize encoder subsampling Transformer ctc_lin speech_encoder model modules ctc_cost
    opt_class lr_annealing epoch_counter checkpointer tokenizer train_logger
"""
"""Keys without which there is no training."""
NEEDED = {*RANGES, *PARTS.split()} - {*NULLABLE}
"""Keys that may not be null."""
WARM_START = ("init_from", "tokenizer_from", "init_include", "init_exclude", "freeze", "freeze_steps", "lr_scales", "mix")
"""Keys of the warm start; a continued run must have the same values."""
REFUSED = {
    "jit": "TorchScript supports none of these encoders; leave it out, or try --compile",
    "jit_module_keys": "TorchScript supports none of these encoders; leave it out, or try --compile",
    "compile_module_keys": "--compile compiles front end and encoder, and compiling other parts gains nothing",
    "log_config": "the messages of a run are in log.txt of its output folder; leave it out",
    "data_parallel_backend": "start several processes with torchrun instead",
}
"""Options of SpeechBrain's Brain that are not supported, with the remedy."""
TRAINING_OPTIONS = (
    "compile",
    "compile_mode",
    "grad_accumulation_factor",
    "max_grad_norm",
    "nonfinite_patience",
    "skip_nonfinite_grads",
    "optimizer_step_limit",
    "remove_vector_weight_decay",
    "eval_precision",
)
"""Options of the Brain that change the training, and have no column in the results table."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The hparams of a run."""

    files: list
    """The hparams file, and files that override it."""
    overrides: dict
    """Values that replace single keys."""
    asked: str = ""
    """Options of the command line, without paths."""

    def text(self):
        """The merged YAML text, with unresolved references."""
        return merge_hparams(self.files, self.overrides)

    def plain(self):
        """The merged values with resolved references; no objects are built."""
        return resolve_hparams(self.files, self.overrides)

    def load(self):
        """The merged values with all objects built."""
        return load_hparams(self.files, self.overrides)

    def replace(self, **overrides):
        """The same setting with further overrides."""
        return dataclasses.replace(self, overrides=self.overrides | overrides)


def take_paths(argv):
    """Take literal paths from a command line; SpeechBrain's parser would read them as YAML.

    Arguments
    ---------
    argv : list of str
        The command line.

    Returns
    -------
    others : list of str
        The other arguments.
    paths : dict
        Paths of ``--corpus`` and :data:`PATHS` by key, and lists of paths for :data:`MANIFESTS`.

    Example
    -------
    >>> take_paths(["a.yaml", "--train_manifest", "x #1.csv", "y", "--lr", "1", "--output_folder=2024"])
    (['a.yaml', '--lr', '1'], {'train_manifest': ['x #1.csv', 'y'], 'output_folder': '2024'})
    """
    others, paths, argv = [], {}, list(argv)
    while argv:
        argument = argv.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key not in ("corpus", *PATHS, *MANIFESTS):
            others.append(argument)
            continue
        values = [value] if equals else []
        while not equals and argv and not argv[0].startswith("--") and (key in MANIFESTS or not values):
            values.append(argv.pop(0))
        paths[key] = paths.get(key, []) + values if key in MANIFESTS else "".join(values)
    return others, paths


def begin_processes(run_opts):
    """Join the other processes, if torchrun has started several.

    Arguments
    ---------
    run_opts : speechbrain.utils.run_opts.RunOptions
        Options of SpeechBrain's Brain.

    Returns
    -------
    speechbrain.utils.run_opts.RunOptions
        The options, with a way to exchange gradients that the device has.

    Raises
    ------
    UsageError
        If several processes would use one GPU.
    """
    device, local_rank = run_opts.device or "", get_local_rank()
    if device == "cpu" or not torch.cuda.is_available():  # SpeechBrain's default, nccl, needs a GPU
        run_opts = _with(run_opts, distributed_backend="gloo")
    elif local_rank is not None:
        if device.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise UsageError(f"--device is {device}, but several processes need a GPU each; leave it out.")
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"There are more processes than GPUs; give --nproc_per_node {torch.cuda.device_count()}.")
    ddp_init_group(run_opts)
    return run_opts


def _with(run_opts, **options):
    """The options of the Brain with further ones of the command line."""
    return dataclasses.replace(run_opts, **options, overridden_args={*run_opts.overridden_args, *options})


def checked_options(run_opts):
    """Refuse options of the Brain that would give a traceback or have no effect; read the one that SpeechBrain leaves as text."""
    limit = run_opts.optimizer_step_limit
    if isinstance(limit, str):
        if not limit.isdecimal() or not int(limit):
            raise UsageError(f"--optimizer_step_limit is {limit!r}; give {WHOLE}.")
        run_opts = dataclasses.replace(run_opts, optimizer_step_limit=int(limit))
    if run_opts.ckpt_interval_steps > 0 and run_opts.ckpt_interval_minutes > 0:
        raise UsageError("--ckpt_interval_minutes and --ckpt_interval_steps exclude each other; give one.")
    return run_opts


def option(name, run_opts, plain):
    """An option of the Brain: that of the command line, else that of the resolved hparams, else SpeechBrain's."""
    value = getattr(run_opts, name)
    return value if name in run_opts.overridden_args else plain.get(name, value)


def choose_setting(hparams_file, run_opts, overrides, paths, corpus, fallback, of_manifests=None):
    """Choose the files and overrides of the run: with the given corpus, that of manifests or, without data, the fallback."""
    overrides = parse_overrides(overrides)
    options = {key: getattr(run_opts, key) for key in TRAINING_OPTIONS if key in run_opts.overridden_args}
    weights = {key: paths[key] for key in WARM_START if key in paths}
    asked = overrides | options | weights
    asked = " ".join(f"--{key} {as_plain(value)}" for key, value in asked.items() if key != "experiment")
    overrides |= paths
    for key in weights:
        if not paths[key]:
            raise UsageError(f"--{key} has no value; give a model or file, or leave it out.")
    if corpus == "":
        raise UsageError("--corpus has no value; give a corpus.yaml, or leave it out.")
    for key in PATHS[1:]:
        if overrides.get(key, "x") in (None, ""):
            raise UsageError(f"--{key} has no value; give one, or leave it out.")
    if "data_folder" in overrides and overrides["data_folder"] in (None, ""):
        raise UsageError("--data_folder has no value; leave it out to run on the embedded mini corpus.")
    architecture = architecture_of(hparams_file, paths.get("init_from"))
    files, chosen = [*architecture, hparams_file], [corpus] if corpus else []
    # The sizes of an initial model, and the settings of fine-tuning, replace those of the corpus
    files = [files[0], *chosen, *files[1:]] if architecture else [*files, *chosen]
    brain = tag_of(overrides["brain"] if "brain" in overrides else merged_tree(files).get("brain"))
    for number, file in enumerate(files):
        if isinstance(file, str):
            check_own_keys(file, files[:number], bool(brain) and not brain.startswith(f"!name:{PACKAGE}."))
    before = resolve_hparams(files)
    overrides |= {key: getattr(run_opts, key) for key in run_opts.overridden_args & before.keys()}
    given = not {*MANIFESTS}.isdisjoint(overrides)
    if of_manifests and given and MANIFESTS[0] not in before:
        files.insert(1, of_manifests)
        before = resolve_hparams(files)
    # A name of digits or a date stays a name; a name with references changes with their values
    stated = parse_overrides(merge_hparams(files))
    literal = [key for key in (*PATHS, *MANIFESTS) if stated.get(key) is not None and not tag_of(stated[key])]
    overrides = {key: before[key] for key in literal} | overrides
    overrides = check_types(overrides, before)
    if corpus:
        own = own_keys(corpus)
        overrides = ({} if "card" in own else {"card": {}}) | overrides  # not the card of the replaced corpus
        if not given and not {"data_folder", "extends"} & {*own, *overrides}:
            raise UsageError(
                f"There is no data_folder for {corpus}; give --data_folder, or set it in that file (null = none is needed)."
            )
    options = [name for name in HELP_TEXTS if name not in REFUSED]
    check_known(overrides, before, Path(hparams_file).name, [*options, *PATHS, *MANIFESTS, "corpus"])
    setting = Setting(files, overrides, asked)
    plain = setting.plain()
    taken = plain["prepare"] if isinstance(plain["prepare"], dict) else ()
    for key in (*MANIFESTS, "text_normalization"):
        if overrides.get(key) and key not in taken:
            raise UsageError(f"--{key} is given, but the prepare function of {plain['corpus']} does not take it; leave it out.")
    if fallback and not corpus and not plain["data_folder"] and MANIFESTS[0] not in plain:
        if if_main_process():
            print(
                f"No data_folder: this runs on the embedded mini corpus with the overrides in {os.path.relpath(fallback)}. "
                f"To train on real speech: python train.py {hparams_file} --data_folder /path/to/{plain['corpus']}",
                flush=True,
            )
        files = [files[0], fallback, *files[1:]] if architecture else [*files, fallback]
        setting = dataclasses.replace(setting, files=files)
        plain = setting.plain()
    if "size" in overrides:
        check_size(merged_tree([hparams_file]), parse_overrides(setting.text()), overrides)
    check_ranges(plain, run_opts)
    if is_number(option("ckpt_interval_steps", run_opts, plain), 1):  # minutes are given in the files of all trainings
        other = "steps" if run_opts.ckpt_interval_minutes > 0 else "minutes"
        setting = setting.replace(**{f"ckpt_interval_{other}": 0})
    if option("debug", run_opts, plain):  # the result of a few batches must not be among real results
        folder = plain["output_folder"] + "_debug"
        setting = setting.replace(output_folder=folder, results_file=f"{folder}/results.csv")
    return setting


def check_size(stated, merged, overrides):
    """Refuse the size of an encoder if other files replace the keys that it sets.

    Arguments
    ---------
    stated : dict
        Keys of the hparams file, with references unresolved.
    merged : dict
        The same keys in the whole setting.
    overrides : dict
        Values of the command line.

    Raises
    ------
    UsageError
        If another file replaces such a key, and the command line does not.
    """
    sized = [key for key in needed_keys(stated, stated.get("Transformer")) if "size" in needed_keys(stated, stated[key])]
    lost = [key for key in stated if key in sized and key not in overrides and as_plain(stated[key]) != as_plain(merged[key])]
    if lost:
        raise UsageError(
            f"--size {overrides['size']} has no effect on {listing(lost)}, because the settings of {merged['corpus']} replace "
            "them; leave it out, or give these keys too."
        )


def check_ranges(plain, run_opts):
    """Refuse values with which training would fail or learn nothing.

    Arguments
    ---------
    plain : dict
        Resolved hparams.
    run_opts : speechbrain.utils.run_opts.RunOptions
        Options of SpeechBrain's Brain.

    Raises
    ------
    UsageError
        If a number is outside its range, a value is unknown or has the wrong type, two special tokens have the same index, or a
        decoder lacks a part.
    """
    for name, remedy in REFUSED.items():
        if option(name, run_opts, plain):
            raise UsageError(f"--{name} is not supported: {remedy}.")
    given = dict(plain)
    for whole in RANGES:
        key, _, inner = whole.partition(": ")
        if inner and isinstance(plain.get(key), dict) and inner in plain[key]:
            given[whole] = plain[key][inner]
    for key, (low, high, wanted) in RANGES.items():
        value = given.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not low <= value <= high:  # also catches NaN
            raise UsageError(f"--{key} is {value!r}; give {wanted}.")
    for key in ("train_splits", "dev_split", *MANIFESTS[:2]):
        if not plain.get(key, True):
            raise UsageError(f"--{key} is empty; give at least one.")
    for key in OF_DECODER if plain["num_decoder_layers"] else ():
        if plain.get(key, True) is None:
            raise UsageError(f"--{key} is null, but a decoder needs it; give a value, or --num_decoder_layers 0.")
    if option("compile", run_opts, plain):
        if plain["activation_checkpointing"]:
            raise UsageError("--compile decides itself what to recompute; leave out activation_checkpointing: True.")
        if plain["chunk_sampler"] is not None:
            raise UsageError("--compile would compile again for each chunk size; leave it out, or the chunk_sampler.")
    check_logger(plain["logger"])
    if plain["weights_precision"] not in PRECISIONS:
        raise UsageError(f"--weights_precision is {plain['weights_precision']!r}; give {' or '.join(PRECISIONS)}.")
    if plain["token_type"] not in TOKEN_TYPES:
        raise UsageError(f"--token_type is {plain['token_type']!r}; give {', '.join(TOKEN_TYPES)}.")
    if plain.get("text_normalization", "none") not in CASES:
        raise UsageError(f"--text_normalization is {plain['text_normalization']!r}; give {', '.join(CASES)}.")
    for key, kind, wanted in (
        *((key, list, "a list of prefixes, [] = none") for key in ("init_include", "init_exclude", "freeze")),
        ("lr_scales", dict, "a mapping of prefixes to factors, {} = none"),
        ("mix", dict, "a mapping with manifest and share"),
        ("tokenizer_from", str, "init, new or a file"),
    ):
        if not isinstance(plain[key], kind):
            raise UsageError(f"--{key} is {as_plain(plain[key])!r}; give {wanted}.")
    mix = plain["mix"]
    if set(mix) != {"manifest", "share"}:
        raise UsageError(f"--mix has the keys {listing(mix)}; it takes manifest and share.")
    if not isinstance(mix["share"], (int, float)) or not 0 < mix["share"] < 1:
        raise UsageError(f"The share of --mix is {mix['share']!r}; give a number above 0 and below 1.")
    takes_manifest = isinstance(plain["prepare"], dict) and "mix_manifest" in plain["prepare"]
    if mix["manifest"] and not takes_manifest and (not isinstance(mix["manifest"], str) or "/" in mix["manifest"]):
        raise UsageError(
            f"The manifest of --mix is {mix['manifest']!r}, but {plain['corpus']} has splits; give the name of a split, or give "
            "all data as manifests (--train_manifest)."
        )
    for key in ("init_include", "init_exclude"):
        if plain[key] and plain["init_from"] is None:
            raise UsageError(f"--{key} is {as_plain(plain[key])!r}, but there is no initial model; give --init_from MODEL.")
    indices = [plain[f"{role}_index"] for role in ROLES]
    if len(set(indices)) < len(indices) or not all(0 <= index < plain["vocab_size"] for index in indices):
        raise UsageError(f"The indices of blank, bos, eos and unk are {indices}; give four different ones below vocab_size.")


def check_parts(hparams):
    """Refuse settings of features, optimizer and schedule that fail only in the first step, or when the run continues.

    Raises
    ------
    UsageError
        If subsampling does not state its factor; if features cannot be made, have another number of bins than subsampling takes,
        or would get no statistics; if the optimizer cannot make a step; if an augmentation does not return a batch and its
        lengths; or if the schedule does not follow steps, or checkpoints cannot keep it.
    """
    normalize, frozen = hparams["normalize"], hparams["freeze"]
    is_global = isinstance(normalize, InputNormalization) and normalize.norm_type == "global"
    if hparams["init_from"] is None and is_global and not normalize.glob_mean.numel():
        until = normalize.update_until_epoch
        if until <= 1 or any(begins_with("normalize", prefix) for prefix in frozen):
            raise UsageError(
                f"update_until_epoch of --normalize is {until}, and --freeze is {as_plain(frozen)}: the features would have no "
                "statistics; give at least 2, and do not freeze normalize."
            )

    if not hasattr(hparams["subsampling"], "factor"):
        raise UsageError(
            f"--subsampling is {type(hparams['subsampling']).__name__}, which has no factor, the number of feature frames in an "
            "encoder frame; give a class of speechbrain_ext.lobes.subsampling, or one that takes and returns what these do."
        )

    def make_features():
        stft = getattr(hparams["compute_features"], "compute_STFT", None)
        if stft is not None and stft.n_fft < stft.win_length:  # as with rates above 16 kHz
            larger = 1 << (stft.win_length - 1).bit_length()
            raise ValueError(
                f"its windows have {stft.win_length} samples, more than n_fft {stft.n_fft}; give --compute_features "
                f"'{{n_fft: {larger}}}'."
            )
        feats = hparams["compute_features"](torch.zeros(1, hparams["sample_rate"]))
        bins = feats.shape[-1]
        taken = getattr(hparams["subsampling"], "input_size", bins)
        if taken != bins:
            raise ValueError(f"it gives {bins} bins, but subsampling takes {taken}; give --subsampling '{{input_size: {bins}}}'.")
        return feats

    def make_optimizer():
        optimizer = hparams["opt_class"]([torch.nn.Parameter(torch.zeros(1))])
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:  # as of LBFGS
            raise TypeError("its step needs a closure, and here it gets none; give another optimizer.")
        return optimizer

    parts, made = {"compute_features": make_features, "opt_class": make_optimizer}, {}
    for key, make in parts.items():
        try:
            with torch.no_grad():
                made[key] = make()
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            if runs_foreign_code(error):
                raise  # a bug in a class of the user
            raise UsageError(f"--{key} cannot be used: {one_line(error)}") from error
    _check_schedule(hparams["lr_annealing"], made["opt_class"])
    waves = torch.arange(float(hparams["sample_rate"])).sin()[None]
    _check_augmentation("wav_augment", hparams, waves)
    _check_augmentation("fea_augment", hparams, torch.ones_like(made["compute_features"]))


def _check_augmentation(key, hparams, example):
    """Refuse an augmentation that does not return a batch and relative lengths, tried with a batch of copies of an example."""
    augment, lens = hparams[key], torch.tensor([1.0, 0.9, 0.8])
    if not augment:
        return
    batch = example.repeat(len(lens), *[1] * (example.dim() - 1))
    views = [2] if key == "fea_augment" and hparams["consistency"] and getattr(augment, "makes_views", False) else []
    try:
        trial = copy.deepcopy(augment)  # a class may keep tensors of its first call, on the device of that call
    except Exception:  # what cannot be copied shows in the first step whether it works
        return
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        RandomStates().save(Path(folder) / "random")
        try:
            found = trial(batch, lens, *views)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            if runs_foreign_code(error):
                return  # it may need more than this batch; a bug in a class of the user shows in the first step
            wrong = one_line(error)
        else:
            wrong = _flaw_of_augmented(found, batch)
        finally:
            RandomStates().load(Path(folder) / "random", True)
    if wrong:
        raise UsageError(
            f"--{key} is {type(augment).__name__}, but an augmentation must take a batch and its relative lengths, and return "
            f"both, or several copies of both: {wrong}; SpeechBrain's augmentations need its Augmenter around them."
        )


def _flaw_of_augmented(found, batch):
    """What is wrong with that which an augmentation made of a batch; None if nothing is."""
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not all(isinstance(each, torch.Tensor) for each in found):
        return f"it returns {'only a tensor' if isinstance(found, torch.Tensor) else f'a {type(found).__name__}'}"
    (samples, lens), count = found, len(batch)
    fits = samples.dim() == batch.dim() and samples.shape[2:] == batch.shape[2:] and lens.shape == samples.shape[:1]
    if not fits or not len(samples) or len(samples) % count:
        return f"it makes the shapes {tuple(samples.shape)} and {tuple(lens.shape)} of {tuple(batch.shape)} and ({count},)"
    return None


def _check_schedule(schedule, optimizer):
    """Refuse a schedule that does not follow optimizer steps, or that checkpoints cannot keep."""
    try:
        trial = copy.deepcopy(schedule)
        trial(optimizer, *([1] if "num_updates" in inspect.signature(trial).parameters else []))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lr_annealing"
            get_default_hook(trial, DEFAULT_SAVE_HOOKS)(trial, path)
            if path.exists():  # only the main process writes
                get_default_hook(trial, DEFAULT_LOAD_HOOKS)(trial, path, True)
    except OSError:
        raise  # such as of a full disk
    except Exception as error:  # unpickling can raise any error
        if runs_foreign_code(error):
            raise  # a bug in a class of the user
        raise UsageError(
            f"lr_annealing is {type(schedule).__name__}, which does not follow optimizer steps or cannot be saved: "
            f"{one_line(error)}; give for example NoamScheduler or WarmCoolDecayLRSchedule, or a class of your own that is "
            "called with (optimizer) or (optimizer, num_updates), and has SpeechBrain's register_checkpoint_hooks, "
            "mark_as_saver and mark_as_loader."
        ) from error


def check_own_keys(file, before, has_own_brain=False):
    """Check the values that a file states itself against those that it overrides.

    Arguments
    ---------
    file : str
        An hparams file.
    before : list
        Files that it overrides, besides those that it extends.
    has_own_brain : bool
        Whether the Brain is a class of the user, which may use any key; what looks like a misspelling is then only warned about.

    Raises
    ------
    UsageError
        If a value has another type, a list is needed, or a key looks like a misspelled one: no other has its name, and nothing
        refers to it.
    """
    own = own_keys(file)
    if not (known := [*before, *pop_extended(own, Path(file).resolve())]):
        return
    old = RunOptions().as_dict() | merged_tree(known)
    for key in own.keys() - old.keys():
        near = near_key(key, old, 0.85)
        if near and key not in needed_keys({}, [*merged_tree([*before, file]).values()]):
            if not has_own_brain:
                raise UsageError(f"{file} has the key {key}, which nothing uses; did you mean {near}?")
            logger.warning("%s has the key %s, which only your own Brain can use; did you mean %s?", file, key, near)
    checked = check_types({key: value for key, value in own.items() if key not in (*PATHS, *MANIFESTS)}, old, f"{file}: ")
    for key, value in checked.items():
        if isinstance(value, list) and value != own[key]:  # a file is read as it stands
            raise UsageError(f"{file}: {key} is {as_plain(own[key])!r}; give {as_plain(value)!r}.")


def check_types(overrides, before, where="--"):
    """Check that each override has the type of its key in the file.

    Arguments
    ---------
    overrides : dict
        Values by key.
    before : dict
        The values of the hparams file.
    where : str
        What precedes a key in messages.

    Returns
    -------
    dict
        The overrides, with single values in lists and numbers as text where the key needs that.

    Raises
    ------
    UsageError
        If a value has another type, or is null where the training needs one.
    """
    checked = {}
    for key, value in overrides.items():
        old = before.get(key)
        if key in PATHS:
            value = _literal(key, value)
        elif key in MANIFESTS:
            value = [_literal(key, item) for item in (value if isinstance(value, list) else [value])]
        elif isinstance(old, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        elif isinstance(old, list) and not tag_of(old) and isinstance(value, (str, int, float)):
            value = [value]
        checked[key] = value
        if value is None and key in NEEDED:
            raise UsageError(f"{where}{key} is null, but it needs a value; give one, or leave it out.")
        if key in TEXTS and isinstance(value, list):
            value = checked[key] = [str(item) if is_number(item) else item for item in value]
            for item in value:
                if not isinstance(item, str) and not tag_of(item):
                    raise UsageError(f"{where}{key} has the item {as_plain(item)!r}; give texts.")
        if key not in before or key in (*PATHS, *MANIFESTS) or value is None or tag_of(value):
            continue  # unknown keys are refused when files and overrides are merged
        if old is None and isinstance(value, dict):
            given = ", ".join(f"{name}: {item}" for name, item in value.items())
            raise UsageError(
                f"{where}{key} is {{{given}}}, but the hparams file has null there, so the class is unknown; give it: "
                f"{where}{key} '!new:package.Class {{{given}}}', or extend the file."
            )
        kinds = {
            bool: "True or False",
            int: "a whole number",
            float: "a number",
            str: "a text",
            list: "a list",
            dict: "a mapping",
        }
        wanted = next((kind for kind in kinds if isinstance(old, kind)), None)
        if tag_of(old):  # an object takes new arguments; the type of a computed value is unknown
            wanted = dict if tag_of(old).startswith(("!new:", "!name:")) else None
        fits = wanted is None or isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (wanted in (int, float) and isinstance(value, bool)):
            raise UsageError(f"{where}{key} is {as_plain(value)!r}; give {kinds[wanted]}, as in the hparams file.")
        if isinstance(value, dict) and isinstance(old, dict):
            _check_numbers(value, old, f"{where}{key}")
    return checked


def _check_numbers(given, before, where):
    """Refuse text in a mapping where the file has a number or a truth value."""
    for key, value in given.items():
        if isinstance(before.get(key), (bool, int, float)) and isinstance(value, str):
            wanted = "True or False" if isinstance(before[key], bool) else "a number"
            raise UsageError(f"{where}: {key} is {value!r}; give {wanted}, as in the hparams file.")


def _literal(key, value):
    """A path as text that HyperPyYAML does not change."""
    if re.search("<[^<>]*>", str(value)):
        raise UsageError(f"--{key} is {str(value)!r}, and <...> would be read as a reference; give another name.")
    return f"./{value}" if str(value).startswith("(") else str(value)  # HyperPyYAML reads (...) as a tuple


def check_folder(output, asked, data_moved):
    """Refuse to continue a run with another corpus, model or optimizer; returns other keys that have changed."""
    before, now = recorded(output), ruamel.yaml.YAML().load(asked)
    if before is None:
        return []
    fixed = {"train_splits", "token_type", "speech_encoder", *WARM_START} | (set() if data_moved else {"data_folder"})
    parts = [now[key] for key in ("speech_encoder", "transducer", "ctc_lin", "seq_lin")]
    fixed |= needed_keys(now, parts) | {key for key in now if key.endswith("_index")}
    for key in sorted(fixed, key=list(now).index):
        old, new = (as_plain(tree.get(key)) for tree in (before, now))
        if old != new:
            moved = ", or --data_moved True if it is the same data in another place" if key == "data_folder" else ""
            raise UsageError(
                f"{output} holds a run with {key} {old}, but this run has {new}; give another --output_folder{moved}."
            )
    for key in ("opt_class", "lr_annealing"):  # their state belongs to the class; other settings of them may change
        old, new = (tag_of(tree.get(key)) for tree in (before, now))
        if old != new:
            raise UsageError(f"{output} holds a run with {key} {old}, but this run has {new}; give another --output_folder.")
    changed = [key for key in now if key in before and as_plain(before[key]) != as_plain(now[key])]
    return [key for key in changed if key not in (*PATHS, "data_moved")]


def recorded(output):
    """The settings of the run in a folder; None if there is no run, or the run has no weights yet."""
    path = output / "hyperparams.yaml"
    has_weights = any((output / "save").glob("CKPT*")) or (output / "pretrained").exists()
    if not path.exists() or not has_weights:
        return None
    try:
        return dict(ruamel.yaml.YAML().load(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, ruamel.yaml.YAMLError) as error:
        raise UsageError(
            f"{path} is damaged ({one_line(error, 100)}), so the run in {output} is unknown; give another --output_folder."
        ) from error
