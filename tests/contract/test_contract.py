"""The encoder contract for all registered encoders. A new encoder needs no new line here."""

import copy
import io
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PAGE_ENCODERS
from speechbrain.nnet.adapters import AdaptedModel, LoRA
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.lobes.stack import Stack, begin_as_identity
from speechbrain_ext.registry import build_encoder, encoder_keys, list_encoders
from speechbrain_ext.utils.errors import UserError

CHUNKS = [(16, 2), (16, None), (4, 0), (2, 5), (6, 1)]


def padding(lengths, frames):
    return torch.arange(frames) >= torch.tensor(lengths).unsqueeze(1)


def config(encoder, size, left):
    return DynChunkTrainConfig(size * encoder.chunk_multiple, left)


def stream(encoder, x, setting):
    context = encoder.make_streaming_context(setting)
    chunks = [encoder.forward_streaming(chunk, context)[0] for chunk in x.split(setting.chunk_size, dim=1)]
    return torch.cat(chunks, dim=1), context


@pytest.mark.parametrize("lengths", [(40, 40), (1, 60), (37, 101), (99, 100), (50, 51, 400), (64, 3, 1, 200)])
@pytest.mark.parametrize("chunks", [None, (8, 1), (5, None)])
@torch.no_grad()
def test_padding_never_reaches_a_valid_frame(encoder, lengths, chunks):
    setting = None if chunks is None else config(encoder, *chunks)
    x = 3 * torch.randn(len(lengths), max(lengths), encoder.d_model)
    mask = padding(lengths, max(lengths))
    batched, maps = encoder(
        x.masked_fill(mask.unsqueeze(-1), float("nan")), src_key_padding_mask=mask, dynchunktrain_config=setting
    )
    assert maps == []
    for i, length in enumerate(lengths):
        alone, _ = encoder(x[i : i + 1, :length], dynchunktrain_config=setting)
        torch.testing.assert_close(batched[i, :length], alone[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mask_without_padding_changes_nothing(encoder):
    x = torch.randn(2, 33, encoder.d_model)
    with_mask, _ = encoder(x, src_key_padding_mask=torch.zeros(2, 33, dtype=torch.bool))
    torch.testing.assert_close(with_mask, encoder(x)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("frames", [1, 16, 33, 150])
@torch.no_grad()
def test_chunked_equals_masked(streaming_encoder, chunks, frames):
    encoder, setting = streaming_encoder, config(streaming_encoder, *chunks)
    x = torch.randn(2, frames, encoder.d_model)
    streamed, _ = stream(encoder, x, setting)
    torch.testing.assert_close(streamed, encoder(x, dynchunktrain_config=setting)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", CHUNKS)
@torch.no_grad()
def test_no_look_ahead_past_the_chunk(streaming_encoder, chunks):
    encoder, setting = streaming_encoder, config(streaming_encoder, *chunks)
    x = torch.randn(1, 100, encoder.d_model)
    before, _ = encoder(x, dynchunktrain_config=setting)
    for end in range(setting.chunk_size, 100, 3 * setting.chunk_size):
        changed = x.clone()
        changed[:, end:] = 10 * torch.randn_like(changed[:, end:])
        after, _ = encoder(changed, dynchunktrain_config=setting)
        torch.testing.assert_close(after[:, :end], before[:, :end], atol=1e-6, rtol=0)
        assert not torch.allclose(after[:, end:], before[:, end:])


@torch.no_grad()
def test_left_context_is_limited(streaming_encoder):
    """Each layer extends the reach by the left context and a few frames of the convolution. Earlier frames have no influence."""
    encoder = streaming_encoder
    size = 32 * encoder.chunk_multiple  # longer than any kernel's reach
    x = torch.randn(1, 12 * size, 32)
    changed = x.clone()
    changed[:, :size] = torch.randn_like(changed[:, :size])
    setting = DynChunkTrainConfig(size, 1)
    difference = (encoder(x, dynchunktrain_config=setting)[0] - encoder(changed, dynchunktrain_config=setting)[0]).abs()
    assert difference[:, size : 2 * size].amax() > 1e-3
    # Four layers, each one chunk of mixing and at most one of convolution.
    assert difference[:, 9 * size :].amax() < 1e-5


@torch.no_grad()
def test_streaming_state_is_bounded_and_reported(streaming_encoder):
    encoder = streaming_encoder
    setting = config(encoder, 4, 3)
    sizes = []
    context = encoder.make_streaming_context(setting)
    for _ in range(40):
        encoder.forward_streaming(torch.randn(1, setting.chunk_size, encoder.d_model), context)
        sizes.append(context.state_bytes())
    assert sizes[0] > 0 and len(set(sizes[10:])) == 1


@torch.no_grad()
def test_streaming_refuses_wrong_chunks(streaming_encoder):
    encoder, setting = streaming_encoder, config(streaming_encoder, 4, 1)
    size = setting.chunk_size
    context = encoder.make_streaming_context(setting)
    with pytest.raises(ValueError, match=f"{size + 1} frames"):
        encoder.forward_streaming(torch.randn(1, size + 1, encoder.d_model), context)
    encoder.forward_streaming(torch.randn(1, size, encoder.d_model), context)
    for shape, message in (
        ((2, 1, encoder.d_model), "has 2 streams, but this streaming context has 1"),
        ((1, 1, encoder.d_model + 1), rf"\(1, 1, {encoder.d_model + 1}\); give \(streams, frames, {encoder.d_model}\)"),
        ((1, encoder.d_model), r"give \(streams, frames, "),
    ):
        with pytest.raises(UserError, match=message):
            encoder.forward_streaming(torch.randn(shape), context)
    encoder.forward_streaming(torch.randn(1, 1, encoder.d_model), context)  # those have not ended it
    with pytest.raises(ValueError, match="ended this stream"):
        encoder.forward_streaming(torch.randn(1, size, encoder.d_model), context)
    sizes = [DynChunkTrainConfig(wrong, 1) for wrong in (0, float(size), str(size), True)]
    lefts = [DynChunkTrainConfig(size, wrong) for wrong in (-1, 1.5, "1")]
    for bad in (*sizes, *lefts, size):
        with pytest.raises(ValueError, match="The (chunk size|left context|chunk setting) is .*(needs|give) a"):
            encoder.make_streaming_context(bad)
        with pytest.raises(ValueError, match="The (chunk size|left context|chunk setting) is .*(needs|give) a"):
            encoder(torch.randn(1, 9, encoder.d_model), dynchunktrain_config=bad)


@torch.no_grad()
def test_wrong_inputs_are_refused(encoder):
    x, mask = torch.randn(2, 9, encoder.d_model), padding((9, 5), 9)
    for wrong in (x[0], x[:, :0], x[..., 1:], x.unsqueeze(1)):
        with pytest.raises(UserError, match=rf"input has the shape \(.*; give \(B, T, {encoder.d_model}\) with at least one"):
            encoder(wrong)
    for wrong in (mask.float(), mask.byte(), mask[:, :8], mask[:, :1], mask[:1], mask[0]):
        with pytest.raises(UserError, match=r"mask is torch\..* \(.*\); give torch.bool \(2, 9\), True = padding"):
            encoder(x, src_key_padding_mask=wrong)
    with pytest.raises(UserError, match="src_mask is given, which .*; give the padding as src_key_padding_mask"):
        encoder(x, mask)  # the padding mask in the wrong place
    chunks = DynChunkTrainConfig(encoder.chunk_multiple, None)  # SpeechBrain makes a mask from it
    assert torch.equal(encoder(x, torch.ones(9, 9), mask, None, chunks)[0], encoder(x, None, mask, None, chunks)[0])


def test_adapters_of_speechbrain_train_every_linear_layer(encoder_case):
    name, keys = encoder_case
    torch.manual_seed(0)
    model = TransformerASR(9, 20, 16, 2, 4, 0, 32, encoder_module=name, encoder_kwargs=keys).eval()
    x = torch.randn(2, 30, 20)
    expected = model.encode(x).detach()
    adapted = AdaptedModel(model, adapter_class=LoRA, all_linear=True, adapter_kwargs={"rank": 2})
    torch.testing.assert_close(adapted.encode(x), expected)  # they begin with no effect
    adapted.encode(x).square().sum().backward()
    trained = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) > 10 and all(gradient is not None and gradient.isfinite().all() for gradient in trained)


@torch.no_grad()
def test_the_context_of_another_encoder_is_refused():
    small, large = (build_encoder("conformer", d_model=8, nhead=2, num_layers=layers, d_ffn=16).eval() for layers in (1, 2))
    with pytest.raises(UserError, match="has 1 layers, and the encoder 2; make it with make_streaming_context"):
        large.forward_streaming(torch.randn(1, 4, 8), small.make_streaming_context(DynChunkTrainConfig(4)))


@pytest.mark.parametrize("frames", [1, 2, 15_000])  # 15,000 frames of 40 ms: ten minutes
@torch.no_grad()
def test_any_length(encoder_case, frames):
    encoder = build_encoder(encoder_case[0], d_model=8, nhead=2, num_layers=2, d_ffn=16, **encoder_case[1]).eval()
    out, _ = encoder(torch.randn(1, frames, 8))
    assert out.shape == (1, frames, 8) and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [None, (4, 1)])
def test_every_parameter_gets_a_finite_gradient(encoder, dtype, chunks):
    encoder.train()
    setting = None if chunks is None else config(encoder, *chunks)
    x = torch.randn(3, 50, encoder.d_model)
    # The last utterance is short: in chunks, some padded queries see only padding.
    mask = padding((50, 31, 2), 50)
    x = x.masked_fill(mask.unsqueeze(-1), float("nan"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        out, _ = encoder(x, src_key_padding_mask=mask, dynchunktrain_config=setting)
    assert out.isfinite().all()
    out.float().square().mean().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"


@torch.no_grad()
def test_bfloat16_weights(encoder):
    x = torch.randn(1, 40, encoder.d_model)
    reference, _ = encoder(x)
    low, _ = copy.deepcopy(encoder).bfloat16()(x.bfloat16(), src_key_padding_mask=torch.zeros(1, 40, dtype=torch.bool))
    assert low.dtype is torch.bfloat16
    assert (low.float() - reference).abs().mean() < 0.1 * reference.std()


@torch.no_grad()
def test_state_dict_round_trip(encoder_case, encoder):
    buffer = io.BytesIO()
    torch.save(encoder.state_dict(), buffer)
    buffer.seek(0)
    name, keys = encoder_case
    other = build_encoder(name, d_model=32, nhead=4, num_layers=4, d_ffn=64, **keys).eval()
    other.load_state_dict(torch.load(buffer), strict=True)
    x = torch.randn(2, 30, 32)
    assert torch.equal(encoder(x)[0], other(x)[0])
    assert torch.equal(encoder(x)[0], copy.deepcopy(encoder)(x)[0])


@torch.no_grad()
def test_fuse_is_exact_and_idempotent(encoder):
    x = torch.randn(2, 30, encoder.d_model)
    before, _ = encoder(x)
    assert encoder.fuse_() is encoder
    once, _ = encoder(x)
    torch.testing.assert_close(once, before, atol=1e-4, rtol=0)
    encoder.fuse_()
    assert torch.equal(encoder(x)[0], once)


@torch.no_grad()
def test_positions_matter(encoder):
    """Frames in another order give other outputs, not the same outputs reordered."""
    x = torch.randn(1, 64, encoder.d_model)
    out, _ = encoder(x)
    assert (encoder(x.flip(1))[0].flip(1) - out).abs().max() > 1e-3


class Masked(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, mask):
        return self.encoder(x, src_key_padding_mask=mask)[0]


def test_begins_as_identity(encoder):
    """Each output frame depends on its own frame. Training reaches the end of every branch; of nested ones in the third step."""
    try:
        begin_as_identity(encoder)
    except UserError as error:
        assert "branch_end" in str(error)
        return
    x = torch.randn(2, 23, encoder.d_model, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 9] = 1.0
    with torch.no_grad():
        moved = (encoder(x)[0] - encoder(changed)[0]).abs().amax((0, 2)) > 1e-5
    assert moved.nonzero().tolist() == [[9]]
    encoder.train()
    optimizer, weights = torch.optim.Adam(encoder.parameters(), lr=1e-3), torch.rand(encoder.d_model)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        encoder(x)[0].square().mul(weights).sum().backward()
    for part in encoder.modules():
        if hasattr(part, "branch_end"):
            end = getattr(part.branch_end, "norm", None) or part.branch_end
            assert next(end.parameters()).grad.abs().sum() > 0


def test_recomputed_activations_give_the_same_gradients(encoder):
    """And the same statistics, with the same dropout; at most a third of the memory is kept for the gradient."""
    twin, kept = copy.deepcopy(encoder).train(), []
    for part in twin.modules():
        if isinstance(part, Stack):
            part.recomputes = True
            for layer in part:
                layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].nbytes))  # kept by the checkpoint
    x, mask, sizes = torch.randn(3, 60, encoder.d_model), padding((60, 40, 20), 60), []
    for model in (encoder.train(), twin):
        tensors = {}
        torch.manual_seed(0)

        def pack(tensor, tensors=tensors):
            tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, _ = model(x, src_key_padding_mask=mask)
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        sizes.append(sum(size for place, size in tensors.items() if place not in weights))
        kept, before = [], sum(kept)
        y.square().mean().backward()
    assert sizes[1] + before <= sizes[0] / 3
    for (name, ours), theirs in zip(encoder.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(encoder.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    torch.compile(twin, backend="aot_eager")(x[:1, :8])[0].sum().backward()  # a compiler decides itself what to recompute


@torch.no_grad()
def test_compiles_without_graph_break(encoder):
    torch._dynamo.reset()
    x, mask = torch.randn(2, 40, encoder.d_model), padding((40, 21), 40)
    for setting in (None, config(encoder, 4, 1)):
        explained = torch._dynamo.explain(encoder)(x, src_key_padding_mask=mask, dynchunktrain_config=setting)
        assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for setting in (config(encoder, 4, 1), config(encoder, 8, 2), config(encoder, 12, 1)):  # from the second on, symbolic
        compiled(x, src_key_padding_mask=mask, dynchunktrain_config=setting)


@torch.no_grad()
def test_compiled_gives_the_same(encoder):
    torch._dynamo.reset()
    x, mask = torch.randn(2, 300, encoder.d_model), padding((300, 21), 300)  # more queries than one block of attention
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=mask)[0], encoder(x, src_key_padding_mask=mask)[0], atol=1e-5, rtol=0
    )


def test_compiled_training_gives_the_same_gradients(encoder):
    """And the same buffers. With this loss a final normalisation does not make the gradient vanish."""
    torch._dynamo.reset()
    compiled_encoder, mask = copy.deepcopy(encoder.double()), padding((40, 21), 40)
    x = torch.randn(2, 40, encoder.d_model, dtype=torch.float64)
    weights = torch.randn(2, 40, encoder.d_model, dtype=torch.float64)
    encoders = (encoder, torch.compile(compiled_encoder, fullgraph=True, backend="aot_eager"))
    for net in encoders:
        net.train()
        for part in net.modules():  # random numbers differ between the two
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            elif isinstance(getattr(part, "dropout", None), float):
                part.dropout = 0.0
        (net(x, src_key_padding_mask=mask)[0] * weights).sum().backward()
    for (name, ours), theirs in zip(encoder.named_parameters(), compiled_encoder.parameters(), strict=True):
        torch.testing.assert_close(
            theirs.grad, ours.grad, atol=1e-6, rtol=1e-6, msg=lambda message, name=name: f"{name}: {message}"
        )
    for ours, theirs in zip(encoder.buffers(), compiled_encoder.buffers(), strict=True):
        torch.testing.assert_close(theirs, ours)


@torch.no_grad()
def test_exports_with_dynamic_batch_and_time(encoder, tmp_path):
    """To PyTorch's graph, and from that to ONNX."""
    x, mask = torch.randn(2, 40, encoder.d_model), padding((40, 21), 40)
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    program = torch.export.export(Masked(encoder).eval(), (x, mask), dynamic_shapes=(free, free))
    exported = program.module()
    for lengths in ((1,), (7,), (3, 100, 50), (200, 3200)):
        x, mask = torch.randn(len(lengths), max(lengths), encoder.d_model), padding(lengths, max(lengths))
        torch.testing.assert_close(exported(x, mask), encoder(x, src_key_padding_mask=mask)[0], atol=1e-5, rtol=0)

    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install -e .[dev]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install -e .[dev]")
    path = str(tmp_path / "encoder.onnx")
    torch.onnx.export(program, (), path, input_names=["x", "mask"], output_names=["out"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for lengths in ((2,), (40, 21), (64, 3, 150)):
        x, mask = torch.randn(len(lengths), max(lengths), encoder.d_model), padding(lengths, max(lengths))
        (out,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), encoder(x, src_key_padding_mask=mask)[0], atol=1e-4, rtol=0)


def test_unknown_names_and_keys_fail_at_once():
    with pytest.raises(ValueError, match="'squeezformer'.*" + ", ".join(list_encoders())):
        build_encoder("squeezformer")
    for name in list_encoders():
        with pytest.raises(TypeError, match=f"'{name}' has no key 'n_layers'.*num_layers"):
            build_encoder(name, n_layers=3)
        with pytest.raises(ValueError, match="30"):
            build_encoder(name, d_model=30, nhead=4, num_layers=1)


def test_chunks_fit_all_blocks():
    blocks = [torch.nn.Identity() for _ in range(3)]
    blocks[0].chunk_multiple, blocks[2].chunk_multiple = 3, 2
    assert Stack(blocks).chunk_multiple == 6


@pytest.mark.parametrize("key", ["d_model", "nhead", "num_layers", "d_ffn"])
@pytest.mark.parametrize("size", [0, -1, 2.0, "8", True])
def test_impossible_sizes_are_refused(key, size):
    for name in list_encoders():
        if name not in PAGE_ENCODERS:
            with pytest.raises(ValueError, match=rf"{key}.* is {size!r}; give a"):
                build_encoder(name, **{"d_model": 16, "nhead": 2, "num_layers": 2, "d_ffn": 32, key: size})


@pytest.mark.parametrize(
    "keys, message",
    [
        *(({"dropout": wrong}, f"The dropout is {wrong!r}; give a number") for wrong in ("0.1", 1.5, float("nan"))),
        ({"kernel_size": 3.0}, "kernel.* 3.0"),
        ({"kernel_size": "3"}, "kernel.* '3'"),
        ({"activation": "relu"}, "activation is 'relu'; give its class"),
        ({"reduce_before": 1.0, "recover_before": 2}, "There is no block 1.0"),
        ({"eps": "x"}, "eps 'x'"),
        ({"momentum": None}, "momentum None"),
        ({"size": ["xs"]}, r"of size '\['xs'\]'"),
    ],
)
def test_impossible_keys_are_refused(keys, message):
    names = [name for name in list_encoders() if name not in PAGE_ENCODERS and set(keys) <= set(encoder_keys(name))]
    assert names
    for name in names:
        sizes = {} if "size" in keys else {"d_model": 16, "nhead": 2, "num_layers": 3, "d_ffn": 64}
        with pytest.raises(UserError, match=message):
            build_encoder(name, **sizes, **keys)


@torch.no_grad()
def test_sizes_may_be_numbers_of_numpy(encoder_case):
    name, keys = encoder_case
    sizes = {"d_model": 16, "nhead": 2, "num_layers": 4, "d_ffn": 32}
    answers = []
    for kind, number in ((int, float), (np.int64, np.float32)):
        torch.manual_seed(0)
        encoder = build_encoder(name, **{key: kind(size) for key, size in sizes.items()}, dropout=number(0.1), **keys).eval()
        x, context = torch.randn(1, 9, 16), encoder.make_streaming_context(DynChunkTrainConfig(kind(4), kind(1)))
        answers.append([encoder(x)[0], *(encoder.forward_streaming(chunk, context)[0] for chunk in x.split(4, 1))])
    assert all(torch.equal(*pair) and pair[1].dtype == torch.float32 for pair in zip(*answers, strict=True))


def test_sensible_defaults(encoder_case):
    assert sum(p.numel() for p in build_encoder(encoder_case[0]).parameters()) > 1_000_000


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64" or "LD_PRELOAD" in os.environ,
    reason="torch's memory may not come from glibc here",
)
def test_memory_given_back_is_kept_for_the_next_call():
    code = """if True:
        import resource, torch
        from speechbrain_ext.utils.machine import keep_freed_memory
        keep_freed_memory()

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.ones(2**21) for _ in range(5)]  # 40 MiB, 4 KiB a fault
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        counts = [faults() for _ in range(15)]  # the first calls find their places in the heap
        print(sum(counts[-5:]))"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 5000  # without keep_freed_memory 40,000
