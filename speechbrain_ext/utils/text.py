"""Text for output: lists in a sentence, tables, fields of a line."""

import re

_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def listing(names, most=10):
    """The first names of a list, in one line.

    Arguments
    ---------
    names : iterable of str
        The names.
    most : int
        Number of names to show.

    Returns
    -------
    str

    Example
    -------
    >>> listing(["a", "b", "c"], most=2), listing([])
    ('a, b and 1 more', 'none')
    """
    names = list(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def table(columns, rows):
    """A Markdown table.

    Arguments
    ---------
    columns : sequence of str
        The header.
    rows : iterable of sequence
        The cells; None gives an empty cell.

    Returns
    -------
    str

    Example
    -------
    >>> print(table(["a", "b"], [[1, None]]))
    | a | b |
    | --- | --- |
    | 1 |  |
    """
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines)


def tab_field(text):
    """Escape tabs, line ends and backslashes for a field of tab-separated values.

    Example
    -------
    >>> tab_field("a\\tb")
    'a\\\\tb'
    """
    return text.translate({ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"})


def printable(text):
    """Escape control characters and marks of text direction, which could control a terminal.

    Example
    -------
    >>> print(printable("a\x1b[2Jb"))
    a\\x1b[2Jb
    """
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def is_utf8(text):
    """Whether a text, such as a file's name, can be written in UTF-8.

    Example
    -------
    >>> is_utf8("é"), is_utf8(b"caf\\xe9".decode(errors="surrogateescape"))
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
