"""The model that comes with the package: it loads by name, is small, and knows the words of a recording of a book."""

import shutil
import tomllib
from pathlib import Path

import pytest
import soundfile
import torch
from speechbrain.utils.metric_stats import ErrorRateStats
from tiny import ROOT

from speechbrain_ext import cli
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.streaming import StreamingRecognizer
from speechbrain_ext.model_folder.fetch import ENGLISH, SHIPPED
from speechbrain_ext.model_folder.weights import read_tokenizer
from speechbrain_ext.training.sources import locate

FOLDER = SHIPPED / ENGLISH
RECORDING = ROOT / "examples" / "speech.flac"
REFERENCE = (ROOT / "examples" / "speech.txt").read_text().split()
"""The text of the recording, whose speaker is in no training set."""


@pytest.fixture(scope="module")
def model():
    return load_model(device="cpu")


def error_rate(text):
    stats = ErrorRateStats()
    stats.append([""], [text.split()], [REFERENCE])
    return stats.summarize("error_rate")


def test_it_is_small_and_says_what_it_is(model):
    parameters = sum(p.numel() for p in model.hparams.asr_model.parameters())
    assert parameters <= 4e6 and sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6
    card = (FOLDER / "README.md").read_text()
    assert f"--model {ENGLISH} " in card and "path/to" not in card and "Limits" in card and "test-clean" in card


def test_more_than_half_of_the_words_of_a_book_are_right(model, capsys):
    text = model.transcribe_file(RECORDING)
    assert error_rate(text) < 50
    assert cli.main(["transcribe", "--device", "cpu", str(RECORDING)]) == 0
    assert capsys.readouterr().out == f"{RECORDING}\t{text}\n"


def test_also_in_a_stream(model):
    recognizer = StreamingRecognizer(model)
    samples, _ = soundfile.read(RECORDING, dtype="float32")
    segments = [segment for first in range(0, len(samples), 1600) for segment in recognizer.accept(samples[first : first + 1600])]
    assert error_rate(" ".join(segment.text for segment in [*segments, *recognizer.finish()])) < 60


@pytest.mark.parametrize("seconds", [0.5, 6, 20, 65])
def test_silence_has_no_words(seconds, model, tmp_path):
    soundfile.write(tmp_path / "silence.wav", torch.zeros(round(16000 * seconds)).numpy(), 16000)
    for keys in ({}, {"streaming": True}):
        assert model.transcribe_file(tmp_path / "silence.wav", **keys) == ""
    model.choose_beam(1)
    try:
        assert model.transcribe_file(tmp_path / "silence.wav") == ""
    finally:
        model.choose_beam(None)


def test_a_folder_of_its_name_does_not_hide_it(model, tmp_path, monkeypatch):
    (tmp_path / ENGLISH).mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model(device="cpu").fingerprint == model.fingerprint == load_model(FOLDER, "cpu").fingerprint
    assert read_tokenizer(ENGLISH).vocab_size() == model.tokenizer.vocab_size()
    assert locate(ENGLISH) == (ENGLISH, FOLDER)
    (tmp_path / ENGLISH / "hyperparams.yaml").touch()  # a model folder
    with pytest.raises(FileNotFoundError, match="english is no model folder because it has no config.json; copy the model again"):
        load_model(device="cpu")
    shutil.rmtree(tmp_path / ENGLISH)
    shutil.copy(FOLDER / "tokenizer.ckpt", tmp_path / ENGLISH)  # a file of that name is the user's
    assert locate(ENGLISH) == (ENGLISH, Path(ENGLISH)) and read_tokenizer(ENGLISH).vocab_size() == model.tokenizer.vocab_size()


def test_an_installed_package_has_it():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["speechbrain_ext"]
    found = {path for pattern in patterns for path in (ROOT / "speechbrain_ext").glob(pattern)}
    assert found >= set(FOLDER.iterdir())
