"""Prepare validated manifests from manifests in the formats of other toolkits.

The manifests are compared with the audio. Unusable utterances are left out, counted, and listed in ``skipped.csv``; too many of
them stop the run. An utterance that is in both the training set and a test set also stops it.
"""

import logging
import math
import os
from collections import Counter
from pathlib import Path

from speechbrain_ext.dataio.audio import split_location
from speechbrain_ext.dataio.manifests import as_paths, manifest_name, named_manifests, read_entries, select
from speechbrain_ext.dataio.preparation import File, check_utterances, files_digest, write_manifests
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.text import listing

logger = logging.getLogger(__name__)

VERSION = 1  # version of the manifests; older ones are prepared again
TAKEN = ("skipped", "train+merged", "unfit_train", "unfit_valid", "results")
"""Names of other CSV files in the output folder of a run."""


def prepare_manifests(
    data_folder,
    save_folder,
    tr_splits,
    dev_splits,
    te_splits,
    train_manifest,
    valid_manifest,
    test_manifest=(),
    mix_manifest=None,
    text_normalization="none",
    words_only=False,
    max_duration=40,
    max_skipped=0.05,
):
    """Write the manifest ``<split>.csv`` of every split from manifests in the formats of :mod:`speechbrain_ext.dataio.manifests`.

    The columns are ``ID, duration, wav, start, stop, channel, spk_id, wrd``. ``start``, ``stop`` and ``channel`` are only present
    if some utterances are segments or channels of recordings. Each recording is checked once, as a whole. Skipped utterances are
    listed in ``skipped.csv`` (``split, ID, file, reason, detail``). A later call with the same arguments and the same files
    returns at once.

    Arguments
    ---------
    data_folder : str, optional
        The folder that replaces a placeholder at the beginning of a path, such as ``$data_root``.
    save_folder : str
        The folder for the manifests; created if it is missing.
    tr_splits, dev_splits, te_splits : list of str
        Names of the training set and, if data is mixed in, of that set; of the validation set; and of the test sets.
    train_manifest, valid_manifest : str or list of str
        Files or folders. Several become one set; if two of them have the same id, the name of the file is added before it.
    test_manifest : str or list of str
        ``name=path``, or a path; then the name is that of the file.
    mix_manifest : str or list of str, optional
        Manifests to mix into the training set.
    text_normalization : str
        Case of the transcripts: "none" (unchanged), "upper" or "lower".
    words_only : bool
        Whether to leave out punctuation and symbols of the transcripts.
    max_duration : float, optional
        Seconds; longer utterances are left out of training.
    max_skipped : float
        The largest share of a split that may be left out for other reasons, from 0 to 1, rounded up to whole utterances.

    Raises
    ------
    FileNotFoundError
        If a manifest is missing.
    UserError
        If a manifest cannot be read, or an utterance is in both the training set and a test set.
    UserRuntimeError
        If too many utterances of a split are unusable.

    Example
    -------
    >>> import tempfile, numpy, soundfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> soundfile.write(folder / "talk.wav", numpy.zeros(160000), 16000)
    >>> line = '{{"audio_filepath": "talk.wav", "offset": {}, "duration": 2, "text": "The text"}}'
    >>> for second, name in enumerate(("train", "dev")):
    ...     _ = (folder / f"{name}.jsonl").write_text(line.format(3 * second))
    >>> prepare_manifests(None, folder / "save", ["train"], ["dev"], [], [folder / "train.jsonl"], [folder / "dev.jsonl"])
    >>> header, row = (folder / "save" / "dev.csv").read_text().splitlines()
    >>> header, row.replace(str(folder), "")
    ('ID,duration,wav,start,stop,spk_id,wrd', 'talk-3.000-5.000,2.0,/talk.wav,48000,80000,unknown,The text')
    """
    tests = named_manifests(test_manifest)
    train_manifest, valid_manifest, mixed = map(as_paths, (train_manifest, valid_manifest, mix_manifest))
    if len(tr_splits) > 1 + bool(mixed):
        raise UserError(f"train_splits is {tr_splits}, but manifests make one training set; give all of them as train_manifest.")
    if len(tr_splits) < 1 + bool(mixed):
        raise UserError(f"train_splits is {tr_splits}; give a name for the training set and, with mix_manifest, for that set.")
    if len(dev_splits) != 1:
        raise UserError(f"dev_splits is {dev_splits}, but there is one validation set; give one name.")
    if unknown := [name for name in te_splits if name not in tests]:
        raise UserError(
            f"test_splits has {unknown[0]}, but no test manifest has this name; give it: --test_manifest {unknown[0]}=PATH."
        )
    given = dict(zip(tr_splits, (train_manifest, mixed), strict=False)) | {dev_splits[0]: valid_manifest}
    given |= {name: [tests[name]] for name in te_splits}
    if len(given) < len(tr_splits) + 1 + len(te_splits) or not given.keys().isdisjoint(TAKEN):
        names = listing([*tr_splits, *dev_splits, *te_splits])
        raise UserError(
            f"The sets have the names {names}; give each test set a different name, as name=path, but none of {listing(TAKEN)}."
        )
    entries, sources, ids, status = {}, {}, {}, {}
    for split, paths in given.items():
        entries[split], sources[split], ids[split] = read_split(paths, data_folder)
    others = [split for split in given if split not in tr_splits]
    for train in tr_splits:
        for test in te_splits:
            _refuse_common(sorted(ids[train] & ids[test]), test, "the same id")
    state = {
        "version": VERSION,
        "given": {split: [os.path.abspath(path) for path in paths] for split, paths in given.items()},
        "data_folder": str(data_folder),
        "text_normalization": text_normalization,
        "words_only": words_only,
        "max_duration": max_duration,
        "max_skipped": max_skipped,
        "corpus": {split: files_digest(_files(entries[split], sources[split], status)) for split in given},
    }
    rows = {}

    def make(split):
        utterances, flawed = select(split, entries[split], text_normalization, words_only)
        longest = math.inf if split in others or max_duration is None else max_duration
        rows[split], skipped = check_utterances(split, utterances, longest)
        if split in tr_splits:
            for other in others:
                _compare(rows[split], rows[other], other, status, refuse=other in te_splits)
        for test in te_splits if split in dev_splits else ():  # made before it
            if shared := sorted(_common(rows[split], rows[test], status)):
                told = "%s: %d utterances have the same audio as the validation set, which chooses the checkpoints: %s"
                logger.warning(told, test, len(shared), listing(shared, 3))
        return rows[split], flawed + skipped, len(entries[split])

    write_manifests(Path(save_folder).absolute(), list(given), make, state, max_skipped)


def names_of_tests(test_manifest):
    """Names of test sets.

    Arguments
    ---------
    test_manifest : str or list of str
        ``name=path``, or a path; then the name is that of the file.

    Returns
    -------
    list of str

    Example
    -------
    >>> names_of_tests(["near=my/near.jsonl", "my/far.jsonl.gz"])
    ['near', 'far']
    """
    return list(named_manifests(test_manifest))


def read_split(paths, data_folder=None):
    """Read several manifests as one set.

    Arguments
    ---------
    paths : list of str
        Manifests.
    data_folder : str, optional
        The folder that replaces a placeholder at the beginning of a path.

    Returns
    -------
    entries : list of Entry
        If two manifests have the same id, the name of the manifest is added before it.
    files : list of str
        All files that were read.
    ids : set of str
        All ids that the manifests state.

    Raises
    ------
    UserError
        If a manifest is given twice.
    """
    parts, files = [], []
    for path, count in Counter(map(os.path.realpath, paths)).items():
        if count > 1:
            raise UserError(f"The manifest {path} is given {count} times; give it once.")
    for path in paths:
        entries, read = read_entries(path, data_folder)
        parts.append(entries)
        files += read
    ids = {entry.utterance.ID for entries in parts for entry in entries if entry.given}
    counts = Counter(name for entries in parts for name in {entry.utterance.ID for entry in entries})
    names = [manifest_name(path) for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    merged, taken = [], set(counts)
    for name, entries in zip(names, parts, strict=True):
        renamed = {}
        for entry in entries:
            given = entry.utterance.ID
            if counts[given] > 1 and given:
                if given not in renamed:
                    renamed[given] = f"{name}-{given}"
                    while renamed[given] in taken:
                        renamed[given] = f"{name}-{renamed[given]}"
                    taken.add(renamed[given])
                entry = entry._replace(utterance=entry.utterance._replace(ID=renamed[given]))
            merged.append(entry)
    return merged, files, ids


def _files(entries, sources, status):
    """The files of a split; their status is added to ``status``."""
    audio = (split_location(entry.utterance.wav)[0] for entry in entries if entry.utterance.wav)
    for path in dict.fromkeys([*sources, *audio]):
        if path not in status:
            try:
                status[path] = os.stat(path)
            except (OSError, ValueError):  # the check of the audio reports it
                status[path] = None
        found = status[path]
        yield File(path, found.st_size, found.st_mtime_ns) if found else File(path, 0, 0)


def _compare(train, rows, name, status, refuse):
    """Find audio (most of an utterance) and speakers that are in both the training set and another set.

    With ``refuse``, shared audio raises an error; everything else is logged.
    """
    shared = sorted(_common(train, rows, status))
    if refuse:
        _refuse_common(shared, name, "the same audio")
    elif shared:
        logger.warning("%s: %d utterances have the same audio as the training set: %s", name, len(shared), listing(shared, 3))
    speakers = ({row.spk_id for row in train} & {row.spk_id for row in rows}) - {"unknown"}
    if speakers:
        logger.warning("%s: %d speakers are also in the training set: %s", name, len(speakers), listing(sorted(speakers), 3))


def _refuse_common(names, test, what):
    if names:
        raise UserError(
            f"{len(names)} utterances of the test set {test} have {what} as training utterances, such as {listing(names, 3)}; "
            "remove them from one of the two sets."
        )


def _common(train, rows, status):
    """Ids of rows that overlap a training row by more than half of the shorter one."""
    places = {}
    for row in rows:
        places.setdefault(_place(row, status), []).append(_Span(row, True))
    for row in train:
        if (place := _place(row, status)) in places:
            places[place].append(_Span(row, False))
    for spans in places.values():
        yield from {span.row.ID for pair in _overlapping(spans) for span in pair if span.tested}


def _place(row, status):
    """The audio of a row, identified by the file and not by its name."""
    path, offset, _ = split_location(row.wav)
    return status[path].st_dev, status[path].st_ino, offset


class _Span:
    """The range of samples of a row; ``tested``: the row is of the other set, not of the training set."""

    def __init__(self, row, tested):
        self.row, self.tested, self.begin = row, tested, row.start or 0
        self.length = round(row.duration * row.sample_rate)
        self.end = self.begin + self.length


def _overlapping(spans):
    """Yield pairs of a training row and another row that overlap."""
    current = []
    for span in sorted(spans, key=lambda span: span.begin):
        current = [other for other in current if other.end > span.begin]
        for other in current:
            channels = {span.row.channel, other.row.channel}
            shared = min(span.end, other.end) - span.begin
            if span.tested != other.tested and (len(channels) == 1 or None in channels):
                if 2 * shared > min(span.length, other.length):
                    yield span, other
        current.append(span)
