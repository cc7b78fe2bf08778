"""Model folders: SpeechBrain's classes and ours load them, with the same transcripts; untrusted folders are checked."""

import copy
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from safetensors.torch import load, load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
from tiny import ARCHITECTURES, make_model, make_row

from speechbrain_ext import cli, registry
from speechbrain_ext.hparams import load_hparams, merge_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling
from speechbrain_ext.model_folder import FORMAT_VERSION, WEIGHTS
from speechbrain_ext.model_folder.build import build, parse
from speechbrain_ext.model_folder.card import model_card
from speechbrain_ext.model_folder.tokenizer_file import check_tokenizer
from speechbrain_ext.model_folder.weights import SafetensorsPretrainer, load_tokenizer, load_weights, save_weights
from speechbrain_ext.model_folder.write import inference_hparams
from speechbrain_ext.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("ctc", "joint", "cascade", "fused", "transducer")


@pytest.fixture(scope="module", params=[1, 0], ids=["joint", "ctc"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, make_model(folder, request.param), request.param


def test_speechbrain_and_our_loader_agree(trained):
    folder, _, decoder_layers = trained
    theirs = (EncoderDecoderASR if decoder_layers else EncoderASR).from_hparams(
        source=str(folder / "model"), run_opts={"device": "cpu"}
    )
    ours = load_model(folder / "model", "cpu")
    assert isinstance(ours, type(theirs))
    for name in ("short", "middle", "long"):
        text = ours.transcribe_file(str(folder / f"{name}.flac"))
        assert text and text.split() == theirs.transcribe_file(str(folder / f"{name}.flac")).split()


def test_weights_and_statistics_are_those_of_training(trained):
    folder, hparams, _ = trained
    encoder = load_model(folder / "model", "cpu").mods.encoder
    for name, value in hparams["Transformer"].state_dict().items():
        assert torch.equal(value, encoder.transformer.state_dict()[name])
    assert torch.equal(encoder.normalize.glob_mean, hparams["normalize"].glob_mean)
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_batch_gives_the_same_as_each_file_alone(trained):
    folder, *_ = trained
    model = load_model(folder / "model", "cpu")
    wavs = [model.load_audio(folder / f"{name}.flac") for name in ("short", "long", "middle")]
    alone = [model.transcribe_batch(wav.unsqueeze(0), torch.ones(1)) for wav in wavs]
    lengths = torch.tensor([len(wav) for wav in wavs]) / 25037
    texts, tokens = model.transcribe_batch(torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True), lengths)
    assert texts == [text[0] for text, _ in alone]
    assert [list(map(int, ids)) for ids in tokens] == [list(map(int, ids[0])) for _, ids in alone]


def test_the_folder_holds_inference_only(trained):
    folder, _, decoder_layers = trained
    text = (folder / "model" / "hyperparams.yaml").read_text()
    for key in ("data_folder", "opt_class", "checkpointer", "augment", "brain", "epoch"):
        assert f"\n{key}" not in text
    assert ("seq_lin" in text) == bool(decoder_layers)
    files = {path.name for path in (folder / "model").iterdir()}
    assert files == {"README.md", "asr.safetensors", "config.json", "hyperparams.yaml", "tokenizer.ckpt"}
    assert len({path.stat().st_mode for path in (folder / "model").iterdir()}) == 1  # all files have the same permissions
    assert "| test-tiny | ctc_greedy | 12.3 | 1 | 2 | 3 | 49 |" in (folder / "model" / "README.md").read_text()


def test_a_second_writing_replaces_the_first_and_leaves_nothing_beside_it(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "x")
    before = sorted(path.name for path in (tmp_path / "x").iterdir())
    (tmp_path / "x" / "model" / "stale").touch()
    make_model(tmp_path / "x", trained[2])
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == before
    assert not (tmp_path / "x" / "model" / "stale").exists()


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    save_file({"0.nothing": torch.ones(1)}, folder / "asr.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("name", ["asr.safetensors", "tokenizer.ckpt", "hyperparams.yaml", "config.json"])
@pytest.mark.parametrize("content", ["", "no such thing", "d_model: [16"])
def test_a_damaged_folder_is_named(name, content, trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises((RuntimeError, ValueError, FileNotFoundError), match=str(folder)):
        load_model(folder, "cpu")


def test_what_is_no_model_is_refused_in_one_sentence(trained, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no model folder .*gone"):
        load_model(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="has no hyperparams.yaml"):
        load_model(tmp_path)
    monkeypatch.setattr("speechbrain_ext.inference.load.download", lambda *_: tmp_path)  # a part of a model in the cache
    with pytest.raises(
        FileNotFoundError, match="ann/speech .* has no hyperparams.yaml; if its download was interrupted, load it"
    ):
        load_model("ann/speech")
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"speechbrain_interface": "Tacotron2"}))
    with pytest.raises(ValueError, match="Tacotron2"):
        load_model(folder)
    (folder / "config.json").write_text("")
    with pytest.raises(UserError, match=r"is not JSON \(.*\); copy the model again"):
        load_model(folder)
    folder.rename(tmp_path / "pretrained")
    with pytest.raises(FileNotFoundError, match=f"has no hyperparams.yaml; give {tmp_path}/pretrained"):
        load_model(tmp_path)


def test_shared_and_strided_weights_are_kept_by_every_name(tmp_path):
    def build():
        model = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)])
        model[1].weight = model[0].weight
        return model

    first, second = build(), build()
    first[0].bias = torch.nn.Parameter(torch.arange(6.0)[::2])
    first[1].bias = torch.nn.Parameter(first[1].bias.expand(3))
    save_weights(first, tmp_path / "w")
    assert load_file(tmp_path / "w").keys() == first.state_dict().keys()
    load_weights(second, tmp_path / "w")
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert second[1].weight is second[0].weight
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_weights(torch.nn.ModuleList([torch.nn.Linear(3, 3)]), tmp_path / "w")


def test_weights_in_half_precision_take_half_the_space(trained, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(1, 1)).eval()
    with torch.no_grad():
        model[1].running_mean.fill_(1e5)
        model[2].weight.fill_(1e5)  # more than float16 holds
    save_weights(model, tmp_path / "whole.safetensors")
    save_weights(model, tmp_path / "half.safetensors", "fp16")
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "whole.safetensors").stat().st_size
    other = copy.deepcopy(model)
    load_weights(other, tmp_path / "half.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    make_model(tmp_path, decoder_layers=0, weights_precision="fp16")
    dtypes = {value.dtype for value in load_file(tmp_path / "model" / WEIGHTS).values()}
    assert torch.float16 in dtypes
    assert isinstance(load_model(tmp_path / "model", "cpu").transcribe_file(tmp_path / "short.flac"), str)


def test_a_folder_that_names_speechbrains_searcher_loads(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    text = (folder / "hyperparams.yaml").read_text()
    assert ("decoders.searchers" in text) == ("decoders.ctc_prefix" in text) == bool(trained[2])
    text = re.sub(r"\n  excluded:(\n  - .*)+", "", text)  # SpeechBrain's searcher lacks this argument
    (folder / "hyperparams.yaml").write_text(text)
    file = str(trained[0] / "middle.flac")
    ours = load_model(folder, "cpu").transcribe_file(file)
    text = text.replace("speechbrain_ext.decoders.searchers", "speechbrain.decoders")
    text = text.replace("speechbrain_ext.decoders.ctc_prefix", "speechbrain.decoders.scorer")
    (folder / "hyperparams.yaml").write_text(text)
    parse(text)
    assert load_model(folder, "cpu").transcribe_file(file) == ours


class Trap:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("name", ["asr.safetensors", "tokenizer.ckpt"])
def test_a_pickle_with_code_is_not_executed(name, trained, tmp_path, capfd):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    torch.save(Trap(), folder / name)
    with pytest.raises(RuntimeError, match=str(folder)):
        load_model(folder, "cpu")
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_what_training_writes_may_come_from_anybody(path, layers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the checkpointer creates a folder here
    keys = {"num_decoder_layers": layers, "output_folder": "x"}
    keys |= {} if "size" in YAML().load(merge_hparams(path)) else {"d_model": 16, "nhead": 2, "d_ffn": 16}
    tree, hparams = YAML().load(merge_hparams(path, keys)), load_hparams(path, keys)
    text = inference_hparams(tree, hparams)
    ours, theirs = build(text), load_hyperpyyaml(text)
    states = [values["asr_model"].state_dict() for values in (ours, theirs)]
    assert {name: value.shape for name, value in states[0].items()} == {name: value.shape for name, value in states[1].items()}
    assert set(ours) == set(theirs) and ours["modules"].keys() == theirs["modules"].keys()
    sizes = [value.nbytes for value in states[0].values()]
    assert build(text, (sum(sizes), len(sizes))).keys() == ours.keys()  # not too large for its weights
    card = model_card(tree, "EncoderASR", [])
    assert YAML(typ="safe").load(card.split("---\n")[1])["pipeline_tag"] == "automatic-speech-recognition"
    assert ("--pass first" in card) == (tree["encoder"] == "cascade")


@pytest.mark.parametrize("name", KINDS)
def test_loading_does_not_import_pytorchs_compiler(name):
    """The import takes a second, and loading does not need it."""
    folder = ROOT / "tests" / "data" / "model_folders" / f"{name}-v1"
    code = (
        f"import sys; from speechbrain_ext.inference import load_model; load_model({str(folder)!r}, 'cpu'); "
        "print(sorted({'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


# -------------------- an untrusted folder runs no code

TRACE = "os.mkdir"  # its argument is a folder that must not be created
TAGS = [
    *(f"!{kind}:{TRACE}" for kind in ("new", "name", "module", "apply", "applyref")),
    *(
        "!module:os",
        "!include:PATH.yaml",
        "!ref",
        "!copy",
        "!tuple",
        "!PLACEHOLDER",
        "!other",
        "!apply%3Aos.mkdir",
        "!x!mkdir",
    ),
    *("!new:subprocess.Popen", "!name:subprocess.Popen", "!new:sentencepiece.SentencePieceProcessor"),
    *("!new:speechbrain.utils.parameter_transfer.Pretrainer", "!new:speechbrain_ext.cli.os.mkdir"),
    *("!name:torch.load", "!apply:torch.hub.load", "!new:functools.partial", "!apply:getattr", "!name:builtins.eval"),
    *(f"!!python/{kind}" for kind in ("none", "tuple", "dict", "bytes", "object:os.mkdir", "object/new:os.mkdir")),
    *(f"!!python/{kind}:{TRACE}" for kind in ("object/apply", "name", "module")),
    *("!!python/module:os", "!<tag:yaml.org,2002:python/object/apply:os.mkdir>", "!!binary", "!!set", "!!omap", "!!timestamp"),
]
NODES = {
    "nothing": "{tag}",
    "text": "{tag} PATH",
    "tuple-like": "{tag} (PATH)",
    "quoted tuple-like": "{tag} '(PATH)'",
    "tagged tuple-like": "{tag} (!!python/object/apply:os.mkdir [PATH])",
    "quoted": '{tag} "PATH"',
    "reference": "{tag} <other>",
    "attribute": "{tag} <other.__class__>",
    "sum": "{tag} <other> + (PATH)",
    "list": "{tag} [PATH]",
    "mapping": "{tag} {{path: PATH}}",
    "nested in a list": "[{tag} [PATH]]",
    "nested in a mapping": "{{a: {{b: {tag} [PATH]}}}}",
    "inside of arguments": "!new:torch.nn.ModuleList [{tag} [PATH]]",
    "inside of a name": "!name:torch.nn.GELU {{approximate: {tag} [PATH]}}",
    "key": "{{? {tag} [PATH] : 1}}",
    "text as key": "{{? {tag} PATH : 1}}",
    "anchor": "&anchor {tag} [PATH]",
    "alias": "[&anchor [{tag} [PATH]], *anchor]",
    "merge": "{{<<: {{a: {tag} [PATH]}}}}",
    "merged list": "{{<<: [{{a: {tag} [PATH]}}]}}",
}
# A short file with all kinds of content that our files have
FILE = """
head: !new:speechbrain.nnet.linear.Linear
  input_size: 16
  n_neurons: 26
  bias: true
tokenizer: !new:sentencepiece.SentencePieceProcessor
model: !new:torch.nn.ModuleList
- - !ref <head>
modules:
  encoder: !ref <head>
  kwargs:
    activation: !name:torch.nn.GELU
blank_index: 0
"""
PLACES = [": 16\n", ": true\n", ": !new:sentencepiece.SentencePieceProcessor\n", "- !ref <head>\n", ": !ref <head>\n"]
PLACES += [": !name:torch.nn.GELU\n", ": 0\n"]
# Our files also hold this tag without content
HARMLESS = {("!new:sentencepiece.SentencePieceProcessor", "nothing")}


@pytest.mark.parametrize("tag", TAGS)
def test_a_stranger_s_file_runs_nothing(tag, tmp_path, monkeypatch):
    """Every tag is refused on every kind of node at every place, and leaves no trace."""
    (tmp_path / "trace.yaml").write_text(f"a: !apply:{TRACE} [{tmp_path / 'trace'}]")
    monkeypatch.setattr("os.mkdir", lambda *_: pytest.fail("something was run"))
    assert len(build(FILE)) == 5
    broken = 0
    for (kind, node), place in itertools.product(NODES.items(), PLACES):
        text = node.format(tag=tag).replace("PATH", str(tmp_path / "trace")).replace("<other", "<head")
        assert place in FILE
        text = FILE.replace(place, f"{place[0]} {text}\n", 1)
        if tag == "!x!mkdir":
            text = f"%TAG !x! !apply:os.\n---\n{text}"
        if (tag, kind) in HARMLESS or (tag, kind) == ("!ref", "reference"):
            continue
        with pytest.raises(UserError) as refused:
            build(text)
        broken += "is not valid YAML" in str(refused.value)
    assert broken < 40  # of 147: most are valid YAML, and refused for their content
    assert [path.name for path in tmp_path.iterdir()] == ["trace.yaml"]


def test_the_traps_above_do_snap(tmp_path):
    """Without the check, the same texts leave a trace."""
    for number, text in enumerate(("a: !apply:os.mkdir [PATH]", "a: !tuple (!!python/object/apply:os.mkdir [PATH])")):
        load_hyperpyyaml(text.replace("PATH", str(tmp_path / str(number))))
        assert (tmp_path / str(number)).is_dir()


# Two keys per row, and each refers to both keys of the previous row: 2 ** 40 paths in all
DOUBLING = "".join(
    f"{key}{i}: {{kind}}[[!ref <a{i - 1}>, !ref <b{i - 1}>]]\n" if i else f"{key}0: {{empty}}\n"
    for i in range(40)
    for key in "ab"
)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: 10000000\nb: !ref <a> * 10000000",
        "a: x\nb: !ref <a><a><a>",
        "a: [" * 5000,
        "a: [" + "1, " * 10_000 + "]",
        "a: " + "x" * 200_000,
        "a: !ref <b>\nb: !ref <a>",
        "a: !ref <nothing>",
        DOUBLING.format(kind="", empty="x"),
        DOUBLING.format(kind="!new:torch.nn.ModuleList ", empty="!new:torch.nn.ModuleList []"),
        "".join(f"a{i}: !ref <a{i + 1}>\n" for i in range(1000)) + "a1000: 1",
        "".join(f"a{i}: [!ref <a{i - 1}>]\n" if i else "a0: 1\n" for i in range(1000)),
        "%YAML 1.2\n---\na: 1",
        "%YAML 9.9\n---\na: 1",
        "a: !<!new:speechbrain_ext" + ".a" * 30_000 + "> 1",
        "- a",
        "",
        "a: \0",
        "a: [1",
    ],
    ids=lambda text: text[:20],
)
def test_a_file_that_keeps_busy_is_refused_at_once(text):
    began = time.perf_counter()
    with pytest.raises(UserError):
        build(text)
    assert time.perf_counter() - began < 5


def test_a_folder_is_refused_in_one_sentence_that_says_what_to_do(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    with open(folder / "hyperparams.yaml", "a") as file:
        file.write(f"trap: !apply:os.mkdir [{tmp_path / 'executed'}]\n")
    with pytest.raises(UserError, match="has !apply:os.mkdir, which no shipped recipe writes.*loadable.*trust=True"):
        load_model(folder, "cpu")
    assert not (tmp_path / "executed").exists()
    load_model(folder, "cpu", trust=True)
    assert (tmp_path / "executed").is_dir()


def test_the_pretrainer_takes_known_types_only():
    import os

    for asr, tokenizer in ((torch.nn.Linear(1, 1), os), (os, SentencePieceProcessor())):
        with pytest.raises(TypeError, match="but this is a module"):
            SafetensorsPretrainer(asr, tokenizer)


class FrontEnd(ConvolutionSubsampling):
    """A front end of a user."""


def test_a_front_end_of_one_s_own_loads_where_it_is_marked(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    text, path = (folder / "hyperparams.yaml").read_text(), f"{__name__}.FrontEnd"
    (folder / "hyperparams.yaml").write_text(text.replace("speechbrain_ext.lobes.subsampling.ConvolutionSubsampling", path))
    with pytest.raises(UserError, match=rf"has !new:{path}, .*loadable and import its module"):
        load_model(folder, "cpu")
    monkeypatch.setitem(registry._LOADABLE, path, FrontEnd)  # as the decorator does, but undone after the test
    assert isinstance(load_model(folder, "cpu").mods.encoder.subsampling, FrontEnd)
    monkeypatch.delitem(registry._LOADABLE, path)
    points = [EntryPoint(path, f"{__name__}:FrontEnd", registry.LOADABLE_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.LOADABLE_GROUP else [])
    assert isinstance(load_model(folder, "cpu").mods.encoder.subsampling, FrontEnd)


def test_the_card_of_a_librispeech_model():
    row = {"hparams": "x.yaml", "train_set": "train-clean-100 train-other-500", "search": "ctc_greedy", "WER": 5.25}
    rows = [make_row(**row, test_set="test-clean"), make_row(**{**row, "search": "ctc_beam", "WER": 5.0}, test_set="test-clean")]
    rows.append(make_row(**row, test_set="my-test"))
    tree = YAML().load(merge_hparams(ROOT / "hparams" / "squeezeformer.yaml"))
    card = model_card(tree, "EncoderASR", rows)
    data = YAML(typ="safe").load(card.split("---\n")[1])
    assert data["language"] == "en" and data["datasets"] == ["openslr/librispeech_asr"] and "license" not in data
    clean, own = data["model-index"][0]["results"]
    assert clean["dataset"] == {
        "name": "LibriSpeech test-clean",
        "type": "openslr/librispeech_asr",
        "config": "clean",
        "split": "test",
    }
    assert [metric["value"] for metric in clean["metrics"]] == [5.25, 5.0]
    assert own["dataset"] == {"name": "my-test", "type": "my-test"}
    assert "| d_model | 144 |" in card and "read aloud" in card
    unknown = model_card(tree, "EncoderASR", [make_row(**{**row, "train_set": "train-clean-100 mine"}, test_set="test-clean")])
    assert "datasets:" not in unknown and "language:" not in unknown and "LibriSpeech" not in unknown


FIXTURES = sorted((ROOT / "tests" / "data" / "model_folders").iterdir())


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda path: path.name)
def test_a_folder_of_every_kind_and_version_loads_for_ever(folder):
    """Made by tests/data/make_model_folders.py; these files never change."""
    expected = json.loads((folder / "expected.json").read_text())
    model = load_model(folder, "cpu")
    wav = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    answer = model.frames(wav, torch.ones(1))[0][0]
    assert answer.argmax(-1).tolist() == expected["tokens"]
    torch.testing.assert_close(answer[0], torch.tensor(expected["first"]), atol=1e-4, rtol=0)
    if "said" in expected:
        assert model.transcribe_batch(wav, torch.ones(1))[1][0] == expected["said"]
    interface = EncoderDecoderASR if folder.name.startswith(("joint", "transducer")) else EncoderASR
    theirs = interface.from_hparams(source=str(folder), run_opts={"device": "cpu"})  # SpeechBrain's loader
    texts = theirs.transcribe_batch(wav, torch.ones(1))[0]
    assert texts[0].split() == model.transcribe_batch(wav, torch.ones(1))[0][0].split()


def test_there_is_a_folder_of_every_kind():
    assert {folder.name for folder in FIXTURES} >= {f"{kind}-v{FORMAT_VERSION}" for kind in KINDS}


def test_a_folder_of_a_later_format_is_refused(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for version in (FORMAT_VERSION + 1, 0, None, "1"):
        remedy = "update the package" if version == FORMAT_VERSION + 1 else "copy the model again"
        (folder / "config.json").write_text(json.dumps({**config, "format_version": version}))
        with pytest.raises(UserError, match=f"format version {version!r}, but this speechbrain_ext reads 1 to .*; {remedy}"):
            load_model(folder, "cpu")


# -------------------- an untrusted folder with impossible values


def edited(tmp_path, kind, old, new):
    """A folder of tests/data with one change of its hyperparams.yaml."""
    folder = shutil.copytree(ROOT / "tests" / "data" / "model_folders" / f"{kind}-v1", tmp_path / "edited")
    text = (folder / "hyperparams.yaml").read_text()
    assert old in text
    (folder / "hyperparams.yaml").write_text(text.replace(old, new, 1))
    return folder


def refused(folder):
    """The message of loading a folder that is refused quickly."""
    began = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_model(folder, "cpu")
    message = str(caught.value)
    assert time.perf_counter() - began < 20
    assert str(folder) in message and "\n" not in message and message.endswith("."), message
    return message


@pytest.mark.parametrize(
    "old, new",
    [
        *(("num_encoder_layers: 3", f"num_encoder_layers: {number}") for number in (10**9, 10**6, -(10**12))),
        *(("num_decoder_layers: 1", f"num_decoder_layers: {number}") for number in (10**9, 10**6)),
        *(("n_mels: 80", f"n_mels: {number}") for number in (10**9, 10**6)),
        *(("d_model: 8", f"d_model: {number}") for number in (10**9, 10**6)),
        *(("  - 4\n", f"  - {number}\n") for number in (10**9, 10**6)),
        *(("kernel_size: 3", f"kernel_size: {number}") for number in (10**9 + 1, 10**6 - 1)),
        *(("kernel_size: 3", f"kernel_size: 3\n  max_length: {number}") for number in (10**9, 10**6)),
        ("n_neurons: 25", "n_neurons: 1000000"),
        ("sample_rate: 16000", "sample_rate: 1000000000"),
    ],
)
def test_a_model_larger_than_its_weights_is_refused_at_once(old, new, tmp_path):
    message = refused(edited(tmp_path, "joint", old, new))
    # A model that is only a little too large is built, but does not fit the weights
    assert any(flaw in message for flaw in ("larger than 1000000", "far larger than its weights", "size mismatch"))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("predictor: stateless", "predictor: gru", "Unknown predictor 'gru'"),
        ("predictor_size: 8", "predictor_size: 1000000", "far larger than its weights"),
        ("predictor_size: 8", "predictor_size: x", "predictor_size is 'x'"),
        ("  predictor_context: 2", "  predictor_context: 3", "size mismatch"),
        ("  vocab_size: 25", "  vocab_size: 24", "size mismatch"),
        ("  blank_index: 0", "  blank_index: 1", "its blank_index is 0, but that of its transducer is 1"),
        ("  beam_size: 4", "  beam_size: 100000", "beam_size is 100000"),
        ("  beam_size: 4", "  beam_size: 0", "beam_size is 0"),
        ("  beam_size: 4", "  max_symbols: 1000", "its max_symbols is 1000"),
        ("    transducer: !ref <transducer>\n", "", "Unexpected key"),
    ],
)
def test_a_transducer_that_does_not_fit_is_refused(old, new, message, tmp_path):
    assert message in refused(edited(tmp_path, "transducer", old, new))


def test_a_transducer_of_no_numbers_is_refused(tmp_path):
    folder = edited(tmp_path, "transducer", "beam_size: 4", "beam_size: 4")
    weights = load((folder / "asr.safetensors").read_bytes())  # the file is written over
    weights["transducer.out.weight"][3] = torch.nan
    save_file(weights, folder / "asr.safetensors")
    assert "gives NaN" in refused(folder)


VALUES = ["x", "[8]", "{a: 1}", "1.5", "-1", "!name:torch.nn.ReLU", "!!int abc", "!!float x", "!!bool x", "9" * 5000]


@pytest.mark.parametrize("value", [*VALUES, ".nan"], ids=lambda value: value[:20])
@pytest.mark.parametrize(
    "old", ["d_model: 8", "num_encoder_layers: 3", "kernel_size: 3", "n_mels: 80", "tgt_vocab: 25", "nhead: 2", "  - 4"]
)
def test_a_size_that_is_none_is_refused_in_one_sentence(old, value, tmp_path):
    assert "is damaged: hyperparams.yaml: " in refused(edited(tmp_path, "joint", old, f"{old[: old.rindex(' ')]} {value}"))


@pytest.mark.parametrize("value", VALUES[-4:], ids=lambda value: value[:20])
def test_a_value_that_its_tag_does_not_fit_is_refused(value, tmp_path):
    assert "is not a " in refused(edited(tmp_path, "ctc", "blank_index: 0", f"blank_index: {value}"))


@pytest.mark.parametrize(
    "old, new",
    [
        ("encoder_kwargs: {}", "encoder_kwargs: [1]"),
        ("!name:torch.nn.GELU", "!name:speechbrain.decoders.ctc.ctc_greedy_decode"),
        ("!name:torch.nn.GELU", "gelu"),
    ],
)
def test_arguments_of_another_kind_are_refused(old, new, tmp_path):
    assert "refuses its arguments" in refused(edited(tmp_path, "ctc", old, new))


class Faulty(ConvolutionSubsampling):
    """A user's front end with a bug."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.width = None + 1


class FaultyForward(ConvolutionSubsampling):
    """A user's front end with a bug that shows when it is used."""

    def forward(self, *args):
        return super().forward(*args)[0]  # no lengths


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "faulty, error, message", [(Faulty, TypeError, "unsupported operand"), (FaultyForward, Exception, "unpack")]
)
def test_a_bug_of_a_front_end_of_one_s_own_keeps_its_traceback(faulty, error, message, trust, tmp_path, monkeypatch):
    path = f"{__name__}.{faulty.__name__}"
    monkeypatch.setitem(registry._LOADABLE, path, faulty)
    folder = edited(tmp_path, "ctc", "speechbrain_ext.lobes.subsampling.ConvolutionSubsampling", path)
    with pytest.raises(error, match=message) as caught:
        load_model(folder, "cpu", trust=trust)
    assert not isinstance(caught.value, UserError)


# -------------------- an untrusted folder that sets options of the run, or harms its reader


@pytest.mark.parametrize("line", ["compile: true", "device: cuda:7", "precision: fp16", "jit: true", "distributed_launch: true"])
def test_how_a_model_is_run_is_no_choice_of_its_folder(line, tmp_path):
    key = line.partition(":")[0]
    message = refused(edited(tmp_path, "ctc", "\nblank_index: 0", f"\n{line}\nblank_index: 0"))
    assert f"has the key {key}, which a model folder may not set" in message


@pytest.mark.parametrize("value", ["!new:torch.nn.ModuleDict {modules: {load: !ref <ctc_lin>}}", "text", "3"])
def test_nothing_but_a_tokenizer_is_told_to_load_a_file(value, tmp_path):
    folder = edited(tmp_path, "ctc", "tokenizer: !new:sentencepiece.SentencePieceProcessor", f"tokenizer: {value}")
    text = (folder / "hyperparams.yaml").read_text()
    own = "  tokenizer: !new:sentencepiece.SentencePieceProcessor"  # for the pretrainer, which checks it
    (folder / "hyperparams.yaml").write_text(text.replace("  tokenizer: !ref <tokenizer>", own))
    assert "has no tokenizer" in refused(folder)


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(ROOT / "tests" / "data" / "model_folders" / "ctc-v1", tmp_path / "model")


@pytest.mark.parametrize("name", ["hyperparams.yaml", "config.json", "tokenizer.ckpt"])
def test_a_file_that_is_far_too_large_is_not_read(name, copied):
    with open(copied / name, "r+b") as file:
        file.truncate(2**40)  # a sparse file, larger than the disk
    assert f"is damaged: {name} has more than" in refused(copied)


def test_weights_of_a_million_names_are_refused_at_once(copied):
    path = copied / "asr.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(rest), len(rest)]}
    head = json.dumps(head | {f"x{number}": empty for number in range(100_000)}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + rest)
    assert 'Unexpected key(s) in state_dict: "x0", "x1" and 99998 more' in refused(copied)


def test_a_file_is_not_blamed_for_another(copied):
    (copied / "asr.safetensors").write_bytes(b"junk")
    assert "hyperparams.yaml" not in refused(copied)


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, data):
    """A field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece_with(rule):
    content = io.BytesIO()
    settings = {"vocab_size": 25, "hard_vocab_limit": False, "minloglevel": 2, "normalization_rule_name": rule}
    SentencePieceTrainer.train(sentence_iterator=iter(["THE CAT SAT ON A HOT DAY"] * 9), model_writer=content, **settings)
    return content.getvalue()


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc", "nfkc_cf"])
def test_tokenizers_that_sentencepiece_writes_are_read(rule, tmp_path):
    (tmp_path / "t.model").write_bytes(sentencepiece_with(rule))
    load_tokenizer(tokenizer := SentencePieceProcessor(), tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode("THE CAT")).upper() == "THE CAT"


@pytest.mark.parametrize(
    "more, message",
    [
        (field(1, field(1, b"x" * 100_000)), "has a piece of 100000 bytes"),  # would overflow the stack
        (field(1, field(1, b"\x1b[2J")), r"has the piece '\x1b[2J', whose control characters"),
        (field(1, field(1, "\u202ea".encode())), r"has the piece '\u202ea', whose control characters"),
        (field(1, field(1, b"\xff")), "is damaged"),
        (field(1, field(1, b"<0x1B>") + b"\x18\6"), "has pieces for single bytes"),
        (field(2, field(44, b"\n")), r"has the piece '\n', whose control characters"),
        (field(3, field(2, b"abc")), "has a damaged normalisation table"),
        (field(3, field(2, (64).to_bytes(4, "little") + b"\xff" * 64 + b"a\0")), "has a damaged normalisation table"),
        (field(5, field(2, b"\4\0\0\0\0\0\0\0a")), "has a damaged normalisation table"),
        (field(1, b"\x0d" + b"abcd" + field(1, b"A" * 2000)), "is damaged"),  # the text first with another wire type
        (field(1, field(1, b"A" * 2000) + field(1, b"A")), "has a piece of 2000 bytes"),
        (field(1, field(1, b"x") + b"\x18\x86\x80\x80\x80\x10"), "is damaged"),  # a kind of 6 + 2^32
        (field(3, b"\x92\x80\x80\x80\x10" + field(2, b"\4\0\0\0\0\0\0\0a")[1:]), "is damaged"),  # a tag above 32 bits
        (b"\x0a\x7f", "is damaged"),
        (b"\x0b", "is damaged"),
        (b"\xff" * 20, "is damaged"),
    ],
)
def test_a_tokenizer_that_would_do_harm_is_refused(more, message, copied):
    with open(copied / "tokenizer.ckpt", "ab") as file:
        file.write(more)
    assert f"tokenizer.ckpt {message}" in refused(copied)


def test_a_table_that_leads_out_of_itself_is_refused(copied):
    """With such a table, SentencePiece would read any place in memory."""
    model = sentencepiece_with("nmt_nfkc")
    begin = model.index(b"nmt_nfkc\x12") + len(b"nmt_nfkc\x12")  # the table; its size is a varint of three bytes
    table = model[begin + 3 :][: sum((byte & 127) << 7 * index for index, byte in enumerate(model[begin : begin + 3]))]
    check_tokenizer(field(3, field(2, table)))
    generator = np.random.default_rng(0)
    for _ in range(20):
        damaged = np.frombuffer(table, np.uint8).copy()
        damaged[generator.integers(4, len(table) // 2, 1000)] = generator.integers(0, 256, 1000)
        with pytest.raises(UserError, match="has a damaged normalisation table"):
            check_tokenizer(field(3, field(2, damaged.tobytes())))


def test_what_a_terminal_would_obey_is_shown_as_escapes(copied, tmp_path, capsys):
    (copied / "hyperparams.yaml").write_text("a: !x%1b%5b2J 1")
    assert cli.main(["transcribe", "--model", str(copied), str(tmp_path / "a\x1b[2J.wav")]) == 2
    assert r"has !x\x1b[2J, which no shipped recipe writes" in capsys.readouterr().err
    folder = ROOT / "tests" / "data" / "model_folders" / "ctc-v1"
    assert cli.main(["transcribe", "--model", str(folder), "--device", "cpu", str(tmp_path / "a\x1b[2J.wav")]) == 1
    error = capsys.readouterr().err
    assert r"a\x1b[2J.wav" in error and "\x1b" not in error
