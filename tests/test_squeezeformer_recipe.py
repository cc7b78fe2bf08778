"""The Squeezeformer's recipe: sizes by one key, the published schedule, SpecAugment in proportion to the length."""

from pathlib import Path

import pytest
import speechbrain as sb
import torch

from speechbrain_ext.hparams import load_hparams
from speechbrain_ext.lobes.augment import SpecAugment
from speechbrain_ext.training.settings import choose_setting
from speechbrain_ext.utils.errors import UsageError

FILE = Path(__file__).resolve().parents[1] / "hparams" / "squeezeformer.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the checkpointer makes its folder here


@pytest.mark.parametrize("size, parameters, lr, masks", [("s", 18_565_640, 2e-3, 5), ("m", 55_621_856, 1.5e-3, 7)])
def test_the_size_selects_all_that_was_published(size, parameters, lr, masks):
    hparams = load_hparams(FILE, {"size": size})
    assert sum(p.numel() for p in hparams["model"].parameters()) == parameters
    assert hparams["lr"] == hparams["lr_annealing"].lr_initial == lr
    assert hparams["fea_augment"].time_masks == masks
    assert hparams["output_folder"].startswith(f"results/squeezeformer_{size}/")


@pytest.mark.parametrize("corpus", ["Synthetic", "MiniLibriSpeech"])
def test_a_size_that_the_corpus_replaces_is_refused(corpus):
    def choose(*more, file=FILE.parents[1] / "recipes" / corpus / "corpus.yaml"):
        return choose_setting(
            *sb.parse_arguments([str(FILE), "--data_folder", "x", "--size", "m", *more]), {}, file, None
        ).plain()

    with pytest.raises(UsageError, match=f"--size m has no effect on d_model, .*, because the settings of {corpus} replace them"):
        choose()
    sizes = ("--d_model", "324", "--nhead", "4", "--num_encoder_layers", "20", "--d_ffn", "1296")
    assert choose(*sizes)["d_model"] == 324
    assert choose(file=None)["experiment"] == "squeezeformer_m"


def test_an_unknown_size_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="no squeezeformer of size 'xxl'; the sizes are: xs, s, sm, m, ml, l"):
        load_hparams(FILE, {"size": "xxl"})


def test_the_schedule_has_a_plateau_of_eight_warm_ups():
    hparams = load_hparams(FILE)
    schedule = hparams["lr_annealing"]
    optimizer = hparams["opt_class"]([torch.nn.Parameter(torch.zeros(1))])
    warm_up = schedule.n_warmup_steps
    for step, share in ((1, 1 / warm_up), (warm_up, 1), (9 * warm_up - 1, 1), (18 * warm_up, 0.1), (25 * warm_up, 1 / 17)):
        schedule.n_steps = step - 1
        schedule(optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * share)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.98)


def test_time_masks_grow_with_the_length_of_each_utterance():
    torch.manual_seed(0)
    lengths = torch.tensor([2000, 100]).repeat(200)
    feats, lens = SpecAugment(time_masks=5)(torch.ones(400, 2000, 80), lengths / 2000)
    assert torch.equal(lens, lengths / 2000)
    masked = (feats == 0).all(2)  # frames in time masks
    assert not (masked & (torch.arange(2000) >= lengths.unsqueeze(1))).any()
    for length, rows in ((2000, masked[0::2]), (100, masked[1::2, :100])):
        counts = rows.sum(1)
        assert counts.max() <= 5 * 0.05 * length and 0.75 < counts.float().mean() / (5 * 0.025 * length) < 1.02
        assert 0.8 < rows[:, : length // 2].sum() / rows[:, length // 2 :].sum() < 1.25  # anywhere
        assert len({tuple(row) for row in rows.tolist()}) > 150  # each utterance has its own
    bins = (feats[0::2] == 0).all(1).sum(1)
    assert 0 < bins.max() <= 2 * 26 and 20 < bins.float().mean() < 26
