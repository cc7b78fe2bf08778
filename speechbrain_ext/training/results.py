"""The results table: a CSV file with a row for each run, test set and search."""

import csv
import dataclasses
import os
import tempfile
from pathlib import Path

from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.files import check_replaceable, locked, write_csv


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """A row of the results table; its fields are the columns."""

    experiment: str
    """Name of the run in its hparams."""
    architecture: str
    """Registered name of the encoder."""
    hparams: str
    """The hparams file."""
    overrides: str
    """Options of the command line, without paths."""
    corpus: str
    train_set: str
    """Splits, separated by blanks."""
    train_hours: float
    test_set: str
    search: str
    WER: float
    """Word error rate in %, followed by the ends of its 95 % interval and four numbers of words."""
    WER_low: float
    WER_high: float
    insertions: int
    deletions: int
    substitutions: int
    words: int
    parameters: int
    audio_seconds_per_second: float
    """Seconds of audio per second of training."""
    peak_memory_mib: int
    steps: int
    epochs: int
    precision: str
    commit: str
    hardware: str
    date: str


FIELDS = tuple(field.name for field in dataclasses.fields(ResultRow))


def check_table(path):
    """Refuse a file that rows could not be appended to after hours of work. Nothing is written.

    Arguments
    ---------
    path : str or os.PathLike
        The file. It may be missing, with its folders.

    Raises
    ------
    UserError
        If it is not a results table, or cannot be written.

    Example
    -------
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> _ = path.write_text("First line, second part\\n")
    >>> check_table(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: ... is not a results table, because it has no column WER; give another file.
    """
    if not os.fspath(path):
        raise UserError("The results table has no name; give the name of a file.")
    path = Path(path)
    if path.is_dir():
        raise UserError(f"The results table {path} is a folder; give the name of a file.")
    check_replaceable(path)
    lines = []
    try:
        if path.exists():
            with open(path, "r+", newline="", encoding="utf-8-sig") as file:
                lines = list(filter(None, csv.reader(file)))
        else:
            above = next(folder for folder in path.absolute().parents if folder.exists())
            tempfile.TemporaryFile(dir=above).close()
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"The results table {path} cannot be used ({one_line(error)}); give another file.") from error
    if lines and "WER" not in lines[0]:
        raise UserError(f"{path} is not a results table, because it has no column WER; give another file.")
    if any(len(line) != len(lines[0]) for line in lines):
        raise UserError(f"The results table {path} has lines with different numbers of columns; fix it, or give another file.")


def append_rows(path, rows):
    """Append rows to a CSV file, completely or not at all. Several runs may write to it at once.

    New columns are added at the end, and are empty in earlier rows.

    Arguments
    ---------
    path : str
        The file; it is created if it is missing.
    rows : list of dict or ResultRow
        The rows.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.csv"
    >>> append_rows(path, [{"model": "a", "WER": 5.0}])
    >>> append_rows(path, [{"model": "b", "WER": 4.0, "steps": 100}])
    >>> print(path.read_text().strip())
    model,WER,steps
    a,5.0,
    b,4.0,100
    """
    path = Path(path).resolve()  # a link stays a link
    rows = [dataclasses.asdict(row) if isinstance(row, ResultRow) else row for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        earlier, columns = [], []
        if path.exists():
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                earlier, columns = list(reader), list(reader.fieldnames or ())
        columns += [column for column in dict.fromkeys(key for row in rows for key in row) if column not in columns]
        write_csv(path, columns, ([row.get(column) for column in columns] for row in [*earlier, *rows]))
