"""FusionFormer: fusing is exact and complete, the variants are right, and several processes train like one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.encoders.fusionformer import VARIANTS
from speechbrain_ext.lobes.fusible import MaskedBatchNorm, reestimate_statistics
from speechbrain_ext.lobes.subsampling import FusibleSubsampling
from speechbrain_ext.registry import build_encoder

SMALL = {"d_model": 32, "nhead": 4, "num_layers": 3, "d_ffn": 64, "kernel_size": 7}


def trained(seed=0, **keys):
    """An encoder with random weights and statistics."""
    torch.manual_seed(seed)
    encoder = build_encoder("fusionformer", **{**SMALL, **keys})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        reestimate_statistics(encoder, [torch.randn(4, 60, encoder.d_model)], encoder)
        for norm in encoder.modules():
            if isinstance(norm, MaskedBatchNorm):
                norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.5, 2))
    return encoder


def stream(encoder, x, setting):
    context = encoder.make_streaming_context(setting)
    return torch.cat([encoder.forward_streaming(chunk, context)[0] for chunk in x.split(setting.chunk_size, dim=1)], dim=1)


@pytest.mark.parametrize("attention_type", ["RoPEMHA", "RelPosMHAXL"])
@torch.no_grad()
def test_fused_is_unfused_at_full_size(attention_type):
    encoder = trained(d_model=256, num_layers=12, d_ffn=1024, kernel_size=31, attention_type=attention_type)
    x, setting = torch.randn(2, 133, 256), DynChunkTrainConfig(16, 4)
    mask = torch.arange(133) >= torch.tensor([[133], [70]])
    before = encoder(x, src_key_padding_mask=mask)[0], encoder(x, dynchunktrain_config=setting)[0]
    encoder.fuse_()
    torch.testing.assert_close(encoder(x, src_key_padding_mask=mask)[0], before[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(encoder(x, dynchunktrain_config=setting)[0], before[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(stream(encoder, x, setting), before[1], atol=1e-4, rtol=0)


def test_fused_holds_no_normalisation():
    encoder = trained().fuse_()
    norms = (MaskedBatchNorm, torch.nn.LayerNorm, torch.nn.modules.batchnorm._BatchNorm)
    assert not [part for part in encoder.modules() if isinstance(part, norms)]
    assert not list(encoder.buffers())
    other = build_encoder("fusionformer", **SMALL, fused=True)
    other.load_state_dict(encoder.state_dict())
    x = torch.randn(1, 20, 32)
    assert torch.equal(other.eval()(x)[0], encoder(x)[0])


@torch.no_grad()
def test_its_blocks_begin_as_the_identity():
    layers = build_encoder("fusionformer", **SMALL).layers
    x = torch.randn(2, 20, 32)
    assert torch.equal(layers(x), x) and torch.equal(layers.eval()(x), x)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_variant_is_padding_exact_and_streams(variant):
    """In float64: a BatchNorm in place of a LayerNorm can enlarge rounding errors."""
    encoder, setting = trained(variant=variant).double(), DynChunkTrainConfig(6, 2)
    x = 3 * torch.randn(2, 40, 32, dtype=torch.float64)
    mask = torch.arange(40) >= torch.tensor([[40], [17]])
    batched, _ = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(batched[1, :17], encoder(x[1:, :17])[0][0], atol=1e-9, rtol=1e-9)
    # The tables of positions are float32
    torch.testing.assert_close(stream(encoder, x, setting), encoder(x, dynchunktrain_config=setting)[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_layer_norm_variant_is_the_conformer():
    keys = {**SMALL, "attention_type": "RoPEMHA"}
    ours, conformer = trained(variant="layer_norm"), build_encoder("conformer", **keys).eval()
    names = {"ffn1.norm": "ffn1.0", "ffn1.linear1": "ffn1.1", "ffn1.linear2": "ffn1.4"}
    names |= {old.replace("ffn1", "ffn2"): new.replace("ffn1", "ffn2") for old, new in names.items()}
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name.replace("output.", "norm.")] = value
    conformer.load_state_dict(state)
    conformer.norm.eps = ours.output.eps
    x = torch.randn(2, 30, 32)
    torch.testing.assert_close(ours(x)[0], conformer(x)[0], atol=1e-4, rtol=0)


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="variant 'bn'.*fusionformer, batch_norm_behind_each.*layer_norm, no_norm"):
        build_encoder("fusionformer", variant="bn")


@torch.no_grad()
def test_the_front_end_folds_and_is_padding_exact():
    torch.manual_seed(0)
    net = FusibleSubsampling(80)
    lengths = torch.tensor([101, 57])
    x = torch.randn(2, 101, 80).masked_fill(torch.arange(101)[:, None] >= lengths[:, None, None], 7.0)
    trained_on, _ = net(x, lengths / 101)
    mean = net.stages[0]["norm"].running_mean.clone()
    other = FusibleSubsampling(80)
    other.load_state_dict(net.state_dict())
    net.eval()
    before, relative = net(x, lengths / 101)
    torch.testing.assert_close(before[1, :15], net(x[1:, :57])[0][0], atol=1e-5, rtol=0)
    fused = FusibleSubsampling(80, fused=True)
    fused.load_state_dict(net.fuse_().state_dict())
    torch.testing.assert_close(fused(x, lengths / 101)[0], before, atol=1e-5, rtol=0)
    assert net.fuse_() is net and not list(net.buffers())
    assert trained_on.isfinite().all() and mean.abs().sum() > 0


# ---------------------------------------------------------------------- several processes

CURVE = Path(__file__).with_name("curve.py")


def curve(encoder, processes, folder):
    """Losses and final statistics of a short training in a number of processes."""
    output = folder / f"{encoder}_{processes}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [sys.executable, *launcher, str(CURVE), encoder, str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(output.read_text())


@pytest.mark.parametrize("encoder", ["fusionformer", "squeezeformer", "conformer"])
def test_two_processes_train_as_one_with_the_double_batch(encoder, tmp_path):
    one, two = (curve(encoder, processes, tmp_path) for processes in (1, 2))
    losses = torch.tensor(one["losses"])
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(torch.tensor(two["losses"]), losses, atol=1e-4, rtol=1e-4)
    assert len(one["statistics"]) == len(two["statistics"]) and (encoder == "conformer") == (not one["statistics"])
    for ours, theirs in zip(two["statistics"], one["statistics"], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=1e-4)
