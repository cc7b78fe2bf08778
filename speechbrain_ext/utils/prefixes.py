"""Prefixes of the names of weights, such as ``transformer.encoder.layers.0``."""

import difflib

from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.text import listing


def begins_with(name, prefix):
    """Whether a name is the prefix, or continues with a dot after it.

    Example
    -------
    >>> begins_with("layers.1.weight", "layers.1"), begins_with("layers.10.weight", "layers.1")
    (True, False)
    """
    return f"{name}.".startswith(f"{prefix.rstrip('.')}.")


def check_prefixes(key, prefixes, names):
    """Refuse prefixes that no name begins with; they are typing errors.

    Arguments
    ---------
    key : str
        The setting that holds the prefixes, for the message.
    prefixes : iterable of str
    names : iterable of str

    Raises
    ------
    UserError
        If a prefix matches nothing.

    Example
    -------
    >>> check_prefixes("freeze", ["encodr"], ["encoder.weight", "head.weight"])
    Traceback (most recent call last):
    speechbrain_ext.utils.errors.UserError: freeze has 'encodr', which no weight begins with; did you mean 'encoder'?
    """
    names = list(names)
    for prefix in prefixes:
        if not isinstance(prefix, str) or not any(begins_with(name, prefix) for name in names):
            known = dict.fromkeys(".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2))
            near = difflib.get_close_matches(str(prefix), known, n=1)
            begins = dict.fromkeys(name.split(".")[0] for name in names)
            hint = f"did you mean '{near[0]}'?" if near else f"names begin with {listing(begins)}."
            raise UserError(f"{key} has {prefix!r}, which no weight begins with; {hint}")
