"""A training step: the memory figures of the table in the documentation, and its time compared with SpeechBrain's."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHITECTURES, SMALL

from speechbrain_ext.hparams import parse_overrides
from speechbrain_ext.utils.files import read_csv

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memory  # noqa: E402
import training  # noqa: E402

SIZES = ("d_model", "nhead", "num_encoder_layers", "d_ffn")


def test_the_table_has_every_file():
    rows = read_csv(ROOT / "benchmarks" / "results" / "memory.csv", memory.FIELDS)
    files = [path.name for path in ARCHITECTURES]
    pairs = [(row["hparams"], row["activation_checkpointing"]) for row in rows]
    assert pairs == [(name, text) for name in files for text in ("False", "True")]
    for row in rows:
        given = (float(row[key]) for key in ("state_mib", "mib_per_s", "mib_per_s2"))
        seconds = [int(row[f"seconds_{size}"]) for size in memory.SIZES]
        assert seconds == sorted(seconds)
        fits = memory.seconds_that_fit(24, *given, slowest=memory.slowest_speed(row["hparams"]))
        assert seconds[2] == pytest.approx(fits, rel=0.02), "run python benchmarks/memory.py"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["conformer", "hyperconformer_streaming", "practical_conformer", "fusionformer"])
def test_what_is_kept_grows_as_foretold(name, checkpointing, tmp_path):
    overrides = parse_overrides("\n".join(f"{key}: {SMALL[key]}" for key in SIZES))
    overrides["activation_checkpointing"] = checkpointing
    parameters, state, linear, square = memory.needs(f"{name}.yaml", overrides, lengths=(2, 4, 8))
    brain = training.make_brain(None, tmp_path, overrides, f"{name}.yaml")
    assert parameters == sum(parameter.numel() for parameter in brain.modules.parameters())
    assert state == pytest.approx(4 * 4 * parameters / 2**20, rel=0.01)  # weights, gradients, and two states of Adam
    brain.passes_of = lambda stage: brain.passes[-1:]
    rate = memory.TOKENS_PER_SECOND[brain.hparams.vocab_size]
    kept = []
    for config in memory.chunk_settings(brain.hparams.chunk_sampler):
        brain.draw_chunks = lambda stage, config=config: config
        kept.append(memory.kept_mib(brain, training.make_batch(3, 6, rate, brain.hparams.vocab_size)))
    assert max(kept) == pytest.approx(3 * (6 * linear + 36 * square), rel=0.03)


def test_a_step_is_counted_as_on_a_gpu(tmp_path, monkeypatch):
    calls = []
    for name in ("fused_attention", "dropout"):
        call = getattr(memory, name)
        monkeypatch.setattr(
            memory, name, lambda *values, call=call, name=name, **keys: calls.append(name) or call(*values, **keys)
        )
    brain = training.make_brain(None, tmp_path, {"num_encoder_layers": 2, "num_decoder_layers": 0}, "conformer.yaml")
    memory.kept_mib(brain, training.make_batch(1, 2))
    assert calls.count("fused_attention") == 2 and calls.count("dropout") >= 2 * 5


def test_what_is_computed_again_is_counted_once(tmp_path):
    """All equal blocks keep their inputs; only one keeps the rest."""
    kept = {}
    for layers in (2, 4, 6):
        overrides = {"num_encoder_layers": layers, "num_decoder_layers": 0, "activation_checkpointing": True}
        brain = training.make_brain(None, tmp_path / str(layers), overrides, "hyperconformer.yaml")
        batch = training.make_batch(1, 4)
        torch.manual_seed(0)
        kept[layers] = memory.kept_mib(brain, batch)
    assert kept[6] - kept[4] == pytest.approx(kept[4] - kept[2])
    assert kept[4] - kept[2] == pytest.approx(2 * 4 * 101 * 144 / 2**20, rel=0.01)  # frames of 144 numbers


def test_attention_and_dropout_keep_what_they_keep_on_a_gpu():
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    query, key, value = torch.randn(3, 1, 2, 50, 8).requires_grad_().unbind()
    bias = torch.randn(1, 2, 50, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = memory.fused_attention(query, key, value, bias, 0.1, scale=0.3)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, bias, scale=0.3))
    assert sum(held.values()) == 4 * (3 * 800 + 5000 + 800 + 100)  # its inputs, its output, and a sum of each row
    assert [gradient.shape for gradient in torch.autograd.grad(out.sum(), (query, bias))] == [query.shape, bias.shape]
    held.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        memory.dropout(torch.ones(1000, requires_grad=True), 0.5)
    assert sum(held.values()) == 1000


def test_more_seconds_fit_on_more_memory_and_fewer_of_longer_utterances():
    assert memory.seconds_that_fit(8, 100, 10, 0.1) < memory.seconds_that_fit(12, 100, 10, 0.1)
    assert memory.seconds_that_fit(8, 100, 10, 0.1, utterance=30) < memory.seconds_that_fit(8, 100, 10, 0.1)
    assert memory.seconds_that_fit(8, 100, 10, 0, slowest=0.95) == 610  # (8192 - 1024 - 100) / 11 * 0.95
    assert memory.seconds_that_fit(1, 100, 10, 0) == 0


def test_a_step_beside_speechbrains(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.csv"
    monkeypatch.setattr(
        "sys.argv", ["training.py", "--utterances", "1", "--rounds", "1", "--threads", "1", "--output", str(path)]
    )
    training.main()
    rows = read_csv(path, training.FIELDS)
    assert [row["modules"] for row in rows] == ["speechbrain", "speechbrain_ext"] and all(float(row["ms"]) > 0 for row in rows)
    assert "Largest difference of the outputs: " in capsys.readouterr().out
