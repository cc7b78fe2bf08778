"""The steps of a training run. Each step returns its results.

Hparams -> prepared corpus -> manifests -> tokenizer -> datasets -> Brain -> training -> final model (the average of the best
checkpoints, fused if the architecture supports it) -> tests -> rows of the results table and a model folder.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import re
from contextlib import nullcontext
from pathlib import Path

import ruamel.yaml
import sentencepiece
import speechbrain as sb
import torch
from speechbrain.utils.distributed import get_rank, if_main_process, run_on_main
from speechbrain.utils.logger import get_logger
from speechbrain.utils.seed import seed_everything

from speechbrain_ext.dataio.datasets import (
    MIXED,
    MixedBatches,
    drop_unfit,
    loader_options,
    make_datasets,
    merge_manifests,
    read_manifest,
)
from speechbrain_ext.dataio.text import CASES
from speechbrain_ext.dataio.tokenizer import TOKEN_TYPES, train_tokenizer, unknown_characters
from speechbrain_ext.decoders.lm import make_scorer
from speechbrain_ext.hparams import (
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
from speechbrain_ext.model_folder.lm import load_lm
from speechbrain_ext.model_folder.weights import PRECISIONS
from speechbrain_ext.model_folder.write import inference_hparams, write_model_folder
from speechbrain_ext.training.checkpoints import AtomicCheckpointer, Origin
from speechbrain_ext.training.report import check_logger, draw_curve, examples, with_logger
from speechbrain_ext.training.results import ResultRow, append_rows, check_table
from speechbrain_ext.training.sources import architecture_of, locate, read_architecture, read_source
from speechbrain_ext.training.warm_start import ROLES, begin_with, chosen_tokenizer
from speechbrain_ext.utils.error_rates import error_figures, error_sentence
from speechbrain_ext.utils.errors import UsageError, UserError, UserRuntimeError, one_line, raised_in, runs_foreign_code
from speechbrain_ext.utils.files import file_digest, locked, write_bytes, write_text
from speechbrain_ext.utils.machine import describe_machine, emulates, keep_freed_memory, python_command
from speechbrain_ext.utils.text import listing

logger = get_logger(__name__)

TRAIN, VALID = object(), object()  # keys that no name of a test split can equal
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
WARM_START = ("init_from", "tokenizer_from", "init_include", "init_exclude", "freeze", "freeze_steps", "lr_scales", "mix")
"""Keys of the warm start; a continued run must have the same values."""
QUIET = ("speechbrain.dataio.sampler", "speechbrain.core", "speechbrain.utils.checkpoints", "speechbrain.utils.quirks")
"""Loggers whose messages below warnings are routine."""
OF_TRAINING = ("dropout", "update_until_epoch", "momentum", "tgt_vocab", "num_decoder_layers", "identity_init")
"""Arguments of a model's parts that do not change the answers of the encoder."""
REFUSED = {
    "jit": "TorchScript supports none of these encoders; leave it out, or try --compile",
    "jit_module_keys": "TorchScript supports none of these encoders; leave it out, or try --compile",
    "compile_module_keys": "--compile compiles front end and encoder, and compiling other parts gains nothing",
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
)
"""Options of the Brain that change the training, and have no column in the results table."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The results of a run."""

    rows: list
    """A :class:`ResultRow` for each test set and search."""
    folders: dict
    """Model folders by name; ``pretrained`` is the one to use."""
    output: Path
    """The folder of the run."""


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


def run(hparams_file, run_opts, overrides, paths=None, corpus=None, fallback=None, of_manifests=None):
    """Run all steps of a training.

    Arguments
    ---------
    hparams_file : str
        An hparams file.
    run_opts : speechbrain.utils.run_opts.RunOptions
        Options of SpeechBrain's Brain.
    overrides : str
        YAML text, such as ``speechbrain.parse_arguments`` makes from the command line.
    paths : dict, optional
        Literal overrides of the keys in :data:`PATHS` and :data:`MANIFESTS`.
    corpus : str, optional
        A ``corpus.yaml`` that overrides the hparams file.
    fallback : str, optional
        The ``corpus.yaml`` to use if no ``data_folder`` is given.
    of_manifests : str, optional
        The ``corpus.yaml`` to use if manifests are given, and the files have no keys for them.

    Returns
    -------
    RunResult

    Raises
    ------
    UsageError
        If an argument is wrong; the run has done nothing yet.
    UserError, OSError
        If an error stops the run that the user can fix.
    """
    keep_freed_memory()
    logging.getLogger("speechbrain.utils.train_logger").addFilter(_is_not_of_images)
    try:
        run_opts = checked_options(run_opts)
        setting = choose_setting(hparams_file, run_opts, overrides, paths or {}, corpus, fallback, of_manifests)
        setting, model = find_model(setting)
        hparams = setting.load()
        check_parts(hparams)
        output = Path(hparams["output_folder"])
        changed = check_folder(output, setting.text(), hparams["data_moved"])
        source = read_source(hparams["init_from"], model, hparams["nhead"]) if model else None
        tokenizer = chosen_tokenizer(hparams, source)
        check_table(hparams["results_file"])
    except UserError as error:
        raise UsageError(one_line(error, 1000)) from error
    except OSError as error:
        said = error.strerror is not None and error.filename is not None
        cause = f"{error.filename} cannot be read or written: {error.strerror}; give another path." if said else str(error)
        raise UsageError(cause) from error
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    run_on_main(sb.create_experiment_directory, [str(output)])
    if changed:
        logger.warning("The run in %s continues with other settings than it began with: %s.", output, ", ".join(changed))
    taken = f"Another run writes to {output}; wait for it, or give another --output_folder."
    with locked(output / ".lock", taken) if if_main_process() else nullcontext():
        try:
            return _run(hparams_file, run_opts, setting, hparams, source, tokenizer)
        except RuntimeError as error:
            # The process that has ended gives the reason
            if not get_rank() or not (isinstance(error, torch.distributed.DistError) or "by peer" in str(error)):
                raise
            raise UserRuntimeError("Another process of this training has ended.") from error


def _run(hparams_file, run_opts, setting, hparams, source, tokenizer):
    """Run the steps in a locked output folder."""
    output = Path(hparams["output_folder"])
    manifests, asked = prepare_corpus(hparams), setting.text()
    tokenizer_file, tokens = prepare_tokenizer(hparams, manifests[TRAIN], tokenizer)
    setting, hparams = with_tokenizer(setting, hparams, tokenizer_file, tokens)
    datasets = make_datasets(hparams, manifests)
    for key, dataset in datasets.items():
        report_unknown(dataset, hparams["tokenizer"], {TRAIN: "train", VALID: "valid"}.get(key, key))
    for key, name in ((TRAIN, "train"), (VALID, "valid")):
        drop_unfit(datasets[key], hparams, output / f"unfit_{name}.csv", name)
    origin = {"utterances": digest_of(datasets[TRAIN]), "validation utterances": digest_of(datasets[VALID])}
    origin |= {"tokens": file_digest(tokenizer_file)} | ({} if source is None else {"initial weights": source.digest})
    checkpointer, origin = hparams["checkpointer"], Origin(**origin)
    checkpointer.add_recoverable("origin", origin)
    begun = checkpointer.find_checkpoint(ckpt_predicate=checkpointer.fits)
    if begun is not None:
        AtomicCheckpointer(checkpointer.checkpoints_dir, {"origin": origin}).load_checkpoint(begun)  # raises errors now
    if hparams["lm"] is not None:
        add_lm(hparams)
    for search in ("ctc_search", "test_search", "transducer_search"):
        if hparams[search] is not None and not callable(hparams[search]):
            raise UsageError(f"{search} is {hparams[search]!r}, which is not a search; give the class of a search, or null.")
        if hasattr(hparams[search], "check"):
            hparams[search].check()  # raises its errors before the training

    # A restarted run skips completed steps, which draw random numbers; from here on both draw the same
    seed_everything(hparams["seed"] + (get_rank() or 0), verbose=False)
    if source is not None and begun is None:
        report_differences(source, setting, hparams)
        begin_with(source, hparams, tokenizer_file)
    hparams["train_logger"] = with_logger(hparams["train_logger"], hparams["logger"], output, hparams["experiment"])
    brain = make_brain(hparams, run_opts)
    samplers = {key: hparams["eval_batch_sampler"] for key in datasets} | {TRAIN: hparams["train_batch_sampler"]}
    mixed = ids_of_mixed(hparams)
    if mixed:
        keys = {"make": samplers[TRAIN], "mixed": mixed, "share": hparams["mix"]["share"], "seed": hparams["seed"]}
        samplers[TRAIN] = functools.partial(MixedBatches, **keys)
    options = {key: loader_options(dataset, samplers[key], hparams["num_workers"]) for key, dataset in datasets.items()}
    # Later runs are compared with this file, so it holds nothing that was refused
    run_on_main(write_text, [output / "hyperparams.yaml", asked])
    brain.fit(
        hparams["epoch_counter"],
        datasets[TRAIN],
        datasets[VALID],
        train_loader_kwargs=options[TRAIN],
        valid_loader_kwargs=options[VALID],
    )
    models = brain.make_final(statistics_batches(brain, datasets[TRAIN], options[TRAIN]))
    rows, shown = [], ""
    for split in hparams["test_splits"]:
        brain.evaluate(datasets[split], test_loader_kwargs=options[split])
        shown = shown or examples(next(reversed(brain.error_rates.values())).scores)
        rows += make_rows(brain, split, hparams_file, setting, seconds_of(datasets[TRAIN], mixed))
    return keep(brain, setting, models, tokenizer_file, rows, shown, provenance(setting, hparams, source))


def add_lm(hparams):
    """Add the language model of the hparams to the joint search."""
    search = hparams["test_search"]
    if not hparams["num_decoder_layers"] or not hasattr(search, "add_scorer"):
        raise UsageError(
            f"lm is {hparams['lm']}, but there is no joint search to use it; give null, or a decoder and its search."
        )
    lm = load_lm(hparams["lm"], hparams["tokenizer"])
    search.add_scorer(make_scorer(lm, hparams["lm_temperature"]), hparams["lm_weight"])


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


def _is_not_of_images(record):
    """Whether a message is not SpeechBrain's, at import, that there is no torchvision to save images with."""
    return "torchvision" not in record.getMessage()


def checked_options(run_opts):
    """Refuse options of the Brain that would give a traceback or have no effect; read the one that SpeechBrain leaves as text."""
    for option, remedy in REFUSED.items():
        if getattr(run_opts, option):
            raise UsageError(f"--{option} is not supported: {remedy}.")
    limit = run_opts.optimizer_step_limit
    if not isinstance(limit, str):
        return run_opts
    if not limit.isdecimal() or not int(limit):
        raise UsageError(f"--optimizer_step_limit is {limit!r}; give {WHOLE}.")
    return dataclasses.replace(run_opts, optimizer_step_limit=int(limit))


def choose_setting(hparams_file, run_opts, overrides, paths, corpus, fallback, of_manifests=None):
    """Choose the files and overrides of the run: with the given corpus, that of manifests or, without data, the fallback."""
    overrides = parse_overrides(overrides)
    options = {key: getattr(run_opts, key) for key in TRAINING_OPTIONS if key in run_opts.overridden_args}
    weights = {key: paths[key] for key in WARM_START if key in paths}
    asked = overrides | options | weights
    asked = " ".join(f"--{key} {_plain(value)}" for key, value in asked.items() if key != "experiment")
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
    files = [*architecture, hparams_file, *([corpus] if corpus else [])]
    for number, file in enumerate(files):
        if isinstance(file, str):
            check_own_keys(file, files[:number])
    before = resolve_hparams(files)
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
        # The sizes of an initial model override those of the fallback
        files = [files[0], fallback, *files[1:]] if architecture else [*files, fallback]
        setting = dataclasses.replace(setting, files=files)
        plain = setting.plain()
    check_ranges(plain, run_opts)
    if run_opts.debug:  # the result of a few batches must not be among real results
        folder = plain["output_folder"] + "_debug"
        setting = setting.replace(output_folder=folder, results_file=f"{folder}/results.csv")
    return setting


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
        If a number is outside its range, a value is unknown or has the wrong type, or two special tokens have the same index.
    """
    given = dict(plain)
    if "grad_accumulation_factor" in run_opts.overridden_args:
        given["grad_accumulation_factor"] = run_opts.grad_accumulation_factor
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
    if run_opts.compile if "compile" in run_opts.overridden_args else plain.get("compile"):
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
            raise UsageError(f"--{key} is {_plain(plain[key])!r}; give {wanted}.")
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
            raise UsageError(f"--{key} is {_plain(plain[key])!r}, but there is no initial model; give --init_from MODEL.")
    indices = [plain[f"{role}_index"] for role in ROLES]
    if len(set(indices)) < len(indices) or not all(0 <= index < plain["vocab_size"] for index in indices):
        raise UsageError(f"The indices of blank, bos, eos and unk are {indices}; give four different ones below vocab_size.")


def check_parts(hparams):
    """Refuse settings of features and optimizer that fail only in the first step.

    Raises
    ------
    UsageError
        If features or an optimizer cannot be made.
    """
    parts = {
        "compute_features": lambda: hparams["compute_features"](torch.zeros(1, hparams["sample_rate"])),
        "opt_class": lambda: hparams["opt_class"]([torch.nn.Parameter(torch.zeros(1))]),
    }
    for key, make in parts.items():
        try:
            with torch.no_grad():
                make()
        except (TypeError, ValueError, RuntimeError) as error:
            if runs_foreign_code(error):
                raise  # a bug in a class of the user
            raise UsageError(f"--{key} cannot be used: {one_line(error)}") from error


def check_own_keys(file, before):
    """Check the values that a file states itself against those that it overrides.

    Arguments
    ---------
    file : str
        An hparams file.
    before : list
        Files that it overrides, besides those that it extends.

    Raises
    ------
    UsageError
        If a value has another type, or a key looks like a misspelled one: no other has its name, and nothing refers to it.
    """
    own = own_keys(file)
    if not (known := [*before, *pop_extended(own, Path(file).resolve())]):
        return
    old = merged_tree(known)
    for key in own.keys() - old.keys():
        near = near_key(key, old, 0.85)
        if near and key not in needed_keys({}, [*merged_tree([*before, file]).values()]):
            raise UsageError(f"{file} has the key {key}, which nothing uses; did you mean {near}?")
    check_types({key: value for key, value in own.items() if key not in (*PATHS, *MANIFESTS)}, old, f"{file}: ")


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
        If a value has another type.
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
            raise UsageError(f"{where}{key} is {_plain(value)!r}; give {kinds[wanted]}, as in the hparams file.")
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
        old, new = (_plain(tree.get(key)) for tree in (before, now))
        if old != new:
            moved = ", or --data_moved True if it is the same data in another place" if key == "data_folder" else ""
            raise UsageError(
                f"{output} holds a run with {key} {old}, but this run has {new}; give another --output_folder{moved}."
            )
    for key in ("opt_class", "lr_annealing"):  # their state belongs to the class; other settings of them may change
        old, new = (tag_of(tree.get(key)) for tree in (before, now))
        if old != new:
            raise UsageError(f"{output} holds a run with {key} {old}, but this run has {new}; give another --output_folder.")
    changed = [key for key in now if key in before and _plain(before[key]) != _plain(now[key])]
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


def _plain(node):
    """A part of parsed hparams as plain values, with tags as text and without comments."""
    if isinstance(node, dict):
        plain = {key: _plain(value) for key, value in node.items()}
    elif isinstance(node, list):
        plain = [_plain(value) for value in node]
    else:
        plain = node.value if tag_of(node) else node
    return f"{tag_of(node)} {plain}" if tag_of(node) else plain


def mixed_split(hparams):
    """The name of the split that is mixed in; None if there is none."""
    manifest = hparams["mix"]["manifest"]
    return "mixed" if manifest and "mix_manifest" in getattr(hparams["prepare"], "keywords", ()) else manifest


def sets_of_training(hparams):
    """Names of the training splits; if one is mixed in, it is the last."""
    mixed = mixed_split(hparams)
    return [*hparams["train_splits"], *([mixed] if mixed else [])]


def ids_of_mixed(hparams):
    """Ids of the mixed-in utterances in the training set."""
    mixed = mixed_split(hparams)
    path = Path(hparams["output_folder"]) / f"{mixed}.csv"
    return {MIXED + row["ID"] for row in read_manifest(path)} if mixed else set()


def prepare_corpus(hparams):
    """Call the prepare function of the corpus; returns paths of manifests by TRAIN, VALID and the names of test splits."""
    output, mixed = Path(hparams["output_folder"]), mixed_split(hparams)
    splits = {"tr_splits": sets_of_training(hparams), "dev_splits": [hparams["dev_split"]], "te_splits": hparams["test_splits"]}
    run_on_main(hparams["prepare"], kwargs={"data_folder": hparams["data_folder"], "save_folder": str(output), **splits})
    merged = output / "train+merged.csv"  # no split has this name
    parts = [output / f"{split}.csv" for split in hparams["train_splits"]]
    run_on_main(merge_manifests, [parts, merged, output / f"{mixed}.csv" if mixed else None])
    names = {VALID: hparams["dev_split"]} | {split: split for split in hparams["test_splits"]}
    paths = {key: output / f"{name}.csv" for key, name in names.items()}
    for path in paths.values():
        read_manifest(path)  # raises errors now; the training set has been read already
    return {TRAIN: merged} | paths


def find_model(setting):
    """Find the initial model of the run.

    Returns the setting and the path of the model, or None. The setting gets the commit of a repository, and the architecture of
    that commit.
    """
    plain = setting.plain()
    given = plain["init_from"]
    if given is None:
        return setting, None
    before = (recorded(Path(plain["output_folder"])) or {}).get("init_from")
    run_on_main(locate, [given, before])  # the other processes find it in the cache
    name, path = locate(given, before)
    if any(isinstance(each, dict) for each in setting.files):  # the architecture is that of the latest commit
        file, keys = read_architecture(name, path)
        files = [keys if isinstance(each, dict) else each for each in setting.files[1:]]
        setting = dataclasses.replace(setting, files=[str(Path(setting.files[0]).parent / file), *files])
    return setting.replace(init_from=name), path


def prepare_tokenizer(hparams, manifest, model=None):
    """Write the given tokenizer, or train one; returns its file and its number of tokens."""
    if model is not None:
        path = Path(hparams["output_folder"]) / "taken.model"
        run_on_main(write_bytes, [path, model])
    else:
        path = Path(hparams["output_folder"]) / f"{hparams['token_type']}_{hparams['vocab_size']}.model"
        special = {f"{role}_index": hparams[f"{role}_index"] for role in ROLES}
        run_on_main(train_tokenizer, [manifest, path, hparams["vocab_size"], hparams["token_type"]], special)
    tokens = sentencepiece.SentencePieceProcessor(str(path)).vocab_size()
    if model is None and tokens < hparams["vocab_size"]:
        logger.warning(
            "The transcripts give %d tokens instead of %d; the model uses the smaller number.", tokens, hparams["vocab_size"]
        )
    return path, tokens


def with_tokenizer(setting, hparams, path, tokens):
    """Load the tokenizer; returns the setting and hparams of a model with its number of tokens."""
    if tokens != hparams["vocab_size"]:
        setting = setting.replace(vocab_size=tokens)
        hparams = setting.load()
    hparams["tokenizer"].load(str(path))
    return setting, hparams


def report_unknown(dataset, tokenizer, name):
    """Log the characters of a dataset that no token has."""
    unknown = unknown_characters(tokenizer, [item["wrd"] for item in dataset.data.values()])
    if unknown:
        shown = listing([f"{character} ({count})" for character, count in unknown.most_common()])
        logger.warning("%s: transcripts hold characters that the tokenizer lacks (number of transcripts): %s", name, shown)


def report_differences(source, setting, hparams):
    """Log differences between the settings of the initial model and this one; shapes do not show all of them."""
    if source.settings is None:
        return
    yaml = ruamel.yaml.YAML()
    ours = yaml.load(inference_hparams(yaml.load(setting.text()), hparams))
    for part in ("sample_rate", "compute_features", "normalize", "subsampling", "Transformer"):
        old, new = (_settings_of(part, tree[part]) for tree in (source.settings, ours))
        for key in old:
            if key in new and old[key] != new[key]:  # folders of other versions may lack keys
                logger.warning("%s has %s %s, but this model has %s.", source.name, key, old[key], new[key])


def _settings_of(part, node):
    """The settings of a part that change its answers, by name."""
    if not isinstance(node, dict):
        return {part: _plain(node)}
    return {part: tag_of(node)} | {f"{part}: {key}": _plain(value) for key, value in node.items() if key not in OF_TRAINING}


def make_brain(hparams, run_opts):
    """Make the Brain of the hparams; raises UsageError if the machine lacks the device or the precision."""
    try:
        torch.zeros(1, device=run_opts.device).item()
        brain = hparams["brain"](hparams["modules"], hparams["opt_class"], hparams, run_opts, hparams["checkpointer"])
    except (ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, UserError) or raised_in(error, "speechbrain", "torch") or error.__traceback__.tb_next is None:
            raise UsageError(one_line(error)) from error
        raise
    if brain.device_type == "cpu" and emulates(brain.precision):
        emulated = "--precision %s: this processor emulates it, which takes several times as long as fp32; leave the option out."
        logger.warning(emulated, brain.precision)
    return brain


def statistics_batches(brain, dataset, options):
    """Training batches for BatchNorm statistics; they do not depend on the last epoch."""
    if hasattr(options["batch_sampler"], "set_epoch"):
        options["batch_sampler"].set_epoch(1_000_000)  # after the epochs that are sorted by length
    return brain.make_dataloader(dataset, sb.Stage.VALID, ckpt_prefix=None, **options)


def digest_of(dataset):
    """A digest of the ids, durations and transcripts of a dataset, without paths."""
    digest = hashlib.sha256()
    for key, item in dataset.data.items():
        digest.update(f"{key}\t{float(item['duration']):.3f}\t{item['wrd']}\n".encode())
    return digest.hexdigest()


def seconds_of(dataset, without=()):
    """Seconds of audio in a dataset, without some ids."""
    return sum(float(item["duration"]) for key, item in dataset.data.items() if key not in without)


def make_rows(brain, split, hparams_file, setting, train_seconds):
    """Rows of the results table for a test set, one for each search; alignments are written to files."""
    hparams, rows = brain.hparams, []
    for search, error_rate in brain.error_rates.items():
        if if_main_process():
            with open(Path(hparams.output_folder) / f"wer_{split}_{search}.txt", "w", encoding="utf-8") as file:
                error_rate.write_stats(file)
        rows.append(
            ResultRow(
                experiment=hparams.experiment,
                architecture=hparams.encoder,
                hparams=Path(hparams_file).name,
                overrides=setting.asked,
                corpus=hparams.corpus,
                train_set=" ".join(sets_of_training(vars(hparams))),
                train_hours=round(train_seconds / 3600, 2),
                test_set=split,
                search=search,
                **error_figures(error_rate),
                parameters=sum(parameter.numel() for parameter in hparams.model.parameters()),
                audio_seconds_per_second=round(brain.audio_seconds / max(brain.train_seconds, 1e-9), 1),
                peak_memory_mib=round(brain.peak_memory_mib),
                steps=brain.optimizer_step,
                epochs=hparams.epoch_counter.current,
                precision=brain.precision,
                **describe_machine(str(brain.device)),
            )
        )
    return rows


def provenance(setting, hparams, source):
    """The origin of a model: architecture, data, tokenizer and weights, as plain values by name.

    Only the last parts of paths are kept; the others may be private.
    """
    mixed, chosen = hparams["mix"]["manifest"], hparams["tokenizer_from"]
    known = {"hparams": Path(setting.files[0]).name, "corpus": hparams["corpus"], "train_sets": sets_of_training(hparams)}
    known |= {"train_manifest": hparams["train_manifest"]} if hparams.get("train_manifest") else {}
    known |= {"mixed_with": mixed if isinstance(mixed, list) else [mixed]} if mixed else {}
    if chosen == "new" or chosen == "init" and source is None:
        known["tokenizer"] = "trained on the transcripts"
    else:
        known["tokenizer"] = "that of the initial model" if chosen == "init" else chosen
    if source is not None:
        known |= {"init_from": source.name, "init_weights": f"sha256:{source.digest}"}
    return {key: [_end_of(item) for item in value] if isinstance(value, list) else _end_of(value) for key, value in known.items()}


def _end_of(path):
    """The last three parts of a path, without a leading parenthesis, which a model folder would refuse as a tuple."""
    parts = Path(str(path)).parts
    return re.sub(r"^\(", "./(", "/".join(parts if len(parts) <= 3 else ("...", *parts[-3:])))


def keep(brain, setting, models, tokenizer_file, rows, shown, origin):
    """Write the model folders and the results table; print results, paths and the next commands."""
    hparams = brain.hparams
    output = Path(hparams.output_folder)
    folders = {name: output / name for name in models}
    if if_main_process():
        for name, (weights, fused) in models.items():
            write_model_folder(folders[name], setting.text(), vars(hparams), weights, tokenizer_file, rows, fused, origin)
        append_rows(hparams.results_file, rows)
        drawn = draw_curve(output / "train_log.txt", output / "curve.png")
        print(f"\n{shown}\n")
        for row in rows:
            print(f"{row.test_set} {row.search}: {error_sentence(dataclasses.asdict(row))}")
        print(f"Training processed {brain.audio_seconds / max(brain.train_seconds, 1e-9):.0f} s of audio per second.")
        curve = f", the learning curve {output}/curve.png" * drawn
        print(f"Alignments are in {output}/wer_*.txt, the results table is {hparams.results_file}{curve}.\n\nNext:")
        command, model = f"{python_command()} -m speechbrain_ext", f"--model {folders['pretrained']}"
        print(f"{command} transcribe {model} FILE...")
        print(f"{command} stream {model} FILE")
        print(f"{command} export {model} model.onnx")
    return RunResult(rows, folders, output)
