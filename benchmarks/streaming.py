"""Error rates, latency and speed of streams against whole files, and the memory of long files.

    python benchmarks/streaming.py wer --models results/*/pretrained --manifests results/mini/hyperconformer/7775/test-mini.csv
    python benchmarks/streaming.py memory --models results/demo/pretrained

``wer``: the model's own search, greedy CTC or that of a transducer, on one thread of a CPU. Each utterance is transcribed whole,
and as a stream in pieces of 0.1 s with chunks of each size. Pauses do not end segments, so only the chunks differ.
Latency is that of :class:`speechbrain_ext.inference.streaming.Timer`; for the first token of an utterance, the median over
utterances.
``memory``: noise of 10 minutes and of 2 hours, in windows and as a stream, each in a separate process.
"""

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from speechbrain.utils.edit_distance import accumulatable_wer_stats

from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.dataio.datasets import SEGMENT_FIELDS
from speechbrain_ext.decoders.alignment import FRAME_SECONDS
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.models import TransducerModel
from speechbrain_ext.inference.streaming import StreamingRecognizer, Timer, chunk_config
from speechbrain_ext.registry import passes_of
from speechbrain_ext.utils.files import write_csv

RESULTS = Path(__file__).parent / "results"
WER_FIELDS = (
    "encoder",
    "test_set",
    "chunk_ms",
    "left_context",
    "wer",
    "first_token_s",
    "token_s",
    "token_95_s",
    "real_time_factor",
)
MEMORY_FIELDS = ("encoder", "mode", "minutes", "peak_mib", "seconds", "real_time_factor")
FOREVER = {"endpoint": 1e6, "longest": 1e6}


def name_of(model):
    """The name of the encoder, with the pass of a cascade, or the word transducer."""
    encoder = model.mods.encoder.transformer.encoder
    passes = passes_of(encoder)
    name = type(encoder).__name__.removesuffix("Encoder")
    name = f"{name}, {model.pass_name or passes[-1]} pass" if len(passes) > 1 else name
    return f"{name}, transducer" if isinstance(model, TransducerModel) else name


def error_rate(references, hypotheses):
    """Word error rate in percent."""
    return round(accumulatable_wer_stats(references, [text.split() for text in hypotheses])["WER"], 2)


def wer_rows(models, pass_name, manifests, chunk_sizes, limit):
    """Rows for each model, test set and chunk size; whole files first."""
    for folder in models:
        model = load_model(folder, "cpu", pass_name)
        left = chunk_config(model).left_context_size
        left = -1 if left is None else left
        for manifest in manifests:
            with open(manifest, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))[:limit]
            segments = [{field: int(row[field]) for field in SEGMENT_FIELDS if row.get(field)} for row in rows]
            wavs = [load_audio(row["wav"], model.sample_rate, **segment) for row, segment in zip(rows, segments, strict=True)]
            references = [row["wrd"].split() for row in rows]
            seconds = sum(map(len, wavs)) / model.sample_rate
            began = time.perf_counter()
            texts = [model.transcribe_batch(wav[None], torch.ones(1))[0][0] for wav in wavs]
            factor = round((time.perf_counter() - began) / seconds, 4)
            yield name_of(model), Path(manifest).stem, "whole", "", error_rate(references, texts), "", "", "", factor
            for size in chunk_sizes:
                texts, first, latencies, computing = [], [], [], 0.0
                for wav in wavs:
                    timer = Timer(StreamingRecognizer(model, size, left, **FOREVER))
                    pieces = wav.split(model.sample_rate // 10)
                    segments = [segment for piece in pieces for segment in timer.accept(piece)] + timer.finish()
                    texts.append(" ".join(segment.text for segment in segments))
                    first += timer.latencies[:1]
                    latencies += timer.latencies
                    computing += timer.computing
                middle, late, start = np.quantile(latencies, 0.5), np.quantile(latencies, 0.95), np.median(first)
                times = [round(float(value), 3) for value in (start, middle, late)]
                factor, chunk = round(computing / seconds, 4), round(1000 * FRAME_SECONDS * size)
                yield name_of(model), Path(manifest).stem, chunk, left, error_rate(references, texts), *times, factor


def memory_rows(models, pass_name, minutes):
    """Peak resident memory of whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        for length in minutes:
            path = Path(folder) / f"{length}.flac"
            generator = np.random.default_rng(0)
            with soundfile.SoundFile(path, "w", 16000, 1) as file:
                for second in range(60 * length):
                    file.write(0.1 * (second % 7 < 5) * generator.standard_normal(16000).astype(np.float32))
            for model in models:
                for mode in ("windows", "stream"):
                    command = [sys.executable, __file__, "run", "--models", model, "--mode", mode, "--audio", str(path)]
                    began = time.perf_counter()
                    command += ["--pass", pass_name] if pass_name else []
                    name, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().rsplit(" ", 1)
                    seconds = time.perf_counter() - began
                    yield name, mode, length, round(int(peak) / 1024), round(seconds), round(seconds / length / 60, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("wer", "memory", "run"), help="run is used internally by memory")
    parser.add_argument("--models", nargs="+", required=True, help="model folders")
    parser.add_argument("--pass", dest="pass_name", metavar="NAME")
    parser.add_argument("--manifests", nargs="+", default=(), help="CSV files with the columns wav and wrd")
    parser.add_argument("--chunk-sizes", nargs="+", type=int, default=(4, 16, 32), help="in frames of 40 ms")
    parser.add_argument("--limit", type=int, help="utterances per manifest")
    parser.add_argument("--minutes", nargs="+", type=int, default=(10, 120))
    parser.add_argument("--mode", choices=("windows", "stream"))
    parser.add_argument("--audio")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "run":
        from speechbrain_ext.inference.long_audio import transcribe_long

        model = load_model(arguments.models[0], "cpu", arguments.pass_name)
        for _ in transcribe_long(model, arguments.audio, arguments.mode == "stream"):
            pass
        print(name_of(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    if arguments.part == "wer":
        given = arguments.manifests, arguments.chunk_sizes, arguments.limit
        fields, found = WER_FIELDS, wer_rows(arguments.models, arguments.pass_name, *given)
    else:
        fields, found = MEMORY_FIELDS, memory_rows(arguments.models, arguments.pass_name, arguments.minutes)
    rows = []
    for row in found:
        rows.append(row)
        print(*row, sep="\t", flush=True)
    default = "streaming.csv" if arguments.part == "wer" else "long_audio.csv"
    write_csv(arguments.output or RESULTS / default, fields, rows)


if __name__ == "__main__":
    main()
