"""The page of ``examples/web`` in a real browser: it writes the same text as Python, and shows errors.

The tests need Debian's Chromium and npm, and are skipped without them.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from tiny import ROOT, make_model

from speechbrain_ext.export.check import synthetic
from speechbrain_ext.export.onnx_model import export_model
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.streaming import StreamingRecognizer

CHROMIUM, NPM = "/usr/bin/chromium", shutil.which("npm")
KALDI = "!new:speechbrain_ext.lobes.features.KaldiFbank {sample_rate: 16000, n_mels: 80}"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="there is no Chromium: apt-get install chromium"),
    pytest.mark.skipif(NPM is None, reason="there is no npm: apt-get install npm"),
]


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A function that runs the page with a model and audio, and the models, one for each kind of features."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e .[dev]")
    root = tmp_path_factory.mktemp("web")
    shutil.copytree(ROOT / "examples" / "web", root / "page", ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
    subprocess.run([NPM, "ci", "--ignore-scripts"], cwd=root / "page", check=True, capture_output=True)
    models = {}
    for name, keys in (("fbank", {}), ("kaldi", {"compute_features": KALDI})):
        (root / name).mkdir()
        make_model(root / name, decoder_layers=0, **keys)
        export_model(root / name / "model", root / "page" / f"{name}.onnx", streaming=True, chunk_size=8, left_context=4)
        models[name] = load_model(root / name / "model", "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    server = subprocess.Popen(command, cwd=root / "page", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probing:
                if probing.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)

        def run(model, heard):
            driver = [ROOT / "tests" / "web_page.mjs", root / "page" / "node_modules" / "playwright-core" / "index.mjs", CHROMIUM]
            command = ["node", *map(str, driver), f"http://127.0.0.1:{port}/?model={model}.onnx", str(heard)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=500)
            assert not done.returncode, done.stderr
            return json.loads(done.stdout)

        yield run, models
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("name, seconds", [("fbank", 4.1), ("kaldi", 4.1), ("kaldi", 0.1)])
def test_a_file_has_the_text_that_python_streams(name, seconds, web, tmp_path):
    run, models = web
    soundfile.write(tmp_path / "speech.wav", synthetic(16000, (seconds,))[0].numpy(), 16000)
    wav = soundfile.read(tmp_path / "speech.wav", dtype="float32")[0]
    recognizer = StreamingRecognizer(models[name], 8, 4, endpoint=1000.0, longest=1000.0)
    segments = recognizer.accept(wav) + recognizer.finish()
    said = run(name, tmp_path / "speech.wav")
    assert said["text"] == " ".join(segment.text for segment in segments) != "" and not said["errors"]
    assert said["status"].startswith(f"{seconds:.1f} s of audio in ")


def test_the_microphone(web):
    """Chromium's fake microphone, which beeps."""
    run, _ = web
    said = run("kaldi", "microphone")
    assert "times as fast as speech" in said["status"] and said["text"] and not said["errors"]


def test_what_is_wrong_is_said(web, tmp_path):
    run, _ = web
    (tmp_path / "notes.wav").write_text("no audio")
    assert run("kaldi", tmp_path / "notes.wav")["status"] == "notes.wav is not audio that this browser can read."
    assert run("gone", "none")["status"] == "There is no gone.onnx next to this page."
