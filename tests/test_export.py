"""ONNX files give PyTorch's outputs, for every encoder; files that do not are not written; using them needs no PyTorch."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import PAGE_ENCODERS, SMALL
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from tiny import make_corpus, make_model

from speechbrain_ext import __version__, cli
from speechbrain_ext.asr import SpeechEncoder, TransformerASR
from speechbrain_ext.decoders.transducer import TransducerSearch
from speechbrain_ext.export import check as export_check
from speechbrain_ext.export import onnx_model as export
from speechbrain_ext.export.check import run, run_stream
from speechbrain_ext.export.onnx_streaming import Streaming, StreamingFeatures
from speechbrain_ext.export.onnx_transducer import Decoder, Joiner, Search
from speechbrain_ext.export.onnx_whole import Features, FullContext
from speechbrain_ext.export.onnx_write import write_onnx
from speechbrain_ext.inference import load_model
from speechbrain_ext.lobes.features import Fbank as CentredFbank
from speechbrain_ext.lobes.features import KaldiFbank, SentenceNormalization
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling, DepthwiseSubsampling, FusibleSubsampling
from speechbrain_ext.lobes.transducer import PREDICTORS, Transducer
from speechbrain_ext.registry import build_encoder, list_encoders

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e .[dev]")
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Features, front end and normalisation for the test of an encoder; other encoders have the first of each.
FRONT_ENDS = {
    "squeezeformer": lambda: DepthwiseSubsampling(80, 8),
    "fusionformer": lambda: FusibleSubsampling(80, (8, 4)),
}
FEATURES = {
    "squeezeformer": lambda: Fbank(n_mels=80, n_fft=512),
    "hyperconformer": KaldiFbank,
    "practical_conformer": KaldiFbank,
}
NORMS = {"squeezeformer": "global", "hyperconformer": "global"}
TOKENS = 12


def normalizer(kind):
    norm = InputNormalization(norm_type=kind)
    norm(20 * torch.randn(2, 50, 80) - 30, torch.ones(2), epoch=0)
    return norm.eval()


def speech_encoder(encoder, name):
    """A registered encoder after features and subsampling, with a CTC head."""
    subsampling = FRONT_ENDS.get(name, lambda: ConvolutionSubsampling(80, (8, 4)))()
    net = TransformerASR(TOKENS, subsampling.output_size, encoder.d_model, 4, 1, 0, 8)
    net.encoder = encoder
    features = FEATURES.get(name, lambda: Fbank(n_mels=80))()
    return SpeechEncoder(features, normalizer(NORMS.get(name, "sentence")), subsampling, net, torch.nn.Linear(32, TOKENS)).eval()


def signals(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(length, generator=generator) * torch.linspace(0, 1, length) for length in lengths]


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def expected(speech, wav, config=None):
    return speech.encode(wav.unsqueeze(0), dynchunktrain_config=config)[0][0].log_softmax(-1)


def same(found, wanted, tolerance=1e-3):
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", list_encoders())
@torch.no_grad()
def test_every_encoder_gives_the_same_answers_alone_and_in_any_batch(name, tmp_path):
    """Only with default keys, because an export takes seconds; the contract exports encoders with all keys."""
    torch.manual_seed(0)
    speech = speech_encoder(build_encoder(name, **{**SMALL, "num_layers": 2}).eval(), name)
    for parameter in speech.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    write_onnx(FullContext(speech, speech.head), tmp_path / "model.onnx", False, {})
    model = session(tmp_path / "model.onnx")
    for lengths in ((1,), (16000,), (4999, 33000, 160), (30001, 30001, 700, 1600, 21000)):
        wavs = signals(*lengths)
        for wav, found in zip(wavs, run(model, wavs), strict=True):
            same(found, expected(speech, wav))


class InPyTorch:
    """A streaming graph in PyTorch with the interface of onnxruntime's session, because each export would take 8 s."""

    def __init__(self, graph):
        self.graph = graph
        self.about = {"hop_length": graph.features.hop_length, **graph.metadata}

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map=self.about)

    def run(self, outputs, inputs):
        waveform, *states = (torch.from_numpy(inputs[name]) for name in self.graph.input_names)
        assert tuple(outputs) == self.graph.output_names
        return [tensor.numpy() for tensor in self.graph(waveform, states)]


def streams_are_the_same(model, speech, config):
    """Check one and two streams, with a last chunk that is full, short, or a single frame."""
    for lengths in ((1,), (2559,), (2560, 2560), (2640,), (16001, 16001)):
        wavs = signals(*lengths)
        for wav, found in zip(wavs, run_stream(model, wavs), strict=True):
            same(found, expected(speech, wav, config))


@pytest.mark.parametrize("left", [2, None, 0])
@torch.no_grad()
def test_every_encoder_streams_with_its_state_outside(encoder_case, encoder, left):
    speech = speech_encoder(encoder, encoder_case[0])
    config = DynChunkTrainConfig(4, left)
    streams_are_the_same(InPyTorch(Streaming(speech, speech.head, config)), speech, config)


# An export takes long, so each encoder is exported once, with caches that grow (at full and half frame rate) or are limited.
UNLIMITED = ("conformer", "squeezeformer")
STREAMS = [(name, None if name in UNLIMITED else 2) for name in list_encoders() if name not in PAGE_ENCODERS]


@pytest.mark.parametrize("name, left", STREAMS)
@torch.no_grad()
def test_every_encoder_gives_the_same_answers_in_a_stream(name, left, tmp_path):
    torch.manual_seed(0)
    speech = speech_encoder(build_encoder(name, **{**SMALL, "num_layers": 2}).eval(), name)
    for parameter in speech.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    config = DynChunkTrainConfig(4, left)
    graph = Streaming(speech, speech.head, config)
    write_onnx(graph, tmp_path / "model.onnx", False, {"hop_length": str(graph.features.hop_length), **graph.metadata})
    streams_are_the_same(session(tmp_path / "model.onnx"), speech, config)


@torch.no_grad()
def test_streams_begin_with_the_prior_of_their_normalisation():
    torch.manual_seed(0)
    speech = speech_encoder(build_encoder("conformer", **SMALL).eval(), "conformer")
    speech.normalize = SentenceNormalization()
    speech.normalize(20 * torch.randn(2, 50, 80) - 30, torch.ones(2), epoch=0)
    speech.eval()
    config = DynChunkTrainConfig(4, 2)
    streams_are_the_same(InPyTorch(Streaming(speech, speech.head, config)), speech, config)


@dataclass
class Kept:
    """The state of a user's encoder."""

    value: Any


class Strange(torch.nn.Module):
    """An encoder that sums its input, and keeps the sum in a given form."""

    d_model, chunk_multiple, streamable = 32, 1, True

    def __init__(self, first=None, following=lambda total: {"sums": [total]}):
        super().__init__()
        self.first, self.following = first, following

    def forward(self, src, src_mask=None, src_key_padding_mask=None, pos_embs=None, dynchunktrain_config=None):
        size = dynchunktrain_config.chunk_size
        chunks = src.split(size, 1)
        totals = torch.stack([chunk.sum(1) for chunk in chunks], 1).cumsum(1)
        return src + totals.repeat_interleave(size, 1)[:, : src.shape[1]], []

    def make_streaming_context(self, config):
        return Kept(self.first)

    def forward_streaming(self, src, context, pos_embs=None):
        total = src.sum(1)
        if isinstance(context.value, dict):
            total = context.value["sums"][0] + total
        context.value = self.following(total)
        return src + total.unsqueeze(1), []


@torch.no_grad()
def test_what_a_strangers_encoder_keeps_is_found():
    speech = speech_encoder(Strange(), "conformer")
    config = DynChunkTrainConfig(4, None)
    graph = Streaming(speech, speech.head, config)
    assert graph.input_names[-1] == "encoder.value.sums.0" and graph.states[-1].shape == ["batch", 32]
    streams_are_the_same(InPyTorch(graph), speech, config)


@pytest.mark.parametrize(
    "encoder, message",
    [
        (Strange(following=lambda total: str(total.sum())), "Strange keeps its value between chunks as.*keep it in a tensor"),
        (Strange(torch.ones(2, 32), lambda total: total), "Strange starts a stream with a value other than zeros"),
        (Strange(following=lambda total: iter([total])), "Strange keeps its streaming state in a list_iterator.*dataclass"),
    ],
)
def test_state_that_is_not_found_is_refused(encoder, message):
    speech = speech_encoder(encoder, "conformer")
    with pytest.raises(ValueError, match=message):
        Streaming(speech, speech.head, DynChunkTrainConfig(4, None))


def test_what_does_not_stream_is_refused():
    speech = speech_encoder(build_encoder("squeezeformer", padding="right", **SMALL), "squeezeformer")
    with pytest.raises(ValueError, match="does not stream; export it without --streaming"):
        Streaming(speech, speech.head, DynChunkTrainConfig(4, 2))
    with pytest.raises(ValueError, match="Fbank with remove_dc looks at the whole utterance and does not stream"):
        StreamingFeatures(CentredFbank(n_mels=80, remove_dc=True), normalizer("sentence"))


@torch.no_grad()
def test_of_a_cascade_the_pass_that_answers_is_exported(tmp_path):
    torch.manual_seed(0)
    stages = {"first": "hyperconformer", "first_chunk": 16}
    encoder = build_encoder("cascade", d_model=32, nhead=4, num_layers=2, d_ffn=64, **stages).eval()
    speech = speech_encoder(encoder, "cascade")
    write_onnx(FullContext(speech, speech.head, "first"), tmp_path / "first.onnx", False, {})
    assert not [weight.name for weight in onnx.load(tmp_path / "first.onnx").graph.initializer if "second" in weight.name]
    for wav in signals(9000, 30000):  # shorter and longer than a chunk
        first = speech.encode(wav.unsqueeze(0), pass_name="first")[0][0].log_softmax(-1)
        same(run(session(tmp_path / "first.onnx"), [wav])[0], first)
        assert (expected(speech, wav) - first).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["sentence", "global"])
@pytest.mark.parametrize("keys", [{}, {"n_fft": 512}, {"win_length": 20, "hop_length": 12.5, "n_fft": 482}])
@torch.no_grad()
def test_features_are_those_of_speechbrain(kind, keys):
    """Each mel filter has a bin of the transform, because SpeechBrain normalises the rounding error of an empty filter."""
    fbank, norm = Fbank(n_mels=80, **keys), normalizer(kind)
    features = Features(fbank, norm)
    for wav in signals(1, 16000, 16001):
        wanted = norm(fbank(wav.unsqueeze(0)), torch.ones(1))
        torch.testing.assert_close(features(wav.unsqueeze(0), torch.tensor([len(wav)]))[0], wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["sentence", "global"])
@pytest.mark.parametrize("rate", [16000, 8000])
@torch.no_grad()
def test_features_are_kaldis(kind, rate):
    fbank, norm = KaldiFbank(rate), normalizer(kind)
    features, lengths = Features(fbank, norm), [1600, 16000, 16080, 16100]
    wavs = [0.9 + 0.1 * wav for wav in signals(*lengths)]
    batch, frames = features(torch.nn.utils.rnn.pad_sequence(wavs, True), torch.tensor(lengths))
    for wav, count, found in zip(wavs, frames, batch, strict=True):
        wanted = norm(fbank(wav.unsqueeze(0)), torch.ones(1))[0]
        torch.testing.assert_close(found[:count], wanted, atol=1e-3, rtol=0)


@torch.no_grad()
def test_features_keep_quiet_bins_beside_loud_ones():
    """A loud tone of 100 Hz over noise 75 dB below it. One product with all sines in float32 has ten times the error."""
    fbank, norm = Fbank(n_mels=80), normalizer("sentence")
    wav = torch.sin(2 * torch.pi * 100 * torch.arange(32000) / 16000) + 2e-4 * signals(32000)[0]
    wanted = norm(fbank(wav.unsqueeze(0)), torch.ones(1))
    torch.testing.assert_close(Features(fbank, norm)(wav.unsqueeze(0), torch.tensor([32000]))[0], wanted, atol=5e-4, rtol=0)


@torch.no_grad()
def test_the_loudest_bin_is_the_utterances_own():
    """A click on the last sample is louder in the frame after the end, which exists only in a batch."""
    wav = signals(1599)[0] * 1e-4
    wav[-1] = 1.0
    features = Features(Fbank(n_mels=80), normalizer("sentence"))
    alone, frames = features(wav.unsqueeze(0), torch.tensor([1599]))
    padded, _ = features(torch.nn.functional.pad(wav, (0, 3000)).unsqueeze(0), torch.tensor([1599]))
    torch.testing.assert_close(padded[:, :frames], alone, atol=1e-5, rtol=0)
    assert not padded[:, frames:].any()


def test_unknown_features_are_refused():
    with pytest.raises(ValueError, match="deltas is True.*supports only False"):
        Features(Fbank(deltas=True), normalizer("sentence"))
    with pytest.raises(ValueError, match="norm_type is batch.*sentence and global"):
        Features(Fbank(), InputNormalization(norm_type="batch"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a model and its ONNX file, and the report of the check."""
    folder = tmp_path_factory.mktemp("export")
    make_model(folder, decoder_layers=0)
    return folder, export.export_model(folder / "model", folder / "model.onnx")


@pytest.fixture
def written_at_once(exported, monkeypatch):
    """Skip the export, which takes seconds and would give the same file."""
    content = (exported[0] / "model.onnx").read_bytes()
    monkeypatch.setattr(export, "write_onnx", lambda graph, path, *_: path.write_bytes(content))


@pytest.fixture(scope="module")
def exported_stream(exported):
    """The same model for streams, in another file."""
    folder, _ = exported
    return folder, export.export_model(folder / "model", folder / "stream.onnx", streaming=True, chunk_size=8, left_context=-1)


def test_without_audio_the_check_hears_synthetic_signals(exported):
    _, report = exported
    assert report.synthetic and report.max_difference < 1e-4 and report.torch_wer is None
    assert "ratio" in str(report) and "word error rate" not in str(report)


def test_of_a_model_with_a_decoder_the_ctc_branch_is_exported(tmp_path, capsys):
    make_model(tmp_path, decoder_layers=1)
    corpus = make_corpus(tmp_path / "corpus") / "test-tiny"
    assert cli.main(["export", "--model", str(tmp_path / "model"), str(tmp_path / "joint.onnx"), "--audio", str(corpus)]) == 0
    assert "compared on 2 utterances" in (out := capsys.readouterr().out) and "word error rate" in out
    assert not [weight.name for weight in onnx.load(tmp_path / "joint.onnx").graph.initializer if "decoder" in weight.name]


def test_files_need_no_references(exported, written_at_once):
    folder, _ = exported
    files = [str(folder / f"{name}.flac") for name in ("short", "long")]
    report = export.export_model(folder / "model", folder / "again.onnx", audio=files)
    assert report.utterances == 2 and not report.synthetic and report.torch_wer is None
    assert report.max_difference < 1e-4 and report.token_error == 0


def test_metadata_suffice_for_decoding_and_name_no_place(exported):
    folder, _ = exported
    proto = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(proto)
    about = {entry.key: entry.value for entry in proto.metadata_props}
    tokenizer = load_model(folder / "model", "cpu").hparams.tokenizer
    tokens = json.loads(about.pop("tokens"))
    assert len(tokens) == tokenizer.vocab_size()
    assert tokens[:3] == ["", "", ""] and tokens[4:] == [tokenizer.id_to_piece(i) for i in range(4, len(tokens))]
    assert about == {
        "format": "speechbrain_ext",
        "version": __version__,
        "mode": "full",
        "precision": "float32",
        "encoder": "hyperconformer",
        "sample_rate": "16000",
        "n_fft": "400",
        "hop_length": "160",
        "n_mels": "80",
        "seconds_per_frame": "0.04",
        "blank_index": "0",
    }
    assert [[axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in proto.graph.input] == [
        ["batch", "samples"],
        ["batch"],
    ]
    assert str(ROOT).encode() not in (folder / "model.onnx").read_bytes()


def test_lengths_beyond_the_samples_are_those_of_the_samples(exported):
    folder, _ = exported
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    wav = 0.1 * np.random.default_rng(0).standard_normal((4, 9000)).astype(np.float32)
    answers = session.run(None, {"waveform": wav, "lengths": np.array([10**6, 9000, 0, -5])})
    expected = session.run(None, {"waveform": wav, "lengths": np.array([9000, 9000, 0, 0])})
    for answer, right in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer, right)


def test_metadata_of_streams_say_what_to_feed(exported_stream):
    folder, report = exported_stream
    assert report.max_difference < 1e-4 and "chunk of 0.32 s" in str(report)
    proto = onnx.load(folder / "stream.onnx")
    onnx.checker.check_model(proto)
    about = {entry.key: entry.value for entry in proto.metadata_props}
    keys = ("mode", "chunk_size", "left_context", "chunk_samples", "chunk_step", "window", "before", "ends")
    assert [about[key] for key in keys] == ["streaming", "8", "-1", "5360", "5120", "400", "200", "zeros"]
    states = json.loads(about["state"])
    assert [value.name for value in proto.graph.input] == ["waveform", *(state["input"] for state in states)]
    assert [value.name for value in proto.graph.output] == ["log_probs", *(state["output"] for state in states)]
    assert states[1] == {
        "input": "subsampling.left",
        "output": "next.subsampling.left",
        "shape": ["batch", 0, 80],
        "type": "float32",
    }
    assert [axis.dim_param for axis in proto.graph.input[0].type.tensor_type.shape.dim] == ["batch", "samples"]


@pytest.mark.parametrize("name", ["model.onnx", "stream.onnx"])
@torch.no_grad()
def test_the_example_needs_no_torch_and_writes_the_same_text(name, exported_stream):
    folder, _ = exported_stream
    files = [str(folder / f"{name}.flac") for name in ("short", "long", "middle")]
    model = load_model(folder / "model", "cpu")
    wavs = [model.load_audio(file) for file in files]
    config = DynChunkTrainConfig(8) if name == "stream.onnx" else None
    texts = []
    for wav in wavs:
        log_probs = model.mods.encoder.encode(wav.unsqueeze(0), dynchunktrain_config=config)[0][0]
        tokens = export_check.greedy(log_probs.numpy(), model.blank)
        texts.append(" ".join(model.tokenizer.decode_ids(tokens).split()))
    code = (
        "import runpy, sys; sys.modules.update(torch=None, scipy=None, speechbrain=None, speechbrain_ext=None);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    given = [ROOT / "examples" / "transcribe_onnx.py", folder / name, *files, folder / "t.model"]
    command = [sys.executable, "-c", code, *given]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert [line.split("\t") for line in result.stdout.splitlines()] == [list(pair) for pair in zip(files, texts, strict=True)]
    assert all(texts) and result.returncode == 1 and "t.model" in result.stderr and "Traceback" not in result.stderr


def test_the_example_refuses_what_is_no_model_in_one_line(tmp_path, capsys, monkeypatch):
    example = runpy.run_path(str(ROOT / "examples" / "transcribe_onnx.py"), run_name="example")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    torch.onnx.export(torch.nn.Identity(), torch.ones(1), tmp_path / "other.onnx", dynamo=True, verbose=False)
    capsys.readouterr()
    for name, message in {"gone": "cannot be loaded", "junk": "cannot be loaded", "other": "is not for this program"}.items():
        monkeypatch.setattr(sys, "argv", ["transcribe_onnx.py", str(tmp_path / f"{name}.onnx"), "a.wav"])
        assert example["main"]() == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and f"{name}.onnx {message}" in err


def test_the_example_refuses_what_is_no_speech(exported, tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "transcribe_onnx.py"), run_name="example")
    recogniser = example["Recogniser"](str(exported[0] / "model.onnx"))
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "a.raw").write_bytes(bytes(2000))
    with pytest.raises(ValueError, match="a.raw cannot be read as audio"):
        recogniser.transcribe(str(tmp_path / "a.raw"))
    for name, message in (("nan", "holds samples that are no numbers"), ("gone", "cannot be read as audio.*check the path")):
        with pytest.raises(ValueError, match=f"{name}.wav {message}"):
            recogniser.transcribe(str(tmp_path / f"{name}.wav"))


TRANSDUCER = ROOT / "tests" / "data" / "model_folders" / "transducer-v1"
PARTS = ["model-decoder.onnx", "model-encoder.onnx", "model-joiner.onnx"]


def test_a_transducer_is_three_files(tmp_path, capsys, monkeypatch):
    """They give the model's text without PyTorch, and either all files are written or none."""
    assert cli.main(["export", "--model", str(TRANSDUCER), str(tmp_path / "model.onnx")]) == 0
    assert "tokens decoded differently: 0.00%" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == PARTS
    abouts = {part: session(tmp_path / part).get_modelmeta().custom_metadata_map for part in PARTS}
    assert [abouts[part]["part"] for part in PARTS] == ["decoder", "encoder", "joiner"]
    assert abouts[PARTS[0]]["context_size"] == "2" and abouts[PARTS[0]]["vocab_size"] == "25"
    assert abouts[PARTS[2]]["joiner_dim"] == abouts[PARTS[1]]["joiner_dim"] == "8"
    model = load_model(TRANSDUCER, "cpu")
    model.choose_beam(1)
    soundfile.write(tmp_path / "a.wav", signals(24000)[0].numpy(), 16000)
    code = "import runpy, sys; sys.modules.update(torch=None, speechbrain_ext=None); sys.argv = sys.argv[1:];"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, ROOT / "examples" / "transcribe_onnx.py"]
    keys = {"capture_output": True, "text": True, "check": True, "env": {**os.environ, "PYTHONIOENCODING": "utf-8"}}
    for name in ("model.onnx", PARTS[1]):
        result = subprocess.run([*command, tmp_path / name, tmp_path / "a.wav"], **keys)
        assert result.stdout == f"{tmp_path / 'a.wav'}\t{model.transcribe_file(tmp_path / 'a.wav')}\n"
    example = runpy.run_path(str(ROOT / "examples" / "transcribe_onnx.py"), run_name="example")
    shutil.copy(tmp_path / PARTS[1], tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="model.onnx and .*model-encoder.onnx are of two exports; delete the older one"):
        example["Recogniser"](tmp_path / "model.onnx")
    os.remove(tmp_path / "model.onnx")
    os.rename(tmp_path / PARTS[1], tmp_path / "renamed.onnx")
    with pytest.raises(ValueError, match="renamed.onnx is a transducer's encoder; name it NAME-encoder.onnx"):
        example["Recogniser"](str(tmp_path / "renamed.onnx"))
    os.rename(tmp_path / "renamed.onnx", tmp_path / PARTS[1])
    for part in PARTS:
        os.rename(tmp_path / part, tmp_path / f"kept-{part}")
    monkeypatch.setattr(
        export,
        "write_onnx",
        lambda graph, path, *_: shutil.copy(tmp_path / f"kept-{path.name[1:].removesuffix('.partial')}", path),
    )
    monkeypatch.setattr(export_check, "run", lambda *given: [frames + 0.1 for frames in run(*given)])
    assert cli.main(["export", "--model", str(TRANSDUCER), str(tmp_path / "model.onnx")]) == 1
    assert "in a log-probability from PyTorch" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a.wav", *(f"kept-{part}" for part in PARTS)]


@pytest.mark.parametrize("kaldi", [False, True])
@torch.no_grad()
def test_a_transducer_streams_with_its_state_outside(kaldi):
    model, config = load_model(TRANSDUCER, "cpu"), DynChunkTrainConfig(4, 2)
    encoder, head = model.mods.encoder, model.mods.decoder.transducer.project_frames
    encoder.compute_features = KaldiFbank(16000) if kaldi else encoder.compute_features
    stand_in, wavs = InPyTorch(Streaming(encoder, head, config, output="encoder_out")), signals(16001, 16001)
    stand_in.about["output"] = "encoder_out"
    for wav, found in zip(wavs, run_stream(stand_in, wavs), strict=True):
        same(found, head(encoder.encode(wav[None], dynchunktrain_config=config)[0])[0])


@pytest.mark.parametrize("predictor", PREDICTORS)
@torch.no_grad()
def test_decoder_and_joiner_say_what_the_search_says(predictor, tmp_path):
    torch.manual_seed(1)
    transducer = Transducer(8, TOKENS, predictor, predictor_size=8, joint_size=16)
    transducer.out.weight.mul_(6)
    graph, sessions = Decoder(transducer), []
    for name, part in {"decoder": graph, "joiner": Joiner(transducer)}.items():
        write_onnx(part, tmp_path / f"{name}.onnx", False, part.metadata)
        sessions.append(session(tmp_path / f"{name}.onnx"))
    frames = 3 * torch.randn(1, 60, 8)
    said, log_probs = Search(*sessions, graph)(transducer.project_frames(frames)[0].numpy())
    (best,) = TransducerSearch(transducer, beam_size=1).hypotheses(frames, torch.ones(1))
    assert sum(said, []) == best.tokens and len(best.tokens) > 5 and log_probs.shape == (60, TOKENS)
    for size in (1, 3):  # number of hypotheses
        inputs = [torch.cat([part] * 2)[:size] for part in graph.example_inputs()]
        found = sessions[0].run(None, dict(zip(graph.input_names, (part.numpy() for part in inputs), strict=True)))
        wanted = graph(*inputs)
        same(found[0], wanted[0] if isinstance(wanted, tuple) else wanted)


@pytest.mark.parametrize("streaming", [False, True])
def test_int8_keeps_the_front_end_in_float32(streaming, exported):
    folder, _ = exported
    report = export.export_model(folder / "model", folder / "int8.onnx", int8=True, tolerance=1.0, streaming=streaming)
    assert 0 < report.max_difference
    graph = onnx.load(folder / "int8.onnx").graph
    types = {weight.name: weight.data_type for weight in graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for name, kind in types.items()) > 5
    front = [kind for name, kind in types.items() if name.startswith(("features.", "encoder.subsampling."))]
    assert len(front) > 6 and set(front) == {onnx.TensorProto.FLOAT}
    assert {node.op_type for node in graph.node} >= {"MatMulInteger", "DynamicQuantizeLinear"}


@pytest.mark.parametrize("wrong", [lambda x: x + 0.01, lambda x: x * float("nan"), lambda x: x[:-1]], ids=["off", "nan", "short"])
def test_what_differs_is_not_written(wrong, exported, written_at_once, monkeypatch):
    folder, _ = exported
    monkeypatch.setattr(export_check, "run", lambda *given: [wrong(log_probs) for log_probs in run(*given)])
    before, content = sorted(os.listdir(folder)), (folder / "model.onnx").read_bytes()
    for name in ("model.onnx", "new.onnx"):
        with pytest.raises(export.ExportError, match=r"differs by \S+ in a log-probability from PyTorch.*0.001.*--tolerance"):
            export.export_model(folder / "model", folder / name)
    assert sorted(os.listdir(folder)) == before and (folder / "model.onnx").read_bytes() == content


def test_what_eight_bits_spoil_is_not_written(exported, written_at_once, monkeypatch, capsys):
    folder, report = exported
    report = type(report)(**{**vars(report), "synthetic": False, "token_error": 0.07})
    monkeypatch.setattr(export, "check", lambda *_: report)
    command = ["export", "--model", str(folder / "model"), str(folder / "spoilt.onnx"), "--int8"]
    assert cli.main(command) == 1
    assert "7.0% of the tokens differently in 8 bits, but only 5.0% is accepted" in capsys.readouterr().err
    assert not (folder / "spoilt.onnx").exists()
    assert cli.main([*command, "--tolerance", "0.1"]) == 0
    assert "7.00%" in capsys.readouterr().out and (folder / "spoilt.onnx").exists()


def test_what_onnx_cannot_express_is_named(exported, monkeypatch, capsys):
    folder, _ = exported
    monkeypatch.setattr(FullContext, "forward", lambda self, waveform, lengths: (waveform, lengths) if waveform.sum() > 0 else ())
    assert cli.main(["export", "--model", str(folder / "model"), str(folder / "new.onnx")]) == 1
    assert "HyperConformerEncoder has an operation that ONNX export cannot express" in capsys.readouterr().err
    assert not (folder / "new.onnx").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model", "."], "is a folder; give the name of a file"),
        (["model", "gone/model.onnx"], "There is no folder"),
        (["nothing", "x.onnx"], "There is no model folder"),
        (["model", "x.onnx", "--pass", "first"], "is no cascade"),
        (["model", "x.onnx", "--left-context", "4"], "are for streams; add --streaming"),
        (["model", "x.onnx", "--hotwords"], "--hotwords is for sherpa-onnx; add --runtime sherpa-onnx"),
        (["model", "x.onnx", "--streaming", "--chunk-size", "0"], "The chunk size is 0 frames"),
        (["model", "x.onnx", "--streaming", "--left-context", "1000000"], "for an export give at most"),
        (["model", "x.onnx", "--streaming", "--chunk-size", "100000"], "The chunk size is 100000 frames of 0.04 s; give at most"),
        (["model", "x.onnx", "--audio", "gone.wav"], "There is no audio file or folder gone.wav"),
        (["model", "x.onnx", "--audio", "model"], r"holds no *.trans.txt"),
    ],
)
def test_wrong_usage(arguments, message, exported, written_at_once, monkeypatch, capsys):
    folder, _ = exported
    monkeypatch.chdir(folder)
    assert cli.main(["export", "--model", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and "Traceback" not in err
    assert not Path("x.onnx").exists() and not list(Path().glob(".x.onnx*"))


def test_a_link_stays_a_link_and_a_pipe_a_pipe(exported, written_at_once, tmp_path, capsys):
    model = str(exported[0] / "model")
    (tmp_path / "old.onnx").write_bytes(b"old")
    (tmp_path / "link.onnx").symlink_to("old.onnx")
    assert cli.main(["export", "--model", model, str(tmp_path / "link.onnx")]) == 0
    assert (tmp_path / "link.onnx").is_symlink() and (tmp_path / "old.onnx").stat().st_size > 1000
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "lost.onnx").symlink_to("gone/deep.onnx")
    capsys.readouterr()
    for name, message in (("pipe", "is a pipe or device, not a file"), ("lost", "There is no folder")):
        assert cli.main(["export", "--model", model, str(tmp_path / f"{name}.onnx")]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "pipe.onnx").is_fifo() and sorted(os.listdir(tmp_path)) == [
        "link.onnx",
        "lost.onnx",
        "old.onnx",
        "pipe.onnx",
    ]


def test_of_a_transducer_all_files_or_none_are_replaced(tmp_path, capsys):
    (tmp_path / "model-encoder.onnx").write_bytes(b"old")
    (tmp_path / "model-joiner.onnx").mkdir()
    assert cli.main(["export", "--model", str(TRANSDUCER), str(tmp_path / "model.onnx")]) == 2
    assert "model-joiner.onnx is a folder; give the name of a file" in capsys.readouterr().err
    assert (tmp_path / "model-encoder.onnx").read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2


def test_missing_packages_are_named(exported, monkeypatch, capsys):
    folder, _ = exported
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cli.main(["export", "--model", str(folder / "model"), str(folder / "new.onnx")]) == 2
    assert "needs the package onnxruntime; install it with: pip install -e '.[export]'" in capsys.readouterr().err
