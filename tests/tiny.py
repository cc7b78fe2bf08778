"""A tiny corpus and model: a whole training run takes seconds."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from sentencepiece import SentencePieceProcessor

from speechbrain_ext.dataio.tokenizer import train_tokenizer
from speechbrain_ext.hparams import load_hparams, merge_hparams
from speechbrain_ext.model_folder.write import model_parts, write_model_folder
from speechbrain_ext.training import run as training
from speechbrain_ext.training.results import ResultRow
from speechbrain_ext.training.settings import take_paths

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = sorted(path for path in (ROOT / "hparams").glob("*.yaml") if path.stem != "finetune")
"""The hparams files of all architectures; finetune.yaml is for any of them."""

SENTENCES = ["THE CAT SAT", "A HAT AND A CAT", "THE TEA IS HOT", "A HOT DAY", "SHE HAS A HAT", "THE DAY IS SAD"]
UTTERANCES = {"train-tiny": 12, "dev-tiny": 2, "test-tiny": 2}

# Small sizes for any hparams file, as on the command line
SMALL = {
    "train_splits": "[train-tiny]",
    "dev_split": "dev-tiny",
    "test_splits": "[test-tiny]",
    "number_of_epochs": "1",
    "grad_accumulation_factor": "1",
    "num_workers": "0",
    "vocab_size": "30",
    "d_model": "16",
    "nhead": "2",
    "num_encoder_layers": "2",
    "num_decoder_layers": "1",
    "d_ffn": "32",
    "warmup_steps": "10",
    "test_search": "{beam_size: 2}",
}
CTC = {**SMALL, "num_decoder_layers": 0}
SMALL_TRANSDUCER = {"predictor_size": "16", "joint_size": "16"}


def make_corpus(folder, rate=16000, utterances=UTTERANCES):
    """Write noisy tones with sentences, in LibriSpeech layout; utterances have 0.8 to 1.4 seconds."""
    generator = np.random.default_rng(0)
    for speaker, (split, count) in enumerate(utterances.items(), 1):
        chapter = folder / split / str(speaker) / "1"
        chapter.mkdir(parents=True)
        lines = []
        for index in range(count):
            name = f"{speaker}-1-{index:04d}"
            time = np.arange(int(rate * generator.uniform(0.8, 1.4))) / rate
            tone = np.sin(2 * np.pi * generator.uniform(100, 3000) * time) + 0.1 * generator.standard_normal(len(time))
            soundfile.write(chapter / f"{name}.flac", 0.1 * tone, rate)
            lines.append(f"{name} {SENTENCES[index % len(SENTENCES)]}\n")
        (chapter / f"{speaker}-1.trans.txt").write_text("".join(lines))
    return folder


def arguments(**keys):
    """Keys as a list of command line arguments."""
    return [text for key, value in keys.items() for text in (f"--{key}", str(value))]


def train(folder, *argv, launcher=()):
    """Start train.py in a folder, and wait for its end."""
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, argv)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def train_here(*argv):
    """Train in this process, as train.py does with these arguments."""
    argv, paths = take_paths(list(map(str, argv)))
    file, run_opts, overrides = sb.parse_arguments(argv)
    return training.run(file, run_opts, overrides, paths)


def rows(folder):
    """The results table of a run in a folder."""
    with open(folder / "results" / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def make_row(**values):
    """A row of the results table."""
    numbers = {"int": 1, "float": 1.0, "str": "x"}
    usual = {
        field: numbers[kind if isinstance(kind, str) else kind.__name__] for field, kind in ResultRow.__annotations__.items()
    }
    return ResultRow(**{**usual, **values})


def make_model(folder, decoder_layers, name="hyperconformer", **keys):
    """Write a model folder with random weights, and audio files; returns the hparams."""
    train_csv = folder / "train.csv"
    train_csv.write_text("ID,wrd\n" + "".join(f"{i},{text}\n" for i, text in enumerate(SENTENCES)))
    train_tokenizer(train_csv, folder / "t.model", 30, "unigram", 0, 1, 2, 3)
    tokens = SentencePieceProcessor(str(folder / "t.model")).vocab_size()
    keys = {**SMALL, "num_decoder_layers": decoder_layers, "output_folder": folder / "run", "vocab_size": tokens, **keys}
    overrides = "\n".join(f"{key}: {value}" for key, value in keys.items())
    path = ROOT / "hparams" / f"{name}.yaml"
    hparams = load_hparams(path, overrides)
    hparams["normalize"](torch.randn(2, 50, 80), torch.ones(2), epoch=0)
    row = make_row(
        architecture=name,
        hparams=path.name,
        train_set="train-tiny",
        test_set="test-tiny",
        search="ctc_greedy",
        WER=12.3,
        insertions=1,
        deletions=2,
        substitutions=3,
        words=49,
    )
    text = merge_hparams(path, overrides)
    (folder / "hparams.yaml").write_text(text)
    origin = {"hparams": path.name}
    write_model_folder(folder / "model", text, hparams, model_parts(hparams), folder / "t.model", [row], provenance=origin)
    generator = torch.Generator().manual_seed(0)
    for stem, samples in {"short": 9000, "long": 25037, "middle": 16000}.items():
        soundfile.write(folder / f"{stem}.flac", (0.1 * torch.randn(samples, generator=generator)).numpy(), 16000)
    return hparams


@torch.no_grad()
def talkative(model, wav):
    """Make the transducer of a model with random weights emit tokens in about every third frame of audio."""
    search = model.mods.decoder
    bias, frames = search.transducer.out.bias, model._encode(wav[None], torch.ones(1))[0]
    search.transducer.out.weight *= 4
    low, high = -30.0, 30.0
    for _ in range(10):
        bias[model.blank] = (low + high) / 2
        said = len(search.hypotheses(frames, torch.ones(1))[0].tokens) > frames.shape[1] / 3
        low, high = (bias[model.blank].item(), high) if said else (low, bias[model.blank].item())


def needs_flashlight():
    """Skip a test of language models of words where their package is missing, as with Python 3.13."""
    pytest.importorskip("flashlight", reason="pip install flashlight-text to run this test; Python 3.13 has no wheel of it")
