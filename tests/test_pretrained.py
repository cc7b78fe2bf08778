"""What training leaves behind: loaded by SpeechBrain's classes and by ours, and transcribing the same."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from sentencepiece import SentencePieceProcessor
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
from tiny import SENTENCES, SMALL

from recipes.LibriSpeech.data import train_tokenizer
from speechbrain_ext.hparams import load_hparams, merge_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.pretrained import write_pretrained

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
    rows = [{"test_set": "test-tiny", "WER": 12.3}]
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
    assert files == {"README.md", "asr.ckpt", "config.json", "hyperparams.yaml", "normalizer.ckpt", "tokenizer.ckpt"}
    assert "| test-tiny | 12.3 |" in (folder / "model" / "README.md").read_text()


def test_a_second_writing_replaces_the_first_and_leaves_nothing_beside_it(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "x")
    before = sorted(path.name for path in (tmp_path / "x").iterdir())
    (tmp_path / "x" / "model" / "stale").touch()
    make_model(tmp_path / "x", trained[2])
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == before
    assert not (tmp_path / "x" / "model" / "stale").exists()


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "model", tmp_path / "model")
    torch.save({"0.nothing": torch.ones(1)}, folder / "asr.ckpt")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("name", ["asr.ckpt", "normalizer.ckpt", "tokenizer.ckpt", "hyperparams.yaml", "config.json"])
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
