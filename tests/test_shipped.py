"""The models that come with the package: they load by name, are small, and know the words of a recording of a book."""

import tomllib

import pytest
import soundfile
from speechbrain.utils.metric_stats import ErrorRateStats
from tiny import ROOT

from speechbrain_ext import cli
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.streaming import StreamingRecognizer
from speechbrain_ext.model_folder.fetch import ENGLISH, ENGLISH_STREAMING, ENGLISH_TRANSDUCER, SHIPPED

NAMES = ENGLISH, ENGLISH_TRANSDUCER, ENGLISH_STREAMING
RECORDING = ROOT / "examples" / "speech.flac"
REFERENCE = (ROOT / "examples" / "speech.txt").read_text().split()
"""The text of the recording, whose speaker is in no training set."""


def error_rate(text):
    stats = ErrorRateStats()
    stats.append([""], [text.split()], [REFERENCE])
    return stats.summarize("error_rate")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_small_and_says_what_it_is(name):
    folder = SHIPPED / name
    parameters = sum(p.numel() for p in load_model(name, "cpu").hparams.asr_model.parameters())
    assert parameters <= 4e6 and sum(path.stat().st_size for path in folder.iterdir()) <= 9e6
    card = (folder / "README.md").read_text()
    assert f"--model {name} " in card and "path/to" not in card and "Limits" in card and "test-clean" in card


@pytest.mark.parametrize("name", NAMES)
def test_about_half_of_the_words_of_a_book_are_right(name, capsys):
    text = load_model(name, "cpu").transcribe_file(RECORDING)
    assert error_rate(text) < 60
    assert cli.main(["transcribe", "--model", name, "--device", "cpu", str(RECORDING)]) == 0
    assert capsys.readouterr().out == f"{RECORDING}\t{text}\n"


def test_the_transducer_makes_fewer_errors():
    ctc, transducer = (error_rate(load_model(name, "cpu").transcribe_file(RECORDING)) for name in (ENGLISH, ENGLISH_TRANSDUCER))
    assert transducer < ctc


def test_a_stream_gets_some_words():
    recognizer = StreamingRecognizer(load_model(ENGLISH_STREAMING, "cpu"))
    samples, _ = soundfile.read(RECORDING, dtype="float32")
    segments = [segment for first in range(0, len(samples), 1600) for segment in recognizer.accept(samples[first : first + 1600])]
    assert error_rate(" ".join(segment.text for segment in [*segments, *recognizer.finish()])) < 60


def test_an_installed_package_has_them():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["speechbrain_ext"]
    found = {path for pattern in patterns for path in (ROOT / "speechbrain_ext").glob(pattern)}
    assert found >= {path for name in NAMES for path in (SHIPPED / name).iterdir()}
