"""The normal form of text: training, scoring and output use the same characters."""

import unicodedata

from speechbrain_ext.utils.errors import UserError

CASES = ("none", "upper", "lower")
_JOINERS = "\u200c\u200d"  # part of words in Persian and in Indic scripts
_APOSTROPHES = "'\u2019"


def normal_form(text, case="none"):
    """A transcript in normal form: Unicode's NFKC, single spaces, no invisible characters.

    The tokenizer has no normalization rules of SentencePiece. With them, tokens would encode another text than the one that is
    scored, and a perfect model would have errors.

    Arguments
    ---------
    text : str
        Any text.
    case : str
        "none" (unchanged), "upper" or "lower".

    Returns
    -------
    str

    Raises
    ------
    UserError
        If ``case`` has another value.

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
    if text.isascii() and text.isprintable():  # a shortcut that saves most of the time for English
        return " ".join(text.split())
    text = " ".join(unicodedata.normalize("NFKC", text).translate(_SHOWN).split())
    # Again, because the neighbours of a removed character may combine
    return unicodedata.normalize("NFKC", text)


def words_only(text):
    """A text without punctuation and symbols; apostrophes inside words stay.

    Numbers stay as they are written.

    Arguments
    ---------
    text : str
        A text in the form of :func:`normal_form`.

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
    """The replacement of each character, computed once; None removes the character."""

    def __init__(self, replace):
        self.replace = replace

    def __missing__(self, code):
        self[code] = self.replace(chr(code))
        return self[code]


def _shown(character):
    category = unicodedata.category(character)
    if category in ("Cc", "Zs", "Zl", "Zp") or character == "▁":  # SentencePiece's mark for a space
        return " "
    return None if category == "Cf" and character not in _JOINERS else character  # Cf: marks of direction, byte order and similar


def _spoken(character):
    if character in _APOSTROPHES:
        return "'"
    return character if unicodedata.category(character)[0] in "LMN" or character in _JOINERS else " "


_SHOWN, _SPOKEN = _Characters(_shown), _Characters(_spoken)
