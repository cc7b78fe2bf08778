"""Transcribe WAV files with a model of ``python -m speechbrain_ext export``; needs only onnxruntime, numpy and soundfile.

python examples/transcribe_onnx.py model.onnx speech.wav ...

A model for streams (``--streaming``) gets each WAV file chunk by chunk, like the samples of a microphone. The name is that of the
export, also for the three files of a transducer.
"""

import argparse
import json
import os
import sys

import numpy as np
import onnxruntime
import soundfile


class Recogniser:
    """An exported model.

    Arguments
    ---------
    path : str
        The ONNX file. For a transducer also ``NAME.onnx`` in place of ``NAME-encoder.onnx``; decoder and joiner are beside it.
    threads : int
        Number of threads; 0 = one per core.
    """

    def __init__(self, path, threads=0):
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        path = os.fspath(path)
        encoder = path.removesuffix(".onnx") + "-encoder.onnx"
        if os.path.exists(encoder):
            if os.path.exists(path):
                raise ValueError(f"{path} and {encoder} are of two exports; delete the older one.")
            path = encoder
        self.session = self.load(path)
        self.about = about = self.session.get_modelmeta().custom_metadata_map
        if about.get("format") != "speechbrain_ext" or about.get("mode") not in ("full", "streaming"):
            raise ValueError(f"{path} is not for this program; export the model with 'python -m speechbrain_ext export'.")
        self.sample_rate = int(about["sample_rate"])
        self.blank = int(about["blank_index"])
        self.tokens = json.loads(about["tokens"])
        self.decoder = self.joiner = None
        if about.get("head") == "transducer":
            if not path.endswith("-encoder.onnx"):
                raise ValueError(f"{path} is a transducer's encoder; name it NAME-encoder.onnx, beside its decoder and joiner.")
            beside = path.removesuffix("encoder.onnx")
            self.decoder, self.joiner = self.load(f"{beside}decoder.onnx"), self.load(f"{beside}joiner.onnx")

    def load(self, path):
        """Load an ONNX file; returns a session."""
        try:
            return onnxruntime.InferenceSession(path, self.options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            raise ValueError(f"{path} cannot be loaded ({' '.join(str(error).split())}); export the model again.") from error

    def transcribe(self, path):
        """Transcribe an audio file; returns its text."""
        try:
            samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (OSError, TypeError, soundfile.SoundFileError) as error:  # TypeError: raw samples, which state no rate
            raise ValueError(
                f"{path} cannot be read as audio ({error}); check the path, and give a WAV, FLAC or Ogg file."
            ) from error
        if sample_rate != self.sample_rate:
            raise ValueError(f"{path} has {sample_rate} samples per second; convert it to {self.sample_rate}.")
        if not len(samples):
            raise ValueError(f"{path} holds no samples; record it again.")
        if not np.isfinite(samples).all():
            raise ValueError(f"{path} holds samples that are no numbers; record it again.")
        waveform = samples.mean(axis=1)[np.newaxis]  # (1, N)
        if self.about["mode"] == "streaming":
            return self.decode(np.concatenate(list(self.stream(waveform))))
        lengths = np.array([waveform.shape[1]], dtype=np.int64)
        answer, frames = self.session.run(None, {"waveform": waveform, "lengths": lengths})
        return self.decode(answer[0, : frames[0]])

    def stream(self, waveform):
        """The graph's output (T, V) for each chunk of (1, N); only the state is passed from one chunk to the next."""
        names = ("window", "before", "hop_length", "chunk_step", "chunk_samples")
        window, before, hop, step, samples = (int(self.about[name]) for name in names)
        frames = max(1, (waveform.shape[1] + before - window // 2) // hop + 1)
        end = (frames - 1) * hop + window  # end of the last frame's window, which may be after the last sample
        mode = "symmetric" if self.about["ends"] == "mirrored" else "constant"
        waveform = np.pad(waveform, ((0, 0), (before, window)), mode)
        names = json.loads(self.about["state"])
        # An axis that grows begins with size 0.
        state = [np.zeros([1 if size == "batch" else size for size in one["shape"]], one["type"]) for one in names]
        outputs = [self.about.get("output", "log_probs"), *(one["output"] for one in names)]
        for start in range(0, frames * hop, step):
            chunk = {"waveform": waveform[:, start : min(start + samples, end)]}
            given = {one["input"]: value for one, value in zip(names, state, strict=True)}
            answer, *state = self.session.run(outputs, chunk | given)
            yield answer[0]

    def decode(self, answer):
        """The text for an output of the graph."""
        best = self.ctc(answer) if self.decoder is None else self.transducer(answer)
        text = "".join(self.tokens[token] for token in best if token != self.blank)
        return " ".join(text.replace("▁", " ").split())

    def ctc(self, log_probs):
        """Tokens from log-probabilities (T, V): the best one of each frame, without repetitions."""
        best = log_probs.argmax(axis=-1)
        return best[np.diff(best, prepend=-1) != 0]

    def transducer(self, frames, most=5):
        """Tokens from frames (T, J) by greedy search, at most ``most`` per frame; the state is the last tokens, or an LSTM's."""
        about = self.decoder.get_modelmeta().custom_metadata_map
        given = {"y": np.full((1, int(about["context_size"])), self.blank)}
        if "state_shape" in about:
            given |= dict.fromkeys(("hidden", "cell"), np.zeros([1, *json.loads(about["state_shape"])], np.float32))
        predicted, *state = self.decoder.run(None, given)
        tokens = []
        for frame in frames:
            for _ in range(most):
                (logit,) = self.joiner.run(None, {"encoder_out": frame[None], "decoder_out": predicted})
                token = int(logit[0].argmax())
                if token == self.blank:
                    break
                tokens.append(token)
                y = np.append(given["y"][:, 1:], [[token]], axis=1)
                given = dict(zip(given, (y, *state), strict=True))
                predicted, *state = self.decoder.run(None, given)
        return tokens


def main():
    """Print FILE<TAB>text for each file; returns 0 on success, 1 after an error."""
    parser = argparse.ArgumentParser(description="Print FILE<TAB>text for each audio file.")
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.add_argument("--threads", type=int, default=0, help="number of threads; by default one per core")
    arguments = parser.parse_args()
    try:
        recogniser, status = Recogniser(arguments.model, arguments.threads), 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for file in arguments.files:
        try:
            print(file, recogniser.transcribe(file), sep="\t", flush=True)
        except ValueError as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
