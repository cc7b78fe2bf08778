"""The page of ``examples/web`` in a real browser: it writes the same text as Python, and shows errors.

Most tests need Debian's Chromium and npm, the others Node; they are skipped without them.
"""

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from safetensors.torch import save_file
from tiny import ROOT, SMALL_TRANSDUCER, make_model, talkative

from speechbrain_ext.export.check import synthetic
from speechbrain_ext.export.onnx_model import export_model
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.streaming import StreamingRecognizer

CHROMIUM, NPM = "/usr/bin/chromium", shutil.which("npm")
KALDI = "!new:speechbrain_ext.lobes.features.KaldiFbank {sample_rate: 16000, n_mels: 80}"
TRANSDUCER = {"name": "hyperconformer_transducer", "compute_features": KALDI, **SMALL_TRANSDUCER}
MODELS = {
    "fbank": {},
    "kaldi": {"compute_features": KALDI},
    "encoder": TRANSDUCER,  # so the export writes encoder-encoder.onnx
    "lstm": TRANSDUCER | {"predictor": "lstm"},
}
WEB = ROOT / "examples" / "web"
in_a_browser = pytest.mark.skipif(not Path(CHROMIUM).exists() or NPM is None, reason="apt-get install chromium npm")
in_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node: apt-get install nodejs")


def in_node_alone(script, module, code, tmp_path):
    """What a program prints that uses a script of the page, with a replaced import of onnxruntime."""
    text = (WEB / script).read_text()
    text = re.sub(r"^import .* as ort .*$", "const ort = {env: {wasm: {}}, Tensor: class {}};", text, flags=re.MULTILINE)
    (tmp_path / "program.mjs").write_text(module + text + code)
    done = subprocess.run(["node", tmp_path / "program.mjs"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@in_node
def test_text_is_read_once(tmp_path):
    """Parts of the text after each token are those of the tokens so far; a page with an hour of text reads only new tokens."""
    code = """
    const about = {sample_rate: 16000, seconds_per_frame: 0.04, blank_index: 0, tokens: '[]', state: '[]'};
    const recognizer = new Recognizer({about, bytes: 0});
    const symbols = ['▁A', 'B', '▁', '▁⁇▁', 'C', '', 'D▁'];
    let reads = 0, random = 1, time = 0;
    const found = [];
    for (let i = 0; i < 2000; i++) {
      random = (random * 48271) % 2147483647;
      time += random % 9 ? 0.2 : 1.5;
      const symbol = symbols[random % symbols.length];
      recognizer.tokens.push({time, get symbol() { reads++; return symbol; }});
      const parts = recognizer.parts().map(({time, text}) => [time, text]);
      if (i < 50 || i === 1999) found.push([recognizer.tokens.map(({symbol, time}) => [symbol, time]), parts]);
      if (i === 49) reads = 0;
    }
    console.log(JSON.stringify({reads, found}));
    """
    said = in_node_alone("recognizer.js", "", code, tmp_path)
    assert said["reads"] <= 2 * 2000
    for tokens, parts in said["found"]:
        wanted, before = [], -math.inf
        for symbol, at in tokens:
            if not wanted or (at - before > 1.0 and symbol.startswith("▁")):
                wanted.append([at, ""])
            wanted[-1][1] += symbol
            before = at
        wanted = [[at, " ".join(text.replace("▁", " ").split())] for at, text in wanted]
        assert parts == [part for part in wanted if part[1]]


@in_node
def test_the_microphone_sends_its_last_samples(tmp_path):
    module = """
    let Registered;
    globalThis.registerProcessor = (name, processor) => { Registered = processor; };
    globalThis.AudioWorkletProcessor = class { port = {sent: [], postMessage(piece) { this.sent.push(piece && [...piece]); }}; };
    """
    code = """
    const microphone = new Registered();
    for (let i = 0; i < 9; i++) microphone.process([[Float32Array.from({length: 128}, (_, j) => 128 * i + j)]]);
    microphone.port.onmessage({data: 'end'});
    console.log(JSON.stringify(microphone.port.sent));
    """
    *pieces, end = in_node_alone("microphone.js", module, code, tmp_path)
    assert [len(piece) for piece in pieces] == [1024, 128] and sum(pieces, []) == list(range(9 * 128)) and end is None


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """A function that runs the page with a model and audio, and the models: with each kind of features and of heads."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e .[dev]")
    import onnx

    root = tmp_path_factory.mktemp("web")
    shutil.copytree(WEB, root / "page", ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
    subprocess.run([NPM, "ci", "--ignore-scripts"], cwd=root / "page", check=True, capture_output=True)
    models = {}
    for name, keys in MODELS.items():
        (root / name).mkdir()
        make_model(root / name, **{"decoder_layers": 0, **keys})
        if "predictor_size" in keys:
            model = load_model(root / name / "model", "cpu")
            talkative(model, synthetic(16000, (4.1,))[0])
            save_file(model.hparams.asr_model.state_dict(), root / name / "model" / "asr.safetensors")
        export_model(root / name / "model", root / "page" / f"{name}.onnx", streaming=True, chunk_size=8, left_context=4)
        models[name] = load_model(root / name / "model", "cpu")
        models[name].choose_search(models[name].searches[-1].replace("beam", "greedy"))
    shutil.copy(root / "page" / "encoder-encoder.onnx", root / "page" / "alone-encoder.onnx")
    proto = onnx.helper.make_model(onnx.helper.make_graph([], "", [], []))
    for name, about in (
        ("plain", {}),
        ("damaged", {"format": "speechbrain_ext", "mode": "streaming", "tokens": "[]", "state": "[]"}),
    ):
        onnx.helper.set_model_props(proto, about)
        (root / "page" / f"{name}.onnx").write_bytes(proto.SerializeToString())
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

        def run(model, audio):
            driver = [ROOT / "tests" / "web_page.mjs", root / "page" / "node_modules" / "playwright-core" / "index.mjs", CHROMIUM]
            command = ["node", *map(str, driver), f"http://127.0.0.1:{port}/?model={model}.onnx", str(audio)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=500)
            assert not done.returncode, done.stderr
            return json.loads(done.stdout)

        yield run, models
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("name, seconds", [("fbank", 4.1), ("kaldi", 4.1), ("kaldi", 0.1), ("encoder", 4.1), ("lstm", 4.1)])
def test_a_file_has_the_text_that_python_streams(name, seconds, web, tmp_path):
    run, models = web
    soundfile.write(tmp_path / "speech.wav", synthetic(16000, (seconds,))[0].numpy(), 16000)
    wav = soundfile.read(tmp_path / "speech.wav", dtype="float32")[0]
    recognizer = StreamingRecognizer(models[name], 8, 4, endpoint=1000.0, longest=1000.0)
    segments = recognizer.accept(wav) + recognizer.finish()
    said = run(name, tmp_path / "speech.wav")
    assert said["text"] == " ".join(segment.text for segment in segments) != "" and not said["errors"]
    assert said["status"].startswith(f"{seconds:.1f} s of audio in ") and said["copied"]
    assert said["slices"] < 100  # the page draws only the last levels, so an hour is not slower than a minute


@pytest.mark.slow
@in_a_browser
def test_the_microphone(web):
    """Chromium's fake microphone, which beeps. A second click before it is open does not open another one."""
    run, _ = web
    said = run("kaldi", "microphone")
    assert "times as fast as speech" in said["status"] and said["text"] and not said["errors"] and said["live"] == 0


@pytest.mark.slow
@in_a_browser
def test_what_is_wrong_is_said(web, tmp_path):
    run, _ = web
    (tmp_path / "notes.wav").write_text("no audio")
    assert run("kaldi", tmp_path / "notes.wav")["status"] == "notes.wav is not audio that this browser can read."
    assert run("gone", "none")["status"] == "There is no gone.onnx next to this page."
    alone = "There is no alone-decoder.onnx next to this page; a transducer needs its encoder, decoder and joiner."
    assert run("alone", "none")["status"] == run("alone-encoder", "none")["status"] == alone
    for other in ("plain", "lstm-decoder"):
        said = run(other, "none")["status"]
        assert said.startswith(f'{other}.onnx is not from "python -m speechbrain_ext export --streaming"')
    assert re.fullmatch(
        r"damaged.onnx cannot be loaded \(.*\); export the model again, or reload the page.", run("damaged", "none")["status"]
    )


@pytest.mark.slow
@in_a_browser
def test_a_page_without_https(web):
    run, _ = web
    said = run("kaldi", "plain")
    assert said["status"] == "The microphone needs HTTPS, or a page at localhost." and not said["errors"]
    assert said["copied"].startswith("This browser copies only from pages with HTTPS")
