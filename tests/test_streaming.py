"""Streams of waveforms give the same frames, words and times as whole files, with pieces of any size."""

import pytest
import torch
from speechbrain.lobes.features import MFCC, Fbank
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.asr import SpeechEncoder, TransformerASR
from speechbrain_ext.brains.asr import AsrModel
from speechbrain_ext.lobes.features import KaldiFbank, SentenceNormalization
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling, DepthwiseSubsampling, FusibleSubsampling

SUBSAMPLINGS = {
    "convolution": lambda: ConvolutionSubsampling(channels=(8, 4)),
    "depthwise": lambda: DepthwiseSubsampling(channels=8),
    "fusible": lambda: FusibleSubsampling(channels=(8, 4)),
}
FEATURES = {"fbank": lambda: Fbank(n_mels=80), "kaldi": KaldiFbank}
both_features = pytest.mark.parametrize("features", FEATURES)


def speech(samples, seed=0):
    """Noise of changing loudness, with silence: peaks and statistics change."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(samples // 3000 + 2, generator=generator).repeat_interleave(3000)[:samples] ** 8
    return (loudness * torch.randn(samples, generator=generator)).where(loudness > 1e-3, torch.zeros(()))


def normalization(norm_type):
    normalize = SentenceNormalization() if norm_type == "prior" else InputNormalization(norm_type=norm_type)
    normalize.count, normalize.glob_mean, normalize.glob_std = 1, torch.full((80,), -20.0), torch.full((80,), 15.0)
    return normalize


def speech_encoder(name, keys=None, subsampling="convolution", norm_type="global", features="fbank"):
    torch.manual_seed(0)
    subsampling = SUBSAMPLINGS[subsampling]()
    net = TransformerASR(
        20, subsampling.output_size, 32, 4, 4, 0, 64, encoder_module=name, encoder_kwargs={"dropout": 0.1, **(keys or {})}
    )
    head = torch.nn.Linear(32, 20)
    return SpeechEncoder(FEATURES[features](), normalization(norm_type), subsampling, net, head).eval()


def stream(encoder, wavs, config, pieces):
    """Logits of samples in pieces of the given sizes, in turn."""
    context, logits, start = encoder.make_streaming_context(config), [], 0
    while start < wavs.shape[1]:
        for size in pieces:
            logits.append(encoder.encode_streaming(wavs[:, start : start + size], context)[0])
            start += size
    logits.append(encoder.encode_streaming(wavs[:, :0], context, last=True)[0])
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(1237,), (7, 16001, 1), (100_000,)])
@pytest.mark.parametrize("chunk, left", [(4, 2), (16, None), (8, 0)])
def test_streamed_logits_are_those_of_the_whole_file(encoder_case, chunk, left, pieces):
    encoder = speech_encoder(*encoder_case)
    config = DynChunkTrainConfig(chunk, left)
    wavs = torch.stack((speech(40_123), speech(40_123, seed=1)))
    expected, _ = encoder.encode(wavs, dynchunktrain_config=config)
    torch.testing.assert_close(stream(encoder, wavs, config, pieces), expected, atol=1e-3, rtol=0)


@torch.no_grad()
@both_features
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("norm_type", ["global", "sentence", "prior"])
@pytest.mark.parametrize("samples", [1, 159, 160, 399, 400, 10_239, 10_240, 10_440, 30_000])
def test_front_ends_and_normalizations_stream(subsampling, norm_type, samples, features):
    encoder = speech_encoder("hyperconformer", subsampling=subsampling, norm_type=norm_type, features=features)
    config = DynChunkTrainConfig(4, 3)
    wavs = speech(samples).unsqueeze(0)
    expected, _ = encoder.encode(wavs, dynchunktrain_config=config)
    assert expected.shape[1] == -(-(1 + samples // 160 if features == "fbank" else max(1, (samples + 80) // 160)) // 4)
    torch.testing.assert_close(stream(encoder, wavs, config, (997,)), expected, atol=1e-3, rtol=0)


@torch.no_grad()
@both_features
@pytest.mark.parametrize("norm_type", ["global", "sentence", "prior"])
def test_chunked_files_in_a_batch_and_alone(norm_type, features):
    encoder = speech_encoder("conformer", norm_type=norm_type, features=features)
    config = DynChunkTrainConfig(4, 2)
    lengths = [30_000, 17_003, 640, 3]
    wavs = torch.zeros(len(lengths), max(lengths))
    for i, length in enumerate(lengths):
        wavs[i, :length] = speech(length, seed=i)
    out, relative = encoder.encode(wavs, torch.tensor(lengths) / max(lengths), config)
    for i, length in enumerate(lengths):
        alone, _ = encoder.encode(wavs[i : i + 1, :length], dynchunktrain_config=config)
        assert alone.shape[1] == round(relative[i].item() * out.shape[1])
        torch.testing.assert_close(out[i, : alone.shape[1]], alone[0], atol=1e-3, rtol=0)


@torch.no_grad()
@both_features
@pytest.mark.parametrize("norm_type", ["global", "sentence", "prior"])
def test_features_of_a_chunk_do_not_depend_on_what_follows(norm_type, features):
    encoder = speech_encoder("conformer", norm_type=norm_type, features=features)
    config = DynChunkTrainConfig(4, 2)
    wavs = 1e-3 * speech(40_000).unsqueeze(0)
    louder = wavs.clone()
    end = 5 * 16 * 160 - 160 + (200 if features == "fbank" else 280)  # of the samples of 5 chunks of 16 features
    louder[:, end:] = torch.randn(1, 40_000 - end)
    expected, _ = encoder.encode(wavs, dynchunktrain_config=config)
    changed, _ = encoder.encode(louder, dynchunktrain_config=config)
    assert torch.equal(changed[:, :20], expected[:, :20])
    assert not torch.allclose(changed[:, 20:], expected[:, 20:])


@torch.no_grad()
def test_a_stream_of_nothing_has_no_frames():
    encoder = speech_encoder("conformer")
    context = encoder.make_streaming_context(DynChunkTrainConfig(4, 2))
    assert encoder.encode_streaming(torch.zeros(1, 0), context, last=True)[0].shape == (1, 0, 20)


def test_what_does_not_stream_says_so():
    encoder = speech_encoder("conformer")
    config = DynChunkTrainConfig(4, 2)
    for name, value, message in (
        ("normalize", InputNormalization(norm_type="batch"), "batch does not stream"),
        ("compute_features", Fbank(n_mels=80, deltas=True), "without deltas"),
        ("compute_features", Fbank(n_mels=80, n_fft=401), "n_fft 401"),
        ("compute_features", Fbank(n_mels=80, hop_length=30), "hops of 480 samples"),
        ("compute_features", MFCC(deltas=False, context=False), "MFCC features do not stream"),
    ):
        kept = getattr(encoder, name)
        setattr(encoder, name, value)
        with pytest.raises(ValueError, match=message):
            encoder.make_streaming_context(config)
        setattr(encoder, name, kept)
    encoder.subsampling = DepthwiseSubsampling(80, 8, padding="right")
    with pytest.raises(ValueError, match="padding 'right' does not stream"):
        encoder.encode_streaming(torch.zeros(1, 16_000), encoder.make_streaming_context(config))


@torch.no_grad()
@both_features
@pytest.mark.parametrize("norm_type", ["global", "sentence", "prior"])
@pytest.mark.parametrize("samples", [40_123, 8_000])
def test_training_hears_what_a_stream_hears(norm_type, samples, features):
    """With the same chunk setting features are equal, bit for bit, also after a silent start, before the loudest bin."""
    encoder = speech_encoder("hyperconformer", norm_type=norm_type, features=features)
    config = DynChunkTrainConfig(4, 2)
    head, encoder.head = encoder.head, None
    wav = torch.cat((torch.zeros(1, 9_000), 1e-3 * speech(samples).unsqueeze(0), torch.randn(1, 5_000)), 1)
    trained, streamed = [], []
    encoder.subsampling.register_forward_pre_hook(lambda module, inputs: trained.append(inputs[0]))
    AsrModel(encoder, head).eval()(wav, torch.ones(1), chunks=config)
    features = encoder.make_streaming_context(config).features
    for piece in wav.split(997, 1):
        streamed += features.accept(piece)
    streamed += features.finish()
    assert torch.equal(trained[0], torch.cat(streamed, 1))
    trained.clear()
    AsrModel(encoder, head).eval()(*encoder.features(wav), is_features=True, chunks=config)  # the same from features in memory
    assert torch.equal(trained[0], torch.cat(streamed, 1))
