"""Trained models as folders for sherpa-onnx, which runs on phones, in browsers and on servers, in a dozen languages.

A folder holds ``model.onnx`` or ``model.int8.onnx``, ``tokens.txt``, and a ``README.md`` with example code. The features decide
the type of model:

=============================  ========================  ===================
features                       whole utterances          streams
=============================  ========================  ===================
KaldiFbank                     ``zipformer_ctc``         ``zipformer2_ctc``
Fbank, sentence statistics     ``omnilingual_asr_ctc``   refused
Fbank, global statistics       refused                   refused
=============================  ========================  ===================

The runtime computes KaldiFbank features. With Fbank it normalises the samples, and the graph computes the features. The graph
holds the encoder and its CTC head.

A model with a transducer becomes ``transducer`` or ``zipformer2``, and so does the CTC branch if it is exported for hotwords. The
folder then holds ``encoder.onnx``, ``decoder.onnx`` and ``joiner.onnx``, and the scores of the pieces in ``bpe.vocab``.
"""

from dataclasses import dataclass, field
from pathlib import Path

from speechbrain.lobes.features import Fbank

from speechbrain_ext.export.check import MOST_WRONG, MOST_WRONG_SYNTHETIC, Report, files_of
from speechbrain_ext.export.ctc_transducer import CtcDecoder, CtcJoiner, Pairs
from speechbrain_ext.export.onnx_model import refuse_tolerance, write_checked, written_by
from speechbrain_ext.export.onnx_transducer import Decoder, Joiner, head_of, transducer_of
from speechbrain_ext.export.onnx_write import ExportError, require_packages
from speechbrain_ext.export.sherpa_check import Texts, feed_of, has_runtime, tail_samples, texts_in_runtime
from speechbrain_ext.export.sherpa_graphs import (
    Answer,
    Frames,
    FromFeatures,
    FromWaveform,
    Packed,
    PackedPairs,
    PackedTransducer,
    TransducerFromFeatures,
)
from speechbrain_ext.export.sherpa_readme import INT8, OFFSET, is_export, readme
from speechbrain_ext.export.sherpa_texts import STREAMS, TRANSDUCERS
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.streaming import chunk_config
from speechbrain_ext.lobes.features import KaldiFbank
from speechbrain_ext.lobes.filter_banks import front_end
from speechbrain_ext.lobes.transducer import LstmPredictor
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import place_of, replacing_folder, write_text

FILES = {f"{part}{kind}.onnx" for part in ("model", "encoder", "decoder", "joiner") for kind in ("", ".int8")}
FILES |= {"bpe.vocab", "tokens.txt", "README.md"}
"""Files of such folders."""
GRAPHS = {
    "zipformer_ctc": FromFeatures,
    "omnilingual_asr_ctc": FromWaveform,
    "zipformer2_ctc": Packed,
    "transducer": TransducerFromFeatures,
    "zipformer2": PackedTransducer,
}
"""The graph of each type of model."""
SECONDS_PER_FRAME = {kind: 0.02 if kind == "omnilingual_asr_ctc" else 0.04 for kind in GRAPHS}
"""Seconds per frame of each type of model in the runtime."""
NEVER_WRITTEN = ("SIL", "</s>")
"""Symbols that the runtime leaves out of the texts of whole utterances."""


@dataclass
class SherpaReport:
    """Results of an export for sherpa-onnx.

    Arguments
    ---------
    kind : str
        The runtime's type of model.
    file : pathlib.Path
        The ONNX file; for a transducer, the encoder's.
    onnx : Report
        Comparison of the graph in onnxruntime with PyTorch.
    texts : Texts, optional
        Comparison of the folder in sherpa-onnx with PyTorch, if sherpa-onnx is installed.
    notes : list of str
        What the user should know about this model in sherpa-onnx.
    """

    kind: str
    file: Path
    onnx: Report
    texts: Texts | None
    notes: list = field(default_factory=list)

    def __str__(self):
        texts = self.texts or "sherpa-onnx is not installed, so its texts were not compared"
        return "\n".join([f"type {self.kind}, {self.file}", str(self.onnx), str(texts), *self.notes])


def export_sherpa(
    source,
    folder,
    pass_name=None,
    int8=False,
    audio=(),
    tolerance=None,
    streaming=False,
    chunk_size=None,
    left_context=None,
    trust=False,
    hotwords=False,
):
    """Write a trained model as a folder for sherpa-onnx, 1.12.26 or later.

    The folder is written only if the graph's outputs agree with PyTorch's. Streams are compared chunk by chunk, in batches of
    different age. If sherpa-onnx is installed, its texts are also compared.

    Arguments
    ---------
    source : str
        A model folder, or the name of a Hugging Face repository.
    folder : str
        The folder to write; an empty folder, or one of an earlier export, is replaced.
    pass_name, int8, audio, streaming, chunk_size, trust
        As for :func:`speechbrain_ext.export.onnx_model.export_model`.
    tolerance : float, optional
        As for :func:`speechbrain_ext.export.onnx_model.export_model`. Texts of sherpa-onnx may differ in 5 % of the letters, or
        20 % on synthetic signals; with ``int8``, ``tolerance`` replaces these limits.
    left_context : int, optional
        As for :func:`speechbrain_ext.export.onnx_model.export_model`; -1 = all is possible if the encoder's state then does not
        grow.
    hotwords : bool
        Whether to write CTC as a transducer, because the runtime takes hotwords only with transducers. A model with a transducer
        always supports hotwords.

    Returns
    -------
    SherpaReport
        Its text has lines to print.

    Raises
    ------
    FileNotFoundError, FileExistsError, NotADirectoryError
        If the model or an audio file is missing, or the folder holds other files.
    ImportError
        If the packages for ONNX are missing, or sherpa-onnx is installed but cannot be used.
    UserError
        If the runtime has no type of model for this model; the message gives the reason.
    ExportError
        If the comparison fails, or the disk is full; then nothing is written.

    Example
    -------
    >>> export_sherpa("/no/such/folder", "model")
    Traceback (most recent call last):
    FileNotFoundError: There is no model folder /no/such/folder; give the folder 'pretrained' of a training run, or english.
    """
    folder = Path(folder)
    _refuse_place(folder)
    refuse_tolerance(tolerance)
    files_of(audio)  # a missing file is an error now, not after the export
    require_packages()
    compares = has_runtime()
    model = load_model(source, "cpu", pass_name, trust=trust)
    graphs = make_graphs(model, streaming, chunk_size, left_context, hotwords)
    graph = next(iter(graphs.values()))
    symbols = symbols_of(model, whole=graph.mode not in (*STREAMS, *TRANSDUCERS))
    names = {part: f"{part or 'model'}{'.int8' if int8 else ''}.onnx" for part in graphs}
    file = folder / next(iter(names.values()))
    front, tail = front_end(model.mods.encoder.compute_features), tail_samples(graph) if streaming else 0
    feed = feed_of(graph, model.mods.encoder.compute_features)
    notes = [OFFSET] if graph.mode == "omnilingual_asr_ctc" and not graph.features.removes_dc else []
    notes += [INT8] if int8 and graph.mode != "omnilingual_asr_ctc" else []
    with replacing_folder(folder) as partial:
        partials = {part: partial / name for part, name in names.items()}
        report = write_checked(model, graphs, file, partials, int8, audio, tolerance, feed)
        write_text(partial / "tokens.txt", "".join(f"{symbol} {index}\n" for index, symbol in enumerate(symbols)))
        if graph.mode in TRANSDUCERS:  # the runtime splits hotwords into pieces with this file
            tokenizer = model.hparams.tokenizer
            pieces = ((tokenizer.id_to_piece(i), tokenizer.get_score(i)) for i in range(tokenizer.vocab_size()))
            write_text(partial / "bpe.vocab", "".join(f"{piece}\t{score}\n" for piece, score in pieces))
        write_text(partial / "README.md", readme(graph.mode, names, front.sample_rate, front.n_mels, tail, notes))
        texts = texts_in_runtime(partial, model, graphs, audio) if compares else None
        _refuse_texts(texts, report, int8, tolerance, notes)
    return SherpaReport(graph.mode, file, report, texts, notes)


def make_graphs(model, streaming=False, chunk_size=None, left_context=None, hotwords=False):
    """The graphs of a model, for the runtime's type of model that fits.

    Arguments
    ---------
    model : speechbrain_ext.inference.models.CtcModel, JointModel or TransducerModel
        The model.
    streaming, chunk_size, left_context, hotwords
        As for :func:`export_sherpa`.

    Returns
    -------
    dict
        The graph of each part; the key is "" if there is only one part. The first graph is one of
        :mod:`speechbrain_ext.export.sherpa_graphs`.

    Raises
    ------
    UserError
        If no type fits.
    """
    encoder, transducer = model.mods.encoder, transducer_of(model)
    kind = _kind(encoder, streaming, hotwords or transducer is not None)
    if kind in TRANSDUCERS and model.blank:
        remedy = ", or export without --hotwords" if transducer is None else ""
        raise UserError(
            f"The model's blank is token {model.blank}, but that of a transducer in sherpa-onnx is token 0; train with "
            f"blank_index 0{remedy}."
        )
    if isinstance(getattr(transducer, "predictor", None), LstmPredictor):
        raise UserError(
            "The model's transducer has predictor: lstm, but sherpa-onnx takes LSTM predictors only with NeMo's features; train "
            "with predictor: stateless."
        )
    front, tokenizer = front_end(encoder.compute_features), model.hparams.tokenizer
    seconds, unit = encoder.subsampling.factor * front.framing.hop / front.sample_rate, SECONDS_PER_FRAME[kind]
    repeats = round(seconds / unit)
    if abs(repeats * unit - seconds) > 1e-6 or (transducer is not None and repeats != 1):
        raise UserError(
            f"The model's frames take {seconds:g} s, but sherpa-onnx needs {unit:g} s; train a model with such frames."
        )
    silent = [token for token in range(tokenizer.vocab_size()) if tokenizer.is_control(token)]
    vocabulary, graph = tokenizer.vocab_size(), GRAPHS[kind]
    answer, output, parts = Answer(vocabulary, model.blank, silent, repeats), "log_probs", None
    if transducer is not None:
        parts = {"decoder": Decoder(transducer), "joiner": Joiner(transducer, answer)}
        answer, output = Frames(), "encoder_out"
    elif kind in TRANSDUCERS:
        parts = {"decoder": CtcDecoder(vocabulary), "joiner": CtcJoiner(vocabulary)}
        answer, graph = Pairs(answer), PackedPairs if streaming else graph
    settings = [chunk_config(model, chunk_size, left_context)] if streaming else []
    graph = graph(encoder, head_of(model), *settings, answer, model.pass_name, output)
    return {"": graph} if parts is None else {"encoder": graph, **parts}


def _kind(encoder, streaming, is_transducer):
    """The runtime's type of model."""
    features, norm = encoder.compute_features, encoder.normalize.norm_type
    if isinstance(features, KaldiFbank):
        whole, streams = TRANSDUCERS if is_transducer else ("zipformer_ctc", "zipformer2_ctc")
        return streams if streaming else whole
    if not isinstance(features, Fbank):
        raise UserError(f"sherpa-onnx does not compute {type(features).__name__} features; train with KaldiFbank.")
    if is_transducer:
        raise UserError(
            "sherpa-onnx does not take transducers, which hotwords need, with SpeechBrain's Fbank; train with KaldiFbank."
        )
    if streaming:
        raise UserError(
            "sherpa-onnx does not compute SpeechBrain's Fbank for streams; train with KaldiFbank, or fine-tune with it."
        )
    if norm != "sentence":
        raise UserError(
            f"sherpa-onnx normalises the samples before Fbank, but the model's statistics are {norm}; train with sentence "
            "statistics, or with KaldiFbank."
        )
    if features.compute_STFT.sample_rate != 16000:
        raise UserError(
            f"sherpa-onnx gives 16000 samples per second to models with Fbank, not {features.compute_STFT.sample_rate}; train "
            "with KaldiFbank."
        )
    return "omnilingual_asr_ctc"


def symbols_of(model, whole):
    """The symbol of each token in ``tokens.txt``.

    The runtime finds the blank by its symbol ``<blk>``, and turns a ``▁`` at the beginning of a symbol into a space.

    Arguments
    ---------
    model : speechbrain_ext.inference.models.CtcModel, JointModel or TransducerModel
        The model.
    whole : bool
        Whether the export is for whole utterances.

    Returns
    -------
    list of str

    Raises
    ------
    UserError
        If the runtime would write a token differently from Python.
    """
    tokenizer = model.hparams.tokenizer
    symbols = []
    for token in range(tokenizer.vocab_size()):
        symbol = "<blk>" if token == model.blank else tokenizer.id_to_piece(token)
        if token != model.blank and tokenizer.is_unknown(token):
            symbol = written_by(tokenizer, token).removesuffix("▁")  # the runtime would write this ▁ literally
        silent = token == model.blank or tokenizer.is_control(token)
        if not silent and ("▁" in symbol[1:] or symbol.split() != [symbol]):
            raise UserError(
                f"The model's token '{symbol}' has a space after its beginning, which sherpa-onnx cannot write; train with "
                "a tokenizer that divides texts at spaces, without treat_whitespace_as_suffix."
            )
        if not silent and whole and symbol in NEVER_WRITTEN:
            raise UserError(
                f"The model has a token '{symbol}', which sherpa-onnx leaves out of the texts of whole utterances; train with a "
                "tokenizer without it, or export with --streaming."
            )
        symbols.append(symbol)
    return symbols


def _refuse_place(folder):
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the name of a folder.")
    place_of(folder)
    if not folder.exists():
        return
    if folder.samefile("."):
        raise FileExistsError(f"{folder} is the current folder, which is not replaced; give the name of a new folder.")
    others = sorted({path.name for path in folder.iterdir()} - (FILES if is_export(folder) else set()))
    if others:
        raise FileExistsError(f"{folder} holds other files, such as {others[0]}; give a new folder.")


def _refuse_texts(texts, report, int8, tolerance, notes):
    # In float32, only features that differ give more than 0.2
    limit = (MOST_WRONG_SYNTHETIC if int8 else 0.2) if report.synthetic else MOST_WRONG
    if int8 and tolerance is not None:
        limit = tolerance
    if texts is None or texts.error <= limit:
        return
    remedies = ["compare on real speech with --audio"] if report.synthetic else []
    remedies += ["export without --int8, or accept more with --tolerance"] if int8 else []
    if OFFSET in notes:
        remedies.append("train with remove_dc: true, because the runtime removes a DC offset, but the model's Fbank does not")
    raise ExportError(
        f"sherpa-onnx {texts.version} writes {texts.error:.1%} of the letters differently, but only {limit:.1%} is accepted, "
        f"so nothing was written; {', or '.join(remedies or ['export with --runtime onnxruntime'])}."
    )
