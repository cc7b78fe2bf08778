"""``transcribe``: audio files to text."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

from speechbrain_ext.cli._common import UsageError, add_device, add_model, add_pass, load, say, usage


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "transcribe",
        help="print the text of audio files",
        description="Print FILE<TAB>text for each audio file, of any length. In FILE, tabs, line ends and backslashes are "
        "written as \\t, \\n, \\r and \\\\.",
    )
    add_model(parser)
    add_pass(parser)
    add_device(parser)
    parser.add_argument("files", metavar="FILE", nargs="+", help="an audio file in any format that soundfile reads")
    parser.add_argument("--output", metavar="FOLDER", help="write FOLDER/NAME.jsonl, .srt and .vtt; goes on where it was stopped")
    parser.add_argument("--streaming", action="store_true", help="read files as a stream, whatever their length and the model")
    parser.set_defaults(run=run)


def run(arguments):
    """Print the transcripts of files in their order; a file that cannot be transcribed is reported, and the others go on."""
    if arguments.output == "":
        raise UsageError("--output is empty; name a folder.")
    model = load(arguments)
    with usage():
        from speechbrain_ext.inference.streaming import StreamingRecognizer
        from speechbrain_ext.inference.transcribe import beside_bars, transcribe_files
        from speechbrain_ext.utils.text import tab_field

        if arguments.streaming:
            StreamingRecognizer(model)  # refuses now what it would refuse later
        transcripts = transcribe_files(model, arguments.files, arguments.output, arguments.streaming, progress=True)
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
                    say(f"{name} is there already and left as it is; delete it to transcribe again.")
            with beside_bars(sys.stdout):
                print(tab_field(transcript.file), transcript.text, sep="\t", flush=True)
