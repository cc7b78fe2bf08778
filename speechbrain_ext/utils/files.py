"""Write files and folders completely or not at all; lock and read them."""

import contextlib
import csv
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

from speechbrain_ext.utils.errors import UserError, one_line

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk without space, which name no file."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of a disk without locks, such as some network disks."""
csv.field_size_limit(2**31 - 1)  # by default 128 kB, less than the transcript of a recording of some hours


@contextlib.contextmanager
def replacing(path, mode="w", **keys):
    """Open a file for writing that gets its name only when it is complete.

    Arguments
    ---------
    path : str or os.PathLike
        The file. An existing file stays unchanged until the new one is complete. A link stays a link.
    mode : str
        "w" for text (UTF-8), "wb" for bytes.
    **keys
        For :func:`open`.

    Yields
    ------
    file

    Raises
    ------
    UserError
        If the path is empty, or names a device or pipe, which would become a file.
    OSError
        If the file cannot be written; the error names it.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with replacing(path) as file:
    ...     _ = file.write("1 2 3")
    >>> path.read_text(), len(list(path.parent.iterdir()))
    ('1 2 3', 1)
    """
    if not os.fspath(path):
        raise UserError("The file to write has no name; give one.")
    check_replaceable(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if "b" not in mode:
        keys = {"encoding": "utf-8", **keys}
    try:
        with open(temporary, mode, **keys) as file:
            yield file
        os.replace(temporary, target)
    except OSError as error:
        is_full = error.filename is None and error.errno in FULL
        if is_full or error.filename == os.fspath(temporary):  # name the file that the user knows
            error.filename = os.fspath(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path):
    """Refuse to write a file in place of a device or pipe.

    Raises
    ------
    UserError
        If the path is one.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a pipe or device, not a file; give the name of a file.")


def place_of(path):
    """The place where a path is written, which for a link is that of its target.

    Arguments
    ---------
    path : str or os.PathLike
        A file or folder; it need not exist.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    FileNotFoundError
        If the folder around it is missing.
    """
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {place.parent} for {place.name}; create it, or give another path.")
    return place


def write_text(path, text):
    """Write a text file (UTF-8), completely or not at all."""
    with replacing(path) as file:
        file.write(text)


def write_bytes(path, content):
    """Write a file, completely or not at all."""
    with replacing(path, "wb") as file:
        file.write(content)


def write_csv(path, fields, rows):
    """Write rows as CSV, completely or not at all; missing folders are created.

    Arguments
    ---------
    path : str or os.PathLike
        The file.
    fields : sequence of str
        The columns.
    rows : iterable of sequence
        Values in the order of the columns.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # A file name may not be valid UTF-8
    with replacing(path, newline="", errors="backslashreplace") as file:
        # Only with its own line end does csv put every value with a line end in quotation marks
        lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
        csv.writer(lines).writerows([fields, *rows])


@contextlib.contextmanager
def replacing_folder(folder):
    """A folder to fill that gets its name only when it is complete.

    Arguments
    ---------
    folder : str or os.PathLike
        The folder. An existing folder is replaced as a whole.

    Yields
    ------
    pathlib.Path
        The folder to write to.

    Raises
    ------
    UserError
        If another process is writing it.
    OSError
        If the folder cannot be written; the error names it.
    """
    folder = Path(os.path.realpath(folder))  # "." has no name, and a link stays a link
    partial, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "replaced"))

    def restore():
        if replaced.exists() and not folder.exists():  # this run or an earlier one was stopped between the two steps
            os.replace(replaced, folder)

    try:
        partial.mkdir(parents=True, exist_ok=True)
        taken = f"Another process is writing {folder}; wait for it, or give another folder."
        with locked(f"{partial}/", taken):  # with the slash, no file is made if the other one has just moved the folder
            if not partial.exists():  # the other one has finished just now
                raise UserError(taken)
            try:
                restore()
                for left in partial.iterdir():
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
                yield partial
                shutil.rmtree(replaced, ignore_errors=True)
                if folder.exists():
                    os.replace(folder, replaced)
                os.replace(partial, folder)
                shutil.rmtree(replaced, ignore_errors=True)
            except BaseException:
                restore()
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        is_full = error.filename is None and error.errno in FULL
        inside = error.filename is not None and Path(error.filename).is_relative_to(partial)
        if is_full or inside and not isinstance(error, FileExistsError):  # name the folder that the user knows
            error.filename = str(folder)
        raise


@contextlib.contextmanager
def locked(path, taken=None):
    """Hold a lock on a folder or file inside the context. The system frees it even if the process is killed.

    On a disk without locks, it only warns.

    Arguments
    ---------
    path : str or os.PathLike
        A folder, or a file, which is created if it is missing.
    taken : str, optional
        The message if another process holds the lock. Without it, wait for the lock.

    Raises
    ------
    UserError
        If another process holds the lock and ``taken`` is given.
    """
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if taken is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(taken) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("The disk of %s has no locks; make sure that no other process writes there.", path)
        yield
    finally:
        os.close(handle)


def files_inside(folder):
    """All files in a folder and its subfolders, in the order of their paths, without hidden ones.

    Links are followed, but each folder is visited only once. A subfolder that may not be read is passed over, with a warning.

    Arguments
    ---------
    folder : str or os.PathLike
        The folder.

    Yields
    ------
    str
        A path; that of a broken link too.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "a").mkdir()
    >>> _ = (folder / "a" / "b.txt").write_text("1 2 3")
    >>> [os.path.relpath(path, folder) for path in files_inside(folder)]
    ['a/b.txt']
    """
    seen, root = set(), os.fspath(folder)

    def visit(place):
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in seen:  # a loop of links
            return
        seen.add((stat.st_dev, stat.st_ino))
        try:
            with os.scandir(place) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:  # such as lost+found of a disk
            if place == root:
                raise
            logger.warning("%s may not be read, and is passed over.", place)
            return
        for entry in entries:
            if entry.name.startswith("."):  # .DS_Store, and ._1-2-3.flac that macOS puts beside 1-2-3.flac
                continue
            if os.path.isdir(entry):  # False for a link to itself
                yield from visit(entry.path)
            else:
                yield entry.path

    yield from visit(root)


def read_bytes(path, most):
    """The content of a file from an untrusted source, up to a size.

    Arguments
    ---------
    path : str or os.PathLike
        The file.
    most : int
        Largest allowed size in bytes.

    Returns
    -------
    bytes

    Raises
    ------
    UserError
        If the file is larger; the rest is not read.
    OSError
        If the file cannot be read; the error names it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        error.filename = os.fspath(path)
        raise
    if len(data) > most:
        raise UserError(f"{Path(path).name} has more than {most} bytes")
    return data


def file_digest(path):
    """The SHA-256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_csv(path, fields=None):
    """Rows of a CSV file as dictionaries. A row with too few values has None for the rest.

    Raises
    ------
    UserError
        If its columns are not ``fields``, a line has more values than columns, or it is not CSV in UTF-8.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader, rows = csv.DictReader(file, strict=True), []
        try:
            if fields is not None and tuple(reader.fieldnames or ()) != tuple(fields):
                raise UserError(f"{path} has the columns of another kind of file or of another version; give another file.")
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{path}, line {reader.line_num}, has more values than columns; put a value that holds a comma in "
                        "quotation marks."
                    )
                rows.append(row)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not text in UTF-8; write it in UTF-8.") from error
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.reader.line_num}, is not valid CSV: {one_line(error)}; fix it.") from error
    return rows
