"""Prepare validated manifests from a corpus in LibriSpeech layout.

``<data_folder>/<split>/<speaker>/<chapter>/`` holds ``<speaker>-<chapter>-<utterance>.flac`` (or .wav, .opus, .ogg,
.mp3) and ``<speaker>-<chapter>.trans.txt`` with a line ``<utterance id> <TEXT>`` for each. Splits are folders with any
names. Unusable utterances are left out, counted, and listed in ``skipped.csv``; too many of them stop the run.
"""

import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from speechbrain_ext.dataio.preparation import (
    SKIPPED_FILE,
    File,
    Skipped,
    Utterance,
    check_utterances,
    files_digest,
    write_manifests,
)
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import files_inside
from speechbrain_ext.utils.text import is_utf8, listing

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".flac", ".wav", ".opus", ".ogg", ".mp3")
TRANSCRIPT_SUFFIX = ".trans.txt"
ID = re.compile(r"\w+-\w+-\w+")
PLACEHOLDER = re.compile(r"\$[\w.]")  # SpeechBrain substitutes $name in every field of a manifest, and fails on others

VERSION = 2  # version of the manifests; older ones are prepared again


class Transcript(NamedTuple):
    """A line of a transcript file; ``flaw`` says why it cannot be used, and is empty if it can."""

    text: str
    file: str
    flaw: str


def prepare_librispeech(
    data_folder,
    save_folder,
    tr_splits=(),
    dev_splits=(),
    te_splits=(),
    select_n_sentences=None,
    merge_lst=(),
    merge_name=None,
    create_lexicon=False,
    skip_prep=False,
    max_skipped=0.05,
    text_normalization="upper",
):
    """Write the manifest ``<split>.csv`` of every split, in the format of SpeechBrain's ``DynamicItemDataset.from_csv``.

    The columns are ``ID, duration, wav, spk_id, wrd``: seconds, absolute path, ``<speaker>-<chapter>`` as in
    SpeechBrain's recipe, and the transcript, by default in upper case. The audio may have any sample rate and number of channels;
    :func:`speechbrain_ext.dataio.audio.load_audio` reads it as 16 kHz mono.

    All audio is checked as a whole, in parallel. Skipped utterances are listed in ``skipped.csv`` (``split, ID, file,
    reason, detail``). If several splits have the same id, it stays in the test split, or else in the validation split.

    Manifests are complete or absent, and ``prepared.json`` is written last. A later call returns at once if the
    arguments, the corpus files (names, sizes, times) and the manifests are unchanged; otherwise it starts again. In
    distributed training, call it through ``speechbrain.utils.distributed.run_on_main``.

    Arguments
    ---------
    data_folder : str
        The folder that holds the split folders. One of the split folders is also accepted, and so is the parent, if only
        one of its subfolders holds all splits.
    save_folder : str
        The folder for the manifests; created if it is missing.
    tr_splits, dev_splits, te_splits : list of str
        Names of the split folders for training, validation and tests.
    select_n_sentences : list of int, optional
        Number of utterances of each split, in the order of the splits above; a single number is for every split. The
        first ones in the order of their paths are used.
    merge_lst : list of str
        Splits to merge into a further manifest.
    merge_name : str, optional
        File name of the merged manifest; ``.csv`` is added if it is missing.
    create_lexicon : bool
        Must be ``False``; SpeechBrain's recipe writes a lexicon for grapheme-to-phoneme models.
    skip_prep : bool
        If True, do nothing, because the manifests exist.
    max_skipped : float
        The largest share of a split that may be left out, from 0 to 1, rounded up to whole utterances.
    text_normalization : str
        Case of the transcripts: "upper", "lower" or "none" (unchanged).

    Raises
    ------
    FileNotFoundError
        If the data folder, a split, its audio or its transcripts are missing.
    ValueError
        If the arguments contradict each other.
    RuntimeError
        If too many utterances of a split are unusable.

    Example
    -------
    >>> import tempfile
    >>> from recipes.Synthetic.prepare import build_mini_corpus
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     corpus = build_mini_corpus(folder, utterances={"test-mini": 2})
    ...     prepare_librispeech(corpus, f"{folder}/save", te_splits=["test-mini"])
    ...     manifest = Path(folder, "save", "test-mini.csv").read_text()
    >>> manifest.splitlines()[0]
    'ID,duration,wav,spk_id,wrd'
    """
    if skip_prep:
        return
    if create_lexicon:
        raise UserError(
            "create_lexicon=True is not supported, as the lexicon is only for grapheme-to-phoneme models; "
            "leave it out, or run SpeechBrain's LibriSpeech recipe."
        )
    tr_splits, dev_splits, te_splits, merge_lst = map(_as_names, (tr_splits, dev_splits, te_splits, merge_lst))
    splits = list(dict.fromkeys(tr_splits + dev_splits + te_splits))
    merge_name = _check_merge(merge_lst, merge_name, splits)
    wanted = _wanted_of_each(select_n_sentences, tr_splits + dev_splits + te_splits)
    root = find_corpus(data_folder, splits)
    files = {split: list_files(root / split) for split in splits}
    state = {
        "version": VERSION,
        "data_folder": str(root),
        "splits": [tr_splits, dev_splits, te_splits],
        "select_n_sentences": [wanted[split] for split in splits],
        "merge": [merge_lst, merge_name],
        "text_normalization": text_normalization,
        "max_skipped": max_skipped,
        "corpus": {split: files_digest(files[split]) for split in splits},
    }
    taken = {}  # test splits are prepared first: they keep an id that several splits have

    def make(split):
        return prepare_split(split, root / split, files[split], taken, wanted[split], text_normalization)

    merged = {merge_name: list(dict.fromkeys(merge_lst))} if merge_name else {}
    write_manifests(Path(save_folder).absolute(), splits, make, state, max_skipped, merged)


def find_corpus(data_folder, splits):
    """The folder that holds all splits: the given folder, else the only subfolder or parent that holds them all."""
    if not splits:
        raise UserError("No split is given; give at least one of tr_splits, dev_splits and te_splits.")
    folder = Path(data_folder or "").absolute()
    if not data_folder or not folder.is_dir():
        raise FileNotFoundError(f"The data folder '{data_folder}' is not a folder; give the folder that holds {splits[0]}.")

    def holds_all(place):
        return all(os.path.isdir(place / split) for split in splits)

    if holds_all(folder):
        return folder
    inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    fitting = [folder / name for name in inside if holds_all(folder / name)]
    if folder.name in splits and holds_all(folder.parent):
        fitting.append(folder.parent)
    if len(fitting) == 1:
        logger.info("%s does not hold the splits itself; they are in %s.", folder, fitting[0])
        return fitting[0]
    missing = [split for split in splits if split not in inside]
    raise FileNotFoundError(
        f"{folder} must hold a folder for each split, but has none named {listing(missing)}; "
        f"the folders in it are: {listing(inside)}."
    )


def first_there(data_folder, *splits):
    """Choose the first split that a corpus folder holds.

    Arguments
    ---------
    data_folder : str
        As for :func:`prepare_librispeech`.
    *splits : str
        Names, the preferred one first.

    Returns
    -------
    str
        The first name that exists; if none exists, the first name.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "dev-clean").mkdir()
    >>> first_there(folder, "dev-clean-2", "dev-clean"), first_there(folder, "test-clean")
    ('dev-clean', 'test-clean')
    """
    for split in splits:
        try:
            find_corpus(data_folder, [split])
        except FileNotFoundError:
            continue
        return split
    return splits[0]


def list_files(folder):
    """All files in a folder, see :func:`~speechbrain_ext.utils.files.files_inside`.

    Returns
    -------
    list of File
    """
    files = []
    for path in files_inside(folder):
        try:
            stat = os.stat(path)
            files.append(File(path, stat.st_size, stat.st_mtime_ns))
        except OSError:  # a broken link; the check of its audio reports it
            files.append(File(path, 0, 0))
    return files


def prepare_split(split, folder, files, taken, wanted, case):
    """Match audio with transcripts and check both.

    Arguments
    ---------
    split : str
        The name of the split.
    folder : pathlib.Path
        Its folder, for messages.
    files : list of File
        The files of the split.
    taken : dict
        Path of each id in the previous splits; the ids of this split are added.
    wanted : int or None
        Number of utterances to use; None means all.
    case : str
        Case of the transcripts: "upper", "lower" or "none".

    Returns
    -------
    rows : list of Row
        In the order of the paths.
    skipped : list of Skipped
    total : int
        Number of all utterances, also of those beyond ``wanted``.
    """
    audio = [file.path for file in files if os.path.splitext(file.path)[1].lower() in AUDIO_SUFFIXES]
    texts = [file.path for file in files if file.path.lower().endswith(TRANSCRIPT_SUFFIX)]
    if not audio or not texts:
        what = f"transcript (*{TRANSCRIPT_SUFFIX})" if audio else f"audio file ({', '.join(AUDIO_SUFFIXES)})"
        kinds = Counter(os.path.splitext(file.path)[1] or "no suffix" for file in files)
        held = listing([f"{count} x {kind}" for kind, count in kinds.most_common()])
        raise FileNotFoundError(f"There is no {what} anywhere in {folder}; the files in it are: {held}.")

    transcripts = read_transcripts(texts, case)
    skipped, candidates, with_audio = [], [], set()
    for path in audio:
        name = os.path.splitext(os.path.basename(path))[0]
        transcript = transcripts.get(name)
        with_audio.add(name)
        if not is_utf8(path):
            skipped.append(Skipped(split, name, path, "file name not UTF-8"))
        elif not ID.fullmatch(name):
            skipped.append(Skipped(split, name, path, "file name not <speaker>-<chapter>-<utterance>"))
        elif name in taken:
            skipped.append(Skipped(split, name, path, "duplicate id", f"same as {taken[name]}"))
        elif transcript is None:
            skipped.append(Skipped(split, name, path, "no transcript"))
        elif transcript.flaw:
            skipped.append(Skipped(split, name, path, transcript.flaw, transcript.file))
        elif PLACEHOLDER.search(path + " " + transcript.text):
            skipped.append(Skipped(split, name, path, "$ in path or transcript", "SpeechBrain would substitute it"))
        else:
            taken[name] = path
            candidates.append(name)
    for name in transcripts.keys() - with_audio:
        skipped.append(Skipped(split, name, transcripts[name].file, "transcript without audio"))
    total = len(skipped) + len(candidates)

    rows, position = [], 0
    wanted = len(candidates) if wanted is None else wanted
    while len(rows) < wanted and position < len(candidates):  # repeats if some of the first n are unusable
        batch = candidates[position : position + wanted - len(rows)]
        position += len(batch)
        utterances = [Utterance(name, taken[name], name.rsplit("-", 1)[0], transcripts[name].text) for name in batch]
        found, skips = check_utterances(split, utterances)
        rows += found
        skipped += skips
    odd = Counter(character for row in rows for character in set(row.wrd.upper()) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZ' "))
    if odd:
        shown = listing([f"{character} ({count})" for character, count in odd.most_common()])
        logger.warning("%s: transcripts hold characters other than A-Z and ' (number of transcripts): %s", split, shown)
    return rows, skipped, total


def read_transcripts(paths, case):
    """Read transcript files.

    Arguments
    ---------
    paths : list of str
        Files with a line ``<id> <text>`` for each utterance; any line ends, with or without a byte order mark.
    case : str
        Case of the texts: "upper", "lower" or "none".

    Returns
    -------
    dict
        Transcript by id; the text has single spaces.
    """
    transcripts = {}
    for path in paths:
        for line in Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines():
            name, *rest = line.split(None, 1) or [b""]
            # without its zero bytes, an id in UTF-16 is readable, for the message
            name = name.replace(b"\0", b"").decode(errors="ignore")
            if not name:
                continue
            try:
                text = normalise(b"".join(rest).decode(), case)
                flaw = "transcript not UTF-8" if b"\0" in line else "" if text else "empty transcript"
            except UnicodeDecodeError:
                text, flaw = "", "transcript not UTF-8"
            known = transcripts.get(name)
            if known is not None:  # a repeated line is allowed
                flaw = known.flaw if known.text == text else "two different transcripts"
            transcripts[name] = Transcript(text, path, flaw)
    return transcripts


def normalise(text, case="upper"):
    """A text in LibriSpeech's spelling: by default upper case, the ASCII apostrophe, single spaces.

    Example
    -------
    >>> normalise("  don’t \\t stop\\r\\n")
    "DON'T STOP"
    """
    return normal_form(text.replace("’", "'"), case)


def _as_names(names):
    """A list of folder names; a single name may be a string, as from the command line."""
    names = [names] if isinstance(names, str) else [str(name) for name in names or ()]
    for name in names:
        if not name or name != os.path.basename(name) or name.startswith("."):
            raise UserError(f"'{name}' is not the name of a split; give the name of a folder in the data folder.")
    return names


def _check_merge(merge_lst, merge_name, splits):
    """The file name of the merged manifest; None if nothing is merged."""
    if not merge_lst:
        return None
    if unknown := [split for split in merge_lst if split not in splits]:
        raise UserError(f"merge_lst has {listing(unknown)}, which is not prepared here; the splits are: {listing(splits)}.")
    if not merge_name or merge_name != os.path.basename(merge_name):
        raise UserError(f"merge_lst needs merge_name, a file name such as train.csv, but it is {merge_name!r}.")
    stem = merge_name.removesuffix(".csv")
    if f"{stem}.csv" == SKIPPED_FILE or (stem in splits and merge_lst != [stem]):
        raise UserError(f"merge_name '{merge_name}' is the name of another output file; choose another name.")
    return f"{stem}.csv"


def _wanted_of_each(select_n_sentences, splits):
    """The number of utterances to use of each split; None means all."""
    if select_n_sentences is None or isinstance(select_n_sentences, int):
        select_n_sentences = [select_n_sentences] * len(splits)
    if len(select_n_sentences) != len(splits) or any(n is not None and n < 1 for n in select_n_sentences):
        raise UserError(
            f"select_n_sentences needs one number above 0 for each of the {len(splits)} splits, "
            f"but it is {list(select_n_sentences)}."
        )
    return dict(zip(splits, select_n_sentences, strict=True))
