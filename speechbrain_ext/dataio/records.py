"""Read lines of manifests as columns and values, in the formats of :mod:`speechbrain_ext.dataio.manifests`."""

import csv
import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from speechbrain_ext.dataio.preparation import SLACK_SECONDS
from speechbrain_ext.dataio.saved_datasets import read_rows
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.files import files_inside
from speechbrain_ext.utils.text import is_utf8, listing

COLUMNS = {
    "ID": ("ID", "id", "key", "utt_id"),
    "wav": ("wav", "audio_filepath", "audio_filename", "file_path", "file_name", "path", "audio"),
    "spk_id": ("spk_id", "speaker", "speaker_id", "spk"),
    "wrd": ("wrd", "words", "text", "txt", "transcript", "transcription", "sentence", "text_filepath", "normalized_text"),
    "duration": ("duration", "length"),
}
"""Names of each column; the first one with a value counts, and for a transcript the first one with text. Further columns are
``channel``, counted from 0, and for a segment ``offset`` (seconds) with ``duration``, ``start`` and ``end`` (seconds), or
``start`` and ``stop`` (samples)."""
AUDIO_SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3", ".aiff", ".aif", ".au", ".caf", ".sph", ".w64")
"""Suffixes of audio files in tar files and in folders of LibriSpeech layout."""
LINE_END = re.compile("\r\n|\n|\r")
MOST_LINKS = 8
"""Links in a tar file that are followed one after the other."""
KALDI = ("wav.scp", "text", "segments", "utt2spk", "utt2dur")
FORMATS = (
    "SpeechBrain's CSV or JSON, JSON lines of NeMo or WeNet, cuts of lhotse, an uncompressed tar file of audio and texts, or a "
    "folder of Kaldi (wav.scp, text), LibriSpeech (.trans.txt) or Hugging Face (metadata.csv, metadata.jsonl, a saved dataset)"
)


class Record(NamedTuple):
    """A line of a manifest."""

    place: str
    """File and line, for messages."""
    values: dict
    """Values by column."""
    flaw: str = ""
    """Why the line cannot be used, in a few words; empty if it can."""
    detail: str = ""
    name: str = ""
    """Name of audio that lies inside an Arrow file."""


class Unusable(Exception):
    """A line that cannot be used: the kind of problem, and details."""

    def __init__(self, reason, detail=""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_records(path, files):
    """Read the lines of a manifest.

    Arguments
    ---------
    path : pathlib.Path
        An existing file or folder.
    files : list
        Receives all files that are read.

    Yields
    ------
    Record

    Raises
    ------
    UserError
        If the format is unknown, or the manifest is damaged or has shell commands instead of audio.
    UserImportError
        If the manifest needs a package that is not installed.
    """
    if path.is_dir():
        yield from _folder_records(path, files)
    elif path.is_file():
        yield from _file_records(path, files)
    else:
        raise UserError(f"The manifest {path} is a pipe or device, which cannot be read twice; write it to a file first.")


def read_transcript(values, base, files):
    """The transcript in the values of a record.

    Arguments
    ---------
    values : dict
        Values by column.
    base : str or os.PathLike
        The folder at which relative paths start.
    files : list
        Receives the file that is read if the transcript lies in one.

    Returns
    -------
    str
        It may be empty.

    Raises
    ------
    Unusable
        If there is no transcript, or it is not text in UTF-8.
    """
    given = [(name, values[name]) for name in COLUMNS["wrd"] if values.get(name) is not None]
    if not given:
        raise Unusable("no transcript")
    name, text = next(((name, value) for name, value in given if value and isinstance(value, str)), given[0])
    if not isinstance(text, str):
        raise Unusable("transcript is not text", f"{text!r:.60}")
    if name == "text_filepath":
        files.append(os.path.join(base, text))
        try:
            text = Path(files[-1]).read_text(encoding="utf-8-sig", errors="surrogateescape")
        except (OSError, ValueError) as error:
            raise Unusable("no transcript", one_line(error)) from error
    return check_utf8("transcript", text)


def check_utf8(field, text):
    """Return a text of a record.

    Raises
    ------
    Unusable
        If it is not UTF-8; zeros are those of UTF-16.
    """
    if not is_utf8(text) or "\0" in text:
        raise Unusable("not UTF-8", f"{field}: {text!r:.60}")
    return text


# -------------------- files


def _file_records(path, files):
    files.append(path)
    with open(path, "rb") as file:
        is_tar = _is_tar(file.read(512)) or path.suffix == ".tar"
    if is_tar:
        yield from _tar_records(path)
        return
    text = _read_text(path)
    lines = [line for line in LINE_END.split(text) if line.strip()]
    if not lines:
        return
    if lines[0].lstrip().startswith(("{", "[")):
        yield from _json_records(path, text)
        return
    columns = [column.strip() for column in next(csv.reader(lines[:1], skipinitialspace=True))]
    if any(column in names for column in columns for names in COLUMNS.values()):
        yield from _csv_records(path, text)
    elif all(line.strip().endswith(".tar") for line in lines):
        for line in lines:
            files.append(path.parent / line.strip())
            yield from _tar_records(files[-1])
    elif path.name in KALDI:
        raise UserError(f"{path} is one of the files of a Kaldi folder; give the folder.")
    else:
        raise UserError(f"{path} is not a known kind of manifest: it begins with {lines[0]!r:.60}; give {FORMATS}.")


def _is_tar(head):
    return head[257:262] == b"ustar"


def _read_text(path):
    """The text of a file; bytes that are not valid UTF-8 become surrogates."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"The manifest {path} cannot be decompressed ({one_line(error)}); write it again.") from error
        if _is_tar(data[:512]):
            raise UserError(f"{path} is a compressed tar file; decompress it.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:1024]:
        raise UserError(f"{path} is not text in UTF-8; give {FORMATS}.")
    return data.decode("utf-8-sig", "surrogateescape")


def _csv_records(path, text):
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    lines, read = LINE_END.split(text), 0
    try:
        columns = [column.strip() for column in next(row for row in reader if any(map(str.strip, row)))]
        if twice := [column for column, count in Counter(columns).items() if column and count > 1]:
            raise UserError(f"{path} has two columns {twice[0]}; rename one of them.")
        read = reader.line_num
        wav = next((index for index, column in enumerate(columns) if column in COLUMNS["wav"]), len(columns))
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            within, read = lines[read + 1 : reader.line_num], reader.line_num
            alone = [next(csv.reader([line], skipinitialspace=True), []) for line in within]
            if _suffix(row, wav) and any(_suffix(line, wav) == _suffix(row, wav) for line in alone):  # like utterances
                raise UserError(
                    f"{path}, line {read - len(within)}: a quotation mark begins a field that includes the next "
                    f"{len(within)} lines; close it, or double it if it is part of the text."
                )
            if len(row) == len(columns):
                yield Record(place, dict(zip(columns, row, strict=True)))
            elif len(row) > 1 or any(map(str.strip, row)):
                yield Record(place, {}, "wrong number of columns", f"{len(row)} instead of {len(columns)}")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is not valid CSV: {one_line(error)}; fix it.") from error


def _suffix(fields, index):
    return os.path.splitext(fields[index])[1] if index < len(fields) else ""


def _json_records(path, text):
    """An object of objects (SpeechBrain), an array of objects, or an object on each line."""
    try:
        tree = _load_json(text)
    except (ValueError, RecursionError) as error:
        failed, items = error, _json_lines(path, text)
    else:
        failed, tree = None, tree if isinstance(tree, list) else [tree] if tree else []
        if tree and isinstance(tree[0], tuple):
            items = ((f"{path}, {name}", {"ID": name} | dict(values)) for name, values in tree)
        else:
            items = ((f"{path}, item {number}", item) for number, item in enumerate(tree, start=1))
    for place, item in items:
        if isinstance(item, Exception):
            yield Record(place, {}, "not valid JSON", one_line(item))
            continue
        failed = None
        if not isinstance(item, dict):
            yield Record(place, {}, "not a JSON object", f"{item!r:.60}")
        elif {"supervisions", "recording"} & item.keys() or str(item.get("type", "")).endswith("Cut"):
            yield from _cut_records(place, item)
        else:
            yield Record(place, item)
    if failed:  # no line is valid by itself
        raise UserError(f"{path} is not valid JSON: {one_line(failed)}; fix it.")


def _json_lines(path, text):
    """Yield the place of each line, and its content or its error."""
    for number, line in enumerate(LINE_END.split(text), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", _load_json(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}, line {number}", error


def _load_json(text):
    """Parse JSON; an object of objects becomes a list of pairs, in which keys may repeat.

    Raises
    ------
    ValueError
        If the text is not JSON, or any other object has a key twice.
    """

    def as_pairs(pairs):
        if pairs and all(isinstance(value, dict) for _, value in pairs):
            return pairs
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"the key {twice[0]} occurs twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=as_pairs)


def _cut_records(place, cut):
    """Yield a record for each supervision of a lhotse cut."""
    nothing = {"ID": cut.get("id"), "wav": None, "wrd": None}
    try:
        kind = cut.get("type", "MonoCut")
        if kind != "MonoCut":
            raise Unusable(f"cut of type {kind}", "only a MonoCut is read")
        recording = cut.get("recording")
        if not recording:
            raise Unusable("cut without recording", "features without audio are not read")
        if any(transform["name"] != "Resample" for transform in recording.get("transforms") or ()):
            raise Unusable("recording with transforms", "save the transformed audio")
        channel = cut.get("channel", 0)
        source = next((source for source in recording["sources"] if channel in source["channels"]), None)
        if source is None:
            raise Unusable("no such channel", str(channel))
        if source["type"] != "file":
            raise Unusable(f"source of type {source['type']}", "only a file is read")
        if not cut.get("supervisions"):
            raise Unusable("no transcript", "the cut has no supervision")
        for said in cut["supervisions"]:
            start, end = said["start"], said["start"] + said["duration"]
            values = {"ID": said["id"], "wav": source["source"], "channel": source["channels"].index(channel)}
            values |= {"start": cut["start"] + start, "end": cut["start"] + end}
            values |= {"speaker": said.get("speaker"), "wrd": said.get("text")}
            inside = start > -SLACK_SECONDS and end < cut["duration"] + SLACK_SECONDS
            yield Record(place, values, *(() if inside else ("supervision outside of its cut", f"{start:g} to {end:g} s")))
    except Unusable as error:
        yield Record(place, nothing, error.reason, error.detail)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        yield Record(place, nothing, "incomplete cut", f"{type(error).__name__}: {one_line(error)}")


def _tar_records(path):
    """Yield the audio files of a tar file with their positions, and the content of the .txt or .json file of the same stem."""
    members, inner = {}, []
    try:
        with tarfile.open(path, "r:") as tar:
            by_name = {os.path.normpath(member.name): member for member in tar}
            for name, member in ((member.name, _target(by_name, member)) for member in tar.getmembers()):
                stem, suffix = os.path.splitext(name)
                if member is None or member.issparse() or os.path.basename(name).startswith("."):
                    continue
                found = members.setdefault(stem, {"audio": []})
                if suffix.lower() in AUDIO_SUFFIXES:
                    found["audio"].append(f"{path}?offset={member.offset_data}&size={member.size}")
                elif suffix in (".txt", ".json"):
                    found[suffix] = tar.extractfile(member).read().decode("utf-8-sig", "surrogateescape")
                elif suffix == ".tar":
                    inner.append(Record(f"{path}, {name}", {"ID": stem, "wav": None, "wrd": None}, "tar file inside a tar file"))
        _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as a tar file ({one_line(error)}); give a complete, uncompressed tar file."
        ) from error
    members = {stem: found for stem, found in members.items() if found["audio"] or len(found) > 1}
    names = Counter(os.path.basename(stem) for stem in members)
    for stem, found in members.items():
        name, audio, flaw = os.path.basename(stem), found["audio"], ()
        values = {"ID": name if names[name] == 1 else stem, "wav": audio[0] if audio else None, "wrd": found.get(".txt")}
        try:
            values |= {key: value for key, value in dict(_load_json(found.get(".json", "{}"))).items() if values.get(key) is None}
        except (ValueError, TypeError, RecursionError) as error:
            flaw = "not valid JSON", one_line(error)
        if len(audio) != 1:
            flaw = ("several audio files with one name",) if audio else ("transcript without audio",)
        yield Record(f"{path}, {stem}", values, *flaw)
    yield from inner


def _target(members, member):
    """The file that a member of a tar file is or links to; None if there is none."""
    for _ in range(MOST_LINKS):
        if member is None or not (member.islnk() or member.issym()):
            break
        inside = "" if member.islnk() else os.path.dirname(member.name)
        member = members.get(os.path.normpath(os.path.join(inside, member.linkname)))
    return member if member is not None and member.isfile() else None


def _check_end(path, offset):
    """Check that a tar file ends where tarfile stopped reading.

    tarfile stops without an error at damage between members, and between joined files. A file that was cut between two members
    has no end mark.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"at byte {offset} there is neither a member nor the end mark")
        while block := file.read(2**20):
            if block.count(0) < len(block):
                raise tarfile.ReadError(f"it continues after the end mark at byte {offset}")


# -------------------- folders


def _folder_records(path, files):
    names = {entry.name for entry in os.scandir(path)}
    metadata = [name for name in ("metadata.csv", "metadata.jsonl") if name in names]
    if "wav.scp" in names:
        yield from _kaldi_records(path, files)
    elif metadata:
        yield from _file_records(path / metadata[0], files)
    elif "state.json" in names:
        yield from (Record(place, values, name=name) for place, values, name in read_rows(path, files))
    elif "dataset_dict.json" in names:
        raise UserError(f"{path} holds several saved datasets; give the folder of one of them.")
    elif any(file.endswith(".trans.txt") for file in files_inside(path)):
        yield from librispeech_records(path, files)
    else:
        raise UserError(f"{path} is not a known kind of manifest: this folder holds {listing(sorted(names))}; give {FORMATS}.")


def librispeech_records(folder, files):
    """Read a folder in LibriSpeech layout: the lines of all ``.trans.txt`` files inside, and all audio; it lies beside its line.

    Arguments
    ---------
    folder : pathlib.Path
        The folder of a split or of several splits.
    files : list
        Receives all files that are read.

    Yields
    ------
    Record
    """
    tables, audio, said = {}, {}, set()
    for path in map(Path, files_inside(folder)):
        if path.name.endswith(".trans.txt"):
            tables.setdefault(path.parent, []).append(path)
        elif path.suffix.lower() in AUDIO_SUFFIXES:
            audio.setdefault((path.parent, path.stem), []).append(str(path))
    for inside, paths in tables.items():
        rows, different = {}, set()
        for name, (text, place) in (row for path in paths for row in _table(path, files)):
            first, _ = rows.setdefault(name, (text, place))  # a repeated line is allowed
            if first != text and normal_form(first) != normal_form(text):
                different.add(name)
        for name, (text, place) in rows.items():
            said.add((inside, name))
            found, *others = audio.get((inside, name), (None,))
            values = {"ID": name, "wav": found, "speaker": name.partition("-")[0], "wrd": text}
            flaw = "transcript without audio" if found is None else "several audio files with one name" if others else None
            yield Record(place, values, *filter(None, ["two different transcripts" if name in different else flaw]))
    for place, paths in audio.items():
        if place not in said:
            yield Record(paths[0], {"ID": place[1], "wav": paths[0], "wrd": None}, "no transcript")


def _kaldi_records(folder, files):
    there = [name for name in KALDI if name in ("wav.scp", "text") or (folder / name).exists()]
    if missing := [name for name in there if not (folder / name).exists()]:
        raise UserError(f"The Kaldi folder {folder} has no file {missing[0]}; it needs wav.scp and text.")
    tables = {name: _table(folder / name, files) for name in there}
    for name, table in tables.items():
        first = {}
        for key, (value, place) in table:
            # Duplicate utterances are found later, with both lines in the message
            if first.setdefault(key, value) != value and name != ("segments" if "segments" in tables else "wav.scp"):
                raise UserError(f"{place}: an earlier line has another value for {key}; delete one of the two lines.")
    for name, (value, place) in tables["wav.scp"]:
        if value.endswith("|"):
            raise UserError(
                f"{place}: the audio of {name} is a shell command ({value:.60}), and commands are not run; write its output to a "
                "file, and give that file instead."
            )
    recordings, texts, speakers, durations = (dict(tables.get(name, ())) for name in ("wav.scp", "text", "utt2spk", "utt2dur"))
    segments = tables.get("segments")
    lines = segments or [(name, (name, place)) for name, (_, place) in tables["wav.scp"]]
    for name, (line, place) in lines:
        recording, *span = (line.split() or [""]) if segments else [line]
        values = {"ID": name, "wav": recordings.get(recording, [None])[0], "wrd": texts.get(name, [None])[0]}
        values |= {"speaker": speakers.get(name, [None])[0], "duration": durations.get(name, [None])[0]}
        flaw = ()
        if segments and len(span) != 2:
            flaw = "wrong number of columns", "the four columns are id, recording, start and end"
        elif values["wav"] is None:
            flaw = "no audio path", f"wav.scp has no {recording}"
        elif segments:
            values |= {"start": span[0], "end": None if re.fullmatch(r"-1(\.0*)?", span[1]) else span[1]}
        yield Record(place, values, *flaw)
    given = {name for name, _ in lines}
    for name, (text, place) in tables["text"]:
        if name not in given:
            yield Record(place, {"ID": name, "wav": None, "wrd": text}, "transcript without audio")


def _table(path, files):
    """The first word of each line, with the rest of the line and the place."""
    files.append(path)
    rows = []
    for number, line in enumerate(LINE_END.split(_read_text(path)), start=1):
        first, *rest = re.split(r"[ \t]+", line.strip(" \t"), maxsplit=1)
        if first:
            rows.append((first, ("".join(rest), f"{path}, line {number}")))
    return rows
