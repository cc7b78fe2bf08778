"""Comparison of an exported model with the PyTorch model, on the same audio.

PyTorch runs each utterance alone; ONNX runs it alone and in batches. For streams, PyTorch gets whole utterances under the chunk
setting, and ONNX gets chunk by chunk.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from speechbrain.utils.edit_distance import accumulatable_wer_stats

from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.dataio.records import librispeech_records
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.export.onnx_transducer import MAX_SYMBOLS, InPyTorch, Search
from speechbrain_ext.lobes.filter_banks import front_end
from speechbrain_ext.registry import encoder_passes
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.measure import medians

BATCH = 4
MOST_WRONG, MOST_WRONG_SYNTHETIC = 0.05, 0.5
"""Largest share of tokens that may differ in 8 bits: on speech, and on synthetic signals, where every model is uncertain."""
SYNTHETIC_SECONDS = (0.02, 0.31, 1.0, 2.345, 5.0, 7.77)
SPEED_SECONDS = 10
SPEED_REPETITIONS = 7


@dataclass
class Report:
    """Results of the comparison.

    Arguments
    ---------
    utterances : int
        Number of utterances.
    seconds : float
        Their total length.
    synthetic : bool
        Whether they are synthetic signals.
    max_difference : float
        Largest difference of a log-probability in a valid frame, of each utterance alone and in a batch. For a transducer, it is
        that of the last prediction in each frame of greedy search.
    token_error : float
        Edit distance of the greedily decoded tokens, divided by the number of PyTorch's tokens.
    torch_wer, onnx_wer : float or None
        Word error rates in %, if there are references.
    size : int
        Bytes of the file, or of a transducer's files.
    torch_seconds, onnx_seconds : float
        Median time for 10 seconds of audio, with the same number of threads; for a transducer, without decoder and joiner.
    chunk_seconds : float or None
        Length of a chunk, if the model is for streams.
    """

    utterances: int
    seconds: float
    synthetic: bool
    max_difference: float
    token_error: float
    torch_wer: float | None
    onnx_wer: float | None
    size: int
    torch_seconds: float
    onnx_seconds: float
    chunk_seconds: float | None = None

    def __str__(self):
        kind = "synthetic signal" if self.synthetic else "utterance"
        lines = [
            f"compared on {self.utterances} {kind}{'s' * (self.utterances != 1)}, {self.seconds:.1f} s",
            f"largest difference of a log-probability: {self.max_difference:.2g}",
            f"tokens decoded differently: {self.token_error:.2%}",
        ]
        if self.torch_wer is not None:
            lines.append(f"word error rate: {self.torch_wer:.2f} % PyTorch, {self.onnx_wer:.2f} % ONNX")
        lines.append(f"size: {self.size / 2**20:.2f} MiB")
        what, part = f"{SPEED_SECONDS} s of audio", 1000
        if self.chunk_seconds is not None:
            what, part = f"a chunk of {self.chunk_seconds:.2f} s", 1000 * self.chunk_seconds / SPEED_SECONDS
        lines.append(
            f"time for {what}: {part * self.torch_seconds:.1f} ms PyTorch, "
            f"{part * self.onnx_seconds:.1f} ms ONNX, ratio {self.torch_seconds / self.onnx_seconds:.2f}"
        )
        return "\n".join(lines)


@dataclass
class Feed:
    """How to run a kind of graph, and how to get the same output from PyTorch.

    Arguments
    ---------
    run : callable
        Takes a session and several waveforms (N,), runs them as one batch, and returns the log-probabilities (T, V) of each.
    config : DynChunkTrainConfig, optional
        Chunk setting of streams.
    step : int, optional
        Samples per chunk of streams.
    in_step : bool
        Whether streams of a batch must begin and end together.
    prepare : callable
        Turns a waveform (N,) into the input of the model.
    answer : callable
        Turns PyTorch's log-probabilities (B, T, V) into the output of the graph.
    log_probs : bool
        Whether the head gives logits, to be turned into log-probabilities; False for a transducer's frames.
    max_symbols : int
        Most tokens per frame in a transducer's greedy search.
    """

    run: Callable
    config: DynChunkTrainConfig | None = None
    step: int | None = None
    in_step: bool = False
    prepare: Callable = lambda wav: wav
    answer: Callable = lambda log_probs: log_probs
    log_probs: bool = True
    max_symbols: int = MAX_SYMBOLS


def usual_feed(about):
    """How to run a graph of :mod:`speechbrain_ext.export.onnx_model`, from the metadata of its file."""
    log_probs = about.get("head") != "transducer"
    if about.get("mode") != "streaming":
        return Feed(lambda session, wavs: run(session, wavs), log_probs=log_probs)
    left = int(about["left_context"])
    config = DynChunkTrainConfig(int(about["chunk_size"]), None if left == -1 else left)
    return Feed(lambda session, wavs: run_stream(session, wavs), config, int(about["chunk_step"]), True, log_probs=log_probs)


@torch.no_grad()
def check(path, encoder, head, tokens, blank, audio=(), pass_name=None, feed=None, parts=()):
    """Compare an exported file with its model.

    Arguments
    ---------
    path : str or os.PathLike
        The ONNX file; for a transducer, the encoder's.
    encoder : speechbrain_ext.speech_encoder.SpeechEncoder
        The model's encoder.
    head : torch.nn.Module
        Its CTC head, or a transducer's projection of frames.
    tokens : list of str
        The text of each token.
    blank : int
        The blank's index.
    audio : list of str
        Audio files, or folders in LibriSpeech layout.
    pass_name : str, optional
        The exported pass of a cascade.
    feed : Feed, optional
        How to run the file; by default as its metadata state.
    parts : list of tuple
        Graph (torch.nn.Module) and ONNX file of a transducer's decoder, and those of its joiner.

    Returns
    -------
    Report

    Raises
    ------
    AudioError
        If a file is not audio.
    ValueError
        If a folder is not in LibriSpeech layout.
    """
    session = open_session(path)
    feed = feed or usual_feed(session.get_modelmeta().custom_metadata_map)
    rate = front_end(encoder.compute_features).sample_rate
    searches = ()
    if parts:
        graphs, part_files = zip(*parts, strict=True)
        runs = map(InPyTorch, graphs), map(open_session, part_files)
        searches = [Search(*sessions, graphs[0], feed.max_symbols) for sessions in runs]

    def theirs(wav):
        return reference(encoder, head, feed, wav, pass_name)

    def their_stream(wav):
        context = encoder.make_streaming_context(feed.config, encoder_passes(encoder.transformer.encoder, pass_name))
        for start in range(0, len(wav) + 1, feed.step):
            piece, last = wav[start : start + feed.step].unsqueeze(0), start + feed.step > len(wav)
            _answer(encoder, head, feed, encoder.encode_streaming(piece, context, last)[0])

    def ours(*wavs):
        return feed.run(session, [feed.prepare(wav) for wav in wavs])

    def difference_of(wanted, found):
        if not searches or wanted.shape != found.shape:
            return _difference(wanted, found)
        said, log_probs = searches[0](wanted)
        return _difference(log_probs, searches[1](found, said)[1])

    def said_of(wanted, found):
        if not searches:
            return [greedy(log_probs, blank) for log_probs in (wanted, found)]
        return [sum(search(frames)[0], []) for search, frames in zip(searches, (wanted, found), strict=True)]

    files = files_of(audio)
    references, difference, samples = [], 0.0, 0
    texts, distance, total = ([], []), 0, 0
    for start in range(0, max(len(files), 1), BATCH):
        batch = files[start : start + BATCH]
        wavs = [load_audio(file, rate) for file, _ in batch] if files else synthetic(rate)
        references += [reference for _, reference in batch]
        expected = [theirs(wav) for wav in wavs]
        alone = [ours(wav)[0] for wav in wavs]
        together = wavs
        if feed.in_step:
            together = [torch.nn.functional.pad(wav, (0, max(map(len, wavs)) - len(wav))) for wav in wavs]
        expected_together = [theirs(wav) for wav in together] if feed.in_step else expected
        for wanted, found in ((expected, alone), (expected_together, ours(*together))):
            difference = max(difference, *map(difference_of, wanted, found))
        for wav, one, other in zip(wavs, expected, alone, strict=True):
            samples += len(wav)
            decoded = said_of(one, other)
            total += len(decoded[0])
            distance += edit_distance(*decoded)
            for kind, ids in zip(texts, decoded, strict=True):
                kind.append(written(ids, tokens))
    speed_signal = synthetic(rate, (SPEED_SECONDS,))[0]
    timed = theirs if feed.config is None else their_stream
    times = medians({"torch": lambda: timed(speed_signal), "onnx": lambda: ours(speed_signal)}, SPEED_REPETITIONS)
    scored = bool(references) and None not in references
    return Report(
        utterances=len(texts[0]),
        seconds=samples / rate,
        synthetic=not files,
        max_difference=float(difference),
        token_error=distance / max(1, total),
        torch_wer=_wer(references, texts[0]) if scored else None,
        onnx_wer=_wer(references, texts[1]) if scored else None,
        size=sum(Path(each).stat().st_size for each in (path, *(file for _, file in parts))),
        torch_seconds=times["torch"] / 1000,
        onnx_seconds=times["onnx"] / 1000,
        chunk_seconds=None if feed.step is None else feed.step / rate,
    )


def open_session(path):
    """A session of onnxruntime with PyTorch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def reference(encoder, head, feed, wav, pass_name=None):
    """PyTorch's log-probabilities (T, V), or a transducer's frames, for the input that a graph gets from a waveform (N,)."""
    wav = feed.prepare(wav).unsqueeze(0)
    out = encoder.encode(wav, dynchunktrain_config=feed.config, pass_name=pass_name)[0]
    return _answer(encoder, head, feed, out)


def _answer(encoder, head, feed, out):
    out = out if head is encoder.head else head(out)
    return feed.answer(out.log_softmax(dim=-1) if feed.log_probs else out)[0].numpy()


def run(session, wavs):
    """The output of a graph in valid frames (T, V), for each of several waveforms (N,) that run as one batch."""
    lengths = np.array([len(wav) for wav in wavs], dtype=np.int64)
    waveform = torch.nn.utils.rnn.pad_sequence(list(wavs), batch_first=True, padding_value=0.5).numpy()  # padding must not matter
    answers, frames = session.run(None, {"waveform": waveform, "lengths": lengths})
    return [one[:count] for one, count in zip(answers, frames, strict=True)]


def run_stream(session, wavs):
    """The output (T, V) of a streaming graph for waveforms (N,) of one length, run as a batch as the metadata state."""
    about = session.get_modelmeta().custom_metadata_map
    window, before, hop, step = (int(about[key]) for key in ("window", "before", "hop_length", "chunk_step"))
    frames = max(1, (len(wavs[0]) + before - window // 2) // hop + 1)
    mode = "symmetric" if about["ends"] == "mirrored" else "constant"
    waveform = np.pad(torch.stack(list(wavs)).numpy(), ((0, 0), (before, window)), mode)
    end = (frames - 1) * hop + window  # end of the last frame's window
    states, chunks = json.loads(about["state"]), []
    given = {
        state["input"]: np.zeros([len(wavs) if size == "batch" else size for size in state["shape"]], state["type"])
        for state in states
    }
    outputs = [about.get("output", "log_probs"), *(state["output"] for state in states)]
    for start in range(0, frames * hop, step):
        chunk = waveform[:, start : min(start + int(about["chunk_samples"]), end)]
        answer, *following = session.run(outputs, {"waveform": chunk} | given)
        given = {state["input"]: tensor for state, tensor in zip(states, following, strict=True)}
        chunks.append(answer)
    return list(np.concatenate(chunks, 1))


def greedy(log_probs, blank):
    """Best token of each frame of (T, V), without repetitions and blanks.

    Example
    -------
    >>> greedy(np.eye(3)[[0, 1, 1, 0, 1, 2]], blank=0)
    [1, 1, 2]
    """
    best = log_probs.argmax(-1)
    changed = np.flatnonzero(np.diff(best, prepend=-1))
    return [int(token) for token in best[changed] if token != blank]


def written(ids, tokens):
    """The text of tokens.

    Example
    -------
    >>> written([0, 1, 0], ["▁A", "B"])
    'AB A'
    """
    return " ".join("".join(tokens[token] for token in ids).replace("▁", " ").split())


def _difference(expected, found):
    if expected.shape != found.shape:
        return float("inf")
    difference = np.abs(expected - found).max()
    return float("inf") if np.isnan(difference) else float(difference)


def edit_distance(reference, hypothesis):
    """Number of insertions, deletions and substitutions between two lists.

    Example
    -------
    >>> edit_distance(list("cat"), list("hats"))
    2
    """
    stats = accumulatable_wer_stats([reference], [hypothesis])
    return stats["insertions"] + stats["deletions"] + stats["substitutions"]


def _wer(references, texts):
    """The error rate in %, without regard to case; None without a word to say."""
    stats = accumulatable_wer_stats(*([normal_form(text, "upper").split() for text in each] for each in (references, texts)))
    return float(stats["WER"]) if stats["num_ref_tokens"] else None


def synthetic(rate, seconds=SYNTHETIC_SECONDS):
    """Deterministic waveforms (N,) similar to speech: noise and harmonics with varying loudness and pitch, and pauses."""
    generator = torch.Generator().manual_seed(0)
    signals = []
    for duration in seconds:
        time = torch.arange(int(duration * rate)) / rate
        pitch = 120 + 30 * torch.sin(2 * torch.pi * 0.7 * time)
        phase = 2 * torch.pi * torch.cumsum(pitch, 0) / rate
        voice = sum(torch.sin(harmonic * phase) / harmonic for harmonic in range(1, 20))
        noise = torch.randn(len(time), generator=generator)
        syllables = torch.sin(2 * torch.pi * 2.0 * time).clamp(min=0)
        signals.append(0.1 * syllables * voice + 0.02 * syllables.roll(2000) * noise + 1e-4 * noise)
    return signals


def files_of(audio):
    """(file, reference or None) of all given files, and of the files that transcripts in the given folders name."""
    files = []
    for entry in map(Path, audio):
        if not entry.exists():
            raise FileNotFoundError(f"There is no audio file or folder {entry}; check the path.")
        if not entry.is_dir():
            files.append((entry, None))
            continue
        found = [
            (Path(record.values["wav"]), record.values["wrd"]) for record in librispeech_records(entry, []) if not record.flaw
        ]
        if not found:
            raise UserError(f"{entry} holds no *.trans.txt with audio files; give audio files, or a LibriSpeech folder.")
        files += found
    return files
