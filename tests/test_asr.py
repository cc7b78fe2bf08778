"""TransformerASR as a drop-in: SpeechBrain's searchers, wrapper and streaming context on top of every registered encoder."""

import copy
import threading

import pytest
import torch
from speechbrain.decoders import CTCScorer, S2STransformerBeamSearcher, ScorerBuilder
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.transformer.TransformerASR import EncoderWrapper
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR as SpeechBrainTransformerASR
from speechbrain.nnet.linear import Linear
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from tiny import ROOT, SMALL

from speechbrain_ext.asr import SpeechEncoder, TransformerASR
from speechbrain_ext.brains.asr import disagreement
from speechbrain_ext.convert import convert_speechbrain
from speechbrain_ext.hparams import load_hparams
from speechbrain_ext.lobes.augment import SpecAugment
from speechbrain_ext.lobes.features import KaldiFbank, clip_features, raw_features
from speechbrain_ext.lobes.masks import absolute_lengths
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling, DepthwiseSubsampling
from speechbrain_ext.training.settings import check_parts
from speechbrain_ext.utils.errors import UserError


def small(encoder_case, decoder_layers=1, **keys):
    name, encoder_kwargs = encoder_case
    torch.manual_seed(0)
    return TransformerASR(
        tgt_vocab=20,
        input_size=640,
        d_model=32,
        nhead=4,
        num_encoder_layers=4,
        num_decoder_layers=decoder_layers,
        d_ffn=64,
        normalize_before=True,
        encoder_module=name,
        encoder_kwargs=encoder_kwargs,
        **keys,
    ).eval()


@torch.no_grad()
def test_forward_in_a_batch_and_alone(encoder_case):
    net = small(encoder_case)
    src, tgt = torch.randn(3, 60, 640), torch.randint(1, 20, (3, 9))
    lengths = [60, 23, 1]
    enc, dec = net(src, tgt, torch.tensor(lengths) / 60)
    assert torch.equal(net.encode(src, torch.tensor(lengths) / 60), enc)
    assert torch.equal(net.encode(src.unflatten(2, (20, 32)), torch.tensor(lengths) / 60), enc)
    for i, length in enumerate(lengths):
        alone, decoded = net(src[i : i + 1, :length], tgt[i : i + 1], torch.ones(1))
        torch.testing.assert_close(enc[i, :length], alone[0], atol=2e-5, rtol=0)  # the input layer also rounds
        torch.testing.assert_close(dec[i], decoded[0], atol=1e-4, rtol=0)
    assert net(src, None)[1] is None
    # NaN in padding and an utterance without frames have no influence.
    src[1, 23:] = float("nan")
    enc, dec = net.double()(src.double(), tgt, torch.tensor([1.0, 23 / 60, 0.001]))
    assert enc.isfinite().all() and dec.isfinite().all()
    assert net.decode(tgt, enc, torch.tensor([60, 23, 0]))[0].isfinite().all()


@torch.no_grad()
def test_encoder_only(encoder_case):
    net = small(encoder_case, decoder_layers=0)
    enc, dec = net(torch.randn(2, 40, 640), torch.randint(1, 20, (2, 5)), torch.tensor([1.0, 0.5]))
    assert enc.shape == (2, 40, 32) and dec is None
    assert not any("decoder" in key for key in net.state_dict())


@torch.no_grad()
def test_joint_beam_search(encoder_case):
    net = small(encoder_case)
    seq_lin, ctc_lin = Linear(input_size=32, n_neurons=20), Linear(input_size=32, n_neurons=20)
    searcher = S2STransformerBeamSearcher(
        modules=[net, seq_lin],
        bos_index=1,
        eos_index=2,
        min_decode_ratio=0.0,
        max_decode_ratio=0.3,
        beam_size=3,
        using_eos_threshold=False,
        length_normalization=True,
        scorer=ScorerBuilder(full_scorers=[CTCScorer(eos_index=2, blank_index=0, ctc_fc=ctc_lin)], weights={"ctc": 0.4}),
    )
    src = torch.randn(2, 30, 640)
    lengths = torch.tensor([30, 10]) / 30
    together = searcher(net.encode(src, lengths), lengths)[0]
    assert together[0] == searcher(net.encode(src[:1]), torch.ones(1))[0][0]
    # No utterance fills the padded length: here SpeechBrain's decode raises a size mismatch.
    out, attention = net.decode(torch.ones(2, 3).long(), torch.randn(2, 30, 32), torch.tensor([20, 10]))
    assert out.shape == (2, 3, 32) and attention.shape == (2, 3, 30)


@torch.no_grad()
def test_streaming_behind_the_wrapper(encoder_case):
    net = small(encoder_case)
    setting = DynChunkTrainConfig(8, 2)
    wrapper = EncoderWrapper(net)
    src = torch.randn(2, 30, 640)
    context = wrapper.make_streaming_context(setting)
    streamed = torch.cat([wrapper.forward_streaming(chunk, context) for chunk in src.split(8, dim=1)], dim=1)
    masked = wrapper(src, torch.ones(2), dynchunktrain_config=setting)
    torch.testing.assert_close(streamed, masked, atol=1e-4, rtol=0)
    assert torch.equal(net(src, None, dynchunktrain_config=setting)[0], net.encode(src, dynchunktrain_config=setting))


@torch.no_grad()
def test_causal_means_no_future(encoder_case):
    net = small(encoder_case, causal=True)
    src = torch.randn(1, 32, 640)
    changed = src.clone()
    changed[:, 16:] = 0
    torch.testing.assert_close(net.encode(src)[:, :16], net.encode(changed)[:, :16], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["RelPosMHAXL", "RoPEMHA", "hypermixing"])
@torch.no_grad()
def test_speechbrain_weights_convert(attention):
    """Published checkpoints need the same output from the same keys and weights."""
    torch.manual_seed(0)
    keys = {
        "tgt_vocab": 30,
        "input_size": 40,
        "d_model": 64,
        "nhead": 4,
        "num_encoder_layers": 3,
        "num_decoder_layers": 2,
        "d_ffn": 128,
        "activation": torch.nn.GELU,
        "encoder_module": "conformer",
        "attention_type": attention,
        "normalize_before": True,
        "causal": False,
    }
    theirs = SpeechBrainTransformerASR(**keys).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ours = TransformerASR(**keys, encoder_kwargs={} if attention == "hypermixing" else {"speechbrain_scores": True}).eval()
    ours.load_state_dict(convert_speechbrain(theirs.state_dict(), nhead=4), strict=True)
    for frames in (1, 50, 301):
        src, tgt = torch.randn(1, frames, 40), torch.randint(1, 30, (1, 12))
        for mine, expected in zip(ours(src, tgt, torch.ones(1)), theirs(src, tgt, torch.ones(1)), strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    # Recipes save a list of modules with the model somewhere inside. The encoder alone also converts.
    saved = torch.nn.ModuleList([torch.nn.Linear(2, 2), theirs]).state_dict()
    torch.nn.ModuleList([torch.nn.Linear(2, 2), ours]).load_state_dict(convert_speechbrain(saved, nhead=4), strict=True)
    ours.encoder.load_state_dict(convert_speechbrain(theirs.encoder.state_dict(), nhead=4), strict=True)
    with pytest.raises(ValueError, match="no SpeechBrain Conformer"):
        convert_speechbrain(ours.state_dict(), nhead=4)
    shown = {"RoPEMHA": (3, "3, which does not divide the width 64")}
    wrong, message = shown.get(attention, (2, "2, but these weights have 4 heads; give 4"))
    with pytest.raises(UserError, match=f"nhead is {message}"):
        convert_speechbrain(saved, nhead=wrong)
    for wrong in (0, None, "4", 4.0):
        with pytest.raises(UserError, match=f"nhead is {wrong!r}; give the number of heads"):
            convert_speechbrain(saved, nhead=wrong)


@pytest.mark.parametrize(
    "keys, error, message",
    [
        ({"encoder_module": "hyperconfomer"}, ValueError, "'hyperconfomer'.*conformer, .*hyperconformer"),
        ({"attention_type": "RelPos"}, ValueError, "'RelPos'.*RelPosMHAXL"),
        ({"attention_type": "regularMHA"}, ValueError, "'regularMHA'.*RelPosMHAXL"),
        ({"encoder_kwargs": {"d_model": 64}}, ValueError, "d_model 64.*32"),
        ({"layerdrop_prob": 0.1}, ValueError, "layerdrop_prob"),
        ({"encoder_kwargs": {"kernel": 3}}, TypeError, "no key 'kernel'"),
        ({"d_model": 30}, ValueError, "30"),
        ({"num_decoder_layers": -1}, ValueError, "num_decoder_layers is -1; give a whole number"),
    ],
)
def test_mistakes_fail_at_construction(keys, error, message):
    with pytest.raises(error, match=message):
        TransformerASR(20, 640, **{"d_model": 32, "nhead": 4, "d_ffn": 64, "num_encoder_layers": 1, **keys})


def test_an_attention_that_an_encoder_does_not_take_is_told(caplog):
    sizes = {"d_model": 32, "nhead": 4, "d_ffn": 64, "num_encoder_layers": 3, "num_decoder_layers": 0}
    for name, attention in (("cascade", "RoPEMHA"), ("squeezeformer", "RelPosMHAXL")):
        TransformerASR(20, 640, **sizes, encoder_module=name, attention_type=attention)
        assert f"attention_type {attention} has no effect on {name}" in caplog.text
    caplog.clear()
    for name, attention in (("practical_conformer", "Performer"), ("hyperconformer", "hypermixing"), ("conformer", "RoPEMHA")):
        TransformerASR(20, 640, **sizes, encoder_module=name, attention_type=attention)
    assert not caplog.text


@torch.no_grad()
@pytest.mark.parametrize("norm_type", ["global", "sentence"])
def test_waveforms_to_frames_in_a_batch_and_alone(encoder_case, norm_type):
    """Each utterance has the same frames alone and in any batch, for any number of samples."""
    net = small(encoder_case, decoder_layers=0)
    normalize = InputNormalization(norm_type=norm_type, update_until_epoch=1)
    normalize.glob_mean, normalize.glob_std = torch.zeros(80), torch.ones(80)
    encoder = SpeechEncoder(Fbank(n_mels=80), normalize, ConvolutionSubsampling(), net).eval()
    lengths = [16000, 15999, 8000, 8037, 7840, 4961, 641, 400, 160, 3]
    wavs = torch.zeros(len(lengths), 16000)
    for i, length in enumerate(lengths):
        wavs[i, :length] = 0.1 * torch.randn(length)
    out, relative = encoder.encode(wavs, torch.tensor(lengths) / 16000)
    for i, (length, frames) in enumerate(zip(lengths, absolute_lengths(relative, out.shape[1]).tolist(), strict=True)):
        alone, _ = encoder.encode(wavs[i : i + 1, :length])
        assert alone.shape[1] == frames
        # The normalisation of few frames divides by a small deviation, which enlarges rounding errors.
        torch.testing.assert_close(out[i, :frames], alone[0], atol=1e-4 if norm_type == "global" else 1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("features", [Fbank, KaldiFbank])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_weights_of_any_precision_take_samples(features, dtype, tolerance):
    """Whole and as a stream, with samples of the same type and of float32; the features have full precision."""
    torch.manual_seed(0)
    net = TransformerASR(20, 640, 16, 2, 2, 0, 32, encoder_module="hyperconformer")
    parts = features(n_mels=80), InputNormalization(norm_type="sentence"), ConvolutionSubsampling(), net
    encoder = SpeechEncoder(*parts, Linear(n_neurons=20, input_size=16)).eval()
    wavs, lens = 0.1 * torch.randn(2, 8000), torch.tensor([1.0, 0.5])
    expected, twin = encoder(wavs, lens), copy.deepcopy(encoder).to(dtype)
    for given in (wavs, wavs.to(dtype)):
        found = twin(given, lens)
        assert found.dtype == dtype and (found.float() - expected).abs().mean() < tolerance
        context = twin.make_streaming_context(DynChunkTrainConfig(4))
        pieces = given.split([1000, 4000, 3000], 1)  # the first one completes no chunk
        found = [twin.encode_streaming(piece, context, last) for piece, last in zip(pieces, (False, False, True), strict=True)]
        assert {x.dtype for each in found for x in each} == {dtype} and found[0][0].shape == (2, 0, 20)


@torch.no_grad()
@pytest.mark.parametrize("features", [Fbank, KaldiFbank])
def test_a_caller_may_use_the_memory_of_a_piece_again(features):
    net = TransformerASR(20, 640, 16, 2, 2, 0, 32, encoder_module="hyperconformer")
    encoder = SpeechEncoder(features(n_mels=80), InputNormalization(norm_type="sentence"), ConvolutionSubsampling(), net).eval()
    wavs, buffer = 0.1 * torch.randn(1, 16000), torch.empty(1, 160)
    streams = []
    for copied in (True, False):
        context, found = encoder.make_streaming_context(DynChunkTrainConfig(4)), []
        for piece in wavs.split(160, 1):
            found.append(encoder.encode_streaming(piece.clone() if copied else buffer.copy_(piece), context)[0])
        streams.append(torch.cat(found, 1))
    assert torch.equal(*streams)
    front, x, tail = ConvolutionSubsampling().eval(), torch.randn(1, 32, 80), None
    wanted, _ = front(x)
    for piece, expected in zip(x.split(16, 1), wanted.split(4, 1), strict=True):
        buffer = piece.clone()
        found, tail = front.stream(buffer, tail)
        buffer.zero_()
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_what_a_front_end_cannot_do_is_said():
    net, normalize = TransformerASR(20, 640, 16, 2, 2, 0, 32), InputNormalization(norm_type="sentence")
    with pytest.raises(UserError, match="Features of the class Identity are not supported; give an Fbank, a KaldiFbank"):
        SpeechEncoder(torch.nn.Identity(), normalize, ConvolutionSubsampling(), net)(torch.rand(1, 8000))
    encoder = SpeechEncoder(Fbank(n_mels=80), normalize, ConvolutionSubsampling(), net)
    for size in (0, -4):
        with pytest.raises(UserError, match=f"The chunk size is {size} frames, but this encoder needs a whole number of at"):
            encoder.encode(torch.rand(1, 8000), None, DynChunkTrainConfig(size))
    for wavs in (torch.rand(8000), torch.rand(1, 1, 8000)):
        with pytest.raises(UserError, match=r"The samples have the shape \(.*\); give \(B, N\)"):
            encoder(wavs)
    context = encoder.make_streaming_context(DynChunkTrainConfig(4))
    encoder.encode_streaming(torch.rand(2, 100), context)
    with pytest.raises(UserError, match=r"The samples have the shape \(1, 100\); give \(2, N\)"):
        encoder.encode_streaming(torch.rand(1, 100), context)
    encoder.encode_streaming(torch.rand(2, 100), context)
    with pytest.raises(UserError, match="There is no normalisation; give a module"):
        SpeechEncoder(Fbank(n_mels=80), None, ConvolutionSubsampling(), net)(torch.rand(1, 8000))
    encoder = SpeechEncoder(Fbank(n_mels=80), torch.nn.Identity(), ConvolutionSubsampling(), net)
    with pytest.raises(UserError, match="Normalisation by Identity does not stream"):
        encoder.make_streaming_context(DynChunkTrainConfig(4))


def test_a_normalisation_of_ones_own_may_train(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hparams = load_hparams(ROOT / "hparams" / "conformer.yaml", {"data_folder": "x"})
    check_parts(hparams | {"normalize": torch.nn.Identity()})


@pytest.mark.parametrize("samples", [2**24 + 1, 2**24 + 3, 2**25 + 5])
def test_lengths_beyond_those_that_float32_counts(samples):
    assert absolute_lengths(torch.ones(1), samples).tolist() == [samples]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("samples", [2049, 160001, 2**24 + 3])
def test_lengths_of_any_precision_are_counted_exactly(samples, dtype):
    assert absolute_lengths(torch.tensor([1.0, 0.5], dtype=dtype), samples).tolist() == [samples, round(samples / 2)]


def test_lengths_are_counted_inside_vmap():
    lengths = torch.tensor([[1.0, 0.5], [0.2, 1.0]])
    assert torch.func.vmap(lambda one: absolute_lengths(one, 10))(lengths).tolist() == [[10, 5], [2, 10]]


def test_lengths_are_at_most_the_frames():
    assert absolute_lengths(torch.tensor([1.0005]), 10000).tolist() == [10000]


@pytest.mark.parametrize(
    "lengths, message",
    [
        (torch.tensor([60, 30]), "are 60, 30; give numbers from 0 to 1, such as frames / 60"),
        (torch.tensor([1.0, -1.0]), "are 1, -1; give numbers"),
        (torch.tensor([1.0, torch.nan]), "are 1, nan; give numbers"),
        (torch.ones(1), r"have the shape \(1,\); give a tensor \(2,\)"),
        (torch.ones(2, 1), r"have the shape \(2, 1\); give a tensor \(2,\)"),
        ([1.0, 0.5], r"are \[1.0, 0.5\]; give a tensor \(2,\)"),
    ],
)
def test_impossible_lengths_are_refused(lengths, message):
    for entrance in (
        lambda x: small(("conformer", {}), 0).encode(x.repeat(1, 1, 8), lengths),
        lambda x: raw_features(Fbank(), x.flatten(1), lengths),
        lambda x: ConvolutionSubsampling()(x, lengths),
        lambda x: DepthwiseSubsampling(padding="right")(x, lengths),
    ):
        with pytest.raises(UserError, match=message.replace("/ 60", r"/ (60|4800)")):
            entrance(torch.randn(2, 60, 80))


def test_what_a_decoder_cannot_do_is_said():
    net = TransformerASR(20, 8, 16, 2, 1, 1, 32, max_length=2).eval()
    x, tokens = torch.randn(1, 9, 8), torch.ones(1, 3, dtype=torch.long)
    frames, _ = net(x, tokens[:, :2])
    for use in (lambda: net(x, tokens), lambda: net.decode(tokens, frames)):
        with pytest.raises(UserError, match="A text has more than 2 tokens; build TransformerASR with a larger max_length"):
            use()
    cache = net.make_decoder_cache(frames)
    net = TransformerASR(20, 8, 16, 2, 1, 0, 32).eval()
    for use in (lambda: net.decode(tokens, frames), lambda: net.decode_step(tokens[0], cache)):
        with pytest.raises(UserError, match="There is no decoder to search with"):
            use()


@torch.no_grad()
def test_two_threads_may_decode_at_once():
    net = TransformerASR(20, 640, 16, 2, 2, 2, 32).eval()
    frames, inside = torch.randn(1, 9, 16), threading.Event()

    def decode():
        net.decode(torch.tensor([[1, 2]]), frames)
        inside.set()

    def beside(*_):  # another thread begins and ends its decode in the middle of this one
        if threading.current_thread() is owner and not inside.is_set():
            thread = threading.Thread(target=decode)
            thread.start()
            thread.join()

    owner = threading.current_thread()
    hook = net.decoder.layers[0].register_forward_pre_hook(beside)
    _, attention = net.decode(torch.tensor([[1, 2]]), frames)
    hook.remove()
    assert attention is not None and inside.is_set()


@torch.no_grad()
def test_a_stream_that_has_ended_takes_no_more():
    encoder = SpeechEncoder(
        KaldiFbank(n_mels=80),
        InputNormalization(norm_type="sentence"),
        ConvolutionSubsampling(),
        TransformerASR(20, 640, 16, 2, 2, 0, 32),
    ).eval()
    context = encoder.make_streaming_context(DynChunkTrainConfig(4))
    encoder.encode_streaming(torch.randn(1, 2000), context, last=True)
    for last in (False, True):
        with pytest.raises(UserError, match="have ended this stream; make a new streaming context"):
            encoder.encode_streaming(torch.randn(1, 2000), context, last)


@torch.no_grad()
def test_features_ignore_what_lies_behind_an_utterance():
    wavs = torch.randn(2, 4000)
    lengths = torch.tensor([1.0, 0.5])
    expected = clip_features(Fbank(), *raw_features(Fbank(), wavs, lengths))
    wavs[1, 2000:] = 1e4
    assert torch.equal(clip_features(Fbank(), *raw_features(Fbank(), wavs, lengths)), expected)


def test_two_views_of_a_batch():
    """CR-CTC: equal views have no divergence, and padding has no influence."""
    hparams = load_hparams(ROOT / "hparams" / "hyperconformer.yaml", "\n".join(f"{key}: {value}" for key, value in SMALL.items()))
    model, lens = hparams["model"], torch.tensor([1.0, 0.4])
    feats, targets = torch.randn(2, 60, 80), torch.randint(4, 30, (2, 5))
    hparams["normalize"](feats, lens, epoch=0)  # sets its statistics
    model.eval()
    keys = {"is_features": True, "epoch": 1}
    (once,), (twice,) = (model(feats, lens, targets, views=views, **keys) for views in (1, 2))
    for field in ("frames", "lengths", "ctc_logits", "seq_logits"):
        torch.testing.assert_close(getattr(twice, field), torch.cat([getattr(once, field)] * 2), atol=1e-5, rtol=0)
    log_probs = twice.ctc_logits.log_softmax(-1)
    assert disagreement(log_probs, twice.lengths).abs() < 1e-6
    # A warp of time moves both views alike; what makes no views is applied to each
    warp = SpecAugment(0, frequency_masks=0, time_warp=5)
    (warped,) = model(feats, lens, targets, views=2, augment=warp, **keys)
    assert disagreement(warped.ctc_logits.log_softmax(-1), warped.lengths).abs() < 1e-6
    (noisy,) = model(feats, lens, targets, views=2, augment=lambda feats, lens: (torch.randn_like(feats), lens), **keys)
    assert disagreement(noisy.ctc_logits.log_softmax(-1), noisy.lengths) > 1e-3
    # By hand: in the first frame of the first utterance one view is sure, and the other is not
    other, sure = log_probs.clone(), torch.full((log_probs.shape[2],), 1e-6)
    sure[3] = 1 - sure[1:].sum()
    other[0, 0] = sure.log()
    p, q = other[0, 0].exp(), log_probs[0, 0].exp()
    expected = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 4
    torch.testing.assert_close(disagreement(other, twice.lengths), expected)
    padded = log_probs.clone()
    padded[1, -1] = sure.log()
    assert disagreement(padded, twice.lengths).abs() < 1e-6
    # Each view moves towards the other, which is held fixed
    leaf = other.detach().clone().requires_grad_()
    disagreement(leaf, twice.lengths).backward()
    torch.testing.assert_close(leaf.grad[0, 0], -log_probs[0, 0].exp() / 4)
