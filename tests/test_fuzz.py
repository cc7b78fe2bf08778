"""Any input gives a right answer or one sentence with the problem, never a traceback of a library, and never a hang."""

import io
import json
import os
import resource
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load, save_file
from sentencepiece import SentencePieceTrainer
from tiny import make_model

from speechbrain_ext import cli
from speechbrain_ext.cli import stream, transcribe
from speechbrain_ext.dataio.audio import AudioError, load_audio, read_blocks
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference import transcribe as files_to_text
from speechbrain_ext.inference.streaming import StreamingRecognizer
from speechbrain_ext.registry import build_encoder
from speechbrain_ext.utils.errors import UserError

pytestmark = pytest.mark.timeout(60)  # a hang is a failure

COMMANDS = [["transcribe"], ["transcribe", "--streaming"], ["transcribe", "--output"], ["stream"]]
NOTICE = "speechbrain_ext: this model was trained in full context only"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    make_model(folder, 0)
    return folder / "model"


@pytest.fixture(scope="module")
def joint_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    make_model(folder, 1)
    return folder / "model"


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, "cpu")


@pytest.fixture
def call(capsys, model, monkeypatch, tmp_path):
    """Run a command on the model, and check this; returns exit status, standard output and the sentence."""
    for command in (transcribe, stream):
        monkeypatch.setattr(command, "load", lambda arguments: model)

    def run(command, *arguments, stdin=None):
        output = ["out"] if command[-1] == "--output" else []
        monkeypatch.chdir(tmp_path)
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(stdin))))
        try:
            status = cli.main([command[0], "--model", "model", *map(str, arguments), *command[1:], *output])
        except SystemExit as end:  # argparse
            status = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "Warning" not in err
        said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("speechbrain_ext: ")]
        said = [line for line in said if not line.startswith(NOTICE)]
        if status != 0:
            assert status in (1, 2) and (len(said) == 1 or "usage:" in err), err
            assert "usage:" in err or said[0].endswith("."), said
        if output and (tmp_path / "out").exists():  # existing files are complete
            names = sorted(path.name for path in (tmp_path / "out").iterdir())
            assert len(names) == (4 if status == 0 else 0) and not any(name.endswith(("partial", "tmp")) for name in names), names
        return status, out, said[0] if said else ""

    return run


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


# -------------------- audio that is transcribed


def tone(rate):
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)


ODD_AUDIO = {
    **{f"{n} samples": lambda path, n=n: soundfile.write(path, noise(n), 16000) for n in (1, 2, 3, 159, 160, 161, 399, 400, 800)},
    **{
        f"{rate} Hz": lambda path, rate=rate: soundfile.write(path, tone(rate), rate)
        for rate in (1000, 8000, 11127, 44100, 96000)
    },
    **{
        subtype: lambda path, subtype=subtype: soundfile.write(path, noise(8000), 16000, subtype, format="WAV")
        for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM")
    },
    **{form: lambda path, form=form: soundfile.write(path, noise(8000), 16000, format=form) for form in ("FLAC", "OGG", "MP3")},
    "stereo": lambda path: soundfile.write(path, noise(16000).reshape(-1, 2), 16000),
    "six channels": lambda path: soundfile.write(path, noise(48000).reshape(-1, 6), 16000),
    "silence": lambda path: soundfile.write(path, np.zeros(16000), 16000),
    "clipping": lambda path: soundfile.write(path, np.sign(noise(16000)), 16000),
    "denormal": lambda path: soundfile.write(path, noise(16000) * 1e-39, 16000, "FLOAT"),
    "not scaled": lambda path: soundfile.write(path, noise(16000) * 2.0**31, 16000, "FLOAT"),
    "long": lambda path: soundfile.write(path, noise(61 * 16000), 16000),
}


@pytest.mark.parametrize("name", ODD_AUDIO)
def test_odd_audio_is_read(name, call, model, tmp_path):
    path = tmp_path / "a.wav"
    ODD_AUDIO[name](path)
    wav = load_audio(path)
    assert torch.isfinite(wav).all()
    enc, _ = model.mods.encoder.encode(wav[None])
    assert torch.isfinite(enc).all()
    for command in COMMANDS:
        status, out, _ = call(command, path)
        assert status == 0
        if command == ["stream"]:
            rows = [line.split("\t") for line in out.splitlines()]
            assert all(0 <= float(start) <= float(end) <= len(wav) / 16000 + 0.08 for start, end, _ in rows)
        else:
            assert out.startswith(f"{path}\t") and out.count("\n") == out.count("\t") == 1
        if command == ["transcribe"] and name != "long":
            assert out == f"{path}\t{model.transcribe_batch(wav[None], torch.ones(1))[0][0]}\n"


def test_a_model_with_a_decoder_hears_a_few_samples(joint_folder):
    joint = load_model(joint_folder, "cpu")
    for samples in (1, 160, 400, 800):
        (text,), _ = joint.transcribe_batch(torch.from_numpy(noise(samples))[None], torch.ones(1))
        (segment,) = joint.transcribe_segments(torch.from_numpy(noise(samples))[None], torch.ones(1))
        assert text == ("" if segment is None else segment.text)


def test_long_silence_takes_little_memory_and_time(call, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(300 * 16000, np.int16), 16000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for command in COMMANDS[:2]:
        assert call(command, "a.wav")[0] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


# -------------------- audio that is refused


def with_sample(value, subtype="FLOAT", rate=16000):
    def write(path):
        wav = noise(rate).astype(np.float64)
        wav[100] = value
        soundfile.write(path, wav, rate, subtype)

    return write


def raw(data):
    return lambda path: path.write_bytes(data)


def loud_stereo(path):
    soundfile.write(path, np.full((16000, 2), 3e38, np.float32), 16000, "FLOAT")


REFUSED = {
    "no samples": (lambda path: soundfile.write(path, np.zeros(0), 16000), "is empty: it holds no samples"),
    "no bytes": (raw(b""), "is empty: it holds no samples"),
    "NaN": (with_sample(np.nan), "holds NaN or infinite samples; write it again"),
    "infinite": (with_sample(np.inf), "holds NaN or infinite samples"),
    "too large for float32": (with_sample(1e300, "DOUBLE"), "holds NaN or infinite samples"),
    "too large for a power spectrum": (with_sample(1e30), "samples as large as 1e+30, where full scale is 1"),
    "too large for a resampler": (with_sample(3e38, rate=8000), "samples as large as 3e+38"),
    "too large for a mean": (loud_stereo, "samples as large as 3e+38"),
    "1 Hz": (lambda path: soundfile.write(path, noise(1000), 1), "states 1 samples per second"),
    "2 GHz": (lambda path: soundfile.write(path, noise(1000), 2**31 - 1), "states 2147483647 samples per second"),
    "text": (raw(b"no audio\n" * 99), "is not audio that soundfile can read"),
    "folder": (lambda path: path.mkdir(), "is a folder, not an audio file"),
    "missing": (lambda path: None, "There is no audio file"),
    "loop of links": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "There is no audio file"),
    "pipe": (lambda path: os.mkfifo(path), "is a pipe or device"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a pipe or device"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_bad_audio_is_refused_in_one_sentence(name, command, call, tmp_path):
    path = tmp_path / "a.wav"
    write, message = REFUSED[name]
    write(path)
    status, out, sentence = call(command, path)
    assert (status, out) == (1, "") and message in sentence and str(path) in sentence
    with pytest.raises(AudioError, match="a.wav"):
        load_audio(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(call, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1000), 16000)
    (tmp_path / "a.wav").chmod(0)
    assert "Permission denied" in call(["transcribe"], tmp_path / "a.wav")[2]


def test_a_name_that_no_file_can_have():
    for name in ("a\0b.wav", "x" * 5000):
        with pytest.raises(AudioError, match="cannot be read"):
            load_audio(name)


@pytest.mark.parametrize(
    "subtype", ["PCM_16.wav", "DOUBLE.wav", "IMA_ADPCM.wav", "PCM_16.flac", "VORBIS.ogg", "MPEG_LAYER_III.mp3"]
)
def test_cut_and_flipped_files(subtype, call, tmp_path):
    generator = np.random.default_rng(len(subtype))
    path = tmp_path / subtype
    soundfile.write(path, noise(8000), 16000, path.stem)
    data = path.read_bytes()
    (tmp_path / "out").mkdir()
    for index in range(12):
        limit = len(data) if index % 2 else 100  # headers are short
        place, command = int(generator.integers(1, limit)), COMMANDS[index // 2 % 4]
        path.write_bytes(data[:place])
        status, out, _ = call(command, path)
        assert status == 1 and (out == "" or command == ["stream"]), place  # a stream prints the text up to the fault
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        status, out, _ = call(command, path)
        assert status == 0 or out == "" or command == ["stream"], place
        for file in (tmp_path / "out").iterdir():
            file.unlink()


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_random_bytes(suffix, call, tmp_path):
    generator = np.random.default_rng(0)
    magic = {"wav": b"RIFF\xff\xff\xff\x7fWAVE", "flac": b"fLaC", "ogg": b"OggS\0", "mp3": b"ID3\4"}[suffix]
    for index in range(8):
        (tmp_path / f"a.{suffix}").write_bytes(magic * (index % 2) + generator.bytes(int(generator.integers(1, 3000))))
        assert call(COMMANDS[index // 2], tmp_path / f"a.{suffix}")[:2] == (1, "")


def test_a_header_that_promises_terabytes(tmp_path):
    soundfile.write(tmp_path / "a.flac", noise(8000), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] |= 0x0F  # the highest of the 36 bits with the number of samples
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(AudioError, match="truncated or damaged"):
        load_audio(tmp_path / "a.flac")
    with pytest.raises(AudioError, match="truncated or damaged"):
        list(read_blocks(tmp_path / "a.flac"))


# -------------------- names


@pytest.mark.parametrize(
    "name", ["a b", "ü名", "new\nline", "ta\tb", "carriage\rreturn", "back\\slash", "-x", os.fsdecode(b"\xff")]
)
def test_a_line_stays_a_line_whatever_the_name(name, call, tmp_path):
    path = tmp_path / f"{name}.wav"
    soundfile.write(tmp_path / "a.wav", noise(5000), 16000)
    (tmp_path / "a.wav").rename(path)
    for command in COMMANDS[:3]:
        status, out, _ = call(command, path)
        (line,) = out.removesuffix("\n").split("\n")
        file, _ = line.split("\t")
        for escaped, character in (
            (r"\\", "\0"),
            (r"\n", "\n"),
            (r"\t", "\t"),
            (r"\r", "\r"),
            (r"\udcff", "\udcff"),
            ("\0", "\\"),
        ):
            file = file.replace(escaped, character)
        assert status == 0 and file == str(path)
    path.write_text("no audio")
    shutil.rmtree(tmp_path / "out")
    assert all(call(command, path)[0] == 1 for command in COMMANDS)


# -------------------- options


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--chunk-size", "0", "chunk size is 0"),
        ("--chunk-size", "-1", "chunk size is -1"),
        ("--chunk-size", "1000000", "chunk size is 1000000"),
        ("--chunk-size", str(10**20), "give at most 1500"),
        ("--chunk-size", "1.5", ""),
        ("--left-context", "-2", "left context is -2"),
        ("--endpoint", "nan", "endpoint is nan"),
        ("--endpoint", "inf", "endpoint is inf"),
        ("--endpoint", "0", "endpoint is 0"),
        ("--endpoint", "-1", "endpoint is -1"),
        ("--sample-rate", "0", "--sample-rate is 0"),
        ("--sample-rate", "1", "--sample-rate is 1;"),
        ("--sample-rate", str(10**9), "--sample-rate is 1000000000"),
        ("--sample-rate", str(10**20), "give a rate in Hz, 1000 to 768000"),
    ],
)
def test_impossible_settings_are_wrong_usage(option, value, message, call):
    status, out, sentence = call(["stream"], "-", option, value, stdin=bytes(3200))
    assert (status, out) == (2, "") and message in sentence


@pytest.mark.parametrize("option, value", [("--left-context", str(10**20)), ("--left-context", "0"), ("--endpoint", "1e300")])
def test_extreme_settings_work(option, value, call):
    assert call(["stream"], "-", option, value, stdin=bytes(32000))[0] == 0


def test_an_odd_chunk_is_refused_where_a_u_net_would_halve_it(call, folder, model, monkeypatch):
    halving = load_model(folder, "cpu")
    encoder = build_encoder("unet_conformer", d_model=16, nhead=2, num_layers=2, d_ffn=32).eval()
    halving.mods.encoder.transformer.encoder = encoder
    with pytest.raises(ValueError, match="chunk size is 7 frames, but this encoder needs a positive multiple of 2"):
        StreamingRecognizer(halving, 7)
    monkeypatch.setattr(stream, "load", lambda arguments: halving)
    assert call(["stream"], "-", "--chunk-size", "7", stdin=bytes(3200))[0] == 2
    assert call(["stream"], "-", "--chunk-size", "8", stdin=bytes(3200))[0] == 0


def test_a_model_that_cannot_stream_is_wrong_usage(call, folder, monkeypatch, tmp_path):
    other = load_model(folder, "cpu")
    other.mods.encoder.normalize.norm_type = "batch"
    for command in (transcribe, stream):
        monkeypatch.setattr(command, "load", lambda arguments: other)
    soundfile.write(tmp_path / "a.wav", noise(1000), 16000)
    for command in (["transcribe", "--streaming"], ["stream"]):
        assert "Normalisation by batch does not stream" in call(command, "a.wav")[2]


@pytest.mark.parametrize("rate", [1000, 7999, 16000, 44100, 768000])
@pytest.mark.parametrize("size", [2, 3, 801, 20001])
def test_raw_samples_of_any_rate_and_number(rate, size, call):
    data = np.random.default_rng(size).bytes(size)
    assert call(["stream"], "-", "--sample-rate", rate, stdin=data)[0] == 0


def test_standard_input_without_samples(call, monkeypatch):
    for data in (b"", b"x"):
        status, _, sentence = call(["stream"], "-", stdin=data)
        assert status == 1 and "Standard input holds no samples" in sentence
    monkeypatch.setattr(sys, "stdin", None)
    assert "Standard input is closed" in call(["stream"], "-")[2]


@pytest.mark.parametrize(
    "place, message",
    [("", "--output is empty"), ("a.wav", "File exists"), ("a.wav/x", "Not a directory"), ("/dev/null", "exists")],
)
def test_an_output_that_cannot_be_is_wrong_usage(place, message, call, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1000), 16000)
    status, out, sentence = call(["transcribe"], "a.wav", "--output", place)
    assert (status, out) == (2, "") and message in sentence and place in sentence


def test_an_output_folder_is_made_and_bad_files_leave_nothing_in_it(call, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(1000), 16000)
    (tmp_path / "b.wav").write_text("no audio")
    command = ["transcribe", "--model", "model", *(str(tmp_path / f"{name}.wav") for name in "abc")]
    assert cli.main([*command, "--output", str(tmp_path / "new/nested folder/ü")]) == 1
    assert sorted(path.name for path in (tmp_path / "new/nested folder/ü").iterdir()) == [
        ".a.jsonl.from",
        "a.jsonl",
        "a.srt",
        "a.vtt",
    ]


SEGMENT = '{"start": %s, "end": 1, "text": %s, "confidence": 1, "words": [{"text": "A", "start": 0, "end": %s, "confidence": 1}]}'


@pytest.mark.parametrize(
    "content",
    [
        *(b"rubbish\n", b"[]\n", b'{"a": 1}\n', b"\xff", b'{"start": 0, "end": 1}'),
        *((SEGMENT % values).encode() for values in (("NaN", '"A"', 1), ('"0"', '"A"', 1), (0, "null", 1), (0, '"A"', "null"))),
    ],
)
def test_damaged_results_are_not_taken_for_ours(content, call, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(8000), 16000)
    assert call(["transcribe", "--output"], "a.wav")[0] == 0
    final = tmp_path / "out" / "a.jsonl"
    first = final.read_bytes()
    final.write_bytes(first + content)
    status, out, sentence = call(["transcribe"], "a.wav", "--output", "out")
    line = len(first.splitlines()) + 1
    assert (status, out) == (2, "") and f"Line {line} of out/a.jsonl is not a segment; delete the file" in sentence
    assert final.read_bytes() == first + content
    final.rename(final.with_name("a.jsonl.partial"))
    assert call(["transcribe", "--output"], "a.wav")[0] == 0
    assert [json.loads(line) for line in final.read_bytes().splitlines()] == [json.loads(line) for line in first.splitlines()]


def test_a_full_disk_is_named(call, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "a.wav", noise(1000), 16000)
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        status = cli.main(["transcribe", "--model", "model", str(tmp_path / "a.wav")])
    assert status == 1 and "No space left on device" in capsys.readouterr().err


def test_a_bug_is_no_wrong_usage(call, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(1000), 16000)

    def bug(*arguments):
        raise ValueError("bug")

    monkeypatch.setattr(files_to_text._Run, "_segments", bug)
    with pytest.raises(ValueError, match="bug"):
        call(["transcribe"], "a.wav")
    monkeypatch.setattr(StreamingRecognizer, "accept", bug)
    for command in (["transcribe", "--streaming"], ["stream"]):
        with pytest.raises(ValueError, match="bug"):
            call(command, "a.wav")


# -------------------- the Python interface


@pytest.mark.parametrize(
    "wavs, lens, message",
    [
        (torch.zeros(0, 100), torch.zeros(0), r"shapes \(0, 100\)"),
        (torch.zeros(100), torch.ones(1), r"shapes \(100,\)"),
        (torch.zeros(1, 100, 2), torch.ones(1), r"give \(B, N\)"),
        (torch.zeros(2, 100), torch.ones(1), r"and \(1,\)"),
        (torch.zeros(1, 1000), torch.tensor([2.0]), r"lengths are \[2.0\]"),
        (torch.zeros(1, 1000), torch.tensor([-1.0]), r"lengths are \[-1.0\]"),
        (torch.zeros(1, 1000), torch.tensor([torch.nan]), r"lengths are \[nan\]"),
        (torch.full((1, 1000), torch.nan), torch.ones(1), "NaN or infinite samples"),
        (torch.full((1, 1000), 1e30), torch.ones(1), "as large as 1e"),
    ],
)
def test_bad_tensors_are_refused(wavs, lens, message, model):
    for method in (model.transcribe_batch, model.transcribe_segments, model.frames):
        with pytest.raises(ValueError, match=message):
            method(wavs, lens)


def test_alignment_refuses_what_it_cannot_align(model):
    wav = torch.from_numpy(noise(32000))
    for text in ("", " ", "\n"):
        assert model.align(wav, text) == ()
    for text, message in (("the CAT", "'the'"), ("☃", "☃"), ("CAT " * 200, "give a shorter text")):
        with pytest.raises(ValueError, match=message):
            model.align(wav, text)
    for samples, message in ((wav[None], "one channel"), (wav * torch.nan, "NaN"), (wav[:0], "need 4 frames")):
        with pytest.raises(ValueError, match=message):
            model.align(samples, "THE CAT")


@pytest.mark.parametrize(
    "keys", [{"longest": np.inf}, {"longest": np.nan}, {"start": -1}, {"start": np.nan}, {"chunk_size": 1.5}]
)
def test_impossible_settings_of_a_recognizer(keys, model):
    with pytest.raises(ValueError, match=f"is {next(iter(keys.values()))}"):
        StreamingRecognizer(model, **keys)


def test_a_stream_refuses_huge_samples_and_goes_on(model):
    recognizer, wav = StreamingRecognizer(model), torch.from_numpy(noise(16000))
    with pytest.raises(ValueError, match="as large as"):
        recognizer.accept(wav * 1e30)
    clean = StreamingRecognizer(model)
    assert recognizer.accept(wav) + recognizer.finish() == clean.accept(wav) + clean.finish()


def test_a_stream_warns_once_of_samples_that_were_not_scaled(model, caplog):
    recognizer, wav = StreamingRecognizer(model), torch.from_numpy(noise(16000))
    for piece in (wav, wav * 32768, wav * 32768):
        recognizer.accept(piece)
    assert caplog.text.count("as large as") == 1 and "give integers as int16 or int32" in caplog.text


# -------------------- models


FILES = ["asr.safetensors", "tokenizer.ckpt", "hyperparams.yaml", "config.json"]


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def refusal(folder):
    """The message of loading: one line that names the model."""
    with pytest.raises((FileNotFoundError, ValueError, RuntimeError)) as caught:
        load_model(folder, "cpu")
    message = str(caught.value)
    assert isinstance(caught.value, (FileNotFoundError, UserError)) and "\n" not in message
    assert str(folder) in message and message.endswith("."), message
    return message


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_model_that_are_missing_or_damaged(name, copy):
    path, generator = copy / name, np.random.default_rng(0)
    data = path.read_bytes()
    path.unlink()
    assert name in refusal(copy)
    path.mkdir()
    assert name in refusal(copy)
    path.rmdir()
    for content in (
        b"",
        generator.bytes(len(data)),
        b"\0" * len(data),
        *(data[: generator.integers(len(data))] for _ in range(4)),
    ):
        path.write_bytes(content)
        assert name in refusal(copy)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_in_files_of_a_model(name, copy):
    path, generator = copy / name, np.random.default_rng(1)
    data = path.read_bytes()
    for index in range(12):
        flipped = bytearray(data)
        flipped[generator.integers(len(data) if index % 2 else min(len(data), 100))] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        try:
            load_model(copy, "cpu")
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            assert str(copy) in str(error)


@pytest.mark.parametrize("interface", [None, 1, [], {}, ["EncoderASR"], "Tacotron2", "EncoderDecoderASR"])
def test_an_interface_of_other_models(interface, copy):
    (copy / "config.json").write_text(json.dumps({"speechbrain_interface": interface, "format_version": 1}))
    assert "SpeechBrain's" in refusal(copy) or "has no decoder, which EncoderDecoderASR needs" in refusal(copy)
    (copy / "config.json").write_text(json.dumps(interface))
    assert "SpeechBrain's None" in refusal(copy)


def test_a_model_with_a_decoder_under_the_other_interface(joint_folder, tmp_path):
    copy = shutil.copytree(joint_folder, tmp_path / "copy")
    (copy / "config.json").write_text('{"speechbrain_interface": "EncoderASR", "format_version": 1}')
    assert "has no decoding_function, which EncoderASR needs" in refusal(copy)


def test_what_is_no_model_folder(tmp_path):
    (tmp_path / "file").touch()
    for name in (tmp_path / "file", tmp_path / "gone", tmp_path / "file" / "x"):
        assert "There is no model folder" in refusal(name)
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        load_model("")


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", "", "cpu:x"])
def test_a_device_that_is_not_there(device, folder):
    with pytest.raises(ValueError, match=f"The device {device} cannot be used here"):
        load_model(folder, device)


def test_the_tokenizer_of_another_model(copy):
    content, sentences = io.BytesIO(), ["THE QUICK BROWN FOX JUMPS", "OVER A LAZY DOG AND A CAT"] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=content, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    (copy / "tokenizer.ckpt").write_bytes(content.getvalue())
    assert "tokens, but the model has 2" in refusal(copy)


def test_the_weights_of_another_model(copy):
    path = copy / "asr.safetensors"
    state = load(path.read_bytes())
    first = next(iter(state))
    cases = {
        f'Missing key(s) in state_dict: "{first}"': {name: value for name, value in state.items() if name != first},
        "Missing key(s) in state_dict: ": {},
        'Unexpected key(s) in state_dict: "x"': {**state, "x": torch.ones(1)},
        "Missing key(s)": {f"x.{name}": value for name, value in state.items()},
        "size mismatch for subsampling.stages.0.0.weight": {
            name: torch.ones(3) if value.dim() else value for name, value in state.items()
        },
        "gives NaN": {name: value * torch.nan if value.is_floating_point() else value for name, value in state.items()},
    }
    for message, weights in cases.items():
        save_file(weights, path)
        assert message in refusal(copy)


@pytest.mark.parametrize(
    "change, message",
    [(lambda mean: mean[:5], "statistics of 5 features"), (lambda mean: mean * torch.nan, "gives NaN"), (None, "Missing key")],
)
def test_the_statistics_of_another_model(change, message, copy):
    path = copy / "asr.safetensors"
    state = load(path.read_bytes())
    for name in ("normalize.glob_mean", "normalize.glob_std"):
        value = state.pop(name)
        if change is not None:
            state[name] = change(value).clone()
    save_file(state, path)
    assert message in refusal(copy)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("encoder_module: hyperconformer", "encoder_module: nothing", "nothing"),
        ("  d_model: ", "  d_modell: ", "unexpected keyword argument 'd_modell'"),
        ("d_ffn: 32", "d_ffn: 64", "size mismatch for"),
        ("nhead: 2", "nhead: 3", "3"),
        ("\nsample_rate: 16000", "\nsample_rate: 8000", "sample_rate of 8000, but its features have 16000"),
        ("blank_index: 0", "blank_index: 500", "blank_index of"),
        ("\nmodules:", "\nothers:", "has no modules, which EncoderASR needs"),
        ("\ntokenizer: !new", "\nothers: !new", "refers to <tokenizer>"),
        ("speech_encoder: ", "others: ", "refers to <speech_encoder>"),
        ("SpeechEncoder", "Nothing", "has !new:speechbrain_ext.speech_encoder.Nothing, which no shipped recipe writes"),
        ("    ctc_lin: !ref <ctc_lin>\n", "", "Unexpected key(s)"),
        ("\nctc_lin: !new", "\nothers: !new", "refers to <ctc_lin>"),
        ("encoder_kwargs: {}", "encoder_kwargs: {", "line "),
        ("sample_rate", "\tsample_rate", "is not valid YAML"),
        ("  n_mels: 80", "  n_mels: 80\n  n_mels: 80", "duplicate key"),
    ],
)
def test_hparams_of_another_model(old, new, message, copy):
    path = copy / "hyperparams.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert message in refusal(copy)


def test_a_model_without_a_ctc_head(copy):
    path = copy / "hyperparams.yaml"
    path.write_text(path.read_text().replace("    ctc_lin: !ref <ctc_lin>\n", ""))
    state = load((copy / "asr.safetensors").read_bytes())
    save_file({name: value for name, value in state.items() if not name.startswith("ctc_lin.")}, copy / "asr.safetensors")
    assert "has no CTC head" in refusal(copy)
