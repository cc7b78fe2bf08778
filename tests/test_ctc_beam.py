"""The CTC beam search finds the same text as a sum over all alignments, with both backends."""

import gzip
import importlib.util
import io
import itertools
import math
import sys

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from speechbrain.decoders.ctc import ctc_greedy_decode

from speechbrain_ext.decoders.ctc_beam import CtcBeamSearch
from speechbrain_ext.decoders.word_lm import UNKNOWN_WORD, arpa_words, flashlight_lm
from speechbrain_ext.utils.errors import UserError

BACKENDS = {"flashlight": ["flashlight"], "speechbrain": []}
LM_BACKENDS = {"flashlight": ["flashlight"]}
PIP = {"flashlight": "flashlight-text"}
SENTENCES = ["THE CAT SAT", "A HAT", "THE HAT AND THE CAT", "SEE THE SEA", "NO NO", "A TEA AT SEA", "HE HAD HATS"]


def _params(backends):
    params = []
    for backend, modules in backends.items():
        missing = [PIP.get(module, module) for module in modules if importlib.util.find_spec(module) is None]
        reason = f"pip install {' '.join(missing)} to run this test"
        params.append(pytest.param(backend, marks=pytest.mark.skipif(bool(missing), reason=reason)))
    return params


each_backend = pytest.mark.parametrize("backend", _params(BACKENDS))
each_lm_backend = pytest.mark.parametrize("backend", _params(LM_BACKENDS))


def make_tokenizer(sentences, token_type="char", size=1000):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=token_type,
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module", params=["char", "bpe", "unigram"])
def tokenizer(request):
    return make_tokenizer(SENTENCES, request.param, 1000 if request.param == "char" else 25)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer with the letter A and the boundary, after the four special tokens."""
    return make_tokenizer(["A"])


def peaked(alignments, tokens, peak=0.9):
    """Log-probabilities (B, T, V) that follow alignments, with random padding; and relative lengths (B,)."""
    longest = max(map(len, alignments))
    log_probs = torch.randn(len(alignments), longest, tokens) * 20
    for utterance, ids in zip(log_probs, alignments, strict=True):
        utterance[: len(ids)] = math.log((1 - peak) / (tokens - 1))
        utterance[range(len(ids)), ids] = math.log(peak)
    return log_probs, torch.tensor([len(ids) / longest for ids in alignments])


def align(tokenizer, text):
    """Tokens of a text with repeated frames, and with blanks between equal tokens, as models predict them."""
    frames = [0]
    for place, token in enumerate(tokenizer.encode_as_ids(text)):
        frames += [0] * (frames[-1] == token) + [token] * (1 + place % 3) + [0] * (place % 2)
    return frames


def all_texts(tokenizer, log_probs):
    """The probability of every text, summed over all alignments of (T, V)."""
    special = {1, 2, 3}
    texts = {}
    probs = log_probs.double().exp()
    for path in itertools.product([i for i in range(probs.shape[1]) if i not in special], repeat=len(probs)):
        collapsed = [token for token, _ in itertools.groupby(path) if token]
        text = " ".join(tokenizer.decode_ids(collapsed).split())
        texts[text] = texts.get(text, 0.0) + math.prod(probs[t, token].item() for t, token in enumerate(path))
    return texts


@each_backend
def test_peaked_posteriors_give_what_greedy_gives(backend, tokenizer):
    torch.manual_seed(0)
    log_probs, lengths = peaked([align(tokenizer, text) for text in SENTENCES], tokenizer.vocab_size())
    search = CtcBeamSearch(tokenizer, backend=backend, beam_size=10)
    greedy = [tokenizer.decode_ids(ids) for ids in ctc_greedy_decode(log_probs, lengths + 1e-4, 0)]
    assert search(log_probs, lengths) == greedy == SENTENCES


@each_backend
def test_alignments_of_a_text_are_summed(backend, letters):
    a = letters.piece_to_id("A")
    log_probs = torch.full((1, 2, letters.vocab_size()), -math.inf)
    log_probs[..., 0], log_probs[..., a] = math.log(0.6), math.log(0.4)
    assert ctc_greedy_decode(log_probs, torch.ones(1), 0) == [[]]  # probability 0.36; the alignments of "A" have 0.64 together
    assert CtcBeamSearch(letters, backend=backend)(log_probs, torch.ones(1)) == ["A"]


@each_backend
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_no_text_is_more_probable(backend, frames):
    """Compare with all alignments: repeated tokens, blanks between them, several boundaries in a row."""
    tokenizer = make_tokenizer(["AB BA"])  # boundary, A, B: 4 tokens with the blank
    search = CtcBeamSearch(tokenizer, backend=backend, beam_size=1000, beam_threshold=100.0)
    log_probs = torch.randn(12, frames, tokenizer.vocab_size(), generator=torch.Generator().manual_seed(frames))
    log_probs = log_probs.log_softmax(-1)
    for utterance, text in zip(log_probs, search(log_probs, torch.ones(12)), strict=True):
        texts = all_texts(tokenizer, utterance)
        assert texts[text] == pytest.approx(max(texts.values()))


@each_backend
def test_no_text_is_more_probable_where_a_text_has_several_spellings(backend):
    tokenizer = make_tokenizer(["AB AB AB BA A B"], "bpe", 9)
    assert any(len(tokenizer.id_to_piece(index)) > 1 for index in range(4, tokenizer.vocab_size()))
    search = CtcBeamSearch(tokenizer, backend=backend, beam_size=1000, beam_threshold=100.0)
    log_probs = torch.randn(12, 4, tokenizer.vocab_size(), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for utterance, text in zip(log_probs, search(log_probs, torch.ones(12)), strict=True):
        texts = all_texts(tokenizer, utterance)
        assert texts[text] == pytest.approx(max(texts.values()))


@each_backend
def test_an_utterance_does_not_depend_on_its_batch(backend, tokenizer):
    torch.manual_seed(0)
    log_probs = (4 * torch.randn(4, 12, tokenizer.vocab_size())).log_softmax(-1)
    frames = [12, 7, 1, 0]
    for utterance, count in zip(log_probs, frames, strict=True):
        utterance[count:] = math.nan
    search = CtcBeamSearch(tokenizer, backend=backend, beam_size=20)
    texts = search(log_probs, torch.tensor([count / 12 for count in frames]))
    for utterance, count, text in zip(log_probs, frames, texts, strict=True):
        assert search(utterance[None, :count], torch.ones(1)) == [text]
    assert texts[0] and texts[-1] == ""


@each_backend
def test_special_tokens_are_never_written(backend, tokenizer):
    log_probs = torch.full((1, 6, tokenizer.vocab_size()), -math.inf)
    log_probs[0, range(6), [1, 3, tokenizer.piece_to_id("A"), 3, 2, 0]] = 0.0
    text = CtcBeamSearch(tokenizer, backend=backend, beam_size=10)(log_probs, torch.ones(1))[0]
    assert "<" not in text and "\u2047" not in text and "A" in text


@each_backend
def test_words_are_separated_by_one_space(backend, letters):
    a, boundary = letters.piece_to_id("A"), letters.piece_to_id("\u2581")
    alignment = [boundary, 0, boundary, a, boundary, 0, boundary, boundary, 0, boundary, a, 0, a, boundary, 0, boundary]
    assert CtcBeamSearch(letters, backend=backend)(*peaked([alignment], 6)) == ["A AA"]


@each_backend
def test_half_precision_and_gradients_are_accepted(backend, tokenizer):
    log_probs, lengths = peaked([align(tokenizer, "NO NO")], tokenizer.vocab_size())
    assert CtcBeamSearch(tokenizer, backend=backend)(log_probs.bfloat16().requires_grad_(), lengths) == ["NO NO"]


@each_backend
def test_the_tokenizer_may_be_loaded_after_the_search_is_made(backend, letters):
    tokenizer = SentencePieceProcessor()
    search = CtcBeamSearch(tokenizer, backend=backend)
    tokenizer.LoadFromSerializedProto(letters.serialized_model_proto())
    assert search(*peaked([[0, letters.piece_to_id("A")]], 6)) == ["A"]


def write_arpa(path, probabilities, pair=("<s>", "</s>", -1.0)):
    """Write a language model with given log10 probabilities of words, and one bigram."""
    words = {"<unk>": -3.0, "<s>": -99.0, "</s>": -0.5, **probabilities}
    unigrams = [f"{score}\t{word}\t0" for word, score in words.items()]
    counts = ["\\data\\", f"ngram 1={len(words)}", "ngram 2=1"]
    bigrams = [f"{pair[2]}\t{pair[0]} {pair[1]}"]
    path.write_text("\n".join([*counts, "", "\\1-grams:", *unigrams, "", "\\2-grams:", *bigrams, "", "\\end\\", ""]))
    return path


def gzipped(path):
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    return f"{path}.gz"


@each_lm_backend
def test_a_language_model_decides_between_words_that_sound_alike(backend, tokenizer, tmp_path):
    lm_file = write_arpa(tmp_path / "lm.arpa", {"SEE": -3.0, "SEA": -1.0, "THE": -1.0})
    # A blank after each token, and at the end if a text has fewer tokens
    pair = [[i for token in tokenizer.encode_as_ids(text) for i in (token, 0)] for text in ("THE SEE", "THE SEA")]
    longest = max(map(len, pair))
    see, sea = peaked([ids + [0] * (longest - len(ids)) for ids in pair], tokenizer.vocab_size(), peak=0.99)[0].exp()
    log_probs = (0.6 * see + 0.4 * sea).log()[None]
    assert CtcBeamSearch(tokenizer, backend=backend)(log_probs, torch.ones(1)) == ["THE SEE"]
    search = CtcBeamSearch(tokenizer, backend=backend, lm_file=lm_file)
    assert search(log_probs.repeat(2, 1, 1), torch.ones(2)) == ["THE SEA", "THE SEA"]


@each_lm_backend
@pytest.mark.parametrize("weight", [0.1, 0.5, 2.0])
def test_no_text_is_better_with_a_language_model(backend, weight, tmp_path):
    """Compare with all alignments and the language model's formula, with unknown words."""
    tokenizer = make_tokenizer(["AB BA"])
    words = {"A": -0.5, "B": -1.5, "AB": -1.0, "ABB": -2.0}
    lm_file = gzipped(write_arpa(tmp_path / "lm.arpa", words, ("A", "B", -0.1)))
    keys = {"beam_size": 1000, "beam_threshold": 1000.0, "word_score": 1.5, "lm_weight": weight}
    search = CtcBeamSearch(tokenizer, backend=backend, lm_file=lm_file, **keys)
    log_probs = torch.randn(20, 4, tokenizer.vocab_size(), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for utterance, text in zip(log_probs, search(log_probs, torch.ones(20)), strict=True):
        scores = {}
        for other, prob in all_texts(tokenizer, utterance).items():
            said = other.split()
            log10 = sum(words.get(word, -3.0 + UNKNOWN_WORD) for word in said) - 0.5  # the end of the sentence
            log10 += 1.4 * list(itertools.pairwise(said)).count(("A", "B"))
            scores[other] = math.log(prob) + weight * math.log(10) * log10 + 1.5 * len(said)
        assert scores[text] == pytest.approx(max(scores.values()))


@each_lm_backend
def test_an_unknown_word_costs_the_same_without_unk(backend, tmp_path):
    """KenLM puts log10 -100 for a missing <unk>, and SRILM writes -99 for 0."""
    tokenizer, scores = make_tokenizer(["THE CAT SAT"]), []
    pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size())]
    text = write_arpa(tmp_path / "lm.arpa", {"THE": -1.0, "CAT": -1.0}).read_text()
    for line in ("0\t<unk>\t0\n", "-99\t<unk>\t0\n", ""):
        changed = text.replace("-3.0\t<unk>\t0\n", line).replace("ngram 1=5", f"ngram 1={5 if line else 4}")
        (tmp_path / "lm.arpa").write_text(changed)
        lm = flashlight_lm(str(tmp_path / "lm.arpa"), arpa_words(tmp_path / "lm.arpa"), pieces, 1.0, 0.0)
        lm.forget()
        state, total = lm.start(False), 0.0
        for token in tokenizer.encode_as_ids("THE SAT"):
            state, score = lm.score(state, token)
            total += score
        scores.append(total + lm.finish(state)[1])
    assert scores == pytest.approx([math.log(10) * (-1.0 + UNKNOWN_WORD - 0.5)] * 3)


@each_lm_backend
def test_a_language_model_in_the_other_case_is_refused(backend, tokenizer, tmp_path):
    search = CtcBeamSearch(tokenizer, backend=backend, lm_file=write_arpa(tmp_path / "lm.arpa", {"see": -1.0, "the": -1.0}))
    with pytest.raises(ValueError, match="cannot write most words of the language model .*, such as see; give one"):
        search(*peaked([[0, 4]], tokenizer.vocab_size()))


def test_a_missing_or_wrong_language_model_is_an_error_at_once(letters, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no language model .*none.arpa; give the path of an ARPA file."):
        CtcBeamSearch(letters, lm_file=tmp_path / "none.arpa")
    binary = tmp_path / "lm.bin"
    binary.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\x00\xff" * 10)
    with pytest.raises(ValueError, match="lm.bin is not in ARPA format; give the ARPA file"):
        CtcBeamSearch(letters, lm_file=binary)


@each_lm_backend
def test_a_damaged_language_model_is_named(backend, letters, tmp_path):
    lm_file = write_arpa(tmp_path / "lm.arpa", {"A": -1.0})
    lm_file.write_text(lm_file.read_text().replace("ngram 1=4", "ngram 1=5"))
    with pytest.raises(ValueError, match="The language model .*lm.arpa cannot be read; write it again"):
        CtcBeamSearch(letters, lm_file=lm_file, backend=backend)(*peaked([[0, 4]], 6))


def test_a_missing_package_is_named(letters, tmp_path, monkeypatch):
    lm_file = write_arpa(tmp_path / "lm.arpa", {"A": -1.0})
    for name in ("flashlight.lib.text.decoder", "torchaudio.models.decoder._ctc_decoder"):
        monkeypatch.setitem(sys.modules, name, None)
    torchaudio_decoder = importlib.import_module("torchaudio.models.decoder")
    monkeypatch.delattr(torchaudio_decoder, "_ctc_decoder", raising=False)
    for name in ("ctc_decoder", "CTCDecoderLM", "CTCDecoderLMState"):  # torchaudio caches them
        monkeypatch.delitem(vars(torchaudio_decoder), name, raising=False)
    assert CtcBeamSearch(letters).backend == "speechbrain"
    with pytest.raises(ImportError, match="backend flashlight needs .* pip install flashlight-text$"):
        CtcBeamSearch(letters, backend="flashlight")
    for backend in (None, "speechbrain"):
        with pytest.raises(ImportError, match="lm.arpa needs a package .* pip install flashlight-text$"):
            CtcBeamSearch(letters, lm_file=lm_file, backend=backend)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"beam_size": 0}, "beam_size is 0; give a whole number of 1 or more."),
        ({"beam_threshold": 0.0}, "beam_threshold is 0.0; give a positive number."),
        ({"backend": "kaldi"}, "There is no backend kaldi; the known ones are: flashlight, speechbrain."),
        ({"backend": ["kaldi"]}, "There is no backend .*kaldi.*; the known ones are"),
        ({"tokenizer": "x"}, "^tokenizer is 'x'; give a sentencepiece.SentencePieceProcessor."),
        ({"tokenizer": None}, "^tokenizer is None; give"),
        ({"beam_size": True}, "^beam_size is True; give"),
        ({"beam_size": 5.0}, "^beam_size is 5.0; give"),
        ({"blank_index": True}, "^blank_index is True; give"),
        ({"blank_index": -1}, "^blank_index is -1; give"),
        ({"blank_index": "0"}, "^blank_index is '0'; give"),
        ({"lm_weight": math.nan}, "^lm_weight is nan; give"),
        ({"word_score": True}, "^word_score is True; give"),
        ({"beam_threshold": math.inf}, "^beam_threshold is inf; give"),
        ({"lm_file": 5}, "^lm_file is 5; give the path of a file"),
    ],
)
def test_impossible_arguments_are_an_error(letters, keys, message):
    with pytest.raises(UserError, match=message):
        CtcBeamSearch(**{"tokenizer": letters, **keys})


@each_backend
def test_a_check_searches_and_leaves_the_random_state(backend, tokenizer):
    search, state = CtcBeamSearch(tokenizer, backend=backend, beam_size=10), torch.get_rng_state()
    search.check()
    assert torch.equal(torch.get_rng_state(), state)
    assert search(*peaked([align(tokenizer, "NO NO")], tokenizer.vocab_size())) == ["NO NO"]


@each_backend
def test_a_blank_that_is_no_token_shows_in_the_check(backend, letters):
    search = CtcBeamSearch(letters, backend=backend, blank_index=999)
    for call in (search.check, lambda: search(torch.zeros(1, 3, 6), torch.ones(1))):
        with pytest.raises(UserError, match="^blank_index is 999, but there are 6 tokens; give"):
            call()


def test_an_empty_tokenizer_shows_in_the_check():
    with pytest.raises(UserError, match="The tokenizer of the CTC search is empty; load it"):
        CtcBeamSearch(SentencePieceProcessor()).check()


@each_backend
def test_what_fails_in_a_search_shows_in_the_check(backend, letters, monkeypatch):
    search = CtcBeamSearch(letters, backend=backend)
    monkeypatch.setattr(search, f"_{backend}", lambda _: lambda _: 1 / 0)
    with pytest.raises(UserError, match="^ctc_search cannot search: division by zero; change its setting."):
        search.check()


@each_backend
def test_impossible_posteriors_are_an_error(backend, letters):
    search = CtcBeamSearch(letters, backend=backend)
    log_probs = torch.zeros(2, 3, 6).log_softmax(-1)
    with pytest.raises(ValueError, match=r"the shape \(2, 3, 6\) and lengths \(1,\); give"):
        search(log_probs, torch.ones(1))
    with pytest.raises(ValueError, match=r"the shape \(3, 6\)"):
        search(log_probs[0], torch.ones(2))
    with pytest.raises(ValueError, match="of 5 tokens, but the tokenizer has 6; load"):
        search(log_probs[..., :5], torch.ones(2))
    for lengths in ([3.0, 2.0], [-1.0, 1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="give relative lengths"):
            search(log_probs, torch.tensor(lengths))
    for bad in (math.nan, math.inf):
        log_probs[1, 2, 3] = bad
        with pytest.raises(ValueError, match="hold NaN or infinity; take an earlier checkpoint"):
            search(log_probs, torch.ones(2))
