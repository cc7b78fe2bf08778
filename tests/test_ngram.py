"""Language models from text: probabilities agree with the formula, and the searches can read the files."""

import collections
import gzip
import math
import os
import random
import subprocess

import pytest
from speechbrain.lm.arpa import read_arpa
from speechbrain.lm.ngram import BackoffNgramLM
from test_ctc_beam import make_tokenizer, peaked
from tiny import needs_flashlight

from speechbrain_ext import cli
from speechbrain_ext.dataio.texts import read_sentences
from speechbrain_ext.decoders import ngram
from speechbrain_ext.decoders.ctc_beam import CtcBeamSearch
from speechbrain_ext.decoders.ngram import BEGIN, END, FALLBACK, UNKNOWN, write_arpa
from speechbrain_ext.decoders.word_lm import arpa_words, check_arpa
from speechbrain_ext.utils.errors import UserError

GENERATOR = random.Random(0)
WORDS = [f"W{number}" for number in range(30)]
SENTENCES = [[WORDS[min(int(GENERATOR.expovariate(0.15)), 29)] for _ in range(GENERATOR.randint(1, 9))] for _ in range(400)]
SHORT = [["A", "B"], ["A", "C"], ["A", "B", "B"]]


def reference(sentences, order, limits):
    """Modified Kneser-Ney by its formula, n-gram by n-gram: probabilities and back-off weights."""
    raw = [collections.Counter() for _ in range(order + 1)]
    for sentence in sentences:
        words = (BEGIN, *sentence, END)
        for n in range(1, order + 1):
            raw[n].update(words[i : i + n] for i in range(len(words) - n + 1))
    kinds = {word for gram in raw[1] for word in gram} - {BEGIN} | {UNKNOWN}
    probabilities, left = [{(): 1 / len(kinds)}], []
    for n in range(1, order + 1):
        counts = raw[n]
        if n < order:
            before = collections.Counter(gram[1:] for gram in raw[n + 1])
            counts = {gram: raw[n][gram] if gram[0] == BEGIN else before[gram] for gram in raw[n]}
        counts = {gram: count for gram, count in counts.items() if gram != (BEGIN,)}
        if n == 1:
            counts[UNKNOWN,] = 0
        of = [sum(count == number for count in counts.values()) for number in range(5)]
        discounts = FALLBACK
        if all(of[1:]):
            found = [i - (i + 1) * of[1] / (of[1] + 2 * of[2]) * of[i + 1] / of[i] for i in (1, 2, 3)]
            discounts = found if all(0 < found[i] < i + 1 for i in range(3)) else FALLBACK
        totals, rest, kept = collections.Counter(), collections.Counter(), {}
        for gram, count in counts.items():
            is_kept = n == 1 or raw[n][gram] > limits[n - 2]
            taken = (0 if count == 0 else discounts[min(count, 3) - 1]) if is_kept else count
            totals[gram[:-1]] += count
            rest[gram[:-1]] += taken
            if is_kept:
                kept[gram] = count - taken
        left.append({context: rest[context] / totals[context] for context in totals})
        probabilities.append(
            {gram: count / totals[gram[:-1]] + left[-1][gram[:-1]] * probabilities[-1][gram[1:]] for gram, count in kept.items()}
        )
    return probabilities[1:], left


def read(path):
    check_arpa(path)  # the search also checks it
    with open(path, encoding="utf-8") as file:
        return read_arpa(file)


@pytest.mark.parametrize(
    "sentences, keys, message",
    [
        (["THE CAT"], {}, "There is the sentence 'THE CAT'; give the list of its words"),
        ([["NEW YORK"]], {}, "There is the word 'NEW YORK'; give words without white space"),
        ([["", "A"]], {}, "There is the word ''; give"),
        (SHORT, {"vocabulary": "5"}, "vocabulary size is '5'; give a whole number"),
        (SHORT, {"prune": ["1"]}, r"counts to prune are \['1'\]; give up to 2 whole numbers"),
    ],
)
def test_what_would_make_a_broken_file_is_refused(sentences, keys, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_arpa(sentences, tmp_path / "lm.arpa", **keys)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_tool_may_have_other_spaces_in_words_and_a_last_back_off_of_zero(tmp_path):
    text = "\\data\\\nngram 1=3\nngram 2=1\n\n\\1-grams:\n-1\tC\u00a0A\ufffdT\t-0.1\n-1 <s> 0\n-1\t</s>\n\n"
    (tmp_path / "lm.arpa").write_text(text + "\\2-grams:\n-0.5\t<s> C\u00a0A\ufffdT\t0\n\n\\end\\\n")
    assert arpa_words(tmp_path / "lm.arpa") == ["C\u00a0A\ufffdT"]
    (tmp_path / "lm.arpa").write_text(text + "\\2-grams:\n-0.5\t<s> C\u00a0A\ufffdT\t-1\n\n\\end\\\n")
    with pytest.raises(UserError, match="has a number that is no logarithm"):
        check_arpa(tmp_path / "lm.arpa")


@pytest.mark.parametrize(
    "sentences, order, limits",
    [(SENTENCES, order, limits) for order in (2, 3, 4) for limits in ([0, 0, 0], [0, 1, 1], [2, 2, 2])]
    + [(SHORT, order, [0, 0]) for order in (2, 3)],
)
def test_probabilities_are_those_of_the_formula(tmp_path, sentences, order, limits):
    path = tmp_path / "lm.arpa"
    write_arpa(sentences, path, order, limits[: order - 1])
    _, found, backoffs = read(path)
    probabilities, left = reference(sentences, order, limits)
    for n, expected in enumerate(probabilities, start=1):
        flat = {(*context, word): value for context, values in found[n].items() for word, value in values.items()}
        assert flat.keys() - {(BEGIN,)} == expected.keys()
        assert all(abs(flat[gram] - math.log10(value)) < 2e-6 for gram, value in expected.items())
    for n in range(1, order):
        for context, value in left[n].items():
            if n == 1 or context in probabilities[n - 1]:
                assert abs(backoffs[n][context] - math.log10(value)) < 2e-6


@pytest.mark.parametrize("block", [1, 50])
def test_counting_in_blocks_changes_nothing(block, tmp_path, monkeypatch):
    write_arpa(SENTENCES, tmp_path / "whole.arpa", 4, [0, 1])
    monkeypatch.setattr(ngram, "BLOCK", block)
    write_arpa(SENTENCES, tmp_path / "blocks.arpa", 4, [0, 1])
    assert (tmp_path / "whole.arpa").read_bytes() == (tmp_path / "blocks.arpa").read_bytes()


def test_a_small_text_by_hand(tmp_path):
    """Bigrams of "A B" and "A C" with the discounts of small texts: 0.5 for a count of one, 1 for a count of two."""
    write_arpa([["A", "B"], ["A", "C"]], tmp_path / "lm.arpa", order=2)
    _, grams, _ = read(tmp_path / "lm.arpa")
    # Different words before A, B, C: 1 each; before the end: 2; 5 in total. Freed: (3 * 0.5 + 1) / 5 = 0.5, for 5 kinds of words
    b, end = 0.5 / 5 + 0.5 / 5, 1 / 5 + 0.5 / 5
    assert grams[1][()]["B"] == pytest.approx(math.log10(b), abs=1e-6)
    assert grams[1][()][END] == pytest.approx(math.log10(end), abs=1e-6)
    assert grams[1][()][UNKNOWN] == pytest.approx(math.log10(0.5 / 5), abs=1e-6)
    # After A: B and C once each; freed: 2 * 0.5 / 2
    assert grams[2]["A",]["B"] == pytest.approx(math.log10(0.5 / 2 + 0.5 * b), abs=1e-6)


@pytest.mark.parametrize("keys", [{}, {"prune": [1]}, {"vocabulary": 10}, {"order": 5, "prune": [0, 1], "vocabulary": 20}])
def test_the_probabilities_of_each_context_sum_to_one(tmp_path, keys):
    path = tmp_path / "lm.arpa"
    made = write_arpa(SENTENCES, path, **keys)
    _, grams, backoffs = read(path)
    words = grams[1][()].keys() - {BEGIN}
    assert len(words) == made.entries[0] - 1 == keys.get("vocabulary", 30) + 2
    assert (made.unknown > 0) == ("vocabulary" in keys)
    model = BackoffNgramLM(grams, backoffs)
    contexts = [
        (),
        ("W1",),
        ("W1", "W0"),
        (BEGIN,),
        (BEGIN, "W2"),
        ("W29", "W28"),
        (UNKNOWN,),
        ("W3", UNKNOWN),
        *list(grams[3])[:20],
    ]
    for context in contexts:
        assert sum(10 ** model.logprob(word, context) for word in words) == pytest.approx(1, abs=1e-5), context


def test_symbols_of_language_models_in_the_text(tmp_path):
    made = write_arpa([["<s>", "A", "<unk>", "</s>"], ["A", "<UNK>"]], tmp_path / "lm.arpa", order=2)
    assert (made.sentences, made.words, made.unknown, made.entries[0]) == (2, 4, 2, 4)


def test_the_beam_search_prefers_what_the_text_says(tmp_path):
    needs_flashlight()
    texts = ["THE CAT SAT", "THE CAT SAT ON A MAT", "A CAT"]
    tokenizer = make_tokenizer([*texts, "THE KAT"])
    for order in (2, 3, 6):
        write_arpa([text.split() for text in texts], tmp_path / "lm.arpa", order)
        with_lm, without = (CtcBeamSearch(tokenizer, beam_size=20, lm_file=lm) for lm in (tmp_path / "lm.arpa", None))
        with_lm.check()
        ids = [id for token in tokenizer.encode_as_ids("THE KAT SAT") for id in (token, 0)]
        log_probs, lengths = peaked([ids], tokenizer.vocab_size(), peak=0.8)
        k, c = (tokenizer.piece_to_id(letter) for letter in "KC")
        log_probs[0, ids.index(k), c] = math.log(0.15)
        assert without(log_probs, lengths) == ["THE KAT SAT"] and with_lm(log_probs, lengths) == ["THE CAT SAT"]


def test_all_kinds_of_files_give_the_same(tmp_path):
    (tmp_path / "plain.txt").write_text("the cat\n\nthe  hat\r\n", encoding="utf-8")
    (tmp_path / "plain.txt.gz").write_bytes(gzip.compress("\ufeffThe cat\nThe hat".encode()))
    (tmp_path / "1-2.trans.txt").write_text("1-2-0000\tTHE CAT\n 1-2-0001 THE HAT\n")
    (tmp_path / "run.csv").write_text("ID,duration,wav,spk_id,wrd\na,1,a.wav,s,THE CAT\nb,1,b.wav,s,the hat\n")
    (tmp_path / "nemo.jsonl").write_text(
        '{"audio_filepath": "a.wav", "text": "the cat"}\n{"audio_filepath": "b", "text": "the hat"}\n'
    )
    (tmp_path / "texts").mkdir()
    for name in ("the cat", "the hat"):
        (tmp_path / "texts" / name).write_text(name)
    (tmp_path / "files.csv").write_text("wav,text_filepath\na.wav,texts/the cat\nb.wav,texts/the hat\n")
    files = sorted(file for file in tmp_path.iterdir() if file.is_file())
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "audio.flac").write_bytes(b"\xff")
    expected = [["THE", "CAT"], ["THE", "HAT"]]
    assert [list(read_sentences([file], "upper")) for file in files] == 6 * [expected]
    assert list(read_sentences([tmp_path], "upper")) == expected  # other texts in a folder with transcripts are ignored
    (tmp_path / "1-2.trans.txt").unlink()
    assert list(read_sentences([tmp_path], "upper")) == 5 * expected
    wenet = '{"key": "a", "wav": "a.wav", "txt": "the cat"}\n{"key": "b", "wav": "b.wav", "txt": "the hat"}\n'
    array = '[\n  {"wav": "a.wav", "text": "the cat"},\n  {"wav": "b.wav", "text": "the hat"}\n]\n'
    for content in (wenet, array):  # known by its content
        (tmp_path / "data.list").write_text(content)
        assert list(read_sentences([tmp_path / "data.list"], "upper")) == expected
    (tmp_path / "kaldi").mkdir()
    (tmp_path / "kaldi" / "wav.scp").write_text("a a.wav\nb b.wav\n")
    (tmp_path / "kaldi" / "text").write_text("a the cat\nb the hat\n")
    for path in (tmp_path / "kaldi" / "text", tmp_path / "kaldi", tmp_path):
        assert list(read_sentences([path], "upper")) == expected
    (tmp_path / "chat.txt").write_text("[laughter] the cat\n{uh} the hat\n")
    assert [*map(" ".join, read_sentences([tmp_path / "chat.txt"]))] == ["[laughter] the cat", "{uh} the hat"]
    (tmp_path / "book.txt").write_text("“Don’t,” she said -- twice!\n...\n", encoding="utf-8")
    assert list(read_sentences([tmp_path / "book.txt"], "lower", only_words=True)) == [["don't", "she", "said", "twice"]]


def run(capsys, *arguments):
    try:
        status = cli.main(["ngram", *map(str, arguments)])
    except SystemExit as end:  # argparse
        status = end.code
    return status, *capsys.readouterr()


def test_the_command_writes_a_file(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat sat\nthe hat\n" * 3)
    status, out, err = run(capsys, tmp_path / "a.txt", "--out", tmp_path / "lm.arpa", "--text-normalization", "upper")
    assert (status, out) == (0, f"{tmp_path}/lm.arpa: 7 1-grams, 6 2-grams, 5 3-grams, of 6 sentences with 15 words\n")
    assert "Reading" in err and "Traceback" not in err
    _, grams, _ = read(tmp_path / "lm.arpa")
    assert grams[1][()].keys() == {"THE", "CAT", "SAT", "HAT", BEGIN, END, UNKNOWN}


def test_text_may_come_through_a_pipe_and_the_output_be_a_link(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat sat\nthe hat\n" * 3)
    (tmp_path / "link.arpa").symlink_to("real.arpa")
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cp", tmp_path / "a.txt", tmp_path / "pipe"]):
        assert run(capsys, tmp_path / "pipe", "--out", tmp_path / "link.arpa")[0] == 0
    assert run(capsys, tmp_path / "a.txt", "--out", tmp_path / "lm.arpa")[0] == 0
    assert (tmp_path / "link.arpa").is_symlink() and (tmp_path / "real.arpa").read_text() == (tmp_path / "lm.arpa").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gone.txt"], "There is no text"),
        (["empty.txt"], "The text holds no words"),
        (["cut.txt.gz"], "cannot be decompressed to its end"),
        (["latin.txt"], "latin.txt is not text in UTF-8"),
        (["lm.txt"], "lm.txt is a language model in ARPA format, not text"),
        (["a.txt", "--out", "a.txt"], "a.txt is one of the texts, which would be lost; give another file"),
        (["folder/..", "--out", "a.txt"], "a.txt is one of the texts"),
        (["table.csv"], "table.csv, line 2: no transcript; mend or remove this line, or give a manifest with the column wrd"),
        (["more.csv"], "more.csv, line 3: wrong number of columns (4 instead of 3); mend"),
        (["flawed.jsonl"], "flawed.jsonl, line 2: not valid JSON"),
        (["latin.csv"], "latin.csv, line 2: not UTF-8 (transcript: 'caf"),
        (["folder"], "folder holds no text"),
        (
            ["a.txt", "--tokens", "a.txt"],
            "The tokenizer a.txt cannot be used (a.txt is damaged, or not a SentencePiece model); give",
        ),
        (["a.txt", "--tokens", "nowhere"], "There is no model or tokenizer nowhere; give a model folder"),
        (["a.txt", "--order", "1"], "The order is 1; give 2 to 6"),
        (["a.txt", "--order", "7"], "The order is 7"),
        (["a.txt", "--order", "three"], "invalid int value"),
        (["a.txt", "--order", "6"], "no n-grams of order 6"),
        (["a.txt", "--prune", "9"], "no n-grams of order 2"),
        (["a.txt", "--prune", "1", "0"], "counts to prune are [1, 0]"),
        (["a.txt", "--vocabulary", "0"], "vocabulary size is 0"),
        (["a.txt", "--text-normalization", "title"], "text_normalization is 'title'"),
        (["a.txt", "--out", "folder"], "folder is a folder"),
        (["a.txt", "--out", "lm.arpa.gz"], "lm.arpa.gz would not be compressed; give a name that ends in .arpa"),
        (["a.txt", "--out", "gone/lm.arpa"], "No such file or directory"),
        (["a.txt", "--out", ""], "The file to write has no name; give one"),
        (["a.txt", "--out", "pipe"], "pipe is a pipe or device, not a file; give the name of a file"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the cat sat\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"the cat sat\n" * 1000)[:-20])
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "lm.txt").write_text("\n\\data\\\nngram 1=1\n")
    (tmp_path / "table.csv").write_text("ID,wav\na,a.wav\n")
    (tmp_path / "more.csv").write_text("ID,wav,wrd\na,a.wav,the\nb,b.wav,cat, sat\n")
    (tmp_path / "flawed.jsonl").write_text('{"wav": "a.wav", "text": "the"}\n{"wav": "b.wav"\n')
    (tmp_path / "latin.csv").write_bytes("ID,wav,wrd\na,a.wav,caf\xe9\n".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, *arguments, *([] if "--out" in arguments else ["--out", "lm.arpa"]))
    assert status == 2 and out == "" and message in err and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before, "a file is there completely or not at all"
