"""``ngram``: a language model from text."""

from speechbrain_ext.cli._common import usage


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "ngram",
        help="make a language model from text",
        description="Write an n-gram language model (interpolated modified Kneser-Ney) as an ARPA file: of words for the CTC "
        "beam search, or with --tokens of tokens for all beam searches. It needs 0.6 GB of memory, 24 bytes for each word or "
        "token of the text, and up to 60 for each different n-gram.",
    )
    parser.add_argument(
        "texts",
        metavar="TEXT",
        nargs="+",
        help="a file with a sentence per line, a .trans.txt of LibriSpeech, a folder of Kaldi, a manifest in CSV or JSON, "
        "or a folder of such files; also as .gz",
    )
    parser.add_argument("--out", metavar="LM.arpa", required=True, help="the file to write")
    parser.add_argument("--order", type=int, metavar="N", default=3, help="words of the longest n-grams (3)")
    parser.add_argument(
        "--prune",
        type=int,
        nargs="+",
        metavar="TIMES",
        default=[0],
        help="leave out n-grams that occur at most this often: bigrams, trigrams and so on; the last number is for all longer "
        "n-grams (0)",
    )
    parser.add_argument("--vocabulary", type=int, metavar="N", help="keep only the N most frequent words; by default all")
    parser.add_argument(
        "--text-normalization",
        metavar="CASE",
        default="none",
        help="none, upper or lower, as in the training of the model (none)",
    )
    parser.add_argument("--words-only", action="store_true", help="leave out punctuation, for text other than transcripts")
    parser.add_argument(
        "--tokens",
        metavar="MODEL",
        help="n-grams of tokens instead of words, with the tokenizer of a model: a folder, a repository or a SentencePiece file",
    )
    parser.set_defaults(run=run)


def run(arguments):
    """Write a language model, and print its numbers of n-grams."""
    with usage():
        from speechbrain_ext.dataio.texts import read_sentences
        from speechbrain_ext.decoders.ngram import write_arpa
        from speechbrain_ext.decoders.token_ngram import in_tokens
        from speechbrain_ext.model_folder.weights import read_tokenizer

        form = (arguments.text_normalization, arguments.words_only)
        sentences = read_sentences(arguments.texts, *form, progress=True, output=arguments.out)
        if arguments.tokens is not None:
            sentences = in_tokens(sentences, read_tokenizer(arguments.tokens))
        made = write_arpa(sentences, arguments.out, arguments.order, arguments.prune, arguments.vocabulary, progress=True)
    unknown = f", {100 * made.unknown / made.words:.2f} % of them unknown" if made.unknown else ""
    entries = ", ".join(f"{count:,} {order}-grams" for order, count in enumerate(made.entries, start=1))
    kind = "words" if arguments.tokens is None else "tokens"
    print(f"{arguments.out}: {entries}, of {made.sentences:,} sentences with {made.words:,} {kind}{unknown}")
    return 0
