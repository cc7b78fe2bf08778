"""The model card, README.md of a trained model: what was trained on what, how well it does, and how to load it."""

from io import StringIO
from pathlib import Path

import ruamel.yaml
from hyperpyyaml import load_hyperpyyaml

from speechbrain_ext.hparams import needed_keys

HERE = "path/to/pretrained"  # stands for the model in the card's commands; publishing puts its name there

_LIBRISPEECH = "openslr/librispeech_asr"
_LIBRISPEECH_TRAIN = {"train-clean-100", "train-clean-360", "train-other-500"}
_LIBRISPEECH_TEST = {f"{part}-{config}": (config, part) for part in ("dev", "test") for config in ("clean", "other")}
_HUB_PARTS = {"dev": "validation", "test": "test"}
_SIZES = ("d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "d_ffn", "kernel_size", "encoder_kwargs")


def model_card(tree, interface, rows):
    """Write the card of a model.

    Arguments
    ---------
    tree : dict
        Parsed hparams of the training run, references unresolved.
    interface : str
        SpeechBrain's class that loads the model.
    rows : sequence of dict
        Rows of the results table; may be empty.

    Returns
    -------
    str
        Markdown with metadata in front, as Hugging Face reads it. No licence is in there: that is for the model's owner to say.

    Example
    -------
    >>> hparams = "{encoder: conformer, sample_rate: 16000, d_model: 144, vocab_size: 128, token_type: unigram}"
    >>> card = model_card(ruamel.yaml.YAML().load(hparams), "EncoderASR", [])
    >>> card.splitlines()[1:3]
    ['library_name: speechbrain', 'pipeline_tag: automatic-speech-recognition']
    """
    values = _values(tree)
    train_sets = set(rows[0]["train_set"].split()) if rows else set()
    return f"""---
{_metadata(values["encoder"], rows, train_sets)}---
# Speech recognition with {values["encoder"]}

Written at the end of training by `speechbrain_ext`, whose encoder it needs.

## Results

{_table(rows, _RESULTS) if rows else "Not tested."}

## Training

{_training(values, rows)}
## Limits

{_limits(values["sample_rate"], train_sets)}

## Use

    python -m speechbrain_ext transcribe {HERE} FILE...

    from speechbrain_ext.inference import load_model
    print(load_model("{HERE}").transcribe_file("speech.wav"))

or, with `speechbrain_ext` installed, with SpeechBrain's own class:

    from speechbrain.inference.ASR import {interface}
    print({interface}.from_hparams(source="{HERE}").transcribe_file("speech.wav"))
{_CASCADE if values["encoder"] == "cascade" else ""}"""


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
_CASCADE = f"""
The model is a cascade of two passes. The second one answers unless told otherwise; the first one alone needs less time and no
audio to come:

    python -m speechbrain_ext transcribe --pass first {HERE} FILE...
    load_model("{HERE}", answer="first")
"""


def _metadata(encoder, rows, train_sets):
    """YAML, with only what is known."""
    data = {}
    librispeech = bool(train_sets) and train_sets <= _LIBRISPEECH_TRAIN
    if librispeech or train_sets == {"train-mini"}:
        data["language"] = "en"
    data["library_name"] = "speechbrain"
    data["pipeline_tag"] = "automatic-speech-recognition"
    data["tags"] = ["automatic-speech-recognition", "speechbrain", "speechbrain_ext", encoder]
    if librispeech:
        data["datasets"] = [_LIBRISPEECH]
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
            results.append({"task": dict(task), "dataset": _dataset(name, librispeech), "metrics": metrics})
        data["model-index"] = [{"name": Path(rows[0]["hparams"]).stem, "results": results}]
    text = StringIO()
    yaml = ruamel.yaml.YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = False, False
    yaml.dump(data, text)
    return text.getvalue()


def _dataset(name, librispeech):
    if not (librispeech and name in _LIBRISPEECH_TEST):
        return {"name": name, "type": name}
    config, part = _LIBRISPEECH_TEST[name]
    return {"name": f"LibriSpeech {name}", "type": _LIBRISPEECH, "config": config, "split": _HUB_PARTS[part]}


def _table(rows, columns):
    lines = [list(columns), ["---"] * len(columns), *([row[key] for key in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _values(tree):
    """What the card says of the hparams, references resolved."""
    keys = [key for key in ("encoder", "sample_rate", "vocab_size", "token_type", *_SIZES) if key in tree]
    needed = {*keys, *needed_keys(tree, [tree[key] for key in keys])}
    text = StringIO()
    ruamel.yaml.YAML().dump({key: tree[key] for key in tree if key in needed}, text)
    return load_hyperpyyaml(text.getvalue())


def _training(values, rows):
    lines = {"encoder": values["encoder"]} | {key: _plain(values[key]) for key in _SIZES if values.get(key) not in (None, {})}
    lines["tokens"] = f"{values['vocab_size']} {values['token_type']}"
    if rows:
        lines |= {name: rows[0][key] for name, key in _RUN.items()}
    return "| | |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in lines.items())


def _plain(value):
    if isinstance(value, dict):
        return ", ".join(f"{key} ({_plain(item)})" for key, item in value.items() if item is not None)
    return str(value)


def _limits(sample_rate, train_sets):
    rate = f"It takes audio at {sample_rate} Hz, one channel; `transcribe` and `load_model` convert files to that."
    if train_sets == {"train-mini"}:
        known = "It was trained on an hour of synthetic English, to show that training works; it is of no use for real speech."
    elif train_sets and train_sets <= _LIBRISPEECH_TRAIN:
        known = (
            "It was trained on English read aloud from books, with texts in capitals and without punctuation, and writes such "
            "texts. Other languages, conversation, noise and far microphones were not in the training."
        )
    else:
        known = "Nothing is known of how it does on other speech than that of its training and test sets."
    return f"{rate} {known}"
