"""Choices of search, beam size, phrases and language model: in any order, in place of earlier ones, used or refused."""

import itertools
import re

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from speechbrain.decoders.scorer import CoverageScorer, LengthScorer, ScorerBuilder
from test_lm import SIZES, TRANSFORMER, TransformerLM, write
from tiny import SENTENCES, SMALL_TRANSDUCER, make_corpus, make_model, needs_flashlight

from speechbrain_ext import cli
from speechbrain_ext.dataio.tokenizer import arrange_tokenizer
from speechbrain_ext.decoders.ngram import write_arpa
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.choices import Choices
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import read_csv

WAVS, LENS = 0.1 * torch.randn(2, 20000, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 0.7])
PHRASES = {"SAD DAY": 60.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models of CTC, a decoder, and transducers with a beam of 4 and of 1; language models; phrases; test sets."""
    folder = tmp_path_factory.mktemp("choices")
    for name, layers, keys in (
        ("ctc", 0, {}),
        ("joint", 1, {}),
        ("transducer", 0, SMALL_TRANSDUCER),
        ("greedy", 0, {**SMALL_TRANSDUCER, "transducer_beam": "1"}),
    ):
        (folder / name).mkdir()
        make_model(folder / name, layers, "hyperconformer" + "_transducer" * (name in ("transducer", "greedy")), **keys)
    data = (folder / "joint" / "model" / "tokenizer.ckpt").read_bytes()
    tokenizer = SentencePieceProcessor(model_proto=data)
    torch.manual_seed(0)
    weights = {key: 4 * value if value.dim() == 2 else value for key, value in TransformerLM(25, **SIZES).state_dict().items()}
    write(folder / "neural", TRANSFORMER, weights, arrange_tokenizer(data, 24, 1, 2, 0))
    write_arpa([tokenizer.encode_as_pieces(text) for text in SENTENCES], folder / "tokens.arpa", order=3)
    write_arpa([text.split() for text in SENTENCES], folder / "words.arpa", order=2)
    (folder / "phrases.txt").write_text("SAD DAY\t60\n")
    make_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    """Models; a refused choice leaves them as they were."""
    return {name: load_model(place / name / "model", "cpu") for name in ("ctc", "joint", "transducer", "greedy")}


@pytest.fixture
def model_of(place):
    return lambda name: load_model(place / name / "model", "cpu")


def texts(model):
    return model.transcribe_batch(WAVS, LENS)[0]


def run(capsys, place, command, model, *options):
    """The exit status, output and errors of a command."""
    source = place / "corpus" / "test-tiny" if command == "evaluate" else place / "ctc" / "short.flac"
    named = {"P": place / "phrases.txt", "T": place / "tokens.arpa", "W": place / "words.arpa", "N": place / "neural"}
    options = [str(named.get(option, option)) for option in options]
    status = cli.main([command, "--model", str(place / model / "model"), "--device", "cpu", str(source), *options])
    return status, *capsys.readouterr()


BEAMS = "choose ctc_beam or joint_beam or ctc_rescored"
REFUSED = [
    # a search that does not use what is given
    (
        "joint",
        "--search ctc_beam --lm N",
        "uses ctc_beam, but the language model .*neural is for joint_beam and ctc_rescored only",
    ),
    ("joint", "--search ctc_greedy --lm N", f"uses ctc_greedy, which takes no phrases or language models; {BEAMS}"),
    ("joint", "--search ctc_greedy --lm T", "uses ctc_greedy, which takes no"),
    ("joint", "--search ctc_greedy --phrases P", "uses ctc_greedy, which takes no"),
    ("ctc", "--search ctc_greedy --phrases P", "uses ctc_greedy, which takes no .*; choose ctc_beam, or leave them out"),
    ("ctc", "--search ctc_greedy --lm W", "uses ctc_greedy, which takes no"),
    ("ctc", "--lm N", "a model without an attention decoder takes only ARPA files"),
    ("joint", "--search ctc_rescored --lm W", "but the language model .*words.arpa is for ctc_beam only"),
    ("transducer", "--search transducer_greedy --phrases P", "choose ctc_beam or transducer_beam"),
    ("transducer", "--lm N", "takes only ARPA files"),
    # a beam of 1, or no beam
    ("transducer", "--beam-size 1 --phrases P", "uses transducer_greedy, which takes no .*; give a beam size above 1"),
    ("transducer", "--beam-size 1 --lm T", "give a beam size above 1"),
    ("transducer", "--search transducer_beam --beam-size 1", "The beam size of transducer_beam is 1; give 2 or more"),
    ("transducer", "--search transducer_greedy --beam-size 4", "uses transducer_greedy, which has no beam"),
    ("greedy", "--phrases P", "give a beam size above 1"),
    ("greedy", "--search transducer_beam --lm T", "The beam size of transducer_beam is 1"),
    ("joint", "--search ctc_rescored --beam-size 1", "The beam size of ctc_rescored is 1"),
    ("ctc", "--beam-size 4", "uses ctc_greedy, which has no beam; choose ctc_beam, or leave the beam size out"),
    # options that the language model does not use
    (
        "ctc",
        "--lm W --phrases P --search ctc_beam",
        "is of words, and ctc_beam does not use it together with phrases; leave out --phr",
    ),
    ("ctc", "--lm T --lodr-weight 0.2", "--lodr-weight is given, but there is no --lodr"),
    ("ctc", "--lm T --word-score 2", "--word-score is given, but .*tokens.arpa is of tokens"),
    ("ctc", "--lm W --lodr T", "--lodr is given, but .*words.arpa is of words"),
    ("joint", "--lm N --lodr T", "--lodr is given, but .*neural is of SpeechBrain"),
    ("ctc", "--lm W --lm-temperature 2", "--lm-temperature is given, but .*words.arpa is of words"),
    ("ctc", "--word-score 2", "--word-score is given, but there is no language model"),
    # numbers
    ("ctc", "--lm T --lm-weight 1e30", "tokens.arpa is 1e\\+30; give a number from 0 to 100"),
    ("joint", "--lm N --lm-weight=-1", "neural is -1.0; give a number from 0 to 100"),
    ("ctc", "--lm T --lodr T --lodr-weight 1e5", "tokens.arpa is 100000.0; give a number from 0 to 100"),
    ("ctc", "--lm W --word-score 1e9", "word_score is 1000000000.0; give a number from -100 to 100"),
    # files
    ("ctc", "--lm none.arpa", "There is no language model none.arpa; give the path of an ARPA file"),
    ("joint", "--lm none", "There is no language model none; give an ARPA file, a folder, or user/model of Hugging Face"),
    ("joint", "--lm ", "There is no language model ''; give an ARPA file"),
]


@pytest.mark.parametrize("model, options, message", REFUSED, ids=[f"{model} {options}" for model, options, _ in REFUSED])
def test_what_no_search_uses_is_refused(model, options, message, place, loaded, capsys, monkeypatch):
    if "--lm W" in options:
        needs_flashlight()
    monkeypatch.setattr("speechbrain_ext.inference.load_model", lambda *_: loaded[model])
    for command in ("transcribe", "stream", "evaluate"):
        status, out, err = run(capsys, place, command, model, *options.split(" "))
        lines = [line for line in err.splitlines() if line.startswith("speechbrain_ext: ")]
        assert (status, out, len(lines)) == (2, "", 1) and re.search(message, lines[0]), (command, err)
        assert loaded[model].choices == Choices()


@pytest.mark.parametrize("name", ["ctc", "joint", "transducer", "greedy"])
def test_the_order_of_choices_does_not_matter(name, loaded, place):
    """Together, all orders give the same; one by one, each order gives it too, or an error that names what to do."""
    steps = {
        "beam": lambda model: model.choose_beam(4),
        "phrases": lambda model: model.choose_phrases(PHRASES),
        "lm": lambda model: model.choose_lm(place / "tokens.arpa"),
    }
    model, found = loaded[name], []

    def choose(order):
        for step in order:
            steps[step](model)

    for order in itertools.permutations(steps):
        with model.choosing():
            choose(order)
        found.append((model.own_search, model.beam_of(model.own_search), model.search_settings))
        take_out(model)
        try:
            choose(order)
        except UserError as error:
            remedy = "choose ctc_beam, or leave" if name == "ctc" else "give a beam size above 1"
            assert name in ("ctc", "greedy") and remedy in str(error)
        else:
            found.append((model.own_search, model.beam_of(model.own_search), model.search_settings))
            answer = texts(model)
        take_out(model)
    beams = {"ctc": "ctc_beam", "joint": "joint_beam", "transducer": "transducer_beam", "greedy": "transducer_beam"}
    assert found == [(beams[name], 4, found[0][2])] * len(found) and found[0][2].keys() == {"search", "beam", "phrases", "lm"}
    assert all("SAD DAY" in text for text in answer)


def take_out(model):
    with model.choosing():
        model.choose_search(None)
        model.choose_beam(None)
        model.choose_phrases(None)
        model.choose_lm(None)
    assert model.choices == Choices() and not model.graphs
    assert model.search_settings == {"search": model.own_search, "beam": model.beam_of(model.own_search)}


def test_a_choice_that_is_refused_changes_nothing(model_of, place):
    model = model_of("transducer")
    model.choose_phrases(PHRASES)
    before = model.choices, model.mods.decoder.graphs, texts(model)
    for wrong in (
        lambda: model.choose_beam(1),
        lambda: model.choose_search("transducer_greedy"),
        lambda: model.choose_lm(place / "words.arpa"),
        lambda: model.choose_lm(place / "tokens.arpa", lodr=place / "words.arpa"),
        lambda: model.choose_phrases({"é": None}),
    ):
        with pytest.raises(UserError):
            wrong()
        assert (model.choices, model.mods.decoder.graphs, texts(model)) == before


@pytest.mark.parametrize(
    "name, search", [("joint", "joint_beam"), ("joint", "ctc_rescored"), ("ctc", None), ("transducer", None)]
)
def test_a_choice_replaces_the_one_before(name, search, model_of, place):
    if name == "ctc":
        needs_flashlight()
    kinds = [
        place / "tokens.arpa",
        *([place / "neural"] if name == "joint" else []),
        *([place / "words.arpa"] if search is None else []),
    ]
    if name == "transducer":
        kinds = kinds[:1]
    model, fresh = model_of(name), {}
    model.choose_search(search)
    for kind in [None, *kinds]:
        model.choose_lm(None)
        model.choose_lm(kind)
        fresh[kind] = texts(model), model.own_search, model.search_settings
    assert len({tuple(answer) for answer, *_ in fresh.values()}) == len(fresh)
    model = model_of(name)
    model.choose_search(search)
    for kind in [*kinds, *reversed(kinds), None, kinds[0]]:
        model.choose_lm(kind)
        assert (texts(model), model.own_search, model.search_settings) == fresh[kind]
    model.choose_lm(kinds[-1], weight=0)
    assert (texts(model), model.own_search, model.search_settings) == fresh[None]
    for phrases in (PHRASES, PHRASES, {"TEA": 1.0}, None):
        model.choose_phrases(phrases)
        assert len(model.graphs) == (phrases is not None) and model.phrases == tuple(phrases or ())
    assert (texts(model), model.own_search, model.search_settings) == fresh[None]


def test_an_n_gram_of_words_gives_the_same_everywhere(place, capsys, model_of):
    """In transcribe, evaluate and Python, with the times of words; in a stream it rewrites the segment."""
    needs_flashlight()
    model = model_of("ctc")
    plain = model.transcribe_file(place / "ctc" / "short.flac")
    model.choose_lm(place / "words.arpa", word_score=3.0)
    expected = model.transcribe_file(place / "ctc" / "short.flac")
    assert expected != plain and set(expected.split()) <= set(" ".join(SENTENCES).split())
    (segment,) = model.transcribe_segments(*[torch.stack([model.load_audio(place / "ctc" / "short.flac")]), torch.ones(1)])
    assert segment.text == expected == " ".join(word.text for word in segment.words)
    for search in ([], ["--search", "ctc_beam"]):
        status, out, _ = run(capsys, place, "transcribe", "ctc", "--lm", "W", "--word-score", "3", *search)
        assert status == 0 and out.split("\t")[1].strip() == expected
    status, out, _ = run(capsys, place, "stream", "ctc", "--lm", "W", "--word-score", "3")
    assert status == 0 and set(out.split("\t")[2].split()) <= set(" ".join(SENTENCES).split())
    assert model.beam_of("ctc_beam") == 100
    model.choose_beam(5)
    assert model.beam_of("ctc_beam") == 5 and model.transcribe_file(place / "ctc" / "short.flac")
    status, out, _ = run(capsys, place, "evaluate", "joint", "--lm", "W", "--output", place / "words.csv", "--beam-size", "7")
    rows = read_csv(place / "words.csv")
    assert [(row["search"], row["lm"], row["lm_weight"], row["word_score"], row["beam_size"]) for row in rows] == [
        ("joint_beam", "", "", "", "7"),
        ("ctc_beam", str(place / "words.arpa"), "0.5", "1.5", "7"),
    ]
    assert [row["lm_unknown"] for row in rows] == ["", "0.0"]
    # Without other choices, it is compared with the search that the same options of transcribe give
    status, out, _ = run(capsys, place, "evaluate", "transducer", "--lm", "W", "--beam-size", "1")
    assert status == 0 and [line.split()[1] for line in out.splitlines()] == ["transducer_greedy:", "ctc_beam:"]
    status, out, _ = run(capsys, place, "evaluate", "transducer", "--lm", "W", "--lm-weight", "0")
    assert status == 0 and [line.split()[1] for line in out.splitlines()] == ["transducer_beam:"]


def test_rows_state_what_each_search_used(place, capsys, tmp_path):
    searches = [part for name in ("ctc_greedy", "ctc_beam", "ctc_rescored", "joint_beam") for part in ("--search", name)]
    given = [["--lm", "N"], ["--lm", "T", "--lodr", "T"], []]
    for options in given:
        assert run(capsys, place, "evaluate", "joint", *searches, *options, "--output", tmp_path / "rows.csv")[0] == 0
    neural, tokens = ("neural", "0.6", "1.15", "", ""), ("tokens.arpa", "0.3", "", "tokens.arpa", "0.15")
    nothing = ("", "", "", "", "")
    columns = ("lm", "lm_weight", "lm_temperature", "lodr", "lodr_weight")
    rows = read_csv(tmp_path / "rows.csv")
    found = [tuple(row[column].rpartition("/")[2] for column in columns) for row in rows]
    assert found == [nothing, nothing, neural, neural, nothing, tokens, tokens, tokens, *[nothing] * 4]
    names = ["ctc_greedy", "ctc_beam", "ctc_rescored"]
    assert [row["search"] for row in rows] == [*names, "joint_beam_lm", *names, "joint_beam_lm", *names, "joint_beam"]
    assert [row["beam_size"] for row in rows[:4]] == ["", "16", "16", "2"]


def test_evaluate_says_that_no_phrase_is_said(place, capsys, tmp_path):
    (tmp_path / "phrases.txt").write_text("SAND\nTEA HAT\n")
    status, out, _ = run(capsys, place, "evaluate", "ctc", "--phrases", tmp_path / "phrases.txt")
    assert status == 0 and "test-tiny ctc_beam: none of the phrases is said in test-tiny\n" in out


@pytest.mark.parametrize("scorer", [CoverageScorer(24), LengthScorer(24)])
def test_rescoring_refuses_scorers_that_it_cannot_use(scorer, model_of):
    model = model_of("joint")
    name = type(scorer).__name__.lower().removesuffix("scorer")
    search = model.mods.decoder
    search.scorer = ScorerBuilder({name: 0.2}, [scorer])
    with pytest.raises(UserError, match=f"The model's search has the scorer {name}, which ctc_rescored cannot use"):
        model.choose_search("ctc_rescored")
    search.scorer.weights = {name: 0.0}
    model.choose_search("ctc_rescored")


@pytest.mark.parametrize("search", ["ctc_beam", "ctc_rescored"])
@pytest.mark.parametrize("phrases", [None, PHRASES])
def test_a_model_that_has_diverged_is_an_error_of_one_sentence(search, phrases, model_of):
    model = model_of("joint")
    model.choose_search(search)
    model.choose_phrases(phrases)
    with torch.no_grad():
        next(model.ctc_head.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="The log-probabilities hold NaN or infinity; take an earlier checkpoint"):
        texts(model)
