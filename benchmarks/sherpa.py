"""Speed, size and memory of every encoder in sherpa-onnx, and comparison of its texts with PyTorch's.

    python benchmarks/sherpa.py --audio FILE_OR_FOLDER ...

The models do equal work, and have random weights, a width of 144, 6 blocks and 128 tokens. Their texts have no meaning, but are
the stricter test, because no token is certain. Each model is exported, and runs in sherpa-onnx in a separate process. A row has
the real-time factor on one thread, the peak memory of the process with model and audio, and the comparison of texts, alone and in
a batch. Streams have chunks of 640 ms and 4 chunks of left context. One model has a transducer as its head; the transducers of
the others are CTC, exported for hotwords. ``--models`` takes trained models instead, in the types that fit them, and
audio with transcripts, for the word error rate of greedy search in onnxruntime. Rows of the same model, type and precision are
replaced. For other systems, see ``peers.py``.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

import torch

from speechbrain_ext.dataio.tokenizer import train_tokenizer
from speechbrain_ext.export.check import files_of
from speechbrain_ext.export.onnx_write import ExportError
from speechbrain_ext.export.sherpa_check import has_runtime
from speechbrain_ext.export.sherpa_folder import GRAPHS, export_sherpa, make_graphs
from speechbrain_ext.export.sherpa_texts import STREAMS, TRANSDUCERS
from speechbrain_ext.hparams import load_hparams, merge_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.lobes.transducer import Transducer
from speechbrain_ext.model_folder.write import model_parts, write_model_folder
from speechbrain_ext.registry import list_encoders
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import read_csv, write_csv
from speechbrain_ext.utils.machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # corpus files name functions in recipes/
RESULTS = ROOT / "benchmarks" / "results" / "sherpa.csv"
FIELDS = ("encoder", "type", "precision", "utterances", "texts_equal", "letters_differ", "largest_difference")
FIELDS += ("tokens_differ", "size_mib", "real_time_factor", "peak_mib", "sherpa_onnx", "cpu", "wer")
ROW = FIELDS[:3]
"""Fields that identify a row."""
FILES = {"cascade": "cascade_hyperconformer_squeezeformer"}
"""Hparams files with another name than their encoder."""
TRANSDUCER = "hyperconformer_transducer"
"""Hparams file of the model with a transducer."""
SIZE = {"d_model": 144, "nhead": 8, "num_encoder_layers": 6, "num_decoder_layers": 0, "d_ffn": 576}
SIZE |= {"encoder_kwargs": "null", "vocab_size": 128, "number_of_epochs": 1}
KALDI = "!new:speechbrain_ext.lobes.features.KaldiFbank {sample_rate: 16000, n_mels: 80}"
CENTRED = "!new:speechbrain_ext.lobes.features.Fbank {sample_rate: 16000, n_mels: 80, remove_dc: true}"
SENTENCE = "!new:speechbrain_ext.lobes.features.SentenceNormalization {}"


def untrained(folder, encoder, features):
    """Write a model with random weights, and with tokens of the licence's text; ``encoder`` may also name an hparams file."""
    lines = [line.strip().upper() for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()]
    text = [line.replace(",", "").replace('"', "") for line in lines if line]
    write_csv(folder / "text.csv", ("ID", "wrd"), enumerate(text))
    train_tokenizer(folder / "text.csv", folder / "t.model", SIZE["vocab_size"], "unigram", 0, 1, 2, 3)
    keys = {} if encoder == TRANSDUCER else {"encoder": encoder}
    keys |= SIZE | {"output_folder": folder / "run", "compute_features": features, "normalize": SENTENCE}
    overrides = "\n".join(f"{key}: {value}" for key, value in keys.items())
    path = ROOT / "hparams" / f"{FILES.get(encoder, encoder)}.yaml"
    hparams = load_hparams(path, overrides)
    parts = model_parts(hparams)
    for module in parts.modules():
        if isinstance(module, Transducer):  # with its initial values it would emit no token
            torch.nn.init.normal_(module.out.weight)
            torch.nn.init.constant_(module.out.bias, 0.0)
    write_model_folder(folder / "model", merge_hparams(path, overrides), hparams, parts, folder / "t.model", [])
    return folder / "model"


def options_of(kind):
    """Options of the export to a type of model."""
    keys = {"streaming": True, "chunk_size": 16, "left_context": 4} if kind in STREAMS else {}
    return keys | {"hotwords": kind in TRANSDUCERS}


def fits(model, kind):
    """Whether a trained model can be exported to a type."""
    try:
        return next(iter(make_graphs(model, **options_of(kind)).values())).mode == kind
    except UserError:
        return False


def row(source, encoder, kind, precision, audio):
    """Export a model and run it; returns the values of a row, in the order of the fields."""
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        model = source or untrained(temporary, encoder, CENTRED if kind == "omnilingual_asr_ctc" else KALDI)
        keys = options_of(kind) | {"int8": precision == "int8", "tolerance": 1.0 if precision == "int8" else None}
        report = export_sherpa(model, temporary / "sherpa", audio=audio, **keys)
    found, texts = report.onnx, report.texts
    numbers = [len(texts.wanted), texts.equal, f"{texts.error:.4f}", f"{found.max_difference:.2g}", f"{found.token_error:.4f}"]
    numbers += [f"{found.size / 2**20:.1f}", f"{texts.real_time_factor:.4f}", texts.peak_mib and round(texts.peak_mib)]
    wer = f"{found.onnx_wer:.2f}" if source else ""  # the texts of random weights have none
    return [encoder, report.kind, precision, *numbers, texts.version, cpu_name(), wer]


def main():
    """Run all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--models", nargs="+", metavar="NAME=FOLDER", help="trained models, in place of untrained ones")
    models.add_argument("--encoders", nargs="+", choices=[*list_encoders(), TRANSDUCER], help="untrained models; by default all")
    parser.add_argument("--types", nargs="+", choices=GRAPHS, default=tuple(GRAPHS), help="types of model; by default all")
    parser.add_argument("--audio", nargs="+", required=True, help="audio files, or folders in LibriSpeech layout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file")
    arguments = parser.parse_args()
    try:
        if not has_runtime():
            raise UserError("sherpa-onnx is not installed; install it with: pip install -e '.[sherpa]'")
        references = [reference for _, reference in files_of(arguments.audio)]
        if arguments.models and None in references:
            raise UserError("Trained models need audio with transcripts; give folders in LibriSpeech layout as --audio.")
        wanted = {}
        for given in arguments.models or ():
            name, equals, folder = given.partition("=")
            if not equals or name in wanted:
                raise UserError(f"--models {given} has no name, or one that was given before; give NAME=FOLDER.")
            model = load_model(folder, "cpu")
            wanted[name] = folder, [kind for kind in arguments.types if fits(model, kind)]
            if not wanted[name][1]:
                raise UserError(f"{name} cannot be exported as {' or '.join(arguments.types)}; give other --types.")
        for encoder in () if arguments.models else arguments.encoders or [*list_encoders(), TRANSDUCER]:
            wanted[encoder] = None, TRANSDUCERS if encoder == TRANSDUCER else arguments.types
        before = read_csv(arguments.out) if arguments.out.exists() else []
        rows = {tuple(found[key] for key in ROW): [found.get(key, "") for key in FIELDS] for found in before}
        for name, (source, kinds) in wanted.items():
            for kind, precision in itertools.product(kinds, ("float32", "int8")):
                rows[name, kind, precision] = row(source, name, kind, precision, arguments.audio)
                print(*rows[name, kind, precision], sep=",", flush=True)
                write_csv(arguments.out, FIELDS, [rows[key] for key in sorted(rows)])
    except (UserError, OSError, ExportError) as error:
        raise SystemExit(f"sherpa.py: {error}") from None


if __name__ == "__main__":
    main()
