"""Augmentation; tests/test_squeezeformer_recipe.py tests masks in proportion to the length."""

import pytest
import torch
from speechbrain.augment.augmenter import Augmenter

from speechbrain_ext.lobes.augment import SpecAugment, SpeedPerturb
from speechbrain_ext.utils.errors import UserError


def test_masks_have_the_widths_that_are_given():
    torch.manual_seed(0)
    augment = SpecAugment(1, time_mask_ratio=1.0, time_mask_width=[15, 25], frequency_masks=1, frequency_mask_width=[10, 20])
    feats, _ = augment(torch.ones(500, 200, 80), torch.ones(500))
    frames, bins = (feats == 0).all(2).sum(1), (feats == 0).all(1).sum(1)
    assert set(frames.tolist()) == set(range(15, 25)) and set(bins.tolist()) == set(range(10, 20))


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"time_masks": 1.5}, "time_masks is 1.5; give a whole number"),
        ({"time_mask_ratio": 3.0}, "time_mask_ratio is 3.0; give a share from 0 to 1"),
        ({"frequency_warp": -1}, "frequency_warp is -1"),
    ],
)
def test_impossible_masks_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        SpecAugment(**{"time_masks": 2, **keys})
    with pytest.raises(UserError, match="frequency_mask_width is .80, 100., which hides all 80 bins"):
        SpecAugment(0, frequency_mask_width=[80, 100])(torch.ones(1, 9, 80), torch.ones(1))


def test_half_precision_counts_frames():
    torch.manual_seed(0)
    feats = torch.arange(3000.0).view(1, 3000, 1).expand(1, 3000, 4) / 3000
    warped, _ = SpecAugment(0, frequency_masks=0, time_warp=5)(feats.half(), torch.ones(1))
    assert warped.dtype == torch.float16 and (warped.float() - feats).abs().max() < 6 / 3000


def test_short_utterances_keep_what_the_ratio_leaves_them():
    augment = SpecAugment(4, time_mask_ratio=0.1, time_mask_width=[15, 25], frequency_masks=0)
    feats, _ = augment(torch.ones(200, 60, 4), torch.full((200,), 0.5))
    masked = (feats == 0).all(2)
    assert masked[:, :30].sum(1).max() <= 4 * 3 and not masked[:, 30:].any()


def test_warping_moves_frames_of_each_utterance_and_leaves_padding():
    torch.manual_seed(0)
    ramp = torch.arange(100.0).view(1, 100, 1).expand(300, 100, 2)
    lengths = torch.tensor([100, 60, 6]).repeat(100)
    feats, _ = SpecAugment(0, frequency_masks=0, time_warp=5)(ramp, lengths / 100)
    moved = feats[..., 0] - ramp[..., 0]
    for i, length in enumerate(lengths.tolist()):
        assert not moved[i, length:].any() and moved[i, 0].abs() < 1e-4 and moved[i, length - 1].abs() < 1e-3
        assert (feats[i, 1:length, 0] >= feats[i, : length - 1, 0]).all()  # time never moves back
    assert 3 < moved[lengths == 100].abs().max() <= 5 and not moved[lengths == 6].any()  # too short to be warped
    assert len({tuple(row) for row in moved[lengths == 60].tolist()}) == 100


def test_views_of_an_utterance_are_warped_in_time_alike():
    torch.manual_seed(0)
    feats, lens = torch.rand(3, 100, 8), torch.tensor([1.0, 0.6, 0.06])
    (first, second), lengths = SpecAugment(0, frequency_masks=0, time_warp=5)(feats, lens, views=2)[0].chunk(2), lens.repeat(2)
    assert torch.equal(first, second) and not torch.equal(first, feats)
    both, twice = SpecAugment(2, frequency_masks=0, time_warp=5)(feats, lens, views=2)
    first, second = both.chunk(2)
    masked = ((first == 0) | (second == 0)).all(2)
    assert torch.equal(twice, lengths) and torch.equal(first[~masked], second[~masked])
    assert not torch.equal(first == 0, second == 0)


def test_warping_of_bins_moves_them_alike_in_all_frames_of_an_utterance():
    torch.manual_seed(0)
    ramp = torch.arange(80.0).expand(100, 7, 80)
    feats, _ = SpecAugment(0, frequency_masks=0, frequency_warp=4)(ramp, torch.ones(100))
    moved = feats - ramp
    assert torch.equal(feats, feats[:, :1].expand_as(feats)) and 3 < moved.abs().max() <= 4
    assert not moved[..., 0].any() and moved[..., -1].abs().max() < 1e-4 and (feats.diff(dim=2) >= 0).all()
    assert len({tuple(row) for row in moved[:, 0].tolist()}) == 100


def test_speeds_change_the_number_of_samples_and_no_relative_length():
    torch.manual_seed(0)
    augment, lens = SpeedPerturb(16000, [90, 100, 110]), torch.tensor([1.0, 0.5])
    found = {}
    for _ in range(20):
        wavs, same = augment(torch.ones(2, 9900), lens)
        assert same is lens
        found[wavs.shape[1]] = found.get(wavs.shape[1], 0) + 1
    assert {samples - samples % 10 for samples in found} == {11000, 9900, 9000}  # torchaudio 2.9 gives 11001


@pytest.mark.parametrize("width", [[25, 15], [1, 2, 3], "8", -1, True, None])
def test_impossible_widths_are_refused(width):
    with pytest.raises(ValueError, match="frequency_mask_width is .*; give the limit of widths"):
        SpecAugment(1, frequency_mask_width=width)


def test_both_work_in_speechbrains_augmenter():
    lens = torch.tensor([1.0, 0.5])
    for augment, batch in ((SpeedPerturb(16000, [90]), torch.randn(2, 16000)), (SpecAugment(5), torch.randn(2, 100, 80))):
        augmenter = Augmenter(augmentations=[augment], min_augmentations=1, max_augmentations=1, concat_original=False)
        found, lengths = augmenter(batch, lens)
        assert torch.equal(lengths, lens) and not torch.equal(found[:, : batch.shape[1]], batch)
