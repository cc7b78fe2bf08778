"""The tokenizer of a training run."""

import csv
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import sentencepiece

from speechbrain_ext.dataio.text import normal_form, words_only
from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.files import file_digest, replacing, write_text

TOKEN_TYPES = ("unigram", "bpe", "char")


def train_tokenizer(manifest, path, vocab_size, token_type, blank_index, bos_index, eos_index, unk_index):
    """Train a SentencePiece tokenizer on the transcripts of a manifest, unless its file exists and is up to date.

    ``<path>.from`` holds a digest of the transcripts and settings. If these have changed, the tokenizer is trained again.

    Arguments
    ---------
    manifest : str
        CSV file with a column ``wrd``.
    path : str
        The model file to write, completely or not at all.
    vocab_size : int
        Largest number of tokens; short transcripts may give fewer.
    token_type : str
        ``unigram``, ``bpe`` or ``char``.
    blank_index, bos_index, eos_index, unk_index : int
        Ids of the special tokens. The blank is SentencePiece's padding token: no text encodes to it, and decoding drops it.

    Raises
    ------
    ValueError
        If the vocabulary is too small for the characters of the transcripts.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "train.csv").write_text("ID,wrd\\na,THE CAT SAT\\nb,A CAT AND THE HAT\\n")
    >>> train_tokenizer(folder / "train.csv", folder / "t.model", 1000, "unigram", 0, 1, 2, 3)
    >>> tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "t.model"))
    >>> tokenizer.decode_ids([0, 1, *tokenizer.encode_as_ids("THE HAT"), 2])
    'THE HAT'
    """
    path = Path(path)
    with open(manifest, encoding="utf-8", newline="") as file:
        transcripts = [normal_form(row["wrd"]) for row in csv.DictReader(file)]
    settings = [token_type, vocab_size, blank_index, bos_index, eos_index, unk_index]
    origin = hashlib.sha256(json.dumps([settings, transcripts]).encode()).hexdigest()
    made_of = path.with_name(f"{path.name}.from")
    if path.exists() and made_of.exists() and made_of.read_text(encoding="utf-8") == f"{origin} {file_digest(path)}":
        return
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # SentencePiece leaves out sentences with this character, its own mark for unknown ones
            sentence_iterator=(text.replace("▅", " ") for text in transcripts),
            model_writer=model,
            model_type=token_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",  # the transcripts are in normal form
            pad_id=blank_index,
            bos_id=bos_index,
            eos_id=eos_index,
            unk_id=unk_index,
            num_threads=1,  # the result depends on this number
            max_sentence_length=100_000,  # bytes; SentencePiece leaves out longer transcripts
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        characters = len(set("".join(transcripts)))
        raise UserError(
            f"A {token_type} tokenizer of {vocab_size} tokens cannot be made from transcripts with {characters} different "
            f"characters; raise vocab_size ({one_line(error)})."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        file.write(model.getvalue())
    write_text(made_of, f"{origin} {file_digest(path)}")


def unknown_characters(tokenizer, transcripts):
    """Count the characters of transcripts that no token of a tokenizer has.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer.
    transcripts : iterable of str
        They are in the form of :func:`~speechbrain_ext.dataio.text.normal_form`.

    Returns
    -------
    collections.Counter
        Number of transcripts with each character.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "train.csv").write_text("ID,wrd\\na,THE CAT SAT\\nb,A CAT AND THE HAT\\n")
    >>> train_tokenizer(folder / "train.csv", folder / "t.model", 1000, "unigram", 0, 1, 2, 3)
    >>> tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "t.model"))
    >>> sorted(unknown_characters(tokenizer, ["THE ÄTHER", "THE FEAST"]).items())
    [('F', 1), ('R', 1), ('Ä', 1)]
    """
    counts, transcripts = Counter(), list(transcripts)
    unknown = tokenizer.unk_id()
    doubtful = {character for character in set("".join(transcripts)) if unknown in tokenizer.encode_as_ids(character)}
    for text in transcripts:
        if not doubtful.isdisjoint(text):  # the character may be part of a longer token
            pieces = tokenizer.encode_as_immutable_proto(text).pieces
            counts.update({character for piece in pieces if piece.id == unknown for character in piece.surface})
    return counts


def most_frequent(characters, number=5):
    """The most frequent characters of a Counter, with spaces between them."""
    return " ".join(sorted(characters, key=lambda character: (-characters[character], character))[:number])


def remedy_for(characters, tokenizer, case_option, words_option):
    """What to do about characters that a tokenizer lacks, as part of a sentence.

    Arguments
    ---------
    characters : iterable of str
        The characters.
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer.
    case_option, words_option : str
        Options of the command that change the case, and that leave out punctuation.

    Returns
    -------
    str
    """
    letters, remedies = words_only(" ".join(characters)).split(), []
    if len(unknown_characters(tokenizer, [letter.swapcase() for letter in letters])) < len(letters):
        remedies.append(f"give the case of its training transcripts as {case_option} upper or lower")
    elif letters:
        remedies.append("write numbers as words, and names without foreign letters")
    if not all(map(words_only, characters)):
        remedies.append(f"leave out punctuation with {words_option}")
    return ", and ".join(remedies)


# Numbers of fields in SentencePiece's file format (sentencepiece_model.proto)
_PIECES, _SETTINGS, _PIECE, _TYPE = 1, 2, 1, 3
_CONTROL = 3
_ROLES = {"unk": (40, 45), "bos": (41, 46), "eos": (42, 47), "blank": (43, 48)}
"""Field numbers of the id and the spelling of each special token in the settings; the blank is SentencePiece's padding."""


def is_special(tokenizer, token):
    """Whether no text has a token, because it is a control symbol or the unknown token.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer.
    token : int
        Its index.

    Returns
    -------
    bool

    Example
    -------
    >>> import io
    >>> made = io.BytesIO()
    >>> sentencepiece.SentencePieceTrainer.train(
    ...     sentence_iterator=iter(["A"]), model_writer=made, model_type="char", vocab_size=6, pad_id=0, bos_id=1, eos_id=2,
    ...     unk_id=3, minloglevel=2,
    ... )
    >>> tokenizer = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    >>> [is_special(tokenizer, token) for token in range(6)], piece_ids(tokenizer)
    ([True, True, True, True, False, False], {'A': 4, '▁': 5})
    """
    return tokenizer.is_control(token) or tokenizer.is_unknown(token)


def piece_ids(tokenizer):
    """The index of each piece that a text can have; see :func:`is_special`.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer.

    Returns
    -------
    dict
    """
    tokens = range(tokenizer.vocab_size())
    return {tokenizer.id_to_piece(token): token for token in tokens if not is_special(tokenizer, token)}


def arrange_tokenizer(model, blank_index, bos_index, eos_index, unk_index):
    """Move the special tokens of a SentencePiece model to these ids. Missing ones are added; all others keep their order.

    Tokenizers of other toolkits have no token for the blank, or use the unknown token for it.

    Arguments
    ---------
    model : bytes
        A SentencePiece model.
    blank_index, bos_index, eos_index, unk_index : int
        Ids of the special tokens.

    Returns
    -------
    bytes
        The same bytes if the ids are already right.

    Raises
    ------
    UserError
        If the bytes are not a SentencePiece model.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "train.csv").write_text("ID,wrd\\na,THE CAT SAT\\nb,A CAT AND THE HAT\\n")
    >>> train_tokenizer(folder / "train.csv", folder / "t.model", 1000, "unigram", 0, 1, 2, 3)
    >>> arranged = arrange_tokenizer((folder / "t.model").read_bytes(), 3, 0, 1, 2)
    >>> tokenizer = sentencepiece.SentencePieceProcessor(model_proto=arranged)
    >>> [tokenizer.id_to_piece(token) for token in range(4)], tokenizer.decode_ids([3, *tokenizer.encode_as_ids("THE HAT")])
    (['<s>', '</s>', '<unk>', '<pad>'], 'THE HAT')
    """
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        fields = list(_fields(model))
    except (RuntimeError, IndexError) as error:
        raise UserError(
            f"The tokenizer is damaged, or not a SentencePiece model ({one_line(error, 100)}); give another one."
        ) from error
    ids = {"blank": blank_index, "bos": bos_index, "eos": eos_index, "unk": unk_index}
    before = {"blank": tokenizer.pad_id(), "bos": tokenizer.bos_id(), "eos": tokenizer.eos_id(), "unk": tokenizer.unk_id()}
    if before == ids:
        return model
    pieces = [content for number, content in fields if number == _PIECES]
    usual = {"blank": "<pad>", "bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    names = {role: tokenizer.id_to_piece(token) if token >= 0 else usual[role] for role, token in before.items()}
    arranged = [piece for token, piece in enumerate(pieces) if token not in before.values()]
    settings = b""
    for role, token in sorted(ids.items(), key=lambda item: item[1]):
        spelled = names[role].encode()
        control = _field(_PIECE, spelled) + _number(_TYPE, _CONTROL)
        arranged.insert(token, pieces[before[role]] if before[role] >= 0 else control)
        settings += _number(_ROLES[role][0], token) + _field(_ROLES[role][1], spelled)
    others = [(number, content) for number, content in fields if number != _PIECES]
    # Repeated settings are merged, and the last value counts
    fields = [*((_PIECES, piece) for piece in arranged), *others, (_SETTINGS, settings)]
    return b"".join(_field(number, content) for number, content in fields)


def _fields(message):
    """Numbers and contents of the fields of a protocol buffer in which all fields have a length, such as SentencePiece's file."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        if key % 8 != 2:
            raise IndexError(f"field {key // 8} has no length")
        size, place = _varint(message, place)
        yield key // 8, message[place : place + size]
        place += size


def _varint(message, place):
    """A number with seven bits per byte, lowest first; and the position after it."""
    value = shift = 0
    while message[place] >= 128:
        value |= (message[place] & 127) << shift
        place, shift = place + 1, shift + 7
    return value | message[place] << shift, place + 1


def _bytes_of(value):
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + _bytes_of(value // 128)


def _field(number, content):
    return _bytes_of(8 * number + 2) + _bytes_of(len(content)) + content


def _number(number, value):
    return _bytes_of(8 * number) + _bytes_of(value)
