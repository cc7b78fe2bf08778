"""The searchers and the CTC scorer give the same results as SpeechBrain's, and keep no references after a search."""

import gc
import math
import re
import weakref

import pytest
import torch
from speechbrain.decoders import scorer as theirs_scorer
from speechbrain.decoders import seq2seq as theirs
from speechbrain.decoders.ctc import CTCPrefixScore
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR as SpeechBrainTransformerASR
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.nnet.linear import Linear

from speechbrain_ext.asr import TransformerASR
from speechbrain_ext.decoders import ctc_prefix
from speechbrain_ext.decoders import lm as our_lm
from speechbrain_ext.decoders import searchers as ours
from speechbrain_ext.decoders.ctc_prefix import PrefixScores
from speechbrain_ext.lobes.decoder_cache import DecoderCache
from speechbrain_ext.utils.errors import UserError

VOCAB, FRAMES = 40, 40
LENGTHS = torch.tensor([1.0, 0.5, 0.71])
GIVEN = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.0, "max_decode_ratio": 0.4, "beam_size": 5}


def model(normalize_before=True):
    """A TransformerASR with heads that prefer some tokens, sometimes eos and blank."""
    torch.manual_seed(0)
    net = TransformerASR(VOCAB, 8, 32, 4, 1, 2, 64, normalize_before=normalize_before).eval()
    for parameter in net.decoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    seq_lin, ctc_lin = (Linear(input_size=32, n_neurons=VOCAB) for _ in range(2))
    for head, token in ((seq_lin, 2), (ctc_lin, 0)):
        head.w.weight.data.mul_(3)
        head.w.bias.data[token] = 3
    return net.requires_grad_(False), seq_lin.requires_grad_(False), ctc_lin.requires_grad_(False)


def scorers(kind, module, ctc_lin, normalize_before=False):
    """A ScorerBuilder with the CTCScorer of a module."""
    ctc = module.CTCScorer(ctc_lin, blank_index=0, eos_index=2)
    torch.manual_seed(1)
    if kind == "none":
        return None
    if kind == "partial":
        return theirs_scorer.ScorerBuilder({"ctc": 0.4}, partial_scorers=[ctc])
    if kind == "coverage and partial":
        coverage = theirs_scorer.CoverageScorer(VOCAB)
        return theirs_scorer.ScorerBuilder({"coverage": 0.2, "ctc": 0.3}, [coverage], [ctc])
    if kind == "language model":
        lm = TransformerLM(VOCAB, d_model=32, nhead=2, num_encoder_layers=1, d_ffn=32, normalize_before=normalize_before).eval()
        lm = (theirs_scorer if module is theirs_scorer else our_lm).TransformerLMScorer(lm, 1.15)
        return theirs_scorer.ScorerBuilder({"transformerlm": 0.5, "ctc": 0.3}, [lm, ctc])
    if kind == "length":
        return theirs_scorer.ScorerBuilder({"length": 0.5, "ctc": 0.3}, [theirs_scorer.LengthScorer(VOCAB), ctc])
    return theirs_scorer.ScorerBuilder({"ctc": 1.0 if kind == "only" else 0.4}, full_scorers=[ctc])


class Theirs(theirs.S2STransformerBeamSearcher):
    """SpeechBrain's search; without a decoder, it does not add the scores of earlier steps at each step."""

    def _attn_weight_step(self, inp_tokens, memory, enc_states, enc_lens, attn, log_probs):
        log_probs = log_probs if self.attn_weight else torch.zeros_like(log_probs)
        return super()._attn_weight_step(inp_tokens, memory, enc_states, enc_lens, attn, log_probs)


def beam_searches(kind="none", normalize_before=True, **keys):
    """SpeechBrain's search, and ours."""
    net, seq_lin, ctc_lin = model(normalize_before)
    beam = keys.get("beam_size", 5)
    defaults = {"beam_size": beam, "min_decode_ratio": 0.0, "max_decode_ratio": 0.4, "return_topk": True, "topk": beam}
    keys = {"modules": [net, seq_lin], "bos_index": 1, "eos_index": 2, **defaults, **keys}
    return [
        searcher(**keys, scorer=scorers(kind, module, ctc_lin, normalize_before))
        for searcher, module in ((Theirs, theirs_scorer), (ours.S2STransformerBeamSearcher, ctc_prefix))
    ]


def assert_same(expected, answer):
    """Compare tokens and lengths exactly, scores and log-probabilities to 1e-4."""
    (tokens, lengths, *expected), (our_tokens, our_lengths, *answer) = expected, answer
    assert torch.equal(tokens, our_tokens) if torch.is_tensor(tokens) else tokens == our_tokens
    assert torch.equal(lengths, our_lengths)
    for theirs_, mine in zip(expected, answer, strict=True):
        torch.testing.assert_close(mine, theirs_, atol=1e-4, rtol=1e-6)


def assert_same_as_alone(searches, enc, lengths):
    """Compare ours on a batch with SpeechBrain's on each utterance alone, which has steps of its length without padding."""
    theirs_search, our_search = searches
    answers = our_search(enc, lengths)
    for i, frames in enumerate((lengths * enc.shape[1]).round().long().tolist()):
        alone = theirs_search(enc[i : i + 1, :frames], torch.ones(1))
        if not our_search.return_topk:
            assert answers[0][i] == alone[0][0]
            continue
        for k in range(alone[0].shape[1]):
            size = round(float(alone[1][0, k]) * alone[0].shape[2])
            assert torch.equal(answers[0][i, k, :size], alone[0][0, k, :size])
            assert round(float(answers[1][i, k]) * answers[0].shape[2]) == size
            torch.testing.assert_close(answers[2][i, k], alone[2][0, k], atol=1e-4, rtol=1e-6)
            torch.testing.assert_close(answers[3][i, k, :size], alone[3][0, k, :size], atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("normalize_before", [True, False], ids=["pre-LN", "post-LN"])
@pytest.mark.parametrize("kind", ["none", "partial", "full", "only", "coverage and partial", "language model"])
def test_beam_search(kind, normalize_before):
    """Compare all hypotheses of the beam, also those that end early."""
    searches = beam_searches(kind, normalize_before)
    enc = torch.randn(3, FRAMES, 32)
    assert_same_as_alone(searches, enc, LENGTHS)
    assert_same(*(search(enc[:1, :17], torch.ones(1)) for search in searches))  # a search does not depend on the one before


@pytest.mark.parametrize(
    "kind, keys",
    [
        ("partial", {"beam_size": 1}),
        ("partial", {"beam_size": 10, "temperature": 1.15, "topk": 3}),
        ("partial", {"return_topk": False}),
        ("none", {"temperature": 0.7, "using_eos_threshold": False}),
        ("full", {"min_decode_ratio": 0.2, "max_decode_ratio": 0.3, "using_eos_threshold": False}),
        ("full", {"eos_threshold": 1.0, "length_normalization": False}),
        ("length", {"length_normalization": False}),
        ("none", {"max_decode_ratio": 1.0, "min_decode_ratio": 0.9}),  # more steps than the initial size of the cache
    ],
)
def test_settings(kind, keys):
    searches = beam_searches(kind, **keys)
    torch.manual_seed(3)  # a seed without ties, in which rounding would decide
    enc = torch.randn(2, FRAMES, 32)
    assert_same_as_alone(searches, enc, torch.tensor([0.6, 1.0]))


def test_decoder_steps():
    """Outputs and attention of each position, while hypotheses are reordered at random, also twice between steps."""
    net, *_ = model()
    enc, lengths = torch.randn(2, FRAMES, 32), torch.tensor([FRAMES, 9])
    cache = net.make_decoder_cache(enc, lengths, beam_size=3)
    prefix = torch.empty(6, 0, dtype=torch.long)
    for _ in range(40):
        tokens = torch.randint(3, VOCAB, (6,))
        prefix = torch.cat([prefix, tokens.unsqueeze(1)], 1)
        out, attention = net.decode_step(tokens, cache)
        expected, expected_attention = net.decode(prefix, enc.repeat_interleave(3, 0), lengths.repeat_interleave(3))
        torch.testing.assert_close(out, expected[:, -1], atol=1e-5, rtol=0)
        torch.testing.assert_close(attention, expected_attention[:, -1], atol=1e-5, rtol=0)
        for _ in range(torch.randint(3, ()).item()):
            index = torch.randint(3, (6,)) + torch.tensor([0, 0, 0, 3, 3, 3])
            prefix = prefix[index]
            cache.reorder(index)


def test_the_last_position_of_the_decoder():
    net = TransformerASR(VOCAB, 8, 32, 4, 1, 1, 64, max_length=2).eval()
    cache = net.make_decoder_cache(torch.randn(1, 5, 32))
    for _ in range(2):
        net.decode_step(torch.tensor([1]), cache)
    with pytest.raises(ValueError, match="2 tokens.*max_length"):
        net.decode_step(torch.tensor([1]), cache)


def steps(prefix_scores, log_probs, lengths, beam, prefix, candidates):
    """Scores of SpeechBrain's or our class, step by step along given prefixes (B * K, U), in float64 if SpeechBrain can."""
    vocab = log_probs.shape[-1]
    state, out = None, []
    for step, tokens in enumerate(prefix.unbind(1)):
        chosen = None if candidates is None else candidates[:, step]
        if isinstance(prefix_scores, PrefixScores):
            scores = prefix_scores.score(tokens, chosen)
        else:
            scores, state = prefix_scores.forward_step(tokens, state, chosen)
        out.append(scores.double())
        if step + 1 < prefix.shape[1]:
            index = torch.arange(beam).repeat(len(lengths), 1) * vocab + prefix[:, step + 1].view(len(lengths), beam)
            if isinstance(prefix_scores, PrefixScores):
                prefix_scores.extend(index)
            else:
                state = prefix_scores.permute_mem(state, index)
    return torch.stack(out)


@pytest.mark.parametrize("partial", [False, True], ids=["full", "partial"])
@pytest.mark.parametrize(
    "kind, frames, sharpness", [("flat", 60, 0.1), ("peaked", 60, 12.0), ("impossible", 60, 2.0), ("40 s", 1000, 5.0)]
)
def test_prefix_scores(kind, frames, sharpness, partial):
    """Compare with SpeechBrain's loops in float64, with repeated tokens, and -inf and -1e20 among the log-probabilities."""
    torch.manual_seed(0)
    batch, beam, vocab, length = 3, 2, 12, 20 if frames < 100 else 10
    log_probs = (sharpness * torch.randn(batch, frames, vocab)).log_softmax(-1)
    if kind == "impossible":
        log_probs[:, 5:25, 7] = -torch.inf
        log_probs[:, :50, 8] = -1e20
        log_probs[1, :, 9] = -torch.inf
    lengths = torch.tensor([frames, frames // 2, 3])
    prefix = torch.randint(3, vocab, (batch * beam, length))
    prefix[:, 0] = 1
    prefix[:, 6] = prefix[:, 7] = prefix[:, 8]
    candidates = None
    if partial:  # the candidates always contain the next token
        candidates = torch.stack([torch.randperm(vocab - 1)[:7] + 1 for _ in range(batch * beam * length)])
        candidates = candidates.view(batch * beam, length, 7)
        following = prefix.roll(-1, 1)
        candidates[..., 0] = torch.where((candidates == following.unsqueeze(2)).any(2), candidates[..., 0], following)
    torch.set_default_dtype(torch.float64)  # for the tensors that SpeechBrain creates
    try:
        expected = CTCPrefixScore(log_probs.double(), lengths, 0, 2)
        expected = steps(expected, log_probs, lengths, beam, prefix, candidates)
    finally:
        torch.set_default_dtype(torch.float32)
    answer = steps(PrefixScores(log_probs, lengths, 0, 2), log_probs, lengths, beam, prefix, candidates)
    possible = expected > -1e4
    assert possible.any() and (answer[~possible] < -1e4).all()
    torch.testing.assert_close(answer[possible], expected[possible], atol=1e-4, rtol=1e-7)  # the precision of float32


def test_a_window_is_refused():
    with pytest.raises(ValueError, match="ctc_window_size is 10"):
        ctc_prefix.CTCScorer(torch.nn.Linear(2, 5), 0, 2, ctc_window_size=10)


def test_an_utterance_of_no_frames_beside_others():
    enc = torch.randn(2, FRAMES, 32)
    enc[1] = 0.0
    expected, answer = (search(enc, torch.tensor([1.0, 0.001])) for search in beam_searches("partial", return_topk=False))
    assert answer[2].isfinite().all()
    assert_same(expected, answer)


def test_nothing_is_kept_after_a_search(monkeypatch):
    kept = []
    for cls in (DecoderCache, PrefixScores):
        init = cls.__init__

        def remember(self, *args, init=init):
            kept.append(weakref.ref(self))
            init(self, *args)

        monkeypatch.setattr(cls, "__init__", remember)
    search = beam_searches("partial")[1]
    state = {name: value.clone() for name, value in search.state_dict().items()}
    search(torch.randn(1, FRAMES, 32), torch.ones(1))
    gc.collect()
    assert len(kept) == 2 and not any(reference() for reference in kept)
    assert search.state_dict().keys() == state.keys()
    assert not [value for value in vars(search.scorer.partial_scorers["ctc"]).values() if torch.is_tensor(value)]


def test_a_model_that_cannot_decode_step_by_step_is_refused():
    keys = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.0, "max_decode_ratio": 1.0, "beam_size": 2}
    head = Linear(input_size=32, n_neurons=VOCAB)
    with pytest.raises(TypeError, match="use speechbrain_ext.asr.TransformerASR"):
        ours.S2STransformerBeamSearcher([SpeechBrainTransformerASR(VOCAB, 8, 32, 4, 1, 2, 64), head], **keys)
    search = ours.S2STransformerBeamSearcher([TransformerASR(VOCAB, 8, 32, 4, 1, 0, 64), head], **keys)
    with pytest.raises(ValueError, match="num_decoder_layers is 0"):
        search(torch.rand(1, 10, 32), torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Prefixes at once and token by token agree within the precision of the type."""
    net = model()[0].to(dtype)
    encoder_out, prefix = torch.randn(2, FRAMES, 32, dtype=dtype), torch.randint(3, VOCAB, (2, 9))
    cache = net.make_decoder_cache(encoder_out)
    for tokens in prefix.unbind(1):
        out, _ = net.decode_step(tokens, cache)
    expected = net.decode(prefix, encoder_out)[0][:, -1]
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, atol=0.1 if dtype == torch.bfloat16 else 0.02, rtol=0.0)


def test_log_probabilities_stay_the_callers():
    log_probs = torch.randn(2, 1, 6).log_softmax(-1)  # one frame, for which the transposed tensor is not a copy
    before = log_probs.clone()
    PrefixScores(log_probs, torch.tensor([1, 0]), 0, 2)
    assert torch.equal(log_probs, before)


@pytest.mark.parametrize("ratios", [(0.0, 0.3), (0.5, 1.0), (0.0, 0.01)])
def test_steps_are_those_of_the_utterance_whatever_its_batch(ratios):
    """An utterance that is too short for a step by the ratio still takes one step."""
    low, high = ratios
    _, search = beam_searches("partial", min_decode_ratio=low, max_decode_ratio=high, return_topk=False)
    enc = torch.randn(3, FRAMES, 32)
    frames = [FRAMES, 10, 2]
    together = search(enc, torch.tensor(frames) / FRAMES)[0]
    assert together == [search(enc[i : i + 1, :n], torch.ones(1))[0][0] for i, n in enumerate(frames)]


def test_tokens_that_no_text_has_are_never_written():
    net, seq_lin, ctc_lin = model()
    seq_lin.w.bias.data[3] = 50  # the unknown token
    keys = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.0, "max_decode_ratio": 0.5, "beam_size": 3}
    texts = {}
    for excluded in ((), (0, 1, 3)):
        search = ours.S2STransformerBeamSearcher(
            [net, seq_lin], **keys, excluded=excluded, scorer=scorers("partial", ctc_prefix, ctc_lin)
        )
        texts[excluded] = search(torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0)), torch.ones(1))[0][0]
    assert 3 in texts[()] and not {0, 1, 3} & set(texts[0, 1, 3])


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"min_decode_ratio": 0.5, "max_decode_ratio": 0.2}, "min_decode_ratio is 0.5 and max_decode_ratio 0.2; give"),
        ({"topk": 6}, "topk is 6 and beam_size 5; give"),
        ({"bos_index": VOCAB}, "bos_index is 40, but there are 40 tokens; give"),
        ({"eos_index": 999}, "eos_index is 999, but there are 40 tokens; give"),
        ({"excluded": [0, 40]}, "excluded is 40, but there are 40 tokens; give"),
        ({"excluded": [0, 2]}, r"excluded is \[0, 2\] and holds eos_index 2, which ends a text; remove it"),
        ({"modules": []}, r"modules is \[\]; give a list"),
        *(
            ({name: value}, f"^{name} is {re.escape(repr(value))}; give ")
            for name, values in {
                "temperature": [math.nan, math.inf, 0, -1, "1", True, None],
                "eos_threshold": ["x", math.nan, 0.5],
                "length_normalization": ["foo", 1, None],
                "return_topk": ["yes"],
                "using_eos_threshold": ["no"],
                "using_max_attn_shift": [1],
                "max_attn_shift": ["x", 0, 1.5, True],
                "minus_inf": [0, "x", -math.inf, math.nan, -1e39],
                "max_decode_ratio": [0.0, -1.0, "1", math.nan, math.inf, 1e20, True],
                "min_decode_ratio": [-0.1, "0", math.nan, None],
                "beam_size": [0, True, 2.0, "5", None],
                "topk": [0, True, "1"],
                "bos_index": [-1, "1", True, [1]],
                "eos_index": [-1, 2.0, None],
                "excluded": ["x", 0, [-1], ["0"], None],
                "scorer": ["x"],
            }.items()
            for value in values
        ),
    ],
)
def test_impossible_settings_are_refused(keys, message):
    net, seq_lin, _ = model()
    with pytest.raises(UserError, match=message):
        ours.S2STransformerBeamSearcher(**{"modules": [net, seq_lin], **GIVEN, **keys})


@pytest.mark.parametrize(
    "change, keys, message",
    [
        ({"weights": {"ctc": 0.4, "lm": 0.2}}, {}, "weights have lm 0.2, but the scorers are: ctc; name one"),
        ({"weights": {"ctc": math.nan}}, {}, "weight of the scorer ctc is nan; give a number"),
        ({"weights": {"ctc": "0.4"}}, {}, "weight of the scorer ctc is '0.4'; give a number"),
        ({"scorer_beam_scale": "x"}, {}, "scorer_beam_scale is 'x'; give a positive number"),
        ({"scorer_beam_scale": 0}, {}, "scorer_beam_scale is 0; give a positive number"),
        ({}, {"eos_index": 3}, "eos_index is 3, but that of the scorer is 2; give both the same"),
        ({}, {"bos_index": 2}, "bos_index is 2, eos_index is 2 and blank_index of the scorer is 0; give three different indices"),
        ({}, {"bos_index": 0}, "bos_index is 0, eos_index is 2 and blank_index of the scorer is 0; give three different indices"),
    ],
)
def test_a_scorer_that_does_not_fit_is_refused(change, keys, message):
    net, seq_lin, ctc_lin = model()
    scorer = scorers("partial", ctc_prefix, ctc_lin)
    vars(scorer).update(change)
    with pytest.raises(UserError, match=message):
        ours.S2STransformerBeamSearcher([net, seq_lin], **{**GIVEN, **keys}, scorer=scorer)


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(
        UserError, match="length_normalization is True and the weight of the scorer length is 0.5; set length_normalization"
    ):
        net, seq_lin, ctc_lin = model()
        ours.S2STransformerBeamSearcher([net, seq_lin], 1.0, **GIVEN, scorer=scorers("length", ctc_prefix, ctc_lin))
    with pytest.raises(UserError, match="using_max_attn_shift is True, but the weight of ctc is 1"):
        net, seq_lin, ctc_lin = model()
        scorer = scorers("only", ctc_prefix, ctc_lin)
        ours.S2STransformerBeamSearcher([net, seq_lin], **GIVEN, scorer=scorer, using_max_attn_shift=True)


@pytest.mark.parametrize("kind", ["none", "partial", "full", "only", "coverage and partial", "language model"])
@pytest.mark.parametrize(
    "keys", [{}, {"beam_size": 1, "max_decode_ratio": 100}, {"min_decode_ratio": 0.4, "excluded": [0, 1, 3]}]
)
def test_a_check_searches_and_changes_nothing(kind, keys):
    net, seq_lin, ctc_lin = model()
    search = ours.S2STransformerBeamSearcher([net, seq_lin], **{**GIVEN, **keys}, scorer=scorers(kind, ctc_prefix, ctc_lin))
    search.train()
    net.decoder.layers[0].eval()
    modes = [module.training for module in search.modules()]
    state, values = torch.get_rng_state(), {name: value.clone() for name, value in search.state_dict().items()}
    search.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in search.modules()] == modes
    assert (search.min_decode_ratio, search.max_decode_ratio) == tuple(
        {**GIVEN, **keys}[f"{m}_decode_ratio"] for m in ("min", "max")
    )
    assert all(torch.equal(value, values[name]) for name, value in search.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda keys: keys.update(return_topk=True, topk=5), "^return_topk of test_search is True, .*; set it to False"),
        (lambda keys: keys.update(return_topk=True), "^return_topk of test_search is True, .*; set it to False"),
        (lambda keys: keys.update(temperature=1e-300), "^test_search cannot search: its scores are not finite; change"),
        (lambda keys: keys["modules"].append(Linear(input_size=31, n_neurons=VOCAB)), "^test_search cannot search: .*31"),
        (
            lambda keys: keys.update(scorer=scorers("partial", ctc_prefix, Linear(input_size=32, n_neurons=VOCAB + 1))),
            "^test_search cannot search: .*4[01]",
        ),
    ],
)
def test_what_fails_in_a_search_shows_in_the_check(change, message):
    net, seq_lin, _ = model()
    keys = {"modules": [net, seq_lin], **GIVEN}
    change(keys)
    keys["modules"] = [net, keys["modules"][-1]]
    search = ours.S2STransformerBeamSearcher(**keys).train()
    with pytest.raises(UserError, match=message):
        search.check()
    assert all(module.training for module in search.modules()) and search.max_decode_ratio == 0.4


def test_there_is_nothing_to_check_without_a_decoder():
    net = TransformerASR(VOCAB, 8, 32, 4, 1, 0, 64)
    ours.S2STransformerBeamSearcher([net, Linear(input_size=32, n_neurons=VOCAB)], **GIVEN).check()


def test_a_bug_of_a_decoder_of_ones_own_keeps_its_traceback(monkeypatch):
    net, seq_lin, _ = model()
    search = ours.S2STransformerBeamSearcher([net, seq_lin], **GIVEN)
    monkeypatch.setattr(net, "decode_step", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size") as bug:
        search.check()
    assert not isinstance(bug.value, UserError)
