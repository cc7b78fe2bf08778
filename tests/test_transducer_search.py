"""The transducer searches, compared with sums over all texts, SpeechBrain's searcher, single utterances, and streams."""

import itertools
import math

import pytest
import torch
from speechbrain.decoders.transducer import TransducerBeamSearcher

from speechbrain_ext.decoders.transducer import TransducerSearch
from speechbrain_ext.lobes.transducer import PREDICTORS, Transducer
from speechbrain_ext.utils.errors import UserError, UserTypeError

D, V = 6, 20
KEYS = {"predictor_size": 8, "joint_size": 10}


def make(kind="stateless", vocab=V, often=4.0):
    """A transducer that emits a token every few frames."""
    torch.manual_seed(3)
    net = Transducer(D, vocab, kind, **KEYS).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
        net.out.bias[0] = often
    return net


def frames_of(*lengths):
    return torch.randn(len(lengths), max(lengths), D, generator=torch.Generator().manual_seed(0)), torch.tensor(
        [length / max(lengths) for length in lengths]
    )


def plain_greedy(net, frames, max_symbols):
    """Greedy search, token by token."""
    state, said, score = net.predictor.begin(1), [], 0.0
    for time, frame in enumerate(net.project_frames(frames)):
        for symbol in range(max_symbols + 1):
            log_probs = net.join(frame, net.predict(state)[0]).log_softmax(-1)
            token = int(log_probs.argmax()) if symbol < max_symbols else 0
            if token == 0:
                score += log_probs.max() if symbol == max_symbols else log_probs[0]
                break
            score += log_probs[token]
            said.append((token, time))
            state = net.predictor.advance(state, torch.tensor([token]))
    return said, float(score)


@pytest.fixture(params=PREDICTORS)
def net(request):
    return make(request.param)


@pytest.mark.parametrize("max_symbols", [1, 2, 5])
@torch.no_grad()
def test_greedy_search_is_the_plain_loop(net, max_symbols):
    search = TransducerSearch(net, beam_size=1, max_symbols=max_symbols)
    frames, lens = frames_of(37, 20, 1)
    found = search.hypotheses(frames, lens)
    for hypothesis, row, length in zip(found, frames, (37, 20, 1), strict=True):
        said, score = plain_greedy(net, row[:length], max_symbols)
        assert list(zip(hypothesis.tokens, hypothesis.frames, strict=True)) == said
        assert hypothesis.score == pytest.approx(score, abs=1e-3)
    assert 0 < len(found[0].tokens)


@pytest.mark.parametrize("beam_size", [1, 4, 7])
def test_a_batch_gives_the_same_as_each_alone(net, beam_size):
    search = TransducerSearch(net, beam_size)
    frames, lens = frames_of(60, 23, 60, 1, 31)
    together = search.hypotheses(frames.masked_fill((torch.arange(60) >= (60 * lens).unsqueeze(1)).unsqueeze(2), 1e3), lens)
    for i, hypothesis in enumerate(together):
        (alone,) = search.hypotheses(frames[i : i + 1, : round(60 * lens[i].item())], torch.ones(1))
        assert (alone.tokens, alone.frames) == (hypothesis.tokens, hypothesis.frames)
        assert alone.score == pytest.approx(hypothesis.score, abs=1e-3)
    assert any(hypothesis.tokens for hypothesis in together)


def log_prob(net, frames, tokens):
    """Log-probability of a text with at most one label per frame: the sum over all alignments, in float64."""
    net = net.double()
    outputs = net.project_outputs(net.predictor(torch.tensor([tokens], dtype=torch.long)))
    log_probs = net.join(net.project_frames(frames.double()).unsqueeze(1), outputs).log_softmax(-1)  # (T, U + 1, V)
    alpha = [0.0] + [-math.inf] * len(tokens)
    for row in log_probs.tolist():
        ways = [[alpha[u] + row[u][0]] + ([alpha[u - 1] + row[u - 1][tokens[u - 1]]] if u else []) for u in range(len(alpha))]
        alpha = [torch.tensor(way, dtype=torch.float64).logsumexp(0).item() for way in ways]
    net.float()
    return alpha[-1]


@torch.no_grad()
def test_a_wide_beam_finds_the_best_of_all_texts():
    net = make(vocab=3, often=1.0)
    frames, lens = frames_of(5)
    texts = [list(text) for count in range(6) for text in itertools.product((1, 2), repeat=count)]
    scores = {tuple(text): log_prob(net, frames[0], text) for text in texts}
    assert math.fsum(math.exp(score) for score in scores.values()) == pytest.approx(1, abs=1e-6)
    best = max(scores, key=lambda text: scores[text] / (1 + len(text)))
    (found,) = TransducerSearch(net, beam_size=64, beam_threshold=1e9).hypotheses(frames, lens)
    assert tuple(found.tokens) == best and found.score == pytest.approx(scores[best], abs=1e-4)


@torch.no_grad()
def test_a_beam_scores_no_worse_than_greedy_search(net):
    frames, lens = frames_of(80)
    greedy, beam = (TransducerSearch(net, size, max_symbols=1).hypotheses(frames, lens)[0] for size in (1, 6))
    found = [log_prob(net, frames[0], hypothesis.tokens) / (1 + len(hypothesis.tokens)) for hypothesis in (greedy, beam)]
    assert found[1] >= found[0] - 1e-6
    assert beam.score <= log_prob(net, frames[0], beam.tokens) + 1e-3  # the beam sums only the alignments that stay in it


@torch.no_grad()
def test_a_beam_of_one_with_all_labels_is_greedy_search(net):
    search = TransducerSearch(net, 1, beam_threshold=1e9, max_symbols=1)
    frames, lens = frames_of(50)
    (greedy,) = search.hypotheses(frames, lens)
    (texts,), _ = search._beam(net.project_frames(frames), torch.tensor([50]), search._begin(1, 1))
    assert texts[0][1:] == list(zip(greedy.tokens, greedy.frames, strict=True))


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize("size", [1, 3, 16, 200])
def test_a_stream_says_what_the_whole_says(net, beam_size, size):
    search = TransducerSearch(net, beam_size)
    frames, lens = frames_of(90)
    (whole,) = search.hypotheses(frames, lens)
    stream, certain = search.stream(), []
    for piece in frames[0].split(size):
        stream.accept(piece)
        assert [token for token, _ in stream.tokens][: len(certain)] == certain  # final tokens do not change
        certain = [token for token, _ in stream.tokens][: stream.certain]
    assert stream.tokens == list(zip(whole.tokens, whole.frames, strict=True))
    assert beam_size > 1 or len(certain) == len(whole.tokens) > 5
    stream.forget(10)
    assert stream.tokens[-1][1] == whole.frames[-1] - 10


@torch.no_grad()
def test_speechbrains_searcher_takes_the_lstm():
    """SpeechBrain's greedy search allows one token per frame more than its limit."""
    net = make("lstm")
    networks = [net.predictor.embedding, net.predictor.lstm, net.project_outputs]
    theirs = TransducerBeamSearcher(networks, net.joint, [net.out], net.blank_index, beam_size=1, nbest=1)
    frames, lens = frames_of(60, 60)
    assert theirs(net.project_frames(frames))[0] == TransducerSearch(net, 1, max_symbols=6)(frames, lens)[0]


def test_it_is_called_as_speechbrains_searchers(net):
    tokens, lengths, scores, nothing = TransducerSearch(net)(*frames_of(30, 12))
    assert lengths.tolist() == [len(ids) for ids in tokens] and scores.shape == (2,) and nothing is None


def test_no_frames_say_nothing(net):
    for size in (1, 4):
        search = TransducerSearch(net, size)
        assert search(torch.zeros(2, 0, D), torch.zeros(2))[0] == [[], []]
        assert search(torch.randn(2, 9, D), torch.zeros(2))[0] == [[], []]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(net, dtype):
    search, (frames, lens) = TransducerSearch(net), frames_of(40)
    with torch.autocast("cpu", dtype=dtype):
        tokens = search(frames, lens)[0]
    assert tokens == search(frames, lens)[0]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"beam_size": 0}, "beam_size is 0; give a whole number from 1 to 1000."),
        ({"beam_size": 1001}, "beam_size is 1001"),
        ({"max_symbols": 1.5}, "max_symbols is 1.5"),
        ({"beam_threshold": 0}, "beam_threshold is 0; give a positive number."),
    ],
)
def test_what_no_search_can_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        TransducerSearch(make(), **keys)
    with pytest.raises(UserTypeError, match="give one of speechbrain_ext.lobes.transducer"):
        TransducerSearch(torch.nn.Linear(2, 2))
