"""Transcribes with an exported folder in sherpa-onnx; a separate program that needs only sherpa-onnx and numpy.

    python sherpa_texts.py [FOLDER WAVEFORMS.npz]

It prints, as JSON, the version of sherpa-onnx, the texts of the waveforms one by one and of all together, as a server decodes
them, the seconds of computation for the texts one by one, and the peak memory of the process. Without arguments, it only checks
sherpa-onnx. It is a separate program because sherpa-onnx ends the process if a file has an unexpected format.
"""

import json
import re
import sys
import time
from pathlib import Path

PIECE = 0.1
"""Seconds of audio that streams get at once."""
STREAMS = ("zipformer2_ctc", "zipformer2")
"""Types of model for streams."""
TRANSDUCERS = ("transducer", "zipformer2")
"""Types of model with three files."""
OLDEST = "1.12.26"
"""The first version with all types of model."""
UNUSABLE = 3
"""Exit status if sherpa-onnx cannot be imported, or is too old."""


def open_recognizer(folder, kind, sample_rate=16000, feature_dim=80, **keys):
    """Create a recogniser of sherpa-onnx.

    Arguments
    ---------
    folder : str or os.PathLike
        A folder that ``export --runtime sherpa-onnx`` wrote.
    kind : str
        Its type of model.
    sample_rate, feature_dim : int
        Sample rate and number of features.
    **keys
        Other arguments of the runtime's constructor.

    Returns
    -------
    sherpa_onnx.OfflineRecognizer or OnlineRecognizer
    """
    import sherpa_onnx

    owner = sherpa_onnx.OnlineRecognizer if kind in STREAMS else sherpa_onnx.OfflineRecognizer
    parts = ("encoder", "decoder", "joiner") if kind in TRANSDUCERS else ("model",)
    files = {part: str(next(Path(folder).glob(f"{part}*.onnx"))) for part in parts}
    if kind != "omnilingual_asr_ctc":
        keys = {"sample_rate": sample_rate, "feature_dim": feature_dim, **keys}
    keys = {"num_threads": 1, "tokens": str(Path(folder, "tokens.txt")), **keys}
    return getattr(owner, "from_transducer" if kind in TRANSDUCERS else f"from_{kind}")(**files, **keys)


def settings_of(folder):
    """Type of model, number of zeros to append (0 for whole utterances), sample rate and number of features, from the README."""
    text = Path(folder, "README.md").read_text(encoding="utf-8")
    tail = re.search(r"zeros \((\d+) samples", text)
    rate, features = (int(re.search(rf"feat_config\.{key} = (\d+);", text)[1]) for key in ("sample_rate", "feature_dim"))
    return re.search(r"type of model `(\w+)`", text)[1], int(tail[1]) if tail else 0, rate, features


def transcribe_whole(recognizer, wavs, rate):
    """Transcribe waveforms as one batch."""
    streams = [recognizer.create_stream() for _ in wavs]
    for stream, wav in zip(streams, wavs, strict=True):
        stream.accept_waveform(rate, wav)
    recognizer.decode_streams(streams)
    return [stream.result.text for stream in streams]


def transcribe_streams(recognizer, wavs, rate, tail):
    """Transcribe streams that arrive in pieces, each beginning three pieces later than the one before, with zeros at the end."""
    import numpy as np

    size = int(PIECE * rate)
    waiting = [np.concatenate([wav, np.zeros(tail, wav.dtype)]) for wav in wavs]
    streams, done, turn = [recognizer.create_stream() for _ in wavs], [False] * len(wavs), 0
    while not all(done):
        for i, stream in enumerate(streams):
            if done[i] or turn < 3 * i:
                continue
            if len(waiting[i]):
                stream.accept_waveform(rate, waiting[i][:size])
                waiting[i] = waiting[i][size:]
            else:
                stream.input_finished()
                done[i] = True
        while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
            recognizer.decode_streams(ready)
        turn += 1
    return [recognizer.get_result(stream) for stream in streams]


def transcriber(folder):
    """A function that transcribes a list of waveforms.

    Arguments
    ---------
    folder : str or os.PathLike
        A folder that ``export --runtime sherpa-onnx`` wrote.

    Returns
    -------
    callable
        From a list of waveforms, at the model's rate, to a list of texts.
    """
    kind, tail, rate, features = settings_of(folder)
    recognizer = open_recognizer(folder, kind, rate, features)
    if kind in STREAMS:
        return lambda wavs: transcribe_streams(recognizer, wavs, rate, tail)
    return lambda wavs: transcribe_whole(recognizer, wavs, rate)


def version_of_runtime():
    """The version of sherpa-onnx; ends the program with the status ``UNUSABLE`` and a message if it cannot be used."""
    try:
        import sherpa_onnx
    except Exception as error:  # also errors of its libraries
        _end(f"sherpa-onnx is installed, but cannot be imported ({error}); reinstall it, or uninstall it to export without it.")
    version = getattr(sherpa_onnx, "__version__", "of an unknown version")
    found, oldest = ([int(number) for number in re.findall(r"\d+", each)[:3]] for each in (version, OLDEST))
    if found < oldest:
        _end(
            f"sherpa-onnx {version} is installed, but {OLDEST} or later is needed; upgrade it with pip install -U sherpa-onnx, "
            "or uninstall it to export without it."
        )
    return version


def _end(message):
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(UNUSABLE)


def main(folder=None, waveforms=None):
    """See the module."""
    version = version_of_runtime()
    if folder is None:
        return
    import numpy as np

    data = np.load(waveforms)
    transcribe = transcriber(folder)
    wavs = [data[f"wav{i}"] for i in range(int(data["count"]))]
    began = time.process_time()  # of this process, because other programs may use the processor
    alone = [transcribe([wav])[0] for wav in wavs]
    seconds = time.process_time() - began
    found = {"version": version, "alone": alone, "seconds": seconds, "peak_mib": peak_mib()}
    print(json.dumps(found | {"together": transcribe(wavs)}))


def peak_mib():
    """Peak memory of this process in MiB; None if the system does not report it (Linux does)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return found and int(found[1]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
