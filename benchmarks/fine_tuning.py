"""Error rates of fine-tuned models against the hours of new speech, beside models trained on these hours from nothing.

    python benchmarks/fine_tuning.py --model MODEL --train MANIFEST --valid MANIFEST --test NAME=MANIFEST...
        [--hours 0.2 1 4.6] [--epochs 20 20 10] [--work results/fine_tuning] [--output benchmarks/results/fine_tuning.csv]

MODEL is a model folder of recipes/MiniLibriSpeech, trained on other speech. For each number of hours, in one order of the
utterances, this trains it further with hparams/finetune.yaml, with its tokenizer and with a new one. A third model of the same
sizes begins with random weights, and takes at least twice as many steps. Trainings that have rows in the output are left out, and
interrupted ones continue. For MODEL itself:

    python train.py hparams/hyperconformer.yaml --corpus recipes/MiniLibriSpeech/fifteen_hours.yaml --data_folder FOLDER
        --train_splits '[train-clean-5, train-clean-100, train-librispeech, train-arctic]' --training_steps 3500
        --test_splits '[test-librispeech, test-speechocean]' --experiment before --output_folder results/fine_tuning/before
        --results_file benchmarks/results/fine_tuning.csv
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path

from speechbrain_ext.utils.files import read_csv, write_csv, write_text

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 128


def select(manifest, hours, path):
    """Write a part of a manifest: the same utterances for the same number of hours, and for more hours these and others."""
    rows = read_csv(manifest)
    random.Random(0).shuffle(rows)
    chosen, seconds = [], 0.0
    while rows and seconds < 3600 * hours:
        chosen.append(rows.pop())
        seconds += float(chosen[-1]["duration"])
    write_csv(path, list(chosen[0]), (row.values() for row in sorted(chosen, key=lambda row: row["ID"])))
    return seconds / 3600


def trainings(arguments, hours, epochs):
    """Options of train.py for one number of hours, by name."""
    tuned = [ROOT / "hparams" / "finetune.yaml", "--init_from", arguments.model, "--number_of_epochs", epochs]
    steps = round(2 * epochs * hours * 60)  # steps of 60 s
    new = arguments.work / "from_nothing.yaml"
    parts = [
        ROOT / "hparams" / arguments.hparams,
        *(ROOT / "recipes" / name / "corpus.yaml" for name in ("MiniLibriSpeech", "Manifest")),
    ]
    write_text(new, f"extends: [{', '.join(map(str, parts))}]\n")
    settings = {"training_steps": steps, "warmup_steps": steps // 10, "augment_warmup": steps // 3, "vocab_size": VOCAB}
    return {
        "fine-tuned": tuned,
        "fine-tuned, new tokens": [*tuned, "--tokenizer_from", "new", "--vocab_size", VOCAB],
        "from nothing": [new, *(text for key, value in settings.items() for text in (f"--{key}", value))],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--train", required=True, type=Path, help="a prepared manifest, with the columns ID, duration, wav and wrd"
    )
    parser.add_argument("--valid", required=True, type=Path)
    parser.add_argument("--test", required=True, nargs="+")
    parser.add_argument("--hparams", default="hyperconformer.yaml", help="the file that MODEL was trained with")
    parser.add_argument("--hours", nargs="+", type=float, default=[0.2, 1, 4.6])
    parser.add_argument("--epochs", nargs="+", type=int, default=[20, 20, 10], help="for each number of hours")
    parser.add_argument("--work", type=Path, default=Path("results/fine_tuning"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fine_tuning.csv")
    arguments, others = parser.parse_known_args()
    for hours, epochs in zip(arguments.hours, arguments.epochs, strict=True):
        manifest = arguments.work / f"train-{hours:g}h.csv"
        hours = select(arguments.train, hours, manifest)
        for name, options in trainings(arguments, hours, epochs).items():
            done = read_csv(arguments.output) if arguments.output.exists() else []
            if any(row["experiment"] == name and abs(float(row["train_hours"]) - hours) < 0.02 for row in done):
                continue
            output = arguments.work / f"{manifest.stem}-{name.replace(', ', '-').replace(' ', '-')}"
            data = ["--train_manifest", manifest, "--valid_manifest", arguments.valid, "--test_manifest", *arguments.test]
            where = ["--experiment", name, "--output_folder", output, "--results_file", arguments.output]
            command = [sys.executable, ROOT / "train.py", *options, *data, *where, *others]
            if subprocess.run(list(map(str, command))).returncode:
                sys.exit(f"The training in {output} failed.")


if __name__ == "__main__":
    main()
