"""Trained models as one ONNX file, from samples to log-probabilities of the CTC head; metadata hold all that decoding needs.

A transducer has three files: ``NAME-encoder.onnx`` from samples to ``encoder_out``, ``NAME-decoder.onnx`` and
``NAME-joiner.onnx``, see :mod:`speechbrain_ext.export.onnx_transducer`.

Files are written only if their outputs agree with those of the model (:mod:`speechbrain_ext.export.check`).

The ``metadata_props``, all text, are ``format`` (``speechbrain_ext``), ``version`` of this package, ``mode``, ``precision``
(``float32`` or ``int8``), ``encoder``, for a cascade ``pass``, ``sample_rate``, ``n_fft``, ``hop_length``, ``n_mels``,
``seconds_per_frame``, ``blank_index``, and ``tokens``, a JSON list of the text of each token, with ``▁`` for a space. Those of a
transducer also have ``head`` (``transducer``), ``part``, and icefall's ``context_size``, ``vocab_size`` and ``joiner_dim``;
``output`` is the name of the encoder's output, and ``state_shape`` the shape of an LSTM's states without the batch.

If ``mode`` is ``streaming``, not ``full``, there are also ``chunk_size`` in encoder frames, ``left_context`` in chunks (-1 =
all), ``chunk_samples``, ``chunk_step``, ``window``, ``before``, ``ends`` and ``state``.

``state`` is a JSON list of the tensors that one chunk passes to the next. Each has the names of its ``input`` and ``output``, its
numpy ``type``, and the ``shape`` of the zeros for the first chunk.

The window of a feature frame has ``window`` samples. That of the first frame begins ``before`` samples before the stream. N
samples have ``T = max(1, (N + before - window // 2) // hop_length + 1)`` frames. If ``ends`` is ``zeros``, the samples outside
the stream are zeros; if it is ``mirrored``, they are those of ``numpy.pad`` with the mode "symmetric". Chunk i gets the
``chunk_samples`` samples from ``i * chunk_step``, counted from ``before`` samples before the stream. The last chunk gets the rest
of the ``(T - 1) * hop_length + window`` samples of all windows.
"""

import json
import math
import os
from pathlib import Path

from speechbrain_ext import __version__
from speechbrain_ext.export.check import MOST_WRONG, MOST_WRONG_SYNTHETIC, Report, check, files_of
from speechbrain_ext.export.onnx_streaming import Streaming
from speechbrain_ext.export.onnx_transducer import Decoder, Joiner, head_of, transducer_of
from speechbrain_ext.export.onnx_whole import FullContext
from speechbrain_ext.export.onnx_write import ExportError, require_packages, write_onnx
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.streaming import chunk_config
from speechbrain_ext.lobes.filter_banks import front_end
from speechbrain_ext.registry import get_encoder, list_encoders, passes_of
from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.files import check_replaceable, locked, place_of


def export_model(
    source,
    path,
    pass_name=None,
    int8=False,
    audio=(),
    tolerance=None,
    streaming=False,
    chunk_size=None,
    left_context=None,
    trust=False,
):
    """Write a trained model as an ONNX file, for whole utterances or for streams.

    The graph takes ``waveform`` (batch, samples) float32 and ``lengths`` (batch,) int64 in samples. It gives ``log_probs``
    (batch, frames, tokens) and ``frames`` (batch,) int64, the numbers of valid frames. An utterance gets the same output alone
    and in any batch. A model with an attention decoder exports its CTC branch; a transducer has three files, see the module.

    With ``streaming``, the graph takes the samples of one chunk and the state, and gives ``log_probs`` and the next state, see
    the module. The streams of a batch must begin and end together.

    Arguments
    ---------
    source : str
        A model folder, or the name of a Hugging Face repository.
    path : str
        The file to write; an existing file is replaced, and a link stays a link. The three files of a transducer begin with its
        name.
    pass_name : str, optional
        The pass of a cascade to export: "second", the default, or "first".
    int8 : bool
        Whether to store the weights of matrix products in 8 bits, and to round their inputs to 8 bits. The features and the
        subsampling remain in float32.
    audio : list of str
        Audio files to compare on, or folders in LibriSpeech layout, which also give word error rates; by default synthetic
        signals.
    tolerance : float, optional
        For float32 the largest accepted difference of a log-probability (default 1e-3). For int8 the largest token error rate
        against the float32 model with greedy search (default 0.05; 0.5 on synthetic signals, on which no model is certain).
    streaming : bool
        Whether to export for streams.
    chunk_size : int, optional
        Encoder frames (40 ms) per chunk of a stream; by default the model's, or 16.
    left_context : int, optional
        Left context of a stream in chunks; by default the model's, or 16; -1 = all.
    trust : bool
        As in :func:`speechbrain_ext.inference.load_model`.

    Returns
    -------
    Report
        Results of the comparison; its text has lines to print.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If the model, the folder of ``path`` or an audio file is missing, or ``path`` is a folder.
    ImportError
        If the packages for ONNX are missing.
    ValueError
        If the model, the audio or the tolerance is not valid, or the model does not stream with this setting.
    ExportError
        If the encoder has operations that ONNX lacks, the comparison fails, or the disk is full; then no file is left.

    Example
    -------
    >>> export_model("/no/such/folder", "model.onnx")
    Traceback (most recent call last):
    FileNotFoundError: There is no model folder /no/such/folder; give the folder 'pretrained' of a training run, or english.
    """
    path = Path(path)
    _place(path)
    refuse_tolerance(tolerance)
    files_of(audio)  # a missing file is an error now, not after the export
    require_packages()
    model = load_model(source, "cpu", pass_name, trust=trust)
    graphs = _graphs(model, chunk_config(model, chunk_size, left_context) if streaming else None)
    paths = {part: _place(path.with_stem(f"{path.stem}-{part}") if part else path) for part in graphs}
    partials = {part: final.with_name(f".{final.name}.partial") for part, final in paths.items()}
    with locked(next(iter(partials.values())), f"Another process is writing {path}; wait for it, or give another path."):
        try:
            report = write_checked(model, graphs, path, partials, int8, audio, tolerance)
            for part, partial in partials.items():
                os.replace(partial, paths[part])
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)
    return report


def _place(path):
    """The place of a file; raises an error if no file can be written there."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file, such as {path / 'model.onnx'}.")
    check_replaceable(path)
    return place_of(path)


def refuse_tolerance(tolerance):
    """Raise a UserError if a tolerance is not a number of 0 or more."""
    if tolerance is not None and not tolerance >= 0:  # also refuses NaN
        raise UserError(f"The tolerance is {tolerance}; give a number, 0 or more.")


def write_checked(model, graphs, path, partials, int8, audio=(), tolerance=None, feed=None):
    """Write the graphs of a model as files, and compare their outputs with the model's.

    Arguments
    ---------
    model : speechbrain_ext.inference.models.CtcModel, JointModel or TransducerModel
        The model.
    graphs : dict
        The graph (torch.nn.Module) of each part of the model; the key is "" if there is only one part.
    path : pathlib.Path
        The final name of the file, for messages.
    partials : dict
        The file to write for each part.
    int8, audio, tolerance
        As for :func:`export_model`.
    feed : speechbrain_ext.export.check.Feed, optional
        How to run the graph; by default as its metadata state.

    Returns
    -------
    Report

    Raises
    ------
    ExportError
        If the outputs differ, or the graph does not run; the caller must then remove the files.
    """
    metadata = _metadata(model, graphs, "int8" if int8 else "float32")
    try:
        for part, graph in graphs.items():
            write_onnx(graph, partials[part], int8, metadata[part])
    except OSError as error:  # for example a full disk
        raise ExportError(f"{path} cannot be written: {error.strerror or one_line(error)}; give another path.") from error
    report = _check(model, graphs, partials, next(iter(metadata.values())), audio, feed)
    _refuse(report, int8, tolerance)
    return report


def _graphs(model, config):
    """The graph to export of each part of the model; the key is "" if there is only one part."""
    transducer, head = transducer_of(model), head_of(model)
    keys = {"pass_name": model.pass_name} | ({} if transducer is None else {"output": "encoder_out"})
    if config is None:
        graph = FullContext(model.mods.encoder, head, **keys)
    else:
        graph = Streaming(model.mods.encoder, head, config, **keys)
    return {"": graph} if transducer is None else {"encoder": graph, "decoder": Decoder(transducer), "joiner": Joiner(transducer)}


def _metadata(model, graphs, precision):
    """The metadata of each part."""
    first, *others = graphs
    metadata = {first: _metadata_of_encoder(model, graphs[first], precision)}
    if first:
        part = {"head": "transducer", "part": first, "output": "encoder_out"}
        metadata[first] |= part | graphs["joiner"].metadata
    common = {key: metadata[first][key] for key in ("format", "version", "precision", "blank_index")}
    return metadata | {part: common | {"head": "transducer", "part": part} | graphs[part].metadata for part in others}


def _metadata_of_encoder(model, graph, precision):
    encoder, tokenizer = model.mods.encoder, model.hparams.tokenizer
    net, front = encoder.transformer.encoder, front_end(encoder.compute_features)
    names = [name for name in list_encoders() if get_encoder(name) is type(net)]
    return {
        "format": "speechbrain_ext",
        "version": __version__,
        "mode": graph.mode,
        "precision": precision,
        "encoder": names[0] if names else type(net).__name__,
        **({"pass": model.pass_name or passes_of(net)[-1]} if len(passes_of(net)) > 1 else {}),
        "sample_rate": str(front.sample_rate),
        "n_fft": str(front.n_fft),
        "hop_length": str(front.framing.hop),
        "n_mels": str(front.n_mels),
        "seconds_per_frame": str(encoder.subsampling.factor * front.framing.hop / front.sample_rate),
        "blank_index": str(model.hparams.blank_index),
        "tokens": json.dumps([written_by(tokenizer, token) for token in range(tokenizer.vocab_size())], ensure_ascii=False),
        **graph.metadata,
    }


def written_by(tokenizer, token):
    """The text of a token: its piece, nothing for a control token, and SentencePiece's sign for the unknown token."""
    if tokenizer.is_control(token):
        return ""
    return "▁⁇▁" if tokenizer.is_unknown(token) else tokenizer.id_to_piece(token)


def _check(model, graphs, paths, metadata, audio, feed):
    path, *files = paths.values()
    parts = list(zip(list(graphs.values())[1:], files, strict=True))
    tokens, blank = json.loads(metadata["tokens"]), int(metadata["blank_index"])
    try:
        return check(path, model.mods.encoder, head_of(model), tokens, blank, audio, model.pass_name, feed, parts)
    except (OSError, UserError):  # errors of the audio
        raise
    except Exception as error:  # onnxruntime has a class of error per kind of failure
        cause = one_line(error)
        raise ExportError(f"onnxruntime cannot run the exported model, so no file was written: {cause}") from error


def _refuse(report: Report, int8, tolerance):
    usual = (MOST_WRONG_SYNTHETIC if report.synthetic else MOST_WRONG) if int8 else 1e-3
    limit = usual if tolerance is None else tolerance
    found = report.token_error if int8 and math.isfinite(report.max_difference) else report.max_difference
    if found <= limit:  # refuses NaN
        return
    what = (
        f"decodes {found:.1%} of the tokens differently in 8 bits"
        if int8
        else f"differs by {found:.3g} in a log-probability from PyTorch"
    )
    remedy = "compare on real speech with --audio, or export without --int8" if int8 else "accept more with --tolerance"
    allowed = f"{limit:.1%}" if int8 else f"{limit:g}"
    raise ExportError(f"The exported model {what}, but only {allowed} is accepted, so no file was written; {remedy}.")
