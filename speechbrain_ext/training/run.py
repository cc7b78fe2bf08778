"""The steps of a training run, one after the other; what a step gives is what it returns.

Hparams -> corpus prepared -> manifests -> tokenizer -> datasets -> Brain -> training -> the model that is kept (the average of
the best checkpoints, fused where the architecture can be) -> tests -> rows of the results table and a model folder.
"""

import csv
import dataclasses
import hashlib
import logging
import os
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path

import ruamel.yaml
import sentencepiece
import speechbrain as sb
import torch
from speechbrain.utils.distributed import get_rank, if_main_process, run_on_main
from speechbrain.utils.logger import get_logger
from speechbrain.utils.seed import seed_everything

from speechbrain_ext.dataio.datasets import drop_unfit, loader_options, make_datasets, merge_manifests, read_manifest
from speechbrain_ext.dataio.text import CASES
from speechbrain_ext.dataio.tokenizer import train_tokenizer, unknown_characters
from speechbrain_ext.hparams import load_hparams, merge_hparams, needed_keys, parse_overrides, resolve_hparams, tag_of
from speechbrain_ext.model_folder.write import write_model_folder
from speechbrain_ext.training.checkpoints import Origin
from speechbrain_ext.training.results import ResultRow, append_rows
from speechbrain_ext.utils.errors import UsageError, UserError, one_line, raised_in
from speechbrain_ext.utils.files import locked, read_csv, write_text
from speechbrain_ext.utils.machine import describe_machine, keep_freed_memory
from speechbrain_ext.utils.text import listing

logger = get_logger(__name__)

TRAIN, VALID = object(), object()  # keys beside the names of test splits, which may be any
WHOLE = "a whole number above 0"
RANGES = {
    **dict.fromkeys(
        (
            "number_of_epochs",
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
    **dict.fromkeys(("num_workers", "num_decoder_layers", "seed"), (0, 2**32 - 1, "a whole number, 0 or more")),
    "streaming_left_context": (-1, 10**9, "a number of chunks, or -1 for all"),
    "lr": (1e-12, 1e3, "a number above 0"),
    "dropout": (0, 0.999, "a number from 0 to less than 1"),
    "max_skipped": (0, 1, "a share from 0 to 1"),
    "max_duration": (1e-3, 1e9, "seconds above 0"),
    "ctc_weight": (0, 1, "a share from 0 to 1"),
    "label_smoothing": (0, 0.999, "a number from 0 to less than 1"),
    "train_batch_sampler: max_batch_length": (1e-3, 1e9, "seconds above 0"),
    "eval_batch_sampler: max_batch_length": (1e-3, 1e9, "seconds above 0"),
}
"""Lowest and highest value by key, and what to give."""
PATHS = ("data_folder", "output_folder", "results_file")
"""Keys whose values are taken to the letter: no part of a name is YAML, and nothing is expanded."""
MANIFESTS = ("train_manifest", "valid_manifest", "test_manifest")
"""Keys of the same kind that take several values."""
REFUSED = {
    "jit": "TorchScript knows none of these encoders; leave it out, or try --compile",
    "jit_module_keys": "TorchScript knows none of these encoders; leave it out, or try --compile",
    "compile_module_keys": "--compile compiles front end and encoder, and nothing else gains by it",
    "data_parallel_backend": "start several processes with torchrun instead",
}
"""Options of SpeechBrain's Brain that are not supported, with what to do."""
TRAINING_OPTIONS = (
    "compile",
    "compile_mode",
    "grad_accumulation_factor",
    "max_grad_norm",
    "nonfinite_patience",
    "skip_nonfinite_grads",
)
"""Options of the Brain that change what is learned, and have no column of their own in the results table."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

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
    """The hparams file, and what overrides it."""
    overrides: dict
    """What replaces single keys."""
    asked: str = ""
    """What the command line changed of the files, but for paths."""

    def text(self):
        """All merged, references unresolved."""
        return merge_hparams(self.files, self.overrides)

    def plain(self):
        """All merged, references resolved, before any object is built."""
        return resolve_hparams(self.files, self.overrides)

    def load(self):
        """All merged and built."""
        return load_hparams(self.files, self.overrides)

    def replace(self, **overrides):
        """The same with other overrides."""
        return dataclasses.replace(self, overrides=self.overrides | overrides)


def run(hparams_file, run_opts, overrides, paths=None, corpus=None, fallback=None, of_manifests=None):
    """Run all steps.

    Arguments
    ---------
    hparams_file : str
        An hparams file.
    run_opts : speechbrain.utils.run_opts.RunOptions
        Options of SpeechBrain's Brain.
    overrides : str
        YAML text, such as ``speechbrain.parse_arguments`` makes from the command line.
    paths : dict, optional
        Overrides of the keys in :data:`PATHS` and :data:`MANIFESTS`, to the letter.
    corpus : str, optional
        A ``corpus.yaml`` that overrides the hparams file.
    fallback : str, optional
        The one that is taken where no ``data_folder`` is given.
    of_manifests : str, optional
        The one that is taken where manifests are given, and no file says what to do with them.

    Returns
    -------
    RunResult

    Raises
    ------
    UsageError
        If an argument is wrong; nothing was done then.
    UserError, OSError
        If something that the user can mend stops the run.
    """
    keep_freed_memory()
    try:
        check_options(run_opts)
        setting = choose_setting(hparams_file, run_opts, overrides, paths or {}, corpus, fallback, of_manifests)
        hparams = setting.load()
        output = Path(hparams["output_folder"])
        check_folder(output, setting.text(), hparams["data_moved"])
        check_writable(Path(hparams["results_file"]))
    except (UserError, OSError) as error:
        raise UsageError(one_line(error, 1000)) from error
    run_on_main(sb.create_experiment_directory, [str(output)])
    taken = f"Another run writes to {output}; wait for it, or give another --output_folder."
    with locked(output / ".lock", taken) if if_main_process() else nullcontext():
        return _run(hparams_file, run_opts, setting, hparams)


def _run(hparams_file, run_opts, setting, hparams):
    """The steps, in an output folder that no other run writes to."""
    logging.getLogger("speechbrain.dataio.sampler").setLevel(logging.WARNING)  # it says three times an epoch that it works
    output = Path(hparams["output_folder"])
    manifests = prepare_corpus(hparams)
    # Not before: a mistyped data_folder is no run that later ones are compared with
    run_on_main(write_text, [output / "hyperparams.yaml", setting.text()])
    tokenizer_file, tokens = prepare_tokenizer(hparams, manifests[TRAIN])
    setting, hparams = with_tokenizer(setting, hparams, tokenizer_file, tokens)
    datasets = make_datasets(hparams, manifests)
    for key, dataset in datasets.items():
        report_unknown(dataset, hparams["tokenizer"], {TRAIN: "train", VALID: "valid"}.get(key, key))
    for key, name in ((TRAIN, "train"), (VALID, "valid")):
        drop_unfit(datasets[key], hparams, output / f"unfit_{name}.csv", name)
    hparams["checkpointer"].add_recoverable("origin", Origin(utterances=digest_of(datasets[TRAIN])))
    for search in ("ctc_search", "test_search", "transducer_search"):
        if hparams[search] is not None and not callable(hparams[search]):
            raise UsageError(f"{search} is {hparams[search]!r}, which is no search; name the class of one, or null.")
        if hasattr(hparams[search], "check"):
            hparams[search].check()  # now, and not after the training

    # Whatever the steps before have drawn: a run that starts again and finds them done draws the same from here on.
    seed_everything(hparams["seed"] + (get_rank() or 0), verbose=False)
    brain = make_brain(hparams, run_opts)
    options = {
        key: loader_options(
            dataset, hparams["train_batch_sampler" if key is TRAIN else "eval_batch_sampler"], hparams["num_workers"]
        )
        for key, dataset in datasets.items()
    }
    brain.fit(
        hparams["epoch_counter"],
        datasets[TRAIN],
        datasets[VALID],
        train_loader_kwargs=options[TRAIN],
        valid_loader_kwargs=options[VALID],
    )
    models = brain.make_final(statistics_batches(brain, datasets[TRAIN], options[TRAIN]))
    rows = []
    for split in hparams["test_splits"]:
        brain.evaluate(datasets[split], test_loader_kwargs=options[split])
        rows += make_rows(brain, split, hparams_file, setting, seconds_of(datasets[TRAIN]))
    return keep(brain, setting, models, tokenizer_file, rows)


def take_paths(argv):
    """Take paths from a command line to the letter: SpeechBrain's parser would read them as YAML.

    Arguments
    ---------
    argv : list of str
        The command line.

    Returns
    -------
    others : list of str
        The other arguments.
    paths : dict
        Those of ``--corpus`` and :data:`PATHS` by key, and lists of those of :data:`MANIFESTS`.

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


def check_options(run_opts):
    """Refuse options of SpeechBrain's Brain that would end in a traceback, or do nothing."""
    for option, remedy in REFUSED.items():
        if getattr(run_opts, option):
            raise UsageError(f"--{option} is not supported: {remedy}.")


def check_writable(path):
    """Refuse a results file that could not be written after all training."""
    if path.is_dir():
        raise UsageError(f"The results_file {path} is a folder; give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
        rows = read_csv(path) if path.exists() else []
    except (OSError, UnicodeError, csv.Error) as error:
        raise UsageError(f"The results_file {path} cannot be used ({one_line(error)}); give another --results_file.") from error
    if any(None in row or None in row.values() for row in rows):
        raise UsageError(f"The results_file {path} has lines of another number of columns; mend it, or give another.")


def choose_setting(hparams_file, run_opts, overrides, paths, corpus, fallback, of_manifests=None):
    """The files and the overrides that make the run: the corpus's, that of manifests or, without any data, the fallback."""
    overrides = parse_overrides(overrides)
    options = {key: getattr(run_opts, key) for key in TRAINING_OPTIONS if key in run_opts.overridden_args}
    asked = " ".join(f"--{key} {_plain(value)}" for key, value in (overrides | options).items() if key != "experiment")
    overrides |= paths
    files = [hparams_file, *([corpus] if corpus else [])]
    if corpus == "":
        raise UsageError("--corpus has no value; name a corpus.yaml, or leave it out.")
    if "data_folder" in overrides and overrides["data_folder"] in (None, ""):
        raise UsageError("--data_folder has no value; leave it out to run on the embedded mini corpus.")
    before = resolve_hparams(files)
    given = not {*MANIFESTS}.isdisjoint(overrides)
    if of_manifests and given and MANIFESTS[0] not in before:
        files.insert(1, of_manifests)
        before = resolve_hparams(files)
    # A name of digits, or a date, is still a name
    overrides = {key: before[key] for key in (*PATHS, *MANIFESTS) if before.get(key) is not None} | overrides
    overrides = check_types(overrides, before)
    if corpus:
        own = parse_overrides(Path(corpus).read_text(encoding="utf-8"))
        overrides = ({} if "card" in own else {"card": {}}) | overrides  # of the corpus that it replaces
        if not given and not {"data_folder", "extends"} & {*own, *overrides}:
            raise UsageError(
                f"There is no data_folder for {corpus}; give --data_folder, or state it there (null = it needs none)."
            )
    setting = Setting(files, overrides, asked)
    plain = setting.plain()
    taken = plain["prepare"] if isinstance(plain["prepare"], dict) else ()
    for key in (*MANIFESTS, "text_normalization"):
        if overrides.get(key) and key not in taken:
            raise UsageError(f"--{key} is given, and the prepare function of {plain['corpus']} does not take it; leave it out.")
    if fallback and not corpus and not plain["data_folder"] and MANIFESTS[0] not in plain:
        if if_main_process():
            print(
                f"No data_folder: this runs on the embedded mini corpus with the overrides in {os.path.relpath(fallback)}. "
                f"The real thing: python train.py {hparams_file} --data_folder /path/to/{plain['corpus']}",
                flush=True,
            )
        setting = dataclasses.replace(setting, files=[*setting.files, fallback])
        plain = setting.plain()
    check_ranges(plain, run_opts)
    if run_opts.debug:  # a few batches should not pass for a result
        folder = plain["output_folder"] + "_debug"
        setting = setting.replace(output_folder=folder, results_file=f"{folder}/results.csv")
    return setting


def check_ranges(plain, run_opts):
    """Refuse numbers with which nothing would be learned, or that end in a traceback somewhere.

    Arguments
    ---------
    plain : dict
        Resolved hparams.
    run_opts : speechbrain.utils.run_opts.RunOptions
        Options of SpeechBrain's Brain.

    Raises
    ------
    UsageError
        If a number is outside its range, or two special tokens have the same index.
    """
    given = dict(plain)
    if "grad_accumulation_factor" in run_opts.overridden_args:
        given["grad_accumulation_factor"] = run_opts.grad_accumulation_factor
    for key in ("train_batch_sampler", "eval_batch_sampler"):
        if isinstance(plain.get(key), dict) and "max_batch_length" in plain[key]:
            given[f"{key}: max_batch_length"] = plain[key]["max_batch_length"]
    for key, (low, high, wanted) in RANGES.items():
        value = given.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not low <= value <= high:  # of NaN, neither is true
            raise UsageError(f"--{key} is {value!r}; give {wanted}.")
    for key in ("train_splits", "dev_split", *MANIFESTS[:2]):
        if not plain.get(key, True):
            raise UsageError(f"--{key} is empty; name what to train on.")
    if plain.get("text_normalization", "none") not in CASES:
        raise UsageError(f"--text_normalization is {plain['text_normalization']!r}; give {', '.join(CASES)}.")
    indices = [plain[key] for key in ("blank_index", "bos_index", "eos_index", "unk_index")]
    if len(set(indices)) < len(indices) or not all(0 <= index < plain["vocab_size"] for index in indices):
        raise UsageError(f"The indices of blank, bos, eos and unk are {indices}; give four different ones below vocab_size.")


def check_types(overrides, before):
    """The overrides, each of the type that its key has in the file; what is not is refused.

    Arguments
    ---------
    overrides : dict
        Values by key.
    before : dict
        The values of the hparams file.

    Returns
    -------
    dict
        The same, with single values as lists and numbers as texts where the key wants that.

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
            continue  # a key that does not exist is refused where files and overrides are merged
        if old is None and isinstance(value, dict):
            given = ", ".join(f"{name}: {item}" for name, item in value.items())
            raise UsageError(
                f"--{key} is {{{given}}}, and the hparams file has null there, which says no class to build with it; name it: "
                f"--{key} '!new:package.Class {{{given}}}', or extend the file."
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
        if tag_of(old):  # an object takes new arguments; of a value that is computed no type is known
            wanted = dict if tag_of(old).startswith(("!new:", "!name:")) else None
        fits = wanted is None or isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (wanted in (int, float) and isinstance(value, bool)):
            raise UsageError(f"--{key} is {_plain(value)!r}; give {kinds[wanted]}, as in the hparams file.")
    return checked


def _literal(key, value):
    """A path as a text that HyperPyYAML leaves as it is."""
    if re.search("<[^<>]*>", str(value)):
        raise UsageError(f"--{key} is {str(value)!r}, and <...> in it would be read as a reference; give another name.")
    return f"./{value}" if str(value).startswith("(") else str(value)  # in parentheses, it would be a tuple


def check_folder(output, asked, data_moved):
    """Refuse to go on with a run of another corpus or another model, whose weights would pass for this one's."""
    path = output / "hyperparams.yaml"
    if not path.exists():
        return
    yaml = ruamel.yaml.YAML()
    before, now = yaml.load(path.read_text(encoding="utf-8")), yaml.load(asked)
    fixed = {"train_splits", "token_type", "speech_encoder"} | (set() if data_moved else {"data_folder"})
    fixed |= needed_keys(now, [now["speech_encoder"]])
    for key in sorted(fixed, key=list(now).index):
        old, new = (_plain(tree.get(key)) for tree in (before, now))
        if old != new:
            moved = ", or --data_moved True if it is the same data in another place" if key == "data_folder" else ""
            raise UsageError(
                f"{output} holds a run with {key} {old}, and this one has {new}; give another --output_folder{moved}."
            )


def _plain(node):
    """A part of parsed hparams as text that says what it is, comments aside."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    return f"{tag_of(node)} {node.value}" if tag_of(node) else node


def prepare_corpus(hparams):
    """Have the corpus's own function write its manifests; returns their paths by TRAIN, VALID and the names of test splits."""
    output = Path(hparams["output_folder"])
    splits = {"tr_splits": hparams["train_splits"], "dev_splits": [hparams["dev_split"]], "te_splits": hparams["test_splits"]}
    run_on_main(hparams["prepare"], kwargs={"data_folder": hparams["data_folder"], "save_folder": str(output), **splits})
    merged = output / "train+merged.csv"  # which no split is called
    run_on_main(merge_manifests, [[output / f"{split}.csv" for split in hparams["train_splits"]], merged])
    names = {VALID: hparams["dev_split"]} | {split: split for split in hparams["test_splits"]}
    paths = {key: output / f"{name}.csv" for key, name in names.items()}
    for path in paths.values():
        read_manifest(path)  # as those of the training set have been
    return {TRAIN: merged} | paths


def prepare_tokenizer(hparams, manifest):
    """Train the tokenizer where it is missing; returns its file, and how many tokens it has."""
    path = Path(hparams["output_folder"]) / f"{hparams['token_type']}_{hparams['vocab_size']}.model"
    special = {key: hparams[key] for key in ("blank_index", "bos_index", "eos_index", "unk_index")}
    run_on_main(train_tokenizer, [manifest, path, hparams["vocab_size"], hparams["token_type"]], special)
    return path, sentencepiece.SentencePieceProcessor(str(path)).vocab_size()


def with_tokenizer(setting, hparams, path, tokens):
    """Load the tokenizer of this file and number of tokens; returns setting and hparams of a model that has no more of them."""
    if tokens < hparams["vocab_size"]:
        logger.warning("The transcripts give %d tokens, not %d; the model has as many.", tokens, hparams["vocab_size"])
        setting = setting.replace(vocab_size=tokens)
        hparams = setting.load()
    hparams["tokenizer"].load(str(path))
    return setting, hparams


def report_unknown(dataset, tokenizer, name):
    """Tell the characters of a dataset that no token can stand for."""
    unknown = unknown_characters(tokenizer, [item["wrd"] for item in dataset.data.values()])
    if unknown:
        shown = listing([f"{character} ({count})" for character, count in unknown.most_common()])
        logger.warning("%s: transcripts hold characters that the tokenizer lacks (in how many): %s", name, shown)


def make_brain(hparams, run_opts):
    """The Brain that the hparams name, on a device and in a precision that there are."""
    try:
        torch.zeros(1, device=run_opts.device).item()
        return hparams["brain"](hparams["modules"], hparams["opt_class"], hparams, run_opts, hparams["checkpointer"])
    except (ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, UserError) or raised_in(error, "speechbrain", "torch") or error.__traceback__.tb_next is None:
            raise UsageError(one_line(error)) from error
        raise


def statistics_batches(brain, dataset, options):
    """Training batches for BatchNorm statistics, the same ones whenever a run ends."""
    options["batch_sampler"].set_epoch(1_000_000)  # beyond those that begin with the shortest utterances
    return brain.make_dataloader(dataset, sb.Stage.VALID, ckpt_prefix=None, **options)


def digest_of(dataset):
    """What the utterances of a dataset are, wherever they lie: ids, durations and transcripts."""
    digest = hashlib.sha256()
    for key, item in dataset.data.items():
        digest.update(f"{key}\t{float(item['duration']):.3f}\t{item['wrd']}\n".encode())
    return digest.hexdigest()


def seconds_of(dataset):
    """Audio in a dataset, in seconds."""
    return sum(float(item["duration"]) for item in dataset.data.values())


def make_rows(brain, split, hparams_file, setting, train_seconds):
    """Rows of the results table for a test set, one for each search; the alignments go to files."""
    hparams, rows = brain.hparams, []
    for search, error_rate in brain.error_rates.items():
        result = error_rate.summarize()
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
                train_set=" ".join(hparams.train_splits),
                train_hours=round(train_seconds / 3600, 2),
                test_set=split,
                search=search,
                WER=round(result["WER"], 2),
                insertions=result["insertions"],
                deletions=result["deletions"],
                substitutions=result["substitutions"],
                words=result["num_scored_tokens"],
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


def keep(brain, setting, models, tokenizer_file, rows):
    """Write the model folders and the results table, and say where all is."""
    hparams = brain.hparams
    output = Path(hparams.output_folder)
    folders = {name: output / name for name in models}
    if if_main_process():
        for name, (weights, fused) in models.items():
            write_model_folder(folders[name], setting.text(), vars(hparams), weights, tokenizer_file, rows, fused)
        for row in rows:
            print(
                f"{row.test_set} {row.search}: WER {row.WER:.2f} % of {row.words} words "
                f"({row.insertions} insertions, {row.deletions} deletions, {row.substitutions} substitutions)"
            )
        append_rows(hparams.results_file, rows)
        print(f"Alignments are in {output}/wer_*.txt, the results table is {hparams.results_file}.")
        print(f"Transcribe: python -m speechbrain_ext transcribe --model {folders['pretrained']} FILE...")
    return RunResult(rows, folders, output)
