"""Write the tables of README and documentation from results in CSV files and from hparams files.

    python benchmarks/tables.py

A table is between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. Do not edit tables by hand.
"""

import argparse
import re
from pathlib import Path

from speechbrain_ext.bench.report import files, markdown, table
from speechbrain_ext.bench.report import fill as put
from speechbrain_ext.utils.files import read_csv as read

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ENCODERS = sorted((ROOT / "docs" / "encoders").glob("*.md"))
BENCH = ROOT / "recipes" / "LibriSpeech" / "results" / "bench"
RESULTS = sorted((ROOT / "recipes").glob("*/results/*.csv"))
HYPERMIXING = ROOT / "benchmarks" / "results" / "hypermixing.csv"
SQUEEZEFORMER = ROOT / "benchmarks" / "results" / "squeezeformer.csv"
FUSIONFORMER = ROOT / "benchmarks" / "results" / "fusionformer.csv"
STREAMING = ROOT / "benchmarks" / "results" / "streaming.csv"
LONG_AUDIO = ROOT / "benchmarks" / "results" / "long_audio.csv"
SEARCH = ROOT / "benchmarks" / "results" / "search.csv"
TRAINING = ROOT / "benchmarks" / "results" / "training.csv"
FINE_TUNING = ROOT / "benchmarks" / "results" / "fine_tuning.csv"
GPU = ROOT / "benchmarks" / "results" / "gpu_training.csv"
GPU_SEARCHES = ROOT / "benchmarks" / "results" / "gpu_searches.csv"
MANIFESTS = ROOT / "benchmarks" / "results" / "manifests.csv"
MEMORY = ROOT / "benchmarks" / "results" / "memory.csv"
PUBLISHED = ROOT / "benchmarks" / "results" / "published.csv"
WORDS = ROOT / "recipes" / "MiniLibriSpeech" / "results"
HEADS = ROOT / "recipes" / "Synthetic" / "results" / "searches.csv"
LM = ROOT / "benchmarks" / "results" / "lm.csv"
TRANSDUCER_LOSS = ROOT / "benchmarks" / "results" / "transducer_loss.csv"
TRANSDUCER_SEARCH = ROOT / "benchmarks" / "results" / "transducer_search.csv"
SHERPA = ROOT / "benchmarks" / "results" / "sherpa.csv"
HEAD_COLUMNS = {
    "greedy": "greedy",
    "beam": "beam",
    "beam tokens.arpa": "beam, token 4-gram",
    "beam words.arpa": "beam, word 3-gram",
    "beam tokens.arpa - own.arpa": "beam, token 4-gram and LODR",
    "rescored": "rescored",
    "rescored tokens.arpa": "rescored, token 4-gram",
}
"""Columns of the error rates of all heads, by the kind of the search and its language models."""
MODEL = "english"
"""The model of the package."""
TEST_SETS = "test-clean", "test-librispeech", "test-speechocean"
RATE_COLUMNS = [f"{name}, WER %" for name in TEST_SETS]
WITH_LM, LM_COLUMN = (TEST_SETS[0], "tokens.arpa"), "test-clean with a token 4-gram"
PEERS, PEERS_SET = ROOT / "benchmarks" / "results" / "peers.csv", "test-librispeech"
PRACTICAL_CONFORMER = ROOT / "benchmarks" / "results" / "practical_conformer.csv"


def columns(path, fields, header):
    """Some columns of a file, unchanged, under other names."""
    return table(header, [[row[field] for field in fields] for row in read(path)])


def pass_in(search):
    """The pass of a cascade in the name of a search, in brackets; empty for other encoders."""
    name = re.sub("(ctc|joint|transducer)_(greedy|beam|beam_lm|rescored)$", "", search).replace("_", " ").strip()
    return f" ({name})" if name else ""


def results(page=None):
    """Word error rates of the runs of all recipes, a row each; the page of an encoder has its runs, without their cost."""
    runs, found = {}, [row for path in RESULTS for row in read(path)]
    transducers = {row["experiment"] for row in found if row["search"].endswith("transducer_greedy")}
    for row in found:
        own_search = "transducer_greedy" if row["experiment"] in transducers else "ctc_greedy"
        if not row["steps"] or not row["search"].endswith(own_search):
            continue  # a row without steps is from evaluate, and has no figures of the training
        if page and row["architecture"] != page and not row["hparams"].startswith(page):
            continue
        run = " ".join((row["experiment"], options(row)))
        key = (row["corpus"], row["train_hours"], run.strip(), row["parameters"], row["steps"])
        runs.setdefault((*key, row["audio_seconds_per_second"], row["peak_memory_mib"]), []).append(
            f"{row['test_set']} {float(row['WER']):.1f}" + pass_in(row["search"])
        )
    rows = []
    for (corpus, hours, run, parameters, steps, speed, memory), wers in runs.items():
        cost = [f"{float(speed):.0f}x", f"{int(memory):,} MiB"]
        rows.append([f"{corpus}, {float(hours):.3g} h", run, f"{int(parameters):,}", steps, ", ".join(wers), *cost])
    header = ["trained on", "run", "parameters", "steps", "WER %, greedy search", "audio / training time", "peak memory"]
    shown = 5 if page else len(header)
    return table(header[:shown], [row[:shown] for row in rows])


def options(row):
    """The options of a run that change its training, with the names of files in place of their paths, and of runs for models."""
    text = re.sub(rf"--experiment {re.escape(row['experiment'])}|--weights_precision \S+", "", row["overrides"])
    text = re.sub(r"\S+/(\S+/pretrained)", r"\1", text)
    return " ".join(Path(part).name if part.count("/") > 1 else part for part in text.split())


def _words():
    """Runs on a few hours of real speech: error rates of each, and with language models."""
    runs, lines, rows = {}, [], read(WORDS / "results.csv")
    transducers = {row["experiment"] for row in rows if row["search"] == "transducer_beam"}
    for row in rows:
        if row["search"].endswith("transducer_beam" if row["experiment"] in transducers else "ctc_greedy"):
            runs.setdefault((row["experiment"], pass_in(row["search"])), {})[row["test_set"]] = row
    with_lm = _rates(WORDS / "searches.csv")
    for (experiment, said), sets in sorted(runs.items(), key=lambda run: float(run[1][TEST_SETS[0]]["WER"])):
        row = next(iter(sets.values()))
        rates = [_with_interval(sets[test_set]) if test_set in sets else "" for test_set in TEST_SETS]
        rates.append(with_lm.get((experiment, said), {}).get(WITH_LM, ""))
        name = experiment + said + (", beam of 4" if experiment in transducers else "")
        lines.append([name, f"{int(row['parameters']):,}", row["steps"], *rates])
    return ["model", "parameters", "steps", *RATE_COLUMNS, LM_COLUMN], lines


def words():
    """Error rates on real speech of the models that were trained on a few hours."""
    return table(*_words())


def _gpu():
    """Trainings of ``gpu.py``: the pace of each architecture, and its error rates, also with a language model."""
    paces = {row["architecture"]: row for row in read(GPU)}  # the last rows are of the end of the training
    lines = []
    found = sorted(_rates(GPU_SEARCHES).items(), key=lambda model: float(model[1][TEST_SETS[0], ""].split()[0]))
    for (name, said), rates in found:
        pace = [paces[name]["steps"], f"{float(paces[name]['epochs']):.0f}"]
        pace += [f"{float(paces[name]['audio_seconds_per_second']):,.0f}x"]
        rates = [rates.get(key, "") for key in (*((each, "") for each in TEST_SETS), WITH_LM)]
        lines.append([name + said, f"{int(paces[name]['parameters']):,}", *pace, *rates])
    return ["model", "parameters", "steps", "epochs", "audio / training time", *RATE_COLUMNS, LM_COLUMN], lines


def gpu():
    """Trainings of ``gpu.py``."""
    return table(*_gpu())


def summary():
    """Error rates of the model of the package, and of the architectures after equal time on a GPU."""
    (header, runs), (gpu_header, gpu_runs) = _words(), _gpu()
    rows = [dict(zip(header, line, strict=True)) for line in runs if line[0].startswith(MODEL)]
    rows += [dict(zip(gpu_header, line, strict=True)) for line in gpu_runs]
    shown = ["model", "parameters", *RATE_COLUMNS, LM_COLUMN]
    return table(shown, [[row[key] for key in shown] for row in rows])


def _rates(path):
    """Error rates of models in a file of ``evaluate``: by model and pass, then by test set and language model."""
    found = {}
    for row in read(path):
        if not row.get("phrases") and not row.get("lodr") and (row.get("lm") or row["search"].endswith("ctc_greedy")):
            rates = found.setdefault((Path(row["model"]).parts[0], pass_in(row["search"])), {})
            rates[row["test_set"], row.get("lm") or ""] = _with_interval(row)
    return found


def _with_interval(row):
    """The error rate of a row, and half of its 95 % interval."""
    return f"{float(row['WER']):.1f} ± {(float(row['WER_high']) - float(row['WER_low'])) / 2:.1f}"


def fine_tuning():
    """Error rates after fine-tuning on some hours of new speech, and of models that begin with random weights."""
    found, sets = {}, {}
    for row in read(FINE_TUNING):
        found.setdefault((row["experiment"], row["train_hours"], row["steps"]), {})[row["test_set"]] = row["WER"]
        sets[row["test_set"]] = None
    runs = sorted(found.items(), key=lambda run: (run[0][0] != "before", float(run[0][1]), run[0][0]))
    lines = [[name, f"{float(hours):.1f}", steps, *(rates[each] for each in sets)] for (name, hours, steps), rates in runs]
    return table(["model", "hours", "steps", *(f"{name}, WER %" for name in sets)], lines)


def published():
    """What the papers and recipes of others report for 960 h of LibriSpeech."""
    fields = ["parameters", "head", "search", "test_clean", "test_other"]
    lines = []
    for row in read(PUBLISHED):
        lines.append([f"[{row['model']}]({row['source']})", *(row[field] for field in fields), f"`{row['here']}`"])
    return table(["model", "parameters", "head", "search", "test-clean, WER %", "test-other, WER %", "here"], lines)


def streams(page):
    """Time per chunk and state of an encoder's streams, on the benchmark's first machine."""
    header = ["encoder", "left context, chunks", "after, s", "ms per chunk", "state, kB"]
    rows = []
    for row in read(BENCH / "intel-xeon-processor-2-threads.csv"):
        if row["task"] == "streaming" and row["encoder"].split(",")[0] == page and row["ms"]:
            context = "all" if row["left_context"] == "-1" else row["left_context"]
            rows.append([row["encoder"], context, row["seconds"], row["ms"], f"{int(row['state_bytes']) / 1000:,.0f}"])
    return table(header, rows)


def hypermixing():
    """Time and memory of HyperMixing here and in SpeechBrain."""
    fields = ["frames", "ours_ms", "speechbrain_ms", "time_ratio", "ours_mib", "speechbrain_mib", "memory_ratio"]
    header = ["frames", "ours, ms", "SpeechBrain, ms", "times as fast as SpeechBrain"]
    header += ["ours, MiB", "SpeechBrain, MiB", "SpeechBrain's memory / ours"]
    return columns(HYPERMIXING, fields, header)


def squeezeformer():
    """Time of the Squeezeformer and of the Conformer."""
    faster = "times as fast as the Conformer"
    header = ["size", "task", "audio, s", "Conformer, ms", "Squeezeformer, ms", faster, "fused, ms", f"fused, {faster}"]
    header.append("multiply-accumulates / the Conformer's")
    rows = []
    for row in read(SQUEEZEFORMER):
        task = f"{row['task']}, {'encoder alone' if row['part'] == 'encoder' else 'with front end'}"
        times = [row["squeezeformer_ms"], _inverse(row["ratio"]), row["fused_ms"], _inverse(row["fused_ratio"])]
        rows.append([row["size"].upper(), task, row["seconds"], row["conformer_ms"], *times, row["mac_ratio"]])
    return table(header, rows)


def _inverse(ratio):
    """How many times as fast something is that takes this share of another's time; empty if it was not measured."""
    return f"{1 / float(ratio):.2f}" if ratio else ""


def fusionformer():
    """Time of the FusionFormer, fused and not, and of the Conformer."""
    faster = "times as fast as the Conformer"
    header = ["audio, s", "threads", "mode", "Conformer, ms", "unfused, ms", faster, "fused, ms", f"fused, {faster}"]
    rows = []
    for row in read(FUSIONFORMER):
        task = f"chunk of {row['seconds']}" if row["task"] == "stream" else row["seconds"]
        times = [row["unfused_ms"], f"{float(row['unfused_ratio']):.2f}", row["fused_ms"], f"{float(row['fused_ratio']):.2f}"]
        rows.append([task, row["threads"], row["mode"], row["conformer_ms"], *times])
    return table(header, rows)


def practical_conformer():
    """Time and state per chunk of streams, a row for each encoder and chunk."""
    streams = {}
    for row in read(PRACTICAL_CONFORMER):
        streams.setdefault((row["encoder"], row["left_context"], row["chunk_ms"]), []).append(row)
    times = [f"{float(row['after_seconds']):g} s" for row in next(iter(streams.values()))]
    header = ["encoder", "left context", "chunk, ms", *(f"ms after {time}" for time in times)]
    header += [f"times as fast as `conformer_large` after {time}" for time in times]
    header += [f"state after {time}, kB" for time in (times[0], times[-1])]
    return table(
        header,
        [
            [
                *key,
                *(row["ms_per_chunk"] for row in rows),
                *(row["ratio"] for row in rows),
                *(f"{int(row['state_bytes']) / 1000:,.0f}" for row in (rows[0], rows[-1])),
            ]
            for key, rows in streams.items()
        ],
    )


def streaming():
    """Error rates and latencies of streams."""
    fields = ["encoder", "test_set", "chunk_ms", "wer", "first_token_s", "token_s", "token_95_s", "real_time_factor"]
    header = [
        "encoder",
        "test set",
        "chunk, ms",
        "WER %",
        "first token, s",
        "median of tokens, s",
        "95 % of tokens, s",
        "real-time factor",
    ]
    rows = [row | {"encoder": row["encoder"].replace("Cascaded", "Cascade")} for row in read(STREAMING)]
    return table(header, [[row[field] for field in fields] for row in rows])


def long_audio():
    """Memory and time of long files."""
    fields = ["encoder", "mode", "minutes", "peak_mib", "seconds", "real_time_factor"]
    header = ["encoder", "as", "minutes", "peak memory, MiB", "time, s", "real-time factor"]
    return columns(LONG_AUDIO, fields, header)


def manifests():
    """Times to check manifests."""
    fields = ["rows", "hours", "seconds", "processor_seconds", "again_seconds"]
    return columns(MANIFESTS, fields, ["rows", "hours", "time, s", "processor time, s", "time when nothing has changed, s"])


def search():
    """Times of the searches."""
    fields = ["search", "threads", "seconds", "ms", "rtfx", "times_speechbrain"]
    header = ["search", "threads", "audio, s", "ms", "RTFx", "times as fast as SpeechBrain"]
    return columns(SEARCH, fields, header)


def heads():
    """Error rates on the embedded corpus: a row for each model and pass, a column for each search and language model."""
    models = {}
    for row in (row for row in read(HEADS) if not row["phrases"]):
        model = Path(row["model"]).parts[0] + pass_in(row["search"])
        kind = next(kind for kind in ("greedy", "rescored", "beam") if kind in row["search"])
        lms = " - ".join(filter(None, (row["lm"], row.get("lodr"))))
        models.setdefault(model, {})[f"{kind} {lms}".strip()] = _with_interval(row)
    shown = [column for column in HEAD_COLUMNS if any(column in rates for rates in models.values())]
    lines = [[model, *(rates.get(column, "") for column in shown)] for model, rates in models.items()]
    return table(["model", *map(HEAD_COLUMNS.get, shown)], lines)


def phrases():
    """Error rates and recall with phrases, and without, on real speech and on the embedded corpus; without cascades."""
    lines, found = [], [row for path in (WORDS / "results.csv", WORDS / "searches.csv", HEADS) for row in read(path)]
    without = {
        (Path(row.get("model") or row["experiment"]).parts[0], row["test_set"], row["search"]): f"{float(row['WER']):.1f}"
        for row in found
        if not (row.get("phrases") or row.get("lm"))
    }
    found = [row for row in found if row.get("phrases") and not row["lm"] and not pass_in(row["search"])]
    # The last row of each, as everywhere
    found = {tuple(row[key] for key in ("model", "test_set", "search", "phrase_bonus")): row for row in found}.values()
    for row in sorted(found, key=lambda row: (row["test_set"], row["model"])):
        name, is_greedy = Path(row["model"]).parts[0], "greedy" in row["search"]
        lines.append(
            [
                name,
                row["test_set"],
                row["search"],
                "" if is_greedy else row.get("phrase_bonus", ""),
                "" if is_greedy else without.get((name, row["test_set"], row["search"]), ""),
                _with_interval(row),
                f"{float(row['phrase_recall']):.0f} % of {row['phrases_said']}",
            ]
        )
    return table(["model", "test set", "search", "bonus per token", "WER % without phrases", "WER %", "phrases found"], lines)


def lm():
    """Times of a language model's scorers."""
    fields = ["scorer", "hypotheses", "tokens", "seconds", "times_as_fast", "largest_difference"]
    return columns(
        LM, fields, ["scorer", "hypotheses", "tokens", "s", "times as fast", "largest difference of a log-probability"]
    )


def transducer_loss():
    """Time and memory of the transducer's losses."""
    fields = ["machine", "loss", "vocab", "ms", "mib", "times_as_fast", "share_of_memory"]
    return columns(TRANSDUCER_LOSS, fields, ["on", "loss", "tokens", "ms", "MiB", "times as fast", "share of the memory"])


def transducer_search():
    """Times and scores of the transducer searches of 15 s."""
    fields = ["search", "predictor", "beam", "ms", "rtfx", "times_speechbrain", "score", "errors"]
    header = ["search", "predictor", "beam", "ms", "RTFx", "times as fast as SpeechBrain", "score", "token errors %"]
    return table(header, [[row[field] for field in fields] for row in read(TRANSDUCER_SEARCH) if row["seconds"] == "15"])


def training():
    """Time and memory of a training step of the 8M HyperConformer."""
    fields = ["modules", "threads", "seconds", "ms", "ms_lower", "ms_upper", "times_speechbrain", "peak_mib"]
    quartiles = ["lower quartile", "upper quartile"]
    header = ["modules", "threads", "audio, s", "ms", *quartiles, "times as fast as SpeechBrain", "peak MiB"]
    return columns(TRAINING, fields, header)


def memory():
    """Seconds of audio in a training step that fit on GPUs."""
    fields = [field for field in read(MEMORY)[0] if field.startswith("seconds_")]
    files = {}
    for row in read(MEMORY):
        files.setdefault(row["hparams"], {})[row["activation_checkpointing"]] = [f"{int(row[field]):,}" for field in fields]
    rows = [[f"`{name}`", *map(" / ".join, zip(found["False"], found["True"], strict=True))] for name, found in files.items()]
    return table(["file", *(f"{field.removeprefix('seconds_')} GB" for field in fields)], rows)


def sherpa():
    """Texts, sizes and times of all encoders in sherpa-onnx, with random weights, in float32 and 8 bits."""
    return _sherpa("encoder", [row for row in read(SHERPA) if not row["wer"]])


def sherpa_trained():
    """The same of trained models, with error rates."""
    return _sherpa("model", [row for row in read(SHERPA) if row["wer"]], {"wer": "WER %"})


def _sherpa(name, found, more=()):
    """A line for each model and type, with the values of both precisions."""
    pairs, lines = {}, []
    for row in found:
        pairs.setdefault((row["encoder"], row["type"]), []).append(row)
    columns = dict(more) | {"size_mib": "MiB", "real_time_factor": "real-time factor", "peak_mib": "peak memory, MiB"}
    for (model, kind), (float32, int8) in pairs.items():
        equal = f"{float32['texts_equal']} / {int8['texts_equal']} of {int8['utterances']}"
        both = [f"{float32[key]} / {int8[key]}" for key in columns]
        differ = f"{100 * float(int8['letters_differ']):.1f}"
        lines.append([model, f"`{kind}`", equal, differ, float32["largest_difference"], *both])
    header = [name, "type", "texts equal", "letters that differ in 8 bits, %", "largest difference", *columns.values()]
    return table(header, lines)


def peers():
    """Error rates, sizes and times of recognisers of others in their runtimes."""
    rows = []
    for row in (row for row in read(PEERS) if row["test_set"] == PEERS_SET):
        wer = f"{row['WER']} ({row['WER_low']} to {row['WER_high']})"
        parameters = f"{int(row['parameters']):,}" if row["parameters"] else ""
        figures = (row[key] for key in ("cpu_per_audio", "real_time_factor", "size_mib", "peak_memory_mib"))
        rows.append([row["system"], row["package"], wer, parameters, *figures])
    header = ["system", "package", "WER %, 95 % interval", "parameters", "processor seconds per second of audio"]
    return table([*header, "real-time factor", "size, MiB", "peak memory, MiB"], rows)


def bench():
    """Results of ``python -m speechbrain_ext bench``, machine by machine."""
    return markdown(files(BENCH))


BASE = ROOT / "speechbrain_ext" / "training" / "hparams" / "ctc_attention.yaml"
OTHERS = [
    *(path for path in sorted(BASE.parent.glob("*.yaml")) if path != BASE),
    *sorted((ROOT / "recipes").glob("*/corpus.yaml")),
    *sorted((ROOT / "hparams").glob("*.yaml")),
]
"""Hparams files that override the base."""


def keys_of(path):
    """The keys of an hparams file, in order, as (section, key, value, explanation).

    An explanation is the comment after a key, or the comment lines above it. Comment lines above a group of keys, without empty
    lines in the group, explain all its keys that have no other comment.
    """
    found, section, above, group, boxed = [], "", [], "", False
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.fullmatch(r"# #{20,}", line):
            boxed = not boxed  # the file's head is between two such lines
        elif boxed:
            continue
        elif title := re.fullmatch(r"# #+ (.+?) #+", line):
            section, above, group = title[1], [], ""
        elif line.startswith("#"):
            above.append(line.removeprefix("#").strip())
        elif not line.strip():
            above, group = [], ""
        elif line[0] in " \t-":
            found[-1][2].append(re.sub(r"\s+#\s.*", "", line.strip()))
        elif key := re.match(r"(\w+):\s*((?:[^#]|#(?! ))*)(?:#\s(.*))?$", line):
            group = " ".join(above) or group
            said = ". ".join(filter(None, [" ".join(above).rstrip("."), key[3]])) or group
            found.append((section, key[1], [key[2].strip()], said))
            above = []
    return [
        (section, key, " ".join(filter(None, (value, ", ".join(inner)))), said) for section, key, (value, *inner), said in found
    ]


def arguments_of(path):
    """The arguments of the classes in an hparams file, as (argument, value, explanation) by key.

    References to other keys, and what is further inside, are left out; so is the card, which is text.
    """
    found, key = {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if top := re.match(r"(\w+):", line):
            key = top[1]
        elif inner := re.match(r" {4}(\w+): ((?:[^#]|#(?! ))+)(?:#\s(.*))?$", line):
            argument, value, said = inner[1], inner[2].strip(), inner[3] or ""
            if key != "card" and "!" not in value:
                found.setdefault(key, []).append((argument, value, said))
    return found


def hparams():
    """Every key of every hparams file: its default, its explanation, and the files that set it."""
    base = [entry for entry in keys_of(BASE) if not entry[1].startswith("__")]
    known = {key for _, key, *_ in base}
    set_in = {}
    for path in OTHERS:
        for _, key, *_ in keys_of(path):
            set_in.setdefault(key, []).append(path)
        for key, found in arguments_of(path).items():
            for argument, *_ in found:
                set_in.setdefault((key, argument), []).append(path)
    arguments = arguments_of(BASE)
    parts, sections = [], {}
    for section, key, value, said in base:
        rows = sections.setdefault(section or "Seed", [])
        rows.append([f"`{key}`", _value(value), _explained(BASE, key, said), _names(set_in.get(key, []))])
        for argument, inner, said in arguments.get(key, []) if _is_cut(value) else []:
            names = _names(set_in.get((key, argument), []))
            rows.append([f"`{key}: {argument}`", _value(inner), _cell(said), names])
    for section, rows in sections.items():
        parts += [f"### {section}", table(["key", "default", "what", "also set in"], rows)]
    parts.append("## Keys and values of single files")
    for path in OTHERS:
        rows, arguments = [], arguments_of(path)
        for _, key, value, said in keys_of(path):
            if key != "extends":
                said = said if key in known else _explained(path, key, said)
                rows.append([f"`{key}`", _value(value), _cell(said)])
                inner = arguments.get(key, []) if _is_cut(value) else []
                rows += [[f"`{key}: {name}`", _value(value), _cell(said)] for name, value, said in inner]
        extends = [Path(name) for _, key, value, _ in keys_of(path) if key == "extends" for name in re.findall(r"[\w./]+", value)]
        parts += [f"### {_names([path])}", f"{_about(path)} It extends {_names(extends)}." if extends else _about(path)]
        parts.append(table(["key", "value", "what"], rows))
    return "\n\n".join(parts)


def _about(path):
    """The first paragraph of a file's head."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if re.fullmatch(r"#*", text) or not line.startswith("#"):
            if lines or not line.startswith("#"):
                break
            continue
        lines.append(text)
    return " ".join(lines)


def _explained(path, key, said):
    if not said:
        raise ValueError(f"{path.relative_to(ROOT)}: the key {key} has no explanation; write a comment after it or above it.")
    return _cell(said)


def _names(paths):
    return ", ".join(f"`{path.parent.name}/{path.name}`" if path.name == "corpus.yaml" else f"`{path.name}`" for path in paths)


def _is_cut(text):
    """Whether a value is too long for a cell; its arguments have rows of their own then."""
    return len(text) > 64


def _value(text):
    """A value for a cell; long values are cut after the first word, such as a class or a key."""
    text = text.replace("!PLACEHOLDER", "") if text.startswith("!PLACEHOLDER") else text
    if _is_cut(text):
        text = text.split(" ")[0].rstrip(",") + " ..." + "]" * text.startswith("[")
    return f"`{_cell(text)}`" if text else ""


def _cell(text):
    return text.replace("|", "\\|")


def fill(text):
    """A page's text with new tables."""
    makers = [results, training, search, streaming, long_audio, hypermixing, squeezeformer, fusionformer, practical_conformer]
    makers += [
        words,
        summary,
        fine_tuning,
        memory,
        gpu,
        manifests,
        transducer_loss,
        transducer_search,
        heads,
        phrases,
        lm,
        published,
        sherpa,
        sherpa_trained,
        peers,
        bench,
        hparams,
    ]
    for name, make in ((path.stem, make) for path in ENCODERS for make in (results, streams)):
        if f"<!-- {make.__name__}_{name}:begin -->" in text:
            text = put(text, f"{make.__name__}_{name}", make(name))
    for make in makers:
        if f"<!-- {make.__name__}:begin -->" in text:
            text = put(text, make.__name__, make())
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
