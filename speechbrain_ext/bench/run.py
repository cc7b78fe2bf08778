"""Measures cell by cell; in a cell all models run alternately, and each gets one row.

Rows are written to the CSV file when their cell is done. Cells with all rows in the file are not measured again, so the same
command continues an interrupted run. ``ms`` is a median, with quartiles, and ``speedup`` is the baseline's time in the same cell
divided by it. ``gemm_share`` is the model's rate of operations, as a share of this machine's rate in matrix products.
``padding`` is the percentage by which the shortest utterance of a batch is shorter than the longest; the other lengths are evenly
spaced.
"""

import contextlib
import datetime
import importlib.metadata
import re
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from speechbrain.nnet.losses import ctc_loss
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext import __version__
from speechbrain_ext.bench.audio import BATCHES, Recognizer, make_loader, write_files
from speechbrain_ext.bench.graphs import StaticStream
from speechbrain_ext.bench.models import (
    BASELINE,
    FEATURES,
    PEERS,
    Dimensions,
    Unsupported,
    build,
    foldable,
    folded,
    groups,
    in_int8,
    with_front_end,
)
from speechbrain_ext.dataio.resampling import SAMPLE_RATE
from speechbrain_ext.decoders.alignment import greedy_tokens
from speechbrain_ext.lobes.masks import absolute_lengths, padding_mask
from speechbrain_ext.registry import build_encoder, list_encoders
from speechbrain_ext.utils import measure
from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.files import read_csv, write_csv
from speechbrain_ext.utils.machine import cpu_name

FRAMES_PER_SECOND = 25
PARTS = ("size", "inference", "training", "streaming")
INPUTS = ("encoder", "front end", "audio")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
"""Autocast's types; "float32" and "tf32" are without autocast. Except in "float32", a GPU uses TensorFloat-32 for operations in
float32, as SpeechBrain sets it."""
EQUAL = "largest difference from ours "
MODES = ("eager", "compiled", "graph")
FORMS = ("plain", "fused", "int8")
PROBES = (5, 20)  # seconds, from which the cost of longer inputs is estimated


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark, the arguments of the command line."""

    encoders: tuple = ()
    """Names of encoders; empty = all."""
    peers: tuple = tuple(PEERS)
    parts: tuple = PARTS
    inputs: tuple = INPUTS
    forms: tuple = FORMS
    own_sizes: bool = True
    d_model: int = 144
    nhead: int = 8
    num_layers: int = 10
    d_ffn: int = 576
    kernel_size: int = 31
    device: str = "cpu"
    threads: int = 0
    """Number of threads; 0 = PyTorch's choice."""
    precision: tuple = ("float32", "bfloat16")
    compiled: bool = False
    graphs: bool = False
    """Whether to measure streams also as CUDA graphs."""
    counted: tuple = (10, 30, 60)
    """Seconds of audio for the table of sizes."""
    seconds: tuple = (5, 10, 20, 40, 80, 160)
    batch: tuple = (1, 8)
    train_seconds: int = 10
    train_batch: int = 8
    padding: int = 10
    """Percent by which the shortest utterance of a batch is shorter than the longest."""
    stream_seconds: tuple = (60, 600)
    chunk_size: int = 16
    left_context: tuple = (-1, 10)
    rounds: int = 15
    budget: float = 120.0
    """Most seconds per model and cell."""
    retry: bool = False
    """Whether to measure rows again that have a note in place of figures."""

    @property
    def dims(self):
        """Dimensions of the models at equal work."""
        return Dimensions(self.d_model, self.nhead, self.num_layers, self.d_ffn, self.kernel_size)


# Under two minutes on two cores, for all registered encoders.
QUICK = {
    "precision": ("float32",),
    "own_sizes": False,
    "forms": ("plain", "fused"),
    "inputs": ("encoder",),
    "counted": (10,),
    "seconds": (5, 20),
    "batch": (1,),
    "train_seconds": 5,
    "train_batch": 2,
    "stream_seconds": (10,),
    "left_context": (10,),
    "rounds": 3,
    "budget": 4.0,
}


def check(settings):
    """Refuse settings that cannot be measured.

    Raises
    ------
    ValueError
        If a value is not valid; the message names key, value and remedy.
    """
    known = {"encoders": list_encoders(), "peers": PEERS, "parts": PARTS, "inputs": INPUTS, "forms": FORMS}
    for key, choices in (known | {"precision": PRECISIONS}).items():
        for value in getattr(settings, key):
            if value not in choices:
                raise UserError(f"{_flag(key)} is '{value}'; the known ones are: {', '.join(choices)}.")
    for entry in fields(Settings):
        values = getattr(settings, entry.name)
        for value in values if isinstance(values, tuple) else (values,):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and entry.name not in ("threads", "left_context", "padding") and not value > 0:
                raise UserError(f"{_flag(entry.name)} is {value}; give a value above 0.")
    if settings.threads < 0:
        raise UserError(f"--threads is {settings.threads}; give at least 1.")
    if not 0 <= settings.padding < 100:
        raise UserError(f"--padding is {settings.padding}; give a percentage from 0 to 99.")
    for value in settings.left_context:
        if value < -1:
            raise UserError(f"--left-context is {value}; give a number of chunks, or -1 for all.")
    if settings.kernel_size % 2 == 0:
        raise UserError(f"--kernel-size is {settings.kernel_size}; give an odd number.")
    if settings.d_model % settings.nhead:
        raise UserError(f"--d-model is {settings.d_model}, not a multiple of --nhead {settings.nhead}; change one of them.")
    with torch.device("meta"):
        build_encoder(BASELINE, **asdict(settings.dims))  # raises an error for other invalid dimensions
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is '{settings.device}'; give cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is '{settings.device}', but PyTorch sees {torch.cuda.device_count()} GPUs here; give cpu.")
    if device.type == "cpu" and settings.graphs:
        raise UserError("--graphs needs a GPU; leave it out, or give --device cuda.")
    if device.type == "cpu" and "tf32" in settings.precision:
        raise UserError("--precision 'tf32' needs a GPU; leave it out, or give --device cuda.")


def _flag(key):
    return "--" + key.replace("_", "-")


def machine(settings):
    """A short name for file names and tables: processor and number of threads, or the GPU.

    Example
    -------
    >>> machine(Settings(threads=2)).endswith("2-threads")
    True
    """
    name = _device_name(settings)
    threads = origin(settings)["threads"]
    if threads:
        name += f" {threads} thread{'s' * (threads != '1')}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)", "", name, flags=re.IGNORECASE).lower()).strip("-")


def origin(settings):
    """Values that must be the same for all rows of a file: machine, device, threads and versions of packages.

    With a GPU, the machine is the GPU and the host's processor, which launches the kernels.

    Example
    -------
    >>> origin(Settings(threads=2))["threads"]
    '2'
    """
    device = torch.device(settings.device).type
    threads = "" if device == "cuda" else str(settings.threads or torch.get_num_threads())
    versions = [f"speechbrain_ext {__version__}", *map(_version, ("torch", "speechbrain", "torchaudio"))]
    host = f", host {cpu_name()}" if device == "cuda" else ""
    return dict(zip(ORIGIN, (_device_name(settings) + host, device, threads, ", ".join(versions)), strict=True))


def _device_name(settings):
    return torch.cuda.get_device_name(settings.device) if torch.device(settings.device).type == "cuda" else cpu_name()


@dataclass(frozen=True)
class Cell:
    """One comparison: the settings that all models of a cell share."""

    task: str
    input: str = "encoder"
    precision: str = "float32"
    mode: str = "eager"
    batch: int = 1
    seconds: int = 10
    chunk: int = 0
    left_context: int = 0
    padding: int = 0

    def __str__(self):
        padding = f", padding {self.padding} %" * bool(self.padding)
        text = f"{self.task}, {self.input}, {self.seconds} s x {self.batch}{padding}, {self.precision}, {self.mode}"
        if self.task == "streaming":
            left = "all" if self.left_context < 0 else f"{self.left_context} chunks"
            text = f"streaming, after {self.seconds} s, chunks of {self.chunk} frames, left context {left}, {self.mode}"
        return text

    @property
    def lens(self):
        """Relative lengths of the utterances, the longest first.

        Example
        -------
        >>> Cell("training", batch=3, padding=20).lens
        [1.0, 0.9, 0.8]
        """
        shorter = self.padding / 100 / max(1, self.batch - 1)
        return [1 - number * shorter for number in range(self.batch)]


def cells(settings):
    """The cells of one group, the cheap and important ones first.

    Arguments
    ---------
    settings : Settings
        Settings of the benchmark.

    Example
    -------
    >>> [str(cell) for cell in cells(Settings(parts=("training",), inputs=("encoder",), precision=("float32",)))]
    ['training, encoder, 10 s x 8, padding 10 %, float32, eager']
    """
    modes = MODES[:2] if settings.compiled else MODES[:1]
    if "size" in settings.parts:
        parts = [part for part in settings.inputs if part != "audio"]  # features and head are the same for all
        yield from (Cell("size", part, seconds=seconds) for part in parts for seconds in settings.counted)
    if "inference" in settings.parts:
        for precision in settings.precision:
            for mode in modes:
                for part in settings.inputs:
                    for batch in settings.batch:
                        for seconds in settings.seconds:
                            padding = settings.padding if batch > 1 else 0
                            yield Cell("inference", part, precision, mode, batch, seconds, padding=padding)
    if "streaming" in settings.parts:
        for left in settings.left_context:
            for seconds in settings.stream_seconds:
                for mode in ("eager", "graph") if settings.graphs else ("eager",):
                    yield Cell("streaming", mode=mode, seconds=seconds, chunk=settings.chunk_size, left_context=left)
    if "training" in settings.parts:
        for precision in settings.precision:
            for mode in modes:
                for part in settings.inputs:
                    sizes = settings.train_batch, settings.train_seconds
                    padding = settings.padding if settings.train_batch > 1 else 0
                    yield Cell("training", part, precision, mode, *sizes, padding=padding)


KEY = ("task", "input", "encoder", "size", "dims", "form", "device", "threads", *list(Cell.__dataclass_fields__)[2:])
ORIGIN = ("machine", "device", "threads", "versions")
TIMES = ("ms", "ms_lower", "ms_upper", "rounds", "real_time_factor", "speedup")
SPACE = ("peak_mib", "state_bytes")
FIELDS = (
    *KEY,
    "source",
    "parameters",
    "gmacs",
    *TIMES,
    "gemm_gmacs",
    "gemm_share",
    *SPACE,
    "note",
    "machine",
    "versions",
    "date",
)


class Table:
    """The CSV file with its rows; new rows are added cell by cell.

    Arguments
    ---------
    path : str
        The file; it may be missing.
    retry : bool
        Whether to measure rows again, and to replace them, that have a note in place of figures.

    Raises
    ------
    ValueError
        If the file has other columns.
    """

    def __init__(self, path, retry=False):
        self.path = Path(path)
        rows = read_csv(self.path, FIELDS) if self.path.exists() else []
        self._rows = {tuple(row[key] for key in KEY): row for row in rows}
        self.known = {key for key, row in self._rows.items() if not retry or row["ms"] or row["gmacs"]}
        self.added = []
        """New rows."""

    @property
    def rows(self):
        """All rows, as dictionaries of text."""
        return list(self._rows.values())

    def check_origin(self, origin):
        """Refuse to mix figures of several machines, numbers of threads or versions."""
        for row in self.rows:
            for key in ORIGIN:
                if row[key] != origin[key]:
                    raise UserError(
                        f"{self.path} holds figures with {key} '{row[key]}', these have '{origin[key]}'; give another --output."
                    )

    def __contains__(self, row):
        return tuple(str(row[key]) for key in KEY) in self.known

    def add(self, rows):
        """Add new rows, and write the file."""
        for row in rows:
            if row not in self:
                key = tuple(str(row[key]) for key in KEY)
                self._rows[key] = {field: str(row.get(field, "")) for field in FIELDS}
                self.known.add(key)
                self.added.append(self._rows[key])
        write_csv(self.path, FIELDS, [row.values() for row in self.rows])


def run(settings, path):
    """Measure all rows that are not in the file.

    Arguments
    ---------
    settings : Settings
        Settings of the benchmark.
    path : str
        The CSV file; rows of other settings stay in it.

    Returns
    -------
    Table
        The file's rows.

    Raises
    ------
    ValueError
        If a setting is not valid.
    EqualityError
        If an encoder and its counterpart do not compute the same.
    """
    check(settings)
    table = Table(path, settings.retry)
    table.check_origin(origin(settings))
    threads = torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # All models share code, and have a compiled module each; by default the ninth would run uncompiled, without a warning.
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10000):
        try:
            encoders = settings.encoders or list_encoders()
            todo = groups(encoders, settings.peers, settings.dims, settings.own_sizes)
            if "size" in settings.parts and not settings.own_sizes:  # the table of sizes always has all sizes
                todo += groups(encoders, (), settings.dims)[1:]
            for number, group in enumerate(todo):
                wanted = settings
                if number and not settings.own_sizes:
                    wanted = replace(
                        settings, parts=("size",), inputs=("encoder",), forms=("plain",), counted=settings.counted[:1]
                    )
                _Group(wanted, table, group, f"{number + 1}/{len(todo)}").run()
        finally:
            torch.set_num_threads(threads)
    return table


class _Group:
    """The models of one comparison, built for the first cell that needs them."""

    def __init__(self, settings, table, group, number):
        self.settings, self.table, self.group, self.number = settings, table, group, number
        self.common = origin(settings)
        self.models = None
        self.costs, self.counts = {}, {}
        self.gemm, self.loaders = {}, {}

    def run(self):
        """Measure all cells whose rows are missing."""
        with tempfile.TemporaryDirectory() as self.folder:  # for audio files
            self._run()
        self.models, self.counts, self.loaders = None, {}, {}

    def _run(self):
        todo = list(cells(self.settings))
        for index, cell in enumerate(todo):
            missing = [pair for pair in self._pairs(cell) if self._row(cell, *pair) not in self.table]
            if not missing:
                continue
            if self.models is None:
                self._build()
            baseline = (self.group[0], "plain")
            if cell.task != "size" and baseline not in missing:
                missing.insert(0, baseline)  # a ratio needs the baseline's time in the same cell
            print(f"[{self.number}, {index + 1}/{len(todo)}] {cell}", file=sys.stderr, flush=True)
            with _tf32(cell.precision != "float32"):
                rows = self._measure(cell, missing)
            self.table.add([self._row(cell, *pair) | values for pair, values in rows.items()])

    def _build(self):
        longest = max(*self.settings.seconds, *self.settings.counted, *self.settings.stream_seconds, self.settings.train_seconds)
        models, errors, found = build(self.group, self.settings.dims, longest * FRAMES_PER_SECOND)
        self.differences = {candidate: f"{EQUAL}{value:.1e}" for candidate, value in found.items()}
        self.models = {(candidate, "plain"): model for candidate, model in models.items()}
        self.errors = {(candidate, form): f"cannot be built: {text}" for candidate, text in errors.items() for form in FORMS}
        for candidate, model in models.items():
            try:
                fused = folded(model) if foldable(candidate) and self.settings.forms != ("plain",) else None
                if fused is not None and "fused" in self.settings.forms:
                    self.models[candidate, "fused"] = fused
                elif fused is None:
                    self.errors[candidate, "fused"] = "nothing to fold"
                if "int8" in self.settings.forms and self.common["device"] == "cpu":
                    self.models[candidate, "int8"] = in_int8(model if fused is None else fused)
            except Exception as error:  # any error of one form must not stop the others
                self.errors |= {(candidate, form): f"failed: {one_line(error)}" for form in FORMS if form != "plain"}
        for pair, model in list(self.models.items()):
            try:
                model.to(self.settings.device)
            except Exception as error:  # for example too little memory
                self.errors[pair] = f"failed: {one_line(error)}"
                del self.models[pair]
        self.fronts = {}
        if self.settings.compiled:
            torch._dynamo.reset()

    def _pairs(self, cell):
        """The candidates and forms with a row in this cell."""
        forms = ["plain"]
        if cell.task in ("inference", "streaming") and "fused" in self.settings.forms:
            forms.append("fused")
        in_full = self.common["device"] == "cpu" and (cell.precision, cell.mode) == ("float32", "eager")
        if cell.task == "inference" and in_full and "int8" in self.settings.forms:
            forms.append("int8")
        return [(candidate, form) for candidate in self.group for form in forms if form != "fused" or foldable(candidate)]

    def _row(self, cell, candidate, form):
        """The values of a row that need no measurement, its key included."""
        names = (
            {"encoder": candidate.name} | {key: getattr(candidate, key) for key in ("source", "size", "dims")} | {"form": form}
        )
        return names | asdict(cell) | self.common | {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}

    def _net(self, cell, pair):
        """The module to call: a model, with its front end or compiled if the cell says so."""
        model = self.models[pair]
        key = (pair, cell.input, cell.mode)
        if key not in self.fronts:
            net = model
            if cell.input != "encoder":
                net = with_front_end(pair[0], model, self._width(pair)).to(self.settings.device)
                if pair[1] == "int8":
                    net.input = in_int8(net.input)
            net = torch.compile(net, dynamic=True) if cell.mode == "compiled" else net
            if cell.input == "audio":
                net = Recognizer(net, self._width(pair)).eval().to(self.settings.device)
            self.fronts[key] = net
        return self.fronts[key]

    def _inputs(self, cell, pair):
        """The inputs of a net."""
        frames, device = FRAMES_PER_SECOND * cell.seconds, self.settings.device
        lens = torch.tensor(cell.lens, device=device) if cell.padding else None
        if cell.input == "front end":
            return torch.randn(cell.batch, 4 * frames, FEATURES, device=device), lens
        mask = None if lens is None else padding_mask(absolute_lengths(lens, frames), frames)
        return torch.randn(cell.batch, frames, self._width(pair), device=device), mask

    def _macs(self, cell, pair):
        """10^9 multiply-accumulates of the plain form, as other forms compute the same; without features and head."""
        pair, cell = (pair[0], "plain"), replace(cell, input="encoder" if cell.input == "encoder" else "front end", mode="eager")
        key = (pair[0], cell.input, cell.seconds)
        if key not in self.counts:
            x, _ = self._inputs(replace(cell, batch=1, padding=0), pair)
            self.counts[key] = measure.count_macs(self._net(cell, pair), x) / 1e9
        return cell.batch * self.counts[key]

    def _measure(self, cell, pairs):
        """Results by candidate and form."""
        rows = {pair: {"note": self._note(cell, pair)} for pair in pairs}
        if cell.task == "size":
            for pair in (pair for pair in pairs if pair in self.models):
                try:
                    rows[pair]["parameters"] = sum(parameter.numel() for parameter in self._net(cell, pair).parameters())
                    rows[pair]["gmacs"] = round(self._macs(cell, pair), 4)
                except Exception as error:  # any error of one model must not stop the others
                    rows[pair]["note"] = f"failed: {one_line(error)}"
            return rows
        calls, rounds, states = {}, {}, {}
        for pair in pairs:
            if pair not in self.models:
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._refuse(cell, pair)
                    calls[pair] = self._call(cell, pair, states)
                    if cell.task == "training" or cell.mode == "compiled" or self.common["device"] == "cuda":
                        calls[pair]()  # allocates what stays in memory: the optimiser's states, compiled code, workspaces
                    rows[pair]["peak_mib"] = round(measure.peak_memory(calls[pair], self.settings.device), 2)
                    first = measure.timed(calls[pair], self.settings.device) / 1e3
                rounds[pair] = max(1, min(self._rounds(cell), int(self.settings.budget / first)))
            except Exception as error:  # any error of one model must not stop the others
                calls.pop(pair, None)
                rows[pair]["note"] = str(error) if isinstance(error, Unsupported) else f"failed: {one_line(error)}"
                if self.common["device"] == "cuda":
                    torch.cuda.empty_cache()
        failed = {}
        times = measure.alternate(calls, {pair: rounds[pair] for pair in calls}, device=self.settings.device, failed=failed)
        for pair, error in failed.items():
            rows[pair]["note"] = f"failed: {one_line(error)}"
        for pair, values in times.items():
            rows[pair] |= self._results(cell, pair, values)
            if pair in states:
                rows[pair]["state_bytes"] = states[pair]
        baseline = rows.get((self.group[0], "plain"), {}).get("ms")
        for row in rows.values():
            if baseline and "ms" in row:
                row["speedup"] = round(baseline / row["ms"], 3)
        if cell.task == "training":
            for net in self.fronts.values():
                net.zero_grad(set_to_none=True)
                net.eval()
        return rows

    def _note(self, cell, pair):
        candidate, form = pair
        if pair not in self.models:
            return self.errors.get(pair, "left out")
        notes = [candidate.note, self.differences.get(candidate, "")]
        if form == "int8":
            before, after = (
                sum(p.numel() for p in self.models[candidate, form].parameters()) for form in ("plain", "int8")
            )  # 8-bit weights are not parameters
            notes.append(f"linear layers, {1 - after / before:.0%} of the parameters (torch.ao dynamic quantisation)")
        return "; ".join(filter(None, notes))

    def _rounds(self, cell):
        factor = {"streaming": 5, "training": 1 / 3}.get(cell.task, 1)  # chunks are short, training steps long
        return max(1, round(factor * self.settings.rounds))

    def _results(self, cell, pair, times):
        steps = BATCHES if (cell.task, cell.input) == ("training", "audio") else 1
        middle, lower, upper = (time / steps for time in measure.quartiles(times))
        audio = cell.chunk / FRAMES_PER_SECOND if cell.task == "streaming" else sum(cell.lens) * cell.seconds
        row = {"ms": round(middle, 3), "ms_lower": round(lower, 3), "ms_upper": round(upper, 3), "rounds": len(times)}
        if cell.task != "training":
            row["real_time_factor"] = f"{middle / 1e3 / audio:.3g}"
        if cell.task == "inference":
            if cell.precision not in self.gemm:
                dtype = "float32" if cell.precision == "tf32" else cell.precision
                self.gemm[cell.precision] = measure.gemm_rate(self.settings.device, dtype)
            rate = self.gemm[cell.precision]
            row["gemm_gmacs"] = round(rate, 1)
            with contextlib.suppress(Exception):  # a model whose operations cannot be counted still has its time
                macs = self._macs(cell, pair)
                row |= {"gmacs": round(macs, 4), "gemm_share": round(macs / middle * 1e3 / rate, 3)}
        return row

    def _call(self, cell, pair, states):
        """The call to time: a forward pass, the next chunk of a stream, or a training step."""
        device = self.settings.device
        kind = torch.device(device).type

        def precision():
            half = cell.precision in ("bfloat16", "float16")
            return torch.autocast(kind, getattr(torch, cell.precision) if half else None, enabled=half)

        if cell.task == "streaming":
            return self._stream(cell, pair, states)
        net = self._net(cell, pair)
        if cell.task == "inference":
            return self._recognition(cell, net, precision) if cell.input == "audio" else self._forward(cell, pair, net, precision)
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.0)  # the weights do not change
        scaler = torch.amp.GradScaler(kind, enabled=cell.precision == "float16")

        def step(loss):
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        if cell.input == "audio":
            loader = self._loader(cell)

            def over_files():
                for batch in loader:
                    optimizer.zero_grad(set_to_none=True)
                    batch = batch.to(device)
                    with precision():
                        log_probs, _ = net(*batch.sig)
                    # With lengths on the host, the loss does not wait for the device
                    lens = batch.host_lengths
                    step(ctc_loss(log_probs, batch.tokens.data, lens["sig"], lens["tokens"], 0, "batchmean"))

            return over_files
        inputs = self._inputs(cell, pair)
        target = torch.randn(cell.batch, FRAMES_PER_SECOND * cell.seconds, self._width(pair), device=device)

        def one_step():
            optimizer.zero_grad(set_to_none=True)
            with precision():
                y = net(*inputs)
            step((y.float() - target).square().mean())

        return one_step

    def _forward(self, cell, pair, net, precision):
        """A forward pass from inputs on the device."""
        inputs = self._inputs(cell, pair)

        def forward():
            with torch.no_grad(), precision():
                return net(*inputs)

        return forward

    def _recognition(self, cell, net, precision):
        """From samples in the host's memory to token ids there."""
        device = self.settings.device
        wavs, lens = 0.1 * torch.randn(cell.batch, SAMPLE_RATE * cell.seconds), torch.tensor(cell.lens)
        if torch.device(device).type == "cuda":
            wavs, lens = wavs.pin_memory(), lens.pin_memory()

        def recognise():
            with torch.no_grad(), precision():
                return greedy_tokens(*net(wavs.to(device, non_blocking=True), lens.to(device, non_blocking=True)))

        return recognise

    def _loader(self, cell):
        """A loader of files with a cell's lengths."""
        key = (cell.seconds, *cell.lens)
        if key not in self.loaders:
            paths = write_files(self.folder, cell.seconds, cell.lens)
            self.loaders = {
                key: make_loader(paths, self.settings.device)
            }  # replacing the dictionary ends the workers of the last loader
        return self.loaders[key]

    def _width(self, pair):
        return getattr(self.models[pair].encoder, "d_model", self.settings.d_model)

    @torch.no_grad()
    def _stream(self, cell, pair, states):
        """The next chunk of a stream. The stream starts so that half of the calls come before the cell's seconds; its state is
        measured there. A CUDA graph repeats the chunk at that place."""
        model, chunk = self.models[pair], torch.randn(1, cell.chunk, self._width(pair), device=self.settings.device)
        config = DynChunkTrainConfig(cell.chunk, None if cell.left_context < 0 else cell.left_context)
        context = model.make_context(config)
        chunks = round(cell.seconds * FRAMES_PER_SECOND / cell.chunk)
        done = max(0, chunks - self._rounds(cell))  # each round has two calls
        if cell.mode == "graph":
            done = max(1, done, cell.left_context)  # the state then has its final size
        began = time.perf_counter()
        for _ in range(done):
            model.stream(chunk, context)
            if time.perf_counter() - began > self.settings.budget:
                raise Unsupported(f"left out: the stream does not get there in {self.settings.budget:g} s (--budget)")
        states[pair] = model.state_bytes(context)
        if cell.mode == "graph":
            return StaticStream(model, context, chunk).capture()

        def following():
            nonlocal done
            with torch.no_grad():
                y = model.stream(chunk, context)
            done += 1
            if done == chunks:
                states[pair] = model.state_bytes(context)
            return y

        return following

    def _refuse(self, cell, pair):
        """Raise Unsupported for calls that would need too much memory or time, estimated from short inputs, and for calls that
        are known to crash. The operating system would end the process, and unwritten results would be lost."""
        reason = getattr(PEERS.get(pair[0].name), "no_compiled_training", "")
        if reason and (cell.task, cell.mode, self.common["device"]) == ("training", "compiled", "cpu"):
            raise Unsupported(reason)
        if cell.task == "streaming" or cell.seconds * cell.batch <= 2 * PROBES[-1]:
            return
        # The cost of reading and features is small
        cell = replace(cell, input="encoder" if cell.input == "encoder" else "front end", mode="eager", padding=0)
        key = (cell.task, cell.input, cell.precision, pair)
        if key not in self.costs:
            found = []
            for seconds in PROBES:
                call = self._call(replace(cell, seconds=seconds, batch=1), pair, {})
                memory = measure.peak_memory(call, self.settings.device)
                found.append((memory, min(measure.timed(call, self.settings.device) for _ in range(2)) / 1e3))
            self.costs[key] = list(zip(*found, strict=True))
        memory, seconds = (cell.batch * _extrapolate(values, cell.seconds) for values in self.costs[key])
        free = measure.available_memory(self.settings.device)
        if free is not None and memory > 0.9 * free:
            raise Unsupported(f"left out: it would take about {memory:,.0f} MiB, and {free:,.0f} MiB are free")
        if seconds > self.settings.budget:
            raise Unsupported(f"left out: one call would take about {seconds:.0f} s, more than --budget {self.settings.budget:g}")


@contextlib.contextmanager
def _tf32(allowed):
    """A context that allows or forbids TensorFloat-32 in a GPU's matrix products; SpeechBrain switches it on."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = allowed
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def _extrapolate(values, seconds):
    """Extrapolate from the lengths :data:`PROBES`, with a linear term for layers and a quadratic one for attention."""
    (small, large), (first, second) = values, PROBES
    square = max(0.0, (large / second - small / first) / (second - first))
    return (large / second - square * second) * seconds + square * seconds**2


def _version(name):
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} of unknown version"
