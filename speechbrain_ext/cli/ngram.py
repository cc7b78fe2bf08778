"""``ngram``: a language model from text."""

from speechbrain_ext.cli._common import usage


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "ngram",
        help="make a language model from text",
        description="Write a word n-gram language model (interpolated modified Kneser-Ney) as an ARPA file, which the CTC beam "
        "search takes, or with --tokens one of tokens, which all beams take. It needs up to 80 bytes of memory for each word of "
        "the text.",
    )
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="+",
        help="a file of a sentence a line, a LibriSpeech .trans.txt, a CSV or JSON manifest, or a folder of such, gzipped or not",
    )
    parser.add_argument("--out", metavar="LM.arpa", required=True, help="the file to write")
    parser.add_argument("--order", type=int, metavar="N", default=3, help="words of the longest n-grams (3)")
    parser.add_argument(
        "--prune",
        type=int,
        nargs="+",
        metavar="TIMES",
        default=[0],
        help="leave out n-grams no more often than that: bigrams, trigrams and so on; the last number is for all that follow (0)",
    )
    parser.add_argument("--vocabulary", type=int, metavar="N", help="know only the N most frequent words; by default all")
    parser.add_argument(
        "--text-normalization", metavar="CASE", default="none", help="none, upper or lower, as the model's training had it (none)"
    )
    parser.add_argument("--words-only", action="store_true", help="leave out punctuation, for text that is no transcript")
    parser.add_argument(
        "--tokens",
        metavar="MODEL",
        help="of the tokens of this model, a folder, a repository or a SentencePiece file, and not of words",
    )
    parser.set_defaults(run=run)


def run(arguments):
    """Write a language model, and print what it holds."""
    with usage():
        from speechbrain_ext.dataio.texts import read_sentences
        from speechbrain_ext.decoders.ngram import write_arpa
        from speechbrain_ext.decoders.token_ngram import in_tokens
        from speechbrain_ext.model_folder.weights import read_tokenizer

        sentences = read_sentences(arguments.texts, arguments.text_normalization, arguments.words_only, progress=True)
        if arguments.tokens is not None:
            sentences = in_tokens(sentences, read_tokenizer(arguments.tokens))
        made = write_arpa(sentences, arguments.out, arguments.order, arguments.prune, arguments.vocabulary, progress=True)
    unknown = f", {100 * made.unknown / made.words:.2f} % of them unknown" if made.unknown else ""
    entries = ", ".join(f"{count:,} {order}-grams" for order, count in enumerate(made.entries, start=1))
    kind = "words" if arguments.tokens is None else "tokens"
    print(f"{arguments.out}: {entries}, of {made.sentences:,} sentences with {made.words:,} {kind}{unknown}")
    return 0
