"""The steps of a training run. Each step returns its results.

Hparams -> prepared corpus -> manifests -> tokenizer -> datasets -> Brain -> training -> final model (the average of the best
checkpoints, fused if the architecture supports it) -> tests -> rows of the results table and a model folder.
"""

import dataclasses
import functools
import hashlib
import logging
import re
from contextlib import nullcontext
from pathlib import Path

import ruamel.yaml
import sentencepiece
import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process, run_on_main
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
from speechbrain_ext.dataio.tokenizer import most_frequent, remedy_for, train_tokenizer, unknown_characters
from speechbrain_ext.decoders.lm import make_scorer
from speechbrain_ext.hparams import as_plain, tag_of
from speechbrain_ext.model_folder import HYPERPARAMS
from speechbrain_ext.model_folder.build import parse
from speechbrain_ext.model_folder.lm import load_lm
from speechbrain_ext.model_folder.weights import round_weights
from speechbrain_ext.model_folder.write import inference_hparams, write_model_folder
from speechbrain_ext.training.checkpoints import AtomicCheckpointer, Origin
from speechbrain_ext.training.report import draw_curve, examples, with_logger
from speechbrain_ext.training.results import ResultRow, append_rows, check_table
from speechbrain_ext.training.settings import check_folder, check_parts, checked_options, choose_setting, recorded
from speechbrain_ext.training.sources import locate, read_architecture, read_source
from speechbrain_ext.training.warm_start import ROLES, begin_with, chosen_tokenizer
from speechbrain_ext.utils.distributed import is_distributed, process_number
from speechbrain_ext.utils.error_rates import error_figures, error_sentence
from speechbrain_ext.utils.errors import UsageError, UserError, UserRuntimeError, one_line, raised_in
from speechbrain_ext.utils.files import file_digest, locked, write_bytes, write_text
from speechbrain_ext.utils.machine import describe_machine, emulates, keep_freed_memory, python_command
from speechbrain_ext.utils.text import listing

if torch.distributed.is_available():
    # DistributedDataParallel imports it when there is a process group. Its default arguments would then keep the group until the
    # exit, where gloo may abort
    import torch.distributed.nn

logger = get_logger(__name__)

TRAIN, VALID = object(), object()  # keys that no name of a test split can equal
QUIET = ("speechbrain.dataio.sampler", "speechbrain.core", "speechbrain.utils.checkpoints", "speechbrain.utils.quirks")
"""Loggers whose messages below warnings are routine."""
OF_TRAINING = ("dropout", "update_until_epoch", "momentum", "tgt_vocab", "num_decoder_layers", "identity_init")
"""Arguments of a model's parts that do not change the answers of the encoder."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The results of a run."""

    rows: list
    """A :class:`ResultRow` for each test set and search."""
    folders: dict
    """Model folders by name; ``pretrained`` is the one to use."""
    output: Path
    """The folder of the run."""


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
        Literal overrides of the keys in :data:`~speechbrain_ext.training.settings.PATHS` and ``MANIFESTS``.
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
        refused = refusal(inference_hparams(ruamel.yaml.YAML().load(setting.text()), hparams))
        check_splits(hparams)
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
    if refused:
        told = "The model folder will have %s, which loads only with trust=True (--trust); give a class that loads, or mark your "
        logger.warning(f"{told}own with speechbrain_ext.registry.loadable.", refused)
    taken = f"Another run writes to {output}; wait for it, or give another --output_folder."
    with locked(output / ".lock", taken) if if_main_process() else nullcontext():
        try:
            return _run(hparams_file, run_opts, setting, hparams, source, tokenizer)
        except RuntimeError as error:
            # The process that has ended gives the reason
            if not is_distributed() or not (isinstance(error, torch.distributed.DistError) or "by peer" in str(error)):
                raise
            raise UserRuntimeError("Another process of this training has ended.") from error


def _run(hparams_file, run_opts, setting, hparams, source, tokenizer):
    """Run the steps in a locked output folder."""
    output = Path(hparams["output_folder"])
    manifests, asked = prepare_corpus(hparams), setting.text()
    if hparams["dev_split"] in hparams["test_splits"]:
        told = "%s chooses the checkpoints and is a test set too, so its error rate is too low for new speech; add a test set."
        logger.warning(told, hparams["dev_split"])
    if hparams["dev_split"] in sets_of_training(hparams):
        told = "%s chooses the checkpoints and is a training set too, so its error rate is too low; give another --dev_split."
        logger.warning(told, hparams["dev_split"])
    tokenizer_file, tokens = prepare_tokenizer(hparams, manifests[TRAIN], tokenizer)
    setting, hparams = with_tokenizer(setting, hparams, tokenizer_file, tokens)
    datasets = make_datasets(hparams, manifests)
    for key, dataset in datasets.items():
        report_unknown(
            dataset, hparams["tokenizer"], {TRAIN: "train", VALID: "valid"}.get(key, key), is_given=tokenizer is not None
        )
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
    seed_everything(hparams["seed"] + process_number(), verbose=False)
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
    for weights, _ in models.values():
        round_weights(weights, hparams["weights_precision"])  # what is tested is what is written
    rows, shown = [], ""
    for split in hparams["test_splits"]:
        brain.test_set = split if len(hparams["test_splits"]) > 1 else ""
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


def _is_not_of_images(record):
    """Whether a message is not SpeechBrain's, at import, that there is no torchvision to save images with."""
    return "torchvision" not in record.getMessage()


def mixed_split(hparams):
    """The name of the split that is mixed in; None if there is none."""
    manifest = hparams["mix"]["manifest"]
    return "mixed" if manifest and "mix_manifest" in getattr(hparams["prepare"], "keywords", ()) else manifest


def sets_of_training(hparams):
    """Names of the training splits; if one is mixed in, it is the last."""
    mixed = mixed_split(hparams)
    return [*hparams["train_splits"], *([mixed] if mixed else [])]


def check_splits(hparams):
    """Refuse a test set that is named twice, or that is a training set too. With manifests, their contents are checked later."""
    tests, trained = hparams["test_splits"], sets_of_training(hparams)
    if "test_manifest" in getattr(hparams["prepare"], "keywords", ()):
        return
    for name in tests:
        if tests.count(name) > 1:
            raise UsageError(f"The test set {name} is named twice; name it once.")
        if name in trained:
            raise UsageError(
                f"{name} is a test set and a training set too; remove it from one of the two. To see whether "
                "a model overfits, give the training set as --dev_split."
            )


def ids_of_mixed(hparams):
    """Ids of the mixed-in utterances in the training set."""
    mixed = mixed_split(hparams)
    path = Path(hparams["output_folder"]) / f"{mixed}.csv"
    return {MIXED + row["ID"] for row in read_manifest(path)} if mixed else set()


def refusal(text):
    """What is in the hyperparams.yaml of a model folder that loading refuses; empty if there is nothing."""
    try:
        parse(text)
    except UserError as error:
        return str(error)
    return ""


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


def report_unknown(dataset, tokenizer, name, is_given):
    """Log the characters of a dataset that no token has; refuse one that most transcripts have, if the tokenizer was given."""
    unknown = unknown_characters(tokenizer, [item["wrd"] for item in dataset.data.values()])
    if is_given and 2 * max(unknown.values(), default=0) > len(dataset.data):
        remedy = remedy_for(unknown, tokenizer, "text_normalization", "words_only, if the corpus has this key")
        raise UserError(
            f"Most transcripts of the set {name} have characters that the given tokenizer lacks ({most_frequent(unknown)}); "
            f"{remedy}, or train another tokenizer with --tokenizer_from new."
        )
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
        return {part: as_plain(node)}
    return {part: tag_of(node)} | {f"{part}: {key}": as_plain(value) for key, value in node.items() if key not in OF_TRAINING}


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
        model += " --trust" * bool(refusal((folders["pretrained"] / HYPERPARAMS).read_text(encoding="utf-8")))
        print(f"{command} transcribe {model} FILE...")
        print(f"{command} stream {model} FILE")
        print(f"{command} export {model} model.onnx")
    return RunResult(rows, folders, output)
