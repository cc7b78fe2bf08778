"""Read sentences of text files and transcripts one by one, from files of any size."""

import contextlib
import gzip
import io
import os
import re
import zlib
from pathlib import Path

from tqdm import tqdm

from speechbrain_ext.dataio.text import normal_form, words_only
from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.files import files_inside
from speechbrain_ext.utils.text import listing

MANIFESTS = (".csv", ".json", ".jsonl")
"""Suffixes of manifests; only their transcripts are read."""
TRANSCRIPTS = ".trans.txt"
"""Suffix of files with an id at the start of each line, as in LibriSpeech."""
SUFFIXES = (".txt", *MANIFESTS)
"""Suffixes of the files that are read from a folder; .gz may follow each."""
ARPA_BEGIN = "\\data\\"
"""The line before the n-grams in an ARPA file."""
JSON_BEGIN = re.compile(r'\s*(\{\s*("|$)|\[\s*(\{|$))')
"""The beginning of objects in JSON, which no sentence has."""
SHOWN = 1000
"""Number of lines between updates of the progress bar."""


def read_sentences(paths, case="none", only_words=False, progress=False, output=None):
    """Read the words of each sentence in files, in the form of transcripts.

    Arguments
    ---------
    paths : list of str or os.PathLike
        Text files with a sentence per line, transcripts of LibriSpeech (``.trans.txt``) and Kaldi (``text`` beside ``wav.scp``),
        manifests in CSV or JSON (see :mod:`speechbrain_ext.dataio.manifests`), and folders of such files. If a folder has
        transcripts of LibriSpeech or Kaldi, only these are read. Files may be compressed with gzip.
    case : str
        "none" (unchanged), "upper" or "lower", as ``text_normalization`` in training.
    only_words : bool
        Whether to leave out punctuation and symbols, see :func:`speechbrain_ext.dataio.text.words_only`.
    progress : bool
        Whether to show a progress bar on standard error.
    output : str or os.PathLike, optional
        A file to be made of the texts.

    Yields
    ------
    list of str
        The words of a sentence; never empty.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    UserError
        If a file cannot be read to its end, is not text in UTF-8, or is a language model or the output; or if a folder holds no
        file of a known kind.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "1-2.trans.txt"
    >>> _ = path.write_text("1-2-0000 the cat\\n\\n1-2-0001 the “hat”\\n")
    >>> list(read_sentences([path.parent], "upper", only_words=True))
    [['THE', 'CAT'], ['THE', 'HAT']]
    """
    normal_form("", case)  # refuses an unknown case
    files = [file for path in paths for file in _files(Path(path))]
    if output is not None and os.path.exists(output):
        for file in files:
            if os.path.samefile(file, output):
                raise UserError(f"{output} is one of the texts, which would be lost; give another file for the language model.")
    total = sum(os.path.getsize(file) for file in files)
    with tqdm(total=total, desc="Reading", unit="B", unit_scale=True, disable=not progress) as bar:
        for file in files:
            for line in _lines(file, bar):
                text = normal_form(line, case)
                words = (words_only(text) if only_words else text).split()
                if words:
                    yield words


def _files(path):
    if not path.exists():
        raise FileNotFoundError(f"There is no text {path}; check the path.")
    if not path.is_dir():
        return [path]
    inside = [file for file in map(Path, files_inside(path)) if file.is_file()]
    files = [file for file in inside if _kind(file) in SUFFIXES or _has_ids(file)]
    if not files:
        kinds = listing(sorted({file.suffix or "no suffix" for file in inside}))
        raise UserError(f"{path} holds no text ({', '.join(SUFFIXES)}), only files of the kinds {kinds}; give another path.")
    return [file for file in files if _has_ids(file)] or files  # other files beside transcripts list speakers or licences


def _has_ids(path):
    is_kaldi = path.name == "text" and (path.parent / "wav.scp").exists()
    return is_kaldi or path.name.removesuffix(".gz").endswith(TRANSCRIPTS)


def _is_manifest(path):
    """Whether a file is a manifest by its suffix, or holds JSON."""
    if _kind(path) in MANIFESTS or not path.is_file():
        return _kind(path) in MANIFESTS
    with open(path, "rb") as file, _opened(file) as lines:
        return bool(JSON_BEGIN.match(lines.read(SHOWN)))


def _kind(path):
    return os.path.splitext(path.name.removesuffix(".gz"))[1].lower()


def _lines(path, bar):
    try:
        if _is_manifest(path):
            # Imported here because it imports all code for audio, 300 MB, which other texts do not need
            from speechbrain_ext.dataio.records import Unusable, read_records, read_transcript

            for record in read_records(path, []):
                try:
                    yield read_transcript(record.values, path.parent, [])
                except Unusable as error:
                    reason, detail = (record.flaw, record.detail) if record.flaw else (error.reason, error.detail)
                    raise UserError(
                        f"{record.place}: {reason}{detail and f' ({detail})'}; mend or remove this line, or give a manifest with "
                        "the column wrd."
                    ) from error
            bar.update(path.stat().st_size)
            return
        with open(path, "rb") as file, _opened(file) as lines:
            read, seeks, has_ids = 0, file.seekable(), _has_ids(path)  # a pipe has no position
            for number, line in enumerate(lines):
                if line.strip() == ARPA_BEGIN:
                    raise UserError(f"{path} is a language model in ARPA format, not text; leave it out.")
                yield "".join(line.split(maxsplit=1)[1:]) if has_ids else line
                if seeks and number % SHOWN == 0:
                    bar.update(file.tell() - read)
                    read = file.tell()
            bar.update(file.tell() - read if seeks else 0)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8; convert it, or leave it out.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} cannot be decompressed to its end ({one_line(error)}); get it again.") from error


@contextlib.contextmanager
def _opened(file):
    """Lines of an open file, decompressed if necessary."""
    compressed = file.peek(2)[:2] == b"\x1f\x8b"
    with gzip.GzipFile(fileobj=file) if compressed else contextlib.nullcontext(file) as data:
        yield io.TextIOWrapper(data, encoding="utf-8-sig")
