"""Draw the pictures of README and documentation: blocks from the encoders' modules, curves from result files.

    python benchmarks/drawings.py

Each picture is written to docs/images/ twice, for light and dark pages.
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from speechbrain_ext.bench.report import plot_cost
from speechbrain_ext.lobes.temporal_unet import TemporalUNet
from speechbrain_ext.registry import build_encoder
from speechbrain_ext.training.report import read_log
from speechbrain_ext.utils.files import read_csv

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
BENCH = ROOT / "recipes" / "LibriSpeech" / "results" / "bench" / "intel-xeon-processor-2-threads.csv"
PEERS, PEERS_SET = ROOT / "benchmarks" / "results" / "peers.csv", "test-librispeech"
FINE_TUNING = ROOT / "benchmarks" / "results" / "fine_tuning.csv"
TUNED_ON = {"test-speechocean": "new speech: test-speechocean", "test-librispeech": "earlier speech: test-librispeech"}
GPU = ROOT / "benchmarks" / "results" / "gpu_training.csv"
LOGS = ROOT / "recipes" / "MiniLibriSpeech" / "results" / "logs"

THEMES = {
    "light": {"ink": "#1f2430", "quiet": "#5b6472", "line": "#8a93a1", "grid": "#d9dde3", "fill": 1.0},
    "dark": {"ink": "#e8ebf0", "quiet": "#a6aebb", "line": "#7d8796", "grid": "#3b424e", "fill": 0.55},
}
COLORS = {
    "feed-forward": "#f3d38b",
    "mixer": "#9cc7ee",
    "convolution": "#a9d9b0",
    "norm": "#d9d4e6",
    "second": "#c5b7e8",
    "head": "#f0b7a4",
}
# Class of a part -> its name in a drawing, None = not drawn; other classes are replaced by their children
PARTS = {
    "LayerNorm": "LayerNorm",
    "_LayerNorm": "LayerNorm",
    "MaskedBatchNorm": "BatchNorm",
    "Linear": "Linear",
    "ScaledLinear": "Scale, Linear",
    "Swish": "Swish",
    "ReLU": "ReLU",
    "GLU": "GLU",
    "Conv1d": "Depthwise",
    "Dropout": None,
    "Unchanged": None,
}
BETWEEN = {"ConvolutionModule": "GLU", "SwishConvolutionModule": "Swish"}
"""The function after the first layer of a convolution module, which is not a module."""
MIXERS = {
    "RelativeSelfAttention": ("Self-attention", "relative positions"),
    "RotarySelfAttention": ("Self-attention", "rotary positions"),
    "HyperMixing": ("HyperMixing", "MLP over time, generated weights"),
    "PerformerAttention": ("Performer attention", "state: a running sum"),
}


def parts_of(module):
    """Names of the parts of a module, in order."""
    name = type(module).__name__
    if name in PARTS:
        return [PARTS[name]] if PARTS[name] else []
    names = []
    for key, child in module.named_children():
        names += parts_of(child)
        if key == "pointwise1" and name in BETWEEN:
            names.append(BETWEEN[name])
    return names


def steps_of(layer):
    """The steps of a block, in order: (colour, title, parts, factor of the residual branch or None for a norm)."""
    steps, before = [], []
    post_norm = hasattr(layer, "ffn1_norm")
    for name, child in layer.named_children():
        if name == "dropout" or type(child).__name__ == "Unchanged":
            continue
        if name == "mixer":
            title, detail = MIXERS[type(child).__name__]
            ends = [part for key in ("qkv", "out") if hasattr(child, key) for part in parts_of(getattr(child, key))]
            norms = " + BatchNorm" if any("BatchNorm" in part for part in ends) else ""
            scale = "Scale, " if any("Scale" in part for part in ends) else ""
            steps.append(("mixer", title, [*before, scale + detail + norms], 1))
            before = []
        elif name.startswith("ffn") and not name.endswith("norm"):
            steps.append(("feed-forward", "Feed-forward", parts_of(child), 1 if post_norm else 0.5))
        elif name == "convolution":
            steps.append(("convolution", f"Convolution, kernel {child.depthwise.kernel_size[0]}", parts_of(child), 1))
        elif name == "mixer_norm" and not post_norm:
            before = ["LayerNorm"]
        else:
            steps.append(("norm", "LayerNorm", [], None))
    return steps


class Canvas:
    """Boxes and arrows in one theme; a unit is a tenth of an inch."""

    def __init__(self, width, height, theme):
        self.theme = THEMES[theme]
        self.figure, self.axes = pyplot.subplots(figsize=(width / 10, height / 10))
        self.figure.subplots_adjust(0, 0, 1, 1)
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    def box(self, x, y, width, height, color, title, detail=""):
        """A box with its lower left corner at (x, y)."""
        style = "round,pad=0,rounding_size=0.8"
        face = (*matplotlib.colors.to_rgb(COLORS[color]), 1)
        dark = "#1f2430"  # the boxes are light on both kinds of page
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=face, edgecolor=self.theme["line"], lw=0.8))
        middle = y + height / 2
        if detail:
            lines = textwrap.wrap(detail, 46 if len(detail) <= 46 else len(detail) // 2 + 8)
            up = 1.05 if len(lines) == 1 else 1.65
            self.axes.text(x + width / 2, middle + up, title, ha="center", va="center", fontsize=9, color=dark, weight="bold")
            text = "\n".join(lines)
            self.axes.text(x + width / 2, middle - 1.15, text, ha="center", va="center", fontsize=6.6, color=dark)
        else:
            self.axes.text(x + width / 2, middle, title, ha="center", va="center", fontsize=8.4, color=dark)

    def text(self, x, y, text, size=9, quiet=False, **keys):
        """A text with its middle at (x, y)."""
        color = self.theme["quiet" if quiet else "ink"]
        self.axes.text(x, y, text, fontsize=size, color=color, **{"ha": "center", "va": "center", **keys})

    def arrow(self, start, end, head=True, curve=None):
        """A line or arrow."""
        style = "-|>,head_length=3,head_width=1.6" if head else "-"
        patch = FancyArrowPatch(start, end, arrowstyle=style, color=self.theme["line"], lw=1, shrinkA=0, shrinkB=0)
        if curve:
            patch.set_connectionstyle(curve)
        self.axes.add_patch(patch)

    def plus(self, x, y, factor):
        """The addition of a residual branch."""
        self.axes.add_patch(Circle((x, y), 1.1, facecolor="none", edgecolor=self.theme["line"], lw=1))
        self.text(x, y, "+", 9)
        if factor != 1:
            self.text(x + 2.6, y, "× ½", 8, quiet=True, ha="left")

    def save(self, name, theme):
        """Write the picture."""
        save(self.figure, name, theme)


def save(figure, name, theme):
    """Write a picture with a transparent background."""
    figure.savefig(IMAGES / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)


HEIGHTS = {"residual": 12.5, "norm": 6.2}
WIDTH = 29.0


def height_of(steps):
    """The height of a column of steps."""
    return sum(HEIGHTS["norm" if factor is None else "residual"] for *_, factor in steps)


def draw_steps(canvas, x, top, title, steps):
    """Draw a block, from its input at the top to its output."""
    centre, y = x + WIDTH / 2, top
    canvas.text(centre, y + 5.2, title, 10, weight="bold")
    canvas.text(centre, y + 1.4, "(B, T, D)", 7.5, quiet=True)
    for color, name, parts, factor in steps:
        if factor is None:
            canvas.arrow((centre, y), (centre, y - 2.2))
            canvas.box(x + 6, y - 5.2, WIDTH - 12, 3, color, name)
            y -= HEIGHTS["norm"]
            canvas.arrow((centre, y + 1), (centre, y), head=False)
            continue
        canvas.arrow((centre, y), (centre, y - 2.4))
        canvas.box(x, y - 8.8, WIDTH, 6.4, color, name, " · ".join(parts))
        canvas.arrow((centre, y - 8.8), (centre, y - 10.3))
        canvas.plus(centre, y - 11.4, factor)
        # The residual branch is drawn on the left
        canvas.arrow((centre, y - 1.2), (x - 1.8, y - 1.2), head=False)
        canvas.arrow((x - 1.8, y - 1.2), (x - 1.8, y - 11.4), head=False)
        canvas.arrow((x - 1.8, y - 11.4), (centre - 1.1, y - 11.4))
        y -= HEIGHTS["residual"]
    canvas.arrow((centre, y), (centre, y - 1.6))
    canvas.text(centre, y - 3, "(B, T, D)", 7.5, quiet=True)


DOWN, UP = "halve the rate", "repeat, add the input"
"""The rows of a Temporal U-Net at which the frame rate changes."""


def draw_stack(canvas, x, top, title, rows):
    """Draw the whole encoder from its input at the top: rows of (colour, text, relative width, remark)."""
    width, y, passing = 24.0, top, []
    canvas.text(x + width / 2, y + 5.2, title, 10, weight="bold")
    for color, text, share, remark in rows:
        height = 4.4 if "\n" not in text else 6.4
        canvas.arrow((x + width / 2, y), (x + width / 2, y - 1.8))
        canvas.box(x + width * (1 - share) / 2, y - 1.8 - height, width * share, height, color, text)
        if remark:
            canvas.text(x + width + 1.2, y - 1.8 - height / 2, remark, 7.2, quiet=True, ha="left")
        if text == DOWN:
            passing.append(y - 0.7)
        elif text == UP:  # the residual of the U-Net is drawn on the left
            start, end, left = passing.pop(), y - 1.8 - height / 2, x - 1.8
            canvas.arrow((x + width / 2, start), (left, start), head=False)
            canvas.arrow((left, start), (left, end), head=False)
            canvas.arrow((left, end), (x + width * (1 - share) / 2, end))
        y -= height + 1.8
    canvas.arrow((x + width / 2, y), (x + width / 2, y - 1.8))


def stack_height(rows):
    """The height of a stack."""
    return sum((4.4 if "\n" not in text else 6.4) + 1.8 for _, text, *_ in rows) + 2


def draw(name, columns, stack):
    """Draw one or several blocks, and beside them the stack that contains them."""
    height = max(*(height_of(steps) for _, steps in columns), stack_height(stack)) + 13
    remarks = 15 if any(row[3] for row in stack) else 2
    for theme in THEMES:
        canvas = Canvas(4 + (WIDTH + 7) * len(columns) + 26 + remarks, height, theme)
        for index, (title, steps) in enumerate(columns):
            draw_steps(canvas, 4 + index * (WIDTH + 7), height - 8.5, title, steps)
        draw_stack(canvas, 4 + len(columns) * (WIDTH + 7), height - 8.5, "Encoder", stack)
        canvas.save(name, theme)


def rows_of(layers, rate="40 ms", label="block"):
    """Rows of a stack; equal neighbours become one row."""
    rows = []
    for layer in layers:
        if isinstance(layer, TemporalUNet):
            inner = rows_of(layer.layers, "80 ms", label)
            rows.append(("norm", DOWN, 0.8, "depthwise, stride 2"))
            rows += [(color, text, 0.6, remark) for color, text, _, remark in inner]
            rows.append(("norm", UP, 0.8, "back to 40 ms"))
            continue
        plain = getattr(layer, "mixer", None) is None
        row = ["convolution" if plain else "mixer", layer, 1.0, f"a frame is {rate}"]
        kind = (row[0], type(layer), type(getattr(layer, "mixer", None)))
        if rows and rows[-1][0] == "open" and rows[-1][1] == kind:
            rows[-1][2] += 1
        else:
            rows.append(["open", kind, 1, row])
    done = []
    for row in rows:
        if row[0] == "open":
            _, kind, count, (color, _, share, remark) = row
            what = "convolution only" if color == "convolution" else label
            done.append((color, f"{count} × {what}", share, remark))
        else:
            done.append(row)
    return done


def draw_blocks():
    """Draw one picture for each architecture, from the modules of an encoder of the published depth."""
    sizes = {"d_model": 144, "nhead": 4, "num_layers": 10, "d_ffn": 576}
    frames = ("norm", "front end", 1.0, "100 to 25 frames a second")
    end = ("norm", "LayerNorm", 1.0, "")
    for name in ("conformer", "hyperconformer"):
        layers = build_encoder(name, **sizes).layers
        draw(name, [("Block", steps_of(layers[0]))], [frames, *rows_of(layers), end])
    layers = build_encoder("squeezeformer", size="xs").layers
    begin = ("norm", "× √D, LayerNorm", 1.0, "")
    draw("squeezeformer", [("Block", steps_of(layers[0]))], [frames, begin, *rows_of(layers)])
    encoder = build_encoder("fusionformer", **sizes).eval()
    training = steps_of(encoder.layers[0])
    fused = steps_of(encoder.fuse_().layers[0])
    rows = [frames, *rows_of(encoder.layers), ("norm", "Linear, BatchNorm", 1.0, "fused: Linear")]
    draw("fusionformer", [("Block in training", training), ("Block after fuse_()", fused)], rows)
    layers = build_encoder("practical_conformer", size="s").layers
    columns = [("Lower block", steps_of(layers[0])), ("Upper block", steps_of(layers[-1]))]
    rows = [(color, text, share, "causal") for color, text, share, _ in rows_of(layers, label="Performer")]
    draw("practical_conformer", columns, [frames, *rows, end])
    draw_cascade()


def draw_cascade():
    """Draw the cascade: two passes with one head."""
    for theme in THEMES:
        canvas = Canvas(88, 33, theme)
        canvas.box(2, 12, 15, 6, "norm", "Front end", "25 frames a second")
        canvas.arrow((17, 15), (21, 15))
        canvas.box(21, 12, 19, 6, "mixer", "First pass", "streams, chunk by chunk")
        canvas.arrow((40, 15), (48, 15))
        canvas.box(48, 12, 19, 6, "second", "Second pass", "sees the whole utterance")
        canvas.arrow((30.5, 18), (30.5, 24))
        canvas.arrow((57.5, 18), (57.5, 24))
        canvas.box(21, 24, 46, 4.4, "head", "CTC head, the same weights for both passes")
        canvas.text(30.5, 30.6, "text at once", 8.5)
        canvas.text(57.5, 30.6, "better text when the utterance ends", 8.5)
        canvas.text(30.5, 8.6, "two thirds of the blocks", 7.5, quiet=True)
        canvas.text(57.5, 8.6, "a third of the blocks", 7.5, quiet=True)
        canvas.text(44, 3.4, "Any registered encoder can be either pass.", 8, quiet=True)
        canvas.save("cascade", theme)


# Encoder and form of the result file -> its name, colour and line style; ours are solid
CURVES = {
    ("speechbrain_conformer", "plain"): ("SpeechBrain Conformer", "#c0504d", "--"),
    ("speechbrain_conformer_rope", "plain"): ("SpeechBrain Conformer, RoPE", "#d98880", "--"),
    ("torchaudio_conformer", "plain"): ("torchaudio Conformer", "#b8860b", "--"),
    ("speechbrain_hyperconformer", "plain"): ("SpeechBrain HyperConformer", "#7f8c99", "--"),
    ("squeezeformer", "fused"): ("Squeezeformer", "#2f8f83", "-"),
    ("fusionformer", "fused"): ("FusionFormer", "#4f9d3a", "-"),
    ("practical_conformer", "plain"): ("Practical Conformer", "#e07b20", "-"),
    ("conformer", "plain"): ("Conformer", "#8064a2", "-"),
    ("hyperconformer", "plain"): ("HyperConformer", "#2f7fd1", "-"),
}


def draw_cost():
    """Draw cost against length, of our encoders and of peers."""
    wanted = {"task": "inference", "input": "encoder", "precision": "float32", "mode": "eager", "batch": "1", "size": "equal"}
    lines = {}
    for row in read_csv(BENCH):
        key = (row["encoder"], row["form"])
        if row["ms"] and key in CURVES and row["dims"].startswith("144") and all(row[k] == v for k, v in wanted.items()):
            seconds = int(row["seconds"])
            if seconds <= 160:
                lines.setdefault(key, []).append((seconds, float(row["ms"]) / 1e3 * 60 / seconds))
    for theme, colors in THEMES.items():
        figure, axes = pyplot.subplots(figsize=(8.2, 4.0), layout="constrained")
        ends = {}
        for key, (label, color, style) in CURVES.items():
            points = sorted(lines[key])
            ours = style == "-"
            axes.plot(*zip(*points, strict=True), style, color=color, lw=2.4 if ours else 1.6, marker="o", markersize=3.5)
            ends[label] = (points[-1], color, ours)
        above = 0  # labels must not overlap, on a logarithmic axis
        for label, ((x, y), color, ours) in sorted(ends.items(), key=lambda item: item[1][0][1]):
            above = max(y, above * 1.24)
            axes.text(x * 1.08, above, label, color=color, va="center", fontsize=9, weight="bold" if ours else "normal")
        ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
        axes.set(xscale="log", yscale="log", xlim=(4.6, 620), ylim=(0.06, 9))
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(0.06, 9)
        axes.set_xticks([5, 10, 20, 40, 80, 160], ["5", "10", "20", "40", "80", "160"])
        axes.minorticks_off()
        paint(axes, colors, "length of the audio, seconds", "seconds of computation\nper minute of audio")
        save(figure, "cost", theme)


def draw_peers():
    """Draw the error rate against the time of a processor, of our models and of recognisers of others."""
    rows = sorted((row for row in read_csv(PEERS) if row["test_set"] == PEERS_SET), key=lambda row: -float(row["WER"]))
    for theme, colors in THEMES.items():
        figure, axes = pyplot.subplots(figsize=(8.2, 3.4), layout="constrained")
        for place, row in enumerate(rows):
            ours = row["package"].startswith(("speechbrain_ext", "sherpa-onnx"))
            x, y = float(row["cpu_per_audio"]), float(row["WER"])
            color = "#2f7fd1" if ours else "#b8860b"
            axes.plot(x, y, "o", color=color, markersize=4 + 0.8 * float(row["size_mib"]) ** 0.5)
            label = f"{row['system']}, {row['size_mib']} MiB"
            axes.annotate(
                label,
                (x, y),
                (9, -12 if place % 2 else 6),
                textcoords="offset points",
                color=color,
                fontsize=9,
                weight="bold" if ours else "normal",
            )
        axes.set(xscale="log", xlim=(0.004, 0.5), ylim=(0, 60))
        ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        paint(axes, colors, "seconds of one processor per second of audio", "WER, %")
        save(figure, "peers", theme)


LEARNED = {
    "hyperconformer": ("HyperConformer, 12,000 steps", "#9cc3ea"),
    "hyperconformer_5k": ("HyperConformer", "#2f7fd1"),
    "practical_conformer": ("Practical Conformer", "#e07b20"),
    "fusionformer": ("FusionFormer", "#4f9d3a"),
    "squeezeformer": ("Squeezeformer", "#2f8f83"),
    "conformer": ("Conformer", "#8064a2"),
}


def draw_learning():
    """Draw the error rates on the validation set of encoders trained on real speech: by steps on a CPU, by time on a GPU."""
    curves = {name: read_log(LOGS / f"{name}.txt", "steps") for name in LEARNED if (LOGS / f"{name}.txt").is_file()}
    on_gpu = {}
    for row in (row for row in read_csv(GPU) if row["set"] == "held-out"):
        on_gpu.setdefault(row["architecture"], []).append((float(row["seconds"]), float(row["WER"])))
    for theme, colors in THEMES.items() if curves else ():
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.2, 4.0), layout="constrained", sharey=True)
        for name, curve in curves.items():
            label, color = LEARNED[name]
            *_, points = (points for key, points in curve.items() if "WER" in key)  # of a cascade, the second pass
            left.plot(*zip(*points, strict=True), color=color, lw=2.4, marker="o", markersize=3.5, label=label)
        for name, points in on_gpu.items():
            color = LEARNED["hyperconformer_5k" if name == "hyperconformer" else name][1]
            right.plot(*zip(*points, strict=True), color=color, lw=2.4, marker="o", markersize=3.5)
        left.set_ylim(40, 100)
        left.legend(frameon=False, labelcolor=colors["ink"], fontsize=9)
        paint(left, colors, "steps of 60 s of speech, on a CPU", "WER on the validation set, %")
        paint(right, colors, "seconds, five at once on one GPU", "")
        save(figure, "learning", theme)


CHAIN = (
    "hyperconformer",
    "hyperconformer_transducer",
    "hyperconformer_streaming_transducer",
    "english_before",
    "english_second",
    "english",
)
"""The runs that made ``english``, each from the weights of the one before."""


def draw_chain():
    """Draw the error rates on the validation set of the runs that made ``english``, over the steps of all of them."""
    kinds = {"ctc_greedy": ("CTC", "#9cc3ea"), "transducer_greedy": ("transducer", "#2f7fd1")}
    curves, begins, steps = {kind: [] for kind in kinds}, [], 0
    for name in CHAIN:
        found = read_log(LOGS / f"{name}.txt", "steps")
        begins.append(steps)
        for kind in kinds:
            curves[kind].append([(steps + step, rate) for step, rate in found.get(f"valid WER {kind}", [])])
        steps = max(points[-1][0] for run in curves.values() if (points := run[-1]))
    for theme, colors in THEMES.items():
        figure, axes = pyplot.subplots(figsize=(8.2, 3.4), layout="constrained")
        for kind, (label, color) in kinds.items():
            for points in filter(None, curves[kind]):
                axes.plot(*zip(*points, strict=True), color=color, lw=2.4, marker="o", markersize=3.5, label=label)
                label = None
        for number, begin in enumerate(begins):
            axes.axvline(begin, color=colors["quiet"], ls=":", lw=1.2)
            axes.text(begin + 150, 71, f"{number + 1}", color=colors["quiet"], va="top", fontsize=9)
        axes.set(ylim=(32, 72), xlim=(0, steps + 400))
        axes.legend(frameon=False, labelcolor=colors["ink"], fontsize=9)
        paint(axes, colors, "steps of all runs, on a CPU", "WER on the validation set, %")
        save(figure, "english", theme)


TUNED = {"fine-tuned": ("#2f7fd1", "-"), "fine-tuned, new tokens": ("#2f8f83", "-"), "from nothing": ("#b8860b", "--")}
"""Models of benchmarks/fine_tuning.py -> colour and line style."""


def draw_fine_tuning():
    """Draw the error rates of fine-tuned models against the hours of new speech: on new speech, and on earlier speech."""
    rows = read_csv(FINE_TUNING) if FINE_TUNING.is_file() else []
    for theme, colors in THEMES.items() if rows else ():
        figure, panels = pyplot.subplots(1, 2, figsize=(8.2, 3.6), layout="constrained", sharey=True)
        for axes, (test_set, title) in zip(panels, TUNED_ON.items(), strict=True):
            mine = [row for row in rows if row["test_set"] == test_set]
            for name, (color, style) in TUNED.items():
                points = sorted((float(row["train_hours"]), float(row["WER"])) for row in mine if row["experiment"] == name)
                axes.plot(*zip(*points, strict=True), style, color=color, lw=2.4, marker="o", markersize=4, label=name)
            (before,) = (float(row["WER"]) for row in mine if row["experiment"] == "before")
            axes.axhline(before, color=colors["quiet"], ls=":", lw=1.8, label="before fine-tuning")
            hours = sorted({float(row["train_hours"]) for row in mine if row["experiment"] in TUNED})
            axes.set(xscale="log", ylim=(0, 110))
            axes.set_title(title, color=colors["ink"], fontsize=10)
            axes.set_xticks(hours, [f"{hour:.1f}" for hour in hours])
            axes.minorticks_off()
            paint(axes, colors, "hours of new speech", "WER, %" * (axes is panels[0]))
        panels[1].legend(frameon=False, labelcolor=colors["ink"], fontsize=9)
        save(figure, "fine_tuning", theme)


def paint(axes, colors, horizontal, vertical):
    """Name the axes, and draw them and the grid in the colours of a theme."""
    axes.set_xlabel(horizontal, color=colors["ink"])
    axes.set_ylabel(vertical, color=colors["ink"])
    axes.tick_params(colors=colors["quiet"])
    axes.grid(color=colors["grid"], lw=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colors["line"])


def main():
    """Draw all pictures."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "docs"  # equal pictures give equal files
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw_cost()
    draw_peers()
    draw_learning()
    draw_chain()
    draw_fine_tuning()
    draw_blocks()
    plot_cost(read_csv(BENCH), IMAGES / "cost_all.png")


if __name__ == "__main__":
    main()
