"""The command line: ``python -m speechbrain_ext COMMAND ...``.

Results go to standard output, all else to standard error. The exit status is 0 only when all went well, 2 for wrong usage,
1 otherwise.
"""

import argparse
import os
import sys
from contextlib import redirect_stdout

WINDOW = 256  # files that are sorted by length together: enough for full batches, few enough to see results soon
BATCH_SECONDS = 120  # of audio, padding included


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
    _add_export(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except UsageError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # such as "| head", which needs no more; without this, Python complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _add_transcribe(commands):
    parser = commands.add_parser(
        "transcribe", help="print what is said in audio files", description="Print FILE<TAB>text for each audio file."
    )
    parser.add_argument("model", metavar="MODEL", help="a folder that training left behind, or a Hugging Face repository")
    parser.add_argument("files", metavar="FILE", nargs="+", help="an audio file in any format that soundfile reads")
    parser.add_argument("--device", help="such as cpu or cuda:0; by default a GPU if there is one")
    parser.add_argument("--pass", dest="answer", choices=("first", "second"), help="of a cascade, which pass answers")
    parser.set_defaults(run=transcribe)


def transcribe(arguments):
    """Print the transcripts of files in their order; a file that cannot be transcribed is reported, and the others go on."""
    with redirect_stdout(sys.stderr):  # whatever the libraries say
        from tqdm import tqdm

        from speechbrain_ext.inference import load_model

        try:
            model = load_model(arguments.model, arguments.device, arguments.answer)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(_sentence(error)) from error
    files, failed = arguments.files, False
    with tqdm(total=len(files), unit=" files", disable=len(files) < 2) as progress:
        for start in range(0, len(files), WINDOW):
            window = files[start : start + WINDOW]
            with redirect_stdout(sys.stderr):
                texts = _transcribe(model, window, progress)
            for file in window:
                if file in texts:
                    print(file, texts[file], sep="\t", flush=True)
                else:
                    failed = True
    return int(failed)


def _transcribe(model, files, progress):
    """Texts by file, in batches of about the same length; without the files that fail."""
    from speechbrain_ext.inference.audio import AudioError

    def report(message):
        progress.write(f"speechbrain_ext: {message}", file=sys.stderr)

    wavs, texts = {}, {}
    for file in files:
        try:
            wavs[file] = model.load_audio(file)
        except AudioError as error:
            report(error)
            progress.update()
    limit = BATCH_SECONDS * 16000
    batches = []
    for file in sorted(wavs, key=lambda file: len(wavs[file])):
        if not batches or (len(batches[-1]) + 1) * len(wavs[file]) > limit:
            batches.append([])
        batches[-1].append(file)
    while batches:
        batch = batches.pop()
        try:
            for file, text in zip(batch, _texts(model, [wavs[file] for file in batch]), strict=True):
                texts[file] = text
        except RuntimeError as error:  # such as too little memory: the files one by one, before any is given up
            if len(batch) > 1:
                batches += [[file] for file in batch]
                continue
            report(f"{batch[0]} cannot be transcribed: {_sentence(error)}")
        progress.update(len(batch))
    return texts


def _texts(model, wavs):
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
    return model.transcribe_batch(pad_sequence(wavs, batch_first=True), lengths / lengths.max())[0]


def _add_export(commands):
    parser = commands.add_parser(
        "export", help="write a model as an ONNX file", description="Write a model's CTC branch as an ONNX file, and check it."
    )
    parser.add_argument("model", metavar="MODEL", help="a folder that training left behind, or a Hugging Face repository")
    parser.add_argument("out", metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--int8", action="store_true", help="keep the weights in 8 bits")
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
            report = export_model(
                arguments.model, arguments.out, arguments.answer, arguments.int8, arguments.audio, arguments.tolerance
            )
        except ExportError as error:
            print(f"speechbrain_ext: {_sentence(error)}", file=sys.stderr)
            return 1
        except (ImportError, OSError, ValueError, RuntimeError) as error:
            raise UsageError(_sentence(error)) from error
    print(report)
    return 0


def _sentence(error):
    return " ".join(str(error).split())
