"""Read datasets that Hugging Face's ``save_to_disk`` wrote. Audio inside an Arrow file is read from there, not copied."""

import json

import numpy as np

from speechbrain_ext.utils.errors import UserError, UserImportError, one_line

END = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of an Arrow stream."""


def read_rows(folder, files):
    """Read the rows of a saved dataset.

    Arguments
    ---------
    folder : pathlib.Path
        The output of ``save_to_disk``.
    files : list
        Receives all files that are read.

    Yields
    ------
    place : str
        File and row.
    values : dict
        Values by column. ``wav`` is the path of the audio, or its range of bytes in the Arrow file.
    name : str
        The name of audio inside an Arrow file; may be empty.

    Raises
    ------
    UserError
        If the dataset cannot be read.
    UserImportError
        If pyarrow is not installed.
    """
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise UserImportError(
            f"{folder} is a saved dataset of Hugging Face, and reading it needs the package pyarrow; install it with: "
            "pip install -e '.[arrow]'"
        ) from None
    files.append(folder / "state.json")
    try:
        state = json.loads(files[-1].read_text(encoding="utf-8"))
        if state.get("_indices_files"):
            raise UserError(f"The saved dataset {folder} is a selection from others; save it again after flatten_indices().")
        for part in state["_data_files"]:
            files.append(folder / part["filename"])
            whole = pyarrow.memory_map(str(files[-1])).read_buffer()
            row = 0
            # pyarrow reads a file that was cut between two batches without an error
            if whole.slice(max(0, whole.size - len(END))).to_pybytes() != END:
                raise UserError(f"{files[-1]} has no end mark: it was cut, or not written to its end; save it again.")
            for batch in pyarrow.ipc.open_stream(whole):
                batch.validate(full=True)  # pyarrow would read outside the file of a damaged batch
                audio = [field.name for field in batch.schema if _is_audio(field.type)]
                others = batch.select([name for name in batch.schema.names if name not in audio]).to_pylist()
                places = _places(batch.column(audio[0]), files[-1], whole) if audio else [(None, "")] * len(others)
                for values, (wav, name) in zip(others, places, strict=True):
                    row += 1
                    yield f"{files[-1]}, row {row}", values | ({"wav": wav} if audio else {}), name
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"The saved dataset {folder} cannot be read ({one_line(error)}); save it again.") from error


def _is_audio(kind):
    """Whether a column has Hugging Face's type Audio."""
    return str(kind).startswith("struct") and {field.name for field in kind} == {"bytes", "path"}


def _places(column, file, whole):
    """Yield the place of each audio, and its name if it lies inside the file, which is mapped to memory as ``whole``."""
    content, paths = column.field("bytes"), column.field("path").to_pylist()
    _, ends, data = content.buffers()
    ends = np.frombuffer(ends, np.int64 if str(content.type) == "large_binary" else np.int32)[content.offset :] if paths else ()
    for index, (path, inside) in enumerate(zip(paths, content.is_valid().to_pylist(), strict=True)):
        if inside:
            offset, size = data.address - whole.address + int(ends[index]), int(ends[index + 1] - ends[index])
            if not 0 <= offset <= whole.size - size:  # pyarrow has decompressed it to another place
                raise UserError(f"{file} is compressed; save it again without compression.")
            yield f"{file}?offset={offset}&size={size}", path or ""
        else:
            yield path, ""
