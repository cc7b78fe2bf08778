"""The Practical Conformer's recipe: both passes in every report, and draws that depend only on the step."""

import csv
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from speechbrain import Stage
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from test_resume import assert_same_runs, last_checkpoint, run_with_bomb
from tiny import SMALL, arguments, train

from speechbrain_ext.brains.practical_conformer import PracticalConformerBrain
from speechbrain_ext.encoders.practical_conformer import SIZES
from speechbrain_ext.hparams import load_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.lobes.performer import RandomFeatures, redraw_features

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "hparams" / "practical_conformer.yaml"
KEYS = {**SMALL, "num_decoder_layers": 0, "num_encoder_layers": 3, "vocab_size": 20}
KEYS["train_batch_sampler"] = "{max_batch_length: 2.5, num_buckets: 10}"  # several batches
PASSES = ["first_pass_ctc_greedy", "second_pass_ctc_greedy"]
SOFTMAX = "{first: {kernel: softmax}}"


def build(folder, monkeypatch, **keys):
    """A Brain that is not trained."""
    monkeypatch.chdir(folder)  # the checkpointer makes its folder here
    small = {"d_model": 16, "nhead": 2, "num_encoder_layers": 3, "d_ffn": 32, "vocab_size": 20}
    hparams = load_hparams(FILE, {**small, **keys})
    return PracticalConformerBrain(hparams["modules"], hparams["opt_class"], hparams, {"device": "cpu"}, hparams["checkpointer"])


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = train(folder, FILE, "--data_folder", corpus, "--device", "cpu", *arguments(**KEYS))
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_every_report_has_both_passes(finished):
    with open(finished / "results" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["search"] for row in rows] == PASSES
    (output,) = (finished / "results").glob("*/7775")
    log, card = (output / "train_log.txt").read_text(), (output / "pretrained" / "README.md").read_text()
    for row in rows:
        assert row["architecture"] == "cascade" and row["hparams"] == FILE.name
        search, rate = row["search"], float(row["WER"])
        assert f"valid WER {search}: " in log and f"test WER {search}: {rate:.2e}" in log
        assert f"| {search} | {row['WER']} |" in card
        assert (output / f"wer_test-tiny_{search}.txt").read_text().startswith(f"%WER {rate:.2f} [")


@torch.no_grad()
def test_the_trained_model_answers_with_either_pass(finished):
    (folder,) = finished.glob("results/*/7775/pretrained")
    model = load_model(folder, "cpu")
    wavs, lens = torch.randn(1, 16000), torch.ones(1)
    answers = {}
    for pass_name in (None, "second", "first"):
        model = load_model(folder, "cpu", pass_name)
        answers[pass_name] = model.frames(wavs, lens)[0][0]
    assert torch.equal(answers[None], answers["second"])
    assert answers["first"].shape == answers["second"].shape and not torch.allclose(answers["first"], answers["second"])


def test_an_interrupted_run_draws_what_a_straight_one_does(corpus, tmp_path):
    keys = {**KEYS, "number_of_epochs": 2, "encoder_kwargs": SOFTMAX, "redraw_interval": 3, "average_checkpoints": 2}
    keys |= {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 2}
    straight = run_with_bomb(tmp_path / "straight", corpus, keys, FILE.stem)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    stopped = run_with_bomb(tmp_path / "interrupted", corpus, keys, FILE.stem, "step", 6)
    assert stopped.returncode == -signal.SIGKILL
    assert last_checkpoint(tmp_path / "interrupted")  # between two draws of features
    finished = run_with_bomb(tmp_path / "interrupted", corpus, keys, FILE.stem)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_same_runs(tmp_path / "straight", tmp_path / "interrupted")


def test_another_encoder_ends_in_one_sentence(corpus, tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text(
        f"extends: {ROOT}/hparams/conformer_small.yaml\n"
        "brain: !name:speechbrain_ext.brains.practical_conformer.PracticalConformerBrain\n"
        "first_pass_prob: 0.5\nredraw_interval: 0\n"
    )
    run = train(tmp_path, path, "--data_folder", corpus, "--device", "cpu", *arguments(**KEYS))
    assert run.returncode == 2 and "Traceback" not in run.stdout + run.stderr
    assert "This recipe trains an encoder of two passes, such as cascade; encoder is 'conformer'." in run.stderr


@pytest.mark.parametrize(
    "key, value", [("first_pass_prob", -0.1), ("first_pass_prob", 1), ("first_pass_prob", "abc"), ("redraw_interval", 2.5)]
)
def test_impossible_draws_are_refused(key, value, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"{key} is {value!r}; give"):
        build(tmp_path, monkeypatch, **{key: value})


def test_chunks_suit_both_passes_whichever_was_drawn_before(tmp_path, monkeypatch):
    stages = {"first": "hyperconformer", "second": {"encoder": "squeezeformer", "num_layers": 3}}
    brain = build(tmp_path, monkeypatch, num_encoder_layers=4, encoder_kwargs=stages)
    brain.hparams.chunk_sampler = lambda stage: DynChunkTrainConfig(7, 2)
    for brain.drawn in ("first", "second"):
        assert brain.draw_chunks(Stage.TRAIN).chunk_size == 8


def draws(brain, epoch, steps, optimizer_step=0):
    """The drawn passes of the steps of an epoch."""
    brain.hparams.epoch_counter.current, brain.optimizer_step, drawn = epoch, optimizer_step, []
    for brain.step in steps:
        brain.on_fit_batch_start(SimpleNamespace(id=["a"]), True)
        drawn.append(brain.drawn)
    return drawn


def test_the_pass_depends_on_the_step_only(tmp_path, monkeypatch):
    brain = build(tmp_path, monkeypatch)
    torch.manual_seed(1)
    first, second = (draws(brain, epoch, range(1, 401)) for epoch in (1, 2))
    assert 150 < first.count("first") < 250 and first != second
    other = build(tmp_path, monkeypatch)
    torch.manual_seed(2)
    assert draws(other, 1, range(200, 401)) == first[199:]
    assert draws(build(tmp_path, monkeypatch, seed=1), 1, range(1, 401)) != first


def test_the_second_pass_alone(tmp_path, monkeypatch):
    brain = build(tmp_path, monkeypatch, first_pass_prob=0)
    assert set(draws(brain, 1, range(1, 50))) == {"second"}


def test_a_batch_of_the_first_pass_trains_the_first_stage_alone(tmp_path, monkeypatch):
    brain = build(tmp_path, monkeypatch)
    brain.hparams.wav_augment = brain.hparams.fea_augment = None

    class Batch(SimpleNamespace):
        def to(self, device):
            return self

    lens = torch.ones(2)
    batch = Batch(sig=(torch.randn(2, 16000), lens), host_lengths={"sig": lens}, tokens_bos=SimpleNamespace(data=None))
    batch.tokens = SimpleNamespace(lengths=None)
    for brain.drawn in ("first", "second"):
        brain.modules.zero_grad(set_to_none=True)
        predictions = brain.compute_forward(batch, Stage.TRAIN)
        assert list(predictions) == [brain.drawn]
        predictions[brain.drawn].ctc_logits.sum().backward()
        trained = {name.split(".")[0] for name, p in brain.encoder.named_parameters() if p.grad is not None}
        assert trained == ({"first"} if brain.drawn == "first" else {"first", "second"})
        assert all(p.grad is not None for p in brain.hparams.ctc_lin.parameters())  # one head for both
    with torch.no_grad():
        assert list(brain.compute_forward(batch, Stage.VALID)) == ["first", "second"]


def features(encoder):
    return [part.training_projection for part in encoder.modules() if isinstance(part, RandomFeatures)]


def test_features_depend_on_the_optimizer_step_only(tmp_path, monkeypatch):
    keys = {"encoder_kwargs": {"first": {"kernel": "softmax"}}, "redraw_interval": 100}
    straight = build(tmp_path, monkeypatch, **keys)
    assert features(straight.encoder) and features(straight.encoder)[0] is None
    for step in (0, 99, 100, 250):
        draws(straight, 1, [1], step)
        expected = build(tmp_path, monkeypatch, **keys).encoder
        redraw_features(expected, 1 + step // 100)
        resumed = build(tmp_path, monkeypatch, **keys)  # starts at this step
        draws(resumed, 1, [1], step)
        assert straight.draw == resumed.draw == 1 + step // 100
        for ours, theirs, wanted in zip(*map(features, (straight.encoder, resumed.encoder, expected)), strict=True):
            assert torch.equal(ours, wanted) and torch.equal(theirs, wanted)
    never = build(tmp_path, monkeypatch, **{**keys, "redraw_interval": 0})
    draws(never, 1, [1], 500)
    assert features(never.encoder)[0] is None


@pytest.mark.parametrize("size", ["xs", "m"])
def test_the_size_selects_both_stages(size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder, row = load_hparams(FILE, {"size": size})["Transformer"].encoder, SIZES[size]
    assert (len(encoder.first.layers), len(encoder.second.layers)) == (row.num_layers, row.num_layers // 2)
    assert encoder.first.d_model == encoder.second.d_model == row.d_model
