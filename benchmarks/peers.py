"""Word error rate, speed and memory of other systems (peers) and of our models, on the same audio.

    python benchmarks/peers.py --test test-clean=MANIFEST --weights whisper-tiny.en=FOLDER --models ours=FOLDER \\
        --exported ours-in-sherpa=FOLDER [--python OTHER/bin/python]

Peers are moonshine-voice, which includes its weights, and faster-whisper in int8, with weights of CTranslate2 from ``--weights``.
``--python`` is an interpreter with the peers; it does not need PyTorch. Peers that are not installed there are left out with a
message. Folders of ``export --runtime sherpa-onnx`` also run without PyTorch. MANIFEST has any format that training takes, for
example a LibriSpeech folder.

Each system runs in a separate process, and transcribes one utterance at a time: peers and exported folders with greedy search,
model folders with their own. It may use one processor, but the runtime of moonshine-voice takes others too: its processor
seconds are then more than its wall time. The audio is decoded before. References and texts are compared in upper case without
punctuation, and without Whisper's normaliser. Digits for spelled numbers, or "Mr." for MISTER, are therefore errors, and rates
are higher than normalised ones. ``real_time_factor`` is wall time; on a busy machine ``cpu_per_audio``, processor seconds per
second of audio, is the better figure. Memory is the peak of the process, interpreter and audio included; the size is that of
all files of a model. The peers were trained on more than 10,000 times the hours, so neither parameters nor hours of training
are equal.
"""

import argparse
import importlib.metadata
import json
import math
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "peers.csv"
EXPORT = Path(__file__).resolve().parents[1] / "speechbrain_ext" / "export"
MOONSHINE, WHISPER, OURS, SHERPA = "moonshine-voice", "faster-whisper", "speechbrain_ext", "sherpa-onnx"
MOONSHINE_PARAMETERS = 27_100_000
"""Parameters of Moonshine tiny (Jeffries et al. 2024, https://arxiv.org/abs/2410.15608); its files do not state them."""
RATE = 16000


def moonshine(_):
    """moonshine-voice: a function from samples to text, number of parameters, folder of the weights."""
    import moonshine_voice as package
    from moonshine_voice.transcriber import Transcriber

    weights = Path(package.__file__).parent / "assets" / "tiny-en"
    # Utterances are already segmented, so its voice activity detection is off
    transcriber = Transcriber(weights, package.ModelArch.TINY, options={"vad_threshold": "0.0"})

    def transcribe(wav):
        return " ".join(line.text for line in transcriber.transcribe_without_streaming(wav.tolist(), RATE).lines)

    return transcribe, MOONSHINE_PARAMETERS, weights


def whisper(weights):
    """faster-whisper: a function from samples to text, number of parameters, folder of the weights."""
    from faster_whisper import WhisperModel

    model = WhisperModel(weights, device="cpu", cpu_threads=1, compute_type="int8", local_files_only=True)
    options = {"language": "en", "beam_size": 1, "temperature": 0.0, "without_timestamps": True}

    def transcribe(wav):
        segments, _ = model.transcribe(wav, condition_on_previous_text=False, **options)
        return " ".join(segment.text for segment in segments)

    return transcribe, count_weights(Path(weights) / "model.bin"), weights


def count_weights(path):
    """The number of parameters in a file of CTranslate2, without the scales of 8-bit weights."""
    with open(path, "rb") as file:

        def read(kind):
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]

        def name():
            return file.read(read("H")).rstrip(b"\0").decode()

        version, _, revision, variables = read("I"), name(), read("I"), read("I")
        if not 4 <= version <= 6:
            raise SystemExit(f"{path} has version {version} of CTranslate2's format (revision {revision}); give one of 4 to 6.")
        total = 0
        for _ in range(variables):
            kind, shape = name(), [read("I") for _ in range(read("B"))]
            read("B")
            file.seek(read("I"), 1)
            total += math.prod(shape) if kind.rpartition("/")[2] in ("weight", "bias", "gamma", "beta", "encodings") else 0
    return total


def ours(folder):
    """A model folder of ours: a function from samples to text, number of parameters, folder of the weights."""
    import torch

    from speechbrain_ext.inference import load_model

    torch.set_num_threads(1)
    model = load_model(folder, "cpu")
    if model.sample_rate != RATE:
        raise SystemExit(f"peers.py: {folder} takes {model.sample_rate} samples per second; give a model of {RATE}.")

    def transcribe(wav):
        return model.transcribe_batch(torch.from_numpy(wav).unsqueeze(0), torch.ones(1))[0][0]

    return transcribe, sum(parameter.numel() for parameter in model.hparams.asr_model.parameters()), folder


def sherpa(folder):
    """A folder for sherpa-onnx: a function from samples to text, no number of parameters (ONNX files do not state it), folder."""
    sys.path.insert(0, str(EXPORT))  # the package itself imports PyTorch
    from sherpa_texts import transcriber

    if f"other rates than {RATE} Hz" not in Path(folder, "README.md").read_text(encoding="utf-8"):
        raise SystemExit(f"peers.py: {folder} does not take {RATE} samples per second; give a folder of such a model.")
    transcribe = transcriber(folder)
    return lambda wav: " ".join(transcribe([wav])[0].split()), "", folder


def run(system, weights, folder):
    """Transcribe all audio in a folder with a system, in a separate process; writes JSON to the folder."""
    import numpy as np

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    transcribe, parameters, weights = {MOONSHINE: moonshine, WHISPER: whisper, OURS: ours, SHERPA: sherpa}[system](weights)
    wavs = [np.load(path) for path in sorted(Path(folder).glob("*.npy"))]
    transcribe(wavs[0])  # the first call is not timed
    wall, cpu = time.perf_counter(), time.process_time()
    texts = [transcribe(wav) for wav in wavs]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    figures = {
        "texts": texts,
        "wall": wall,
        "cpu": cpu,
        "seconds": sum(map(len, wavs)) / RATE,
        "parameters": parameters,
        "peak": peak_memory(),
        "size": sum(path.stat().st_size for path in Path(weights).iterdir() if path.is_file()),
        "version": importlib.metadata.version(system) if system != OURS else "",
    }
    Path(folder, "answers.json").write_text(json.dumps(figures), encoding="utf-8")


def peak_memory():
    """Peak memory of this process in MiB. On Linux it does not contain that of the parent process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(python, name, system, weights, test_set, rows, folder):
    """Measure a row of the results."""
    from speechbrain.utils.metric_stats import ErrorRateStats

    from speechbrain_ext.dataio.text import normal_form, words_only
    from speechbrain_ext.utils.error_rates import error_figures
    from speechbrain_ext.utils.machine import cpu_name, describe_machine

    command = [python, __file__, "run", "--system", system, "--weights", str(weights), "--folder", folder]
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads(Path(folder, "answers.json").read_text(encoding="utf-8"))

    def words(texts):
        return [words_only(normal_form(text, "upper")).split() for text in texts]

    error_rate = ErrorRateStats()
    error_rate.append([row.ID for row in rows], words(found["texts"]), words(row.wrd for row in rows))
    machine = describe_machine("cpu")
    return {
        "system": name,
        "package": f"{system} {found['version']}".strip(),
        "test_set": test_set,
        "utterances": len(rows),
        "audio_hours": round(found["seconds"] / 3600, 3),
        **error_figures(error_rate),
        "parameters": found["parameters"],
        "real_time_factor": round(found["wall"] / found["seconds"], 4),
        "cpu_per_audio": round(found["cpu"] / found["seconds"], 4),
        "peak_memory_mib": round(found["peak"]),
        "size_mib": round(found["size"] / 2**20, 1),
        "commit": machine["commit"],
        "hardware": f"{cpu_name()}, 1 thread",
        "date": machine["date"],
    }


def choose_systems(arguments):
    """(interpreter, name, package, weights) of all systems that can run."""
    from speechbrain_ext.export.sherpa_readme import is_export

    code = "import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)"
    has = {
        name: subprocess.run([arguments.python, "-c", code, module]).returncode == 0
        for name, module in ((MOONSHINE, "moonshine_voice"), (WHISPER, "faster_whisper"))
    }
    for name in [name for name, there in has.items() if not there]:
        print(f"peers.py: {arguments.python} has no {name}, which is left out.", file=sys.stderr)
    if has[MOONSHINE]:
        yield arguments.python, "moonshine-tiny-en", MOONSHINE, ""
    if has[WHISPER]:
        yield from ((arguments.python, name, WHISPER, path) for name, path in map(named, arguments.weights))
    yield from ((sys.executable, name, OURS, path) for name, path in map(named, arguments.models))
    for name, path in map(named, arguments.exported):
        if not is_export(path):
            raise SystemExit(f"peers.py: {path} is not from export --runtime sherpa-onnx; give such a folder.")
        yield sys.executable, name, SHERPA, path


def named(given):
    """Name and path of NAME=PATH."""
    name, equals, path = given.partition("=")
    if not equals or not os.path.isdir(path):
        raise SystemExit(f"peers.py: {given} is not NAME=FOLDER with an existing folder; check the path.")
    return name, path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("all", "run"), default="all", help="run is used internally")
    parser.add_argument("--test", nargs="+", metavar="[NAME=]MANIFEST", help="test sets")
    parser.add_argument("--weights", nargs="+", default=(), metavar="NAME=FOLDER", help="weights for faster-whisper")
    parser.add_argument("--models", nargs="+", default=(), metavar="NAME=FOLDER", help="our model folders")
    parser.add_argument("--exported", nargs="+", default=(), metavar="NAME=FOLDER", help="our folders for sherpa-onnx")
    parser.add_argument("--python", default=sys.executable, help="the interpreter with the peers")
    parser.add_argument("--limit", type=int, help="utterances per test set")
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows of the same system and test set are replaced")
    parser.add_argument("--system", help="for run")
    parser.add_argument("--folder", help="for run")
    arguments = parser.parse_args()
    if arguments.part == "run":
        run(arguments.system, arguments.weights[0], arguments.folder)
        return

    if not arguments.test:
        parser.error("give a test set: --test NAME=MANIFEST")

    import numpy as np

    from speechbrain_ext.dataio.audio import load_audio
    from speechbrain_ext.dataio.manifests import named_manifests, read_entries, select
    from speechbrain_ext.dataio.preparation import check_utterances
    from speechbrain_ext.utils.errors import UserError, one_line
    from speechbrain_ext.utils.files import read_csv, write_csv

    try:
        test_sets = {}
        for test_set, manifest in named_manifests(arguments.test).items():
            utterances, _ = select(test_set, read_entries(manifest)[0], "none")
            test_sets[test_set] = check_utterances(test_set, utterances[: arguments.limit])[0]
    except (UserError, OSError) as error:
        raise SystemExit(f"peers.py: {error}") from None
    systems, failed = list(choose_systems(arguments)), []
    for test_set, rows in test_sets.items():
        with tempfile.TemporaryDirectory() as folder:
            for number, row in enumerate(rows):
                wav = load_audio(row.wav, RATE, row.start or 0, row.stop, row.channel)
                np.save(Path(folder, f"{number:06}.npy"), wav.numpy())
            for system in systems:
                try:
                    measured = measure(*system, test_set, rows, folder)
                except (subprocess.CalledProcessError, OSError) as error:
                    failed.append(f"{system[1]} on {test_set}")
                    print(f"peers.py: {failed[-1]}: {one_line(error)}", file=sys.stderr)
                    continue
                print(*measured.values(), sep="\t", flush=True)
                before = read_csv(arguments.output) if arguments.output.exists() else []
                kept = [row for row in before if (row["system"], row["test_set"]) != (measured["system"], test_set)]
                write_csv(arguments.output, list(measured), [[row.get(key, "") for key in measured] for row in [*kept, measured]])
    if failed:
        raise SystemExit(f"peers.py: not measured: {', '.join(failed)}; the messages above say why.")


if __name__ == "__main__":
    main()
