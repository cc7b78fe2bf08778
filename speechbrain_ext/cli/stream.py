"""``stream``: text while audio comes in."""

import sys
from contextlib import redirect_stdout

from speechbrain_ext.cli._common import add_device, add_model, add_pass, add_search, choose_search, load, say, usage
from speechbrain_ext.utils.errors import UsageError


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "stream",
        help="transcribe while audio comes in",
        description="Print each segment of a stream when it ends: start<TAB>end<TAB>text. A terminal shows words at once.",
    )
    add_model(parser)
    add_pass(parser)
    add_search(parser)
    add_device(parser)
    parser.add_argument(
        "file", metavar="FILE|-", help="an audio file, or - for raw samples on standard input (16 bits, one channel)"
    )
    parser.add_argument("--sample-rate", type=int, help="sample rate of raw samples on standard input in Hz (16000)")
    parser.add_argument(
        "--chunk-size", type=int, metavar="FRAMES", help="frames of 40 ms per chunk; by default the value of the model"
    )
    parser.add_argument(
        "--left-context", type=int, metavar="CHUNKS", help="chunks of left context, -1 = all; by default the value of the model"
    )
    parser.add_argument("--endpoint", type=float, default=0.8, metavar="SECONDS", help="silence that ends a segment (0.8)")
    parser.add_argument("--realtime", action="store_true", help="read a file at the speed of speech")
    parser.set_defaults(run=run)


def run(arguments):
    """Print each segment of a stream when it ends; print latency and speed at the end."""
    with redirect_stdout(sys.stderr):
        from speechbrain_ext.dataio.audio import HIGHEST_RATE, LOWEST_RATE, AudioError

        if arguments.sample_rate is None:
            arguments.sample_rate = 16000
        elif arguments.file != "-":
            raise UsageError("--sample-rate is for raw samples on standard input; leave it out, a file states its own.")
        if not LOWEST_RATE <= arguments.sample_rate <= HIGHEST_RATE:
            rates = f"{LOWEST_RATE} to {HIGHEST_RATE}"
            raise UsageError(f"--sample-rate is {arguments.sample_rate}; give a rate in Hz, {rates}.")
    model = load(arguments)
    choose_search(model, arguments)
    with usage():
        from speechbrain_ext.inference.streaming import StreamingRecognizer, Timer

        recognizer = StreamingRecognizer(model, arguments.chunk_size, arguments.left_context, arguments.endpoint)
        if model.mods.encoder.chunk_size is None:
            say("this model was trained in full context only; in chunks it makes more errors.")
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
        for wav in _pieces(arguments, model.sample_rate):
            show(timer.accept(wav))
    except (KeyboardInterrupt, SystemExit) as stop:  # the text so far is still printed
        status = getattr(stop, "code", 130)
    except AudioError as error:
        say(error)
        status = 1
    show(timer.finish())
    if shows:
        print("\r\033[K", end="", file=sys.stderr)
    if status != 1:
        say(timer.report())
    return status


def _pieces(arguments, target, seconds=0.1):
    """Yield the samples of a file or of standard input in pieces."""
    import numpy as np
    import torch

    from speechbrain_ext.dataio.audio import AudioError, read_blocks
    from speechbrain_ext.dataio.resampling import Resampler

    if arguments.file != "-":
        yield from read_blocks(arguments.file, seconds, sample_rate=target)
        return
    if sys.stdin is None:
        raise AudioError("Standard input is closed; send raw samples of 16 bits to it.")
    resampler, kept, empty = Resampler(arguments.sample_rate, target), b"", True
    for data in _raw_pieces(sys.stdin.buffer, 2 * round(seconds * arguments.sample_rate)):
        data = kept + data
        kept = data[len(data) // 2 * 2 :]  # half a sample
        samples = np.frombuffer(data, "<i2", len(data) // 2).astype(np.float32) / 32768
        empty = empty and not len(samples)
        yield torch.from_numpy(resampler.accept(samples))
    if empty:
        raise AudioError("Standard input holds no samples; send raw samples of 16 bits to it.", "empty")
    yield torch.from_numpy(resampler.finish())


def _raw_pieces(stdin, size):
    """Yield the bytes of standard input as they arrive; refuse them if the first bytes are those of a file format."""
    from speechbrain_ext.dataio.audio import AudioError
    from speechbrain_ext.dataio.containers import READABLE, container_name, head_size

    head = b""
    while len(head) < head_size(head) and (data := stdin.read1(size)):
        head += data
    if name := container_name(head):
        raise AudioError(
            f"Standard input begins like a file in {name} format, but - needs raw samples of 16 bits; "
            + ("give the file's name instead of -, or convert it to raw samples." if name in READABLE else "convert it to these.")
        )
    yield head
    while data := stdin.read1(size):
        yield data
