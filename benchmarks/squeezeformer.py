"""Inference and training time of the Squeezeformer and of a Conformer of the same width, depth and number of heads.

    python benchmarks/squeezeformer.py [--threads N] [--sizes xs sm] [--output benchmarks/results/squeezeformer.csv]

Times are medians of alternating runs in one process on random features; a ratio below 1 means that the Squeezeformer is faster.
``encoder`` is the encoder alone. ``front end`` adds the subsampling and the input layer. The Squeezeformer has its depthwise
subsampling; the Conformer has the paper's, two regular convolutions with d_model channels. Inference is batch 1 in float32, with
the Squeezeformer as trained and fused. Training is forward and backward on 8 utterances of 10 seconds. ``mac_ratio`` counts all
operations, attention included.
"""

import argparse
from pathlib import Path

import torch

from speechbrain_ext.asr import SpeechEncoder, TransformerASR
from speechbrain_ext.encoders.squeezeformer import SIZES
from speechbrain_ext.lobes.subsampling import ConvolutionSubsampling, DepthwiseSubsampling
from speechbrain_ext.utils.files import write_csv
from speechbrain_ext.utils.measure import count_macs, medians

FIELDS = ("size", "task", "part", "seconds", "conformer_ms", "squeezeformer_ms", "ratio", "fused_ms", "fused_ratio", "mac_ratio")


def build(name, size):
    """Front end and encoder, without feature extraction."""
    size = SIZES[size]
    width = size.d_model
    front_end = ConvolutionSubsampling(80, (width, width)) if name == "conformer" else DepthwiseSubsampling(80, width)
    transformer = TransformerASR(
        128, front_end.output_size, width, size.nhead, size.num_layers, 0, size.d_ffn, encoder_module=name
    )
    return SpeechEncoder(None, None, front_end, transformer).eval()


def forward(net, part, x):
    """Run the front end and encoder, or the encoder alone."""
    if part == "encoder":
        return net.transformer.encoder(x)[0]
    return net.encode_features(x)[0]


def inputs(net, part, batch, seconds):
    """Features of 10 ms, or encoder frames of 40 ms."""
    if part == "encoder":
        return torch.randn(batch, 25 * seconds, net.transformer.encoder.d_model)
    return torch.randn(batch, 100 * seconds, 80)


def macs(net, part, seconds):
    """Multiply-accumulates of a forward pass."""
    return count_macs(lambda x: forward(net, part, x), inputs(net, part, 1, seconds))


def train(net, part, x, dtype):
    """Run forward and backward."""
    net.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = forward(net, part, x).float().square().mean()
    loss.backward()


def compare(size, rounds):
    """Rows of the table for one size."""
    nets = {name: build(name, size) for name in ("conformer", "squeezeformer")}
    fused = build("squeezeformer", size)
    fused.transformer.encoder.fuse_()
    for part in ("encoder", "front end"):
        for seconds in (10, 30, 60):
            calls = {name: (net, part, inputs(net, part, 1, seconds)) for name, net in {**nets, "fused": fused}.items()}
            with torch.no_grad():
                ms = medians({name: lambda call=call: forward(*call) for name, call in calls.items()}, rounds)
            ratio = macs(nets["squeezeformer"], part, seconds) / macs(nets["conformer"], part, seconds)
            yield row(size, "inference", part, seconds, ms, ratio)
    for net in nets.values():
        net.train()
    for part in ("encoder", "front end"):
        for dtype in ("float32", "bfloat16"):
            calls = {name: (net, part, inputs(net, part, 8, 10), dtype) for name, net in nets.items()}
            ms = medians({name: lambda call=call: train(*call) for name, call in calls.items()}, max(3, rounds // 3))
            yield row(size, f"training in {dtype}", part, 10, ms, "")


def row(size, task, part, seconds, ms, macs):
    fused = ms.get("fused")
    return {
        "size": size,
        "task": task,
        "part": part,
        "seconds": seconds,
        "conformer_ms": round(ms["conformer"], 1),
        "squeezeformer_ms": round(ms["squeezeformer"], 1),
        "ratio": round(ms["squeezeformer"] / ms["conformer"], 3),
        "fused_ms": round(fused, 1) if fused else "",
        "fused_ratio": round(fused / ms["conformer"], 3) if fused else "",
        "mac_ratio": round(macs, 3) if macs else "",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", default=["xs", "sm"], choices=list(SIZES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "squeezeformer.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(("{:>18}" * len(FIELDS)).format(*FIELDS))
    for size in arguments.sizes:
        for values in compare(size, arguments.rounds):
            print(("{:>18}" * len(FIELDS)).format(*map(str, values.values())), flush=True)
            rows.append(values)
    write_csv(arguments.output, FIELDS, [values.values() for values in rows])


if __name__ == "__main__":
    main()
