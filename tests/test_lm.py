"""Language models of SpeechBrain in the joint search, in their published layout, and n-grams of tokens."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hub import Hub, client
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from speechbrain.decoders.scorer import KenLMScorer, RNNLMScorer
from speechbrain.lobes.models.RNNLM import RNNLM
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.nnet.RNN import LSTM
from test_warm_start import make_tokenizer
from tiny import ROOT, SENTENCES, SMALL, arguments, make_corpus, make_model, needs_flashlight

import train
from speechbrain_ext import cli
from speechbrain_ext.dataio.tokenizer import arrange_tokenizer
from speechbrain_ext.decoders import token_graph, token_ngram
from speechbrain_ext.decoders.ctc_beam import CtcBeamSearch
from speechbrain_ext.decoders.lm import TransformerLMScorer, make_scorer
from speechbrain_ext.decoders.ngram import write_arpa
from speechbrain_ext.decoders.phrases import phrase_graph
from speechbrain_ext.decoders.token_ngram import in_tokens, ngram_graph
from speechbrain_ext.inference import load_model
from speechbrain_ext.model_folder.lm import load_lm
from speechbrain_ext.utils.errors import UserError
from speechbrain_ext.utils.files import read_csv

FOLDERS = ROOT / "tests" / "data" / "model_folders"
# The hyperparams.yaml of SpeechBrain's published models, with smaller sizes
TRANSFORMER = """
output_neurons: 25
bos_index: 1
eos_index: 2
asr_model: !new:torch.nn.ModuleList [[!apply:os.mkdir [executed]]]
lm_model: !new:speechbrain.lobes.models.transformer.TransformerLM.TransformerLM # yamllint disable-line rule:line-length
    vocab: !ref <output_neurons>
    d_model: 16
    nhead: 2
    num_encoder_layers: 2
    num_decoder_layers: 0
    d_ffn: 32
    dropout: 0.0
    activation: !name:torch.nn.GELU
    normalize_before: False
tokenizer: !new:sentencepiece.SentencePieceProcessor
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    paths:
        lm: !ref <pretrained_lm_tokenizer_path>/lm.ckpt
"""
RNN = """
bos_index: 1
eos_index: 2
lm_model: !new:speechbrain.lobes.models.RNNLM.RNNLM
    output_neurons: 25
    embedding_dim: 8
    activation: !name:torch.nn.LeakyReLU
    dropout: 0.0
    rnn_layers: 2
    rnn_neurons: 16
    dnn_blocks: 1
    dnn_neurons: 16
"""
SIZES = {"d_model": 16, "nhead": 2, "num_encoder_layers": 2, "d_ffn": 32, "dropout": 0.0, "activation": torch.nn.GELU}


def rnn_lm(tokens):
    keys = {"rnn_layers": 2, "rnn_neurons": 16, "dnn_blocks": 1, "dnn_neurons": 16, "dropout": 0.0, "return_hidden": True}
    return RNNLM(tokens, 8, torch.nn.LeakyReLU, rnn_class=LSTM, **keys)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with a decoder, and a tokenizer of a language model: the same tokens with other numbers, without the blank."""
    folder = tmp_path_factory.mktemp("lm")
    make_model(folder, 1)
    tokenizer = (folder / "model" / "tokenizer.ckpt").read_bytes()
    theirs = arrange_tokenizer(tokenizer, 24, 1, 2, 0)
    pieces = SentencePieceProcessor(model_proto=theirs)
    assert pieces.vocab_size() == 25 and pieces.id_to_piece(3) != SentencePieceProcessor(model_proto=tokenizer).id_to_piece(3)
    for name, settings in (("transformer", TRANSFORMER), ("rnn", RNN)):
        torch.manual_seed(0)
        lm = TransformerLM(25, **SIZES) if name == "transformer" else rnn_lm(25)
        write(
            folder / name,
            settings,
            {key: 4 * value if value.dim() == 2 else value for key, value in lm.state_dict().items()},
            theirs,
        )
    return folder


def write(folder, settings, weights, tokenizer):
    folder.mkdir(exist_ok=True)
    (folder / "hyperparams.yaml").write_text(settings)
    torch.save(weights, folder / "lm.ckpt")
    (folder / "tokenizer.ckpt").write_bytes(tokenizer)
    return folder


def answers(model, **keys):
    """Tokens of three utterances of noise, and the scores of the search."""
    wavs = 0.1 * torch.randn(3, 30000, generator=torch.Generator().manual_seed(1))
    enc, lens = model._encode(wavs, torch.tensor([1.0, 0.6, 0.8]))
    tokens, _, scores, _ = model.mods.decoder(enc, lens)
    return tokens, scores


@pytest.mark.parametrize("kind", ["transformer", "rnn"])
def test_a_published_language_model_is_what_it_was_whatever_the_numbers_of_its_tokens(kind, place):
    tokenizer = SentencePieceProcessor(str(place / "model" / "tokenizer.ckpt"))
    theirs = SentencePieceProcessor(str(place / kind / "tokenizer.ckpt"))
    ours, scorer = load_lm(place / kind, tokenizer), make_scorer(load_lm(place / kind, tokenizer), 1.0)
    plain = TransformerLM(25, **SIZES) if kind == "transformer" else rnn_lm(25)
    plain.load_state_dict(torch.load(place / kind / "lm.ckpt"))
    plain.eval()
    text, memory, hidden = [tokenizer.bos_id(), *tokenizer.encode_as_ids("THE CAT SAT")], None, None
    same = [theirs.piece_to_id(tokenizer.id_to_piece(token)) for token in range(4, 25)]
    for end, token in enumerate(text, 1):
        found, memory = scorer.score(torch.tensor([token]), memory, None, None)
        prefix = [theirs.piece_to_id(tokenizer.id_to_piece(each)) for each in text[:end]]
        if kind == "rnn":
            logits, hidden = plain(torch.tensor([prefix[-1]]), hx=hidden)
        else:
            logits = plain(torch.tensor([prefix]))[:, -1]
        torch.testing.assert_close(found[0, 4:], logits.log_softmax(-1)[0, same], atol=1e-5, rtol=1e-5)
    assert not ours.training and not any(parameter.requires_grad for parameter in scorer.lm.parameters())


@pytest.mark.parametrize("kind", ["transformer", "rnn"])
def test_the_search_listens_to_the_language_model(kind, place):
    model = load_model(place / "model", "cpu")
    plain = answers(model)
    state, size = set(model.hparams.asr_model.state_dict()), sum(p.numel() for p in model.mods.parameters())
    model.choose_lm(place / kind, weight=0.0)
    nothing = answers(model)
    assert nothing[0] == plain[0]
    model.choose_lm(place / kind, weight=1.0)
    assert answers(model)[0] != plain[0]
    # It is not part of the model, and tokens that it excludes no longer occur
    assert set(model.hparams.asr_model.state_dict()) == state and sum(p.numel() for p in model.mods.parameters()) == size
    said = {token for text in plain[0] for token in text}
    lm = model.mods.decoder.scorer.full_scorers["transformerlm" if kind == "transformer" else "rnnlm"].lm
    output = lm.output_proj.layers[-1].w if kind == "transformer" else lm.out.w
    output.bias.data[list(said)] = -1e3
    assert not said.intersection(token for text in answers(model)[0] for token in text)
    assert model.search_settings["lm"][1] == 1.0


def test_scorers_of_an_n_gram(place):
    """SpeechBrain's scorer of n-grams, which needs the package kenlm."""
    pytest.importorskip(
        "kenlm", reason="SpeechBrain's scorer needs KenLM's Python module, which pip must compile: pip install kenlm"
    )
    tokenizer = SentencePieceProcessor(str(place / "model" / "tokenizer.ckpt"))
    write_arpa([tokenizer.encode_as_pieces(text) for text in SENTENCES], place / "tokens.arpa", order=2)
    pieces = [tokenizer.id_to_piece(token) for token in range(tokenizer.vocab_size())]
    model = load_model(place / "model", "cpu")
    plain = answers(model)
    model.mods.decoder.add_scorer(KenLMScorer(str(place / "tokens.arpa"), len(pieces), pieces), 2.0)
    assert answers(model)[0] != plain[0]


def test_a_repository_of_the_hub(place):
    """It is downloaded at a commit, and gives the same text as the folder."""
    files = {file.name: file.read_bytes() for file in (place / "transformer").iterdir()}
    model = load_model(place / "model", "cpu")
    model.choose_lm(place / "transformer", weight=1.0, temperature=1.0)
    expected = model.transcribe_file(place / "long.flac")
    with Hub() as hub:
        hub.make("ann/lm")
        commit = hub.commit("ann/lm", "main", files)
        hub.commit("ann/lm", "main", {"lm.ckpt": b"another"})
        command = ["transcribe", "--model", place / "model", "--device", "cpu", place / "long.flac", "--lm"]
        asked = ["--lm-weight", "1", "--lm-temperature", "1"]
        commands = [[*command, f"ann/lm@{commit}", *asked], [*command, "ann/lm"], [*command, "ann/none"]]
        found, damaged, missing = client(place / "cache", hub.url, *commands)
    assert found[:2] == [0, f"{place / 'long.flac'}\t{expected}\n"]
    assert damaged[0] == 2 and "The language model ann/lm cannot be used: lm.ckpt is damaged" in damaged[2]
    assert missing[0] == 2 and "ann/none is neither a folder nor a model" in missing[2]


def test_a_training_tests_with_it_and_keeps_nothing_of_it(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    corpus, results = make_corpus(tmp_path / "corpus"), tmp_path / "results.csv"
    keys = {**SMALL, "data_folder": corpus, "output_folder": tmp_path / "run", "results_file": results, "device": "cpu"}
    keys |= {"tokenizer_from": place / "model" / "tokenizer.ckpt", "lm": place / "transformer", "lm_weight": 0.5}
    assert train.main(["hparams/hyperconformer.yaml", *arguments(**keys)]) == 0
    kept = tmp_path / "run" / "pretrained"
    model = [
        "--model",
        str(kept),
        "--device",
        "cpu",
        "--lm",
        str(place / "transformer"),
        "--lm-weight",
        "0.5",
        "--beam-size",
        "2",
    ]
    assert cli.main(["evaluate", *model, str(corpus / "test-tiny"), "--output", str(tmp_path / "again.csv")]) == 0
    *_, row = read_csv(results)
    (again,) = read_csv(tmp_path / "again.csv")
    assert row["search"] == again["search"] == "joint_beam_lm"
    assert [again[key] for key in ("lm", "lm_weight", "beam_size")] == [str(place / "transformer"), "0.5", "2"]
    counts = ("WER", "insertions", "deletions", "substitutions")
    assert [row[count] for count in counts] == [again[count] for count in counts]
    (checkpoint,) = (tmp_path / "run" / "save").glob("*/model.ckpt")
    for names in (torch.load(checkpoint), load_file(kept / "asr.safetensors")):
        assert not any("lm" in name.split(".")[0] and not name.startswith("ctc_lin") for name in names)
        assert not any("output_proj" in name for name in names)
    assert str(place / "transformer") not in (kept / "hyperparams.yaml").read_text()


class Trap:
    def __reduce__(self):
        return print, ("executed",)


def broken(place, tokenizer, weights):
    lower = [text.lower() for text in SENTENCES]
    yield TRANSFORMER, {"a": Trap()}, tokenizer, "holds more than tensors"
    yield TRANSFORMER, {1: torch.ones(1)}, tokenizer, "holds no tensors by name"
    large = {"a": torch.zeros(1).expand(10**7, 10**6)}  # as in a file of 2 kB
    yield TRANSFORMER.replace("d_ffn: 32", "d_ffn: 900000"), large, tokenizer, "larger"
    yield TRANSFORMER, {**weights, "x": torch.ones(1)}, tokenizer, "lm.ckpt does not match hyperparams.yaml"
    yield TRANSFORMER.replace("d_ffn: 32", "d_ffn: 48"), weights, tokenizer, "size mismatch"
    yield TRANSFORMER.replace("d_ffn: 32", "d_ffn: 900000"), weights, tokenizer, "larger"
    yield TRANSFORMER.replace("d_ffn: 32", "d_ffn: [32]"), weights, tokenizer, "not a number, text or name"
    yield TRANSFORMER.replace("!name:torch.nn.GELU", "!name:os.system"), weights, tokenizer, "!name:os.system"
    yield TRANSFORMER.replace("lm_model: !new", "lm_model: !name"), weights, tokenizer, "has 0 keys with a TransformerLM or RNNLM"
    yield "lm_model: [", weights, tokenizer, "is not valid YAML"
    yield TRANSFORMER, {key: value * math.nan for key, value in weights.items()}, tokenizer, "NaN or infinite values"
    yield TRANSFORMER, weights, tokenizer[:50], "damaged"
    yield TRANSFORMER, weights, arrange_tokenizer(make_tokenizer(lower), 24, 1, 2, 0), "has other tokens than the model"
    yield TRANSFORMER.replace("eos_index: 2", "eos_index: 77"), weights, tokenizer, "do not both have a token eos"


def test_what_cannot_be_used_is_refused(place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    weights, tokenizer = torch.load(place / "transformer" / "lm.ckpt"), (place / "transformer" / "tokenizer.ckpt").read_bytes()
    model = load_model(place / "model", "cpu")
    for number, (*content, message) in enumerate(broken(place, tokenizer, weights)):
        folder = write(tmp_path / str(number), *content)
        with pytest.raises(UserError, match=message) as caught:
            model.choose_lm(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    (folder / "lm.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="has no lm.ckpt"):
        model.choose_lm(folder)
    for keys, message in (
        ({"weight": math.nan}, "weight of the language model .*transformer is nan; give a number from 0 to 100"),
        ({"temperature": 0}, "lm_temperature is 0"),
    ):
        with pytest.raises(UserError, match=message):
            model.choose_lm(place / "transformer", **keys)
    assert "executed" not in capfd.readouterr().out and not (tmp_path / "executed").exists()


def test_a_language_model_in_another_form_is_refused():
    with pytest.raises(UserError, match="1 decoder layers"):
        TransformerLMScorer(TransformerLM(9, d_model=8, nhead=2, num_encoder_layers=1, num_decoder_layers=1, d_ffn=8))
    with pytest.raises(UserError, match="is a Linear; give SpeechBrain's TransformerLM or RNNLM"):
        make_scorer(torch.nn.Linear(2, 2))
    assert isinstance(make_scorer(rnn_lm(9)), RNNLMScorer)


# ------------------------------------------------------------------ n-grams of tokens, in every beam


@pytest.fixture(scope="module")
def arpa(place):
    """A trigram and a bigram of a model's tokens, written by the command, and an n-gram of words."""
    (place / "text.txt").write_text("\n".join([*SENTENCES[:4], "ÉÀ CAT"]))
    for name, *options in (("tri", "--tokens", str(place / "model")), ("bi", "--order", "2", "--tokens", str(place / "t.model"))):
        assert cli.main(["ngram", str(place / "text.txt"), "--out", str(place / f"{name}.arpa"), *options]) == 0
    assert cli.main(["ngram", str(place / "text.txt"), "--out", str(place / "words.arpa")]) == 0
    return place


def log10_of(path, tokens):
    """The log10 probability of a text, by the back-off rule."""
    grams = {}
    for line in path.read_text().splitlines():
        fields = line.split("\t")
        if len(fields) > 1:
            grams[tuple(fields[1].split())] = float(fields[0]), float(fields[2]) if len(fields) > 2 else 0.0

    def score(history, token):
        if (*history, token) in grams:
            return grams[*history, token][0]
        return score(history[1:], token) + grams.get(history, (0, 0.0))[1] if history else grams["<unk>",][0]

    order = max(map(len, grams))
    said = ["<s>", *tokens, "</s>"]
    return sum(score(tuple(said[max(0, i - order + 1) : i]), said[i]) for i in range(1, len(said)))


@pytest.mark.parametrize("name", ["tri", "bi"])
def test_the_automaton_of_an_n_gram_gives_its_probabilities(name, arpa):
    tokenizer = SentencePieceProcessor(str(arpa / "model" / "tokenizer.ckpt"))
    graph = ngram_graph(arpa / f"{name}.arpa", tokenizer, 0.7)
    for text in [*SENTENCES, "SSS", "CAT CAT THE", ""]:
        score, places = 0.0, token_graph.begin([graph], 1)
        for token in tokenizer.encode_as_ids(text):
            score += token_graph.added([graph], places)[0, token].item()
            places = token_graph.advance([graph], places, torch.tensor([token]))
        score += token_graph.ends([graph], places).item()
        expected = 0.7 * math.log(10) * log10_of(arpa / f"{name}.arpa", tokenizer.encode_as_pieces(text))
        assert score == pytest.approx(expected, abs=1e-4)


def sections(text):
    """The lines of an ARPA file: its head, and the n-grams of each order."""
    head, *orders = re.split(r"\n\\\d-grams:\n", text.removesuffix("\n\\end\\\n"))
    return head, [order.strip().split("\n") for order in orders]


def joined(orders, head=None):
    counts = "".join(f"ngram {n}={len(lines)}\n" for n, lines in enumerate(orders, 1))
    parts = ["\n".join([f"\n\\{n}-grams:", *lines, ""]) for n, lines in enumerate(orders, 1)]
    return (f"\\data\\\n{counts}" if head is None else head + "\n") + "".join(parts) + "\n\\end\\\n"


def flawed(text):
    """ARPA files with each kind of damage, and what the error says of it."""
    head, (ones, twos, threes) = sections(text)
    prefix = threes[0].split("\t")[1].rpartition(" ")[0]
    yield (
        "no context",
        joined([ones, [line for line in twos if f"\t{prefix}\t" not in line], threes]),
        "of its 3-gram number .* are not a 2-gram",
    )
    word = twos[-1].split("\t")[1].split(" ")
    for place, name in ((0, "first"), (1, "last")):
        fewer = [line for line in ones if line.split("\t")[1] != word[place]]
        yield (
            f"no {name} word",
            joined([fewer, twos, threes]),
            "which is not one of the 1-grams|of its 2-gram number .* are not a 1-gram",
        )
    yield "no 1-grams", joined([[], twos, threes]), "all orders are needed"
    yield "no 1-grams stated", head.replace("ngram 1=", "ngram 9=") + text[len(head) :], "all orders are needed"
    yield "only 1-grams", joined([ones]), "has only single words"
    yield "no 2-grams", joined([ones, [], threes]), "of its 3-gram number .* are not a 2-gram"
    yield "no numbers", head.split("ngram")[0] + text[len(head) :], "all orders are needed"
    for order, lines in enumerate((ones, twos, threes), 1):
        number, _, rest = lines[1].partition("\t")
        for value in ("abc", "nan", "inf", "0.5", "+inf", "1e400", "-1,5", ""):
            damaged = [lines[0], f"{value}\t{rest}", *lines[2:]]
            orders = [*[ones, twos, threes][: order - 1], damaged, *[ones, twos, threes][order:]]
            yield f"probability {value} of order {order}", joined(orders), "Line .* has .*; write it again"
        if order < 3:
            for value in ("abc", "nan", "inf", "1e300"):
                damaged = [lines[0], f"{number}\t{rest.partition(chr(9))[0]}\t{value}", *lines[2:]]
                orders = [*[ones, twos, threes][: order - 1], damaged, *[ones, twos, threes][order:]]
                yield f"backoff {value} of order {order}", joined(orders), "has a number that is no logarithm"
        orders = [*[ones, twos, threes][: order - 1], [*lines, lines[-1]], *[ones, twos, threes][order:]]
        yield f"an {order}-gram twice", joined(orders), f"its {order}-grams number .* are the same"
        orders = [*[ones, twos, threes][: order - 1], [*lines, "-1.0"], *[ones, twos, threes][order:]]
        yield f"a short line of order {order}", joined(orders), "has 1 field in place of"
        orders = [*[ones, twos, threes][: order - 1], [*lines, lines[0] + "\t0\t0"], *[ones, twos, threes][order:]]
        yield f"a long line of order {order}", joined(orders), "fields in place of"
        for change in (-1, 1):
            stated = head.replace(f"ngram {order}={len(lines)}", f"ngram {order}={len(lines) + change}")
            yield (
                f"{change} {order}-grams",
                stated + text[len(head) :],
                f"it states {len(lines) + change} {order}-grams, but holds",
            )
        yield (
            f"no section {order}",
            text.replace(f"\\{order}-grams:", ""),
            "cannot be read; write it again|has .* fields in place of|has a number",
        )
        yield (
            f"section {order} twice",
            text.replace(f"\\{order}-grams:", "\\1-grams:" if order > 1 else "\\2-grams:"),
            "in place of",
        )
        yield f"cut in order {order}", text[: text.index(lines[-1])], "has no end|cannot be read"
    yield (
        "other text than UTF-8",
        text.replace(twos[0], twos[0].replace(twos[0].split("\t")[1], "F\udcffR")),
        "text that is not UTF-8",
    )
    yield "no end", text.replace("\\end\\", ""), "has no end"
    yield "a byte order mark", "\ufeff" + text, "begins with a byte order mark"
    yield "no head", text.replace("\\data\\", ""), "is not in ARPA format"
    yield "a long count", text.replace("ngram 1=", "ngram 1=" + "9" * 5000), "all orders are needed"
    yield "empty", "", "is not in ARPA format"


def test_every_damage_of_an_arpa_file_is_an_error_of_one_sentence(arpa, tmp_path):
    """Of tokens and of words, which the CTC beam search checks before KenLM reads them."""
    tokenizer = SentencePieceProcessor(str(arpa / "model" / "tokenizer.ckpt"))
    searches = {"tri": lambda path: ngram_graph(path, tokenizer), "words": lambda path: CtcBeamSearch(tokenizer, lm_file=path)}
    for name, read in searches.items():
        for number, (flaw, text, message) in enumerate(flawed((arpa / f"{name}.arpa").read_text())):
            path = tmp_path / f"{name}{number}.arpa"
            path.write_text(text, errors="surrogateescape")
            with pytest.raises(UserError) as caught:
                read(path)
            assert re.search(message, str(caught.value)) and str(path) in str(caught.value), (name, flaw, caught.value)
            assert "\n" not in str(caught.value)


def test_unusual_arpa_files_are_read(arpa, tmp_path):
    """Other line ends, text before and after, no back-off weights, probabilities of 0, and without <unk> or <s>."""
    tokenizer = SentencePieceProcessor(str(arpa / "model" / "tokenizer.ckpt"))
    text, expected = (arpa / "tri.arpa").read_text(), ngram_graph(arpa / "tri.arpa", tokenizer, 0.7)
    head, (ones, twos, threes) = sections(text)
    same = [text.replace("\n", "\r\n"), f"a remark\n\n{text}\nmore\n\\1-grams:\n-1\tX\n", text.replace("\t", "  ")]
    backoffs = ["\t".join(line.split("\t")[:2]) for line in twos]
    impossible = ["-inf" + line[line.index("\t") :] if "\t▁" in line else line for line in ones]
    without = [[line for line in lines if "<unk>" not in line and "<s>" not in line] for lines in (ones, twos, threes)]
    for number, content in enumerate(
        [*same, joined([ones, backoffs, threes]), joined([impossible, twos, threes]), joined(without)]
    ):
        (tmp_path / "lm.arpa").write_text(content, newline="")
        graph = ngram_graph(tmp_path / "lm.arpa", tokenizer, 0.7)
        if number < len(same):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(graph.buffers(), expected.buffers(), strict=True))
        places = token_graph.begin([graph], 1)
        for token in tokenizer.encode_as_ids("THE CAT SAT"):
            assert token_graph.added([graph], places).isfinite().all()
            places = token_graph.advance([graph], places, torch.tensor([token]))


def test_text_of_other_letters_is_refused(arpa, tmp_path):
    """Lower case for a model of capitals: when an n-gram is made, and when one that was made so is read."""
    tokenizer = SentencePieceProcessor(str(arpa / "model" / "tokenizer.ckpt"))
    sentences = [sentence.split() for sentence in SENTENCES]
    lower = [[word.lower() for word in words] for words in sentences]
    with pytest.raises(UserError, match=r"cannot write \d+ of the \d+ words of the text; .* --text-normalization upper"):
        write_arpa(in_tokens(lower, tokenizer), tmp_path / "lm.arpa")
    assert not list(tmp_path.iterdir())
    write_arpa(in_tokens(sentences + lower[: len(lower) // 2], tokenizer), tmp_path / "mixed.arpa")
    ngram_graph(tmp_path / "mixed.arpa", tokenizer)
    write_arpa([["▁", "<unk>"]] * 3, tmp_path / "lower.arpa", order=2)
    with pytest.raises(UserError, match=r"lower.arpa has none of the model's tokens; write one with ngram --tokens"):
        ngram_graph(tmp_path / "lower.arpa", tokenizer)


def test_a_subtracted_language_model_does_not_reward_what_it_has_never_seen(arpa, tmp_path):
    """Tokens that it lacks, or states as impossible, are worth what its rarest token is worth."""
    tokenizer = SentencePieceProcessor(str(arpa / "model" / "tokenizer.ckpt"))
    _, (ones, twos, threes) = sections((arpa / "tri.arpa").read_text())
    ones = [line for line in ones if "<unk>" not in line]
    known = {line.split("\t")[1]: float(line.split("\t")[0]) for line in ones}
    twos, threes = ([line for line in lines if "<unk>" not in line] for lines in (twos, threes))
    missing = [token for token in range(4, tokenizer.vocab_size()) if tokenizer.id_to_piece(token) not in known]
    rarest = min(value for word, value in known.items() if word not in ("<s>", "</s>"))
    for more in ([], ["-99\t<unk>\t0"], [f"-99\t{tokenizer.id_to_piece(token)}\t-99" for token in missing]):
        (tmp_path / "lm.arpa").write_text(joined([[*ones, *more], twos, threes]))
        root = ngram_graph(tmp_path / "lm.arpa", tokenizer, -0.15).root
        assert missing and root[missing] == pytest.approx(-0.15 * math.log(10) * rarest) and root.max() == root[missing].max()


def test_a_large_n_gram_takes_little_memory(tmp_path, monkeypatch):
    """The graph of 5,000 tokens with 20,000 contexts has the size of its n-grams, not of contexts times tokens."""
    pieces = ["<pad>", "<s>", "</s>", "<unk>", *(f"▁{number}" for number in range(5000))]
    tokenizer = SimpleNamespace(
        vocab_size=lambda: len(pieces),
        id_to_piece=pieces.__getitem__,
        is_control=lambda token: token < 3,
        is_unknown=lambda token: token == 3,
        encode_as_ids=lambda text: [int(word) + 4 for word in text.split()],
    )
    ones = [f"-3\t{piece}\t-0.5" for piece in pieces[1:]]
    pairs = sorted({(7 * number % 5000, number * number % 4999) for number in range(15000)})
    twos = [f"-2\t▁{first} ▁{second}\t-0.25" for first, second in pairs]
    threes = [f"-1\t▁{first} ▁{second} ▁{first}" for first, second in pairs]
    (tmp_path / "lm.arpa").write_text(joined([ones, twos, threes]))
    graph = ngram_graph(tmp_path / "lm.arpa", tokenizer, 1.0)
    phrases = phrase_graph(
        {" ".join(str(7 * number * place % 5000) for place in range(1, 5)): None for number in range(4000)}, tokenizer
    )
    for each in (graph, phrases):
        assert sum(table.nbytes for table in each.buffers()) < 2e6
    monkeypatch.setattr(token_ngram, "MOST_NGRAMS", 20000)
    with pytest.raises(UserError, match="lm.arpa has more than 20000 n-grams; write a smaller one, with ngram --prune"):
        ngram_graph(tmp_path / "lm.arpa", tokenizer, 1.0)
    first, second = pairs[0]
    after = token_graph.advance([graph], token_graph.begin([graph], 1), torch.tensor([first + 4]))
    after = token_graph.advance([graph], after, torch.tensor([second + 4]))
    added = token_graph.added([graph], after)[0] / math.log(10)
    other = next(token for token in range(5000) if token != first and (second, token) not in set(pairs))
    assert added[first + 4] == pytest.approx(-1) and added[other + 4] == pytest.approx(-3 - 0.5 - 0.25)


@pytest.mark.parametrize("kind", ["ctc_beam", "joint_beam", "ctc_rescored", "transducer_beam"])
def test_every_beam_takes_it(kind, arpa):
    """A weight of 0, or subtraction from itself, changes nothing; otherwise it changes texts or scores."""
    folder, answers = FOLDERS / "transducer-v1" if kind == "transducer_beam" else arpa / "model", {}
    wavs = 0.1 * torch.randn(2, 30000, generator=torch.Generator().manual_seed(0))
    path = arpa / "own.arpa"
    tokenizer = SentencePieceProcessor(str(folder / "tokenizer.ckpt"))
    write_arpa([tokenizer.encode_as_pieces(text) for text in SENTENCES], path, order=2)
    lodr = {"lodr": path, "lodr_weight": 1.5}
    settings = {"none": None, "zero": {"weight": 0.0}, "off": {"weight": 0.0, **lodr}, "one": {"weight": 1.5}}
    for name, keys in (settings | {"itself": {"weight": 1.5, **lodr}}).items():
        model = load_model(folder, "cpu")
        model.choose_search(kind)
        if keys is not None:
            model.choose_lm(path, **keys)
        answers[name] = model.transcribe_batch(wavs, torch.tensor([1.0, 0.8]))[1]
    assert answers["none"] == answers["zero"] == answers["off"] == answers["itself"] != answers["one"]


def test_an_n_gram_that_cannot_be_is_refused(arpa, capsys):
    needs_flashlight()
    model = load_model(FOLDERS / "transducer-v1", "cpu")
    for source, keys, message in (
        (arpa / "words.arpa", {}, "uses transducer_beam, but the language model .*words.arpa is for ctc_beam only; choose"),
        (arpa / "none.arpa", {}, "There is no language model"),
        (arpa / "text.txt", {}, "is not in ARPA format"),
        (arpa / "tri.arpa", {"weight": math.nan}, "is nan; give a number"),
        (
            arpa / "tri.arpa",
            {"temperature": 1.0},
            "--lm-temperature is given, but the language model .* is of tokens, which does not use it",
        ),
        (arpa / "tri.arpa", {"lodr": arpa / "bi.arpa", "lodr_weight": -1}, "bi.arpa is -1; give a number from 0 to 100"),
        (arpa / "transformer", {}, "a model without an attention decoder takes only ARPA files"),
    ):
        with pytest.raises((UserError, FileNotFoundError), match=message):
            model.choose_lm(source, **keys)
    assert not model.graphs
    with pytest.raises(UserError, match="--lodr is given, but the language model .*transformer is of SpeechBrain"):
        load_model(arpa / "model", "cpu").choose_lm(arpa / "transformer", lodr=arpa / "tri.arpa")
    for options, message in (
        (["--lodr", "x.arpa"], "--lodr is given, but there is no language model"),
        (["--lm-weight", "1"], "--lm-weight is given, but there is no language model"),
    ):
        assert cli.main(["transcribe", "--model", str(arpa / "model"), "--device", "cpu", "x.flac", *options]) == 2
        assert message in capsys.readouterr().err


def test_evaluate_takes_it(arpa, tmp_path, capsys):
    corpus, common = make_corpus(tmp_path / "corpus"), ["--model", str(arpa / "model"), "--device", "cpu"]
    model = [*common, "--lm", str(arpa / "tri.arpa"), "--lodr", str(arpa / "bi.arpa")]
    asked = ["--search", "ctc_beam", "--search", "joint_beam", "--output", str(tmp_path / "rows.csv")]
    assert cli.main(["evaluate", *model, str(corpus / "test-tiny"), *asked]) == 0
    assert [(row["search"], row["lm"], row["lodr"]) for row in read_csv(tmp_path / "rows.csv")] == [
        (name, str(arpa / "tri.arpa"), str(arpa / "bi.arpa")) for name in ("ctc_beam", "joint_beam_lm")
    ]
    capsys.readouterr()
    for options, message in (
        (["--lm", str(arpa / "words.arpa"), "--lodr", str(arpa / "bi.arpa")], "--lodr is given, but .*words.arpa is of words"),
        (["--lm-weight", "1"], "--lm-weight is given, but there is no language model"),
    ):
        assert cli.main(["evaluate", *common, str(corpus / "test-tiny"), *options]) == 2
        assert re.search(message, capsys.readouterr().err)
