"""The script for a machine with a GPU: it runs to its end, and reports failures."""

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_ext.bench.graphs import StaticStream
from speechbrain_ext.dataio.datasets import Batch
from speechbrain_ext.inference import load_model
from speechbrain_ext.lobes import attention, convolution, precision
from speechbrain_ext.registry import list_encoders
from speechbrain_ext.utils.files import read_csv

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_contract  # noqa: E402
import gpu_training  # noqa: E402


def start(folder, *argv):
    """Start the script in a folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, argv)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,  # for a busy machine; the script ends itself
    )


def test_it_runs_to_its_end(tmp_path):
    run = start(tmp_path, "--minutes", 8, "--tiny", "--out", "found")
    assert run.returncode == 0, run.stdout + run.stderr
    out = tmp_path / "found"
    archives = {f"{name}.zip" for name in gpu_training.ARCHITECTURES}
    assert {path.name for path in out.iterdir()} == archives | {"contract.csv", "table.csv", "training.csv"}

    contract = read_csv(out / "contract.csv")
    assert {row["encoder"] for row in contract} >= set(list_encoders()) and {row["passed"] for row in contract} == {"True"}
    table = read_csv(out / "table.csv")
    assert {(row["task"], row["input"]) for row in table} == {
        ("training", "front end"),
        ("training", "audio"),
        ("inference", "front end"),
        ("inference", "audio"),
        ("streaming", "encoder"),
    }
    training = read_csv(out / "training.csv")
    for name in gpu_training.ARCHITECTURES:
        *curve, last = (row for row in training if row["architecture"] == name)
        assert [row["epochs"] for row in curve if row["set"] == "held-out"] == ["1.0", "2.0"]
        assert last["set"] == "test-tiny" and last["steps"] == "12" and float(last["audio_seconds_per_second"]) > 0

    with zipfile.ZipFile(out / "fusionformer.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "fusionformer"
    (row,) = read_csv(folder / "results.csv")
    assert row["architecture"] == "fusionformer" and (folder / "wer_test-tiny_ctc_greedy.txt").is_file()
    model = load_model(folder / "pretrained", "cpu")
    assert model.transcribe_batch(torch.randn(1, 16000), torch.ones(1))[0]
    assert (folder / "pretrained" / "asr.safetensors").stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 20000


def test_what_fails_stops_nothing_else(tmp_path, corpus):
    (tmp_path / "empty").mkdir()
    given = ["--parts", "train", "--data", corpus / "train-tiny", "--test", tmp_path / "empty"]
    run = start(tmp_path, "--tiny", *given)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "gpu_training.py: There is no audio file" in run.stderr
    assert "gpu.py: train failed: preparing the data ended with 1" in run.stdout


def test_all_parts_run_and_the_exit_status_says_that_one_failed(tmp_path, monkeypatch, capsys):
    called = []

    def fails(arguments, until):
        called.append("contract")
        raise gpu.Failed("it ended with 1")

    monkeypatch.setattr(gpu, "contract", fails)
    monkeypatch.setattr(gpu, "table", lambda arguments, until: called.append("table"))
    assert gpu.main(["--parts", "table,contract", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert called == ["contract", "table"]
    assert "contract failed: it ended with 1" in capsys.readouterr().out


def test_processes_are_ended_when_the_time_is_over(tmp_path):
    script, began = tmp_path / "sleeps.py", time.time()
    script.write_text(
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\ntime.sleep(60)"
    )
    assert gpu.run([[script], ["-c", "pass"]], time.time() + 2) == [None, 0]
    assert time.time() - began < 20


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """A scheduler may end the script; a table would otherwise run for hours."""
    code = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(60)"
    paths = f"import sys, time; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})"
    script = f"{paths}; import gpu; gpu.run([['-c', {code!r}]], time.time() + 60)"
    process, began = subprocess.Popen([sys.executable, "-c", script]), time.time()
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        assert time.time() - began < 30
        time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--parts", "contract,tabel"], "--parts is 'contract,tabel'; give some of contract,table,train"),
        (["--minutes", "0"], "--minutes is 0; give a number above 0"),
        ([], "training needs both --data and --test"),
        (["--tiny", "--data", "."], "training needs both --data and --test"),
        (["--data", "gone", "--test", "."], "gone is not a folder"),
        (["--data", ".", "--test", ".", "--dev", "gone"], "gone is not a folder"),
        (["--data", ".", "--test", ".", "--dev", "."], ". is in --data and is --dev; give other speech for validation"),
        (["--tiny", "--dev", "."], "--dev is given without --data"),
        (["--parts", "table"], "PyTorch finds no GPU; give --tiny to try the script, or --device cpu"),
    ],
)
def test_wrong_usage(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.parse(argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_an_encoder_that_answers_otherwise_does_not_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_contract, "CASES", [("hyperconformer", {})])
    real = gpu_contract.run_whole

    def differs(encoder, x, mask, config, weights, half=None):
        out, gradients = real(encoder, x, mask, config, weights, half)
        answers.append(out)
        return out + (1e-3 if len(answers) == 2 else 0), gradients  # the first way, on the device

    def fails(*arguments):
        raise RuntimeError("no kernel for this")

    answers = []
    monkeypatch.setattr(gpu_contract, "run_whole", differs)
    monkeypatch.setattr(gpu_contract, "run_stream", fails)
    assert gpu_contract.main(["--device", "cpu", "--output", str(tmp_path / "a.csv")]) == 1
    first, *others, last = read_csv(tmp_path / "a.csv")
    assert first["passed"] == "False" and first["output_difference"] == "1.0e-03"
    assert {row["passed"] for row in others} == {"True"}
    assert last["passed"] == "False" and last["note"] == "no kernel for this"
    assert "5 of 7 ways" in capsys.readouterr().out


def test_a_gradient_that_is_missing_or_wrong_does_not_pass():
    value = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert gpu_contract.gradient_difference(value, value) == 0
    assert gpu_contract.gradient_difference({"a": torch.ones(2), "b": torch.full((2,), 0.5)}, value) == 0.5
    assert not gpu_contract.gradient_difference({"a": torch.ones(2), "b": torch.full((2,), float("nan"))}, value) < 1
    with pytest.raises(RuntimeError, match="b has no gradient"):
        gpu_contract.gradient_difference({"a": torch.ones(2), "b": None}, value)


def test_whole_speakers_are_held_out():
    rows = [
        {"ID": f"{speaker}-{i}", "spk_id": f"{speaker}-7", "duration": "1"} for speaker in range(1, 6) for i in range(4 * speaker)
    ]
    train, dev = gpu_training.hold_out(rows)
    assert {row["spk_id"] for row in dev} == {"1-7"} and len(train) + len(dev) == 60
    train, dev = gpu_training.hold_out(rows[-20:])  # one speaker
    assert len(dev) == 1 and len(train) == 19


def test_a_folder_for_validation_replaces_speakers_held_out(corpus, tmp_path):
    gpu_training.prepare(tmp_path, [corpus / "train-tiny"], [corpus / "test-tiny"], "cpu", True, corpus / "dev-tiny")
    train, dev, test = (read_csv(tmp_path / name) for name in (gpu_training.MERGED, gpu_training.DEV, "test-tiny.csv"))
    stored = torch.load(tmp_path / gpu_training.FEATURES)
    assert len(train) == 12 and {row["ID"] for row in dev} == {path.stem for path in (corpus / "dev-tiny").rglob("*.flac")}
    assert sorted(stored["ids"]) == sorted(row["ID"] for row in train + dev + test)


def test_folders_get_names_of_their_own(tmp_path):
    folders = [tmp_path / "a" / "train", tmp_path / "b" / "train"]
    for folder in folders:
        folder.mkdir(parents=True)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    names = gpu_training.link_splits(folders, corpus)
    assert names == ["train", "train-more"] and [(corpus / name).resolve() for name in names] == folders


def test_batches_on_the_device_are_those_of_the_loader(corpus, tmp_path):
    """Features, tokens and lengths are those of the project's datasets."""
    work = tmp_path / "work"
    splits = gpu_training.prepare(work, [corpus / "train-tiny"], [corpus / "test-tiny"], "cpu", True)
    assert splits == (["train-tiny"], ["test-tiny"])
    stored = torch.load(work / gpu_training.FEATURES)
    hparams = gpu_training.setting_of("conformer", work, True, splits).load()
    hparams["tokenizer"].load(str(next(work.glob("*.model"))))
    dataset = gpu_training.make_datasets(hparams, {"dev": work / gpu_training.MERGED})["dev"]
    there = gpu_training.OnDevice(dataset, stored["features"], gpu_training.places_of(stored))
    indices = [3, 0, 5]
    batch, expected = there.collate(indices), Batch([dataset[index] for index in indices])
    assert batch.id == expected.id and batch.wrd == expected.wrd
    torch.testing.assert_close(batch.duration, torch.tensor([float(value) for value in expected.duration], dtype=torch.float64))
    assert batch.host_lengths.keys() == expected.host_lengths.keys()
    for name in ("feats", "tokens", "tokens_bos", "tokens_eos"):
        ours, theirs = getattr(batch, name), getattr(expected, name)
        torch.testing.assert_close(ours.data, theirs.data, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.lengths, theirs.lengths)
        torch.testing.assert_close(batch.host_lengths[name], expected.host_lengths[name])
    assert batch.to("cpu") is batch and [there[index] for index in indices] == indices


def test_the_rate_follows_the_clock(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    clock = gpu_training.Clock(0.002, until=1100.0)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    for now in (1000, 1005, 1010, 1055, 1100, 1200):
        monkeypatch.setattr(time, "time", lambda now=now: float(now))
        clock(optimizer)
        rates.append(round(optimizer.param_groups[0]["lr"], 6))
    assert rates == [0, 0.001, 0.002, 0.001, 0, 0]


def train(corpus, folder, device, until):
    """Prepare the data, train a HyperConformer, and return the rows."""
    work = folder / "work"
    gpu_training.prepare(work, [corpus / "train-tiny"], [corpus / "test-tiny"], device, True)
    usual = ["--work", work, "--out", folder, "--device", device, "--precision", "fp32", "--tiny", "--until", until]
    assert gpu_training.main(["hyperconformer", *map(str, usual)]) == 0
    return read_csv(folder / "training.csv")


def test_training_ends_with_the_time(corpus, tmp_path):
    dev, test = train(corpus, tmp_path, "cpu", 0)
    assert (dev["set"], test["set"]) == ("held-out", "test-tiny") and dev["steps"] == test["steps"] == "1"


def test_training_on_a_device_uploads_no_more_than_indices(corpus, tmp_path, monkeypatch, pretend_gpu):
    """On the pretended device: no devices are mixed, and each batch needs one upload."""
    mode, batches = pretend_gpu.PretendGpu(), []
    collate = gpu_training.OnDevice.collate

    def recorded(self, indices):
        with mode.recorded() as recorder:
            batches.append(recorder)
            return collate(self, indices)

    monkeypatch.setattr(gpu_training.OnDevice, "collate", recorded)
    pretend_gpu.load_there(monkeypatch)
    with mode:
        *_, before, after, test = train(corpus, tmp_path, "pretend:0", time.time() + 20)
    assert test["set"] == "test-tiny" and float(after["train_loss"]) < float(before["train_loss"])
    for recorder in batches:
        assert recorder.uploads.total() == 1 and not recorder.syncs, (dict(recorder.uploads), dict(recorder.syncs))


def test_no_gpu_is_pretended_beside_a_real_one():
    name = "torch._C._get_privateuse1_backend_name()"
    code = f"import torch; torch.cuda.is_available = lambda: True; import gpu_contract; print({name})"
    there = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    run = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, timeout=300)
    assert run.stdout.split()[-1:] == ["privateuseone"], run.stderr


def test_waits_of_the_host_are_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu_contract.counted_waits("cuda") as waits:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert len(waits) == 2 and modes == ["warn", "default"]


# ---------------------------------------------------------------------- code for CUDA, tested without CUDA


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_as_before_after_full_precision(allowed, new):
    """PyTorch has two interfaces for this setting, and raises when they contradict each other."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if new and not hasattr(cudnn, "conv"):
        pytest.skip("this PyTorch has one way only")
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        if new:
            matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
        else:
            matmul.allow_tf32 = cudnn.allow_tf32 = allowed
        read = [lambda: matmul.fp32_precision, lambda: cudnn.conv.fp32_precision] if new else []
        read += [] if new else [lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision]
        expected = [call() for call in read]
        with precision.full_precision(SimpleNamespace(device=torch.device("cuda"))):
            for module, key, forbidden in precision._tf32_switches():
                assert getattr(module, key) == forbidden
        assert [call() for call in read] == expected
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
    # Reading the settings raises if full_precision leaves the two interfaces with different values
    assert matmul.allow_tf32 == before[0] and torch.get_float32_matmul_precision() in ("highest", "high")


def test_tf32_is_as_before_where_contexts_overlap():
    """Of two threads, the one that begins first may end first."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, x = (matmul.allow_tf32, cudnn.allow_tf32), SimpleNamespace(device=torch.device("cuda"))

    def switches():
        return [getattr(module, key) for module, key, _ in precision._tf32_switches()]

    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        allowed, forbidden = switches(), [value for *_, value in precision._tf32_switches()]
        first, second = precision.full_precision(x), precision.full_precision(x)
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert switches() == forbidden
        second.__exit__(None, None, None)
        assert switches() == allowed != forbidden
        with pytest.raises(ZeroDivisionError), precision.full_precision(x), precision.full_precision(x):
            raise ZeroDivisionError
        assert switches() == allowed
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_attention_allows_no_kernel_that_the_user_has_excluded():
    with sdpa_kernel(SDPBackend.MATH):
        with attention.any_length(SimpleNamespace(is_cuda=True)):
            assert not torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.mem_efficient_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("name", attention.ATTENTIONS)
def test_attention_without_plans_compiles(name, monkeypatch):
    """Code compiled for a GPU has the same context, without a graph break."""
    on_gpu, original = SimpleNamespace(is_cuda=True), attention.any_length
    monkeypatch.setattr(attention, "any_length", lambda x: original(on_gpu))
    layer, counter = attention.ATTENTIONS[name](16, 2), CompileCounter()
    compiled = torch.compile(lambda x: layer.mix(x, layer.prepare(x, None, None)), backend=counter, dynamic=True, fullgraph=True)
    for frames in (7, 9, 20):
        compiled(torch.randn(2, frames, 16))
    assert counter.frame_count == 1 and torch.backends.cuda.cudnn_sdp_enabled()


def test_new_lengths_need_no_plans(monkeypatch):
    """cuDNN makes a plan for each new length of attention and depthwise convolution: up to a second (H100, torch 2.11)."""
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                seen.append(("convolution", args[0].is_contiguous()))
            return function(*args, **(kwargs or {}))

    def attention_there(query, *args, **kwargs):
        seen.append(("attention", not torch.backends.cuda.cudnn_sdp_enabled()))
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_there)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with FakeTensorMode(), torch.no_grad(), Recorder():
        x = torch.empty(2, 12, 10, 8, device="cuda")
        convolution.channels_last_conv(x, torch.empty(8, 1, 3, 3, device="cuda"), groups=8)
        with torch.device("cuda"):
            layer, x = attention.RotarySelfAttention(16, 2), torch.empty(2, 12, 16)
        layer.mix(x, layer.prepare(x, None, None))
    assert seen == [("convolution", True), ("attention", True)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_captured_stream_keeps_its_memory(monkeypatch):
    """A graph holds only addresses: if its memory is freed, it reads other data, or fails with an illegal access."""
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    state, usual = weakref.WeakSet(), torch.cuda.Stream

    def new_stream():  # on the GPU of the chunk
        assert torch.cuda.device.call_args.args == (torch.device("cpu"),)
        assert torch.cuda.device.return_value.__enter__.called and not torch.cuda.device.return_value.__exit__.called
        return usual()

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)

    def capture():
        context = SimpleNamespace(layers=[{"state": torch.ones(3)}])
        stream = StaticStream(SimpleNamespace(stream=lambda chunk, context: chunk + 1), context, torch.zeros(1, 2, 3))
        state.update([*stream.state, stream.chunk])
        return stream.capture()

    replay = capture()
    gc.collect()
    assert len(state) == 2 and replay().shape == (1, 2, 3)
    del replay
    gc.collect()
    assert not state
