"""Rule 8 of the contract: every part computes on one device and never waits for it. The tests need no GPU."""

import copy

import pytest
import tiny
import torch
from pretend_gpu import DEVICE, DeviceMixError, Pretend, PretendGpu
from speechbrain.decoders.scorer import ScorerBuilder
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.nnet.linear import Linear
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.decoders.alignment import greedy_tokens
from speechbrain_ext.decoders.ctc_nbest import ctc_nbest
from speechbrain_ext.decoders.ctc_prefix import CTCScorer
from speechbrain_ext.decoders.lm import TransformerLMScorer
from speechbrain_ext.decoders.searchers import S2STransformerBeamSearcher
from speechbrain_ext.decoders.token_graph import TokenGraph
from speechbrain_ext.decoders.transducer import TransducerSearch
from speechbrain_ext.hparams import load_hparams
from speechbrain_ext.lobes.features import InputNormalization, KaldiFbank, SentenceNormalization
from speechbrain_ext.lobes.fusible import MaskedBatchNorm
from speechbrain_ext.lobes.stack import Stack
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling, DepthwiseSubsampling, FusibleSubsampling
from speechbrain_ext.lobes.transducer import Transducer
from speechbrain_ext.registry import encoder_sizes
from speechbrain_ext.speech_encoder import SpeechEncoder

CHUNKS = {"whole": None, "left 2": (4, 2), "left all": (4, None), "left 0": (4, 0)}
LAUNCHES = 75
"""Launches of a layer's forward. Each takes the host some 7 us: with more, a small model on any GPU waits for the host."""
NORM_LAUNCHES = 9
"""Further launches of a BatchNorm."""


def setting_of(encoder, key):
    if CHUNKS[key] is None:
        return None
    if not encoder.streamable:
        pytest.skip("has no chunks")
    size, left = CHUNKS[key]
    return DynChunkTrainConfig(size * encoder.chunk_multiple, left)


def on_device(module):
    with PretendGpu():
        return copy.deepcopy(module).to(DEVICE)


def assert_pure(recorder):
    """Check that nothing waits for the device, is sent to it, or is computed on the CPU."""
    assert not recorder.syncs, dict(recorder.syncs)
    assert not recorder.uploads, dict(recorder.uploads)
    assert not recorder.host, dict(recorder.host)
    assert not recorder.double_products, dict(recorder.double_products)


# ------------------------------------------------------------------ the instrument itself

SYNCS = {
    "item": lambda x, mask: x.sum().item(),
    "int": lambda x, mask: int(mask.sum()),
    "if": lambda x, mask: bool(mask.any()),
    "arange of a length": lambda x, mask: torch.arange(mask.sum(1).max()),
    "range": lambda x, mask: list(range(mask.sum())),
    "tolist": lambda x, mask: mask.sum(1).tolist(),
    "cpu": lambda x, mask: x.cpu(),
    "boolean index": lambda x, mask: x[mask],
    "boolean assignment": lambda x, mask: x.clone().__setitem__(mask, x.new_zeros(())),
    "nonzero": lambda x, mask: mask.nonzero(),
    "masked_select": lambda x, mask: x.masked_select(mask.unsqueeze(-1)),
    "unique": lambda x, mask: mask.sum(1).unique(),
    "repeat_interleave": lambda x, mask: x.repeat_interleave(mask.sum(1), dim=0),
    "equal": lambda x, mask: torch.equal(x, x),
}
UPLOADS = {
    "tensor": lambda x: x + torch.tensor([1.0, 2.0], device=x.device)[0],
    "as_tensor": lambda x: torch.as_tensor([3, 4], device=x.device),
    "to": lambda x: torch.arange(5).to(x.device),
    "index on the CPU": lambda x: x[:, torch.arange(2)],
}


@pytest.mark.parametrize("fault", SYNCS)
def test_the_instrument_sees_synchronisations(fault):
    with PretendGpu() as recorder:
        x, mask = torch.rand(2, 5, 3, device=DEVICE), torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
        assert not recorder.sync_count()
        SYNCS[fault](x, mask)
        assert recorder.sync_count()


@pytest.mark.parametrize("fault", UPLOADS)
def test_the_instrument_sees_uploads(fault):
    with PretendGpu() as recorder:
        x = torch.rand(2, 5, 3, device=DEVICE)
        assert not recorder.uploads
        UPLOADS[fault](x)
        assert recorder.uploads


def test_the_instrument_refuses_mixed_devices():
    with PretendGpu():
        with pytest.raises(DeviceMixError, match=r"shape \(3,\)"):
            torch.rand(2, 3, device=DEVICE) + torch.rand(3)
        with pytest.raises(TypeError, match="numpy"):
            torch.rand(2, device=DEVICE).numpy()


# ------------------------------------------------------------------ encoders


@pytest.mark.parametrize("key", CHUNKS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_encoder(encoder, key, training):
    """Forward and backward: pure, in few launches, and with the results of the CPU."""
    setting = setting_of(encoder, key)
    for part in encoder.modules():
        part.dropout = 0.0 if isinstance(getattr(part, "dropout", None), float) else getattr(part, "dropout", None)
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    encoder.train(training)
    device_encoder = on_device(encoder)
    x, mask = torch.randn(3, 37, encoder.d_model), torch.arange(37) >= torch.tensor([[37], [20], [9]])
    with torch.set_grad_enabled(training):
        expected, _ = encoder(x, src_key_padding_mask=mask, dynchunktrain_config=setting)
    with PretendGpu():
        device_x, device_mask = x.to(DEVICE), mask.to(DEVICE)
    with PretendGpu() as recorder, torch.set_grad_enabled(training):
        y, _ = device_encoder(device_x, src_key_padding_mask=device_mask, dynchunktrain_config=setting)
        launches = recorder.launches.total()
        if training:
            y.square().sum().backward()
    assert_pure(recorder)
    assert isinstance(y, Pretend)
    torch.testing.assert_close(y.detach().inner, expected.detach(), atol=1e-4, rtol=1e-4)
    parts = list(encoder.modules())
    layers = sum(len(part) for part in parts if isinstance(part, Stack))
    norms = sum(isinstance(part, MaskedBatchNorm) for part in parts)
    assert launches <= LAUNCHES * layers + NORM_LAUNCHES * norms
    if training:
        expected.square().sum().backward()
        pairs = zip(device_encoder.named_parameters(), encoder.parameters(), strict=True)
        for (name, parameter), other in pairs:
            assert (parameter.grad is None) == (other.grad is None), name
            if other.grad is not None:
                torch.testing.assert_close(
                    parameter.grad.inner, other.grad, atol=1e-3 * float(other.grad.abs().amax()) + 5e-4, rtol=1e-3
                )


@pytest.mark.parametrize("key", ["left 2", "left all"])
@torch.no_grad()
def test_stream(encoder, key):
    """Chunk by chunk: pure, and the tenth chunk takes as many launches as the twentieth."""
    setting, encoder = setting_of(encoder, key), on_device(encoder)
    context = encoder.make_streaming_context(setting)
    launches = []
    for _ in range(20):
        with PretendGpu():
            chunk = torch.randn(1, setting.chunk_size, encoder.d_model, device=DEVICE)
        with PretendGpu() as recorder:
            encoder.forward_streaming(chunk, context)
        assert_pure(recorder)
        launches.append(recorder.launches.total())
    assert launches[9] == launches[19]


@pytest.mark.parametrize("key", ["whole", "left 2", "left all"])
@torch.no_grad()
def test_devices_without_float64(encoder, key, monkeypatch):
    """Apple's devices are such: whole utterances, and a stream."""
    monkeypatch.setattr("speechbrain_ext.lobes.precision.WITHOUT_FLOAT64", {"mps", DEVICE.type})
    setting, encoder = setting_of(encoder, key), on_device(encoder)
    with PretendGpu() as recorder:
        x = torch.randn(1, 20 if setting is None else setting.chunk_size, encoder.d_model, device=DEVICE)
        encoder(x, dynchunktrain_config=setting)
        if setting is not None:
            context = encoder.make_streaming_context(setting)
            for _ in range(3):
                encoder.forward_streaming(x, context)
    assert not recorder.doubles, dict(recorder.doubles)


# ------------------------------------------------------------------ front end, model and searches


@pytest.mark.parametrize(
    "front_end",
    [
        lambda: ConvolutionSubsampling(80),
        lambda: FusibleSubsampling(80),
        lambda: DepthwiseSubsampling(80, 16),
        lambda: DepthwiseSubsampling(80, 16, padding="right"),
    ],
    ids=["convolution", "fusible", "depthwise", "depthwise, padded right"],
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_front_end(front_end, training):
    module = on_device(front_end().train(training))
    with PretendGpu():
        x, lens = torch.randn(3, 101, 80, device=DEVICE), torch.tensor([1.0, 0.5, 0.1], device=DEVICE)
    with PretendGpu() as recorder, torch.set_grad_enabled(training):
        y, _ = module(x, lens)
        if training:
            y.square().sum().backward()
    assert_pure(recorder)


@pytest.mark.parametrize("features", [lambda: Fbank(n_mels=80), KaldiFbank], ids=["fbank", "kaldi"])
@pytest.mark.parametrize("normalize", [SentenceNormalization, InputNormalization], ids=["sentence", "global"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "in chunks"])
@pytest.mark.parametrize("loaded", [False, True], ids=["learned", "loaded"])
@torch.no_grad()
def test_from_waveforms(features, normalize, chunked, loaded):
    """From waveforms to the head's output, with learned statistics, or statistics loaded on the device; also as a stream."""
    torch.manual_seed(0)
    normalize, front_end = normalize(), ConvolutionSubsampling(80)
    normalize.train()(torch.randn(2, 50, 80), torch.ones(2), epoch=0)
    net = TransformerASR(30, front_end.output_size, 32, 4, 2, 0, 64, encoder_module="hyperconformer")
    model = SpeechEncoder(features(), normalize, front_end, net, torch.nn.Linear(32, 30)).eval()
    setting = DynChunkTrainConfig(4, 2) if chunked else None
    wavs, lens = torch.randn(2, 16000), torch.tensor([1.0, 0.6])
    expected, _ = model.encode(wavs, lens, setting)
    device_model = on_device(model)
    with PretendGpu():
        if loaded:
            device_model.normalize = type(normalize)().to(DEVICE).eval()
            device_model.normalize.load_state_dict(model.normalize.state_dict())
        device_wavs, device_lens = wavs.to(DEVICE), lens.to(DEVICE)
        device_model.encode(device_wavs, device_lens, setting)  # the constants are made now
    with PretendGpu() as recorder:
        y, _ = device_model.encode(device_wavs, device_lens, setting)
    assert_pure(recorder)
    torch.testing.assert_close(y.inner, expected, atol=1e-4, rtol=1e-4)
    if chunked:
        context = device_model.make_streaming_context(setting)
        with PretendGpu() as recorder:
            frames = [device_model.encode_streaming(part, context)[0] for part in device_wavs[:1].split(4000, 1)]
        assert_pure(recorder)
        assert sum(part.shape[1] for part in frames) > 0


SEARCH_STEPS = 10  # of 20 frames with a ratio of 0.5


JOINT_SYNCS = 4 * SEARCH_STEPS + 3 * 6
# The transducer search checks every eight frames whether all utterances have ended; the last two waits are for texts and scores
SYNCS_OF_SEARCHES = {"greedy": 1, "joint": JOINT_SYNCS, "joint, listening": JOINT_SYNCS, "n best": 2, "transducer": 20 + 2}


@pytest.mark.parametrize("search", SYNCS_OF_SEARCHES)
@torch.no_grad()
def test_search(search):
    """Greedy search waits once. Joint search waits at most four times per step and six times per utterance (3): SpeechBrain's
    code checks which hypotheses have ended. A language model and phrases add no wait."""
    net = TransformerASR(30, 8, 32, 4, 1, 1, 64, encoder_module="conformer").eval()
    seq_lin, ctc_lin = Linear(input_size=32, n_neurons=30), Linear(input_size=32, n_neurons=30)
    net, seq_lin, ctc_lin = (on_device(module) for module in (net, seq_lin, ctc_lin))
    entries = torch.tensor([33, 35, 64]), torch.rand(3), torch.tensor([2, 1, 0])  # tokens 3 and 5 in state 1, 4 in state 2
    states = torch.tensor([0, 0, 1]), torch.rand(3, 1), torch.rand(3)
    graphs = [on_device(TokenGraph(torch.rand(30), torch.randint(3, (30,)), entries, *states, torch.zeros(30, dtype=torch.long)))]
    with PretendGpu():
        x, lens = torch.randn(3, 20, 32, device=DEVICE), torch.tensor([1.0, 0.5, 0.9], device=DEVICE)
    scorer = ScorerBuilder(partial_scorers=[CTCScorer(ctc_lin, 0, 2)], weights={"ctc": 0.4})
    keys = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.0, "max_decode_ratio": 0.5}
    if search.startswith("joint"):
        with PretendGpu():
            call = S2STransformerBeamSearcher([net, seq_lin], beam_size=4, scorer=scorer, **keys)
        if search != "joint":
            lm = TransformerLM(30, d_model=16, nhead=2, num_encoder_layers=2, d_ffn=16).eval()
            call.add_scorer(TransformerLMScorer(on_device(lm)), 0.5)
            call.graphs = graphs
    elif search == "transducer":
        call = on_device(TransducerSearch(Transducer(32, 30, predictor_size=8, joint_size=8)).eval())
        call.graphs = graphs
    elif search == "n best":
        call = lambda x, lens: ctc_nbest(ctc_lin(x).log_softmax(-1), lens, graphs=graphs)  # noqa: E731
    else:
        call = lambda x, lens: greedy_tokens(ctc_lin(x).log_softmax(-1), lens, 0)  # noqa: E731
    with PretendGpu() as recorder:
        call(x, lens)
    assert recorder.sync_count() <= SYNCS_OF_SEARCHES[search], dict(recorder.syncs)


# ------------------------------------------------------------------ attention at published sizes

SIZES = [
    (path.stem, None) for path in tiny.ARCHITECTURES if not path.stem.endswith("_transducer")
]  # their encoders are those of other files
SIZES += [(name, size) for name in ("squeezeformer", "practical_conformer") for size in encoder_sizes(name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "size"), SIZES)
@pytest.mark.parametrize("key", ["whole", "left 2"])
@torch.no_grad()
def test_attention_has_a_fused_kernel(name, size, dtype, key):
    """With the width and heads of each hparams file, and padding: no full matrix of scores, no copy of the bias."""
    overrides = {"num_encoder_layers": 4, "num_decoder_layers": 0, "d_ffn": 8, "vocab_size": 30, "data_folder": "unused"}
    overrides |= {} if size is None else {"size": size}
    encoder = load_hparams(tiny.ROOT / "hparams" / f"{name}.yaml", overrides)["Transformer"].encoder.eval()
    setting, encoder = setting_of(encoder, key), on_device(encoder.to(dtype))
    with PretendGpu() as recorder:
        x, mask = torch.randn(2, 17, encoder.d_model, dtype=dtype, device=DEVICE), torch.arange(17, device=DEVICE) > 9
        encoder(x, src_key_padding_mask=mask.expand(2, -1), dynchunktrain_config=setting)
    assert set(recorder.attention) <= {"flash", "efficient"}
    assert recorder.attention or "hyperconformer" in name
