"""The tokenizer of a training run."""

import csv
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import sentencepiece

from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.files import file_digest, replacing, write_text

TOKEN_TYPES = ("unigram", "bpe", "char")


def train_tokenizer(manifest, path, vocab_size, token_type, blank_index, bos_index, eos_index, unk_index):
    """Train a SentencePiece tokenizer on the transcripts of a manifest, unless its file is there already, made of the same.

    ``<path>.from`` says what the file was made of; where transcripts or settings have changed, it is made again.

    Arguments
    ---------
    manifest : str
        CSV file with a column ``wrd``.
    path : str
        The model file to write, complete or not at all.
    vocab_size : int
        The number of tokens; where the transcripts do not give as many, there are fewer.
    token_type : str
        ``unigram``, ``bpe`` or ``char``.
    blank_index, bos_index, eos_index, unk_index : int
        Ids of the special tokens. The tokenizer knows the blank as padding: no text has it, and decoding leaves it out.

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
            sentence_iterator=iter(transcripts),
            model_writer=model,
            model_type=token_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",  # the transcripts have their form already
            pad_id=blank_index,
            bos_id=bos_index,
            eos_id=eos_index,
            unk_id=unk_index,
            num_threads=1,  # the result depends on the number
            max_sentence_length=100_000,  # bytes; longer transcripts would be left out
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        characters = len(set("".join(transcripts)))
        raise UserError(
            f"No {token_type} tokenizer of {vocab_size} tokens can be made from transcripts with {characters} different "
            f"characters; raise vocab_size ({one_line(error)})."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        file.write(model.getvalue())
    write_text(made_of, f"{origin} {file_digest(path)}")


def unknown_characters(tokenizer, transcripts):
    """Characters of transcripts that no token of a tokenizer stands for.

    Arguments
    ---------
    tokenizer : sentencepiece.SentencePieceProcessor
        The tokenizer.
    transcripts : iterable of str
        In the form of :func:`~speechbrain_ext.dataio.text.normal_form`.

    Returns
    -------
    collections.Counter
        In how many transcripts each is.

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
        if not doubtful.isdisjoint(text):  # which may still be part of a longer token
            pieces = tokenizer.encode_as_immutable_proto(text).pieces
            counts.update({character for piece in pieces if piece.id == unknown for character in piece.surface})
    return counts
