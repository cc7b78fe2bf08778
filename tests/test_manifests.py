"""Own corpora from manifests: every format gives the same manifests and the same training, and what is no good is named."""

import csv
import gzip
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tiny import SENTENCES, SMALL, arguments

from recipes.Manifest.prepare import prepare_manifests, test_names
from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.dataio.manifests import read_entries
from speechbrain_ext.training.run import UsageError, run, take_paths
from speechbrain_ext.utils.errors import UserError, UserImportError, UserRuntimeError

test_names.__test__ = False  # it is no test
RATE = 16000
TEXTS = ["The cat sat.", 'a "hat", and {a} cat', "costs $5 or $word", "Straße, naïve; Привет", "it's 50% of 2,5", "HOT  day"]


def write_wav(path, seconds=1.2, seed=0, channels=1, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels)), rate)
    return path


def json_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# Each takes a folder for the manifest, and rows of ID, wav (a path), seconds of the file, text, speaker and, for a segment, start
# and end in seconds, or also a channel; it gives the manifest.


def duration(row):
    return row.get("end", row["seconds"]) - row.get("start", 0)


def placed(row, *names):
    """Start and end in seconds under these names, and the channel."""
    found = dict(zip(names, (row["start"], row["end"]), strict=False)) if "start" in row else {}
    return found | ({"channel": row["channel"]} if "channel" in row else {})


def in_samples(row):
    return {key: value if key == "channel" else round(RATE * value) for key, value in placed(row, "start", "stop").items()}


def speechbrain_csv(folder, rows):
    lines = [
        {"ID": row["ID"], "duration": duration(row), "wav": f"$data_root/{row['wav'].name}", **in_samples(row)}
        | {"spk_id": row["speaker"], "wrd": row["text"]}
        for row in rows
    ]
    return table(folder / "m.csv", lines)


def speechbrain_json(folder, rows):
    tree = {
        row["ID"]: {"wav": f"{{data_root}}/{row['wav'].name}", "length": row["seconds"], **in_samples(row)}
        | {"spk_id": row["speaker"], "words": row["text"]}
        for row in rows
    }
    folder.mkdir(parents=True)
    (folder / "m.json").write_text(json.dumps(tree, indent=2))
    return folder / "m.json"


def nemo(folder, rows):
    lines = [
        {"audio_filepath": os.path.relpath(row["wav"], folder), "duration": duration(row), **placed(row, "offset")}
        | {"text": row["text"], "speaker": row["speaker"]}
        | ({"id": row["ID"]} if "start" in row else {})  # which it does without otherwise
        for row in rows
    ]
    return json_lines(folder / "m.jsonl", lines)


def kaldi(folder, rows):
    folder.mkdir(parents=True)
    files = {name: {row["ID"]: row[key] for row in rows} for name, key in {"text": "text", "utt2spk": "speaker"}.items()}
    files["utt2dur"] = {row["ID"]: duration(row) for row in rows}
    names = {row["ID"]: row["wav"].stem if "start" in row else row["ID"] for row in rows}
    files["wav.scp"] = {names[row["ID"]]: os.path.relpath(row["wav"], folder) for row in rows}
    if "start" in rows[0]:
        ends = {row["ID"]: -1 if row["end"] == row["seconds"] else row["end"] for row in rows}
        files["segments"] = {row["ID"]: f"{names[row['ID']]} {row['start']:.2f} {ends[row['ID']]}" for row in rows}
    for name, lines in files.items():
        (folder / name).write_text("".join(f"{key}\t{value}\r\n" for key, value in lines.items()), encoding="utf-8")
    return folder


def cut(row, folder):
    channel, length = row.get("channel", 0), duration(row)
    source = {"type": "file", "channels": [0, 1] if "channel" in row else [0], "source": os.path.relpath(row["wav"], folder)}
    recording = {"id": "r", "sources": [source], "sampling_rate": RATE, "num_samples": 0, "duration": row["seconds"]}
    said = {"id": row["ID"], "recording_id": "r", "start": 0.0, "duration": length, "channel": channel, "text": row["text"]}
    place = {"id": f"cut-{row['ID']}", "start": row.get("start", 0), "duration": length, "channel": channel, "type": "MonoCut"}
    return place | {"supervisions": [said | {"speaker": row["speaker"]}], "recording": recording}


def lhotse(folder, rows):
    path = json_lines(folder / "m.jsonl", [cut(row, folder) for row in rows])
    (folder / "m.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return folder / "m.jsonl.gz"


def wenet(folder, rows):
    lines = [
        {"key": row["ID"], "wav": str(row["wav"]), "txt": row["text"], "speaker": row["speaker"], **placed(row, "start", "end")}
        for row in rows
    ]
    return json_lines(folder / "data.list", lines)


def audiofolder(folder, rows):
    lines = [
        {"file_name": os.path.relpath(row["wav"], folder), "transcription": row["text"], "speaker_id": row["speaker"]}
        for row in rows
    ]
    return table(folder / "metadata.csv", lines).parent


def tar(folder, rows):
    folder.mkdir(parents=True)
    for part in range(2):
        with tarfile.open(folder / f"{part}.tar", "w") as archive:
            for row in rows[part::2]:
                archive.add(row["wav"], f"shard/{row['ID']}.flac")
                for suffix, text in ((".txt", row["text"]), (".json", json.dumps({"speaker": row["speaker"]}))):
                    member = tarfile.TarInfo(f"shard/{row['ID']}{suffix}")
                    member.size = len(text.encode())
                    archive.addfile(member, io.BytesIO(text.encode()))
    (folder / "shards.list").write_text("0.tar\n1.tar\n")
    return folder / "shards.list"


def saved_dataset(folder, rows, inside=True):
    """As save_to_disk writes it."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    kind = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    names = [f"data-{part:05d}-of-00002.arrow" for part in range(2)]
    for part, name in enumerate(names):
        chosen = rows[part::2]
        audio = [
            {"bytes": row["wav"].read_bytes(), "path": row["wav"].name} if inside else {"bytes": None, "path": str(row["wav"])}
            for row in chosen
        ]
        columns = {"text": [row["text"] for row in chosen], "speaker_id": [row["speaker"] for row in chosen]}
        whole = arrow.table({"audio": arrow.array(audio, kind), **columns})
        with arrow.OSFile(str(folder / name), "wb") as file, arrow.ipc.new_stream(file, whole.schema) as stream:
            stream.write_table(whole, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def saved_paths(folder, rows):
    return saved_dataset(folder, rows, inside=False)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Files of an utterance each, and long recordings of one and of two channels."""
    folder = tmp_path_factory.mktemp("audio")
    for index in range(12):
        write_wav(folder / f"utt{index}.flac", 0.8 + index / 16, index)
    for index in range(2):
        write_wav(folder / f"mono{index}.flac", 20, index)
        write_wav(folder / f"stereo{index}.flac", 20, index, channels=2)
    return folder


def utterances(audio):
    """Rows of whole files, to train on and to validate with."""
    rows = [
        {
            "ID": f"utt{index}",
            "wav": audio / f"utt{index}.flac",
            "seconds": 0.8 + index / 16,
            "text": text,
            "speaker": f"s{index % 3}",
        }
        for index, text in enumerate(2 * TEXTS)
    ]
    return rows[:9], rows[9:]


def segments(audio, stereo):
    """Rows of segments of recordings, the last one to the end."""
    rows = [
        {
            "ID": f"seg{index}",
            "seconds": 20.0,
            "text": text,
            "speaker": "s",
            "start": 0.25 + 1.5 * index,
            "end": 1.5 + 1.5 * index,
        }
        | (
            {"wav": audio / f"stereo{index % 2}.flac", "channel": index % 2}
            if stereo
            else {"wav": audio / f"mono{index % 2}.flac"}
        )
        for index, text in enumerate(2 * SENTENCES)
    ]
    rows[-1]["end"] = 20.0
    return rows[:9], rows[9:]


def prepare(save, train, valid, tests=(), data_folder=None, **keys):
    te_splits = test_names(tests)
    prepare_manifests(data_folder, save, ["train"], ["valid"], te_splits, [train], [valid], tests, **keys)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def skipped(save):
    return {row["ID"]: row["reason"] for row in read_csv(save / "skipped.csv")}


# -------------------- every format


def prepared_by(write, rows, folder, audio):
    """The bytes of the manifests of training and validation that a format gives."""
    train, valid = (write(folder / write.__name__ / name, part) for name, part in zip("tv", rows, strict=True))
    save = folder / "save" / write.__name__
    prepare(save, train, valid, data_folder=audio)
    assert not skipped(save)
    return [(save / f"{split}.csv").read_bytes() for split in ("train", "valid")]


def test_every_format_gives_the_same_manifests(audio, tmp_path):
    rows = utterances(audio)
    formats = [speechbrain_csv, speechbrain_json, nemo, kaldi, lhotse, wenet, audiofolder]
    first, *others = [prepared_by(write, rows, tmp_path, audio) for write in formats]
    assert all(manifests == first for manifests in others)
    found = list(csv.DictReader(io.StringIO(first[0].decode())))
    assert [row["wrd"] for row in found] == [" ".join(row["text"].split()) for row in rows[0]]
    assert list(found[0]) == ["ID", "duration", "wav", "spk_id", "wrd"] and found[3]["wav"] == str(audio / "utt3.flac")


@pytest.mark.parametrize("stereo", [False, True])
def test_every_format_gives_the_same_segments(stereo, audio, tmp_path):
    rows = segments(audio, stereo)
    formats = [speechbrain_csv, speechbrain_json, nemo, lhotse, wenet, *([] if stereo else [kaldi])]
    first, *others = [prepared_by(write, rows, tmp_path, audio) for write in formats]
    assert all(manifests == first for manifests in others)
    last = list(csv.DictReader(io.StringIO(first[1].decode())))[-1]
    assert (last["start"], last["stop"], last["duration"]) == ("268000", "320000", "3.25") and last.get("channel") == (
        "1" if stereo else None
    )


@pytest.mark.parametrize("write", [tar, saved_dataset, saved_paths])
def test_audio_inside_of_other_files(write, audio, tmp_path):
    """The same utterances, in the order of the files; each is read where it is."""
    rows = utterances(audio)
    prepared_by(write, rows, tmp_path, audio)
    for split, given in zip(("train", "valid"), rows, strict=True):
        found = read_csv(tmp_path / "save" / write.__name__ / f"{split}.csv")
        assert [row["ID"] for row in found] == [row["ID"] for part in range(2) for row in given[part::2]]
        for row, expected in zip(found, (row for part in range(2) for row in given[part::2]), strict=True):
            assert (row["wrd"], row["spk_id"]) == (" ".join(expected["text"].split()), expected["speaker"])
            assert (
                torch.equal(load_audio(row["wav"]), load_audio(expected["wav"])) and float(row["duration"]) == expected["seconds"]
            )
