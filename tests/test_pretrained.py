"""What training leaves behind: loaded by SpeechBrain's classes and by ours, and transcribing the same."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
from tiny import SENTENCES, SMALL

from recipes.LibriSpeech.data import train_tokenizer
from speechbrain_ext.hparams import load_hparams, merge_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.model_card import model_card
from speechbrain_ext.inference.pretrained import _inference_hparams, write_pretrained
from speechbrain_ext.inference.trust import check_hparams
from speechbrain_ext.inference.weights import load_weights, save_weights

ROOT = Path(__file__).resolve().parents[1]


def make_model(folder, decoder_layers):
    """A model with random weights, and files that it transcribes; returns its hparams."""
    train_csv = folder / "train.csv"
    train_csv.write_text("ID,wrd\n" + "".join(f"{i},{text}\n" for i, text in enumerate(SENTENCES)))
    train_tokenizer(train_csv, folder / "t.model", 30, "unigram", 0, 1, 2, 3)
    tokens = SentencePieceProcessor(str(folder / "t.model")).vocab_size()
    keys = {**SMALL, "num_decoder_layers": decoder_layers, "output_folder": folder / "run", "vocab_size": tokens}
    overrides = "\n".join(f"{key}: {value}" for key, value in keys.items())
    path = ROOT / "hparams" / "hyperconformer.yaml"
    hparams = load_hparams(path, overrides)
    hparams["normalize"](torch.randn(2, 50, 80), torch.ones(2), epoch=0)
    model = hparams["model"] if decoder_layers else torch.nn.ModuleList([hparams[key] for key in ("subsampling", "Transformer")])
    if not decoder_layers:
        model.append(hparams["ctc_lin"])
    counts = {"insertions": 1, "deletions": 2, "substitutions": 3, "words": 49, "parameters": 1000, "steps": 4, "epochs": 2}
    run = {
        "audio_seconds_per_second": 9,
        "peak_memory_mib": 8,
        "precision": "fp32",
        "commit": "abc",
        "hardware": "a CPU",
        "date": "",
    }
    row = {"architecture": "hyperconformer", "hparams": path.name, "train_set": "train-tiny", "search": "ctc_greedy", "WER": 12.3}
    rows = [{**row, "test_set": "test-tiny", **counts, **run}]
    write_pretrained(folder / "model", merge_hparams(path, overrides), model, hparams["normalize"], folder / "t.model", rows)
    generator = torch.Generator().manual_seed(0)
    for name, samples in {"short": 9000, "long": 25037, "middle": 16000}.items():
        soundfile.write(folder / f"{name}.flac", (0.1 * torch.randn(samples, generator=generator)).numpy(), 16000)
    return hparams


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
    assert files == {"README.md", "asr.safetensors", "config.json", "hyperparams.yaml", "normalizer.ckpt", "tokenizer.ckpt"}
    assert len({path.stat().st_mode for path in (folder / "model").iterdir()}) == 1  # who may read one may read all
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


@pytest.mark.parametrize("name", ["asr.safetensors", "normalizer.ckpt", "tokenizer.ckpt", "hyperparams.yaml", "config.json"])
@pytest.mark.parametrize("content", ["", "no such thing", "d_model: [16"])
def test_a_damaged_folder_is_named(name, content, trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises((RuntimeError, ValueError, FileNotFoundError), match=str(folder)):
        load_model(folder, "cpu")


def test_what_is_no_model_is_refused_in_one_sentence(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder .*gone"):
        load_model(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="has no hyperparams.yaml"):
        load_model(tmp_path)
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"speechbrain_interface": "Tacotron2"}))
    with pytest.raises(ValueError, match="Tacotron2"):
        load_model(folder)


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


def test_a_folder_that_names_speechbrains_searcher_loads(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    text = (folder / "hyperparams.yaml").read_text()
    assert ("inference.searchers" in text) == ("inference.ctc_prefix" in text) == bool(trained[2])
    text = text.replace("speechbrain_ext.inference.searchers", "speechbrain.decoders")
    text = text.replace("speechbrain_ext.inference.ctc_prefix", "speechbrain.decoders.scorer")
    (folder / "hyperparams.yaml").write_text(text)
    check_hparams(text)
    file = str(trained[0] / "middle.flac")
    assert load_model(folder, "cpu").transcribe_file(file) == load_model(trained[0] / "model", "cpu").transcribe_file(file)


def test_a_folder_from_before_safetensors_loads(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    torch.save(load_file(folder / "asr.safetensors"), folder / "asr.ckpt")
    (folder / "asr.safetensors").unlink()
    text = (folder / "hyperparams.yaml").read_text().split("pretrainer:")[0]
    (folder / "hyperparams.yaml").write_text(
        f"""{text}
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables: {{asr: !ref <asr_model>, normalizer: !ref <normalize>, tokenizer: !ref <tokenizer>}}
    custom_hooks:
        asr: !name:speechbrain.utils.checkpoints.torch_recovery
            end_of_epoch: True
"""
    )
    file = str(trained[0] / "long.flac")
    assert load_model(folder, "cpu").transcribe_file(file) == load_model(trained[0] / "model", "cpu").transcribe_file(file)
    torch.save({"0.nothing": torch.ones(1)}, folder / "asr.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(folder, "cpu")


class Trap:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("name", ["asr.safetensors", "normalizer.ckpt", "tokenizer.ckpt"])
def test_a_pickle_with_code_is_not_executed(name, trained, tmp_path, capfd):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    torch.save(Trap(), folder / name)
    with pytest.raises(RuntimeError, match=str(folder)):
        load_model(folder, "cpu")
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("path", sorted((ROOT / "hparams").glob("*.yaml")), ids=lambda path: path.stem)
def test_what_training_writes_may_come_from_anybody(path, layers):
    tree = YAML().load(merge_hparams(path, {"num_decoder_layers": layers}))
    check_hparams(_inference_hparams(tree))
    card = model_card(tree, "EncoderASR", [])
    assert YAML(typ="safe").load(card.split("---\n")[1])["pipeline_tag"] == "automatic-speech-recognition"
    assert ("--pass first" in card) == (tree["encoder"] == "cascade")


@pytest.mark.parametrize(
    "text",
    [
        "a: !apply:os.system [touch FILE]",
        "a: !new:os.system [touch FILE]",
        "a: !name:os.system",
        "a: !module:os",
        "a: !applyref:os.system [touch FILE]",
        "a: !include:FILE",
        "a: [{b: !include:FILE }]",
        "? !apply:os.getcwd\n: 1",
        "a: !!python/object/apply:os.system [touch FILE]",
        "a: (!!python/object/apply:os.system [touch FILE])",
        "a: '(!!python/object/apply:os.system [touch FILE])'",
        "a: !tuple '[!!python/object/apply:os.system [touch FILE]]'",
        "a: '!!python/object/apply:os.system [touch FILE]'\nb: !ref (<a>)",
        "%TAG !x! !apply:os.\n---\na: !x!system [touch FILE]",
        "%TAG !x! !include:\n---\na: !x!FILE",
        "a: !apply%3Aos.system [touch FILE]",
        "a: !new:speechbrain.utils.fetching.shutil.rmtree [FILE]",
        "a: !new:speechbrain_ext.cli.os.system [FILE]",
        "a: !new:speechbrain.utils.parameter_transfer.Pretrainer {paths: {asr: FILE}}",
        "a: !new:torch.nn.ModuleList []\nb: !ref <a.__init__>\nc: !ref <b.__globals__>",
        "a: !new:torch.nn.ModuleList []\nb: !ref <a.apply>",
        "a: !apply:getattr [1, output_size, 2]",
        "a: &x [!apply:os.system [touch FILE]]\nb: *x",
        "a: {b: 1}\n<<: {c: !apply:os.system [touch FILE]}",
        "a: !apply:os.getcwd (x)",
        "a: !module:os (x)",
        "a: !!python/name:os.system (x)",
        "a: !new:collections.Counter (x)",
    ],
)
def test_hparams_that_name_anything_else_are_refused(text, tmp_path):
    (tmp_path / "trap").write_text("b: !apply:os.system [touch executed]")
    with pytest.raises(ValueError):
        check_hparams(text.replace("touch FILE", f"touch {tmp_path / 'executed'}").replace("FILE", str(tmp_path / "trap")))
    assert [path.name for path in tmp_path.iterdir()] == ["trap"]


def test_the_card_of_a_librispeech_model():
    row = {"hparams": "x.yaml", "train_set": "train-clean-100 train-other-500", "search": "ctc_greedy", "WER": 5.25}
    row |= dict.fromkeys(("insertions", "deletions", "substitutions", "words", "parameters", "steps", "epochs", "precision"), 1)
    row |= dict.fromkeys(("audio_seconds_per_second", "peak_memory_mib", "hardware", "date", "commit"), 1)
    rows = [{**row, "test_set": "test-clean"}, {**row, "test_set": "test-clean", "search": "ctc_beam", "WER": 5.0}]
    rows.append({**row, "test_set": "my-test"})
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
    unknown = model_card(tree, "EncoderASR", [{**row, "train_set": "train-clean-100 mine", "test_set": "test-clean"}])
    assert "datasets:" not in unknown and "language:" not in unknown and "LibriSpeech" not in unknown
