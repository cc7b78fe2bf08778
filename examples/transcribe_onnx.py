"""Transcribe WAV files with a model that ``python -m speechbrain_ext export`` wrote: onnxruntime, numpy and soundfile suffice.

python examples/transcribe_onnx.py model.onnx speech.wav ...

A file for streams (``--streaming``) gets each WAV file chunk by chunk, as it would a microphone's samples.
"""

import argparse
import json
import sys

import numpy as np
import onnxruntime
import soundfile


class Recogniser:
    """An exported model.

    Arguments
    ---------
    path : str
        The ONNX file.
    threads : int
        Number of threads; 0 = one per core.
    """

    def __init__(self, path, threads=0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.about = about = self.session.get_modelmeta().custom_metadata_map
        if about.get("format") != "speechbrain_ext" or about.get("mode") not in ("full", "streaming"):
            raise ValueError(f"{path} was not written by 'python -m speechbrain_ext export'; export the model with that.")
        self.sample_rate = int(about["sample_rate"])
        self.blank = int(about["blank_index"])
        self.tokens = json.loads(about["tokens"])

    def transcribe(self, path):
        """Text of an audio file."""
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
        if sample_rate != self.sample_rate:
            raise ValueError(f"{path} has {sample_rate} samples per second; convert it to {self.sample_rate}.")
        if not len(samples):
            raise ValueError(f"{path} is empty: it holds no samples.")
        waveform = samples.mean(axis=1)[np.newaxis]  # (1, N)
        if self.about["mode"] == "streaming":
            return self.decode(np.concatenate(list(self.stream(waveform))))
        lengths = np.array([waveform.shape[1]], dtype=np.int64)
        log_probs, frames = self.session.run(None, {"waveform": waveform, "lengths": lengths})
        return self.decode(log_probs[0, : frames[0]])

    def stream(self, waveform):
        """Log-probabilities (T, V) of one chunk of (1, N) after the other; the state is all that goes from one to the next."""
        names = ("window", "before", "hop_length", "chunk_step", "chunk_samples")
        window, before, hop, step, samples = (int(self.about[name]) for name in names)
        frames = max(1, (waveform.shape[1] + before - window // 2) // hop + 1)
        end = (frames - 1) * hop + window  # of the last frame's window, which may reach beyond the samples
        mode = "symmetric" if self.about["ends"] == "mirrored" else "constant"
        waveform = np.pad(waveform, ((0, 0), (before, window)), mode)
        names = json.loads(self.about["state"])
        # What grows begins with no entries: a size of 0.
        state = [np.zeros([1 if size == "batch" else size for size in one["shape"]], one["type"]) for one in names]
        outputs = ["log_probs", *(one["output"] for one in names)]
        for start in range(0, frames * hop, step):
            chunk = {"waveform": waveform[:, start : min(start + samples, end)]}
            given = {one["input"]: value for one, value in zip(names, state, strict=True)}
            log_probs, *state = self.session.run(outputs, chunk | given)
            yield log_probs[0]

    def decode(self, log_probs):
        """Text of (T, V): the best token of each frame, without repetitions and blanks."""
        best = log_probs.argmax(axis=-1)
        best = best[np.diff(best, prepend=-1) != 0]
        text = "".join(self.tokens[token] for token in best if token != self.blank)
        return " ".join(text.replace("▁", " ").split())


def main():
    """Print FILE<TAB>text for each file; 0 when all went well, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Print FILE<TAB>text for each audio file.")
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--threads", type=int, default=0, help="number of threads; by default one per core")
    arguments = parser.parse_args()
    recogniser, status = Recogniser(arguments.model, arguments.threads), 0
    for file in arguments.files:
        try:
            print(file, recogniser.transcribe(file), sep="\t", flush=True)
        except (ValueError, OSError, soundfile.SoundFileError) as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
