"""One form of text: what trains, what is scored and what is shown are the same characters."""

import unicodedata

from speechbrain_ext.utils.errors import UserError

CASES = ("none", "upper", "lower")
_JOINERS = "\u200c\u200d"  # part of words in Persian and in Indic scripts


def normal_form(text, case="none"):
    """A transcript in the form that tokens are made of: Unicode's NFKC, single spaces, no characters that nobody sees.

    SentencePiece's own rules are not used: they change a text on its way to tokens, so that a model that makes no error would be
    scored against another text than it was trained on.

    Arguments
    ---------
    text : str
        Any.
    case : str
        "none" (as it is), "upper" or "lower".

    Returns
    -------
    str

    Raises
    ------
    UserError
        If the case is another one.

    Example
    -------
    >>> normal_form("\\ufeffＡbc  ½\\u200f")
    'Abc 1⁄2'
    >>> normal_form("straße", "upper")
    'STRASSE'
    """
    if case not in CASES:
        raise UserError(f"text_normalization is {case!r}; give none, upper or lower.")
    text = unicodedata.normalize("NFKC", text)
    if case != "none":
        text = unicodedata.normalize("NFKC", text.upper() if case == "upper" else text.lower())
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cc", "Zs", "Zl", "Zp") or character == "▁":  # which SentencePiece writes for a space
            kept.append(" ")
        elif category != "Cf" or character in _JOINERS:  # marks of direction, byte order and the like
            kept.append(character)
    # Once more: what stood on both sides of a removed character may belong together now
    return unicodedata.normalize("NFKC", " ".join("".join(kept).split()))
