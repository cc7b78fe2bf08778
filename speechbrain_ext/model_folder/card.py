"""The model card (README.md) of a trained model: its training, its results, and how to load it."""

import dataclasses
from io import StringIO
from pathlib import Path

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml

from speechbrain_ext.hparams import needed_keys
from speechbrain_ext.registry import get_encoder, passes_of
from speechbrain_ext.utils.text import table

HERE = "path/to/pretrained"  # placeholder in the card's commands; publishing replaces it by the name of the model

_SIZES = ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "d_ffn", "kernel_size", "encoder_kwargs")
_TRANSDUCER = ("predictor", "predictor_size", "joint_size")


def model_card(tree, interface, rows, provenance=None):
    """Write the card of a model.

    Arguments
    ---------
    tree : dict
        Parsed hparams of the training run, with unresolved references.
    interface : str
        SpeechBrain's class that loads the model.
    rows : sequence of ResultRow or dict
        Rows of the results table; may be empty.
    provenance : dict, optional
        The origin of architecture, data, tokenizer and weights, as texts and lists of texts by name.

    Returns
    -------
    str
        Markdown with metadata at the top, as Hugging Face reads it. The licence is that of the corpus file, if
        it states one; else the owner of the model chooses one.

    Example
    -------
    >>> hparams = "{encoder: conformer, sample_rate: 16000, d_model: 144, vocab_size: 128, token_type: unigram}"
    >>> card = model_card(ruamel.yaml.YAML().load(hparams), "EncoderASR", [])
    >>> card.splitlines()[1:3]
    ['library_name: speechbrain', 'pipeline_tag: automatic-speech-recognition']
    """
    rows = [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row for row in rows]
    values = _values(tree)
    corpus = _corpus(values.get("card") or {}, rows)
    return f"""---
{_metadata(values["encoder"], rows, corpus)}---
# Speech recognition with {values["encoder"]}

`speechbrain_ext` wrote this card at the end of training. The model needs that package.

## Results

{table(_RESULTS, ([row[key] for key in _RESULTS.values()] for row in rows)) if rows else "Not tested."}

## Training

{_training(values, rows, provenance or {})}
## Limits

{_limits(values["sample_rate"], corpus)}

## Use

    python -m speechbrain_ext transcribe --model {HERE} FILE...

    from speechbrain_ext.inference import load_model
    print(load_model("{HERE}").transcribe_file("speech.wav"))

or, with `speechbrain_ext` installed, with SpeechBrain's class:

    from speechbrain.inference.ASR import {interface}
    print({interface}.from_hparams(source="{HERE}").transcribe_file("speech.wav"))
{_CASCADE if len(passes_of(get_encoder(values["encoder"]))) > 1 else ""}"""


_RESULTS = {
    "test set": "test_set",
    "search": "search",
    "WER %": "WER",
    "insertions": "insertions",
    "deletions": "deletions",
    "substitutions": "substitutions",
    "words": "words",
}
_RUN = {
    "hparams file": "hparams",
    "training set": "train_set",
    "parameters": "parameters",
    "optimizer steps": "steps",
    "epochs": "epochs",
    "precision": "precision",
    "seconds of audio per second of training": "audio_seconds_per_second",
    "peak memory, MiB": "peak_memory_mib",
    "hardware": "hardware",
    "date": "date",
    "commit": "commit",
}
_ORIGIN = {
    "corpus": "corpus",
    "manifests": "train_manifest",
    "mixed with": "mixed_with",
    "tokenizer": "tokenizer",
    "initial weights": "init_from",
    "hash of the initial weights": "init_weights",
}
_CASCADE = f"""
The model is a cascade of two passes. By default the second pass answers. The first pass alone needs less time and no future
audio:

    python -m speechbrain_ext transcribe --model {HERE} --pass first FILE...
    load_model("{HERE}", pass_name="first")
"""


def _corpus(card, rows):
    """The facts about the corpus, if the model was trained on nothing else."""
    trained_on = set(rows[0]["train_set"].split()) if rows else set()
    return card if trained_on and trained_on <= set(card.get("train_sets", ())) else {}


def _metadata(encoder, rows, corpus):
    """The metadata as YAML, without unknown values."""
    data = {}
    if corpus.get("language"):
        data["language"] = corpus["language"]
    if corpus.get("license"):
        data["license"] = corpus["license"]
    data["library_name"] = "speechbrain"
    data["pipeline_tag"] = "automatic-speech-recognition"
    data["tags"] = ["automatic-speech-recognition", "speechbrain", "speechbrain_ext", encoder]
    if corpus.get("datasets"):
        data["datasets"] = corpus["datasets"]
    data["metrics"] = ["wer"]
    if rows:
        task = {"type": "automatic-speech-recognition", "name": "Automatic Speech Recognition"}
        results = []
        for name in dict.fromkeys(row["test_set"] for row in rows):
            metrics = [
                {"type": "wer", "value": float(row["WER"]), "name": f"WER, {row['search']}"}
                for row in rows
                if row["test_set"] == name
            ]
            dataset = corpus.get("test_sets", {}).get(name, {"name": name, "type": name})
            results.append({"task": dict(task), "dataset": dict(dataset), "metrics": metrics})
        data["model-index"] = [{"name": Path(rows[0]["hparams"]).stem, "results": results}]
    text = StringIO()
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.dump(data, text)
    return text.getvalue()


def _values(tree):
    """The hparams for the card, with resolved references."""
    said = (
        "encoder",
        "sample_rate",
        "vocab_size",
        "token_type",
        "text_normalization",
        "words_only",
        "card",
        *_SIZES,
        *_TRANSDUCER,
    )
    keys = [key for key in said if key in tree]
    needed = {*keys, *needed_keys(tree, [tree[key] for key in keys])}
    text = StringIO()
    ruamel.yaml.YAML().dump({key: tree[key] for key in tree if key in needed}, text)
    return load_hyperpyyaml(text.getvalue())


def _training(values, rows, provenance):
    lines = {"encoder": values["encoder"]} | {
        key: _plain(values[key]) for key in (*_SIZES, *_TRANSDUCER) if values.get(key) not in (None, {})
    }
    # The hparams do not state the type of a tokenizer from another model or file
    trained = provenance.get("tokenizer", "").startswith("trained") or not provenance
    lines["tokens"] = f"{values['vocab_size']} {values['token_type']}" if trained else values["vocab_size"]
    if "text_normalization" in values:
        lines["case of transcripts"] = values["text_normalization"].replace("none", "as they are")
    if values.get("words_only"):
        lines["punctuation"] = "none"
    if rows:
        lines |= {name: rows[0][key] for name, key in _RUN.items()}
    lines |= {name: _plain(provenance[key]) for name, key in _ORIGIN.items() if key in provenance}
    return table(["", ""], lines.items()) + "\n"


def _plain(value):
    if isinstance(value, dict):
        return ", ".join(f"{key} ({_plain(item)})" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _limits(sample_rate, corpus):
    rate = f"It takes audio at {sample_rate} Hz, one channel; `transcribe` and `load_model` convert files to that."
    known = corpus.get("limits", "Its accuracy on speech other than that of its training and test sets is not known.")
    return f"{rate} {known}"
