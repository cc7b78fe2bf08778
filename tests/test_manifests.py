"""Corpora from manifests: every format gives the same manifests and the same training, and unusable lines are named."""

import contextlib
import csv
import gzip
import io
import json
import logging
import os
import random
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from conftest import ROOT
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from tiny import SENTENCES, SMALL, arguments, train

from recipes.LibriSpeech.prepare import first_there
from recipes.Manifest.prepare import names_of_tests, prepare_manifests, read_split
from speechbrain_ext.brains.asr import AsrBrain
from speechbrain_ext.dataio import preparation
from speechbrain_ext.dataio.audio import load_audio
from speechbrain_ext.dataio.datasets import MANIFEST_FIELDS, make_datasets, read_manifest, write_manifest
from speechbrain_ext.dataio.manifests import read_entries, select
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.dataio.texts import read_sentences
from speechbrain_ext.dataio.tokenizer import train_tokenizer, unknown_characters
from speechbrain_ext.hparams import load_hparams, resolve_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.lobes.features import KaldiFbank
from speechbrain_ext.training.run import prepare_corpus, run
from speechbrain_ext.training.settings import UsageError, choose_setting, take_paths
from speechbrain_ext.utils.errors import UserError, UserImportError, UserRuntimeError

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


# Writers of manifests. Each takes a folder, and rows of ID, wav (a path), seconds of the file, text, speaker and, for a segment,
# start and end in seconds and optionally a channel; it returns the manifest.


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
        | ({"id": row["ID"]} if "start" in row else {})  # not needed for whole files
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


def saved_dataset(folder, rows, inside=True, options=None):
    """Write a dataset as save_to_disk does."""
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
        with arrow.OSFile(str(folder / name), "wb") as file, arrow.ipc.new_stream(file, whole.schema, options=options) as stream:
            stream.write_table(whole, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def saved_paths(folder, rows):
    return saved_dataset(folder, rows, inside=False)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Files with one utterance each, and long recordings with one and two channels."""
    folder = tmp_path_factory.mktemp("audio")
    for index in range(12):
        write_wav(folder / f"utt{index}.flac", 0.8 + index / 16, index)
    for index in range(2):
        write_wav(folder / f"mono{index}.flac", 20, index)
        write_wav(folder / f"stereo{index}.flac", 20, index, channels=2)
    return folder


def utterances(audio):
    """Rows of whole files for training and validation."""
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
    """Rows of segments of recordings; the last one goes to the end."""
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
    te_splits = names_of_tests(tests)
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
    """The same utterances in the order of the files; audio is read from inside them."""
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


def test_a_folder_in_librispeech_layout(audio, tmp_path):
    """Speakers come from the ids; a transcript without audio is named."""
    chapter = tmp_path / "test-clean" / "7" / "21"
    chapter.mkdir(parents=True)
    os.link(audio / "utt0.flac", chapter / "7-21-0000.flac")
    (chapter / "7-21.trans.txt").write_text("7-21-0000 THE  CAT\n7-21-0001 GONE\n")
    entries, files = read_entries(tmp_path)
    assert [(entry.utterance.ID, entry.utterance.spk_id, entry.flaw) for entry in entries] == [
        ("7-21-0000", "7", ""),
        ("7-21-0001", "unknown", "transcript without audio"),
    ]
    assert entries[0].utterance.wav == str(chapter / "7-21-0000.flac") and files == [str(chapter / "7-21.trans.txt")]
    assert select("test", entries, "lower")[0][0].wrd == "the cat"


def test_a_list_or_a_line_of_json_does_as_well(audio, tmp_path):
    """A JSON array, a single line, SpeechBrain's JSON on one line, and paths of SpeechBrain with start and stop."""
    path = str(audio / "mono0.flac")
    forms = [
        '[{"id": "a", "wav": "PATH", "text": "A"}, {"id": "b", "wav": "PATH", "start": 0, "stop": 16000, "text": "B"}]',
        '{"a": {"wav": "PATH", "wrd": "A"}, "b": {"wav": {"file": "PATH", "start": 0, "stop": 16000}, "wrd": "B"}}',
        "ID, wav, start, stop, wrd\na, PATH, , , A\r\n\nb, PATH, 0, 16000, B\n",
    ]
    found = []
    for form in forms:
        (tmp_path / "m").write_bytes(b"\xef\xbb\xbf" + form.replace("PATH", path).encode())
        found.append([entry.utterance[:6] for entry in read_entries(tmp_path / "m")[0]])
    assert found[0][1] == ("b", path, "unknown", "B", 0.0, 16000.0) and all(entries == found[0] for entries in found)
    (tmp_path / "m").write_text(json.dumps({"wav": path, "text": "A"}))
    assert [entry.utterance.ID for entry in read_entries(tmp_path / "m")[0]] == ["mono0"]


def test_ids_that_no_manifest_states(tmp_path):
    """The stem with segment and channel, or the whole path if stems are equal (other folders, other suffixes)."""
    rows = [{"audio_filepath": name, "text": "A"} for name in ("a/1.wav", "b/1.wav", "b/2.wav", "b/2.flac", "c.wav")]
    rows += [{"audio_filepath": "c.wav", "offset": second, "duration": 1.25, "text": "A"} for second in (0, 1.0005)]
    rows += [{"audio_filepath": "call.wav", "channel": channel, "text": "A"} for channel in (0, 1)]
    rows += [{"audio_filepath": "call.wav", "channel": 1, "offset": 2, "duration": 1, "text": "A"}]
    ids = [entry.utterance.ID for entry in read_entries(json_lines(tmp_path / "m.jsonl", rows))[0]]
    stems = ["c", "c-0.000-1.250", "c-1.000-2.250", "call-channel0", "call-channel1", "call-2.000-3.000-channel1"]
    assert ids == [f"{tmp_path}/{row['audio_filepath']}" for row in rows[:4]] + stems


@pytest.mark.parametrize(
    "given, segment",
    [
        ({"start": 1.5, "end": 3.0, "stop": None}, (1.5, 3.0, False, None)),
        ({"start": 24000, "stop": 48000, "end": None}, (24000, 48000, True, None)),
        ({"start": 24000.0, "stop": None}, (24000, None, True, None)),
        ({"stop": 48000}, (None, 48000, True, None)),
        ({"start": 1.5, "end": None}, (1.5, None, False, None)),
        ({"start": "", "end": "", "stop": ""}, (None, None, False, None)),
        ({"offset": 1.5, "duration": 1.5, "start": 1.5, "end": 3.001}, (1.5, 3.0, False, 1.5)),
        ({"start": 0, "end": None, "stop": None}, (0, None, False, None)),
        ({"begin_time": 941.5, "end_time": 943.0}, (None, None, False, None)),
        ({"start_time": 0, "end_time": 48000, "duration": 3.0}, (None, None, False, 3.0)),
        ({"start_time": 1.5, "end_time": 3, "duration": 20.0}, (None, None, False, 20.0)),
        ({"start_time": "9:30", "end_time": ["x"]}, (None, None, False, None)),
    ],
)
def test_a_segment_counts_if_its_columns_have_values(given, segment, tmp_path):
    """Columns may be empty, agree, or have other meanings: beside the last names, audio is often cut already."""
    ((entry,), _) = read_entries(json_lines(tmp_path / "m.jsonl", [{"wav": "a.wav", "text": "A", **given}]))
    found = entry.utterance
    assert (found.start, found.stop, found.in_samples, found.duration) == segment and not entry.flaw


def test_several_manifests_become_one_set(audio, tmp_path):
    rows = utterances(audio)[0]
    first, second = wenet(tmp_path / "first", rows[:5]), kaldi(tmp_path / "second", rows[4:])
    valid = wenet(tmp_path / "valid", utterances(audio)[1])
    prepare_manifests(None, tmp_path / "save", ["train"], ["valid"], [], [first, second], [valid])
    ids = [row["ID"] for row in read_csv(tmp_path / "save" / "train.csv")]
    assert ids == ["utt0", "utt1", "utt2", "utt3", "data-utt4", "second-utt4", "utt5", "utt6", "utt7", "utt8"]


def test_ids_that_are_made_are_not_those_of_others(tmp_path):
    for name, ids in {"a": ("x", "a-x", "x"), "b": ("x",), "b-a": ("a-x",)}.items():
        json_lines(tmp_path / f"{name}.jsonl", [{"id": key, "wav": "1.wav", "text": "A"} for key in ids])
    entries, *_ = read_split([tmp_path / f"{name}.jsonl" for name in ("a", "b", "b-a")])
    assert [entry.utterance.ID for entry in entries] == ["a-a-x", "a-a-a-x", "a-a-x", "b-x", "b-a-a-x"]
    (tmp_path / "m.csv").write_text("ID,wav,wrd\nb,a.wav,A\n,b.wav,B\n")
    assert [entry.utterance.ID for entry in read_entries(tmp_path / "m.csv")[0]] == ["b", f"{tmp_path}/b.wav"]


def test_a_path_through_a_linked_folder_is_that_of_the_system(tmp_path):
    write_wav(tmp_path / "disk" / "a.wav")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "sets").symlink_to(tmp_path / "disk" / "sets")
    rows = [{"wav": "../a.wav", "text": "A"}, {"wav": "$root/../a.wav", "text": "A"}, {"wav": "a:1", "text": "A"}]
    json_lines(tmp_path / "disk" / "sets" / "m.jsonl", rows)
    (tmp_path / "disk" / "sets" / "a:1").touch()  # a path may look like something else
    entries, _ = read_entries(tmp_path / "my" / "sets" / "m.jsonl", tmp_path / "my" / "sets")
    paths = [f"{tmp_path}/disk/a.wav", f"{tmp_path}/disk/a.wav", f"{tmp_path}/my/sets/a:1"]
    assert [entry.utterance.wav for entry in entries] == paths


@pytest.mark.parametrize(
    "case, only_words, text",
    [
        ("none", False, "Größe, ПРИВЕТ!"),
        ("upper", False, "GRÖSSE, ПРИВЕТ!"),
        ("lower", False, "größe, привет!"),
        ("lower", True, "größe привет"),
    ],
)
def test_case_and_punctuation_of_transcripts_are_a_choice(case, only_words, text, audio, tmp_path):
    rows = [[part[0] | {"text": "Größe,\u00a0ПРИВЕТ!"}] for part in utterances(audio)]
    written = [wenet(tmp_path / name, part) for name, part in zip("tv", rows, strict=True)]
    prepare(tmp_path / "save", *written, text_normalization=case, words_only=only_words)
    assert [row["wrd"] for row in read_csv(tmp_path / "save" / "train.csv")] == [text]


@pytest.fixture
def valid(audio, tmp_path):
    return wenet(tmp_path / "valid", utterances(audio)[1])


def test_audio_that_was_cut_already_is_used_whole(valid, tmp_path):
    """Times beside it are of the recording it comes from, of the speech in it, or in a unit that is not known."""
    times = [{"start_time": 941.5, "end_time": 943}, {"start_time": 0.25, "end_time": 1.75}, {"start_time": 0, "end_time": 2000}]
    for index, row in enumerate(times):
        row |= {"wav": str(write_wav(tmp_path / f"{index}.wav", 2.0)), "text": "A"}
    prepare(tmp_path / "save", json_lines(tmp_path / "train.jsonl", times), valid)
    assert [row["duration"] for row in read_csv(tmp_path / "save" / "train.csv")] == 3 * ["2.0"]


# -------------------- utterances that are left out


def broken(**values):
    """Change or remove (with ...) keys of a line."""
    return lambda row: {key: value for key, value in {**row, **values}.items() if value is not ...}


@pytest.mark.parametrize(
    "change, reason",
    [
        (broken(audio_filepath="gone.wav"), "missing"),
        (broken(audio_filepath=...), "no audio path"),
        (broken(audio_filepath=5), "no audio path"),
        (broken(audio_filepath="../a\0/a.wav"), "not UTF-8"),
        (broken(id="a\0"), "not UTF-8"),
        (broken(speaker="a\0"), "not UTF-8"),
        (broken(audio_filepath="text.wav"), "unreadable"),
        (broken(audio_filepath="cut.flac"), "truncated or damaged"),
        (broken(audio_filepath="https://example.org/a.wav"), "address instead of a path"),
        (broken(audio_filepath="file:///a.wav"), "address instead of a path"),
        (broken(audio_filepath="~/a.wav"), "path with ~"),
        (broken(audio_filepath="x.ark:1234"), "offset into an archive"),
        (broken(text=...), "no transcript"),
        (broken(text=None, text_filepath="gone.txt"), "no transcript"),
        (broken(text=" \u200b\n"), "empty transcript"),
        (broken(text=["a"]), "transcript is not text"),
        (broken(text="\ud800"), "not UTF-8"),
        (broken(duration=5.0), "wrong duration"),
        (broken(duration=-1), "wrong duration"),
        (broken(duration="long"), "not a number"),
        (broken(duration=True), "not a number"),
        (broken(offset=float("nan")), "not a number"),
        (broken(offset=19.5), "segment outside of its audio"),
        (broken(offset=-0.5), "segment outside of its audio"),
        (broken(offset=0, duration=0), "segment outside of its audio"),
        (broken(offset=1e9, duration=1e9), "segment outside of its audio"),
        (broken(start=3, stop=2), "segment outside of its audio"),
        (broken(offset=0, duration=0.05), "shorter than 0.1 s"),
        (broken(start=3), "start without end or stop"),
        (broken(start=3, end=None, stop=None), "start without end or stop"),
        (broken(end=3), "end without start"),
        (broken(begin=1, end=3), "end without start"),
        (broken(start=1.5, stop=48000), "unclear segment"),
        (broken(start=1, stop=48000, end=3), "unclear segment"),
        (broken(offset=1, duration=..., end=2), "unclear segment"),
        (broken(offset=0, duration=1, start=2, end=3), "unclear segment"),
        (broken(offset=0, duration=1, stop=16000), "unclear segment"),
        (broken(start_time=1.5, end_time=3, duration=...), "unclear segment"),
        (broken(begin_time="0", end_time="18.9", duration=...), "unclear segment"),
        (broken(start_ms=1500, end_ms=20000, duration=...), "unclear segment"),
        (broken(channel=1), "no such channel"),
        (broken(channel=-1), "no such channel"),
        (broken(channel=0.5), "not a number"),
        (broken(id="utt0"), "duplicate id"),
        (broken(offset=0, duration=45), "longer than 40 s"),
        (lambda row: "{", "not valid JSON"),
        (lambda row: "[1]", "not a JSON object"),
    ],
)
def test_a_line_that_is_no_good_is_named(change, reason, audio, valid, tmp_path):
    write_wav(tmp_path / "long.wav", 50)
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "cut.flac").write_bytes((audio / "mono0.flac").read_bytes()[:-9])
    rows = [{"id": f"utt{index}", "audio_filepath": str(audio / f"utt{index}.flac"), "text": "A"} for index in range(4)]
    row = {"id": "bad", "audio_filepath": "long.wav", "text": "A", "duration": 50.0}
    if not reason.startswith("longer"):
        rows.append(row | {"id": "good", "offset": 0, "duration": 20})
        row |= {"audio_filepath": str(audio / "mono0.flac"), "duration": 20.0}
    line = change(row)
    text = "".join(json.dumps(row) + "\n" for row in rows) + (line if isinstance(line, str) else json.dumps(line)) + "\n"
    (tmp_path / "train.jsonl").write_text(text)
    prepare(tmp_path / "save", tmp_path / "train.jsonl", valid, max_skipped=0.2)
    (left_out,) = read_csv(tmp_path / "save" / "skipped.csv")
    assert (left_out["split"], left_out["reason"]) == ("train", reason)
    assert left_out["ID"] == ("" if isinstance(line, str) else line["id"]) and left_out["file"]
    assert len(read_csv(tmp_path / "save" / "train.csv")) == len(rows)


def test_long_utterances_are_left_out_by_choice_unless_none_is_left(audio, valid, tmp_path, caplog):
    write_wav(tmp_path / "long.wav", 3)
    long = [{"id": f"long{index}", "audio_filepath": "long.wav", "text": "A"} for index in range(3)]
    short = {"audio_filepath": str(audio / "utt0.flac"), "text": "A"}
    missing = [{"id": f"missing{index}", "audio_filepath": f"{index}.wav", "text": "A"} for index in range(2)]
    json_lines(tmp_path / "train.jsonl", [*long, short])
    prepare(tmp_path / "save", tmp_path / "train.jsonl", valid, max_skipped=0, max_duration=2.5)
    assert len(read_csv(tmp_path / "save" / "train.csv")) == 1 and len(read_csv(tmp_path / "save" / "skipped.csv")) == 3
    assert "utterances longer than 2.5 s (--max_duration) are left out; they have 0.00 hours" in caplog.text
    for rows, message in (
        (long, r"3 of 3 utterances in train cannot be used, .* 'longer than 2.5 s' \(3\); .*: raise --max_duration\.$"),
        (
            [*long, *missing, short],
            r"2 of 6 .*, more than the allowed 0%, .* 'missing' \(2\); .*: fix the corpus, or raise max_s",
        ),
    ):
        json_lines(tmp_path / "train.jsonl", rows)
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / "save", tmp_path / "train.jsonl", valid, max_skipped=0, max_duration=2.5)


def test_sets_that_no_manifest_makes_are_refused(audio, valid, tmp_path):
    train = json_lines(tmp_path / "train.jsonl", [{"audio_filepath": str(audio / "utt0.flac"), "text": "A"}])
    given = {"train_manifest": [train], "valid_manifest": [valid]}
    for splits, more, message in (
        ((["a", "b"], ["valid"], []), {}, "train_splits is .*, but manifests make one training set"),
        ((["train"], ["valid"], ["x"]), {}, "test_splits has x, but no test manifest has this name"),
        ((["train", "mixed"], ["valid"], []), {"mix_manifest": 2024}, "There is no manifest .*2024"),
        ((["train", "mixed"], ["valid"], []), {"mix_manifest": [2024, 2025]}, "There is no manifest .*2024"),
    ):
        with pytest.raises((UserError, FileNotFoundError), match=message):
            prepare_manifests(None, tmp_path / "save", *splits, **given, **more)


def read(path):
    """Ids with texts, and the reason for each utterance that is left out."""
    utterances, skipped = select("x", read_entries(path)[0], "none")
    return {utterance.ID: utterance.wrd for utterance in utterances}, {skip.ID: skip.reason for skip in skipped}


def test_a_folder_of_librispeech_s_layout_loses_nothing(tmp_path):
    chapter = tmp_path / "1" / "2"
    for name in ("1-2-0.wav", "1-2-1.wav", "1-2-1.flac", "1-2-2.wav", ".1-2-3.wav"):
        write_wav(chapter / name)
    write_wav(tmp_path / "1" / "3" / "1-3-0.wav")
    (chapter / "1-2.trans.txt").write_bytes(b"1-2-0 ONE\r1-2-1 TWO\r1-2-9 NINE\r")
    write_wav(tmp_path / "4" / "1-4-0.wav")
    (tmp_path / "4" / "1-4.trans.txt").write_text("1-4-0 FOUR\n1-4-0 FIVE\n1-4-1 FIVE\n1-4-1  FIVE\n")
    write_wav(tmp_path / "4" / "1-4-1.wav")
    (chapter / "._1-2.trans.txt").write_bytes(b"\0\5\x16\7")
    reasons = {"1-2-1": "several audio files with one name", "1-2-9": "transcript without audio"}
    reasons |= {"1-2-2": "no transcript", "1-3-0": "no transcript", "1-4-0": "two different transcripts"}
    assert read(tmp_path) == ({"1-2-0": "ONE", "1-4-1": "FIVE"}, reasons)


def test_linked_folders_are_read_once(tmp_path):
    """In LibriSpeech layout, and by the language model; a link to a parent does not cause a loop."""
    write_wav(tmp_path / "elsewhere" / "1-2-0.wav")
    (tmp_path / "elsewhere" / "1-2.trans.txt").write_text("1-2-0 ONE\n")
    (tmp_path / "corpus" / "1").mkdir(parents=True)
    (tmp_path / "corpus" / "1" / "2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "1" / "loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "itself").symlink_to("itself")
    assert read(tmp_path / "corpus") == ({"1-2-0": "ONE"}, {})
    assert list(read_sentences([tmp_path / "corpus"])) == [["ONE"]]


def test_folders_that_may_not_be_read_are_passed_over(monkeypatch, caplog, tmp_path):
    """Such as lost+found of a disk. Root may read all, so the refusal is made here."""
    write_wav(tmp_path / "1" / "1-2-0.wav")
    (tmp_path / "1" / "1-2.trans.txt").write_text("1-2-0 ONE\n")
    (tmp_path / "lost+found").mkdir()
    scan, refused = os.scandir, [str(tmp_path / "lost+found")]

    def scandir(place):
        if place in refused:
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert read(tmp_path) == ({"1-2-0": "ONE"}, {})
    assert f"{tmp_path}/lost+found may not be read" in caplog.text
    refused.append(str(tmp_path))
    with pytest.raises(PermissionError, match="Permission denied"):
        read_entries(tmp_path)


def test_links_and_tar_files_in_a_tar_file(tmp_path):
    write_wav(tmp_path / "d" / "a.wav")
    (tmp_path / "d" / "a.txt").write_text("ONE")
    for name, make in (("hard", os.link), ("soft", lambda old, new: os.symlink(old.name, new))):
        for suffix in (".wav", ".txt"):
            make(tmp_path / "d" / f"a{suffix}", tmp_path / "d" / f"{name}{suffix}")
    os.symlink("nowhere.wav", tmp_path / "d" / "gone.wav")
    (tmp_path / "d" / "gone.txt").write_text("GONE")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "d", "d")
        archive.add(write_wav(tmp_path / "inner.wav"), "inner.tar")
    texts, reasons = read(tmp_path / "t.tar")
    assert texts == {"a": "ONE", "hard": "ONE", "soft": "ONE"}
    assert reasons == {"gone": "transcript without audio", "inner": "tar file inside a tar file"}
    audio = [load_audio(entry.utterance.wav) for entry in read_entries(tmp_path / "t.tar")[0] if entry.utterance.ID in texts]
    assert len(audio) == 3 and all(torch.equal(audio[0], other) for other in audio)


@pytest.mark.parametrize("zeros", ["THE CAT".encode("utf-16-le"), "THE CAT".encode("utf-16-be"), b"TH\0E"])
def test_text_with_zeros_is_not_text(zeros, tmp_path):
    write_wav(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_bytes(zeros)
    json_lines(tmp_path / "m.jsonl", [{"id": "a", "audio_filepath": "a.wav", "text_filepath": "a.txt"}])
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name in ("a.wav", "a.txt"):
            archive.add(tmp_path / name, name)
    json_lines(tmp_path / "n.jsonl", [{"id": "a", "audio_filepath": "a.wav", "text": "ONE\0"}])
    for name in ("m.jsonl", "t.tar", "n.jsonl"):
        assert read(tmp_path / name) == ({}, {"a": "not UTF-8"})
    ((_, skipped),) = [select("x", read_entries(tmp_path / "n.jsonl")[0], "none")]
    assert skipped[0].detail == "transcript: 'ONE\\x00'"


@pytest.mark.parametrize("hidden", [{"words": [{"w": "x"}]}, {"wrd": ""}, {"text_filepath": "gone.txt"}])
def test_the_first_transcript_with_text_counts(hidden, tmp_path):
    path = json_lines(tmp_path / "m.jsonl", [{"id": "a", "audio_filepath": "a.wav", "text": "ONE", **hidden}])
    assert read(path) == ({"a": "ONE"}, {}) and list(read_sentences([path])) == [["ONE"]]


@pytest.mark.parametrize("begin", ["", "\ufeff", "  \n"])
def test_csv_with_quotes_and_blank_lines(begin, tmp_path):
    write_wav(tmp_path / "a.wav")
    (tmp_path / "m.csv").write_text(f'{begin}"ID", "wav","wrd"\n\n"a","a.wav","ONE, TWO"\n   \n')
    assert read(tmp_path / "m.csv") == ({"a": "ONE, TWO"}, {})


def test_a_transcript_of_any_length(audio, valid, tmp_path):
    rows = [{"audio_filepath": str(audio / "utt0.flac"), "text": "word " * 30_000}]
    prepare(tmp_path / "save", json_lines(tmp_path / "train.jsonl", rows), valid)
    assert len(read_manifest(tmp_path / "save" / "train.csv")[0]["wrd"]) > 131_072


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"type": "MixedCut"}, "cut of type MixedCut"),
        ({"recording": None}, "cut without recording"),
        ({"supervisions": []}, "no transcript"),
        ({"channel": 3}, "no such channel"),
        ({"duration": 0.5}, "supervision outside of its cut"),
        ({"start": None}, "incomplete cut"),
        ({"supervisions": 3}, "incomplete cut"),
    ],
)
def test_a_cut_that_is_no_piece_of_a_recording_is_named(change, reason, audio, valid, tmp_path):
    cuts = [cut(row, tmp_path) for row in segments(audio, False)[0]]
    cuts[3] |= change
    prepare(tmp_path / "save", json_lines(tmp_path / "t.jsonl", cuts), valid, max_skipped=0.2)
    assert list(skipped(tmp_path / "save").values()) == [reason]


@pytest.mark.parametrize(
    "change, reason", [({"type": "url"}, "source of type url"), ({"type": "command"}, "source of type command")]
)
def test_audio_of_a_cut_that_is_no_file_is_named(change, reason, audio, valid, tmp_path):
    cuts = [cut(row, tmp_path) for row in segments(audio, False)[0]]
    cuts[3]["recording"]["sources"][0] |= change
    cuts[4]["recording"]["transforms"] = [{"name": "Resample", "kwargs": {}}]  # the speech is the same
    cuts[5]["recording"]["transforms"] = [{"name": "Speed", "kwargs": {"factor": 1.1}}]
    prepare(tmp_path / "save", json_lines(tmp_path / "t.jsonl", cuts), valid, max_skipped=0.2)
    assert skipped(tmp_path / "save") == {cuts[5]["id"]: "recording with transforms", cuts[3]["id"]: reason}


def test_lines_of_a_kaldi_folder_that_do_not_belong_together_are_named(audio, valid, tmp_path):
    folder = kaldi(tmp_path / "t", segments(audio, False)[0])
    with open(folder / "segments", "a") as file:
        file.write("few mono0 1\nnowhere mono7 1 2\nmute mono0 1 2\nlate mono0 19 21\n")
    with open(folder / "text", "ab") as file:
        file.write(b"few A\nnowhere A\nlate A\nalone A B\n")
    prepare(tmp_path / "save", folder, valid, max_skipped=0.5)
    assert skipped(tmp_path / "save") == {
        "few": "wrong number of columns",
        "nowhere": "no audio path",
        "mute": "no transcript",
        "late": "segment outside of its audio",
        "alone": "transcript without audio",
    }


def test_members_of_a_tar_file_that_do_not_belong_together_are_named(audio, valid, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for index in range(6):
            archive.add(audio / f"utt{index}.flac", f"utt{index}.flac")
        (tmp_path / "x.txt").write_text("A")
        for name in ("utt0", "utt1", "utt2", "utt3", "alone"):
            archive.add(tmp_path / "x.txt", f"{name}.txt")
        (tmp_path / "x.json").write_text("{")
        archive.add(tmp_path / "x.json", "utt4.json")
        archive.add(audio / "utt3.flac", "utt3.wav")
        archive.add(tmp_path / "x.json", "other/.utt9.txt")
    prepare(tmp_path / "save", tmp_path / "t.tar", valid, max_skipped=0.7)
    assert skipped(tmp_path / "save") == {
        "alone": "transcript without audio",
        "utt3": "several audio files with one name",
        "utt4": "not valid JSON",
        "utt5": "no transcript",
    }


def test_lines_of_a_table_with_other_columns_are_named(audio, valid, tmp_path):
    text = f'ID,wav,wrd\na,{audio}/utt0.flac,A\nb,{audio}/utt1.flac\nc,{audio}/utt2.flac,A, B\nd,{audio}/utt3.flac,"A, B"\n'
    (tmp_path / "t.csv").write_text(text)
    prepare(tmp_path / "save", tmp_path / "t.csv", valid, max_skipped=0.5)
    assert [row["ID"] for row in read_csv(tmp_path / "save" / "train.csv")] == ["a", "d"]
    rows = read_csv(tmp_path / "save" / "skipped.csv")
    assert [(row["file"], row["detail"]) for row in rows] == [
        (f"{tmp_path}/t.csv, line 3", "2 instead of 3"),
        (f"{tmp_path}/t.csv, line 4", "4 instead of 3"),
    ]


def test_durations_that_are_rounded_are_taken(audio, valid, tmp_path):
    rows = [
        row | {"seconds": row["seconds"] + change}
        for row, change in zip(utterances(audio)[0], (0.02, -0.02, 0.001), strict=False)
    ]
    rows += [row | {"end": 20.01} for row in segments(audio, False)[1][-1:]]
    prepare(tmp_path / "save", nemo(tmp_path / "t", rows), valid)
    found = read_csv(tmp_path / "save" / "train.csv")
    assert [row["duration"] for row in found] == ["0.8", "0.8625", "0.925", "3.25"] and found[3]["stop"] == str(20 * RATE)


def test_too_much_that_is_left_out_stops_the_run(audio, valid, tmp_path):
    rows = [row | {"wav": audio / "gone.wav"} if index < 3 else row for index, row in enumerate(utterances(audio)[0])]
    with pytest.raises(
        UserRuntimeError, match="3 of 9 utterances in train cannot be used, more than the allowed 5%, .* 'missing'"
    ):
        prepare(tmp_path / "save", wenet(tmp_path / "t", rows), valid)
    assert len(skipped(tmp_path / "save")) == 3 and not (tmp_path / "save" / "train.csv").exists()
    with pytest.raises(UserRuntimeError, match="3 of 3 utterances in train cannot be used, most often .*: fix the corpus.$"):
        prepare(tmp_path / "save", wenet(tmp_path / "none", rows[:3]), valid, max_skipped=1)


# -------------------- manifests that are refused


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.csv", "", "The manifest {path} holds no utterances; give another one."),
        ("m.csv", "ID,wav,wrd\n", "The manifest {path} holds no utterances; give another one."),
        ("m.json", "{}", "The manifest {path} holds no utterances; give another one."),
        (
            "m.csv",
            "ID,file,wrd\na,b,c\n",
            "{path} has no column wav, nor any of audio_filepath, .*; rename one .*: ID, file, wrd.",
        ),
        ("m.csv", "ID,wav,said\na,b,c\n", "{path} has no column wrd, nor any of words, text, .*: ID, wav, said."),
        ("m.jsonl", '{"wav": "a", "text"', "{path} is not valid JSON: .*; fix it."),
        (
            "m.txt",
            "utt1 some text\n",
            "{path} is not a known kind of manifest: it begins with 'utt1 some text'; give",
        ),
        ("wav.scp", "utt1 a.wav\n", "{path} is one of the files of a Kaldi folder; give the folder."),
        ("m.jsonl", "{}".encode("utf-16"), "{path} is not text in UTF-8; give"),
        ("m.wav", b"RIFF\0\0\0\0WAVE", "{path} is not text in UTF-8; give"),
        ("m.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "{path} cannot be decompressed (.*); write it again."),
        ("m.tar", b"no tar", "{path} cannot be read as a tar file (.*); give a complete, un"),
        (
            "m.csv",
            "ID,wav,wrd\na,$data_root/b,c\n",
            "{path}, line 2: the audio path begins with the placeholder $data_root; give its",
        ),
        (
            "m.json",
            '{"a": {"wav": "{data_root}/a.wav", "words": "A"}}',
            "{path}, a: the audio path begins with the placeholder {data_root}; give",
        ),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    pattern = ".*".join(re.escape(part) for part in message.replace("{path}", str(path)).split(".*"))
    with pytest.raises(UserError, match=pattern):
        read_entries(path)


def test_an_arrow_file_that_was_cut_between_two_batches_is_refused(audio, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    folder = saved_dataset(tmp_path / "t", utterances(audio)[0])
    file = folder / "data-00001-of-00002.arrow"
    buffer = arrow.BufferReader(file.read_bytes())
    arrow.ipc.open_stream(buffer).read_next_batch()
    file.write_bytes(file.read_bytes()[: buffer.tell()])
    with pytest.raises(UserError, match=f"{file} has no end mark: it was cut, or not written to its end; save it again"):
        read_entries(folder)


def test_an_arrow_file_that_is_compressed_is_refused(audio, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    options = arrow.ipc.IpcWriteOptions(compression="zstd")
    folder = saved_dataset(tmp_path / "t", utterances(audio)[0], options=options)
    with pytest.raises(UserError, match="data-00000-of-00002.arrow is compressed; save it again without compression"):
        read_entries(folder)


def test_files_of_a_kaldi_folder_may_be_compressed(tmp_path):
    (tmp_path / "wav.scp").write_text("utt0 a.wav\n")
    (tmp_path / "text").write_bytes(gzip.compress("utt0 Größe\n".encode()))
    assert read_entries(tmp_path)[0][0].utterance.wrd == "Größe"
    (tmp_path / "text").write_text("utt0 Größe\n", encoding="utf-16")
    with pytest.raises(UserError, match=f"{tmp_path}/text is not text in UTF-8"):
        read_entries(tmp_path)


@pytest.mark.parametrize("after", ["", 'e,5.wav,"quoted"\nf,6.wav,TEXT\n'])
@pytest.mark.parametrize("columns", [3, 4])
def test_a_quotation_mark_takes_in_no_lines(columns, after, tmp_path):
    """Quoted text may continue over lines in CSV; one mark too many would include the next utterances in a transcript."""
    path, more = tmp_path / "m.csv", "x," * (columns - 3)
    head = f"ID,wav,{'spk_id,' * (columns - 3)}wrd\n"
    path.write_text(head + f'a,1.wav,{more}TEXT\nb,2.wav,{more}"TEXT\nc,3.wav,{more}TEXT\nd,4.wav,{more}TEXT\n{after}')
    with pytest.raises(UserError, match=f"{path}, line 3: a quotation mark begins a field that includes the next [234] lines"):
        read_entries(path)
    path.write_text(head + f'a,1.wav,{more}"First, he said.\nSecond, ""a.wav"", he said.\n"\nb,2.wav,{more}5" nails\n')
    assert [entry.utterance.ID for entry in read_entries(path)[0]] == ["a", "b"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"m.csv": "ID,wav,wrd,wrd\na,1.wav,ONE,TWO\n"}, "has two columns wrd"),
        ({"m.jsonl": '{"wav": "1.wav", "text": "ONE", "text": "TWO"}\n'}, "the key text occurs twice"),
        ({"wav.scp": "a 1.wav\n", "text": "a ONE\na TWO\n"}, "text, line 2: an earlier line has another value for a"),
        (
            {"wav.scp": "r 1.wav\nr 2.wav\n", "text": "a ONE\n", "segments": "a r 0 1\n"},
            "wav.scp, line 2: an earlier line has another value for r",
        ),
    ],
)
def test_two_values_for_one_are_refused(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_entries(tmp_path / name if len(files) == 1 else tmp_path)


def test_tar_files_that_are_cut_or_compressed_are_refused(audio, tmp_path):
    whole = tar(tmp_path / "t", utterances(audio)[0]).parent / "0.tar"
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:30_000])
    with pytest.raises(UserError, match="cut.tar cannot be read as a tar file .*unexpected end of data"):
        read_entries(tmp_path / "cut.tar")
    with tarfile.open(whole) as archive:
        begin = archive.getmembers()[3].offset
    data = whole.read_bytes()
    for flawed, message in (
        (data[:begin], f"at byte {begin} there is neither a member nor the end mark"),
        (data[: begin + 99], f"at byte {begin} there is neither a member nor the end mark"),
        (data[:begin] + b"x" * 512 + data[begin + 512 :], f"at byte {begin} there is neither a member nor the end mark"),
        (data[:begin] + bytes(512) + data[begin + 512 :], f"it continues after the end mark at byte {begin}"),
        (data + data, "it continues after the end mark at byte"),
    ):  # tarfile stops here without an error
        (tmp_path / "cut.tar").write_bytes(flawed)
        with pytest.raises(UserError, match=f"cut.tar cannot be read as a tar file .{message}"):
            read_entries(tmp_path / "cut.tar")
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match="0.tar.gz is a compressed tar file; decompress it"):
        read_entries(tmp_path / "0.tar.gz")


@pytest.mark.parametrize(
    "files, message",
    [
        (["a.wav", "b.txt"], "is not a known kind of manifest: this folder holds a.wav, b.txt; give"),
        (["wav.scp"], "has no file text; it needs wav.scp and text."),
        (["dataset_dict.json"], "holds several saved datasets; give the folder of one of them."),
        (["state.json"], "The saved dataset .* cannot be read .*; save it again."),
    ],
)
def test_a_folder_that_is_no_manifest_is_refused(files, message, tmp_path):
    if "state.json" in files:
        pytest.importorskip("pyarrow")
    for name in files:
        (tmp_path / name).write_text("x y\n")
    with pytest.raises(UserError, match=message):
        read_entries(tmp_path)


@pytest.mark.parametrize("write", [speechbrain_csv, speechbrain_json, nemo, kaldi, wenet, tar, saved_dataset])
def test_a_damaged_manifest_is_read_or_refused(write, audio, tmp_path):
    """Bytes are removed, repeated or replaced: any error is one sentence without a traceback."""
    whole = write(tmp_path / "whole", segments(audio, False)[0] if write is kaldi else utterances(audio)[0])
    generator = random.Random(0)
    for _ in range(40):
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged", dirs_exist_ok=True)
        file = generator.choice(sorted(path for path in (tmp_path / "damaged").iterdir()))
        data = bytearray(file.read_bytes())
        begin, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
        end = generator.choice([end, begin, begin + 5, begin + 30])
        data[begin:end] = generator.choice(
            [b"", b"\n", b'"', b"{", b"\0\xff", b"null", b"-1e999", bytes(data[begin : begin + 50])]
        )
        file.write_bytes(data)
        with contextlib.suppress(UserError, OSError):
            read_entries(tmp_path / "damaged" / whole.name if whole.is_file() else tmp_path / "damaged", audio)


def test_a_shell_command_is_refused(tmp_path):
    (tmp_path / "wav.scp").write_text("utt0 a.wav\nutt1 touch done; sox b.sph -t wav - |\n")
    (tmp_path / "text").write_text("utt0 A\nutt1 B\n")
    with pytest.raises(UserError) as refused:
        read_entries(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path}/wav.scp, line 2: the audio of utt1 is a shell command (touch done; sox b.sph -t wav - |), and commands are "
        "not run; write its output to a file, and give that file instead."
    )
    assert not Path("done").exists()


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no manifest .*gone.jsonl; check the path"):
        read_entries(tmp_path / "gone.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe or device"):
        read_entries(tmp_path / "pipe")


def test_without_pyarrow_a_sentence_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserImportError, match=r"reading it needs the package pyarrow; install it with: pip install -e"):
        read_entries(tmp_path)


@pytest.mark.parametrize(
    "given, message",
    [
        (["test=a.csv", "b/test.jsonl"], "'b/test.jsonl' has no name, or the name of another one; give it as name=path"),
        (["=a.csv"], "'=a.csv' has no name"),
        (["test="], "'test=' has no name"),
        ([".x=a.csv"], "has no name"),
        (["skipped=a.csv"], "but none of skipped, train.merged"),
        (["valid=a.csv"], "The sets have the names train, valid, valid; give each test set a different name"),
    ],
)
def test_names_of_test_sets_are_free_and_differ(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "save", "t.csv", "v.csv", given)


def test_a_test_set_of_other_data_may_not_be_called_train(audio, train_here, tmp_path):
    train, valid = (wenet(tmp_path / name, rows) for name, rows in zip("tv", utterances(audio), strict=True))
    with pytest.raises(UserError, match="The sets have the names train, valid, train; give each test set a different name"):
        train_here("--train_manifest", train, "--valid_manifest", valid, "--test_manifest", f"train={valid}")


def test_the_name_of_a_test_set_may_come_from_its_file(tmp_path):
    (tmp_path / "dev.v1").mkdir()
    (tmp_path / "a=b.csv").touch()
    given = ["near=x/y.csv", "x/far.set.jsonl.gz", f"{tmp_path}/dev.v1", f"{tmp_path}/a=b.csv", "a/b=c.csv"]
    assert names_of_tests(given) == ["near", "far.set", "dev.v1", "a=b", "b=c"]


# -------------------- training and test


@pytest.mark.parametrize(
    "test, shared",
    [
        ({"start": 0.25, "end": 1.5}, True),
        ({"start": 0.5, "end": 1.5}, True),
        ({"start": 1.0, "end": 1.6}, True),
        ({"start": 1.3, "end": 2.6}, False),  # only an edge is shared
        ({"start": 1.5, "end": 3.25}, False),
        ({}, True),
    ],
)
def test_audio_of_the_training_set_in_a_test_set_is_refused(test, shared, audio, valid, tmp_path):
    """With any name of the file, and any notation of the segment."""
    row = segments(audio, False)[0][0]
    train = nemo(tmp_path / "t", [row])
    (tmp_path / "link.flac").symlink_to(row["wav"])
    rows = [{"ID": "other", "wav": tmp_path / "link.flac", "seconds": 20.0, "text": "A", "speaker": "s"} | test]
    tests = [f"test={wenet(tmp_path / 'e', rows)}"]
    if not shared:
        return prepare(tmp_path / "save", train, valid, tests)
    with pytest.raises(
        UserError, match="1 utterances of the test set test have the same audio as training utterances, such as other; remove"
    ):
        prepare(tmp_path / "save", train, valid, tests)
    assert not (tmp_path / "save" / "train.csv").exists()


def test_channels_of_one_recording_are_different_audio(audio, valid, tmp_path):
    first, second = segments(audio, True)[0][:2]
    second |= {"wav": first["wav"], "start": first["start"], "end": first["end"]}
    prepare(tmp_path / "save", nemo(tmp_path / "t", [first]), valid, [f"test={nemo(tmp_path / 'e', [second])}"])


def test_an_id_of_the_training_set_in_a_test_set_is_refused(audio, valid, tmp_path):
    train, test = utterances(audio)
    test[0]["ID"] = "utt5"
    with pytest.raises(
        UserError, match="1 utterances of the test set test have the same id as training utterances, such as utt5"
    ):
        prepare(tmp_path / "save", wenet(tmp_path / "t", train), valid, [f"test={wenet(tmp_path / 'e', test)}"])
    with pytest.raises(UserError, match="the same id as training utterances, such as utt5"):  # also if two manifests have it
        twice = [wenet(tmp_path / name, train) for name in ("1", "2")]
        prepare_manifests(
            None, tmp_path / "save", ["train"], ["valid"], ["test"], twice, [valid], [f"test={tmp_path}/e/data.list"]
        )
    for folder, row in (("t", train[0]), ("e", test[1])):  # ids made from file names do not count
        (tmp_path / folder).mkdir(exist_ok=True)
        row["wav"] = write_wav(tmp_path / folder / "1.flac", row["seconds"])
    manifests = [nemo(tmp_path / folder, rows) for folder, rows in (("t", train[:3]), ("e", test[1:]))]
    prepare(tmp_path / "save", manifests[0], valid, [f"test={manifests[1]}"])


def test_audio_of_the_training_set_to_validate_with_is_told(audio, tmp_path, caplog):
    train = wenet(tmp_path / "t", utterances(audio)[0])
    with caplog.at_level(logging.WARNING):
        prepare(tmp_path / "save", train, train)
    assert "valid: 9 utterances have the same audio as the training set: utt0, utt1, utt2 and 6 more" in caplog.text
    assert "valid: 3 speakers are also in the training set: s0, s1, s2" in caplog.text


def test_audio_of_the_validation_set_to_test_with_is_told(audio, tmp_path, caplog):
    train, valid = utterances(audio)
    train, valid = wenet(tmp_path / "t", train), wenet(tmp_path / "v", valid)
    with caplog.at_level(logging.WARNING):
        prepare(tmp_path / "save", train, valid, [f"test={valid}"])
    assert "test: 3 utterances have the same audio as the validation set, which chooses the checkpoints: " in caplog.text


# -------------------- again


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: os.utime(folder / "utt0.flac", (1, 1)),
        lambda folder: (folder / "m.jsonl").write_text((folder / "m.jsonl").read_text().replace("cat", "hat")),
        lambda folder: (folder / "save" / "train.csv").unlink(),
    ],
)
def test_what_is_prepared_is_not_prepared_again_until_something_changes(change, audio, valid, tmp_path, monkeypatch):
    rows = [row | {"wav": Path(shutil.copy(row["wav"], tmp_path))} for row in utterances(audio)[0]]
    train, checked = json_lines(tmp_path / "m.jsonl", [{"wav": row["wav"].name, "text": row["text"]} for row in rows]), []
    monkeypatch.setattr(preparation, "parallel_map", lambda check, paths, **_: checked.extend(paths) or map(check, paths))
    for _ in range(2):
        prepare(tmp_path / "save", train, valid)
        assert len(checked) == 12
    change(tmp_path)
    prepare(tmp_path / "save", train, valid)
    assert len(checked) == 24


# -------------------- manifests of a user's prepare function


def datasets_of(path):
    keys = {"cache_features": False, "wav_augment": None, "sample_rate": RATE, "tokenizer": None, "bos_index": 1, "eos_index": 2}
    return make_datasets(keys, {"test": path})["test"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ("", "has no utterances"),
        ("a,1,a.wav,s,A,,\na,1,a.wav,s,A,,\n", "has the id a twice; make ids unique"),
        ("a,long,a.wav,s,A,,\n", "has the duration 'long' for a; give seconds"),
        ("a,,a.wav,s,A,,\n", "has the duration '' for a; give seconds"),
        ("a,1,a.wav,s,A,1.5,\n", "has the start '1.5' for a; give a whole number, 0 or more"),
        ("a,1,a.wav,s,A,,-1\n", "has the channel '-1' for a; give a whole number"),
        ("a,0,a.wav,s,A,,\n", "has the duration '0' for a; give seconds above 0"),
        ("a,1,a.wav,s, \u200b,,\n", "has an empty transcript for a; leave this line out"),
        ("a,1,a.wav,s,A,8,,8\n", "has the stop 8 for a; give a number above its start, 8"),
        ("a,1,a.wav,s,A,,\nb,1,b.wav,s,HELLO, WORLD,,,\n", "m.csv, line 3, has more values than columns; put a value"),
        ("a,1,a.wav,s,A,,\nb,1,b.wav,s\n", "has a line with too few values, which begins with 'b'; the corpus's prepare"),
        ('a,1,a.wav,s,"A" B,,\n', "m.csv, line 2, is not valid CSV: ',' expected after '\"'; fix it"),
        ("a,1,a.wav,s,caf\udce9,,\n", "m.csv is not text in UTF-8; write it in UTF-8"),
    ],
)
def test_a_manifest_with_other_values_is_refused(rows, message, tmp_path):
    rows = "".join(f"{row}{(row.count(',') == 6) * ','}\n" for row in rows.splitlines())
    text = "ID,duration,wav,spk_id,wrd,start,channel,stop\n" + rows
    (tmp_path / "m.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=re.escape(message)):
        datasets_of(tmp_path / "m.csv")


def test_a_manifest_may_hold_anything_in_a_name(tmp_path):
    rows = [dict(zip(MANIFEST_FIELDS, ("a\rb", "1", 'a,"\r\n.wav', "s\n", "A"), strict=True))]
    write_manifest(tmp_path / "m.csv", rows)
    assert read_manifest(tmp_path / "m.csv") == rows and (tmp_path / "m.csv").read_bytes().startswith(
        b"ID,duration,wav,spk_id,wrd\n"
    )


def test_a_manifest_may_hold_anything_in_a_transcript(audio, tmp_path):
    """SpeechBrain's reader would substitute $5, or fail."""
    (tmp_path / "m.csv").write_text(f"ID,duration,wav,spk_id,wrd,stop\na,1,{audio}/utt3.flac,s,costs $5 {{or}} $word,8000\n")
    dataset = datasets_of(tmp_path / "m.csv")
    dataset.set_output_keys(["sig", "wrd", "duration"])
    assert dataset[0]["wrd"] == "costs $5 {or} $word" and len(dataset[0]["sig"]) == 8000 and dataset[0]["duration"] == 1.0


# -------------------- training

CONFORMER = ROOT / "hparams" / "conformer.yaml"
OF_MANIFESTS = ROOT / "recipes" / "Manifest" / "corpus.yaml"
TINY = {key: value for key, value in SMALL.items() if "split" not in key} | {"num_decoder_layers": 0, "vocab_size": 60}


@pytest.fixture
def train_here(tmp_path, monkeypatch):
    """Train in this process, as train.py does with these arguments."""
    monkeypatch.chdir(tmp_path)

    def train_here(*argv, hparams=CONFORMER, corpus=None, **keys):
        argv, paths = take_paths(list(map(str, [hparams, "--device", "cpu", *argv, *arguments(**{**TINY, **keys})])))
        file, run_opts, overrides = sb.parse_arguments(argv)
        return run(file, run_opts, overrides, paths, corpus, of_manifests=OF_MANIFESTS)

    return train_here


def weights(result):
    return load_file(result.folders["pretrained"] / "asr.safetensors")


def assert_same(left, right):
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_every_format_gives_the_same_training(audio, train_here, tmp_path):
    rows = [part[0::2] + part[1::2] for part in utterances(audio)]  # the order of the tar files
    found = []
    for write, parts in ((nemo, rows), (kaldi, rows), (tar, utterances(audio))):
        folder = tmp_path / write.__name__
        train, valid = (write(folder / name, part) for name, part in zip("tv", parts, strict=True))
        found.append(weights(train_here("--train_manifest", train, "--valid_manifest", valid, output_folder=folder / "run")))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("cached", [False, True])
def test_segments_train_as_files_that_were_cut(cached, audio, train_here, tmp_path):
    parts, whole = segments(audio, True), []
    for part in parts:
        whole.append([])
        for row in part:
            samples, _ = soundfile.read(
                row["wav"], start=round(RATE * row["start"]), stop=round(RATE * row["end"]), dtype="int16"
            )
            soundfile.write(tmp_path / f"{row['ID']}.wav", samples[:, row["channel"]], RATE)
            whole[-1].append({key: row[key] for key in ("ID", "text", "speaker")} | {"wav": tmp_path / f"{row['ID']}.wav"})
            whole[-1][-1]["seconds"] = row["end"] - row["start"]
    found, keys = [], {"cache_features": cached, "number_of_epochs": 2} | ({"wav_augment": "null"} if cached else {})
    for name, rows in {"segments": parts, "files": whole}.items():
        train, valid = (nemo(tmp_path / name / part, given) for part, given in zip("tv", rows, strict=True))
        found.append(
            train_here(
                "--train_manifest", train, "--valid_manifest", valid, f"--test_manifest=test={valid}", output_folder=name, **keys
            )
        )
    assert_same(*map(weights, found))
    assert found[0].rows[0].WER == found[1].rows[0].WER and found[0].rows[0].corpus == "Manifest"


@pytest.mark.parametrize("write", [lhotse, tar])
def test_training_on_parts_of_files_resumes_exactly(write, audio, train_here, tmp_path, monkeypatch):
    """With segments of recordings and members of tar files, also if these are moved meanwhile."""
    parts = utterances(audio) if write is tar else segments(audio, True)
    train, valid = (write(tmp_path / "corpus" / name, part) for name, part in zip("tv", parts, strict=True))
    command = ["--train_manifest", train, "--valid_manifest", valid]
    keys = {"number_of_epochs": 2, "train_batch_sampler": "{max_batch_length: 3, num_buckets: 2}", "ckpt_interval_minutes": 0}
    keys |= {"ckpt_interval_steps": 1}
    straight = train_here(*command, output_folder="straight", **keys)
    fit_batch, steps = AsrBrain.fit_batch, []

    def interrupted(self, batch):
        steps.append(batch)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return fit_batch(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(AsrBrain, "fit_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_here(*command, output_folder="interrupted", **keys)
    (tmp_path / "corpus").rename(tmp_path / "moved")
    command[1::2] = (tmp_path / "moved" / path.relative_to(tmp_path / "corpus") for path in (train, valid))
    assert_same(weights(straight), weights(train_here(*command, output_folder="interrupted", **keys)))


def test_telephone_speech_trains_from_a_manifest(train_here, tmp_path):
    rows = []
    for index, text in enumerate(2 * SENTENCES):
        rows.append({"wav": f"{index}.wav", "text": text, "offset": 0.5, "duration": 1.0, "channel": 1})
        write_wav(tmp_path / f"{index}.wav", 2, index, channels=2, rate=8000)
    train, valid = json_lines(tmp_path / "t.jsonl", rows[2:]), json_lines(tmp_path / "v.jsonl", rows[:2])
    result = train_here("--train_manifest", train, "--valid_manifest", valid, sample_rate=8000)
    assert read_csv(result.output / "train.csv")[0]["stop"] == "12000"
    model = load_model(result.folders["pretrained"], "cpu")
    assert model.sample_rate == 8000 and len(model.load_audio(tmp_path / "0.wav")) == 16000


SPOKEN = ["Съешь же ещё.", "Привет, мир!", "ทำไมน้ำขึ้น", "สวัสดี ครับ", "Größe & Maß", "Über Äpfel"]


def test_any_script_comes_back_as_it_was_written(train_here, tmp_path):
    """From manifest to transcript: each character is a tone, and the model learns a few utterances by heart."""
    characters = sorted(set("".join(map(normal_form, SPOKEN))))
    time = np.arange(round(0.12 * RATE)) / RATE
    tones = {
        character: np.hanning(len(time)) * np.sin(2 * np.pi * (200 + 90 * index) * time)
        for index, character in enumerate(characters)
    }
    generator, rows = np.random.default_rng(0), []
    for index, text in enumerate(SPOKEN):
        samples = np.pad(0.3 * np.concatenate([tones[character] for character in normal_form(text)]), 1600)
        soundfile.write(tmp_path / f"{index}.wav", samples + 0.003 * generator.standard_normal(len(samples)), RATE)
        rows.append({"audio_filepath": f"{index}.wav", "text": text})
    train = json_lines(tmp_path / "t.jsonl", [row | {"id": f"{number} {row['text']}"} for row in rows for number in range(20)])
    valid = json_lines(tmp_path / "v.jsonl", rows)
    keys = {
        "token_type": "char",
        "vocab_size": len(characters) + 5,
        "d_model": 48,
        "nhead": 4,
        "num_encoder_layers": 1,
        "d_ffn": 128,
    }
    keys |= {"kernel_size": 7, "dropout": 0.0, "lr": 0.008, "warmup_steps": 20, "number_of_epochs": 3, "average_checkpoints": 1}
    keys |= {"wav_augment": "null", "fea_augment": "null", "cache_features": True}
    keys |= {"normalize": "!new:speechbrain_ext.lobes.features.InputNormalization {norm_type: sentence}"}
    keys |= {"train_batch_sampler": "{max_batch_length: 9, num_buckets: 1}"}
    result = train_here("--train_manifest", train, "--valid_manifest", valid, **keys)
    model = load_model(result.folders["pretrained"], "cpu")
    assert [model.transcribe_file(tmp_path / f"{index}.wav") for index in range(len(SPOKEN))] == list(map(normal_form, SPOKEN))


def test_a_character_that_sentencepiece_keeps_for_itself_is_unknown(tmp_path):
    (tmp_path / "m.csv").write_text("ID,wrd\n" + 9 * "a,THE▅CAT\n", encoding="utf-8")
    train_tokenizer(tmp_path / "m.csv", tmp_path / "t.model", 20, "unigram", 0, 1, 2, 3)
    tokenizer = SentencePieceProcessor(str(tmp_path / "t.model"))
    assert unknown_characters(tokenizer, ["THE▅CAT", "CAT"]) == {"▅": 1}


def test_characters_that_the_tokenizer_lacks_are_told(audio, train_here, tmp_path):
    train, valid = utterances(audio)
    train = [row | {"text": text} for row, text in zip(train, 2 * SENTENCES, strict=False)]
    valid = [row | {"text": text} for row, text in zip(valid, ("THE CAFÉ", "THE ÉCLAIR ñ", "CAT"), strict=False)]
    train, valid = wenet(tmp_path / "t", train), wenet(tmp_path / "v", valid)
    log = (train_here("--train_manifest", train, "--valid_manifest", valid).output / "log.txt").read_text(encoding="utf-8")
    told = re.findall(r"(\w+): transcripts hold characters that the tokenizer lacks .number of transcripts.: (.*)", log)
    assert len(told) == 1 and told[0][0] == "valid" and "É (2)" in told[0][1] and "ñ (1)" in told[0][1]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--train_manifest", "t.jsonl"], "--valid_manifest is empty"),
        (["--valid_manifest", "t.jsonl"], "--train_manifest is empty"),
        (["--train_manifest", "--valid_manifest", "v.jsonl"], "--train_manifest is empty"),
        (["--train_manifest", "a<b>.jsonl", "--valid_manifest", "v.jsonl"], "would be read as a reference"),
        (
            ["--train_manifest", "t", "--valid_manifest", "v", "--text_normalization", "title"],
            "is 'title'; give none, upper, lower",
        ),
        (["--train_manifest", "t", "--valid_manifest", "v", "--max_duration", "0"], "--max_duration is 0; give seconds above 0"),
    ],
)
def test_wrong_arguments_are_refused(argv, message, train_here):
    with pytest.raises(UsageError, match=message):
        train_here(*argv)


def test_a_corpus_of_manifests_may_be_a_file(audio, train_here, tmp_path):
    """Its settings apply to manifests in the file and on the command line."""
    train, valid = (wenet(tmp_path / f"{name} #1", part) for name, part in zip("tv", utterances(audio), strict=True))
    (tmp_path / "own.yaml").write_text(
        f"extends: [{CONFORMER}, {OF_MANIFESTS}]\ncorpus: Mine\ntext_normalization: lower\ntrain_manifest: ['{train}']\n"
        f"valid_manifest: ['{valid}']\ntest_manifest: ['2024={valid}']\n"
    )
    first = train_here(hparams="own.yaml", output_folder="first")
    second = train_here("--train_manifest", train, hparams="own.yaml", output_folder="second")
    assert_same(weights(first), weights(second))
    assert [(row.corpus, row.test_set) for row in first.rows] == [("Mine", "2024")]
    assert read_csv(first.output / "train.csv")[0]["wrd"] == "the cat sat."


PAGE = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["corpus #2", "a: b", "2024", "2024-01-31", "~", "(1)", "null", "a=b", "!x", "1e3", "[x]"])
def test_names_of_manifests_are_literal(name, audio, train_here, tmp_path):
    for part, rows in zip(("t", "v"), utterances(audio), strict=True):
        wenet(tmp_path / part, rows).rename(tmp_path / f"{part}{name}")
    (tmp_path / f"t{name}").rename(tmp_path / name)
    argv, paths = take_paths(
        [str(CONFORMER), "--train_manifest", name, f"--valid_manifest=v{name}", "--test_manifest", f"v{name}"]
    )
    file, run_opts, overrides = sb.parse_arguments([*argv, "--device", "cpu"])
    hparams = choose_setting(file, run_opts, overrides, paths, None, None, OF_MANIFESTS).load()
    prepare_corpus(hparams)
    assert len(read_csv(Path(hparams["output_folder"], "train.csv"))) == 9 and hparams["test_splits"] == names_of_tests(
        [f"v{name}"]
    )


def test_a_corpus_file_may_state_the_rest(audio, train_here, tmp_path):
    (tmp_path / "corpus.yaml").write_text("corpus: Mine\ntext_normalization: upper\n")
    train, valid = (wenet(tmp_path / name, part) for name, part in zip("tv", utterances(audio), strict=True))
    tests = ["--test_manifest", valid, f"again={valid}"]
    finished = train_here("--train_manifest", train, "--valid_manifest", valid, *tests, corpus=tmp_path / "corpus.yaml")
    log = (finished.output / "train_log.txt").read_text()
    assert {row.test_set for row in finished.rows} == set(re.findall(r"test loss of (\S+):", log)) and "again" in log
    assert finished.rows[0].corpus == "Mine" and read_csv(finished.output / "train.csv")[0]["wrd"] == "THE CAT SAT."
    card = (finished.folders["pretrained"] / "README.md").read_text()
    assert "| case of transcripts | upper |" in card


@pytest.mark.parametrize("key", ["--train_manifest", "--text_normalization"])
def test_what_a_prepare_function_does_not_take_is_refused(key, train_here, tmp_path):
    (tmp_path / "corpus.yaml").write_text("corpus: Mine\nprepare: !name:recipes.LibriSpeech.prepare.prepare_librispeech\n")
    with pytest.raises(UsageError, match=f"{key} is given, but the prepare function of Mine does not take it; leave it out"):
        train_here(key, "lower", "--data_folder", tmp_path, corpus=tmp_path / "corpus.yaml")


def test_the_page_s_command_runs(audio, tmp_path):
    (command,) = re.findall(r"^python (train.py .*test=my/test.jsonl)$", PAGE.replace("\\\n", ""), re.MULTILINE)
    _, hparams, *argv = command.split()
    for name, rows in zip(("train", "dev", "test"), (*utterances(audio), utterances(audio)[1]), strict=True):
        nemo(tmp_path / name, rows).rename(json_lines(tmp_path / "my" / f"{name}.jsonl", []))
    finished = train(tmp_path, ROOT / hparams, *argv, "--device", "cpu", *arguments(**TINY))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (row,) = read_csv(tmp_path / "results" / "results.csv")
    assert (row["corpus"], row["train_set"], row["test_set"]) == ("Manifest", "train", "test")


@pytest.mark.parametrize("line", [line for line in re.findall(r"`({.*?})`", PAGE) if "The text" in line and "..." not in line])
def test_the_page_s_lines_are_read(line, tmp_path):
    (tmp_path / "m").write_text(line)
    ((entry,), _) = read_entries(tmp_path / "m")
    assert entry.utterance.wrd == "The text" and not entry.flaw


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/corpus.yaml")), ids=lambda path: path.parent.name)
def test_every_corpus_goes_with_every_architecture(path, tmp_path):
    for hparams in (CONFORMER, ROOT / "hparams" / "squeezeformer.yaml"):
        plain = resolve_hparams([hparams, path], {"output_folder": str(tmp_path)})
        assert plain["corpus"] == path.parent.name and plain["train_splits"] and plain["text_normalization"] in ("none", "upper")


def test_mini_librispeech_takes_what_is_there(tmp_path):
    """Its own sets, and LibriSpeech's sets beside them."""
    corpus = ROOT / "recipes" / "MiniLibriSpeech" / "corpus.yaml"
    keys = {"data_folder": str(tmp_path), "output_folder": str(tmp_path / "run"), **SMALL}
    keys = {key: value for key, value in keys.items() if "split" not in key and not str(value).startswith("{")}
    for folders, expected in ((["dev-clean-2"], ("dev-clean-2", ["dev-clean-2"])), (["dev-clean", "test-clean"], None)):
        for name in ("train-clean-5", *folders):
            (tmp_path / name).mkdir(exist_ok=True)
        hparams = load_hparams([CONFORMER, corpus], "\n".join(f"{key}: {value}" for key, value in keys.items()))
        assert (hparams["dev_split"], hparams["test_splits"]) == (expected or ("dev-clean-2", ["test-clean"]))
        assert isinstance(hparams["speech_encoder"].compute_features, KaldiFbank)
    (tmp_path / "dev-clean-2").rmdir()
    assert first_there(tmp_path, "dev-clean-2", "dev-clean") == "dev-clean"


def test_a_manifest_under_two_spellings_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1, "text": "ONE"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="m.jsonl is given 3 times; give it once"):
        read_split([tmp_path / name for name in ("m.jsonl", "../" + tmp_path.name + "/m.jsonl", "link.jsonl")])
