"""Phrases in every beam: their scores are added and subtracted correctly, and they are found; n-best texts and rescoring."""

import itertools
import math

import pytest
import soundfile
import torch
from sentencepiece import SentencePieceProcessor
from speechbrain.decoders.scorer import ScorerBuilder
from speechbrain.nnet.linear import Linear
from test_search import model as joint_parts
from test_search import scorers
from tiny import ROOT, SENTENCES, make_model

from speechbrain_ext import cli
from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.dataio.tokenizer import is_special
from speechbrain_ext.decoders import ctc_prefix, token_graph
from speechbrain_ext.decoders.ctc_nbest import ctc_nbest
from speechbrain_ext.decoders.phrases import BONUS, phrase_graph, read_phrases
from speechbrain_ext.decoders.rescoring import rescore
from speechbrain_ext.decoders.searchers import S2STransformerBeamSearcher
from speechbrain_ext.decoders.token_graph import TokenGraph
from speechbrain_ext.decoders.transducer import TransducerSearch
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.streaming import StreamingRecognizer
from speechbrain_ext.lobes.transducer import Transducer
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import read_csv

FOLDERS = ROOT / "tests" / "data" / "model_folders"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phrases")
    make_model(folder, 1)
    return folder


@pytest.fixture(scope="module")
def tokenizer(place):
    return SentencePieceProcessor(str(place / "model" / "tokenizer.ckpt"))


def value(graph, tokens):
    """The score that a graph adds to a text, and to each of its beginnings."""
    places, on_the_way = token_graph.begin([graph], 1), [0.0]
    for token in tokens:
        on_the_way.append(on_the_way[-1] + token_graph.added([graph], places)[0, token].item())
        places = token_graph.advance([graph], places, torch.tensor([token]))
    return on_the_way[-1] + token_graph.ends([graph], places).item(), on_the_way


PHRASES = {"A CAT": 3.0, "CAT": 2.0, "A": 0.5, "CAT SAT": 4.0, "THE TEA IS HOT": 5.0, "TEA": 1.0, "HAT AND A CAT": None}


def test_a_text_is_worth_the_phrases_in_it(tokenizer):
    """Phrases may overlap, begin alike and contain one another; words that only begin like a phrase get no bonus."""
    graph, ids = phrase_graph(PHRASES, tokenizer), tokenizer.encode_as_ids
    worth = PHRASES | {"HAT AND A CAT": BONUS * len(ids("HAT AND A CAT"))}
    for text in [
        *SENTENCES,
        "CATS",
        "A CATS A CAT SAT CAT SAT",
        "THE TEA IS HOTA",
        "TEA A HAT AND A CATE",
        "THE TEA IS",
        "ASAT A",
    ]:
        words = text.split()
        expected = sum(
            bonus * sum(words[i : i + len(phrase.split())] == phrase.split() for i in range(len(words)))
            for phrase, bonus in worth.items()
        )
        assert value(graph, ids(text))[0] == pytest.approx(expected, abs=1e-4), text
    # A partial bonus is added on the way; the blank and other special tokens change nothing
    on_the_way = value(graph, ids("THE TEA IS HOT"))[1]
    assert on_the_way[1] > 0 and on_the_way[1] < on_the_way[2] < on_the_way[-1]
    with_blanks = [token for each in ids("THE CAT SAT") for token in (0, each, 3)]
    assert value(graph, with_blanks)[0] == pytest.approx(value(graph, ids("THE CAT SAT"))[0], abs=1e-4)


def log_probs_of(batch=3, frames=24, tokens=25, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, frames, tokens, generator=generator)).log_softmax(-1)


def test_the_n_best_texts_are_those_of_all_alignments():
    log_probs = log_probs_of(2, 5, 3)
    for row, count, texts in zip(log_probs, (5, 3), ctc_nbest(log_probs, torch.tensor([1.0, 0.6]), beam_size=200), strict=True):
        totals = {}
        for path in itertools.product(range(3), repeat=count):
            text = tuple(token for token, _ in itertools.groupby(path) if token)
            score = sum(row[frame, token].item() for frame, token in enumerate(path))
            totals[text] = totals.get(text, 0.0) + math.exp(score)
        found = {tuple(text.tokens): math.exp(text.score) for text in texts}
        assert len(found) == len(texts) and found == pytest.approx(totals, rel=1e-3)
        assert [text.score for text in texts] == sorted((text.score for text in texts), reverse=True)
        assert all(text.frames == sorted(set(text.frames)) and len(text.frames) == len(text.tokens) for text in texts)


def test_n_best_texts_do_not_depend_on_the_batch(tokenizer):
    graph, lengths = phrase_graph(PHRASES, tokenizer), (24, 13, 1)
    log_probs = log_probs_of()
    together = ctc_nbest(log_probs, torch.tensor(lengths) / 24, excluded=(1, 2, 3), graphs=[graph])
    for row, count, texts in zip(log_probs, lengths, together, strict=True):
        (alone,) = ctc_nbest(row[None, :count], torch.ones(1), excluded=(1, 2, 3), graphs=[graph])
        assert [text.tokens for text in texts] == [text.tokens for text in alone]
        assert [text.score for text in texts] == pytest.approx([text.score for text in alone], abs=1e-4)
        assert not {1, 2, 3}.intersection(*[text.tokens for text in texts])
    assert ctc_nbest(log_probs[:, :0], torch.ones(3))[0][0].tokens == []


def nothing(tokens):
    """A graph of several states that adds nothing."""
    entries = torch.arange(tokens, 5 * tokens), torch.zeros(4 * tokens), torch.randint(5, (4 * tokens,))
    states, kinds = torch.zeros(5, dtype=torch.long), torch.zeros(tokens, dtype=torch.long)
    return TokenGraph(torch.zeros(tokens), torch.randint(5, (tokens,)), entries, states, torch.zeros(5, 1), torch.zeros(5), kinds)


def scores_with(graphs):
    """The best texts of each kind of beam, with their scores."""
    torch.manual_seed(0)
    transducer = TransducerSearch(Transducer(8, 25, predictor_size=8, joint_size=16), beam_size=4).eval()
    transducer.transducer.out.weight.data.mul_(8)
    transducer.graphs = graphs
    net, seq_lin, ctc_lin = joint_parts()
    keys = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.0, "max_decode_ratio": 0.5, "beam_size": 4}
    joint = S2STransformerBeamSearcher([net, seq_lin], **keys, excluded=[0, 1], scorer=scorers("partial", ctc_prefix, ctc_lin))
    joint.graphs = graphs if not graphs or len(graphs[0].root) == 40 else [nothing(40)]
    generator = torch.Generator().manual_seed(5)
    frames, others = torch.randn(2, 20, 32, generator=generator), torch.randn(2, 20, 8, generator=generator)
    tokens, _, scores, _ = joint(frames, torch.tensor([1.0, 0.7]))
    return [
        [(each[0].tokens, each[0].score) for each in ctc_nbest(log_probs_of(2), torch.tensor([1.0, 0.5]), graphs=graphs)],
        [each[::2] for each in transducer.hypotheses(others, torch.tensor([1.0, 0.5]))],
        list(zip(tokens, scores.flatten().tolist(), strict=True)),
    ]


def test_graphs_that_add_nothing_change_nothing():
    plain, with_graph = scores_with([]), scores_with([nothing(25)])
    assert plain == with_graph and all(text for kind in plain for text, _ in kind)


def test_phrases_that_are_not_said_are_refunded(tokenizer):
    """The score of a text without a phrase does not change; partial bonuses on the way are subtracted again."""
    phrases = {"THE DAY IS SAD AND HOT": 0.2, "SHE IS A DAY": 0.1}
    plain, with_phrases = (scores_with(graphs)[:2] for graphs in ([], [phrase_graph(phrases, tokenizer)]))
    for before, after in zip(plain, with_phrases, strict=True):
        assert [text for text, _ in before] == [text for text, _ in after]
        assert [score for _, score in before] == pytest.approx([score for _, score in after], abs=1e-4)


@pytest.mark.parametrize("search", ["ctc_beam", "joint_beam", "ctc_rescored", "transducer_beam"])
def test_a_phrase_that_is_worth_enough_is_found(search, place):
    model = load_model(FOLDERS / "transducer-v1" if search == "transducer_beam" else place / "model", "cpu")
    model.choose_search(search)
    wavs = 0.1 * torch.randn(2, 30000, generator=torch.Generator().manual_seed(0))
    plain = model.transcribe_batch(wavs, torch.tensor([1.0, 0.8]))[0]
    assert not any("SAD" in text.split() for text in plain)
    model.choose_phrases({"SAD": 60.0, "SHE HAS": 0.0})
    found, _ = model.transcribe_batch(wavs, torch.tensor([1.0, 0.8]))
    assert all("SAD" in text.split() for text in found) and model.search_settings["phrases"]["SAD"] == 60
    assert model.transcribe_batch(wavs[:1], torch.ones(1))[0] == found[:1]


def test_phrases_of_no_worth_leave_every_search_as_it_is(place):
    wavs = 0.1 * torch.randn(2, 30000, generator=torch.Generator().manual_seed(0))
    for folder, search in (
        ("joint", "ctc_beam"),
        ("joint", "joint_beam"),
        ("joint", "ctc_rescored"),
        ("transducer", "transducer_beam"),
    ):
        models = [load_model(FOLDERS / f"{folder}-v1", "cpu") for _ in range(2)]
        models[1].choose_phrases({"THE TEA": 0.0, "HAT": 0.0})
        answers = []
        for model in models:
            model.choose_search(search)
            answers.append(model.transcribe_batch(wavs, torch.tensor([1.0, 0.7])))
        assert answers[0] == answers[1]


def test_rescoring_is_the_joint_search_over_all_texts():
    """All texts of up to two tokens, of a vocabulary of two: the best text and score are those of the joint search, which ends
    longer texts without a score for their end."""
    net, seq_lin, ctc_lin = joint_parts()
    keys = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.0, "max_decode_ratio": 1.0, "beam_size": 30}
    excluded = [0, 1, 3, *range(6, 40)]
    scorer = scorers("full", ctc_prefix, ctc_lin)
    search = S2STransformerBeamSearcher([net, seq_lin], **keys, excluded=excluded, scorer=scorer, using_eos_threshold=False)
    fitting = 0
    for seed in range(12):
        frames = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(seed))
        log_probs = ctc_lin(frames).log_softmax(-1)
        (texts,) = ctc_nbest(log_probs, torch.ones(1), beam_size=30, excluded=[*excluded, 2])
        texts = [text for text in texts if len(text.tokens) < 3]
        scores, best = rescore(search, frames[0], texts)
        tokens, _, (score,), _ = search(frames, torch.ones(1))
        if len(tokens[0]) < 3:
            assert (
                best == scores.index(max(scores))
                and texts[best].tokens == tokens[0]
                and max(scores) == pytest.approx(float(score), abs=1e-3)
            )
            fitting += 1
    assert fitting >= 3


def test_a_stream_s_segment_ends_with_what_was_chosen(place):
    """Before the end of the segment, greedy search gives the text."""
    wav = 0.1 * torch.randn(40000, generator=torch.Generator().manual_seed(2))
    for search, phrases in ((None, {"SAD": 60.0}), ("ctc_rescored", None), ("ctc_rescored", {"SAD": 60.0}), ("ctc_beam", None)):
        model = load_model(place / "model", "cpu")
        if search is not None:
            model.choose_search(search)
        if phrases is not None:
            model.choose_phrases(phrases)
        recognizer = StreamingRecognizer(model, endpoint=30)
        shown = recognizer.accept(wav)
        assert not shown and recognizer.stable_text == ""
        (segment,) = recognizer.finish()
        assert ("SAD" in segment.text.split()) == bool(phrases) and segment.words


def certain(tokens, share=0.99, blank=0):
    """Log-probabilities (1, 2 U, V): each token, the last one with ``share``, and a blank."""
    probs = torch.full((2 * len(tokens), 25), 1e-4)
    probs[1::2, blank] = 0.99
    for row, token in zip(probs[::2], tokens, strict=True):
        row[token] = 0.99
    probs[-2, tokens[-1]], probs[-2, blank] = share, 1 - share
    return probs.log()[None]


def certain_frames(tokens, share, blank=0):
    """A transducer that only sees frames, and frames (1, 2 U, V) from which it takes certain tokens."""
    net = Transducer(25, 25, predictor_size=8, joint_size=25, blank_index=blank).eval()
    for name, parameter in net.named_parameters():
        parameter.data.zero_()
        if name in ("project_frames.weight", "out.weight"):
            parameter.data.copy_(torch.eye(25) * (10 if name.startswith("out") else 1))
    return net, torch.atanh((certain(tokens, share, blank) / 10).clamp(-0.99, 0.0))


@pytest.mark.parametrize("bonus", [None, 0.5, 7.5])
@pytest.mark.parametrize("share", [0.4, 0.55, 0.7, 0.9])
@torch.no_grad()
def test_phrases_take_no_other_token_away(share, bonus, tokenizer):
    """A score that is divided by the length of its text falls with each token, once it is positive."""
    tokens = [*tokenizer.encode_as_ids("THE CAT SAT"), tokenizer.piece_to_id("D")]
    net, frames = certain_frames(tokens, share)
    search = TransducerSearch(net, beam_size=8)
    search.graphs = [phrase_graph({"THE": bonus, "CAT": bonus}, tokenizer)]
    assert search(frames, torch.ones(1))[0] == [tokens if share > 0.5 else tokens[:-1]]
    stream = search.stream()
    for piece in frames[0].split(3):
        stream.accept(piece)
    assert [token for token, _ in stream.tokens] == search(frames, torch.ones(1))[0][0]


def joint_search(ctc_weight, **keys):
    """A joint search whose CTC head takes log-probabilities from its frames (B, T, 32)."""
    torch.manual_seed(0)
    net = TransformerASR(25, 8, d_model=32, nhead=4, num_encoder_layers=1, num_decoder_layers=1, d_ffn=64).eval()
    seq_lin, ctc_lin = (Linear(input_size=32, n_neurons=25).requires_grad_(False) for _ in range(2))
    ctc_lin.w.weight.copy_(torch.eye(25, 32))
    ctc_lin.w.bias.zero_()
    scorer = ScorerBuilder({"ctc": ctc_weight}, full_scorers=[ctc_prefix.CTCScorer(ctc_lin, blank_index=0, eos_index=2)])
    keys = {
        "bos_index": 1,
        "eos_index": 2,
        "min_decode_ratio": 0.0,
        "max_decode_ratio": 1.0,
        "beam_size": 16,
        "excluded": [0, 1, 3],
        **keys,
    }
    return S2STransformerBeamSearcher([net, seq_lin], using_eos_threshold=False, scorer=scorer, **keys)


@pytest.mark.parametrize("bonus", [None, 0.5, 7.5])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
@torch.no_grad()
def test_phrases_take_no_other_token_away_from_joint_searches(share, bonus, tokenizer):
    tokens = [*tokenizer.encode_as_ids("THE CAT SAT"), tokenizer.piece_to_id("D")]
    log_probs, search = certain(tokens, share).log_softmax(-1), joint_search(0.9999)
    search.graphs = [phrase_graph({"THE": bonus, "CAT": bonus}, tokenizer)]
    frames = torch.nn.functional.pad(log_probs, (0, 7))
    (texts,) = ctc_nbest(log_probs, torch.ones(1), excluded=[1, 2, 3], graphs=search.graphs)
    wanted = tokens if share > 0.5 else tokens[:-1]
    assert texts[rescore(search, frames[0], texts)[1]].tokens == wanted
    assert search(frames, torch.ones(1))[0] == [wanted]
    search.topk, search.return_topk = 16, True
    (found,), _, (scores,), _ = search(frames, torch.ones(1))
    assert found[0].tolist()[: len(wanted)] == wanted and scores.isfinite().any()


@pytest.mark.parametrize("phrase", ["THE CAT", "SHE HAS", "A HOT DAY", "THE CAT SAT THE CAT SAT"])
@torch.no_grad()
def test_what_is_not_said_takes_nothing_away(phrase, tokenizer):
    """A phrase without its last token begins in all places of the beam; its bonus must not be taken back too late."""
    graph, tokens = [phrase_graph({phrase: None}, tokenizer)], tokenizer.encode_as_ids("SAD TEA DAY TEA HOT SAD")
    *begun, last = tokenizer.encode_as_ids(phrase)
    frames = certain(tokens).exp()
    frames[:, ::2] = frames[:, ::2].clamp(max=0.5)
    frames[..., begun] = frames[..., begun].clamp(min=0.1)
    frames[..., last] = 1e-4
    log_probs = frames.log().log_softmax(-1)
    joint, transducer = (
        joint_search(0.9999, length_normalization=False),
        TransducerSearch(certain_frames(tokens, 0.99)[0]),
    )
    given = torch.nn.functional.pad(log_probs, (0, 7)), torch.atanh(frames.log() / 10)
    scores = []
    for joint.graphs in ([], graph):
        transducer.graphs = joint.graphs
        ((best, *_),) = ctc_nbest(log_probs, torch.ones(1), excluded=[1, 2, 3], graphs=joint.graphs)
        (said,) = transducer.hypotheses(given[1], torch.ones(1), 4)
        scores.append([best.score, float(joint(given[0], torch.ones(1))[2]), said.score])
    for plain, with_phrase in zip(*scores, strict=True):
        assert with_phrase > plain - 0.01


@torch.no_grad()
def test_a_text_that_has_to_end_gives_its_bonus_back(tokenizer):
    """In a joint search a text has at most as many tokens as frames, here less than the phrase."""
    silence = torch.full((1, 5, 25), 1e-4)
    silence[..., 0] = 0.99
    search = joint_search(0.9999)
    search.graphs = [phrase_graph({"THE CAT SAT": 60.0}, tokenizer)]
    tokens, _, (score,), _ = search(torch.nn.functional.pad(silence.log(), (0, 7)), torch.ones(1))
    assert tokens == [[]] and score < 0


@torch.no_grad()
def test_graphs_do_not_favour_special_tokens(tokenizer):
    """A graph that costs more for each token than the audio tells makes no unknown token of it."""
    special = torch.tensor([is_special(tokenizer, token) for token in range(25)])
    net, frames = certain_frames(tokenizer.encode_as_ids("THE CAT SAT"), 0.99)
    frames[0, ::2, tokenizer.unk_id()] = math.atanh(math.log(0.05) / 10)
    search, said = TransducerSearch(net, beam_size=8), {}
    for cost in (0.0, 2.0, 12.0):
        costs = nothing(25)
        costs.root[:], costs.special[:] = torch.where(special, 0.0, -cost), special
        search.graphs = [costs]
        said[cost] = tokenizer.decode_ids(search(frames, torch.ones(1))[0][0])
    assert said[0.0] == said[2.0] == "THE CAT SAT" and "⁇" not in said[12.0]
    joint, given = joint_search(0.9999, excluded=[0, 1]), certain(tokenizer.encode_as_ids("THE CAT SAT"))
    given[0, ::2, tokenizer.unk_id()] = math.log(0.05)
    for joint.graphs in ([], [costs]):
        tokens = joint(torch.nn.functional.pad(given.log_softmax(-1), (0, 7)), torch.ones(1))[0][0]
        assert "⁇" not in tokenizer.decode_ids(tokens) and (tokens or joint.graphs)


def test_a_transducer_s_stream_listens_all_along():
    """The final text is that of all frames at once."""
    model = load_model(FOLDERS / "transducer-v1", "cpu")
    frames, graph = torch.randn(40, 8, generator=torch.Generator().manual_seed(3)), phrase_graph({"SAD": 20.0}, model.tokenizer)
    answers = []
    for graphs in ([], [graph]):
        search = model.mods.decoder
        search.graphs, stream = graphs, search.stream(4)
        for number, piece in enumerate(frames.split(7)):
            search.graphs = [[], [graph]][number % 2] if number else graphs  # of other streams, which begin meanwhile
            stream.accept(piece)
        said = [token for token, _ in stream.tokens]
        search.graphs = graphs
        assert said == search.hypotheses(frames[None], torch.ones(1), 4)[0].tokens
        answers.append("SAD" in model.tokenizer.decode_ids(said).split())
    assert answers == [False, True]


def test_the_command_line_listens(place, tmp_path, capsys):
    """Phrases and search in transcribe, stream and evaluate, which prints how many phrases were found."""
    audio, phrases = place / "long.flac", tmp_path / "phrases.txt"
    phrases.write_text("SAD\t60\n\nTHE TEA\t0\n")
    soundfile.write(tmp_path / "a.flac", soundfile.read(audio)[0], 16000)
    (tmp_path / "set.csv").write_text("ID,wav,wrd\na,a.flac,THE TEA IS SAD\nb,a.flac,SAD\n")
    model = ["--model", str(place / "model"), "--device", "cpu"]
    outputs = []
    for command in (["transcribe", str(audio)], ["stream", str(audio)], ["transcribe", str(audio), "--search", "ctc_rescored"]):
        for more in ([], ["--phrases", str(phrases)]):
            assert cli.main([command[0], *model, *command[1:], *more]) == 0
            outputs.append(capsys.readouterr().out)
    assert ["SAD" in text.split() for text in outputs] == [False, True] * 3
    asked = ["--search", "ctc_beam", "--search", "ctc_greedy", "--phrases", str(phrases), "--output", str(tmp_path / "rows.csv")]
    assert cli.main(["evaluate", *model, str(tmp_path / "set.csv"), *asked]) == 0
    said = capsys.readouterr().out
    assert "ctc_beam: 66.67 % of the 3 occurrences of phrases" in said and "ctc_greedy: 0.0 % of the 3 occurrences" in said
    assert [row["phrase_recall"] for row in read_csv(tmp_path / "rows.csv")] == ["66.67", "0.0"]
    phrases.write_text("SAD\nTHE TEA\t0\n")  # now the bonus of SAD is given for all phrases without one
    for given, found in (("60", True), ("0", False)):
        assert cli.main(["transcribe", *model, str(audio), "--phrases", str(phrases), "--phrase-bonus", given]) == 0
        assert ("SAD" in capsys.readouterr().out.split()) == found
    for more, message in (
        (["--phrase-bonus", "1"], "there are no phrases; give --phrases"),
        (["--phrases", str(phrases), "--phrase-bonus", "-1"], "is -1.0; give a number from 0 to 1000"),
    ):
        assert cli.main(["transcribe", *model, str(audio), *more]) == 2 and message in capsys.readouterr().err
    phrases.write_text("SAD\t60\n\nTHE TEA\t0\n")
    output = ["transcribe", *model, str(audio), "--output", str(tmp_path / "out")]
    assert cli.main([*output, "--phrases", str(phrases)]) == 0
    assert cli.main(output) == 2 and "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has no phrases"),
        (b" \n\t\n", "has no phrases"),
        (b"THE\nTHE CAT\tmany\n", "Line 2 of .*'THE CAT.*give a phrase"),
        (b"THE CAT\t1\t2\n", "Line 1 of .* is 'THE CAT<tab>1<tab>2'"),
        (b"THE CAT\tnan\n", "Line 1 of"),
        (b"THE CAT\t-1\n", "Line 1 of"),
        (b"\t5\n", "Line 1 of"),
        (b"CAT\nSAT\nCAT\t3\n", "Line 3 of .* repeats 'CAT'"),
        (b"CAT\xff", "is not text in UTF-8"),
        (b"the cat\nCAT", "cannot write 1 of the 2 phrases, such as 'the cat'; write them as in its transcripts, in upper case"),
        ("ÉÀ\nCAT".encode(), "cannot write 1 of the 2 phrases, such as 'ÉÀ'; write them as in its transcripts, or"),
    ],
)
def test_phrases_that_cannot_be_are_refused(content, message, tokenizer, tmp_path):
    (tmp_path / "phrases.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        phrase_graph(read_phrases(tmp_path / "phrases.txt"), tokenizer)


def test_too_many_phrases_are_refused_before_they_fill_the_memory(tokenizer, monkeypatch):
    monkeypatch.setattr("speechbrain_ext.decoders.phrases.MOST_TOKENS", 5)
    texts = dict.fromkeys(("CAT", "HAT", "TEA"))
    with pytest.raises(UserError, match="The 3 phrases have more than 5 tokens; give fewer."):
        phrase_graph(texts, tokenizer)


@pytest.mark.parametrize(
    "phrases, message",
    [
        (["CAT", "HAT"], "give a dict with a bonus"),
        ("CAT", "give a dict"),
        ({3: None}, "give a dict"),
        ({" ": None}, "give a dict"),
        ({"CAT": 1.0, " CAT": 5.0}, "have 'CAT' twice"),
        ({"CAT": math.nan}, "The bonus of the phrase 'CAT' is nan; give None, or a number from 0 to 1000"),
        ({"CAT": math.inf}, "is inf"),
        ({"CAT": -5.0}, "is -5.0"),
        ({"CAT": "7,5"}, "is '7,5'"),
    ],
)
def test_phrases_of_python_that_cannot_be_are_refused(phrases, message, tokenizer):
    with pytest.raises(UserError, match=message):
        phrase_graph(phrases, tokenizer)


def test_phrases_of_python_are_read_as_those_of_a_file(tokenizer):
    graphs = [phrase_graph({text: 3}, tokenizer) for text in ("THE CAT", " THE   CAT ")]
    ids = torch.tensor(tokenizer.encode_as_ids("THE CAT"))
    states = [token_graph.begin([graph], 1, "cpu") for graph in graphs]
    for token in ids:
        states = [token_graph.advance([graph], state, token[None]) for graph, state in zip(graphs, states, strict=True)]
    assert torch.equal(*states) and states[0].any()


def test_phrases_are_kept_as_they_are_compared(place, tmp_path):
    model = load_model(place / "model", "cpu")
    model.choose_phrases({" THE   CAT ": 3.0})
    (tmp_path / "phrases.txt").write_text("THE CAT\t3\nHAT\t\n")  # a spreadsheet writes the tab before an empty bonus
    assert model.phrases == ("THE CAT",) and read_phrases(tmp_path / "phrases.txt") == {"THE CAT": 3.0, "HAT": None}
    tokens = len(model.tokenizer.encode_as_ids("HAT"))
    assert read_phrases(tmp_path / "phrases.txt", model.tokenizer, 0.5) == {"THE CAT": 3.0, "HAT": 0.5 * tokens}


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "CAT\n\nHAT 5\n",
            "cannot write 1 of the 2 phrases of .*, such as 'HAT 5' in line 3; .*, with a tab before a bonus, or leave",
        ),
        (
            "cat\nCAT\nhat",
            "cannot write 2 of the 3 phrases of .*, such as 'cat' in line 1, 'hat' in line 3; .*, in upper case, or",
        ),
    ],
)
def test_lines_of_phrases_that_cannot_be_written_are_named(content, message, tokenizer, tmp_path):
    (tmp_path / "phrases.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        read_phrases(tmp_path / "phrases.txt", tokenizer)


def test_searches_that_cannot_listen_are_refused(place):
    model = load_model(FOLDERS / "transducer-v1", "cpu")
    model.choose_beam(1)
    with pytest.raises(UserError, match="uses transducer_greedy, which takes no phrases or language models; give a beam"):
        model.choose_phrases({"CAT": None})
    with pytest.raises(UserError, match="has no search joint_beam; it has ctc_greedy, ctc_beam, transducer_greedy"):
        model.choose_search("joint_beam")
    with pytest.raises(UserError, match="uses ctc_greedy, which has no beam"):
        load_model(FOLDERS / "ctc-v1", "cpu").choose_beam(4)
