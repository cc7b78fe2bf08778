"""Read manifests of several toolkits.

These formats are known:

* a table in CSV (SpeechBrain, Hugging Face ``metadata.csv``), JSON lines (NeMo, WeNet, Hugging Face ``metadata.jsonl``) or JSON
  (SpeechBrain), with the columns of these toolkits, see :data:`COLUMNS`;
* cuts of lhotse, in JSON lines or JSON;
* a folder of Kaldi: ``wav.scp`` and ``text``, and optionally ``segments``, ``utt2spk`` and ``utt2dur``;
* a folder in LibriSpeech layout, with ``.trans.txt`` files anywhere inside and the audio beside them;
* a folder of Hugging Face: ``metadata.csv`` or ``metadata.jsonl``, or the output of ``save_to_disk``, which needs pyarrow;
* an uncompressed tar file with an audio file and a ``.txt`` or ``.json`` file of the same stem for each utterance; or a list of
  such tar files, one per line.

The format is recognised by content. Text files may be compressed with gzip. Relative paths start at the manifest.
"""

import contextlib
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from speechbrain_ext.dataio.preparation import Skipped, Utterance
from speechbrain_ext.dataio.records import COLUMNS, Unusable, check_utf8, read_records, read_transcript
from speechbrain_ext.dataio.text import normal_form, words_only
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.text import listing

ROUNDED = 0.1
"""Seconds by which two statements of one time may differ."""
OTHER_TIMES = (("start_time", "end_time", 1), ("begin_time", "end_time", 1), ("start_ms", "end_ms", 1000))
"""Names of times, with parts of a second. They are not read as a segment, because audio beside them is often cut already."""
NO_PATHS = (
    (r"[a-zA-Z][\w+.-]*://", "address instead of a path", "give a file on this machine by its path"),
    (r"~", "path with ~", "write the folder that it stands for"),
    (r".*:\d+$", "offset into an archive", "write the audio to files"),
)
"""Patterns of what other tools read as audio: the pattern, the reason to leave it out, the remedy."""


class Entry(NamedTuple):
    """An utterance of a manifest."""

    utterance: Utterance
    place: str
    """File and line, for messages."""
    given: bool = True
    """Whether the manifest states the id; if not, the id is made from the path."""
    flaw: str = ""
    """Why the utterance cannot be used; empty if it can."""
    detail: str = ""


def read_entries(path, data_folder=None):
    """Read a manifest.

    Arguments
    ---------
    path : str or os.PathLike
        A file or folder in one of the formats above.
    data_folder : str, optional
        The folder that replaces a placeholder at the beginning of a path, such as ``$data_root``.

    Returns
    -------
    entries : list of Entry
        In the order of the manifest; ids are not yet checked for duplicates.
    files : list of str
        All files that were read.

    Raises
    ------
    FileNotFoundError
        If the manifest is missing.
    UserError
        If its format is unknown, if it is damaged or empty, if it has shell commands instead of audio, or if it needs a
        ``data_folder``.
    UserImportError
        If it needs a package that is not installed.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train.jsonl"
    >>> _ = path.write_text('{"audio_filepath": "wav/a.wav", "duration": 3.2, "text": "The text"}')
    >>> (entry,), _ = read_entries(path)
    >>> entry.utterance.ID, entry.utterance.wrd, os.path.relpath(entry.utterance.wav, path.parent)
    ('a', 'The text', 'wav/a.wav')
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"There is no manifest {path}; check the path.")
    base = path if path.is_dir() else path.parent
    files, columns, names, entries = [], {}, [], []
    for record in read_records(path, files):
        columns |= dict.fromkeys(record.values)
        names.append(record.name)
        entries.append(_entry(record, base, data_folder, files))
    if not entries:
        raise UserError(f"The manifest {path} holds no utterances; give another one.")
    for field in ("wav", "wrd"):
        if columns and columns.keys().isdisjoint(COLUMNS[field]):
            raise UserError(
                f"{path} has no column {field}, nor any of {', '.join(COLUMNS[field][1:])}; rename one of its columns: "
                f"{listing(columns)}."
            )
    return _with_ids(entries, names), list(map(str, files))


def manifest_name(path):
    """The name of a file without its suffixes, or the name of a folder."""
    name = Path(path).name
    return name if os.path.isdir(path) else os.path.splitext(name.removesuffix(".gz"))[0]


def as_paths(given):
    """Paths as a list of texts; a single path may be given without a list.

    Example
    -------
    >>> as_paths("a.csv"), as_paths(["a.csv", "b.csv"]), as_paths(None)
    (['a.csv'], ['a.csv', 'b.csv'], [])
    """
    if given is None:
        return []
    # YAML reads a folder's name such as 2024 as a number.
    return [str(path) for path in (given if isinstance(given, list | tuple) else [given])]


def named_manifests(given):
    """Paths of manifests by name.

    Arguments
    ---------
    given : str, os.PathLike, or list of them
        ``name=path``, or a path; then the name is that of the file.

    Returns
    -------
    dict

    Raises
    ------
    UserError
        If a manifest has no name, or two have the same name.

    Example
    -------
    >>> named_manifests(["near=my/near.jsonl", "my/far.jsonl.gz"])
    {'near': 'my/near.jsonl', 'far': 'my/far.jsonl.gz'}
    """
    named = {}
    for each in as_paths(given):
        name, equals, path = each.partition("=")
        if not equals or "/" in name or os.path.exists(each):
            name, path = manifest_name(each), each
        if not name or name.startswith(".") or not path or name in named:
            raise UserError(f"The test manifest '{each}' has no name, or the name of another one; give it as name=path.")
        named[name] = path
    return named


def select(split, entries, case, only_words=False):
    """Leave out utterances with a fault, without a transcript, or with an id that another one has.

    Arguments
    ---------
    split : str
        The name of the split.
    entries : list of Entry
    case : str
        Case of the transcripts: "none" (unchanged), "upper" or "lower".
    only_words : bool
        Whether to leave out punctuation and symbols, see :func:`speechbrain_ext.dataio.text.words_only`.

    Returns
    -------
    utterances : list of Utterance
        They have transcripts in normal form.
    skipped : list of Skipped
    """
    utterances, skipped, taken = [], [], {}
    for utterance, place, _, flaw, detail in entries:
        text = "" if flaw else normal_form(utterance.wrd, case)
        text = words_only(text) if only_words else text
        if not flaw and not text:
            flaw = "empty transcript"
        elif not flaw and utterance.ID in taken:
            flaw, detail = "duplicate id", f"same as {taken[utterance.ID]}"
        if flaw:
            skipped.append(Skipped(split, utterance.ID, place, flaw, detail))
        else:
            taken[utterance.ID] = place
            utterances.append(utterance._replace(wrd=text))
    return utterances, skipped


def _entry(record, base, data_folder, files):
    """The entry of a record; its id is empty if the record states none."""
    values = {
        field: next((record.values[name] for name in COLUMNS[field] if record.values.get(name) is not None), None)
        for field in ("ID", "wav", "spk_id")
    }
    if isinstance(values["wav"], dict):  # from SpeechBrain, with start and stop, or from Hugging Face
        record = record._replace(values=record.values | values["wav"])
        values["wav"] = values["wav"].get("file") or values["wav"].get("path")
    name = str(values["ID"]) if isinstance(values["ID"], str | int | float) else ""
    utterance, flaw, detail = Utterance(name, ""), record.flaw, record.detail
    if not flaw:
        try:
            wav = _audio_path(values["wav"], base, data_folder, record.place)
            speaker = str(values["spk_id"]) if values["spk_id"] not in (None, "") else "unknown"
            text = read_transcript(record.values, base, files)
            utterance = Utterance(name, wav, speaker, text, **_segment(record.values))
            check_utf8("id", name)
            check_utf8("speaker", speaker)
        except Unusable as error:
            flaw, detail = error.reason, error.detail
    return Entry(utterance, record.place, bool(name), flaw, detail)


def _audio_path(value, base, data_folder, place):
    if not isinstance(value, str) or not value:
        raise Unusable("no audio path", "" if value in (None, "") else f"{value!r:.60}")
    placeholder = re.match(r"\$\w+|\{\w+\}", value)
    if placeholder and data_folder:
        return _absolute(check_utf8("path", str(data_folder) + value[placeholder.end() :]))
    path = _absolute(check_utf8("path", os.path.join(base, value)))
    if placeholder and not os.path.exists(path):
        raise UserError(
            f"{place}: the audio path begins with the placeholder {placeholder[0]}; give its folder as --data_folder."
        )
    for pattern, reason, remedy in NO_PATHS:
        if re.match(pattern, value) and not os.path.exists(path):
            raise Unusable(reason, f"{value:.60}; {remedy}")
    return path


def _absolute(path):
    """The absolute path; links before ".." are followed, as the system does."""
    if ".." not in Path(path).parts:
        return os.path.abspath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _segment(values):
    """Start, stop, channel and duration of an utterance, as keys of an Utterance."""
    names = ("offset", "start", "end", "stop", "channel", *COLUMNS["duration"])
    numbers = {name: _number(name, values[name]) for name in names if values.get(name) not in (None, "")}
    offset, start, end, stop = map(numbers.get, names[:4])
    duration = next((numbers[name] for name in COLUMNS["duration"] if name in numbers), None)
    in_samples, clear, times = False, True, None
    if offset is not None:
        last = None if duration is None else offset + duration
        same = ((other, value) for other, value in ((start, offset), (end, last)) if other is not None)
        clear = stop is None and all(value is not None and abs(other - value) <= ROUNDED for other, value in same)
        start, stop = offset, last
    elif stop is not None or start is not None and "stop" in values and "end" not in values:
        in_samples, clear = True, end is None and (start or 0) % 1 == 0
    elif start is not None and (end is not None or "end" in values and "stop" not in values):
        stop = end
    elif start:  # 0 is the same in both
        raise Unusable("start without end or stop", "end is in seconds, stop in samples")
    elif end is not None:
        raise Unusable("end without start", "give both, with these names")
    elif duration is None:
        times = next(_other_times(values), None)
    if not clear:
        given = ", ".join(f"{name} {numbers[name]:g}" for name in names[:4] if name in numbers)
        raise Unusable("unclear segment", f"{given}: give either start and end in seconds, or start and stop in samples")
    channel = int(numbers["channel"]) if "channel" in numbers else None
    return {"start": start, "stop": stop, "in_samples": in_samples, "channel": channel, "duration": duration, "times": times}


def _other_times(values):
    """Starts and ends in seconds, by :data:`OTHER_TIMES`."""
    for *names, unit in OTHER_TIMES:
        with contextlib.suppress(Unusable):  # such as the time of a day
            begin, end = (_number(name, values.get(name)) / unit for name in names)
            if 0 <= begin < end:
                yield begin, end


def _number(name, value):
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) < 1e12 or (name in ("stop", "channel") and number % 1):  # the first also catches NaN
        raise Unusable("not a number", f"{name}: {value!r:.60}")
    return number


def _with_ids(entries, names):
    """Make missing ids from the stem of the path, the segment and the channel, or from the whole path if stems are equal."""

    def named(entry, name):
        utterance = entry.utterance
        if utterance.start is not None or utterance.stop is not None:
            stop = "end" if utterance.stop is None else f"{utterance.stop:.3f}"
            name = f"{name}-{utterance.start or 0:.3f}-{stop}"
        return name if utterance.channel is None else f"{name}-channel{utterance.channel}"

    paths = [name or entry.utterance.wav for name, entry in zip(names, entries, strict=True)]
    stems = ["" if entry.given else named(entry, Path(path).stem) for path, entry in zip(paths, entries, strict=True)]
    counts, whole = Counter(stem or entry.utterance.ID for stem, entry in zip(stems, entries, strict=True)), []
    for path, stem, entry in zip(paths, stems, entries, strict=True):
        if stem:
            name = stem if counts[stem] == 1 else named(entry, path)
            entry = entry._replace(utterance=entry.utterance._replace(ID=name))
        whole.append(entry)
    return whole
