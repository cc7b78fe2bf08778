"""Kaldi's filter banks: torchaudio's numbers, in any batch, in pieces, and from a model folder."""

import numpy as np
import pytest
import torch
import torchaudio
from tiny import make_model

from speechbrain_ext.export.onnx_whole import Features
from speechbrain_ext.inference import load_model
from speechbrain_ext.lobes.features import (
    Fbank,
    FeatureStream,
    InputNormalization,
    KaldiFbank,
    SentenceNormalization,
    clip_features,
    normalize_features,
    raw_features,
)
from speechbrain_ext.lobes.filter_banks import Framing
from speechbrain_ext.utils.errors import UserError

LENGTHS = [16000, 15999, 8000, 4961, 640, 400, 240, 239, 130, 100, 79, 10, 1, 0]


def signal(samples, kind, rate=16000):
    noise, time = torch.randn(samples, generator=torch.Generator().manual_seed(samples)), torch.arange(samples) / rate
    tone = torch.sin(2 * torch.pi * 300 * time)
    return {
        "loud": 0.5 * noise,
        "quiet": 1e-4 * noise,
        "silence": torch.zeros(samples),
        "offset": 0.8 + 1e-3 * noise,
        "constant": torch.full((samples,), 0.3),
        "tone": 0.3 * tone + 1e-2 * noise,
        "pauses": 0.1 * tone * (torch.sin(2 * torch.pi * 3 * time) > 0),
    }[kind]


@pytest.mark.parametrize("rate, n_mels", [(16000, 80), (16000, 40), (8000, 80)])
@pytest.mark.parametrize("kind", ["loud", "quiet", "silence", "offset", "constant", "tone", "pauses"])
def test_the_numbers_are_kaldis(kind, rate, n_mels):
    fbank = KaldiFbank(rate, n_mels)
    for samples in (rate // 40, 799, 16000, 16079, 16080, 16081, 30001):
        wav = signal(samples, kind, rate).unsqueeze(0)
        keys = {"dither": 0.0, "snip_edges": False, "low_freq": 20.0, "high_freq": -400.0, "energy_floor": 0.0}
        expected = torchaudio.compliance.kaldi.fbank(wav, num_mel_bins=n_mels, sample_frequency=rate, **keys)
        assert len(expected) == (samples + rate // 200) // (rate // 100)
        torch.testing.assert_close(fbank(wav)[0], expected, atol=1e-3, rtol=0)


def test_any_length_alone_and_in_a_batch():
    fbank, wavs = KaldiFbank(), torch.zeros(len(LENGTHS), 16000)
    for i, length in enumerate(LENGTHS):
        wavs[i, :length] = signal(length, "loud")
    feats, lens = raw_features(fbank, wavs, torch.tensor(LENGTHS) / 16000)
    for i, length in enumerate(LENGTHS):
        alone = fbank(wavs[i : i + 1, :length])[0]
        assert len(alone) == max(1, (length + 80) // 160) == round(float(lens[i]) * feats.shape[1])
        torch.testing.assert_close(feats[i, : len(alone)], alone, atol=2e-6, rtol=0)
        wavs[i, length:] = 1e4  # samples after the end have no influence
    assert torch.equal(fbank(wavs, torch.tensor(LENGTHS) / 16000), feats) and feats.isfinite().all()


@pytest.mark.parametrize("rate", [16000, 8000])
@pytest.mark.parametrize("pieces", [(1,), (997,), (7, 5001, 1), (100_000,)])
def test_a_stream_has_the_features_of_the_whole(pieces, rate):
    fbank, normalize = KaldiFbank(rate), InputNormalization("global").eval()
    normalize.count, normalize.glob_mean, normalize.glob_std = 1, torch.zeros(80), torch.ones(80)
    for length in (1, 79, 100, 119, 120, 121, 280, 400, 2640, 9041) if pieces[0] > 1 else (1, 130, 1039):
        wavs, stream, start, chunks = torch.stack((signal(length, "loud"), signal(length, "pauses"))), None, 0, []
        stream = FeatureStream(fbank, normalize, 16)
        while start < length:
            for size in pieces:
                chunks += stream.accept(wavs[:, start : start + size])
                start += size
        chunks += stream.finish()
        torch.testing.assert_close(torch.cat(chunks, 1), fbank(wavs), atol=2e-6, rtol=0)


def test_a_normalisation_without_statistics_says_so():
    normalize, x = InputNormalization(update_until_epoch=1), torch.randn(2, 9, 4)
    for epoch, training in ((None, False), (1, True)):
        with pytest.raises(UserError, match="has no statistics yet; train it, or load a checkpoint"):
            normalize.train(training)(x, torch.ones(2), epoch)
    assert normalize(x, torch.ones(2), 0).isfinite().all() and normalize.eval()(x).isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
def test_ends_are_mirrored_as_numpy_does(length):
    framing, wavs = Framing(2, 8, 5, mirrors=True), torch.arange(1.0, 51.0).repeat(2, 1)
    wavs[0, length:] = 0
    extended = framing.extend(wavs, torch.tensor([length, 50]), 5, 9)
    expected = np.pad(wavs[0, :length].numpy(), (5, 9), "symmetric")
    np.testing.assert_array_equal(extended[0, : length + 14].numpy(), expected)
    np.testing.assert_array_equal(extended[1].numpy(), np.pad(wavs[1].numpy(), (5, 9), "symmetric"))


def test_fbank_without_the_mean_of_the_utterance():
    """Alone, in a batch, in a graph, with and without an offset; and it does not stream."""
    fbank, lengths, wavs = Fbank(n_mels=80, remove_dc=True), [16000, 9000, 1], torch.zeros(3, 16000)
    for i, length in enumerate(lengths):
        wavs[i, :length] = 0.2 * (i + 1) + signal(length, "tone")
    relative = torch.tensor(lengths) / 16000
    feats, lens = raw_features(fbank, wavs, relative)
    feats = clip_features(fbank, feats, lens)
    normalize = InputNormalization("sentence").eval()
    graph = Features(fbank, normalize)(wavs, torch.tensor(lengths))[0]
    for i, length in enumerate(lengths[:2]):
        alone, plain = fbank(wavs[i : i + 1, :length])[0], signal(length, "tone")
        torch.testing.assert_close(feats[i, : len(alone)], alone, atol=1e-3, rtol=0)
        torch.testing.assert_close(alone, Fbank(n_mels=80)((plain - plain.mean()).unsqueeze(0))[0], atol=1e-2, rtol=0)
        assert (alone - Fbank(n_mels=80)(wavs[i : i + 1, :length])[0]).abs().max() > 1
        torch.testing.assert_close(graph[i, : len(alone)], normalize(alone.unsqueeze(0))[0], atol=1e-2, rtol=0)
    assert feats.isfinite().all()
    for call in (lambda: FeatureStream(fbank, normalize, 16), lambda: clip_features(fbank, feats, lens, 16)):
        with pytest.raises(ValueError, match="remove_dc looks at the whole utterance and does not stream; leave remove_dc out"):
            call()


@torch.no_grad()
def test_steady_noise_is_not_scaled_up_to_speech():
    """Alone, in a batch, in chunks and in a graph; where deviations are larger, nothing changes."""
    torch.manual_seed(0)
    fbank, normalize = KaldiFbank(), SentenceNormalization(least_deviation=0.5)
    speech = torch.randn(16000) * torch.rand(40).pow(4).repeat_interleave(400)
    normalize(fbank(speech.unsqueeze(0)), torch.ones(1), epoch=0)
    normalize.eval()
    noise = 1e-3 * torch.randn(8000)
    wavs = torch.stack((speech, torch.cat((noise, torch.zeros(8000)))))
    feats, lens = raw_features(fbank, wavs, torch.tensor([1.0, 0.5]))
    frames = round(lens[1].item() * feats.shape[1])
    both, alone = normalize(feats, lens), normalize(feats[1:, :frames], torch.ones(1))
    torch.testing.assert_close(both[1, :frames], alone[0], atol=1e-5, rtol=0)
    raw = feats[1, :frames]
    torch.testing.assert_close(alone[0], (raw - raw.mean(0)) / (0.5 * normalize.glob_std), atol=1e-4, rtol=0)
    assert alone.std(1).max() < 0.8
    usual = InputNormalization("sentence").eval()
    torch.testing.assert_close(both[0], usual(feats[:1], torch.ones(1))[0], atol=1e-5, rtol=0)
    graph, number = Features(fbank, normalize)(wavs, torch.tensor([16000, 8000]))
    torch.testing.assert_close(graph[1, : number[1]], alone[0], atol=1e-3, rtol=0)
    stream = FeatureStream(fbank, normalize, 8)
    pieces = torch.cat([*stream.accept(wavs[:1]), *stream.finish()], 1)
    torch.testing.assert_close(pieces, normalize_features(normalize, feats[:1], torch.ones(1), 8), atol=1e-4, rtol=0)


def test_half_precision_and_gradients():
    fbank, wavs = KaldiFbank(), signal(8000, "loud").unsqueeze(0)
    expected = fbank(wavs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fbank(wavs), expected)
    assert torch.equal(fbank.half()(wavs), expected) and not fbank.state_dict()
    wavs.requires_grad_()
    fbank(wavs).sum().backward()
    assert wavs.grad.isfinite().all() and wavs.grad.any()


@pytest.mark.parametrize("keys", [{"sample_rate": 22050}, {"sample_rate": 800}, {"sample_rate": "16k"}, {"n_mels": 0}])
def test_what_is_no_filter_bank_is_refused(keys):
    with pytest.raises(ValueError, match=f"The {next(iter(keys))} of KaldiFbank is .*; give"):
        KaldiFbank(**keys)


def test_a_model_folder_loads_with_it(tmp_path):
    """With its statistics; and a sample rate that contradicts the folder is refused."""
    kaldi = "!new:speechbrain_ext.lobes.features.KaldiFbank {sample_rate: !ref <sample_rate>, n_mels: !ref <n_mels>}"
    hparams = make_model(tmp_path, decoder_layers=0, compute_features=kaldi)
    model = load_model(tmp_path / "model", "cpu")
    assert isinstance(model.mods.encoder.compute_features, KaldiFbank)
    wavs = signal(16000, "tone").unsqueeze(0)
    expected = hparams["ctc_lin"](hparams["speech_encoder"].eval().encode(wavs)[0])
    assert torch.equal(model.mods.encoder.encode(wavs)[0], expected) and expected.shape[1] == 25
    path = tmp_path / "model" / "hyperparams.yaml"
    path.write_text(path.read_text().replace("KaldiFbank\n  sample_rate: 16000", "KaldiFbank\n  sample_rate: 8000"))
    with pytest.raises(ValueError, match="sample_rate of 16000, but its features have 8000"):
        load_model(tmp_path / "model", "cpu")
