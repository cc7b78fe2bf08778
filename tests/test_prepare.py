"""Preparing manifests from corpus folders, with small corpora and many kinds of broken files."""

import contextlib
import csv
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from speechbrain.dataio.dataio import load_data_csv, read_audio
from speechbrain.utils.distributed import run_on_main

from recipes.LibriSpeech import prepare
from recipes.LibriSpeech.prepare import normalise, prepare_librispeech
from speechbrain_ext.dataio import preparation
from speechbrain_ext.dataio.audio import AudioError, check_audio, load_audio

FORMATS = {
    ".flac": {"format": "FLAC"},
    ".wav": {"format": "WAV"},
    ".opus": {"format": "OGG", "subtype": "OPUS"},
    ".ogg": {"format": "OGG", "subtype": "VORBIS"},
    ".mp3": {"format": "MP3"},
}
SUFFIXES = list(FORMATS)


def write_audio(path, seconds=1.0, rate=16000, channels=1, seed=0, suffix=None, **options):
    """Coloured noise: no codec makes empty packets of it, so every part of a file matters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
    samples = 0.1 * (noise + np.roll(noise, 1, axis=0))
    soundfile.write(path, samples, rate, **(FORMATS[suffix or path.suffix.lower()] | options))
    return path


class Corpus:
    """A corpus in LibriSpeech layout; tests break single files."""

    def __init__(self, root, counts, suffix=".flac"):
        self.root = root
        for s, (split, count) in enumerate(counts.items(), start=1):
            for u in range(count):
                speaker = f"{s}0{u % 2}-{u % 2 + 1}"
                name = f"{speaker}-{u:04d}"
                path = self.path(split, name, suffix)
                if u < 2:
                    write_audio(path, seed=u)
                else:
                    shutil.copy(self.path(split, f"{speaker}-{u % 2:04d}", suffix), path)
                with self.transcripts(split, name).open("a") as file:
                    file.write(f"{name} THE SENTENCE {chr(65 + u % 26)}\n")

    def folder(self, split, name):
        speaker, chapter, _ = name.split("-")
        return self.root / split / speaker / chapter

    def path(self, split, name, suffix=".flac"):
        return self.folder(split, name) / f"{name}{suffix}"

    def transcripts(self, split, name):
        return self.folder(split, name) / f"{name.rsplit('-', 1)[0]}.trans.txt"

    def edit(self, split, name, old, new):
        file = self.transcripts(split, name)
        data = file.read_bytes()
        assert old in data
        file.write_bytes(data.replace(old, new))


@pytest.fixture
def corpus(tmp_path):
    """Sixty training utterances; three of them may be skipped."""
    return Corpus(tmp_path / "corpus", {"train-a": 60, "dev-a": 4, "test-a": 4})


@pytest.fixture
def small(tmp_path):
    return Corpus(tmp_path / "corpus", {"train-a": 4})


@pytest.fixture
def save(tmp_path):
    return tmp_path / "save"


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ids(save, split="train-a"):
    return [row["ID"] for row in read_csv(save / f"{split}.csv")]


def skipped(save):
    """{id: reason} of skipped utterances."""
    return {row["ID"]: row["reason"] for row in read_csv(save / "skipped.csv")}


def prepare_train(corpus, save, **options):
    prepare_librispeech(corpus.root, save, tr_splits=["train-a"], **options)


# -------------------- whole corpora


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_manifest(tmp_path, save, suffix):
    corpus = Corpus(tmp_path / "corpus", {"train-a": 3}, suffix)
    prepare_train(corpus, save)
    rows = read_csv(save / "train-a.csv")
    assert list(rows[0]) == ["ID", "duration", "wav", "spk_id", "wrd"]
    assert [row["ID"] for row in rows] == ["100-1-0000", "100-1-0002", "101-2-0001"]
    assert rows[0]["spk_id"] == "100-1"
    assert rows[0]["wrd"] == "THE SENTENCE A"
    assert rows[0]["wav"] == str(corpus.path("train-a", "100-1-0000", suffix))
    assert float(rows[0]["duration"]) == pytest.approx(1.0, abs=1e-6)
    assert read_csv(save / "skipped.csv") == []
    assert all(len(load_audio(row["wav"])) == round(16000 * float(row["duration"])) for row in rows)


def test_speechbrain_reads_the_manifest(corpus, save):
    prepare_librispeech(corpus.root, save, ["train-a"], ["dev-a"], ["test-a"])
    assert len(load_data_csv(save / "train-a.csv")) == 60
    assert load_data_csv(save / "test-a.csv")["300-1-0000"]["duration"] == 1.0


def test_arguments_are_speechbrains(small, save):
    """Positions and names are those of SpeechBrain's prepare_librispeech; split names may be YAML objects."""
    prepare_librispeech(str(small.root), str(save), ["train-a"], [], [], None, ["train-a"], "train.csv", False, False)
    assert (save / "train.csv").read_bytes() == (save / "train-a.csv").read_bytes()
    run_on_main(prepare_librispeech, kwargs={"data_folder": small.root, "save_folder": save, "te_splits": "train-a"})
    with pytest.raises(ValueError, match="create_lexicon"):
        prepare_train(small, save, create_lexicon=True)


def test_skip_prep_touches_nothing(tmp_path, save):
    prepare_librispeech(tmp_path / "nowhere", save, ["train-a"], skip_prep=True)
    assert not save.exists()


def test_relative_folders(small, save, monkeypatch):
    monkeypatch.chdir(small.root.parent)
    prepare_librispeech("corpus", "save", ["train-a"])
    assert all(os.path.isabs(row["wav"]) for row in read_csv(save / "train-a.csv"))


def test_order_is_that_of_the_paths(corpus, tmp_path):
    """The result does not depend on the order of files in the file system or of finished workers."""
    manifests = []
    for run in ("one", "two"):
        copy = tmp_path / run / "corpus"
        for path in sorted(corpus.root.rglob("*"), reverse=run == "two"):
            target = copy / path.relative_to(corpus.root)
            if path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        prepare_librispeech(copy, tmp_path / run / "save", ["train-a"])
        manifests.append((tmp_path / run / "save" / "train-a.csv").read_text().replace(str(copy), ""))
    assert manifests[0] == manifests[1]
    paths = re.findall(r"/train-a\S*?\.flac", manifests[0])
    assert len(paths) == 60 and paths == sorted(paths)


def test_merge(corpus, save):
    splits = ["train-a", "dev-a"]
    prepare_librispeech(corpus.root, save, splits, te_splits=["test-a"], merge_lst=splits, merge_name="train")
    assert ids(save, "train") == ids(save, "train-a") + ids(save, "dev-a")


def test_select_n_sentences(corpus, save):
    prepare_librispeech(corpus.root, save, ["train-a"], ["dev-a"], select_n_sentences=[5, 100])
    everything = sorted(path.stem for path in (corpus.root / "train-a").rglob("*.flac"))
    assert ids(save) == everything[:5]
    assert len(ids(save, "dev-a")) == 4
    corpus.path("train-a", everything[1]).write_bytes(b"")
    prepare_librispeech(corpus.root, save, ["train-a"], select_n_sentences=5)
    assert ids(save) == [everything[0], *everything[2:6]]
    assert skipped(save) == {everything[1]: "empty"}


def test_one_split_for_two_purposes(small, save):
    prepare_librispeech(small.root, save, ["train-a"], ["train-a"], ["train-a"])
    assert len(ids(save)) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "No split is given"),
        ({"tr_splits": ["../train-a"]}, "'../train-a' is not the name of a split"),
        ({"tr_splits": ["train-a"], "merge_lst": ["train-b"], "merge_name": "train.csv"}, "merge_lst has train-b"),
        ({"tr_splits": ["train-a"], "merge_lst": ["train-a"]}, "merge_lst needs merge_name"),
        ({"tr_splits": ["train-a"], "merge_lst": ["train-a"], "merge_name": "a/b.csv"}, "merge_lst needs merge_name"),
        ({"tr_splits": ["train-a"], "merge_lst": ["train-a"], "merge_name": "skipped.csv"}, "choose another"),
        ({"tr_splits": ["train-a"], "select_n_sentences": [1, 2]}, "for each of the 1 splits"),
        ({"tr_splits": ["train-a"], "select_n_sentences": [0]}, "one number above 0"),
        ({"tr_splits": ["train-a"], "max_skipped": 5}, "max_skipped is 5; give a share of a split"),
    ],
)
def test_arguments_that_make_no_sense(small, save, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_librispeech(small.root, save, **options)


# -------------------- the corpus folder


def test_one_level_off(corpus, save, tmp_path):
    for folder in (tmp_path, corpus.root / "train-a"):
        prepare_librispeech(folder, save, ["train-a"], ["dev-a"])
        assert read_csv(save / "dev-a.csv")[0]["wav"].startswith(f"{corpus.root}/")


def test_one_level_off_but_ambiguous(small, save, tmp_path):
    shutil.copytree(small.root, tmp_path / "another")
    with pytest.raises(FileNotFoundError, match="none named train-a; the folders in it are: another, corpus"):
        prepare_librispeech(tmp_path, save, ["train-a"])


def test_absent_split(corpus, save):
    with pytest.raises(FileNotFoundError, match="none named test-b; the folders in it are: dev-a, test-a, train-a"):
        prepare_librispeech(corpus.root, save, ["train-a"], te_splits=["test-b"])
    assert not list(save.glob("*.csv"))


@pytest.mark.parametrize("folder", ["nowhere", "a-file", "", None])
def test_absent_data_folder(tmp_path, save, folder):
    (tmp_path / "a-file").touch()
    with pytest.raises(FileNotFoundError, match="is not a folder; give the folder that holds train-a"):
        prepare_librispeech(folder and tmp_path / folder, save, ["train-a"])


def test_empty_folders(tmp_path, save):
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(FileNotFoundError, match="none named train-a; the folders in it are: none"):
        prepare_librispeech(data, save, ["train-a"])
    (data / "train-a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no audio file \(.flac.*train-a; the files in it are: none"):
        prepare_librispeech(data, save, ["train-a"])
    for name in ("a.m4a", "b.m4a", "x.trans.txt"):
        (data / "train-a" / name).write_text("1-2-3 A\n")
    with pytest.raises(FileNotFoundError, match="no audio file .*: 2 x .m4a, 1 x .txt"):
        prepare_librispeech(data, save, ["train-a"])


def test_no_transcripts_at_all(small, save):
    for file in small.root.rglob("*.trans.txt"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no transcript \(\*.trans.txt\) .*: 4 x .flac"):
        prepare_train(small, save)


def test_odd_paths(tmp_path, save):
    corpus = Corpus(tmp_path / "Größe ½, my corpus" / "日本語, \"q\" 'x'", {"train-a": 3})
    save = save / "with blank, ü"
    prepare_train(corpus, save)
    data = load_data_csv(save / "train-a.csv")
    assert all(len(load_audio(row["wav"])) == 16000 for row in data.values()) and len(data) == 3


def test_path_that_a_manifest_cannot_hold(tmp_path, save):
    """SpeechBrain replaces $words in manifests, and fails on unknown ones."""
    corpus = Corpus(tmp_path / "$HOME", {"train-a": 2})
    with pytest.raises(RuntimeError, match=r"\$ in path or transcript"):
        prepare_train(corpus, save)


def test_hidden_and_foreign_files_do_not_count(small, save):
    folder = small.folder("train-a", "100-1-0000")
    for name in (".DS_Store", "._100-1-0000.flac", "._100-1.trans.txt", "README", "notes.txt", "100-1-0000.json"):
        (folder / name).write_bytes(b"\xff\0 nothing")
    (folder / ".cache").mkdir()
    shutil.copy(small.path("train-a", "100-1-0000"), folder / ".cache")
    prepare_train(small, save)
    assert len(ids(save)) == 4 and not skipped(save)


def test_upper_case_suffixes(small, save):
    for path in [*small.root.rglob("*.flac"), *small.root.rglob("*.txt")]:
        path.rename(path.with_name(path.name.replace(".flac", ".FLAC").replace(".trans.txt", ".TRANS.TXT")))
    prepare_train(small, save)
    assert len(ids(save)) == 4


def test_links(corpus, save, tmp_path):
    """A split, a speaker or a file may be a link; a link to a parent does not cause a loop."""
    moved = tmp_path / "elsewhere"
    (corpus.root / "train-a").rename(moved)
    (corpus.root / "train-a").symlink_to(moved)
    (moved / "101").rename(tmp_path / "speaker")
    (moved / "101").symlink_to(tmp_path / "speaker")
    (moved / "100" / "loop").symlink_to(moved)
    (moved / "100" / "1" / "100-1-0000.flac").rename(tmp_path / "file.flac")
    (moved / "100" / "1" / "100-1-0000.flac").symlink_to(tmp_path / "file.flac")
    (moved / "100" / "1" / "100-1-0002.flac").unlink()
    (moved / "100" / "1" / "100-1-0002.flac").symlink_to(tmp_path / "gone")
    prepare_train(corpus, save)
    assert len(ids(save)) == 59 and skipped(save) == {"100-1-0002": "missing"}
    assert read_csv(save / "train-a.csv")[0]["wav"] == str(corpus.path("train-a", "100-1-0000"))


# -------------------- transcripts


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda data, line: data.replace(line, b""), "no transcript"),
        (lambda data, line: data.replace(line, b"100-1-0002\n"), "empty transcript"),
        (lambda data, line: data.replace(line, b"100-1-0002 \t \r\n"), "empty transcript"),
        (lambda data, line: data + b"100-1-0002 SOMETHING ELSE\n", "two different transcripts"),
        (lambda data, line: data + b"100-1-0002 ELSE\n100-1-0002 ELSE\n", "two different transcripts"),
        (lambda data, line: data.replace(line, b"100-1-0002 CAF\xc9\n"), "transcript not UTF-8"),
        (lambda data, line: data.replace(line, b"100-1-0002 COSTS $FIVE\n"), "$ in path or transcript"),
    ],
)
def test_bad_transcript(corpus, save, change, reason):
    file = corpus.transcripts("train-a", "100-1-0002")
    line = next(line for line in file.read_bytes().splitlines(True) if line.startswith(b"100-1-0002"))
    file.write_bytes(change(file.read_bytes(), line))
    prepare_train(corpus, save)
    assert skipped(save) == {"100-1-0002": reason}
    assert len(ids(save)) == 59 and "100-1-0002" not in ids(save)


def test_the_case_of_transcripts_is_a_choice(small, save):
    small.edit("train-a", "100-1-0000", b"THE SENTENCE A", "Don’t say „Größe“!".encode())
    for case, text in {"upper": "DON'T SAY „GRÖSSE“!", "lower": "don't say „größe“!", "none": "Don't say „Größe“!"}.items():
        prepare_train(small, save, text_normalization=case)
        assert read_csv(save / "train-a.csv")[0]["wrd"] == text
    with pytest.raises(ValueError, match="text_normalization is 'title'; give none, upper or lower"):
        prepare_train(small, save, text_normalization="title")


def test_transcript_without_audio(corpus, save):
    corpus.path("train-a", "101-2-0001").unlink()
    prepare_train(corpus, save)
    row = read_csv(save / "skipped.csv")[0]
    assert (row["split"], row["ID"], row["reason"]) == ("train-a", "101-2-0001", "transcript without audio")
    assert row["file"] == str(corpus.transcripts("train-a", "101-2-0001"))


def test_transcript_file_in_utf16(corpus, save):
    """As saved by a Windows editor: every line is wrong, and every utterance is named."""
    for mark in (b"\xff\xfe", b""):
        shutil.rmtree(save, ignore_errors=True)
        file = corpus.transcripts("dev-a", "200-1-0000")
        text = file.read_bytes().replace(b"\0", b"").removeprefix(b"\xff\xfe").decode()
        file.write_bytes(mark + text.encode("utf-16-le"))
        with pytest.raises(RuntimeError, match=r"2 of 4 utterances in dev-a .* 'transcript not UTF-8' \(2\)"):
            prepare_librispeech(corpus.root, save, dev_splits=["dev-a"])
        assert set(skipped(save)) == {"200-1-0000", "200-1-0002"}


def test_harmless_oddities_of_transcripts(small, save):
    first, second = "100-1-0000", "100-1-0002"
    text = f'\ufeff{first}\tdon’t  stop\t NOW \r\n\r\n{second}   naïve, "quoted"\r\n{first} DON\'T STOP NOW\n\n  \n\f\n'
    small.transcripts("train-a", first).write_bytes(text.encode())
    prepare_train(small, save)
    words = {name: row["wrd"] for name, row in load_data_csv(save / "train-a.csv").items()}
    assert words[first] == "DON'T STOP NOW"
    assert words[second] == 'NAÏVE, "QUOTED"'
    assert not skipped(save)


def test_odd_characters_are_reported(small, save, caplog):
    caplog.set_level(logging.WARNING)  # an earlier training run in this process may have set another level
    prepare_train(small, save)
    assert not caplog.text
    small.edit("train-a", "100-1-0000", b"0000 THE", "0000 ÇA 4".encode())
    prepare_train(small, save)
    assert "train-a: transcripts hold characters other than A-Z and ' (number of transcripts): " in caplog.text
    assert "Ç (1)" in caplog.text and "4 (1)" in caplog.text


def test_normalise():
    assert normalise("straße") == "STRASSE"
    assert normalise("e\u0301") == "É"
    assert normalise("\u00a0a\u2003b\u00a0") == "A B"


# -------------------- names and doubles


@pytest.mark.parametrize("name", ["song", "100-0002", "100-1-2-0002", "100_1_0002", "100-1-", "100 -1-2"])
def test_bad_file_name(corpus, save, name):
    folder = corpus.folder("train-a", "100-1-0000")
    shutil.copy(corpus.path("train-a", "100-1-0000"), folder / f"{name}.flac")
    with corpus.transcripts("train-a", "100-1-0000").open("a") as file:
        file.write(f"{name} A NAME\n")
    prepare_train(corpus, save)
    assert skipped(save)[name] == "file name not <speaker>-<chapter>-<utterance>"
    assert len(ids(save)) == 60


def test_letters_in_ids_are_fine(tmp_path, save):
    write_audio(tmp_path / "corpus/train-a/f01/ch_2/f01-ch_2-007b.flac")
    (tmp_path / "corpus/train-a/f01/ch_2/f01-ch_2.trans.txt").write_text("f01-ch_2-007b HELLO\n")
    prepare_librispeech(tmp_path / "corpus", save, ["train-a"])
    assert ids(save) == ["f01-ch_2-007b"]


@pytest.mark.skipif(sys.platform != "linux", reason="only here may file names be any bytes")
def test_file_name_that_is_not_utf8(corpus, save):
    folder = corpus.folder("train-a", "100-1-0000")
    shutil.copy(corpus.path("train-a", "100-1-0000"), os.fsencode(folder) + b"/100-1-\xff\xfe.flac")
    prepare_train(corpus, save)
    assert list(skipped(save).values()) == ["file name not UTF-8"]
    prepare_train(corpus, save)


def test_duplicate_id_within_a_split(corpus, save):
    """The same id in another format and in another folder: the first path is used, the others are named."""
    first = corpus.path("train-a", "100-1-0000")
    write_audio(first.with_suffix(".wav"))
    shutil.copy(first, corpus.folder("train-a", "101-2-0001"))
    prepare_train(corpus, save)
    rows = read_csv(save / "skipped.csv")
    assert len(rows) == 2
    for row in rows:
        assert (row["ID"], row["reason"], row["detail"]) == ("100-1-0000", "duplicate id", f"same as {first}")
    assert ids(save).count("100-1-0000") == 1 and len(ids(save)) == 60


def test_duplicate_id_across_splits_stays_in_the_test_split(corpus, save):
    name = "300-1-0000"
    folder = corpus.folder("train-a", name)
    shutil.copytree(corpus.folder("test-a", name), folder)
    (folder / "300-1-0002.flac").unlink()
    corpus.edit("train-a", name, b"300-1-0002 THE SENTENCE C\n", b"")
    prepare_librispeech(corpus.root, save, ["train-a"], ["dev-a"], ["test-a"])
    assert name in ids(save, "test-a") and name not in ids(save)
    row = read_csv(save / "skipped.csv")[0]
    assert (row["split"], row["reason"], row["file"]) == ("train-a", "duplicate id", str(folder / f"{name}.flac"))


# -------------------- broken audio


def truncate(path, part=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def overwrite_middle(path, byte):
    data = path.read_bytes()
    middle, gap = len(data) // 2, len(data) // 8
    path.write_bytes(data[:middle] + byte * gap + data[middle + gap :])


def overstate_wav(path, size=400000):
    """The header states more samples than were written."""
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", size)
    path.write_bytes(data)


BREAKAGES = {
    "empty": ("empty", SUFFIXES, lambda path: path.write_bytes(b"")),
    "no samples": ("empty", [".wav", ".flac"], lambda path: write_audio(path, 0)),
    "no audio": ("unreadable", SUFFIXES, lambda path: path.write_text("<html>404 Not Found</html>" * 99)),
    "half": ("truncated or damaged", SUFFIXES, truncate),
    "last byte": ("truncated or damaged", SUFFIXES, lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "header only": ("truncated or damaged", [".wav"], lambda path: path.write_bytes(path.read_bytes()[:44])),
    "half a header": ("truncated or damaged", [".wav"], lambda path: path.write_bytes(path.read_bytes()[:30])),
    "overstated": ("truncated or damaged", [".wav"], overstate_wav),
    "zeros": ("truncated or damaged", [".flac", ".opus", ".ogg"], lambda path: overwrite_middle(path, b"\0")),
    "hole": ("truncated or damaged", SUFFIXES, lambda path: overwrite_middle(path, b"")),
    "too short": ("shorter than 0.1 s", [".wav", ".flac"], lambda path: write_audio(path, 0.09)),
    "one sample": ("shorter than 0.1 s", [".wav", ".flac"], lambda path: write_audio(path, 1 / 16000)),
}


BROKEN = [(breakage, suffix) for breakage, (_, suffixes, _) in BREAKAGES.items() for suffix in suffixes]


@pytest.mark.parametrize("breakage, suffix", BROKEN)
def test_broken_audio_is_skipped_and_named(tmp_path, save, breakage, suffix):
    reason, _, damage = BREAKAGES[breakage]
    corpus = Corpus(tmp_path / "corpus", {"train-a": 4}, suffix)
    path = corpus.path("train-a", "101-2-0001", suffix)
    damage(path)
    prepare_train(corpus, save)
    [row] = read_csv(save / "skipped.csv")
    assert (row["split"], row["ID"], row["file"], row["reason"]) == ("train-a", "101-2-0001", str(path), reason)
    assert ids(save) == ["100-1-0000", "100-1-0002", "101-2-0003"]
    with pytest.raises(AudioError) if "short" not in reason else contextlib.nullcontext():
        load_audio(path)


def test_nan_samples(corpus, save):
    path = corpus.path("train-a", "100-1-0000")
    path.unlink()
    samples = np.zeros(16000, "float32")
    samples[777] = np.nan
    soundfile.write(path.with_suffix(".wav"), samples, 16000, subtype="FLOAT")
    prepare_train(corpus, save)
    assert skipped(save) == {"100-1-0000": "NaN samples"}


def test_other_rates_and_channels_are_accepted(small, save, caplog):
    caplog.set_level(logging.INFO)
    path = small.path("train-a", "100-1-0000")
    write_audio(path, 1.5, rate=44100, channels=2)
    prepare_train(small, save)
    row = read_csv(save / "train-a.csv")[0]
    assert float(row["duration"]) == 1.5 and len(load_audio(row["wav"])) == 24000
    assert "1 files have 44100 Hz; they are resampled when read" in caplog.text
    assert "1 files have several channels" in caplog.text


# -------------------- too many skipped utterances


def test_summary_by_reason(corpus, save, caplog):
    truncate(corpus.path("train-a", "100-1-0000"))
    truncate(corpus.path("train-a", "100-1-0002"))
    corpus.path("train-a", "101-2-0001").write_bytes(b"")
    prepare_train(corpus, save)
    assert f"train-a: 3 of 60 utterances skipped: 2 truncated or damaged, 1 empty; listed in {save}" in caplog.text


def test_too_many_skips_stop_the_run(corpus, save):
    for u in (0, 2, 4):
        truncate(corpus.path("train-a", f"100-1-{u:04d}"))
    corpus.path("train-a", "101-2-0001").write_bytes(b"")
    with pytest.raises(RuntimeError) as error:
        prepare_librispeech(corpus.root, save, ["train-a"], te_splits=["test-a"])
    assert str(error.value) == (
        "4 of 60 utterances in train-a cannot be used, more than the allowed 5%, most often because of 'truncated or "
        f"damaged' (3); they are listed in {save}/skipped.csv: fix the corpus, or raise max_skipped."
    )
    assert len(skipped(save)) == 4
    assert not list(save.glob("t*.csv")) and not (save / "prepared.json").exists()
    prepare_train(corpus, save, max_skipped=0.1)
    assert len(ids(save)) == 56
    corpus.path("train-a", "100-1-0006").write_bytes(b"")
    with pytest.raises(RuntimeError, match="more than the allowed 0%"):
        prepare_train(corpus, save, max_skipped=0)


def test_audio_without_transcripts_and_the_reverse_stop_the_run(corpus, save):
    for path in (corpus.root / "dev-a").rglob("*.flac"):
        path.rename(path.with_name(path.name.replace("-", "-9", 1)))
    with pytest.raises(RuntimeError, match="8 of 8 utterances in dev-a"):
        prepare_librispeech(corpus.root, save, dev_splits=["dev-a"])
    assert sorted(set(skipped(save).values())) == ["no transcript", "transcript without audio"]


def test_a_split_with_nothing_left_stops_the_run(tmp_path, save):
    corpus = Corpus(tmp_path / "corpus", {"train-a": 1})
    corpus.path("train-a", "100-1-0000").write_bytes(b"")
    with pytest.raises(RuntimeError, match="1 of 1 utterances"):
        prepare_train(corpus, save, max_skipped=1)


# -------------------- again, interrupted, in parallel


@pytest.fixture
def checked(monkeypatch):
    """Count the checked files, in this process instead of workers."""
    seen = []

    def count(check, paths, **options):
        seen.extend(paths)
        return map(check, paths)

    monkeypatch.setattr(preparation, "parallel_map", count)
    return seen


def test_a_second_call_does_nothing(corpus, save, checked):
    options = {"merge_lst": ["train-a"], "merge_name": "train.csv"}
    prepare_train(corpus, save, **options)
    assert len(checked) == 60
    before = {path: path.stat().st_mtime_ns for path in save.iterdir()}
    prepare_train(corpus, save, **options)
    assert len(checked) == 60
    assert {path: path.stat().st_mtime_ns for path in save.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda corpus, save: (save / "train-a.csv").unlink(),
        lambda corpus, save: truncate(save / "train-a.csv"),
        lambda corpus, save: (save / "skipped.csv").unlink(),
        lambda corpus, save: (save / "prepared.json").unlink(),
        lambda corpus, save: truncate(save / "prepared.json"),
        lambda corpus, save: (save / "prepared.json").write_text("[]"),
        lambda corpus, save: (save / "prepared.json").write_text(json.dumps({"manifests": {}})),
        lambda corpus, save: write_audio(corpus.path("train-a", "100-1-0000"), 2.0),
        lambda corpus, save: os.utime(corpus.path("train-a", "100-1-0000"), (1, 1)),
        lambda corpus, save: corpus.edit("train-a", "100-1-0000", b"SENTENCE", b"WORDS"),
        lambda corpus, save: corpus.path("train-a", "100-1-0000").unlink(),
    ],
)
def test_a_change_starts_over(small, save, checked, change):
    prepare_train(small, save)
    checked.clear()
    change(small, save)
    prepare_train(small, save)
    assert len(checked) == len(ids(save)) >= 3
    checked.clear()
    prepare_train(small, save)
    assert not checked


@pytest.mark.parametrize(
    "options",
    [
        {"select_n_sentences": [2]},
        {"max_skipped": 0.5},
        {"text_normalization": "none"},
        {"dev_splits": ["dev-a"]},
        {"merge_lst": ["train-a"], "merge_name": "b"},
    ],
)
def test_other_arguments_start_over(corpus, save, checked, options):
    prepare_train(corpus, save)
    checked.clear()
    prepare_train(corpus, save, **options)
    assert checked


def test_another_corpus_starts_over(small, save, tmp_path):
    prepare_train(small, save)
    shutil.copytree(small.root, tmp_path / "copy" / "corpus")  # with the times of the files
    prepare_librispeech(tmp_path / "copy" / "corpus", save, ["train-a"])
    assert read_csv(save / "train-a.csv")[0]["wav"].startswith(str(tmp_path / "copy"))


@pytest.mark.parametrize("at", range(1, 6))
def test_interrupted_while_writing(corpus, save, monkeypatch, at):
    """After an interruption at any file: existing files are complete, and the next call starts again."""
    arguments = (corpus.root, save, ["train-a"], ["dev-a"])
    prepare_librispeech(*arguments)
    expected = {path.name: path.read_bytes() for path in save.iterdir()}
    corpus.path("train-a", "100-1-0000").touch()

    calls, replace = [], os.replace

    def interrupt(source, target):
        calls.append(target)
        if len(calls) == at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_librispeech(*arguments)
    assert not (save / "prepared.json").exists()
    assert all(path.read_bytes() == expected[path.name] for path in save.iterdir())
    prepare_librispeech(*arguments)
    assert {path.name for path in save.iterdir()} == set(expected) and (save / "prepared.json").exists()


def test_killed_while_checking(corpus, save):
    """A killed process leaves no manifest on a first run."""
    code = (
        "import os\nfrom recipes.LibriSpeech import prepare\nfrom speechbrain_ext.dataio import preparation\n"
        "preparation.parallel_map = lambda *_, **__: os._exit(9)\n"
        f"prepare.prepare_librispeech({str(corpus.root)!r}, {str(save)!r}, ['train-a'])\n"
    )
    root = Path(prepare.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 9
    assert not list(save.iterdir())
    prepare_train(corpus, save)
    assert len(ids(save)) == 60


def die(path):
    os._exit(9)


def test_a_worker_that_dies_stops_the_run(small, save, monkeypatch):
    monkeypatch.setattr(preparation, "_check", die)
    with pytest.raises(BrokenProcessPool):
        prepare_train(small, save)
    assert not list(save.iterdir())


def test_progress_is_shown(small, save, capfd):
    prepare_train(small, save)
    assert "Checking train-a: 100%" in capfd.readouterr().err


# -------------------- load_audio


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_audio_reads_what_speechbrain_reads(tmp_path, suffix):
    path = write_audio(tmp_path / f"a{suffix}")
    wav = load_audio(path)
    assert wav.dtype == torch.float32 and wav.shape == (16000,) and wav.is_contiguous()
    torch.testing.assert_close(wav, read_audio(str(path)), atol=1e-6, rtol=0)
    assert check_audio(path).num_frames == 16000


def test_load_audio_averages_channels(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile([[0.5, -0.25]], (100, 1)), 16000, subtype="FLOAT")
    assert torch.equal(load_audio(tmp_path / "a.wav"), torch.full((100,), 0.125))


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_load_audio_resamples(tmp_path, rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "a.wav", tone, rate, subtype="FLOAT")
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    assert load_audio(tmp_path / "a.wav")[1000:-1000].sub(expected[1000:-1000]).abs().max() < 0.01


@pytest.mark.parametrize("damage", [b"TAG" + bytes(125), b"ID3\x03\0\0\0\0\x02\0" + bytes(256)], ids=["tag", "id3"])
@pytest.mark.parametrize("suffix", [".mp3", ".wav", ".flac"])
def test_tags_do_no_harm(tmp_path, suffix, damage):
    path = write_audio(tmp_path / f"a{suffix}")
    before = load_audio(path)
    if damage.startswith(b"TAG"):
        path.write_bytes(path.read_bytes() + damage)
    elif suffix == ".mp3":
        path.write_bytes(damage + path.read_bytes())
    assert torch.equal(load_audio(path), before)


def test_mp3_that_states_no_length(tmp_path):
    """Without a Xing header, libsndfile estimates the length from the size of the file with its tags."""
    path = write_audio(tmp_path / "a.mp3", bitrate_mode="CONSTANT")
    data = path.read_bytes()
    frames = data[data.index(data[:2], 10) :]  # the header is a separate frame
    path.write_bytes(b"ID3\x03\0\0\0\0\x40\0" + bytes(8192) + frames)
    assert soundfile.info(path).frames > 17000
    assert len(load_audio(path)) == check_audio(path).num_frames < 18500


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_wav_from_a_pipe(tmp_path, size):
    """ffmpeg, SoX and others do not know the size when they write to a pipe; the file is whole."""
    path = write_audio(tmp_path / "a.wav")
    before = load_audio(path)
    overstate_wav(path, size)
    assert torch.equal(load_audio(path), before)


def test_wav_with_other_chunks(tmp_path):
    """Chunks of odd size before the samples, and a truncated chunk after them: the samples are whole."""
    path = write_audio(tmp_path / "a.wav")
    data = path.read_bytes()
    path.write_bytes(data[:36] + b"LIST" + struct.pack("<I", 3001) + bytes(3002) + data[36:] + b"LIST\xff\0\0\0half")
    assert len(load_audio(path)) == 16000
    truncate(path, 0.9)
    with pytest.raises(AudioError, match="states 32000 bytes of samples and only"):
        load_audio(path)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "ULAW", "MS_ADPCM"])
def test_wav_subtypes(tmp_path, subtype):
    path = write_audio(tmp_path / "a.wav", 0.7001, suffix=".wav", subtype=subtype)
    assert len(load_audio(path)) >= 11201
    truncate(path)
    with pytest.raises(AudioError, match="truncated"):
        load_audio(path)


def test_big_endian_wav(tmp_path):
    path = write_audio(tmp_path / "a.wav", endian="BIG")
    assert path.read_bytes()[:4] == b"RIFX" and len(load_audio(path)) == 16000
    truncate(path)
    with pytest.raises(AudioError, match="truncated"):
        load_audio(path)


def test_ogg_without_a_page(tmp_path):
    """Without one page, all checksums are still right, and libsndfile reads the rest without an error."""
    path = write_audio(tmp_path / "a.opus", 5.0)
    pages = re.split(rb"(?=OggS\0)", path.read_bytes())[1:]
    assert len(pages) > 5
    path.write_bytes(b"".join(pages[:3] + pages[4:]))
    with pytest.raises(AudioError, match="pages are missing"):
        check_audio(path)
    path.write_bytes(b"".join(pages[:-1]))  # cut exactly between two pages
    with pytest.raises(AudioError, match="breaks off"):
        check_audio(path)
    path.write_bytes(b"".join(pages) + b"some tag")
    assert check_audio(path).duration == 5.0


def test_flac_of_unknown_length(tmp_path):
    path = write_audio(tmp_path / "a.flac")
    data = bytearray(path.read_bytes())
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])
    path.write_bytes(data)
    with pytest.raises(AudioError, match="does not state its length"):
        load_audio(path)


NO_AUDIO = "is not audio that soundfile can read, or its header is damaged; convert it to WAV or FLAC."


@pytest.mark.parametrize(
    "name, reason, message",
    [
        ("nowhere.wav", "missing", "There is no audio file {path}; check the path."),
        ("folder", "unreadable", "{path} is a folder, not an audio file; name a file in it."),
        ("empty.wav", "empty", "The audio file {path} is empty: it holds no samples."),
        ("text.wav", "unreadable", f"{{path}} {NO_AUDIO}"),
        ("samples.raw", "unreadable", f"{{path}} {NO_AUDIO}"),
        ("inf.wav", "NaN samples", "The audio file {path} holds NaN or infinite samples; write it again."),
    ],
)
@pytest.mark.parametrize("read", [load_audio, check_audio])
def test_errors_are_one_sentence_that_names_the_file(tmp_path, read, name, reason, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("I am no audio.\n" * 100)
    (tmp_path / "samples.raw").write_bytes(bytes(1000))
    soundfile.write(tmp_path / "inf.wav", np.full(100, np.inf), 16000, subtype="FLOAT")
    with pytest.raises(AudioError) as error:
        read(tmp_path / name)
    assert str(error.value) == message.format(path=tmp_path / name)
    assert error.value.reason == reason


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read any file")
def test_file_that_may_not_be_read(tmp_path):
    path = write_audio(tmp_path / "a.wav")
    path.chmod(0)
    with pytest.raises(AudioError, match="cannot be read: Permission denied"):
        load_audio(path)


# -------------------- real speech


def test_real_speech(real_english, save):
    splits = sorted(path.name for path in real_english.iterdir() if path.is_dir())
    train, dev, test = ([split for split in splits if split.startswith(kind)] for kind in ("train", "dev", "test"))
    files = len(list(real_english.rglob("*-*-*.*")))
    start = time.perf_counter()
    prepare_librispeech(real_english, save, train, dev, test)
    first = time.perf_counter() - start
    prepare_librispeech(real_english, save, train, dev, test)
    again = time.perf_counter() - start - first
    assert sum(len(ids(save, split)) for split in splits) == files and not skipped(save)
    assert again < 1 + first / 10
    assert files / first > 300  # also on a busy machine
