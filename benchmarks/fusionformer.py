"""Time of the FusionFormer, fused and not, against a Conformer of the same size with LayerNorm, Swish and GLU.

    python benchmarks/fusionformer.py [--threads 1 2] [--compiled] [--output benchmarks/results/fusionformer.csv]

Both have rotary attention with the same kernel, and the same convolution layout. Only normalisation and activation differ, and
the width of the first pointwise layer, which a GLU would halve. Encoder alone, batch 1, float32, medians of alternating runs in
one process; a ratio above 1 means that the Conformer takes longer. ``stream`` is the time per chunk of 640 ms with 10 chunks of
left context, after 20 chunks.
"""

import argparse
from pathlib import Path

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.registry import build_encoder
from speechbrain_ext.utils.files import write_csv
from speechbrain_ext.utils.measure import medians

SIZES = {"d_model": 256, "nhead": 4, "num_layers": 12, "d_ffn": 1024}
CHUNKS = DynChunkTrainConfig(16, 10)
FIELDS = ("task", "seconds", "threads", "mode", "conformer_ms", "unfused_ms", "fused_ms", "unfused_ratio", "fused_ratio")


def build():
    """The three encoders."""
    torch.manual_seed(0)
    unfused = build_encoder("fusionformer", **SIZES).eval()
    fused = build_encoder("fusionformer", **SIZES, fused=True).eval()
    return {"conformer": build_encoder("conformer", **SIZES, attention_type="RoPEMHA").eval(), "unfused": unfused, "fused": fused}


def streams(encoders):
    """A call for each encoder that streams the next chunk; the state already has its full size."""
    calls = {}
    for name, encoder in encoders.items():
        context = encoder.make_streaming_context(CHUNKS)
        chunk = torch.randn(1, CHUNKS.chunk_size, SIZES["d_model"])
        for _ in range(20):
            encoder.forward_streaming(chunk, context)
        calls[name] = lambda encoder=encoder, chunk=chunk, context=context: encoder.forward_streaming(chunk, context)
    return calls


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true", help="also compiled; needs a C++ compiler")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fusionformer.csv")
    arguments = parser.parse_args()
    rows = []
    print(("{:>14}" * len(FIELDS)).format(*FIELDS))
    for mode in ("eager", "compiled") if arguments.compiled else ("eager",):
        encoders = build()
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            nets = {name: torch.compile(net, dynamic=True) if mode == "compiled" else net for name, net in encoders.items()}
            for task, seconds in (*(("whole", seconds) for seconds in (5, 10, 30, 60)), ("stream", 0.64)):
                if task == "stream":
                    if mode == "compiled":
                        continue
                    calls, rounds = streams(encoders), 10 * arguments.rounds
                else:
                    x, rounds = torch.randn(1, round(25 * seconds), SIZES["d_model"]), arguments.rounds
                    calls = {name: lambda net=net, x=x: net(x) for name, net in nets.items()}
                ms = medians(calls, rounds, warmup=2)
                ratios = [round(ms["conformer"] / ms[name], 3) for name in ("unfused", "fused")]
                rows.append((task, seconds, threads, mode, *(round(value, 2) for value in ms.values()), *ratios))
                print(("{:>14}" * len(FIELDS)).format(*map(str, rows[-1])), flush=True)
    write_csv(arguments.output, FIELDS, rows)


if __name__ == "__main__":
    main()
