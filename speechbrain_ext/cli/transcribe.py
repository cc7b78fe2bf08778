"""``transcribe``: audio files to text."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

from speechbrain_ext.cli._common import add_device, add_model, add_pass, add_search, choose_search, load, say, usage
from speechbrain_ext.utils.errors import UsageError


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "transcribe",
        help="print the text of audio files",
        description="Print FILE<TAB>text for each audio file of any length. Tabs, line ends and backslashes in FILE are "
        "written as \\t, \\n, \\r and \\\\.",
    )
    add_model(parser)
    add_pass(parser)
    add_search(parser)
    add_device(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="an audio file in any format that soundfile reads")
    parser.add_argument("--output", metavar="FOLDER", help="write FOLDER/NAME.jsonl, .srt and .vtt; existing files are kept")
    parser.add_argument("--streaming", action="store_true", help="process all files as streams")
    parser.add_argument("--subtitle-lines", metavar="N", type=int, help="lines per subtitle, at most (2)")
    parser.add_argument("--subtitle-line-length", metavar="N", type=int, help="characters per line, at most (42)")
    parser.add_argument("--subtitle-seconds", metavar="S", type=float, help="seconds per subtitle, at most (7)")
    parser.add_argument("--word-times", action="store_true", default=None, help="write the start of each word into .vtt")
    parser.set_defaults(run=run)


def run(arguments):
    """Print the transcripts of files in their order. A file that cannot be transcribed is reported; the others continue."""
    if arguments.output == "":
        raise UsageError("--output is empty; give a folder.")
    asked = {
        "max_lines": arguments.subtitle_lines,
        "max_line_length": arguments.subtitle_line_length,
        "max_seconds": arguments.subtitle_seconds,
        "word_times": arguments.word_times,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and arguments.output is None:
        raise UsageError("Options for subtitles need --output; give a folder.")
    with usage():
        from speechbrain_ext.inference.subtitles import SubtitleOptions

        subtitle_options = SubtitleOptions(**asked) if asked else None
    model = load(arguments)
    choose_search(model, arguments)
    with usage():
        from speechbrain_ext.inference.streaming import StreamingRecognizer
        from speechbrain_ext.inference.transcribe import beside_bars, transcribe_files
        from speechbrain_ext.utils.text import tab_field

        if arguments.streaming:
            StreamingRecognizer(model)  # raises its errors before any file is read
        transcripts = transcribe_files(
            model, arguments.files, arguments.output, arguments.streaming, progress=True, subtitle_options=subtitle_options
        )
    failed = False
    while True:
        with redirect_stdout(sys.stderr):
            transcript = next(transcripts, None)
        if transcript is None:
            return int(failed)
        if transcript.error is not None:
            failed = True
            with beside_bars(sys.stderr):
                say(transcript.error)
        else:
            if transcript.is_from_before:
                with beside_bars(sys.stderr):
                    name = f"{arguments.output}/{Path(transcript.file).stem}.jsonl"
                    say(f"{name} exists and is kept; delete it to transcribe again.")
            with beside_bars(sys.stdout):
                print(tab_field(transcript.file), transcript.text, sep="\t", flush=True)
