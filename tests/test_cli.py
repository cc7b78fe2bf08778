"""The command line: standard output, standard error and the exit status."""

import io
import os
import subprocess
import sys

import pytest
import soundfile
import torch
from tiny import ROOT, make_model

from speechbrain_ext import cli
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference import transcribe as files_to_text
from speechbrain_ext.model_folder import fetch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder, decoder_layers=0)
    (folder / "noise.wav").write_text("no audio")
    soundfile.write(folder / "tiny.wav", torch.zeros(1).numpy(), 16000)
    return folder


def transcribe(capsys, folder, *files):
    """Exit status, lines on standard output split at the tab, standard error."""
    status = cli.main(
        ["transcribe", "--model", str(folder / "model"), *(str(folder / file) for file in files), "--device", "cpu"]
    )
    out, err = capsys.readouterr()
    return status, [line.split("\t") for line in out.splitlines()], err


def test_lines_come_in_the_order_of_the_files(capsys, folder, monkeypatch):
    monkeypatch.setattr(files_to_text, "WINDOW", 2)
    names = ["middle.flac", "short.flac", "long.flac", "short.flac", "tiny.wav"]
    status, lines, err = transcribe(capsys, folder, *names)
    assert status == 0 and "Traceback" not in err
    assert [file for file, _ in lines] == [str(folder / name) for name in names]
    texts = dict(lines)
    for name in names:
        assert transcribe(capsys, folder, name)[1] == [[str(folder / name), texts[str(folder / name)]]]


@pytest.mark.parametrize("command", [["transcribe"], ["transcribe", "--streaming"], ["stream"]], ids=" ".join)
def test_without_a_model_the_package_s_own_answers(command, capsys):
    name = fetch.ENGLISH
    recording = str(ROOT / "examples" / "speech.flac")
    out = []
    for given in ([], ["--model", name], ["--model", str(fetch.SHIPPED / name)]):
        assert cli.main([*command, *given, "--device", "cpu", recording]) == 0
        out.append(capsys.readouterr().out)
    assert out[0] == out[1] == out[2] and out[0]
    assert load_model(name, "cpu").fingerprint == load_model(fetch.SHIPPED / name, "cpu").fingerprint
    status = cli.main([*command, "--model", name, "--revision", "v1", recording])
    assert status == 2 and "comes with the package" in capsys.readouterr().err


def test_on_a_terminal_no_line_begins_behind_the_progress_bar(folder, monkeypatch):
    terminal = io.StringIO()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, terminal)
    files = [str(folder / "short.flac"), str(folder / "long.flac")]
    assert cli.main(["transcribe", "--model", str(folder / "model"), *files, "--device", "cpu"]) == 0
    shown = [line.rsplit("\r", 1)[-1] for line in terminal.getvalue().split("\n")]
    assert " files" in terminal.getvalue() and all(any(line.startswith(file + "\t") for line in shown) for file in files)


def test_a_bad_file_does_not_stop_the_rest(capsys, folder):
    status, lines, err = transcribe(capsys, folder, "short.flac", "noise.wav", "gone.wav", ".", "long.flac")
    assert status == 1
    assert [file for file, _ in lines] == [str(folder / "short.flac"), str(folder / "long.flac")]
    assert "noise.wav is not audio" in err and "no audio file" in err and "is a folder" in err


def test_a_file_that_fails_in_the_model_does_not_stop_the_rest(capsys, folder, monkeypatch):
    segments = files_to_text._Run._segments

    def too_large(self, wavs):
        if max(map(len, wavs)) > 20000:
            raise RuntimeError("not enough\nmemory")
        return segments(self, wavs)

    monkeypatch.setattr(files_to_text._Run, "_segments", too_large)
    status, lines, err = transcribe(capsys, folder, "long.flac", "short.flac", "middle.flac")
    assert status == 1 and len(lines) == 2
    assert "long.flac cannot be transcribed: not enough memory" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "usage"),
        (["listen"], "invalid choice: 'listen'"),
        (["transcribe"], "FILE"),
        (["transcribe", "--model", "/no/such", "a.wav"], "There is no model folder /no/such"),
        (["transcribe", "--model", "/no/such", "a.wav", "--width"], "unrecognized"),
        (["transcribe", "--model", ".", "a.wav", "--revision", "main"], "and has no revision main"),
        (["publish", "--model", "/no/such"], "REPO_ID"),
        (["publish", "--model", "/no/such", "ann/model"], "/no/such is no complete model folder"),
        (["publish", "--model", "/no/such", "ann/model", "--license", "my own"], "license is 'my own'"),
    ],
)
def test_wrong_usage(capsys, argv, message):
    try:
        status = cli.main(argv)
    except SystemExit as end:  # argparse
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and message in err and "Traceback" not in err


def test_the_help_groups_the_commands(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert capsys.readouterr().out == shown
    titles = "Audio to text:", "  transcribe  audio", "  stream ", "Models elsewhere:", "  publish"
    places = [shown.index(text) for text in titles]
    assert places == sorted(places)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["stream", "--help"])
    assert "--chunk-size" in capsys.readouterr().out


def test_standard_output_holds_nothing_but_results(folder):
    command = [sys.executable, "-m", "speechbrain_ext", "transcribe", "--model", folder / "model", folder / "short.flac"]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    assert line.split("\t")[0] == str(folder / "short.flac")
