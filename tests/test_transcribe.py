"""Python and the command line give the same texts, and a bug keeps its traceback."""

import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_streaming import speech

from speechbrain_ext import cli
from speechbrain_ext.dataio.audio import AudioError
from speechbrain_ext.dataio.samples import as_samples
from speechbrain_ext.decoders import alignment
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.transcribe import transcribe_files
from speechbrain_ext.utils.errors import UserError

FOLDERS = Path(__file__).parent / "data" / "model_folders"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of 5, 90 and 200 s: one is processed whole, the others in pieces."""
    folder, paths = tmp_path_factory.mktemp("files"), []
    for seconds in (5, 90, 200):
        paths.append(folder / f"{seconds}.wav")
        soundfile.write(paths[-1], 0.1 * speech(16_000 * seconds).numpy(), 16000)
    return paths


@pytest.mark.parametrize(
    "name, pass_name",
    [("ctc-v1", None), ("fused-v1", None), ("cascade-v1", "first"), ("cascade-v1", None), ("transducer-v1", None)],
)
def test_python_and_the_command_line_give_the_same_text(name, pass_name, files, tmp_path, capsys):
    model = load_model(FOLDERS / name, "cpu", pass_name)
    texts = model.transcribe_files(files)
    assert texts == [model.transcribe_file(file) for file in files] and all(texts)
    asked = ["--pass", pass_name] if pass_name else []
    command = ["transcribe", "--model", str(FOLDERS / name), "--device", "cpu", *asked, *map(str, files)]
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "".join(f"{file}\t{text}\n" for file, text in zip(files, texts, strict=True))
    assert model.transcribe_files(files, output=tmp_path / "out") == texts
    assert sorted(path.suffix for path in (tmp_path / "out").glob("200.*")) == [".jsonl", ".srt", ".vtt"]
    assert model.transcribe_files(files, output=tmp_path / "out") == texts  # from the finished files


def test_a_beam_is_chosen(files, capsys):
    """The model's beam, or greedy search; a model without a beam refuses it."""
    model, command = load_model(FOLDERS / "transducer-v1", "cpu"), ["transcribe", "--device", "cpu", "--beam-size", "1"]
    beam = model.transcribe_file(files[0])
    model.choose_beam(1)
    greedy = model.transcribe_file(files[0])
    assert greedy and greedy != beam
    capsys.readouterr()
    assert cli.main([*command, "--model", str(FOLDERS / "transducer-v1"), str(files[0])]) == 0
    assert capsys.readouterr().out == f"{files[0]}\t{greedy}\n"
    assert cli.main([*command, "--model", str(FOLDERS / "ctc-v1"), str(files[0])]) == 2
    assert "uses ctc_greedy, which has no beam" in capsys.readouterr().err


def test_a_bad_file_raises_in_python(files, tmp_path):
    model = load_model(FOLDERS / "ctc-v1", "cpu")
    with pytest.raises(AudioError, match="no audio file"):
        model.transcribe_files([files[0], tmp_path / "gone.wav"])


def test_one_name_is_no_list_of_files():
    with pytest.raises(UserError, match="files is 'speech.flac'; give a list of files"):
        load_model(FOLDERS / "ctc-v1", "cpu").transcribe_files("speech.flac")


def test_very_loud_audio_is_the_file_s_error(files, tmp_path):
    """Resampling can raise its peaks above what the model takes."""
    square = 0.999e12 * torch.randn(8000, generator=torch.Generator().manual_seed(0)).sign()
    soundfile.write(tmp_path / "loud.wav", square.numpy(), 8000, "DOUBLE")
    loud, whole = transcribe_files(load_model(FOLDERS / "ctc-v1", "cpu"), [tmp_path / "loud.wav", files[0]])
    assert "loud.wav" in str(loud.error) and whole.text


def test_an_unknown_pass_is_refused():
    with pytest.raises(ValueError, match="The pass is 'third'; give first or second"):
        load_model(FOLDERS / "cascade-v1", "cpu", "third")
    with pytest.raises(ValueError, match="no cascade: it has one pass"):
        load_model(FOLDERS / "ctc-v1", "cpu", "first")


def test_a_bug_in_a_model_keeps_its_traceback(files, monkeypatch):
    """A bug in the package or in a user's encoder needs its traceback to be found."""
    model = load_model(FOLDERS / "ctc-v1", "cpu")
    bugs = TypeError("bug"), RuntimeError("shape '[3]' is invalid for input of size 2"), ValueError("bug")
    for bug in (*bugs, RuntimeError("CUDA error: an illegal memory access was encountered")):

        def forward(*arguments, bug=bug, **keys):
            raise bug

        monkeypatch.setattr(model.mods.encoder.transformer.encoder, "forward", forward)
        with pytest.raises(type(bug)) as caught:
            model.transcribe_file(files[0])
        assert caught.value is bug


def test_too_little_memory_is_the_file_s_error(files, monkeypatch):
    model = load_model(FOLDERS / "ctc-v1", "cpu")

    def forward(*arguments, **keys):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model.mods.encoder.transformer.encoder, "forward", forward)
    with pytest.raises(ValueError, match="5.wav cannot be transcribed: .*allocate memory"):
        model.transcribe_file(files[0])


def test_what_a_batch_took_is_free_before_its_files_go_one_by_one(files, tmp_path, monkeypatch):
    model, another = load_model(FOLDERS / "ctc-v1", "cpu"), tmp_path / "another.wav"
    shutil.copy(files[0], another)
    encoder, held, alive = model.mods.encoder.transformer.encoder, [], []
    original = encoder.forward

    def forward(x, *arguments, **keys):
        alive.append([reference() is not None for reference in held])
        if len(x) == 1:
            return original(x, *arguments, **keys)
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(encoder, "forward", forward)
    first, second = model.transcribe_files([files[0], another])
    assert first == second and alive == [[], [False], [False]]


@pytest.mark.parametrize("form", [lambda device: device.type, lambda device: device], ids=["name", "device"])
@torch.no_grad()
def test_a_batch_goes_to_a_device_at_once(form, files, tmp_path, pretend_gpu):
    """Its files are joined before; the device may have any form that PyTorch accepts."""
    paths = [files[0], *(tmp_path / f"{number}.wav" for number in range(3))]
    for path in paths[1:]:
        shutil.copy(files[0], path)
    expected = load_model(FOLDERS / "ctc-v1", "cpu").transcribe_files(paths)
    with pretend_gpu.PretendGpu():
        model = load_model(FOLDERS / "ctc-v1", form(pretend_gpu.DEVICE))
    assert model.device == "pretend:0"
    with pretend_gpu.PretendGpu() as recorder:
        assert model.transcribe_files(paths) == expected
    assert recorder.uploads.total() <= 3, dict(recorder.uploads)
    assert recorder.sync_count() <= 3 + len(paths), dict(recorder.syncs)


def test_alignment_runs_on_the_host(pretend_gpu):
    """torchaudio has no kernel for Apple's devices."""
    log_probs, tokens = torch.randn(9, 5).log_softmax(-1), [3, 1]
    with pretend_gpu.PretendGpu() as recorder:
        there = log_probs.to(pretend_gpu.DEVICE)
        assert alignment.align(there, tokens) == alignment.align(log_probs, tokens)
    assert not recorder.launches and recorder.sync_count() == 1


def test_importing_does_no_work():
    """Packages that import slowly are imported where they are used."""
    code = """if True:
        import sys
        import speechbrain_ext.cli, speechbrain_ext.registry, speechbrain_ext.utils.errors
        print([name for name in ("torch", "speechbrain", "onnx", "matplotlib", "huggingface_hub") if name in sys.modules])
        import speechbrain_ext.inference
        print([name for name in ("onnx", "onnxruntime", "matplotlib", "huggingface_hub.hf_api") if name in sys.modules])"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "[]"], run.stdout


@torch.no_grad()
def test_samples_of_any_batch_are_those_of_the_file(files):
    model = load_model(FOLDERS / "joint-v1", "cpu")
    wav = model.load_audio(files[0])
    text = model.transcribe_file(files[0])
    for lengths in (torch.ones(1), np.ones(1), [1], torch.ones(1).double()):
        assert model.transcribe_batch(wav.unsqueeze(0), lengths)[0][0] == text
        assert len(model.transcribe_segments(wav.unsqueeze(0), lengths)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_samples(np.frombuffer(b"\0\1" * 100, "<i2"))
