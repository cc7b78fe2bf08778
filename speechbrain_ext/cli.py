"""The command line: ``python -m speechbrain_ext COMMAND ...``.

Results go to standard output, all else to standard error. The exit status is 0 only when all went well, 2 for wrong usage,
1 otherwise.
"""

import argparse
import io
import math
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

WINDOW = 256  # files that are sorted by length together: enough for full batches, few enough to see results soon
BATCH_SECONDS = 120  # of audio, padding included
LONG_SECONDS = 60  # longer files go in pieces


class UsageError(Exception):
    """Wrong arguments; the message says what to change."""


def main(argv=None):
    """Run a command.

    Arguments
    ---------
    argv : list of str, optional
        The arguments; by default those of the process.

    Returns
    -------
    int
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="speechbrain_ext", description="Speech recognition with speechbrain_ext's models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_transcribe(commands)
    _add_stream(commands)
    _add_export(commands)
    _add_publish(commands)
    _add_bench(commands)
    arguments = parser.parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # a name or word that the terminal cannot show is no reason to stop
            output.reconfigure(errors="backslashreplace")
    try:
        return arguments.run(arguments)
    except UsageError as error:
        _say(error)
        return 2
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # such as "| head", which needs no more
            place = error.filename or "Standard input or output"
            _say(f"{place} cannot be read or written: {error.strerror}; what is done is kept.")
        if error.filename is None:  # without this, Python complains again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _add_transcribe(commands):
    parser = commands.add_parser(
        "transcribe",
        help="print what is said in audio files",
        description="Print FILE<TAB>text for each audio file, of any length. In FILE, tabs, line ends and backslashes are "
        "written as \\t, \\n, \\r and \\\\.",
    )
    _add_model(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="an audio file in any format that soundfile reads")
    parser.add_argument("--output", metavar="FOLDER", help="write FOLDER/NAME.jsonl, .srt and .vtt; goes on where it was stopped")
    parser.add_argument("--streaming", action="store_true", help="hear files as a stream, whatever their length and the model")
    parser.set_defaults(run=transcribe)


def _add_stream(commands):
    parser = commands.add_parser(
        "stream",
        help="transcribe while audio comes in",
        description="Print the segments of a stream as they end: start<TAB>end<TAB>text. On a terminal, words show as they come.",
    )
    _add_model(parser)
    parser.add_argument(
        "file", metavar="FILE|-", help="an audio file, or - for raw samples on standard input (16 bits, one channel)"
    )
    parser.add_argument("--sample-rate", type=int, default=16000, help="of standard input")
    parser.add_argument("--chunk-size", type=int, metavar="FRAMES", help="of 40 ms per chunk; by default the model's")
    parser.add_argument("--left-context", type=int, metavar="CHUNKS", help="to look back, -1 = all; by default the model's")
    parser.add_argument("--endpoint", type=float, default=0.8, metavar="SECONDS", help="of silence that end a segment")
    parser.add_argument("--realtime", action="store_true", help="take a file in as fast as it would be spoken")
    parser.set_defaults(run=stream)


def _add_model(parser):
    parser.add_argument("model", metavar="MODEL", help="a folder that training left behind, or a Hugging Face repository")
    parser.add_argument("--device", help="such as cpu or cuda:0; by default a GPU if there is one")
    parser.add_argument("--pass", dest="answer", choices=("first", "second"), help="of a cascade, which pass answers")
    parser.add_argument("--revision", help="of a Hugging Face repository, the commit, tag or branch")


def _load(arguments):
    with redirect_stdout(sys.stderr):  # whatever the libraries say
        from speechbrain_ext.inference import load_model

        try:
            return load_model(arguments.model, arguments.device, arguments.answer, arguments.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(str(error)) from error


def _say(message):
    print(f"speechbrain_ext: {_sentence(message)}", file=sys.stderr)


def _field(text):
    """A field of a line of tab-separated values: such a line stays one."""
    return text.translate({ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"})


def transcribe(arguments):
    """Print the transcripts of files in their order; a file that cannot be transcribed is reported, and the others go on."""
    names = [Path(file).stem for file in arguments.files]
    if arguments.output == "":
        raise UsageError("--output is empty; name a folder.")
    if arguments.output and len(set(names)) < len(set(arguments.files)):
        name = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"Several files would be written to {arguments.output}/{name}.jsonl; give them one by one.")
    model = _load(arguments)
    with redirect_stdout(sys.stderr):
        from tqdm import tqdm

        if arguments.streaming:
            _recognizer(model)
        outputs = _outputs(model, arguments) if arguments.output else {}
    files, failed = arguments.files, False
    with tqdm(total=len(files), unit=" files", disable=len(files) < 2) as progress:
        for start in range(0, len(files), WINDOW):
            window = files[start : start + WINDOW]
            with redirect_stdout(sys.stderr):
                texts = _transcribe(model, window, outputs, arguments.streaming, progress)
            with progress.external_write_mode(file=sys.stdout):  # a terminal shows both; no line begins behind the bar
                for file in window:
                    if file in texts:
                        print(_field(file), texts[file], sep="\t", flush=True)
                    else:
                        failed = True
    return int(failed)


def _outputs(model, arguments):
    """What is written for each file."""
    from speechbrain_ext.inference.long_audio import SegmentFile, settings_of

    settings, outputs = settings_of(model, arguments.streaming), {}
    for file in filter(os.path.isfile, arguments.files):  # what is none is reported where it is read
        try:
            outputs[file] = SegmentFile(arguments.output, file, settings)
        except OSError as error:
            place = error.filename or arguments.output
            raise UsageError(f"{place} cannot be written to: {error.strerror}; give another folder.") from error
        except ValueError as error:
            raise UsageError(str(error)) from error
        if outputs[file].finished:
            _say(f"{arguments.output}/{Path(file).stem}.jsonl is there already and left as it is; delete it to transcribe again.")
    return outputs


def _transcribe(model, files, outputs, streaming, progress):
    """Texts by file: long ones in pieces, the others in batches of about the same length; without the files that fail."""
    from tqdm import tqdm

    from speechbrain_ext.inference.audio import SAMPLE_RATE, AudioError, count_samples
    from speechbrain_ext.inference.long_audio import transcribe_long
    from speechbrain_ext.inference.segments import split_at_pauses

    def report(file, error):
        message = error if isinstance(error, AudioError) else f"{file} cannot be transcribed: {error}"
        with progress.external_write_mode(file=sys.stderr):
            _say(message)
        progress.update()
        if file in outputs:
            outputs[file].abandon()

    def done(file, segments):
        texts[file] = " ".join(segment.text for segment in segments)
        progress.update()

    def keep(file, segments):
        if file in outputs:
            for segment in segments:
                outputs[file].add(segment)
            outputs[file].finish()
        done(file, segments)

    wavs, texts = {}, {}
    for file in files:
        try:
            if file in texts or file in wavs:
                progress.update()
            elif file in outputs and outputs[file].finished:
                done(file, outputs[file].segments)
            elif (seconds := count_samples(file) / SAMPLE_RATE) <= LONG_SECONDS and not streaming:
                wavs[file] = model.load_audio(file)
            else:
                keep_from, segments = outputs.get(file), []
                start = 0.0 if keep_from is None else keep_from.start
                with tqdm(total=math.ceil(seconds), initial=int(start), unit=" s", desc=_field(Path(file).name)) as heard:
                    for segment in transcribe_long(model, file, streaming or None, start, heard.update):
                        segments.append(segment)
                        if keep_from is not None:
                            keep_from.add(segment)
                if keep_from is not None:
                    segments = keep_from.segments
                    keep_from.finish()
                done(file, segments)
        except (AudioError, RuntimeError) as error:
            report(file, error)
    limit = BATCH_SECONDS * SAMPLE_RATE
    batches = []
    for file in sorted(wavs, key=lambda file: len(wavs[file])):
        if not batches or (len(batches[-1]) + 1) * len(wavs[file]) > limit:
            batches.append([])
        batches[-1].append(file)
    while batches:
        batch = batches.pop()
        try:
            for file, segment in zip(batch, _segments(model, [wavs[file] for file in batch]), strict=True):
                keep(file, [] if segment is None else split_at_pauses(segment))
        except RuntimeError as error:  # such as too little memory: the files one by one, before any is given up
            if len(batch) > 1:
                batches += [[file] for file in batch]
                continue
            report(batch[0], error)
    return texts


def _segments(model, wavs):
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
    return model.transcribe_segments(pad_sequence(wavs, batch_first=True), lengths / lengths.max())


def _recognizer(model, *settings):
    from speechbrain_ext.inference.streaming import StreamingRecognizer

    try:
        return StreamingRecognizer(model, *settings)
    except ValueError as error:
        raise UsageError(str(error)) from error


def stream(arguments):
    """Print the segments of a stream as they end; figures of latency and speed at the end."""
    with redirect_stdout(sys.stderr):
        from speechbrain_ext.inference.audio import HIGHEST_RATE, LOWEST_RATE, AudioError

        if not LOWEST_RATE <= arguments.sample_rate <= HIGHEST_RATE:
            rates = f"{LOWEST_RATE} to {HIGHEST_RATE}"
            raise UsageError(f"--sample-rate is {arguments.sample_rate}; give the number of samples per second, {rates}.")
    model = _load(arguments)
    with redirect_stdout(sys.stderr):
        from speechbrain_ext.inference.streaming import Timer

        recognizer = _recognizer(model, arguments.chunk_size, arguments.left_context, arguments.endpoint)
        if model.mods.encoder.chunk_size is None:
            _say("this model was trained in full context only; in chunks it makes more errors.")
        timer = Timer(recognizer, pace=arguments.realtime)
    status, shows = 0, sys.stderr.isatty()

    def show(segments):
        if shows:
            print("\r\033[K", end="", file=sys.stderr)
        for segment in segments:
            print(f"{segment.start:.2f}", f"{segment.end:.2f}", segment.text, sep="\t", flush=True)
        if shows:
            print(recognizer.text[-100:], end="", file=sys.stderr, flush=True)

    try:
        for wav in _pieces(arguments):
            show(timer.accept(wav))
    except KeyboardInterrupt:  # what was heard is still told
        status = 130
    except AudioError as error:
        _say(error)
        status = 1
    show(timer.finish())
    if shows:
        print("\r\033[K", end="", file=sys.stderr)
    if status != 1:
        _say(timer.report())
    return status


def _pieces(arguments, seconds=0.1):
    """The samples of a file or of standard input, piece by piece."""
    import numpy as np
    import torch

    from speechbrain_ext.inference.audio import AudioError, Resampler, read_blocks

    if arguments.file != "-":
        yield from read_blocks(arguments.file, seconds)
        return
    if sys.stdin is None:
        raise AudioError("Standard input is closed; send it raw samples of 16 bits.")
    resampler, kept, empty = Resampler(arguments.sample_rate), b"", True
    while data := sys.stdin.buffer.read1(2 * round(seconds * arguments.sample_rate)):
        data = kept + data
        kept = data[len(data) // 2 * 2 :]  # half a sample
        samples = np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) / 32768
        empty = empty and not len(samples)
        yield torch.from_numpy(resampler.accept(samples))
    if empty:
        raise AudioError("Standard input holds no samples; send it raw samples of 16 bits.", "empty")
    yield torch.from_numpy(resampler.finish())


def _add_publish(commands):
    parser = commands.add_parser(
        "publish", help="upload a trained model to Hugging Face", description="Upload a trained model; prints its URL."
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder that training left behind")
    parser.add_argument("repo_id", metavar="REPO_ID", help="where to, as user/model; a repository that is missing is made")
    parser.add_argument("--private", action="store_true", help="make a repository that only you can read")
    parser.add_argument("--revision", metavar="BRANCH", help="a branch, made where it is missing; by default main")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--license", metavar="NAME", help="for the model card, such as cc-by-4.0; by default none is stated")
    parser.set_defaults(run=publish)


def publish(arguments):
    """Upload a model folder as one commit, and print the URL of that commit."""
    with redirect_stdout(sys.stderr):
        from speechbrain_ext.inference.publish import PublishError
        from speechbrain_ext.inference.publish import publish as upload

        try:
            options = {key: getattr(arguments, key) for key in ("private", "revision", "message", "license")}
            url = upload(arguments.folder, arguments.repo_id, **options)
        except PublishError as error:
            _say(error)
            return 1
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(str(error)) from error
    print(url)
    return 0


def _add_export(commands):
    parser = commands.add_parser(
        "export", help="write a model as an ONNX file", description="Write a model's CTC branch as an ONNX file, and check it."
    )
    parser.add_argument("model", metavar="MODEL", help="a folder that training left behind, or a Hugging Face repository")
    parser.add_argument("out", metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--int8", action="store_true", help="keep the weights in 8 bits")
    parser.add_argument("--streaming", action="store_true", help="for streams: one chunk and the state in, the next state out")
    parser.add_argument("--chunk-size", type=int, metavar="FRAMES", help="of streams, in frames of 40 ms; by default the model's")
    parser.add_argument(
        "--left-context", type=int, metavar="CHUNKS", help="of streams, in chunks, -1 = all; by default the model's"
    )
    parser.add_argument("--pass", dest="answer", choices=("first", "second"), help="of a cascade, which pass to export")
    parser.add_argument(
        "--audio", metavar="FILE", nargs="+", default=(), help="audio files to check on, or folders in LibriSpeech layout"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="accepted difference of log-probabilities (1e-3); with --int8, token error rate (0.05, or 0.2 without --audio)",
    )
    parser.set_defaults(run=export)


def export(arguments):
    """Write an ONNX file and print what its check found."""
    with redirect_stdout(sys.stderr):  # whatever the libraries say
        from speechbrain_ext.inference.export import ExportError, export_model

        try:
            if not arguments.streaming and (arguments.chunk_size, arguments.left_context) != (None, None):
                raise ValueError("--chunk-size and --left-context are for streams; add --streaming.")
            options = ("answer", "int8", "audio", "tolerance", "streaming", "chunk_size", "left_context")
            given = {key: getattr(arguments, key) for key in options}
            report = export_model(arguments.model, arguments.out, **given)
        except ExportError as error:
            _say(error)
            return 1
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise UsageError(str(error)) from error
    print(report)
    return 0


def _add_bench(commands):
    parser = commands.add_parser(
        "bench",
        help="measure all encoders, and what you would use otherwise, on this machine",
        description="Measure every registered encoder, SpeechBrain's and torchaudio's at equal work: parameters and operations, "
        "inference by length and batch, training, streams. Rows go to a CSV file, tables and plots beside it; tables also to "
        "standard output. The same command goes on where it was stopped.",
        argument_default=argparse.SUPPRESS,  # the defaults are those of speechbrain_ext.bench.run.Settings
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes on two cores")
    parser.add_argument("--output", metavar="FILE.csv", help="by default results/bench/MACHINE.csv, or MACHINE-quick.csv")
    parser.add_argument("--report", action="store_true", help="measure nothing; --output may be a folder with a file per machine")
    parser.add_argument("--readme", metavar="FILE.md", help="put the tables between its marks bench:begin and bench:end, too")
    parser.add_argument("--wer", metavar="FILE.csv", help="results of training at these dimensions, to plot against cost")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--encoders", nargs="+", metavar="NAME", help="registered names; by default all")
    what.add_argument("--peers", nargs="*", metavar="NAME", help="by default all; without a name none")
    what.add_argument("--equal-only", dest="own_sizes", action="store_false", help="time no encoder at its own sizes")
    for key, usual in (("d-model", 144), ("nhead", 8), ("num-layers", 10), ("d-ffn", 576), ("kernel-size", 31)):
        what.add_argument(f"--{key}", type=int, metavar="N", help=f"of all at equal work; {usual}")
    how = parser.add_argument_group("how")
    how.add_argument("--parts", nargs="+", metavar="PART", help="of size, inference, training, streaming")
    how.add_argument("--inputs", nargs="+", metavar="INPUT", help="'encoder' alone, or with 'front end'")
    how.add_argument("--forms", nargs="+", metavar="FORM", help="of plain, fused, int8")
    how.add_argument("--device", help="cpu or cuda; cpu")
    how.add_argument("--threads", type=int, metavar="N")
    how.add_argument("--precision", nargs="+", metavar="TYPE", help="of float32, bfloat16 (autocast)")
    how.add_argument("--compiled", action="store_true", help="also compiled; on a CPU, needs a C++ compiler")
    how.add_argument("--seconds", type=int, nargs="+", metavar="N", help="of audio; 5 10 20 40 80 160")
    how.add_argument("--batch", type=int, nargs="+", metavar="N", help="utterances; 1 8")
    how.add_argument("--stream-seconds", type=int, nargs="+", metavar="N", help="moments of a stream; 60 600")
    how.add_argument("--chunk-size", type=int, metavar="FRAMES", help="of 40 ms per chunk; 16")
    how.add_argument("--left-context", type=int, nargs="+", metavar="CHUNKS", help="-1 = all; -1 10")
    how.add_argument("--rounds", type=int, metavar="N", help="of which the median counts; 15")
    how.add_argument("--retry", action="store_true", help="try again what has left a note in place of figures")
    how.add_argument("--budget", type=float, metavar="SECONDS", help="that one model may take in one cell; 120")
    parser.set_defaults(run=bench)


def bench(arguments):
    """Measure, and print the tables."""
    given = vars(arguments)
    options = {key: given.pop(key, None) for key in ("quick", "output", "report", "readme", "wer")}
    del given["run"]
    # PyTorch's profiler says that there is no GPU, and C++ warns of memory that is older than a profile; read when torch loads
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with redirect_stdout(sys.stderr):  # whatever the libraries say
        from speechbrain_ext.bench import report
        from speechbrain_ext.bench.models import EqualityError
        from speechbrain_ext.bench.run import QUICK, Settings, Table, check, machine, origin, run

        settings = Settings(
            **(QUICK if options["quick"] else {})
            | {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        )
        try:
            check(settings)
            path = Path(options["output"] or f"results/bench/{machine(settings)}{'-quick' * bool(options['quick'])}.csv")
            wers = report.read_wers(options["wer"], settings.dims) if options["wer"] else ()
            if options["report"]:
                report.files(path)
            elif path.exists():
                Table(path).check_origin(origin(settings))
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(str(error)) from error
        try:
            added = () if options["report"] else run(settings, path).added
        except EqualityError as error:
            _say(error)
            return 1
        tables = report.write(path)
        failed = sum(row["note"].startswith("failed") for row in added)
        if failed:
            _say(f"{failed} rows of {path} have a note in place of figures because something failed; --retry tries again.")
        status = int(failed > 0)
        try:
            report.plot(path, wers)
        except ImportError as error:
            _say(error)
            status |= bool(options["report"])
        if options["readme"]:
            report.write_readme(options["readme"], path)
    print(tables)
    return status


def _sentence(error):
    return " ".join(str(error).split())
