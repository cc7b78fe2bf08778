"""Tables and plots of measured rows."""

import os
import re
from itertools import pairwise
from pathlib import Path

from speechbrain_ext.bench.audio import WORKERS
from speechbrain_ext.bench.models import BASELINE
from speechbrain_ext.bench.run import EQUAL, FIELDS
from speechbrain_ext.utils.errors import UserError, UserImportError
from speechbrain_ext.utils.files import read_csv, write_text

LEGEND = f"""\
The real-time factor is seconds of computation per second of audio in the whole batch; lower is better. Times are medians.
Ratios are to the `{BASELINE}`, which was timed alternately with the model; they can differ from the quotient of two rows.
Peak memory is the memory that a call adds to the weights. "fused" has its normalisation folded into the weights; int8 is
the fused form, if there is one, with linear layers in 8 bits. `{BASELINE}` and `squeezeformer` have relative positions, as
published. Encoders with rotary positions do less work; compare them with "{BASELINE}, RoPEMHA". In a padded batch, the
shortest utterance is shorter than the longest by the given percentage, and the other lengths are evenly spaced. Empty cells
were not measured."""


def table(header, rows):
    """A Markdown table.

    Example
    -------
    >>> print(table(["a", "b"], [[1, 2]]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


BLOCK = r"(<!-- {0}:begin -->\n).*?(<!-- {0}:end -->)"
"""The marks around a table of a Markdown file."""


def fill(text, name, content):
    """Put content between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.

    Example
    -------
    >>> fill("<!-- x:begin -->\\nold\\n<!-- x:end -->", "x", "new")
    '<!-- x:begin -->\\n\\nnew\\n\\n<!-- x:end -->'
    """
    block = re.compile(BLOCK.format(name), re.DOTALL)
    return block.sub(lambda match: f"{match[1]}\n{content}\n\n{match[2]}", text)


def files(source):
    """Read a CSV file, or all CSV files of a folder.

    Arguments
    ---------
    source : str
        The file, or the folder with one file for each machine.

    Returns
    -------
    dict
        Rows by the file's stem, which is the name of the machine.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    ValueError
        If a file has other columns.
    """
    source = Path(source)
    paths = sorted(source.glob("*.csv")) if source.is_dir() else [source]
    if not paths or not all(path.is_file() for path in paths):
        raise FileNotFoundError(f"There are no results at {source}; measure first, or give the file with results as --output.")
    return {path.stem: read_csv(path, FIELDS) for path in paths}


def markdown(machines):
    """All tables of all machines.

    Arguments
    ---------
    machines : dict
        Rows by machine, from :func:`files`.

    Returns
    -------
    str
    """
    return "\n\n".join(part for machine, rows in machines.items() for part in _machine(machine, rows))


def _machine(machine, rows):
    yield f"### {machine}"
    if not rows:
        return
    yield f"{rows[-1]['machine']}, {max(row['date'] for row in rows)}; {rows[-1]['versions']}."
    yield LEGEND
    equal = [row["dims"] for row in rows if row["size"] == "equal"]
    usual = max(equal, key=equal.count, default="")
    for dims in sorted({usual, *equal}, key=lambda dims: (dims != usual, dims)):
        yield f"#### d_model x blocks: {dims}"
        mine = [row for row in rows if row["dims"] == dims or dims == usual and row["size"] != "equal"]
        for make in (_sizes, _inference, _streaming, _training):
            yield from make(mine)
    yield from _remarks(rows)


def _remarks(rows):
    """Remarks on each encoder, without repetition, and the reasons for missing figures."""
    remarks, missing = {}, {}
    for row in rows:
        if not (row["ms"] or row["gmacs"]):
            part = f"batch {row['batch']}" if row["task"] == "inference" else row["task"]
            missing.setdefault((_label(row), row["note"]), {})[f"{part}, {row['seconds']} s"] = None
            continue
        for remark in filter(None, row["note"].split("; ")):
            head, equal, number = remark.partition(EQUAL)
            seen = remarks.setdefault(row["encoder"], {})
            key = head + equal if head + equal in seen or row["form"] == "plain" else f"in {row['form']} {head}{equal}"
            seen[key] = max(seen.get(key, ""), number, key=lambda text: float(text or 0))
    if remarks:
        yield "Remarks:"
        yield "\n".join(f"* {name}: {'; '.join(a + b for a, b in seen.items())}" for name, seen in remarks.items())
    if missing:
        yield "Without figures:"
        yield "\n".join(f"* {label} ({'; '.join(where)}): {note}" for (label, note), where in sorted(missing.items()))


def _label(row):
    label = row["encoder"] + (f", {row['form']}" if row["form"] != "plain" else "")
    return label + (f", {row['size']} ({row['dims']})" if row["size"] != "equal" else "")


def _cells(rows, task, *keys):
    """Rows of a task, grouped by the values of some keys, a group per table; rows stay in the order of measurement."""
    found = {}
    for row in rows:
        if row["task"] == task:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _pivot(rows, column, cell):
    """The columns' header, and a line for each encoder with the text of ``cell`` for its row in each column."""
    columns = sorted({row[column] for row in rows}, key=int)
    lines = {}
    for row in rows:
        lines.setdefault(_label(row), {})[row[column]] = cell(row)
    return columns, [[label, *(line.get(name, "") for name in columns)] for label, line in lines.items()]


def _count(text):
    return f"{int(text):,}" if text else ""


def _sizes(rows):
    for (part,), mine in _cells(rows, "size", "input").items():
        columns, lines = _pivot(mine, "seconds", lambda row: row["gmacs"] and f"{float(row['gmacs']):.2f}")
        parameters = {_label(row): _count(row["parameters"]) for row in mine}
        yield f"**Parameters and 10^9 multiply-accumulates**, {_part(part)}:"
        header = ["encoder", "parameters", *(f"{name} s" for name in columns)]
        yield table(header, [[line[0], parameters[line[0]], *line[1:]] for line in lines])


FROM_AUDIO = {
    ("inference", "audio"): "from samples in the host's memory to tokens there (greedy CTC)",
    ("training", "audio"): f"from audio files, which {WORKERS} processes read, to the step (CTC)",
}


def _part(name, task=None):
    return FROM_AUDIO.get((task, name), "encoder alone" if name == "encoder" else "with front end")


def _batch(batch, padding):
    return f"batch {batch}" + f" padded by up to {padding} %" * (padding != "0")


def _speedup(row):
    return f" ({float(row['speedup']):.2f}x)" if row["speedup"] else ""


def _spread(row):
    return f"{float(row['ms_lower']):.4g} to {float(row['ms_upper']):.4g}"


def _inference(rows):
    keys = "input", "precision", "mode", "batch", "padding"
    for (part, precision, mode, *batch), mine in _cells(rows, "inference", *keys).items():
        how = f"by seconds of audio, {_part(part, 'inference')}, {precision}, {mode}, {_batch(*batch)}"
        columns, lines = _pivot(mine, "seconds", lambda row: row["ms"] and f"{row['real_time_factor']}{_speedup(row)}")
        header = ["encoder", *(f"{name} s" for name in columns)]
        yield f"**Real-time factor** {how} (times as fast as `{BASELINE}`):"
        yield table(header, lines)
        if (precision, mode) == ("float32", "eager"):  # for others, see the CSV file
            _, lines = _pivot(mine, "seconds", lambda row: row["ms"] and f"{_mib(row)}{_share(row)}")
            yield f"**Peak memory in MiB, and share of the machine's matrix-product rate** {how}:"
            yield table(header, lines)


def _share(row):
    return f", {float(row['gemm_share']):.0%}" if row["gemm_share"] else ""


def _mib(row):
    mib = float(row["peak_mib"])
    return f"{mib:,.0f}" if mib >= 10 else f"{mib:.1f}"


def _streaming(rows):
    for (mode, left, chunk), mine in _cells(rows, "streaming", "mode", "left_context", "chunk").items():

        def cell(row):
            return f"{float(row['ms']):.2f}{_speedup(row)}, {int(row['state_bytes']) / 1000:,.0f}"

        columns, lines = _pivot([row for row in mine if row["ms"]], "seconds", cell)
        if not lines:
            continue
        context = "unlimited left context" if left == "-1" else f"{left} chunks of left context"
        context += ", as CUDA graphs" * (mode == "graph")
        yield (
            f"**Streams**, chunks of {40 * int(chunk)} ms, {context}: ms per chunk (times as fast as `{BASELINE}`), and state in "
            "kB, by seconds of the stream:"
        )
        yield table(["encoder", *(f"{name} s" for name in columns)], lines)


def _training(rows):
    keys = "input", "precision", "mode", "seconds", "batch", "padding"
    for (part, precision, mode, seconds, *batch), mine in _cells(rows, "training", *keys).items():
        yield f"**Training step**, {seconds} s, {_batch(*batch)}, {_part(part, 'training')}, {precision}, {mode}:"
        lines = [[_label(row), f"{float(row['ms']):,.0f}", _spread(row), row["speedup"], _mib(row)] for row in mine if row["ms"]]
        yield table(["encoder", "ms", "quartiles", f"times as fast as `{BASELINE}`", "peak MiB"], lines)


def plot_cost(rows, path):
    """Plot cost against length: real-time factor of the encoder alone, batch 1, float32, eager.

    Arguments
    ---------
    rows : list of dict
        Rows of one machine.
    path : Path
        The PNG file.

    Returns
    -------
    bool
        Whether there was anything to draw.
    """
    wanted = {"task": "inference", "input": "encoder", "precision": "float32", "mode": "eager", "batch": "1", "size": "equal"}
    lines = {}
    for row in rows:
        if row["ms"] and row["form"] != "int8" and all(row[key] == value for key, value in wanted.items()):
            points = lines.setdefault((row["dims"], _label(row), row["source"]), [])
            points.append((int(row["seconds"]), float(row["ms"]) / 1e3 / int(row["seconds"])))
    if not lines:
        return False
    points = {dims: sum(len(lines[key]) for key in lines if key[0] == dims) for dims, _, _ in lines}
    dims = max(points, key=points.get)
    figure, axes = _pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    drawn = {(label, source): sorted(points) for (of, label, source), points in lines.items() if of == dims}
    axes.set_prop_cycle(color=_pyplot().get_cmap("tab20").colors)
    for (label, source), points in sorted(
        drawn.items(), key=lambda line: -line[1][-1][1]
    ):  # the legend has the order of the lines
        axes.plot(*zip(*points, strict=True), "-o" if source == "here" else "--s", markersize=4, label=label)
    seconds = sorted({second for points in drawn.values() for second, _ in points})
    axes.set(xscale="log", yscale="log", xlabel="seconds of audio", ylabel="real-time factor", title=dims)
    steps = [digit * 10.0**power for power in range(-9, 6) for digit in (1, 2, 5)]
    lowest, highest = axes.get_ylim()
    ticks = [low for low, high in pairwise(steps) if high > lowest and low < highest] + [next(s for s in steps if s >= highest)]
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks(seconds, map(str, seconds))
    axes.minorticks_off()
    figure.legend(fontsize=7, loc="outside right upper")
    _save(figure, path)
    return True


def plot_wer(rows, wers, path):
    """Plot error rate against cost, a point for each encoder that has both at the same dimensions.

    Arguments
    ---------
    rows : list of dict
        Rows of one machine.
    wers : list of tuple
        Encoder, ``str`` of its :class:`~speechbrain_ext.bench.models.Dimensions`, test set, and word error rate in percent.
    path : Path
        The PNG file.

    Returns
    -------
    bool
        Whether there was anything to draw.
    """
    wanted = {"task": "inference", "input": "encoder", "precision": "float32", "mode": "eager", "batch": "1"}
    times = {}
    for row in rows:
        if row["ms"] and row["form"] != "int8" and all(row[key] == value for key, value in wanted.items()):
            cost = float(row["ms"]) / 1e3 / int(row["seconds"])
            key = (row["encoder"], row["dims"])
            distance = abs(int(row["seconds"]) - 10)  # the length of LibriSpeech's utterances
            times[key] = min(times.get(key, (distance, cost)), (distance, cost))  # the fused form, if it is faster
    sets = {}
    for encoder, dims, test_set, wer in wers:
        if (encoder, dims) in times:
            sets.setdefault((test_set, dims), []).append((times[encoder, dims][1], wer, encoder))
    if not sets:
        return False
    names = sorted({encoder for points in sets.values() for _, _, encoder in points})
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    figure, axes = _pyplot().subplots(1, len(sets), figsize=(4.5 * len(sets), 4), squeeze=False, layout="constrained")
    for ((test_set, dims), points), axis in zip(sets.items(), axes[0], strict=True):
        for cost, wer, encoder in points:
            axis.plot(cost, wer, "o", color=colors[encoder], label=encoder)
        axis.locator_params(axis="x", nbins=3)
        axis.set(xlabel="real-time factor", ylabel="WER, %", title=f"{test_set}\n{dims}")
        axis.title.set_fontsize(8)
    handles = {name: line for axis in axes[0] for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, fontsize=7, loc="outside right upper")
    _save(figure, path)
    return True


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise UserImportError("Plots need the package matplotlib; install it with: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path):
    figure.savefig(path, dpi=120, metadata={"Software": None})
    _pyplot().close(figure)


def read_wers(path, dims):
    """Read error rates with greedy CTC search from a results file of the recipes.

    Arguments
    ---------
    path : str
        The CSV file.
    dims : Dimensions
        Dimensions of the models, which the file does not state.

    Returns
    -------
    list of tuple
        Error rates for :func:`plot_wer`.

    Raises
    ------
    ValueError
        If the file is not a results file.
    """
    found = []
    rows = read_csv(path)
    if not rows or not {"architecture", "train_set", "test_set", "search", "WER"} <= set(rows[0]):
        raise UserError(f"{path} is not a results file of a recipe; give one that training wrote.")
    for row in rows:
        if "encoder_kwargs" in (row.get("overrides") or ""):
            continue  # a variant with another cost
        # Without first passes, because the measured cost is that of the whole encoder
        if row["search"] in ("ctc_greedy", "second_pass_ctc_greedy"):
            found.append((row["architecture"], str(dims), f"{row['train_set']}: {row['test_set']}", float(row["WER"])))
    return found


def write(source):
    """Write tables in the folder of the CSV files.

    Arguments
    ---------
    source : str
        The file, or the folder with one file for each machine.

    Returns
    -------
    str
        All tables as Markdown.

    Raises
    ------
    FileNotFoundError
        If there are no results.
    """
    machines = files(source)
    for machine, rows in machines.items():
        (_folder(source) / f"{machine}.md").write_text(markdown({machine: rows}) + "\n", encoding="utf-8")
    return markdown(machines)


def plot(source, wers=()):
    """Write plots in the folder of the CSV files.

    Arguments
    ---------
    source : str
        The file, or the folder with one file for each machine.
    wers : list of tuple
        Error rates for :func:`plot_wer`.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    """
    for machine, rows in files(source).items():
        plot_cost(rows, _folder(source) / f"{machine}_cost.png")
        plot_wer(rows, list(wers), _folder(source) / f"{machine}_wer.png")


def check_readme(readme):
    """Refuse a Markdown file without the marks of :func:`write_readme`.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    UserError
        If it has no marks.
    """
    if not Path(readme).is_file():
        raise FileNotFoundError(f"There is no file {readme} for the tables; give another --readme.")
    try:
        text = Path(readme).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{readme} is not UTF-8; save it as UTF-8.") from error
    if not re.search(BLOCK.format("bench"), text, re.DOTALL):
        raise UserError(f"{readme} has no place for the tables; add the lines <!-- bench:begin --> and <!-- bench:end -->.")


def write_readme(readme, source):
    """Put tables and existing plots between the marks of a Markdown file.

    Arguments
    ---------
    readme : str
        The Markdown file.
    source : str
        The CSV file, or the folder with one file for each machine.
    """
    readme = Path(readme)
    write_text(readme, fill_readme(readme.read_text(encoding="utf-8"), readme.parent, source))


def fill_readme(text, base, source):
    """Do the work of :func:`write_readme` on the text of a file in the folder ``base``; returns the new text."""
    parts = []
    for machine, rows in files(source).items():
        parts.append(markdown({machine: rows}))
        for title, name in (("Cost against length", "cost"), ("Word error rate against cost", "wer")):
            path = (_folder(source) / f"{machine}_{name}.png").resolve()
            if path.exists():
                parts.append(f"![{title}]({Path(os.path.relpath(path, base.resolve())).as_posix()})")
    return fill(text, "bench", "\n\n".join(parts))


def _folder(source):
    return Path(source) if Path(source).is_dir() else Path(source).parent
