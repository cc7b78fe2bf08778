"""One form of text: what trains, what is scored and what is shown are the same characters."""

import unicodedata

from speechbrain_ext.utils.errors import UserError

CASES = ("none", "upper", "lower")
_JOINERS = "\u200c\u200d"  # part of words in Persian and in Indic scripts
_APOSTROPHES = "'\u2019"


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
        text = text.upper() if case == "upper" else text.lower()
    if text.isascii() and text.isprintable():  # nothing else to do, which saves most of the time with English
        return " ".join(text.split())
    text = " ".join(unicodedata.normalize("NFKC", text).translate(_SHOWN).split())
    # Once more: what stood on both sides of a removed character may belong together now
    return unicodedata.normalize("NFKC", text)


def words_only(text):
    """A text as it would be spoken, in part: without punctuation and symbols, but with apostrophes inside of words.

    Numbers stay as they are written.

    Arguments
    ---------
    text : str
        In the form of :func:`normal_form`.

    Returns
    -------
    str

    Example
    -------
    >>> words_only("'Twenty-one,' she said; “don’t … spend $5.”")
    "Twenty one she said don't spend 5"
    """
    words = (word.strip("'") for word in text.translate(_SPOKEN).split())
    return " ".join(word for word in words if word)


class _Characters(dict):
    """What stands in place of each character, found once; None for nothing."""

    def __init__(self, replace):
        self.replace = replace

    def __missing__(self, code):
        self[code] = self.replace(chr(code))
        return self[code]


def _shown(character):
    category = unicodedata.category(character)
    if category in ("Cc", "Zs", "Zl", "Zp") or character == "▁":  # which SentencePiece writes for a space
        return " "
    return None if category == "Cf" and character not in _JOINERS else character  # marks of direction, byte order and the like


def _spoken(character):
    if character in _APOSTROPHES:
        return "'"
    return character if unicodedata.category(character)[0] in "LMN" or character in _JOINERS else " "


_SHOWN, _SPOKEN = _Characters(_shown), _Characters(_spoken)
