"""Time and state per chunk of the Practical Conformer's first pass and of Conformers, early and late in a stream.

    python benchmarks/practical_conformer.py [--parts stream error] [--output benchmarks/results/practical_conformer.csv]

Needs matplotlib: ``pip install -e '.[plot]'``.
``stream``: encoder alone, batch 1, float32, one thread, medians of alternating runs in one process on random frames of 40 ms. The
Conformers have rotary attention and the same kernel. One has the same width, depth and heads; the large one has 17 blocks. Each
has an unlimited left context, or one of 64 frames. A ratio above 1 means that the large Conformer with an unlimited left context
takes longer for the same chunk at the same time of the stream.
``error``: the relative error of attention with the softmax kernel against softmax attention, by the number of orthogonal or
independent features. It is written to performer_error.csv in the folder of the output, and drawn in docs/images.
"""

import argparse
import copy
import dataclasses
from pathlib import Path

import torch
from matplotlib import pyplot  # imported here, to fail before the timing if it is missing
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext.encoders.practical_conformer import SIZES
from speechbrain_ext.lobes.attention import AttentionState
from speechbrain_ext.lobes.chunk_sums import ChunkSums
from speechbrain_ext.lobes.performer import RandomFeatures, orthogonal_gaussian
from speechbrain_ext.registry import build_encoder
from speechbrain_ext.utils.files import write_csv
from speechbrain_ext.utils.measure import medians

FRAME_MS = 40
CHUNKS = (4, 8, 16)  # frames
LEFT_FRAMES = 64
LARGE = {"d_model": 512, "nhead": 8, "num_layers": 17, "d_ffn": 2048}
REFERENCE = ("conformer_large", "all")
FIELDS = ("encoder", "left_context", "chunk_ms", "after_seconds", "ms_per_chunk", "state_bytes", "ratio")

FEATURES = (16, 32, 64, 128, 256, 512, 1024)
HEAD_SIZE = 64
FRAMES = 256
ERROR_FIELDS = ("input_std", "projection", "features", "median_error", "lower_quartile", "upper_quartile")


def build():
    """Encoders by name."""
    torch.manual_seed(0)
    encoders = {}
    for size in ("s", "m"):
        sizes = dataclasses.asdict(SIZES[size])
        encoders[f"practical_conformer_{size}"] = build_encoder("practical_conformer", size=size)
        encoders[f"conformer_{size}"] = build_encoder("conformer", **sizes, kernel_size=15, attention_type="RoPEMHA")
    encoders["conformer_large"] = build_encoder("conformer", **LARGE, kernel_size=15, attention_type="RoPEMHA")
    return {name: encoder.eval() for name, encoder in encoders.items()}


def filled(encoder, size, left_frames, frames):
    """The context of a stream after a number of frames.

    Two chunks run, and then the state gets its later size: a cache holds all frames of its left context, while sums have a
    constant size. Its values differ from those of a whole stream, but the time per chunk is the same.
    """
    left = None if left_frames is None else left_frames // size
    context = encoder.make_streaming_context(DynChunkTrainConfig(size, left))
    for _ in range(2):
        encoder.forward_streaming(torch.randn(1, size, encoder.d_model), context)
    for layer in context.layers:
        state = layer.mixer
        if isinstance(state, AttentionState):
            kept = frames if left_frames is None else min(frames, left_frames)
            batch, heads, _, width = state.keys.shape
            state.keys, state.values = torch.randn(2, batch, heads, kept, width).unbind(0)
            state.frames = frames
        elif isinstance(state, ChunkSums):
            state.sums = state.sums * (frames / (2 * size))
    return context


def fork(context):
    """A copy of a state for one call; its tensors can be shared, because layers replace them and never write into them."""
    layers = [dataclasses.replace(layer, mixer=copy.copy(layer.mixer)) for layer in context.layers]
    return dataclasses.replace(context, layers=layers)


def stream_rows(seconds, rounds):
    """Rows of the table, for each chunk size and time of the stream."""
    encoders = build()
    for size in CHUNKS:
        for after in seconds:
            calls, contexts = {}, {}
            for name, encoder in encoders.items():
                for left in (None,) if name.startswith("practical") else (None, LEFT_FRAMES):
                    key = (name, "all" if left is None else left)
                    contexts[key] = filled(encoder, size, left, round(1000 * after / FRAME_MS))
                    chunk = torch.randn(1, size, encoder.d_model)
                    calls[key] = lambda encoder=encoder, chunk=chunk, context=contexts[key]: encoder.forward_streaming(
                        chunk, fork(context)
                    )
            ms = medians(calls, rounds, warmup=2)
            for key, value in ms.items():
                ratio = ms[REFERENCE] / value
                yield (*key, FRAME_MS * size, after, round(value, 3), contexts[key].state_bytes(), round(ratio, 2))


def error_rows(draws):
    """Errors by the number of features: medians and quartiles over draws of the features, for the same inputs."""
    generator = torch.Generator().manual_seed(0)
    kinds = {"orthogonal": orthogonal_gaussian, "independent": lambda *shape: torch.randn(*shape[:2], generator=shape[2])}
    for std in (0.5, 1.0):
        query, key = std * torch.randn(2, FRAMES, HEAD_SIZE, generator=generator, dtype=torch.float64)
        value = torch.randn(FRAMES, HEAD_SIZE, generator=generator, dtype=torch.float64)
        exact = (query @ key.T * HEAD_SIZE**-0.5).softmax(-1) @ value
        for kind, draw in kinds.items():
            for count in FEATURES:
                features, errors = RandomFeatures(HEAD_SIZE, "softmax", count).double(), []
                for _ in range(draws):
                    features.projection = draw(count, HEAD_SIZE, generator).double()
                    phi, psi = features(query, key)
                    weights = phi @ psi.T
                    y = weights @ value / weights.sum(-1, keepdim=True)
                    errors.append((y - exact).norm() / exact.norm())
                quartiles = torch.stack(errors).quantile(torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64))
                yield (std, kind, count, *(round(error.item(), 4) for error in quartiles))


def draw_errors(rows, path):
    """Draw a line for each kind of features and each standard deviation of the inputs."""
    figure, axes = pyplot.subplots(figsize=(5.5, 3.8))
    for colour, std in zip(("C0", "C1"), sorted({row[0] for row in rows}), strict=True):
        for style, kind in (("-", "orthogonal"), ("--", "independent")):
            _, _, features, median, lower, upper = zip(*(row for row in rows if row[:2] == (std, kind)), strict=True)
            axes.plot(features, median, style, color=colour, label=f"{kind}, inputs of standard deviation {std}")
            axes.fill_between(features, lower, upper, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="features", ylabel="relative error against softmax attention", xscale="log", yscale="log")
    axes.set_xticks(FEATURES, map(str, FEATURES))
    errors = (0.2, 0.5, 1, 2, 5)
    axes.set_yticks(errors, map(str, errors))
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["stream", "error"], choices=["stream", "error"])
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 60, 600], help="times of the stream to measure")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--draws", type=int, default=50, help="draws of random features")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "practical_conformer.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "stream" in arguments.parts:
        rows = []
        print(("{:>22}" + "{:>14}" * (len(FIELDS) - 1)).format(*FIELDS))
        for row in stream_rows(arguments.seconds, arguments.rounds):
            rows.append(row)
            print(("{:>22}" + "{:>14}" * (len(FIELDS) - 1)).format(*map(str, row)), flush=True)
        write_csv(arguments.output, FIELDS, rows)
    if "error" in arguments.parts:
        rows = list(error_rows(arguments.draws))
        path = arguments.output.with_name("performer_error.csv")
        write_csv(path, ERROR_FIELDS, rows)
        draw_errors(rows, Path(__file__).resolve().parents[1] / "docs" / "images" / "performer_error.png")


if __name__ == "__main__":
    main()
