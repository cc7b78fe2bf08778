"""Folders for sherpa-onnx: its outputs and texts are PyTorch's, and models that it cannot run are refused.

All encoders run in PyTorch with packed state, and one runs in sherpa-onnx. Tests of the others there are marked slow, because
each export takes long.
"""

import functools
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from conftest import PAGE_ENCODERS, make_encoder
from speechbrain.lobes.features import MFCC
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from tiny import SMALL_TRANSDUCER, make_model

from speechbrain_ext import cli
from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.export import sherpa_texts
from speechbrain_ext.export.check import greedy, reference, synthetic
from speechbrain_ext.export.ctc_transducer import CtcDecoder, CtcJoiner, Pairs
from speechbrain_ext.export.onnx_transducer import Decoder, InPyTorch, Joiner, Search
from speechbrain_ext.export.onnx_write import write_onnx
from speechbrain_ext.export.sherpa_check import Texts, feed_of, has_runtime, tail_samples, texts_in_runtime
from speechbrain_ext.export.sherpa_folder import GRAPHS, export_sherpa, make_graphs, symbols_of
from speechbrain_ext.export.sherpa_graphs import Answer, Frames, Packed, PackedPairs, PackedTransducer
from speechbrain_ext.export.sherpa_readme import readme
from speechbrain_ext.export.sherpa_texts import (
    STREAMS,
    TRANSDUCERS,
    open_recognizer,
    settings_of,
    transcribe_streams,
    transcribe_whole,
)
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.streaming import StreamingRecognizer
from speechbrain_ext.lobes.features import Fbank, InputNormalization, KaldiFbank
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling
from speechbrain_ext.lobes.transducer import LstmPredictor, Transducer
from speechbrain_ext.registry import list_encoders
from speechbrain_ext.speech_encoder import SpeechEncoder
from speechbrain_ext.utils.errors import UserError

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e .[dev]")
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

needs_runtime = pytest.mark.skipif(not has_runtime(), reason="sherpa-onnx is not installed: pip install -e .[dev]")
KALDI = "!new:speechbrain_ext.lobes.features.KaldiFbank {sample_rate: 16000, n_mels: 80}"
CENTRED = "!new:speechbrain_ext.lobes.features.Fbank {sample_rate: 16000, n_mels: 80, remove_dc: true}"
SENTENCE = "!new:speechbrain_ext.lobes.features.SentenceNormalization {}"
ENCODERS = [name for name in list_encoders() if name not in PAGE_ENCODERS]
HPARAMS = {"cascade": "cascade_hyperconformer_squeezeformer"}
TRANSDUCER = Path(__file__).parent / "data" / "model_folders" / "transducer-v1"
TOKENS = 12
MOST_OF_INT8 = 0.5
"""Most letters and tokens that may differ in 8 bits; no token of a model with random weights is certain."""


def speech_encoder(encoder, features=None, norm="sentence"):
    """An encoder after features and subsampling, with a CTC head."""
    subsampling = ConvolutionSubsampling(80, (8, 4))
    net = TransformerASR(TOKENS, subsampling.output_size, encoder.d_model, 4, 1, 0, 8)
    net.encoder = encoder
    normalize = InputNormalization(norm_type=norm)
    normalize(3 * torch.randn(2, 50, 80) - 8, torch.ones(2), epoch=0)
    return SpeechEncoder(features or KaldiFbank(), normalize, subsampling, net, torch.nn.Linear(32, TOKENS)).eval()


class OurSession(InPyTorch):
    """A graph in PyTorch with the interface of onnxruntime's session."""

    def get_inputs(self):
        return [SimpleNamespace(name=name) for name in self.graph.input_names]

    @torch.no_grad()
    def run(self, outputs, inputs):
        x, *others = (torch.from_numpy(inputs[name]) for name in self.graph.input_names)
        found = self.graph(x, others) if isinstance(self.graph, Packed) else self.graph(x, *others)
        return [part.numpy() for part in (found if isinstance(found, tuple) else (found,))]


def in_pytorch(graph, speech, *lengths, pass_name=None):
    """Largest difference between streams of different age and whole utterances."""
    generator = torch.Generator().manual_seed(0)
    feed, wavs = feed_of(graph, speech.compute_features), [0.1 * torch.randn(n, generator=generator) for n in lengths]
    found = feed.run(OurSession(graph), [feed.prepare(wav) for wav in wavs])
    wanted = [reference(speech, speech.head, feed, wav, pass_name) for wav in wavs]
    return max(float(np.abs(one - other).max()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("left", [2, 0])
@torch.no_grad()
def test_every_encoder_streams_beside_streams_of_other_age(encoder_case, streaming_encoder, left):
    speech = speech_encoder(streaming_encoder)
    graph = Packed(speech, speech.head, DynChunkTrainConfig(4, left), Answer(TOKENS, 0, [1, 2]))
    assert in_pytorch(graph, speech, 7 * 2560, 100, 4000) < 1e-4
    assert [state.shape for state in graph.zeros(3)][0] == (1, 3, graph.size)


@torch.no_grad()
def test_a_cascades_first_pass_streams_alone():
    speech = speech_encoder(make_encoder("cascade", {}))
    config, answer = DynChunkTrainConfig(4, 2), Answer(TOKENS, 0, [])
    first, both = (Packed(speech, speech.head, config, answer, name) for name in ("first", None))
    assert first.size < both.size and in_pytorch(first, speech, 7 * 2560, 4000, pass_name="first") < 1e-4


@pytest.mark.parametrize("name", ["hyperconformer", "practical_conformer"])
@torch.no_grad()
def test_a_state_that_does_not_grow_takes_all_of_the_past(name):
    speech = speech_encoder(make_encoder(name, {}), norm="global")
    graph = Packed(speech, speech.head, DynChunkTrainConfig(4, None), Answer(TOKENS, 0, []))
    assert in_pytorch(graph, speech, 12000, 5000) < 1e-4


@pytest.mark.parametrize("of_ctc", [True, False])
@torch.no_grad()
def test_a_transducers_frames_stream(of_ctc):
    """Frames of CTC as a transducer contain the frame before, which is part of the state."""
    speech, config = speech_encoder(make_encoder("hyperconformer", {})), DynChunkTrainConfig(4, 2)
    if of_ctc:
        graph = PackedPairs(speech, speech.head, config, Pairs(Answer(TOKENS, 0, [1])))
    else:
        graph = PackedTransducer(speech, speech.head, config, Frames(), None, "encoder_out")
    assert in_pytorch(graph, speech, 7 * 2560, 100, 4000) < 1e-4 * (1 + 2 * of_ctc)  # impossible tokens have -1000
    assert graph.zeros(2)[6].shape == (2, 128, 3, 19) and graph.metadata["model_type"] == "zipformer2"


def test_a_transducer_of_ctc_writes_what_ctc_does():
    """If the model is certain of each frame: with repetitions, blanks between equal tokens, and consecutive tokens."""
    generator = torch.Generator().manual_seed(0)
    path = torch.randint(0, 4, (300,), generator=generator).repeat_interleave(torch.randint(1, 4, (300,), generator=generator))
    log_probs = (8 * torch.eye(4)[path] + torch.randn(len(path), 4, generator=generator)).log_softmax(-1)
    pairs_of = Pairs(Answer(4, 0, []))
    pairs = pairs_of(log_probs.unsqueeze(0))[0].numpy()
    assert pairs_of(log_probs[None, :0]).shape == (1, 0, 8)  # a chunk of no frames
    decoder, joiner = CtcDecoder(4), CtcJoiner(4)
    search = Search(InPyTorch(decoder), InPyTorch(joiner), decoder, max_symbols=1)
    said = sum(search(pairs)[0], [])
    assert said == greedy(log_probs.numpy(), 0) and len(said) > 150


@torch.no_grad()
def test_the_joint_network_of_ctc_is_exact_in_onnxruntime(tmp_path):
    """Also for models that are certain, whose probabilities are so small that a runtime's sigmoid loses them."""
    joiner, generator = CtcJoiner(20), torch.Generator().manual_seed(0)
    write_onnx(joiner, tmp_path / "joiner.onnx", False, {})
    session = onnxruntime.InferenceSession(tmp_path / "joiner.onnx")
    for scale in (1, 5, 20):
        frames = (scale * torch.randn(500, 2, 20, generator=generator)).log_softmax(2).flatten(1)
        last = torch.eye(20)[torch.randint(0, 20, (500,), generator=generator)]
        last[:, 0] = 0  # after a blank only, there is no last token
        wanted = joiner.double()(frames.double(), last.double())
        (found,) = session.run(None, {"encoder_out": frames.numpy(), "decoder_out": last.numpy()})
        assert np.abs(found - wanted.numpy()).max() < 1e-4
        torch.testing.assert_close(wanted.exp().sum(1), torch.ones(500).double(), atol=1e-5, rtol=0)
        joiner.float()


@torch.no_grad()
def test_a_transducer_takes_what_the_runtime_gives_and_gives_what_it_writes():
    """The runtime gives -1 and 0 before the text; tokens without text become blanks."""
    torch.manual_seed(0)
    net = Transducer(8, TOKENS, predictor_size=8, joint_size=16)
    decoder, joiner = Decoder(net), Joiner(net, Answer(TOKENS, 0, [1, 2]))
    assert torch.equal(decoder(torch.tensor([[-1, 0]])), decoder(torch.tensor([[0, 0]])))
    assert not torch.equal(decoder(torch.tensor([[5, 0]])), decoder(torch.tensor([[0, 0]])))
    net.out.bias[0] -= 2.5
    frames, predicted = torch.randn(200, 16), torch.randn(200, 16)
    best, wanted = joiner(frames, predicted).argmax(1), Joiner(net)(frames, predicted).argmax(1)
    assert torch.equal(best, wanted.where(wanted > 2, torch.tensor(0))) and ((wanted == 1) | (wanted == 2)).any()


def test_tokens_that_write_nothing_are_blanks():
    answer = Answer(4, blank=1, silent=[3], repeats=2)
    given = torch.log_softmax(torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0)), -1)
    best, wanted = answer(given).argmax(-1)[:, ::2], given.argmax(-1)
    assert torch.equal(best, wanted.where(wanted != 3, torch.tensor(1))) and (wanted == 3).any()


# ---- The runtime's features: a graph returns them as tokens, three digits of base 256 for each value


def probe(path, online, mels):
    """A model that returns, for each value of the features, three tokens with the digits of (value + 16) * 2^19."""
    ints = {"zero": [0, -1], "axis": [3], "length": [3 * mels]}
    floats = {"shift": 16.0, "scale": 2.0**19, "low": 0.0, "high": 2.0**24 - 1, "b2": 65536.0, "b1": 256.0}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in ints.items()]
    constants += [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in floats.items()]
    constants.append(numpy_helper.from_array(np.array([1, 257, 513], np.float32), "first"))
    constants.append(numpy_helper.from_array(np.array(769, np.int64), "depth"))
    constants.append(numpy_helper.from_array(np.array([0, 1], np.float32), "off_on"))
    steps = [
        ("Add", ["x", "shift"], "shifted", {}),
        ("Mul", ["shifted", "scale"], "scaled", {}),
        ("Floor", ["scaled"], "whole", {}),
        ("Clip", ["whole", "low", "high"], "number", {}),
        ("Div", ["number", "b2"], "n2", {}),
        ("Floor", ["n2"], "d2", {}),
        ("Mul", ["d2", "b2"], "m2", {}),
        ("Sub", ["number", "m2"], "rest", {}),
        ("Div", ["rest", "b1"], "n1", {}),
        ("Floor", ["n1"], "d1", {}),
        ("Mul", ["d1", "b1"], "m1", {}),
        ("Sub", ["rest", "m1"], "d0", {}),
        *[("Unsqueeze", [f"d{i}", "axis"], f"u{i}", {}) for i in (2, 1, 0)],
        ("Concat", ["u2", "u1", "u0"], "digits", {"axis": 3}),
        ("Add", ["digits", "first"], "tokens", {}),  # no equal neighbours, and no blanks
        ("Reshape", ["tokens", "zero"], "row", {}),
        ("Cast", ["row"], "index", {"to": TensorProto.INT64}),
        ("OneHot", ["index", "depth", "off_on"], "log_probs", {"axis": -1}),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "T", mels])]
    outputs = [helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["N", "U", 769])]
    if online:
        shapes = [[1, "N", 5], [1, "N", 1, 3], [1, "N", 1], [1, "N", 1], ["N", 4, 1], ["N", 4, 1], ["N", 128, 3, 19]]
        kinds = [TensorProto.FLOAT] * 7 + [TensorProto.INT64]
        for i, (shape, kind) in enumerate(zip([*shapes, ["N"]], kinds, strict=True)):
            inputs.append(helper.make_tensor_value_info(f"s{i}", kind, shape))
            outputs.append(helper.make_tensor_value_info(f"t{i}", kind, shape))
            steps.append(("Identity", [f"s{i}"], f"t{i}", {}))
    else:
        inputs.append(helper.make_tensor_value_info("x_lens", TensorProto.INT64, ["N"]))
        outputs.append(helper.make_tensor_value_info("lens", TensorProto.INT64, ["N"]))
        steps.append(("Mul", ["x_lens", "length"], "lens", {}))
    nodes = [helper.make_node(kind, given, [out], **keys) for kind, given, out, keys in steps]
    graph = helper.make_graph(nodes, "probe", inputs, outputs, constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if online:
        about = {"encoder_dims": 4, "query_head_dims": 5, "value_head_dims": 1, "num_heads": 1, "num_encoder_layers": 1}
        about |= {"cnn_module_kernels": 2, "left_context_len": 1, "T": 8, "decode_chunk_len": 8}
        helper.set_model_props(proto, {key: str(value) for key, value in about.items()})
    path.mkdir()
    onnx.save(proto, path / "model.onnx")
    names = ["<blk>", *(f"t{i}" for i in range(1, 769))]
    (path / "tokens.txt").write_text("".join(f"{name} {i}\n" for i, name in enumerate(names)))


@needs_runtime
@pytest.mark.parametrize("rate, mels", [(16000, 80), (8000, 40)])
@pytest.mark.parametrize("kind", ["zipformer_ctc", "zipformer2_ctc"])
def test_the_features_are_the_runtimes(kind, rate, mels, tmp_path):
    probe(tmp_path / "probe", kind == "zipformer2_ctc", mels)
    recognizer = open_recognizer(tmp_path / "probe", kind, rate, mels)
    wav = synthetic(rate, (0.51,))[0] + 0.01
    stream = recognizer.create_stream()
    stream.accept_waveform(rate, wav.numpy())
    if kind == "zipformer_ctc":
        recognizer.decode_stream(stream)
        tokens = stream.result.tokens
    else:
        stream.input_finished()
        while recognizer.is_ready(stream):
            recognizer.decode_stream(stream)
        tokens = recognizer.tokens(stream)
    digits = np.array([(int(token.strip()[1:]) - 1) % 256 for token in tokens]).reshape(-1, mels, 3)
    found = torch.from_numpy(digits @ [65536, 256, 1] / 2**19 - 16)
    wanted = KaldiFbank(rate, mels)(wav.unsqueeze(0))[0]
    assert len(found) == (len(wanted) if kind == "zipformer_ctc" else (len(wanted) - 1) // 8 * 8)
    torch.testing.assert_close(found.float(), wanted[: len(found)], atol=1e-3, rtol=0)


# ---- Folders


def make(folder, name="hyperconformer", **keys):
    """A model folder with random weights. Texts have no unknown token, because only Python writes a space after it."""
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder, 0, HPARAMS.get(name, name), **keys)
    model = load_model(folder / "model", "cpu")
    with torch.no_grad():
        for layer in model.ctc_head.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.bias[3] -= 1000
    return model


def make_transducer(folder):
    """A model folder with a transducer that emits tokens in many frames, at most one per frame, as the runtime does."""
    model = make(
        folder, "hyperconformer_transducer", compute_features=KALDI, normalize=SENTENCE, transducer_beam=1, **SMALL_TRANSDUCER
    )
    model.mods.decoder.max_symbols = 1
    with torch.no_grad():
        out = model.mods.decoder.transducer.out
        out.weight.mul_(6)
        out.bias[1:4] -= 1000  # no tokens without text: only PyTorch keeps them in the context
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model folders with Kaldi's and with SpeechBrain's features."""
    root = tmp_path_factory.mktemp("sherpa")
    return SimpleNamespace(
        root=root,
        kaldi=make(root / "kaldi", compute_features=KALDI, normalize=SENTENCE),
        fbank=make(root / "fbank", compute_features=CENTRED, normalize=SENTENCE),
    )


@pytest.fixture(scope="module")
def export():
    """A function that exports a loaded model. It traces a graph once: 8 bits take the trace of float32."""
    trace, traced = torch.onnx.export, {}

    def once(model, graph, *args, **keys):
        key = model, model.pass_name, type(graph), getattr(graph, "output_names", None)
        if key not in traced:
            traced[key] = trace(graph, *args, **keys).model_proto.SerializeToString()
        return SimpleNamespace(model_proto=onnx.load_from_string(traced[key]))

    def run(model, folder, **keys):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("speechbrain_ext.export.sherpa_folder.load_model", lambda *_, **__: model)
            patch.setattr("torch.onnx.export", lambda *args, **rest: once(model, *args, **rest))
            return export_sherpa("model", folder, **keys)

    return run


STREAMING = {"streaming": True, "chunk_size": 8, "left_context": 4}
KEYS = {kind: STREAMING if kind in STREAMS else {} for kind in GRAPHS}
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "zipformer2" else ()) for kind in GRAPHS]
"""All types of model."""
STREAM_KINDS = [kind for kind in KINDS if kind.values[0] in STREAMS]


@pytest.fixture(scope="module")
def exported(models, export):
    """A function that gives the exported folder of a type of model, and the report; transducers are CTC for hotwords.

    The recordings for ``omnilingual_asr_ctc`` have an offset, which both the runtime and Fbank with remove_dc remove.
    """
    files = [models.root / f"{i}.wav" for i in range(3)]
    for i, (file, wav) in enumerate(zip(files, synthetic(16000, (2.5, 0.9, 4.0)), strict=True)):
        soundfile.write(file, 0.02 * i + wav.numpy(), 16000)

    @functools.cache
    def of(kind, int8=False):
        keys = KEYS[kind] | {"hotwords": kind in TRANSDUCERS, "int8": int8, "tolerance": 1.0 if int8 else None}
        model, folder = models.kaldi, models.root / f"{kind}-{int8}"
        if kind == "omnilingual_asr_ctc":
            model, keys["audio"] = models.fbank, list(map(str, files))
        report = export(model, folder, **keys)
        assert report.kind == kind
        return folder, report

    return of


@needs_runtime
def test_whole_utterances_of_kaldis_features(models, exported):
    folder, report = exported("zipformer_ctc")
    assert report.onnx.max_difference < 1e-3 and not report.notes
    assert report.texts.equal == len(report.texts.wanted) == 5 and "texts are PyTorch's" in str(report)
    assert sorted(os.listdir(folder)) == ["README.md", "model.onnx", "tokens.txt"]
    assert onnx.load(folder / "model.onnx").ir_version == 9
    wavs = synthetic(16000, (2.5, 0.9, 4.0))
    lengths = torch.tensor([len(wav) for wav in wavs]) / max(map(len, wavs))
    wanted = models.kaldi.transcribe_batch(torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lengths)[0]
    recognizer = open_recognizer(folder, "zipformer_ctc")
    alone = [transcribe_whole(recognizer, [wav.numpy()], 16000)[0] for wav in wavs]
    together = transcribe_whole(recognizer, [wav.numpy() for wav in wavs], 16000)
    assert [" ".join(text.split()) for text in alone + together] == 2 * wanted and all(wanted)


@needs_runtime
def test_whole_utterances_of_speechbrains_features(exported):
    folder, report = exported("omnilingual_asr_ctc")
    assert report.onnx.max_difference < 1e-3 and not report.notes
    assert report.texts.equal == 3 and all(report.texts.wanted)
    assert "from_omnilingual_asr_ctc" in (folder / "README.md").read_text()


@needs_runtime
@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_short_audio(kind, int8, exported):
    """A clip without a frame has no text, alone and beside others; sherpa-onnx refuses less than 400 samples of waveforms."""
    if kind == "omnilingual_asr_ctc" and importlib.metadata.version("sherpa-onnx").startswith("1."):
        pytest.skip("sherpa-onnx 1 ends the process at an empty waveform")
    recognizer = open_recognizer(exported(kind, int8)[0], kind)
    noise = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    wavs = [noise[:samples] for samples in (0, 1, 60, 399, 400, 401)]

    def texts(wavs):
        if kind in STREAMS:
            return transcribe_streams(recognizer, wavs, 16000, 0)
        return transcribe_whole(recognizer, wavs, 16000)

    alone = [text for wav in wavs for text in texts([wav])]
    assert alone[:3] == ["", "", ""] and texts(wavs) == alone
    together = texts([noise, *wavs])
    assert together[0] and together[1:4] == ["", "", ""] and (int8 or together[1:] == alone)


def program_of(folder, speech, *added):
    """The Python program of a folder's README, with the path of an audio file, and perhaps more settings of the recogniser."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code.replace("speech.wav", str(speech)).replace("\n)\n", "".join(f"\n    {each}," for each in added) + "\n)\n", 1)


def said_by(program, folder):
    """What a program prints that runs in a folder."""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return " ".join(done.stdout.split())


@needs_runtime
@pytest.mark.parametrize("kind", KINDS)
def test_the_folders_readme_runs(kind, exported, tmp_path):
    """For a file of the model's rate, and for one of another rate with two channels."""
    folder, wav = exported(kind)[0], synthetic(16000, (2.5,))[0]
    files, tail, recognizer = sorted(os.listdir(folder)), settings_of(folder)[1], open_recognizer(folder, kind)
    for rate in (16000, 44100):
        samples = torchaudio.functional.resample(wav, 16000, rate).numpy()
        channels = [samples, np.zeros_like(samples)] if rate == 44100 else [samples]
        soundfile.write(tmp_path / "speech.wav", np.stack(channels, 1), rate, subtype="FLOAT")
        if kind in STREAMS:
            (wanted,) = transcribe_streams(recognizer, [samples], rate, tail * rate // 16000)
        else:
            (wanted,) = transcribe_whole(recognizer, [samples], rate)
        assert said_by(program_of(folder, tmp_path / "speech.wav"), folder) == " ".join(wanted.split()) != ""
    assert sorted(os.listdir(folder)) == files


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node: apt-get install nodejs")
@pytest.mark.parametrize("kind", GRAPHS)
def test_the_readmes_javascript_is_valid(kind, tmp_path):
    files = {part: f"{part}.onnx" for part in (("encoder", "decoder", "joiner") if kind in TRANSDUCERS else ("",))}
    (code,) = re.findall(r"```javascript\n(.*?)```", readme(kind, files, 16000, 80, 5440 * (kind in STREAMS)), re.DOTALL)
    (tmp_path / "program.js").write_text(code)
    subprocess.run(["node", "--check", tmp_path / "program.js"], check=True)
    assert ("inputFinished()" in code) == (kind in STREAMS)
    assert ("modelType: 'transducer'" in code) == (kind == "transducer")  # the runtime needs it, except in Python


@needs_runtime
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "streams"])
def test_hotwords(streaming, exported, tmp_path):
    """Without hotwords, texts are those of the same search in PyTorch; with hotwords, these occur more often."""
    folder, report = exported("zipformer2" if streaming else "transducer")
    assert report.texts.equal == len(report.texts.wanted) == 5 and all(report.texts.wanted[1:])
    assert_hotwords_act(folder, "SAD", tmp_path)


def assert_hotwords_act(folder, word, scratch):
    """With the README's settings for hotwords, its program writes a hotword more often than without."""
    soundfile.write(scratch / "speech.wav", synthetic(16000, (2.5,))[0].numpy(), 16000)
    (scratch / "hotwords.txt").write_text(f"{word} :9.0\n")
    (added,) = re.findall(r"^\* Python: `(.*)`$", (folder / "README.md").read_text(), re.MULTILINE)
    added = added.replace("hotwords.txt", str(scratch / "hotwords.txt"))
    with_hotwords, without = (said_by(program_of(folder, scratch / "speech.wav", *more), folder) for more in ([added], []))
    assert with_hotwords.count(word) > without.count(word) and without


@needs_runtime
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "streams"])
def test_a_transducer(streaming, export, tmp_path):
    """With greedy search, texts are those of the model; with a beam, hotwords occur more often."""
    model, folder = make_transducer(tmp_path), tmp_path / "folder"
    keys = STREAMING if streaming else {}
    report = export(model, folder, **keys)
    kind = "zipformer2" if streaming else "transducer"
    assert report.kind == kind and report.onnx.max_difference < 1e-3 and report.onnx.token_error == 0
    assert report.texts.equal == len(report.texts.wanted) == 5 and all(report.texts.wanted[1:])
    assert sorted(os.listdir(folder)) == [
        "README.md", "bpe.vocab", "decoder.onnx", "encoder.onnx", "joiner.onnx", "tokens.txt"
    ]  # fmt: skip
    wavs, recognizer = synthetic(16000, (2.5, 0.9, 4.0)), open_recognizer(folder, kind)
    if streaming:
        graph = make_graphs(model, **keys)["encoder"]
        tail = tail_samples(graph)
        wanted = [their_stream(model, audio_of_stream(wav, graph, tail)) for wav in wavs]
        found = transcribe_streams(recognizer, [wav.numpy() for wav in wavs], 16000, tail)
    else:
        lengths = torch.tensor([len(wav) for wav in wavs]) / max(map(len, wavs))
        wanted = model.transcribe_batch(torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lengths)[0]
        found = transcribe_whole(recognizer, [wav.numpy() for wav in wavs], 16000)
    assert [" ".join(text.split()) for text in found] == wanted and all(wanted)
    assert_hotwords_act(folder, "DAY", tmp_path)


def their_stream(model, wav, chunk_size=8, left_context=4):
    """Text of StreamingRecognizer without endpoints."""
    recognizer = StreamingRecognizer(model, chunk_size, left_context, endpoint=1000.0, longest=1000.0)
    segments = recognizer.accept(wav) + recognizer.finish()
    return " ".join(segment.text for segment in segments)


def audio_of_stream(wav, graph, tail):
    """Samples in the chunks that the runtime decodes, of a stream with zeros after its end."""
    wav = torch.nn.functional.pad(wav, (0, tail))
    return wav[: (graph.features.framing.count(len(wav)) - 1) // graph.frames * graph.step + 200]


@needs_runtime
def test_streams_alone_and_beside_others(models, exported):
    folder, report = exported("zipformer2_ctc")
    assert report.texts.equal == len(report.texts.wanted) == 5
    recognizer = open_recognizer(folder, "zipformer2_ctc")
    graph = make_graphs(models.kaldi, True, 8, 4)[""]
    tail = tail_samples(graph)
    assert settings_of(folder) == ("zipformer2_ctc", tail, 16000, 80) and tail == 34 * 160
    assert "FloatArray((0.34 * rate).toInt())" in (folder / "README.md").read_text()
    wavs = synthetic(16000, (2.5, 0.9, 4.0))
    wanted = [their_stream(models.kaldi, audio_of_stream(wav, graph, tail)) for wav in wavs]
    found = [transcribe_streams(recognizer, [wav.numpy()], 16000, tail)[0] for wav in wavs]
    assert found == wanted and all(wanted)
    assert transcribe_streams(recognizer, [wav.numpy() for wav in wavs], 16000, tail) == wanted
    without = transcribe_streams(recognizer, [wavs[0].numpy()], 16000, 0)
    assert without[0] != wanted[0] and wanted[0].startswith(without[0])


@needs_runtime
@pytest.mark.parametrize("kind", STREAM_KINDS)
@torch.no_grad()
def test_a_stream_begins_again_after_an_endpoint(kind, models, exported):
    """The runtime resets the state of CTC. Of a transducer, it keeps the encoder's state and the last tokens."""
    rules = {"enable_endpoint_detection": True, "rule1_min_trailing_silence": 99, "rule2_min_trailing_silence": 99}
    recognizer = open_recognizer(exported(kind)[0], kind, rule3_min_utterance_length=1.0, **rules)
    wav = synthetic(16000, (4.0,))[0]
    graph, *parts = make_graphs(models.kaldi, **STREAMING, hotwords=kind in TRANSDUCERS).values()
    stream, texts, ends, decoded = recognizer.create_stream(), [], [0], 0
    stream.accept_waveform(16000, wav.numpy())
    while recognizer.is_ready(stream):
        recognizer.decode_stream(stream)
        decoded += 1
        if recognizer.is_endpoint(stream):
            texts.append(recognizer.get_result(stream))
            ends.append(decoded)
            recognizer.reset(stream)
            assert not recognizer.is_endpoint(stream) and recognizer.get_result(stream) == ""
    assert len(ends) > 2
    state, frames, tokenizer = graph.zeros(1), [], models.kaldi.hparams.tokenizer
    for i, chunk in enumerate(KaldiFbank()(wav.unsqueeze(0)).split(32, 1)[: ends[-1]]):
        state = graph.zeros(1) if i in ends and not parts else state
        found, *state = graph(chunk, state)
        frames.append(found[0].numpy())
    said = Search(*map(InPyTorch, parts), parts[0], 1)(np.concatenate(frames))[0] if parts else None
    for text, start, end in zip(texts, ends, ends[1:], strict=False):
        tokens = sum(said[8 * start : 8 * end], []) if parts else greedy(np.concatenate(frames[start:end]), models.kaldi.blank)
        assert text == tokenizer.decode_ids(tokens)
    assert all(texts[::2])  # a transducer may have no token in the second


def binary(name):
    """A program of the package sherpa-onnx-bin."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


@needs_runtime
@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_the_websocket_server_with_three_clients(kind, exported, tmp_path):
    server, client = (binary(f"sherpa-onnx-online-websocket-{name}") for name in ("server", "client"))
    if server is None:
        pytest.skip("sherpa-onnx-bin is not installed: pip install -e .[dev]")
    import sherpa_onnx

    folder = exported(kind)[0]
    tail = settings_of(folder)[1]
    libraries = Path(sherpa_onnx.__file__).parent / "lib"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [server, f"--port={port}", f"--tokens={folder}/tokens.txt", "--enable-endpoint=false"]
    if kind in TRANSDUCERS:
        command += [f"--{part}={folder}/{part}.onnx" for part in ("encoder", "decoder", "joiner")]
    else:
        command.append(f"--zipformer2-ctc-model={folder}/model.onnx")
    command += [f"--end-tail-padding={tail / 16000}", "--max-batch-size=3", f"--log-file={tmp_path}/log"]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as probing:
                if probing.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert running.poll() is None
            time.sleep(0.1)
        wavs, clients = synthetic(16000, (2.5, 1.5, 4.0)), []
        for i, wav in enumerate(wavs):
            soundfile.write(tmp_path / f"{i}.wav", wav.numpy(), 16000, subtype="PCM_16")
            command = [client, "--server-ip=127.0.0.1", f"--server-port={port}", "--seconds-per-message=0.05"]
            command += ["--samples-per-message=3200", str(tmp_path / f"{i}.wav")]
            clients.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        said = [one.communicate(timeout=60)[0] for one in clients]
    finally:
        running.kill()
        running.wait()
    recognizer = open_recognizer(folder, kind)
    for i, printed in enumerate(said):
        wav = soundfile.read(tmp_path / f"{i}.wav", dtype="float32")[0]
        text = transcribe_streams(recognizer, [wav], 16000, tail)[0]
        assert re.findall(r'"text": "(.*?)", "tokens"', printed)[-1] == text != ""


# ---- Refused models


class Pieces:
    """A tokenizer of the given pieces; the first one is the blank, the second a control token."""

    def __init__(self, *pieces):
        self.pieces = ["<pad>", "<s>", *pieces]

    def vocab_size(self):
        return len(self.pieces)

    def is_control(self, token):
        return token == 1

    def is_unknown(self, token):
        return self.pieces[token] == "<unk>"

    def id_to_piece(self, token):
        return self.pieces[token]


def test_symbols():
    def symbols(*pieces, whole=True):
        return symbols_of(SimpleNamespace(hparams=SimpleNamespace(tokenizer=Pieces(*pieces)), blank=0), whole)

    assert symbols("<unk>", "▁A", "▁", "5") == ["<blk>", "<s>", "▁⁇", "▁A", "▁", "5"]
    with pytest.raises(ValueError, match="a token 'SIL', which sherpa-onnx leaves out of the texts"):
        symbols("▁A", "SIL")
    assert symbols("▁A", "SIL", whole=False)[-1] == "SIL"
    for piece in ("▁A▁B", "A B", "A▁"):
        with pytest.raises(ValueError, match="has a space after its beginning.*without treat_whitespace_as_suffix"):
            symbols(piece)


def test_the_check_compares_with_pythons_text(models, monkeypatch, tmp_path):
    """Unknown tokens are equal, although only Python writes a space after them."""
    found = {"version": "9.9", "alone": ["?"], "together": ["?"], "seconds": 0.1, "peak_mib": None}
    done = SimpleNamespace(returncode=0, stdout=json.dumps(found))
    monkeypatch.setattr("speechbrain_ext.export.sherpa_check.subprocess.run", lambda *_, **__: done)
    soundfile.write(tmp_path / "speech.wav", synthetic(16000, (2.5,))[0].numpy(), 16000)
    token = models.kaldi.hparams.tokenizer.piece_to_id("D")
    for values in (models.kaldi.ctc_head.w.weight, models.kaldi.ctc_head.w.bias):  # the unknown token replaces D
        changed = values.detach().clone()
        changed[3] = changed[token] + 0.1 * (changed.dim() == 1)
        monkeypatch.setattr(values, "data", changed)
    given = tmp_path, models.kaldi, make_graphs(models.kaldi), [str(tmp_path / "speech.wav")]
    texts = texts_in_runtime(*given)
    assert texts.equal == 0
    python = models.kaldi.transcribe_file(str(tmp_path / "speech.wav"))
    assert "⁇ " in python.rstrip() and python.strip("⁇ ")
    found["alone"] = found["together"] = [python.replace("⁇ ", "⁇")]
    done.stdout = json.dumps(found)
    assert texts_in_runtime(*given).equal == 1 and texts.wanted != [python]
    soundfile.write(tmp_path / "click.wav", np.zeros(800), 16000)
    with pytest.raises(UserError, match="shorter than 0.1 s.*give longer ones"):
        texts_in_runtime(*given[:-1], [str(tmp_path / "click.wav")])


@pytest.mark.parametrize(
    "features, norm, keys, message",
    [
        (Fbank(n_mels=80), "sentence", {"streaming": True}, "does not compute SpeechBrain's Fbank for streams"),
        (Fbank(n_mels=80), "global", {}, "the model's statistics are global; train with sentence statistics"),
        (Fbank(n_mels=80, sample_rate=8000), "sentence", {}, "gives 16000 samples per second.*not 8000"),
        (Fbank(n_mels=80, hop_length=12), "sentence", {}, "frames take 0.048 s, but sherpa-onnx needs 0.02 s"),
        (
            Fbank(n_mels=80),
            "sentence",
            {"hotwords": True},
            "does not take transducers, which hotwords need, with SpeechBrain's Fbank",
        ),
        (None, "global", {"streaming": True, "left_context": -1}, "grows with a stream.*give a --left-context"),
        (None, "global", {"streaming": True, "left_context": -1, "hotwords": True}, "grows with a stream"),
        (
            None,
            "global",
            {"hotwords": True, "blank": 3},
            "blank is token 3, but.*is token 0; train with.*or export without",
        ),
        (MFCC(n_mels=80), "sentence", {}, "does not compute MFCC features; train with KaldiFbank"),
    ],
)
def test_what_the_runtime_cannot_run(features, norm, keys, message):
    keys = dict(keys)
    blank = keys.pop("blank", 0)
    speech = speech_encoder(make_encoder("conformer", {}), features, norm)
    hparams = SimpleNamespace(tokenizer=Pieces(*map(str, range(TOKENS - 2))))
    model = SimpleNamespace(
        mods=SimpleNamespace(encoder=speech), ctc_head=speech.head, hparams=hparams, blank=blank, pass_name=None
    )
    with pytest.raises(ValueError, match=message):
        make_graphs(model, **keys)


def test_transducers_that_the_runtime_cannot_run():
    model = load_model(TRANSDUCER, "cpu")
    with pytest.raises(ValueError, match="does not take transducers.*with SpeechBrain's Fbank; train with KaldiFbank"):
        make_graphs(model)
    model.mods.encoder.compute_features = KaldiFbank()
    assert list(make_graphs(model)) == list(make_graphs(model, hotwords=True)) == ["encoder", "decoder", "joiner"]
    model.mods.encoder.subsampling.factor *= 2
    with pytest.raises(ValueError, match="frames take 0.08 s, but sherpa-onnx needs 0.04 s"):
        make_graphs(model)
    model.mods.decoder.transducer.predictor = LstmPredictor(25, 8)
    with pytest.raises(ValueError, match="has predictor: lstm.*train with predictor: stateless"):
        make_graphs(model)
    model.hparams.blank_index = 3
    with pytest.raises(ValueError, match="blank is token 3, but.*is token 0; train with blank_index 0.$"):
        make_graphs(model)


@pytest.mark.parametrize(
    "out, message",
    [
        ("kaldi", "holds other files, such as"),
        ("kaldi/t.model", "is a file; give the name of a folder"),
        ("gone/folder", "There is no folder"),
        (".", "is the current folder, which is not replaced; give the name of a new folder"),
        ("empty/../.", "is the current folder"),
        ("link", "There is no folder"),
    ],
)
def test_wrong_usage(out, message, models, monkeypatch, capsys):
    monkeypatch.chdir(models.root)
    Path("empty").mkdir(exist_ok=True)
    os.path.lexists("link") or os.symlink("gone/deep", "link")
    assert cli.main(["export", "--runtime", "sherpa-onnx", "--model", "kaldi/model", out]) == 2
    assert message in capsys.readouterr().err and not Path("gone").exists()


@pytest.mark.parametrize("files", [["README.md"], ["README.md", "model.onnx"], ["tokens.txt"]])
def test_a_folder_of_the_user_is_not_replaced(files, tmp_path, capsys):
    for name in files:
        (tmp_path / name).write_text("mine")
    assert cli.main(["export", "--runtime", "sherpa-onnx", "--model", "gone", str(tmp_path)]) == 2
    assert f"holds other files, such as {files[0]}; give a new folder" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(files, "mine")


@pytest.fixture
def pretended(monkeypatch):
    """A function that replaces the check in onnxruntime by a report, and the runtime's texts by others or none."""

    def pretend(texts=None, synthetic=False):
        report = SimpleNamespace(synthetic=synthetic)
        monkeypatch.setattr("speechbrain_ext.export.sherpa_folder.write_checked", lambda *_: report)
        monkeypatch.setattr("speechbrain_ext.export.sherpa_folder.has_runtime", lambda: texts is not None)
        monkeypatch.setattr("speechbrain_ext.export.sherpa_folder.texts_in_runtime", lambda *_: texts)

    return pretend


def test_an_empty_folder_and_an_earlier_export_are_replaced(models, export, pretended, tmp_path):
    pretended()
    for _ in range(2):
        assert "sherpa-onnx is not installed" in str(export(models.kaldi, tmp_path))
        assert sorted(os.listdir(tmp_path)) == ["README.md", "tokens.txt"]
        (tmp_path / "tokens.txt").write_text("old")


def test_an_offset_that_only_the_runtime_removes_is_named(models, export, pretended, monkeypatch, tmp_path):
    monkeypatch.setattr(models.fbank.mods.encoder, "compute_features", Fbank(n_mels=80))
    pretended()
    report = export(models.fbank, tmp_path / "folder")
    assert "DC offset" in str(report) and "remove_dc: true" in (tmp_path / "folder" / "README.md").read_text()
    wrong = Texts("9.9", ["ABC"], ["AB"], ["AB"], 0.1)
    pretended(wrong)
    with pytest.raises(RuntimeError, match="train with remove_dc: true, because the runtime removes a DC offset") as found:
        export(models.fbank, tmp_path / "folder")
    assert "--audio" not in str(found.value)
    pretended(wrong, synthetic=True)
    with pytest.raises(RuntimeError, match="compare on real speech with --audio, or train with remove_dc"):
        export(models.fbank, tmp_path / "folder")


def test_filters_without_a_frequency_are_refused():
    """Kaldi's own code stops at them."""
    for rate, mels in ((16000, 100), (8000, 90), (48000, 128)):
        assert KaldiFbank(rate, mels)(torch.rand(1, rate)).shape == (1, 100, mels)
    for rate, mels in ((16000, 128), (8000, 128), (16000, 300)):
        with pytest.raises(UserError, match=f"n_mels of KaldiFbank is {mels}, too many at {rate} Hz"):
            KaldiFbank(rate, mels)


@pytest.mark.parametrize("rate, dim", [(16000, 80), (8000, 80), (16000, 100), (8000, 40)])
def test_the_readme_has_the_server_s_options(rate, dim):
    text = readme("zipformer2_ctc", {"": "model.onnx"}, rate, dim, tail=8000)
    options = re.search(r"websocket server, use\n`(.*?)`", text)[1].split()
    usual = {"--sample-rate": 16000, "--input-sample-rate": 16000, "--feat-dim": 80}
    given = {name: value for name, _, value in (option.partition("=") for option in options)}
    assert given.pop("--end-tail-padding") == f"{8000 / rate:.2f}"
    assert {name: int(given.get(name, value)) for name, value in usual.items()} == dict(
        zip(usual, (rate, rate, dim), strict=True)
    )
    assert (f"clients need `--sample-rate={rate}`" in text) == (rate != 16000)


def test_the_readme_of_8_bits_says_that_texts_depend_on_others(models, export, pretended, tmp_path):
    pretended()
    report = export(models.kaldi, tmp_path / "folder", int8=True, **STREAMING)
    assert "a text may depend on the others" in str(report)
    assert report.notes[0] in (tmp_path / "folder" / "README.md").read_text()


@pytest.mark.parametrize(
    "code, message",
    [
        ("raise ImportError('no libonnxruntime.so')", "cannot be imported (no libonnxruntime.so); reinstall it, or uninstall it"),
        ("__version__ = '1.10.46'", "sherpa-onnx 1.10.46 is installed, but 1.12.26 or later is needed; upgrade it with"),
        ("import os; os._exit(1)", "its import ends the process; reinstall it"),
    ],
)
def test_a_runtime_that_cannot_be_used(code, message, monkeypatch, tmp_path, capsys):
    """It is not reported as the model's fault, and before the model is loaded."""
    (tmp_path / "sherpa_onnx").mkdir()
    (tmp_path / "sherpa_onnx" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["export", "--runtime", "sherpa-onnx", "--model", "gone", str(tmp_path / "folder")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_what_the_runtime_writes_otherwise_is_not_written(models, export, pretended):
    wrong = Texts("9.9", ["ABC DEF"], ["ABC"], ["ABC DEF"], 0.1)
    assert wrong.equal == 0 and wrong.error == pytest.approx(4 / 14)
    pretended(wrong)
    with pytest.raises(RuntimeError, match="sherpa-onnx 9.9 writes 28.6% of the letters differently, but only 5.0% is accepted"):
        export(models.kaldi, models.root / "wrong")
    assert not list(models.root.glob("*wrong*"))


@needs_runtime
def test_what_the_runtime_does_not_take_is_not_written(models, export, monkeypatch):
    """A configuration that ends the runtime's process does not end this one."""
    from speechbrain_ext.export import sherpa_folder

    monkeypatch.setattr(
        sherpa_folder, "write_checked", lambda model, graphs, path, partials, *_: partials[""].write_bytes(b"nothing")
    )
    with pytest.raises(RuntimeError, match="sherpa-onnx does not load the exported model, so nothing was written"):
        export(models.kaldi, models.root / "nothing")
    assert not list(models.root.glob("*nothing*"))


# ---- Slow tests


@needs_runtime
@pytest.mark.slow
@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_in_the_runtime(name, kind, export, tmp_path):
    """Float32 has PyTorch's texts. Of 8 bits, a wrong scale or sign would change nearly all letters."""
    model = make(tmp_path, name, normalize=SENTENCE, compute_features=CENTRED if kind == "omnilingual_asr_ctc" else KALDI)
    keys = KEYS[kind] | {"hotwords": kind in TRANSDUCERS}
    report = export(model, tmp_path / "float32", **keys)
    assert report.kind == kind and report.onnx.max_difference < 1e-3
    assert report.texts.equal == len(report.texts.wanted) == 5 and any(report.texts.wanted)
    int8 = export(model, tmp_path / "int8", int8=True, tolerance=MOST_OF_INT8, **keys)
    assert 0 < int8.onnx.max_difference and int8.texts.error <= MOST_OF_INT8 and int8.onnx.size < report.onnx.size


@needs_runtime
@pytest.mark.slow
def test_a_cascades_first_pass_streams(export, tmp_path):
    model = make(tmp_path, "cascade", compute_features=KALDI)
    model.pass_name = "first"
    report = export(model, tmp_path / "first", **STREAMING)
    assert report.texts.equal == len(report.texts.wanted)


@needs_runtime
@pytest.mark.slow
@pytest.mark.parametrize("kind", GRAPHS)
def test_the_oldest_version(kind, exported, tmp_path):
    """SHERPA_OLDEST is a folder with sherpa-onnx 1.12.26; make slow sets it."""
    oldest = os.environ.get("SHERPA_OLDEST")
    if oldest is None:
        pytest.skip("sherpa-onnx 1.12.26 is missing; set SHERPA_OLDEST to a folder with it")
    wavs = {f"wav{i}": wav for i, wav in enumerate(synthetic(16000, (2.5, 0.9, 4.0)))}
    np.savez(tmp_path / "w.npz", rate=16000, feature_dim=80, count=3, **wavs)
    command = [sys.executable, "-P", sherpa_texts.__file__, str(exported(kind)[0]), str(tmp_path / "w.npz")]
    found = []
    for path in (oldest, ""):
        environment = {**os.environ, "PYTHONPATH": path}
        said = json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
        found.append([" ".join(text.split()) for text in said["alone"] + said["together"]])
        assert said["version"].startswith("1.12.26") == (path == oldest)
    assert found[0] == found[1] and all(found[0])
