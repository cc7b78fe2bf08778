#!/usr/bin/env python3
"""Train and test a speech recogniser: the one entry of all recipes.

    python train.py hparams/hyperconformer.yaml --data_folder /path/to/LibriSpeech
    python train.py hparams/hyperconformer.yaml                                      embedded mini corpus, minutes
    python train.py hparams/hyperconformer.yaml --data_folder ... --precision bf16 --number_of_epochs 50
    torchrun --nproc_per_node 4 train.py hparams/hyperconformer.yaml --data_folder ...

Corpus -> manifests -> tokenizer -> datasets -> Brain -> training -> average of the best checkpoints -> error rates -> a folder
with the trained model. Start the same command again after an interruption, and it goes on where it was.
"""

import dataclasses
import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # the hparams files name classes in recipes/, from any working directory

import ruamel.yaml  # noqa: E402
import sentencepiece  # noqa: E402
import speechbrain as sb  # noqa: E402
import torch  # noqa: E402
from hyperpyyaml import resolve_references  # noqa: E402
from speechbrain.utils.distributed import ddp_init_group, get_rank, if_main_process, run_on_main  # noqa: E402
from speechbrain.utils.logger import get_logger  # noqa: E402
from speechbrain.utils.seed import seed_everything  # noqa: E402

from recipes.LibriSpeech.checkpoints import DamagedCheckpoint  # noqa: E402
from recipes.LibriSpeech.data import loader_options, make_datasets, train_tokenizer  # noqa: E402
from recipes.LibriSpeech.mini_corpus import build_mini_corpus  # noqa: E402
from recipes.LibriSpeech.prepare import prepare_librispeech  # noqa: E402
from recipes.LibriSpeech.results import append_rows, describe_machine  # noqa: E402
from speechbrain_ext.hparams import load_hparams, merge_hparams, needed_keys, parse_overrides  # noqa: E402
from speechbrain_ext.inference.pretrained import write_pretrained  # noqa: E402

logger = get_logger("train")

TRAIN, VALID = object(), object()  # keys beside the names of test splits, which may be any
MINI = ROOT / "recipes" / "LibriSpeech" / "hparams" / "mini.yaml"


def main(argv=None):
    """Run; returns the exit status: 0 when all went well, 2 for wrong arguments, 130 when interrupted, 1 otherwise."""
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:] if argv is None else argv)
    if run_opts.device == "cpu" or not torch.cuda.is_available():  # where SpeechBrain's default, nccl, cannot run
        run_opts = dataclasses.replace(
            run_opts, distributed_backend="gloo", overridden_args={*run_opts.overridden_args, "distributed_backend"}
        )
    try:
        ddp_init_group(run_opts)
        run(hparams_file, run_opts, overrides)
    except Failure as failure:
        print(f"train.py: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        print("train.py: interrupted; start the same command again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # without it, gloo sometimes aborts at exit
    return 0


def run(hparams_file, run_opts, overrides):
    """All steps of a run, one after the other."""
    with explained(2, OSError, ValueError, TypeError, ImportError, ruamel.yaml.YAMLError):
        files, overrides = choose_hparams(hparams_file, run_opts, overrides)
        hparams = load_hparams(files, overrides)
    asked = merge_hparams(files, overrides)
    check_folder(Path(hparams["output_folder"]), asked)
    sb.create_experiment_directory(hparams["output_folder"])
    logging.getLogger("speechbrain.dataio.sampler").setLevel(logging.WARNING)  # it says three times an epoch that it works
    with explained(1, OSError, ValueError, RuntimeError, ImportError):
        manifests = prepare_corpus(hparams)
        run_on_main(write_hparams, [hparams, asked])  # not before: a mistyped data_folder is no run to hold later ones to
        tokenizer_file, tokens = prepare_tokenizer(hparams, manifests[TRAIN])
        if tokens < hparams["vocab_size"]:
            logger.warning("The transcripts give %d tokens, not %d; the model has as many.", tokens, hparams["vocab_size"])
            overrides["vocab_size"] = tokens
            hparams = load_hparams(files, overrides)
        hparams["tokenizer"].load(str(tokenizer_file))
        datasets = make_datasets(hparams, manifests)
    text = merge_hparams(files, overrides)

    # Whatever the steps before have drawn: a run that starts again and finds them done draws the same from here on.
    seed_everything(hparams["seed"] + (get_rank() or 0), verbose=False)
    with explained(2, ValueError, RuntimeError, AssertionError):  # a device or a precision that is not to be had
        brain = hparams["brain"](hparams["modules"], hparams["opt_class"], hparams, run_opts, hparams["checkpointer"])
    with explained(2, TypeError, ValueError):
        train_options = loader_options(datasets[TRAIN], hparams["train_batch_sampler"], hparams["num_workers"])
        valid_options = loader_options(datasets[VALID], hparams["eval_batch_sampler"], hparams["num_workers"])
    brain.train_sampler = train_options["batch_sampler"]  # so that fit() tells it the epoch
    with explained(1, FloatingPointError, DamagedCheckpoint):
        brain.fit(
            hparams["epoch_counter"],
            datasets[TRAIN],
            datasets[VALID],
            train_loader_kwargs=train_options,
            valid_loader_kwargs=valid_options,
        )
    brain.train_batches = lambda: statistics_loader(brain, datasets[TRAIN], train_options)
    rows = []
    for split in hparams["test_splits"]:
        options = loader_options(datasets[split], hparams["eval_batch_sampler"], hparams["num_workers"])
        with explained(1, FileNotFoundError, ValueError, RuntimeError, DamagedCheckpoint):
            brain.evaluate(datasets[split], test_loader_kwargs=options)
        rows += make_rows(brain, split, hparams_file)
    run_on_main(finish, [brain, text, tokenizer_file, rows])


class Failure(Exception):
    """The end of a run for a reason that the user can do something about; the message says what."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


@contextmanager
def explained(status, *errors):
    """Take errors of these types for the user's: the run ends with their message and this exit status, without a traceback."""
    try:
        yield
    except errors as error:
        message = str(error) if isinstance(error, OSError) else " ".join(map(str, error.args))
        raise Failure(status, " ".join(message.split())) from error


def choose_hparams(hparams_file, run_opts, overrides):
    """The files and the overrides that make the run: without a data folder, the mini corpus's overrides are among them."""
    files, overrides = [hparams_file], parse_overrides(overrides)
    for key in ("train_splits", "test_splits"):
        if isinstance(overrides.get(key), str):
            overrides[key] = [overrides[key]]
    if "data_folder" in overrides and not overrides["data_folder"]:
        raise ValueError("--data_folder has no value; leave it out to run on the embedded mini corpus.")
    for key in ("number_of_epochs", "average_checkpoints", "statistics_batches", "vocab_size"):
        if key in overrides and not (isinstance(overrides[key], int) and overrides[key] > 0):
            raise ValueError(f"--{key} is {overrides[key]!r}; give a whole number above 0.")
    if not plain_values(files, overrides)["data_folder"]:
        if if_main_process():
            print(
                f"No data_folder: this runs on the embedded mini corpus with the overrides in {os.path.relpath(MINI)}. "
                f"The real thing: python train.py {hparams_file} --data_folder /path/to/LibriSpeech",
                flush=True,
            )
        files.append(MINI)
    if run_opts.debug:  # a few batches should not pass for a result
        folder = plain_values(files, overrides)["output_folder"] + "_debug"
        overrides |= {"output_folder": folder, "results_file": f"{folder}/results.csv"}
    return files, overrides


def plain_values(files, overrides):
    """The hparams with references resolved, before any object is built."""
    return ruamel.yaml.YAML().load(resolve_references(merge_hparams(files, overrides)))


def check_folder(output, asked):
    """Refuse to go on with a run of another corpus or another model, whose weights would pass for this one's."""
    path = output / "hyperparams.yaml"
    if not path.exists():
        return
    yaml = ruamel.yaml.YAML()
    before, now = yaml.load(path.read_text(encoding="utf-8")), yaml.load(asked)
    fixed = {"data_folder", "train_splits", "token_type", "model", "normalize", "compute_features"}
    fixed |= needed_keys(now, [now[key] for key in ("model", "normalize", "compute_features")])
    for key in sorted(fixed, key=list(now).index):
        old, new = (_plain(tree.get(key)) for tree in (before, now))
        if old != new:
            raise Failure(2, f"{output} holds a run with {key} {old}, and this one has {new}; give another --output_folder.")


def _plain(node):
    """A part of parsed hparams as text that says what it is, comments aside."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    tag = getattr(getattr(node, "tag", None), "value", None)
    return f"{tag} {node.value}" if tag else node


def write_hparams(hparams, text):
    """Keep the hparams of the run with its results."""
    path = Path(hparams["output_folder"]) / "hyperparams.yaml"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def prepare_corpus(hparams):
    """Check the corpus and write its manifests; returns their paths by TRAIN, VALID and the names of the test splits."""
    data_folder = hparams["data_folder"]
    if not data_folder:
        run_on_main(build_mini_corpus)
        data_folder = build_mini_corpus()  # which finds it
    output = Path(hparams["output_folder"])
    run_on_main(
        prepare_librispeech,
        kwargs={
            "data_folder": data_folder,
            "save_folder": output,
            "tr_splits": hparams["train_splits"],
            "dev_splits": [hparams["dev_split"]],
            "te_splits": hparams["test_splits"],
            "merge_lst": hparams["train_splits"],
            "merge_name": "train+merged.csv",  # which no split is called
            "max_skipped": hparams["max_skipped"],
        },
    )
    names = {TRAIN: "train+merged", VALID: hparams["dev_split"]} | {split: split for split in hparams["test_splits"]}
    return {key: output / f"{name}.csv" for key, name in names.items()}


def prepare_tokenizer(hparams, manifest):
    """Train the tokenizer where it is missing; returns its file, and how many tokens it has."""
    path = Path(hparams["output_folder"]) / f"{hparams['token_type']}_{hparams['vocab_size']}.model"
    special = {key: hparams[key] for key in ("blank_index", "bos_index", "eos_index", "unk_index")}
    run_on_main(train_tokenizer, [manifest, path, hparams["vocab_size"], hparams["token_type"]], special)
    return path, sentencepiece.SentencePieceProcessor(str(path)).vocab_size()


def statistics_loader(brain, dataset, options):
    """Training batches for BatchNorm statistics, the same ones whenever a run is tested."""
    options["batch_sampler"].set_epoch(1_000_000)  # beyond those that begin with the shortest utterances
    return brain.make_dataloader(dataset, sb.Stage.VALID, ckpt_prefix=None, **options)


def make_rows(brain, split, hparams_file):
    """Rows of the results table for a test set, one for each search; the alignments go to files."""
    hparams = brain.hparams
    rows = []
    for search, error_rate in brain.error_rates.items():
        result = error_rate.summarize()
        if if_main_process():
            with open(Path(hparams.output_folder) / f"wer_{split}_{search}.txt", "w", encoding="utf-8") as file:
                error_rate.write_stats(file)
        rows.append(
            {
                "architecture": hparams.encoder,
                "hparams": Path(hparams_file).name,
                "train_set": " ".join(hparams.train_splits),
                "test_set": split,
                "search": search,
                "WER": round(result["WER"], 2),
                "insertions": result["insertions"],
                "deletions": result["deletions"],
                "substitutions": result["substitutions"],
                "words": result["num_scored_tokens"],
                "parameters": sum(parameter.numel() for parameter in hparams.model.parameters()),
                "audio_seconds_per_second": round(brain.audio_seconds / max(brain.train_seconds, 1e-9), 1),
                "peak_memory_mib": round(brain.peak_memory_mib),
                "steps": brain.optimizer_step,
                "epochs": hparams.epoch_counter.current,
                "precision": brain.precision,
                **describe_machine(str(brain.device)),
            }
        )
    return rows


def finish(brain, text, tokenizer_file, rows):
    """Write the results table and the pretrained folder, and say where all is."""
    hparams = brain.hparams
    output = Path(hparams.output_folder)
    write_pretrained(output / "pretrained", text, hparams.model, hparams.normalize, tokenizer_file, rows, brain.fused)
    if brain.fused:
        write_pretrained(output / "pretrained_unfused", text, brain.unfused, hparams.normalize, tokenizer_file, rows)
    with explained(1, OSError, ValueError):
        append_rows(hparams.results_file, rows)
    for row in rows:
        print(
            f"{row['test_set']} {row['search']}: WER {row['WER']:.2f} % of {row['words']} words "
            f"({row['insertions']} insertions, {row['deletions']} deletions, {row['substitutions']} substitutions)"
        )
    print(f"Alignments are in {output}/wer_*.txt, the results table is {hparams.results_file}.")
    print(f"Transcribe: python -m speechbrain_ext transcribe {output}/pretrained FILE...")


if __name__ == "__main__":
    sys.exit(main())
