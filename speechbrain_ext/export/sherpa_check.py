"""Comparison of an export for sherpa-onnx with its model, in onnxruntime with the inputs of sherpa-onnx, and in sherpa-onnx."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.export import sherpa_texts
from speechbrain_ext.export.check import Feed, edit_distance, files_of, greedy, reference, synthetic
from speechbrain_ext.export.onnx_transducer import InPyTorch, Search, head_of
from speechbrain_ext.export.onnx_write import ExportError
from speechbrain_ext.export.sherpa_texts import STREAMS
from speechbrain_ext.utils.errors import UserError, UserImportError

PADDING = -23.025850929940457
"""ln 1e-10, the runtime's padding value of shorter utterances in a batch."""
MOST = 20
"""Most utterances for the comparison in the runtime."""
SHORTEST = 0.1
"""Seconds; much shorter audio has no frame in the runtime, and no text."""
AXES = (1, 1, 1, 1, 0, 0, 0, 0)
"""Axes along which the runtime batches the states of ``zipformer2_ctc``."""
SYMBOLS = 1
"""Most tokens per frame of a transducer in the runtime."""


def feed_of(graph, compute_features):
    """How the runtime runs a graph.

    Arguments
    ---------
    graph : torch.nn.Module
        A graph of :mod:`speechbrain_ext.export.sherpa_graphs`.
    compute_features : torch.nn.Module
        The model's features.

    Returns
    -------
    Feed
    """
    if graph.mode == "omnilingual_asr_ctc":
        return Feed(_run_waveforms, prepare=standardized_waveform, answer=graph.answer)

    def features(wav):
        return compute_features(wav.unsqueeze(0))[0]

    keys = {"answer": graph.answer, "log_probs": graph.normalises, "max_symbols": SYMBOLS}
    if graph.mode not in STREAMS:
        return Feed(lambda session, wavs: _run_whole(session, [features(wav) for wav in wavs]), **keys)
    step = graph.step

    def run(session, wavs):
        return _run_streams(session, [features(wav).split(graph.frames) for wav in wavs], graph.zeros(1))

    def whole_chunks(wav):
        return torch.nn.functional.pad(wav, (0, -len(wav) % step))

    return Feed(run, graph.config, step, prepare=whole_chunks, **keys)


def standardized_waveform(wav):
    """A waveform (N,) with mean 0 and variance 1, the input of ``omnilingual_asr_ctc``."""
    centred = wav.double() - wav.double().mean()
    return (centred / (centred.square().mean() + 1e-5).sqrt()).float()


def _run_whole(session, features):
    x = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=PADDING).numpy()
    lengths = np.array([len(one) for one in features])
    log_probs, frames = session.run(None, {"x": x, "x_lens": lengths})
    return [one[:count] for one, count in zip(log_probs, frames, strict=True)]


def _run_waveforms(session, wavs):
    return [session.run(None, {"x": wav.unsqueeze(0).numpy()})[0][0] for wav in wavs]


def _run_streams(session, chunks, zeros):
    """Run streams that each begin one chunk later, because a server batches streams of different age."""
    names = [entry.name for entry in session.get_inputs()]
    states = [[tensor.numpy() for tensor in zeros] for _ in chunks]
    found = [[] for _ in chunks]
    for turn in range(max(i + len(parts) for i, parts in enumerate(chunks))):
        alive = [i for i, parts in enumerate(chunks) if 0 <= turn - i < len(parts)]
        x = np.stack([chunks[i][turn - i].numpy() for i in alive])
        stacked = [np.concatenate(parts, axis) for axis, *parts in zip(AXES, *(states[i] for i in alive), strict=True)]
        log_probs, *following = session.run(None, dict(zip(names, [x, *stacked], strict=True)))
        split = [np.split(tensor, len(alive), axis) for axis, tensor in zip(AXES, following, strict=True)]
        for place, i in enumerate(alive):
            found[i].append(log_probs[place])
            states[i] = [parts[place] for parts in split]
    return [np.concatenate(parts) for parts in found]


@dataclass
class Texts:
    """Texts of sherpa-onnx, and PyTorch's texts.

    Arguments
    ---------
    version : str
        Version of sherpa-onnx.
    wanted, alone, together : list of str
        PyTorch's texts, and the runtime's texts of each waveform alone and of all in a batch. For a transducer, PyTorch uses
        greedy search with at most one token per frame.
    real_time_factor : float
        Seconds of computation per second of audio, on one thread, each waveform alone.
    peak_mib : float or None
        Peak memory of the runtime's process in MiB; None if the system does not report it.
    """

    version: str
    wanted: list
    alone: list
    together: list
    real_time_factor: float
    peak_mib: float | None = None

    @property
    def equal(self):
        """Number of waveforms with PyTorch's text, both alone and together."""
        return sum(wanted == alone == other for wanted, alone, other in zip(self.wanted, self.alone, self.together, strict=True))

    @property
    def error(self):
        """Edit distance in letters of all texts, divided by the number of letters in PyTorch's texts."""
        letters = 2 * max(1, sum(map(len, self.wanted)))
        pairs = zip(2 * self.wanted, self.alone + self.together, strict=True)
        return sum(edit_distance(list(wanted), list(found)) for wanted, found in pairs) / letters

    def __str__(self):
        return (
            f"sherpa-onnx {self.version}: {self.equal} of {len(self.wanted)} texts are PyTorch's, alone and together, "
            f"letters written differently: {self.error:.2%}, real-time factor {self.real_time_factor:.4f} on one thread"
        )


def has_runtime():
    """Whether sherpa-onnx is installed. Raises UserImportError if it cannot be imported, or is too old."""
    spec = importlib.util.find_spec("sherpa_onnx")
    if spec is None or spec.origin is None:  # a folder of this name in the current folder has no origin
        return False
    if _in_runtime().returncode:
        raise UserImportError("sherpa-onnx is installed, but its import ends the process; reinstall it, or uninstall it.")
    return True


def _in_runtime(*arguments):
    """Run :mod:`speechbrain_ext.export.sherpa_texts`; returns the completed process."""
    # -P: otherwise the program's folder would be first in the path, and its modules could hide others
    command = [sys.executable, "-P", sherpa_texts.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode == sherpa_texts.UNUSABLE:
        raise UserImportError(done.stderr.strip().splitlines()[-1])
    return done


def texts_in_runtime(folder, model, graphs, audio=()):
    """Transcribe with an exported folder in sherpa-onnx, and with the model in PyTorch.

    Arguments
    ---------
    folder : pathlib.Path
        The complete folder.
    model : speechbrain_ext.inference.models.CtcModel, JointModel or TransducerModel
        The exported model.
    graphs : dict
        Its graphs by part, see :func:`speechbrain_ext.export.sherpa_folder.make_graphs`.
    audio : list of str
        Audio files, or folders in LibriSpeech layout; by default synthetic signals.

    Returns
    -------
    Texts

    Raises
    ------
    ExportError
        If the runtime does not load the folder.
    UserError
        If all audio is too short for a text.
    """
    graph, *parts = graphs.values()
    rate = model.sample_rate
    files = files_of(audio)[:MOST]
    wavs = [load_audio(file, rate) for file, _ in files] if files else synthetic(rate)
    wavs = [wav for wav in wavs if len(wav) >= SHORTEST * rate]
    if not wavs:
        raise UserError(
            f"All files of --audio are shorter than {SHORTEST} s, which gives no text in sherpa-onnx; give longer ones."
        )
    tail = tail_samples(graph) if graph.mode in STREAMS else 0
    wanted = [_wanted(wav, model, graph, parts, tail) for wav in wavs]
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "waveforms.npz")
        named = {f"wav{i}": wav.numpy() for i, wav in enumerate(wavs)}
        np.savez(path, count=len(wavs), **named)
        done = _in_runtime(folder, path)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ExportError(f"sherpa-onnx does not load the exported model, so nothing was written: {cause}")
    found = json.loads(done.stdout)
    wanted, alone, together = (
        [comparable(text, graph.mode in STREAMS) for text in texts] for texts in (wanted, found["alone"], found["together"])
    )
    seconds = sum(len(wav) + tail for wav in wavs) / rate
    return Texts(found["version"], wanted, alone, together, found["seconds"] / seconds, found["peak_mib"])


def comparable(text, of_stream):
    """A text without what the runtime writes in another way by design.

    It leaves out the space that Python writes after an unknown token, and of the text of a stream, but not of its tokens, the
    punctuation at the beginning.

    Example
    -------
    >>> comparable("'TIS THE ⁇ DAY,  ISN'T IT", of_stream=True)
    "TIS THE ⁇DAY, ISN'T IT"
    """
    text = " ".join(text.split()).replace("⁇ ", "⁇")
    while of_stream and text and (text[0].isspace() or unicodedata.category(text[0]).startswith("P")):
        text = text[1:]
    return text


def tail_samples(graph):
    """Zeros that a client of a streaming model appends to its samples. The runtime drops an incomplete last chunk, and starts a
    chunk only when it has one frame more. Another frame is for the samples that its resampling of other rates keeps back."""
    return (graph.frames + 2) * graph.features.hop_length


def _wanted(wav, model, graph, parts, tail):
    feed = feed_of(graph, model.mods.encoder.compute_features)
    if tail:
        wav = torch.nn.functional.pad(wav, (0, tail))
    # PyTorch gets the original samples; the runtime normalises them inside
    if graph.mode == "omnilingual_asr_ctc":
        feed.prepare = lambda wav: wav
    frames = reference(model.mods.encoder, head_of(model), feed, wav, model.pass_name)
    if tail:
        chunks = (graph.features.framing.count(len(wav)) - 1) // graph.frames
        frames = frames[: chunks * graph.config.chunk_size * graph.answer.repeats]
    if not parts:
        said = greedy(frames, model.blank)
    else:
        said = sum(Search(*map(InPyTorch, parts), parts[0], feed.max_symbols)(frames)[0], [])
    return model.hparams.tokenizer.decode_ids(said)
