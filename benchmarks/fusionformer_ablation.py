"""Training curves of the FusionFormer and of the variants that the paper compares it with, at equal steps.

    python benchmarks/fusionformer_ablation.py [--lr 0.002 0.008] [-- options of train.py for all runs]

Needs matplotlib: ``pip install -e '.[plot]'``.
Trains each variant on the embedded mini corpus, with the recipe's peak learning rate and with four times that rate; train.py
resumes interrupted runs. Then it writes loss and error rate by epoch to benchmarks/results/fusionformer_ablation.csv, and draws
them. Runs of one learning rate differ only in normalisation and activation.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from matplotlib import pyplot  # imported here, to fail before the training if it is missing

from speechbrain_ext.encoders.fusionformer import VARIANTS
from speechbrain_ext.utils.files import write_csv

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LOG = re.compile(r"epoch: (\d+), steps: (\d+), lr: \S+ - train loss: (\S+) - valid loss: ([^,\s]+), valid WER ctc_greedy: (\S+)")
FIELDS = ("lr", "variant", "epoch", "steps", "train_loss", "valid_loss", "valid_wer")


def curve(lr, variant, options):
    """Train a variant; returns a row per epoch."""
    output = Path("results") / "fusionformer_ablation" / f"{variant}_{lr}"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        str(ROOT / "hparams" / "fusionformer.yaml"),
        "--output_folder",
        str(output),
    ]
    run = subprocess.run([*command, "--encoder_kwargs", f"{{variant: {variant}}}", "--lr", str(lr), *options])
    if run.returncode:
        print(f"{variant} at {lr} ended with status {run.returncode}; its curve is not complete.", file=sys.stderr)
    log = output / "train_log.txt"
    return [(lr, variant, *match) for match in LOG.findall(log.read_text() if log.exists() else "")]


def draw(rows, path):
    """Draw training loss and validation error rate by epoch: a column for each learning rate, a line for each variant."""
    rates = sorted({row["lr"] for row in rows})
    figure, axes = pyplot.subplots(2, len(rates), figsize=(4.5 * len(rates), 6.5), squeeze=False, sharex=True, sharey="row")
    for rate, (loss, wer) in zip(rates, axes.T, strict=True):
        for variant in VARIANTS:
            mine = [row for row in rows if (row["lr"], row["variant"]) == (rate, variant)]
            epochs = [int(row["epoch"]) for row in mine]
            style = {"label": variant, "linewidth": 2.5 if variant == "fusionformer" else 1.2}
            loss.plot(epochs, [float(row["train_loss"]) for row in mine], **style)
            wer.plot(epochs, [float(row["valid_wer"]) for row in mine], **style)
        loss.set(title=f"peak learning rate {rate}", yscale="log", ylim=(1, 1e3))  # diverging curves are cut off
        wer.set(xlabel="epoch", ylim=(0, 105))
    axes[0, 0].set(ylabel="training loss")
    axes[1, 0].set(ylabel="validation WER, %")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--lr", nargs="+", type=float, default=[0.002, 0.008])
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    rows = [row for lr in arguments.lr for variant in arguments.variants for row in curve(lr, variant, arguments.options)]
    path = RESULTS / "fusionformer_ablation.csv"
    write_csv(path, FIELDS, rows)
    draw([dict(zip(FIELDS, row, strict=True)) for row in rows], ROOT / "docs" / "images" / "fusionformer_ablation.png")


if __name__ == "__main__":
    main()
