"""Warm starts: weights of all origins give the same answers, tokens keep their rows, and frozen parts do not change."""

import io
import json
import re
import shlex
import shutil
import tarfile

import numpy as np
import pytest
import sentencepiece
import soundfile
import speechbrain as sb
import torch
from safetensors.torch import load_file, save_file
from speechbrain.lobes.models.convolution import ConvolutionFrontEnd
from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
from speechbrain.nnet.linear import Linear
from speechbrain.processing.features import InputNormalization
from tiny import ROOT, SENTENCES, SMALL, SMALL_TRANSDUCER, arguments, make_model

from speechbrain_ext.brains.asr import AsrBrain
from speechbrain_ext.dataio.tokenizer import arrange_tokenizer
from speechbrain_ext.hparams import load_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.model_folder.write import model_parts
from speechbrain_ext.training import sources
from speechbrain_ext.training.run import UsageError, run
from speechbrain_ext.training.settings import choose_setting, take_paths
from speechbrain_ext.training.sources import Source, read_source
from speechbrain_ext.training.warm_start import begin_with, warm_start
from speechbrain_ext.utils.errors import UserError

PAGE = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
CORPORA = [ROOT / "recipes" / name / "corpus.yaml" for name in ("Synthetic", "Manifest")]
SPECIAL = {"blank": 0, "bos": 1, "eos": 2, "unk": 3}
# Two training batches per epoch; the test set is the validation set
KEYS = {**SMALL, "test_splits": "[dev-tiny]", "average_checkpoints": 1, "warmup_steps": 1, "lr": 0.01}
KEYS["train_batch_sampler"] = "{max_batch_length: 8, num_buckets: 2}"


@pytest.fixture
def train(corpus, tmp_path, monkeypatch):
    """Train in this process, as train.py does with these arguments."""
    monkeypatch.chdir(tmp_path)

    def train(name, *argv, data=("--data_folder", corpus), **keys):
        keys = {key: value for key, value in {**KEYS, **keys}.items() if value is not None}
        file = name if "/" in str(name) else ROOT / "hparams" / f"{name}.yaml"
        argv, paths = take_paths(list(map(str, [file, "--device", "cpu", *data, *argv, *arguments(**keys)])))
        file, run_opts, overrides = sb.parse_arguments(argv)
        return run(file, run_opts, overrides, paths, None, *CORPORA)

    return train


def weights(folder):
    return load_file(folder / "asr.safetensors")


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


SIZES = ("vocab_size", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "d_ffn")
OF_THE_MODEL = dict.fromkeys(SIZES)
"""Keys that finetune.yaml takes from the model folder."""

# ------------------------------------------------------------------ origins

OWN = ["conformer", "hyperconformer", "squeezeformer", "fusionformer", "practical_conformer"]
OWN += ["cascade_hyperconformer_squeezeformer", "squeezeformer_transducer"]


@pytest.mark.parametrize("name", OWN)
def test_a_model_of_ours_begins_with_its_own_loss(name, train, tmp_path, monkeypatch):
    layers = min(1, load_hparams(ROOT / "hparams" / f"{name}.yaml", "output_folder: x")["num_decoder_layers"])
    # The pruned loss chooses labels with weights that a folder does not hold
    keys = {"transducer_loss": "full"} if name.endswith("transducer") else {}
    theirs = make_model(tmp_path, layers, name, **keys, **(SMALL_TRANSDUCER if keys else {}))
    losses = []

    def fit(self, epochs, _, valid, valid_loader_kwargs, **keys):
        theirs["tokenizer"].load("run/taken.model")
        before = self.hparams.brain(theirs["modules"], theirs["opt_class"], theirs, {"device": "cpu"})
        for brain in (self, before):
            losses.append(brain.evaluate(valid, test_loader_kwargs=valid_loader_kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(AsrBrain, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        train("finetune", init_from=tmp_path / "model", output_folder="run", seed=2, **OF_THE_MODEL, **keys)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 1
    assert "but this model" not in (tmp_path / "run" / "log.txt").read_text()


def test_features_and_front_end_follow_their_keys(train, tmp_path):
    """A model for 16 kHz is fine-tuned with 8 kHz: its features and its folder have 8 kHz, and the log tells the difference."""
    make_model(tmp_path, 0, "conformer")
    keys = {**OF_THE_MODEL, "init_from": "model", "sample_rate": 8000, "dropout": 0.3}
    result = train("finetune", **keys)
    folder, log = result.folders["pretrained"], (result.output / "log.txt").read_text()
    text = (folder / "hyperparams.yaml").read_text()
    assert text.count("sample_rate: 8000") == 3 and "16000" not in text and "dropout: 0.1" not in text
    assert "model has compute_features: sample_rate 16000, but this model has 8000." in log
    assert load_model(folder, "cpu").sample_rate == 8000
    with pytest.raises(UserError, match=r"such as subsampling.* \(40 x 64, here 20 x 64\); give the sizes of that model"):
        train("finetune", **{**keys, "output_folder": "bins", "n_mels": 40})
    keys |= {"output_folder": "bins", "n_mels": 40, "init_exclude": "[transformer.custom_src_module, subsampling]"}
    with pytest.raises(UserError, match=r"statistics of 80 features, but this model has 40; .* --init_exclude '\[normalize\]'"):
        train("finetune", **keys)


def small(tmp_path, name="conformer", **keys):
    """Built training hparams, and their parts with the names of a model folder."""
    hparams = load_hparams(ROOT / "hparams" / f"{name}.yaml", {**numbers(SMALL), "output_folder": str(tmp_path), **keys})
    return hparams, model_parts(hparams).eval()


def write_wav(path, seconds=1):
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(16000 * seconds), 16000)
    return path


def numbers(keys):
    return {key: int(value) for key, value in keys.items() if value.isdigit()}


def make_tokenizer(texts=SENTENCES, **keys):
    """A SentencePiece model as bytes, by default with the special tokens of SpeechBrain: unknown, bos, eos."""
    model = io.BytesIO()
    keys = {"vocab_size": 24, "hard_vocab_limit": False, "normalization_rule_name": "identity", "minloglevel": 2, **keys}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **keys)
    return model.getvalue()


def pieces(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize("attention", ["RelPosMHAXL", "hypermixing"])
@torch.no_grad()
def test_a_folder_of_speechbrain_answers_as_there(attention, tmp_path):
    """Front end, encoder, decoder, both heads and statistics; SpeechBrain has one token for blank and unknown, we have two."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokens = pieces(tokenizer).vocab_size()
    cnn = ConvolutionFrontEnd((8, 10, 80), 2, 1, (64, 32), (3, 3), (2, 2), residuals=(False, False))
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 1, "d_ffn": 32, "kernel_size": 31}
    keys = {"activation": torch.nn.GELU, "encoder_module": "conformer", "attention_type": attention, "normalize_before": True}
    theirs = TransformerASR(tokens, 640, **sizes, **keys, causal=False)
    seq_lin, ctc_lin = (Linear(input_size=16, n_neurons=tokens) for _ in range(2))
    model = torch.nn.ModuleList([cnn, theirs, seq_lin, ctc_lin]).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "asr.ckpt")
    normalize = InputNormalization()
    feats = 3 + 2 * torch.randn(1, 200, 80)
    normalize(feats, torch.ones(1), epoch=0)
    normalize._save(tmp_path / "normalizer.ckpt")
    (tmp_path / "tokenizer.ckpt").write_bytes(tokenizer)

    source = read_source("theirs", tmp_path, nhead=2)
    arranged = arrange_tokenizer(source.tokenizer, 0, 1, 2, 3)
    name, keys = ("hyperconformer", {}) if attention == "hypermixing" else ("conformer", {"speechbrain_scores": True})
    keys = {"encoder_kwargs": keys, "vocab_size": tokens + 1}
    _, parts = small(tmp_path, name, **keys)
    assert warm_start(parts, source, arranged, SPECIAL).count("| loaded") == 8
    feats = normalize.eval()(feats, torch.ones(1))
    torch.testing.assert_close(parts["normalize"](3 + feats, torch.ones(1)), normalize(3 + feats, torch.ones(1)))
    for block in (cnn.convblock_0, cnn.convblock_1):
        block.convs.conv_0.padding_mode = "constant"  # zeros around the features, as here; SpeechBrain reflects the features
    frames = cnn(feats)
    torch.testing.assert_close(parts["subsampling"](feats)[0], frames.flatten(2), atol=1e-4, rtol=1e-4)
    old, new = pieces(tokenizer), pieces(arranged)
    rows = [new.piece_to_id(old.id_to_piece(row)) for row in range(1, tokens)]  # all but the unknown token
    assert new.vocab_size() == tokens + 1 and sorted([0, 3, *rows]) == list(range(tokens + 1))
    text = "THE CAT SAT ON A HAT"
    targets = (torch.tensor([[bos, *each.encode_as_ids(text)]]) for each, bos in ((old, 1), (new, 1)))
    (enc, dec), (mine, decoded) = (net(frames, ids) for net, ids in zip((theirs, parts["transformer"]), targets, strict=True))
    torch.testing.assert_close(mine, enc, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoded, dec, atol=1e-4, rtol=1e-4)
    for head, expected, inputs in (("ctc_lin", ctc_lin, enc), ("seq_lin", seq_lin, dec)):
        logits = parts[head](inputs)
        torch.testing.assert_close(logits[..., rows], expected(inputs)[..., 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts["ctc_lin"](enc)[..., 0], ctc_lin(enc)[..., 0], atol=1e-5, rtol=1e-5)
    for part, prefix in (
        (theirs, "transformer."),
        (theirs.encoder, "transformer.encoder."),
    ):  # a part of the model, saved by one of several processes
        torch.save({f"module.{name}": value for name, value in part.state_dict().items()}, tmp_path / "part.pt")
        found = read_source("part", tmp_path / "part.pt", nhead=2).weights
        assert found and all(torch.equal(value, source.weights[name]) for name, value in found.items())
        assert all(name.startswith(prefix) for name in found)


@torch.no_grad()
def test_a_model_of_nemo_answers_as_there(tmp_path):
    golden = np.load(ROOT / "tests" / "data" / "squeezeformer_golden.npz")
    tensors = {name: torch.from_numpy(golden[name]) for name in golden.files}
    tokenizer = make_tokenizer(bos_id=-1, eos_id=-1)
    tokens = pieces(tokenizer).vocab_size()
    head = torch.randn(tokens + 1, 16, 1), torch.randn(tokens + 1)
    state = {f"encoder.{name.removeprefix('common/w/')}": value for name, value in tensors.items() if "common/w/" in name}
    state |= dict(zip(("decoder.decoder_layers.0.weight", "decoder.decoder_layers.0.bias"), head, strict=True))
    weights = io.BytesIO()
    torch.save(state, weights)
    settings = b"encoder: {time_reduce_idx: 1, time_recovery_idx: 3}"
    members = {"model_weights.ckpt": weights.getvalue(), "model_config.yaml": settings, "0123_tokenizer.model": tokenizer}
    with tarfile.open(tmp_path / "theirs.nemo", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    source = read_source("theirs", tmp_path, nhead=4)  # a folder with one .nemo file
    arranged = arrange_tokenizer(source.tokenizer, 0, 1, 2, 3)
    places = {"reduce_before": 1, "recover_before": 3, "kernel_size": 5, "eps": 1e-5}
    keys = {"nhead": 4, "num_encoder_layers": 4, "d_ffn": 64, "num_decoder_layers": 0, "vocab_size": tokens + 3}
    hparams, parts = small(tmp_path, "squeezeformer", encoder_kwargs=places, **keys)
    table = warm_start(parts, source, arranged, SPECIAL)
    assert f"{tokens + 1} of {tokens + 3} rows" in table and "not in this model" not in table
    out, _ = hparams["speech_encoder"].eval().encode_features(tensors["common/x"], tensors["common/lens"] / 61)
    for i, length in enumerate(tensors["nemo/ol"]):
        torch.testing.assert_close(out[i, :length], tensors["nemo/y"][i, :length], atol=1e-5, rtol=0)
    logits, expected = parts["ctc_lin"](out), out @ head[0].squeeze(-1).T + head[1]
    old, new = pieces(tokenizer), pieces(arranged)
    rows = [new.piece_to_id(old.id_to_piece(row)) for row in range(tokens)] + [0]  # the blank is NeMo's last output
    torch.testing.assert_close(logits[..., rows], expected, atol=1e-5, rtol=1e-5)
    best = [old.decode_ids([i for i in utterance.tolist() if i < tokens]) for utterance in expected.argmax(2)]
    assert [new.decode_ids(utterance.tolist()) for utterance in logits.argmax(2)] == best
    several = {"a_tokenizer.model": tokenizer, "b_tokenizer.model": b"", "model_weights_ckpt": weights.getvalue()}
    nemo(tmp_path / "several.nemo", **several)
    assert read_source("several", tmp_path / "several.nemo", nhead=4).tokenizer is None  # it is not known which tokenizer is used


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pt"])
def test_a_state_file_has_no_tokens(suffix, tmp_path):
    """A checkpoint of a run; rows of tokens are only loaded if its tokenizer is given."""
    hparams, _ = small(tmp_path)
    state, path = hparams["model"].state_dict(), tmp_path / f"state.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    source = read_source("state", path, nhead=2)
    _, parts = small(tmp_path, seed=1)
    table = warm_start(parts, source, make_tokenizer(), SPECIAL, same_tokens=False)
    assert table.count("the tokens of the rows are unknown") == 3
    expected = model_parts(hparams).state_dict()
    assert not torch.equal(parts.state_dict()["ctc_lin.w.weight"], expected["ctc_lin.w.weight"])
    warm_start(parts, source, make_tokenizer(), SPECIAL, same_tokens=True)
    assert_same(parts.state_dict(), expected)
    if suffix == "ckpt":  # like the folder of a checkpoint
        (tmp_path / "CKPT").mkdir()
        path.rename(tmp_path / "CKPT" / "model.ckpt")
        assert_same(read_source("folder", tmp_path / "CKPT", nhead=2).weights, source.weights)


@torch.no_grad()
def test_permuted_tokens_give_permuted_answers(tmp_path):
    """Pieces that the source lacks start near the mean of its pieces."""
    old = arrange_tokenizer(make_tokenizer(), 0, 1, 2, 3)
    new = arrange_tokenizer(make_tokenizer([*SENTENCES, "ZEBRA ZOO"], vocab_size=30), 4, 0, 6, 5)
    sizes = [pieces(model).vocab_size() for model in (old, new)]
    source_hparams, source_parts = small(tmp_path, vocab_size=sizes[0])
    parts = small(tmp_path, vocab_size=sizes[1], seed=1)[1]
    source = Source("source", "", source_parts.state_dict(), "", old, 0)
    warm_start(parts, source, new, {"blank": 4, "bos": 0, "eos": 6, "unk": 5})
    rows = {4: 0, 0: 1, 6: 2, 5: 3}  # by role
    for token in range(4, sizes[0]):
        place = pieces(new).piece_to_id(pieces(old).id_to_piece(token))
        rows |= {place: token} if place != pieces(new).unk_id() else {}
    known, unknown = sorted(rows), sorted(set(range(sizes[1])) - set(rows))
    assert len(known) > 15 and unknown
    frames = torch.randn(1, 9, 16)
    expected = [rows[token] for token in known]
    for head in ("ctc_lin", "seq_lin"):
        theirs, mine = source_parts[head](frames), parts[head](frames)
        assert torch.equal(mine[..., known], theirs[..., expected])
        distance = (mine[..., unknown] - theirs.mean(-1, keepdim=True)).abs().max()
        assert 0 < distance < theirs.std()
    embeddings = [model["transformer"].custom_tgt_module.layers[0].emb.Embedding.weight for model in (source_parts, parts)]
    assert torch.equal(embeddings[1][known], embeddings[0][expected])


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
@torch.no_grad()
def test_permuted_tokens_of_a_transducer_give_permuted_answers(predictor, tmp_path):
    """With a source without transducer, the transducer is not loaded, and the table shows that."""
    old, special = arrange_tokenizer(make_tokenizer(), 0, 1, 2, 3), {"blank": 3, "bos": 0, "eos": 2, "unk": 1}
    new, tokens = arrange_tokenizer(old, *special.values()), pieces(old).vocab_size()
    keys = {**numbers(SMALL_TRANSDUCER), "predictor": predictor, "vocab_size": tokens, "num_decoder_layers": 0}
    theirs = small(tmp_path, "conformer_transducer", **keys)[1]
    mine = small(tmp_path, "conformer_transducer", **keys, seed=1, blank_index=3, bos_index=0, unk_index=1)[1]
    warm_start(mine, Source("source", "", theirs.state_dict(), "", old, 0), new, special)
    place = torch.arange(tokens)
    place[[3, 0, 2, 1]] = torch.tensor([0, 1, 2, 3])
    text, answers = torch.randint(4, tokens, (1, 7)), []
    for head in (theirs["transducer"], mine["transducer"]):
        predicted = head.project_outputs(head.predictor(text))
        answers.append(head.join(torch.linspace(-1, 1, predicted.shape[-1]).expand_as(predicted), predicted))
    assert torch.equal(answers[1], answers[0][..., place])
    ctc = small(tmp_path, "conformer", vocab_size=tokens, num_decoder_layers=0)[1]
    table = warm_start(mine, Source("source", "", ctc.state_dict(), "", new, 3), new, special)
    assert re.search(r"\| transducer \| \d+ \| [\d,]+ \| not in the source \|", table) and "| ctc_lin |" in table
    assert_same(mine["transformer"].state_dict(), ctc["transformer"].state_dict())


def test_the_loss_of_a_transducer_begins_with_the_ctc_head(tmp_path):
    tokenizer = arrange_tokenizer(make_tokenizer(), 0, 1, 2, 3)
    keys = {**numbers(SMALL_TRANSDUCER), "vocab_size": pieces(tokenizer).vocab_size(), "num_decoder_layers": 0}
    theirs, (hparams, mine) = (small(tmp_path, "conformer_transducer", **keys, seed=seed) for seed in (1, 2))
    (tmp_path / "tokens.model").write_bytes(tokenizer)
    begin_with(Source("source", "", theirs[1].state_dict(), "", tokenizer, 0), hparams, tmp_path / "tokens.model")
    for name, value in theirs[1]["ctc_lin"].w.state_dict().items():
        assert torch.equal(value, mine["ctc_lin"].w.state_dict()[name])
        assert torch.equal(value, hparams["transducer_cost"].frame_scores.state_dict()[name])


def test_a_normalization_of_ones_own_needs_no_statistics(tmp_path):
    tokenizer = arrange_tokenizer(make_tokenizer(), 0, 1, 2, 3)
    keys = {"vocab_size": pieces(tokenizer).vocab_size(), "num_decoder_layers": 0}
    theirs, (hparams, mine) = (small(tmp_path, "conformer", **keys, seed=seed) for seed in (1, 2))
    (tmp_path / "tokens.model").write_bytes(tokenizer)
    source = Source("source", "", theirs[1].state_dict(), "", tokenizer, 0)
    begin_with(source, hparams | {"normalize": torch.nn.Identity()}, tmp_path / "tokens.model")
    assert torch.equal(theirs[1]["ctc_lin"].w.weight, mine["ctc_lin"].w.weight)


@pytest.mark.parametrize("kind", ["pruned", "full"])
def test_the_pruned_loss_of_a_new_transducer_without_a_warm_up_is_warned_of(kind, train, tmp_path):
    make_model(tmp_path, 0, "conformer")
    (tmp_path / "mine.yaml").write_text(
        f"extends: [{ROOT}/hparams/conformer_transducer.yaml, {ROOT}/hparams/finetune.yaml]\nexperiment: mine\n"
    )
    result = train(tmp_path / "mine.yaml", init_from="model", num_decoder_layers=0, transducer_loss=kind, **SMALL_TRANSDUCER)
    log = (result.output / "log.txt").read_text()
    assert ("model has no transducer: a new one needs a warm-up; give --transducer_warmup 300." in log) == (kind == "pruned")


def test_special_tokens_move_and_no_other_changes():
    for keys in ({}, {"model_type": "bpe"}, {"model_type": "char"}, {"bos_id": -1, "eos_id": -1}, {"pad_id": 3}):
        old = make_tokenizer(**keys)
        new = arrange_tokenizer(old, 2, 7, 0, 5)
        before, after = pieces(old), pieces(new)
        assert (after.pad_id(), after.bos_id(), after.eos_id(), after.unk_id()) == (2, 7, 0, 5)
        for text in SENTENCES:
            assert after.encode_as_pieces(text) == before.encode_as_pieces(text)
            assert after.decode_ids([2, 7, *after.encode_as_ids(text), 0]) == text
        assert arrange_tokenizer(new, 2, 7, 0, 5) == new


# ------------------------------------------------------------------ frozen parts and learning rates


def spoiled(folder, seed):
    """Random statistics and weights."""
    generator = torch.Generator().manual_seed(seed)
    state = weights(folder)
    for name, value in state.items():
        if value.is_floating_point() and name.startswith(("transformer.encoder", "subsampling")):
            state[name] = value + 0.1 * torch.rand(value.shape, generator=generator)
    save_file(state, folder / "asr.safetensors")
    return state


def test_what_is_frozen_does_not_move(train, tmp_path, monkeypatch):
    """Weights and statistics of BatchNorm and features stay fixed, over epochs, averaging and new statistics."""
    make_model(tmp_path, 0, "fusionformer")
    before = spoiled(tmp_path / "model", 0)
    frozen = ["normalize", "subsampling", "transformer.encoder.layers.0"]
    seen, fit_batch = [], AsrBrain.fit_batch

    def fitting(self, batch):
        layers = self.hparams.Transformer.encoder.layers
        training = [{part.training for part in layer.modules()} for layer in layers]
        seen[:] = self.optimizer, dict(self.parts.named_parameters()), training  # before fusing
        return fit_batch(self, batch)

    monkeypatch.setattr(AsrBrain, "fit_batch", fitting)
    keys = {"number_of_epochs": 3, "average_checkpoints": 3, "freeze": frozen, "normalize": "{update_until_epoch: 4}"}
    result = train("finetune", init_from=tmp_path / "model", **{**OF_THE_MODEL, **keys})
    after = weights(result.folders["pretrained_unfused"])
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.startswith("transformer.encoder.layers.1") for name in moved) and "ctc_lin.w.weight" in moved
    assert any(name.startswith("transformer.encoder.layers.1") and name.endswith("running_mean") for name in moved)
    assert not [name for name in moved if name.startswith(tuple(frozen))]
    optimizer, named, training = seen
    for name, parameter in named.items():
        assert (parameter in optimizer.state) != name.startswith(tuple(frozen)), name
    assert training == [{False}, {True}]


def test_each_part_has_its_rate(tmp_path):
    hparams, parts = small(tmp_path, lr_scales={"transformer.encoder": 0.25, "transformer.encoder.layers.1": 4}, warmup_steps=2)
    brain = AsrBrain(hparams["modules"], hparams["opt_class"], hparams, {"device": "cpu"})
    brain.init_optimizers()
    before = {name: value.clone() for name, value in parts.named_parameters()}
    for parameter in parts.parameters():
        parameter.grad = torch.ones_like(parameter)
    brain.max_grad_norm, brain.unread = 1e9, [(torch.ones(()), 1, [])]
    brain.optimizers_step()
    lr = brain.optimizer.param_groups[0]["lr"]
    assert lr == pytest.approx(hparams["lr"] / 2) and {group["lr"] for group in brain.optimizer.param_groups} == {lr}
    for name, value in parts.named_parameters():
        factor = 4 if "encoder.layers.1" in name else 0.25 if name.startswith("transformer.encoder.") else 1
        # Adam's first step has the size of the learning rate
        torch.testing.assert_close(before[name] - value, torch.full_like(value, factor * lr), atol=1e-6, rtol=1e-3, msg=name)


def test_an_interrupted_fine_tuning_ends_in_the_same_weights(train, tmp_path, monkeypatch):
    """With everything that counts steps or draws numbers: freeze_steps, lr_scales, new tokens, and mixed data."""
    make_model(tmp_path, 1, "conformer")
    keys = {**OF_THE_MODEL, "init_from": tmp_path / "model", "tokenizer_from": "new", "vocab_size": 24, "number_of_epochs": 3}
    keys |= {"freeze": ["transformer.encoder"], "freeze_steps": 5, "lr_scales": "{subsampling: 0.1}"}
    keys |= {"mix": "{manifest: dev-tiny, share: 0.1}", "dev_split": "test-tiny", "test_splits": "[test-tiny]"}
    keys |= {"ckpt_interval_minutes": 0, "ckpt_interval_steps": 1}
    straight = train("finetune", output_folder="straight", **keys)
    seen, fit_batch = [], AsrBrain.fit_batch
    encoder = [name for name in weights(tmp_path / "model") if name.startswith("transformer.encoder.layers.0")]

    def fitting(self, batch):
        seen.append((list(batch.id), {name: self.parts.state_dict()[name].clone() for name in encoder}))
        if len(seen) in (3, 8):
            raise KeyboardInterrupt
        return fit_batch(self, batch)

    monkeypatch.setattr(AsrBrain, "fit_batch", fitting)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train("finetune", output_folder="interrupted", **keys)
    resumed = train("finetune", output_folder="interrupted", **keys)
    assert_same(weights(straight.folders["pretrained"]), weights(resumed.folders["pretrained"]))
    visited = [ids for number, (ids, _) in enumerate(seen, 1) if number not in (3, 8)]
    per_epoch = len(visited) // 3
    epochs = [sorted(sum(visited[i : i + per_epoch], [])) for i in range(0, len(visited), per_epoch)]
    own = [f"1-1-{index:04d}" for index in range(12)]
    for ids in epochs:  # a share of 0.1 with twelve own utterances is one utterance
        assert [name for name in ids if not name.startswith("mixed-")] == own and len(ids) == 13
    states = [state for _, state in seen]
    assert_same(states[0], states[5]) and per_epoch == 2
    assert not torch.equal(states[-1][encoder[0]], states[0][encoder[0]])
    with pytest.raises(UserError, match="holds a run with init_from .*; give another --output_folder"):
        train("finetune", output_folder="interrupted", **{**keys, "init_from": straight.folders["pretrained"]})


def test_fine_tuning_on_a_corpus_keeps_its_settings_and_the_sizes_of_the_model(train, tmp_path):
    make_model(tmp_path, 0, "hyperconformer")
    argv, paths = take_paths(
        [str(ROOT / "hparams" / "finetune.yaml"), "--init_from", str(tmp_path / "model"), "--data_folder", "x"]
    )
    mini, model = str(ROOT / "recipes" / "MiniLibriSpeech" / "corpus.yaml"), numbers(SMALL)
    plain = choose_setting(*sb.parse_arguments(argv), paths, mini, None).plain()
    assert plain["corpus"] == "MiniLibriSpeech" and plain["lr"] == 0.00022 and plain["number_of_epochs"] == 20
    assert plain["warmup_steps"] == 100 and plain["num_encoder_layers"] == model["num_encoder_layers"]
    assert plain["augment_warmup"] == 0 and plain["optimizer_step_limit"] is None
    assert plain["train_batch_sampler"]["sorted_epochs"] == 0 and plain["train_batch_sampler"]["max_batch_length"] == 120


def test_transcripts_that_the_tokenizer_of_the_model_cannot_write_are_refused(train, corpus, tmp_path):
    make_model(tmp_path, 0, "hyperconformer")
    paths = sorted((corpus / "train-tiny").glob("*/*/*.flac"))
    lines = [json.dumps({"audio_filepath": str(path), "text": f"ß{number}"}) for number, path in enumerate(paths)]
    for name, some in (("train", lines[1:]), ("dev", lines[:1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
    keys = {**OF_THE_MODEL, "dev_split": None, "train_splits": None, "test_splits": None, "init_from": "model"}
    told = "Most transcripts of the set .* have characters that the given tokenizer lacks .*ß.*--tokenizer_from new"
    with pytest.raises(UserError, match=told):
        train("finetune", data=["--train_manifest", "train.jsonl", "--valid_manifest", "dev.jsonl"], **keys)


# ------------------------------------------------------------------ whole runs


def test_the_page_s_fine_tuning_runs(train, corpus, tmp_path):
    """From a model and manifests to a model folder with its provenance."""
    command, *_ = re.findall(r"```bash\n(python train.py hparams/finetune.yaml.*?)```", PAGE, re.DOTALL)
    _, _, file, *argv = shlex.split(command.replace("\\\n", " "))
    make_model(tmp_path, 0, "hyperconformer")
    shutil.move(tmp_path / "model", tmp_path / "english")  # in place of the package's model, which is larger
    (tmp_path / "my").mkdir()
    for name, split in (("train", "train-tiny"), ("dev", "dev-tiny"), ("test", "test-tiny"), ("old", "test-tiny")):
        rows = [
            {"audio_filepath": str(path), "text": "Привет " + path.stem[-1]}
            for path in sorted((corpus / split).glob("*/*/*.flac"))
        ]
        if name == "old":  # other audio, because the test set must not be in training
            rows = [{"audio_filepath": str(write_wav(tmp_path / "my" / "old.wav")), "text": "Привет 0"}]
        (tmp_path / "my" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {**OF_THE_MODEL, "dev_split": None, "train_splits": None, "test_splits": None}
    keys |= {"tokenizer_from": "new", "token_type": "char", "vocab_size": 22}
    result = train(ROOT / file, data=argv, **keys)
    folder = result.folders["pretrained"]
    text, model = (folder / "hyperparams.yaml").read_text(), "english"
    for line in ("hparams: hyperconformer.yaml", "corpus: Manifest", "- my/train.jsonl", "- my/old.jsonl", model):
        assert line in text
    assert "tokenizer: trained on the transcripts" in text and re.search("sha256:[0-9a-f]{64}", text)
    card = (folder / "README.md").read_text()
    assert f"| initial weights | {model} |" in card and "| manifests | my/train.jsonl |" in card
    assert "| mixed with | my/old.jsonl |" in card
    log = (result.output / "log.txt").read_text()
    assert "| ctc_lin | 2 |" in log and "of equal pieces |" in log
    loaded = load_model(folder, "cpu")
    assert loaded.tokenizer.decode_ids(loaded.tokenizer.encode_as_ids("Привет 1")) == "Привет 1"
    argv[argv.index("--init_from") + 1] = folder
    again = train(ROOT / file, data=argv, **{**keys, "output_folder": "again", "tokenizer_from": "init"})
    text = (again.folders["pretrained"] / "hyperparams.yaml").read_text()
    assert "tokenizer: that of the initial model" in text
    assert (folder / "tokenizer.ckpt").read_bytes() == (again.folders["pretrained"] / "tokenizer.ckpt").read_bytes()


def test_a_repository_is_taken_as_it_was_when_the_run_began(tmp_path, monkeypatch):
    commits, fetched = {"main": "a" * 40, "v1": "b" * 40}, []

    def download(repository, revision, files):
        fetched.append((repository, revision))
        return tmp_path / commits.get(revision or "main", revision)

    monkeypatch.setattr(sources, "download", download)
    assert sources.locate("ann/speech")[0] == "ann/speech@" + "a" * 40
    assert sources.locate("ann/speech@v1") == ("ann/speech@" + "b" * 40, tmp_path / ("b" * 40))
    before = "ann/speech@" + "c" * 40
    assert sources.locate("ann/speech", before)[0] == before  # although the branch has moved
    assert sources.locate("ann/other", before)[0] == "ann/other@" + "a" * 40
    assert fetched[-2:] == [("ann/speech", "c" * 40), ("ann/other", None)]


def test_a_run_goes_on_where_its_repository_holds_another_model_now(train, tmp_path, monkeypatch):
    main, hub = ["a" * 40], tmp_path / "hub"
    for commit, width in (("a" * 40, 16), ("b" * 40, 32)):
        (tmp_path / commit).mkdir()
        make_model(tmp_path / commit, 0, "conformer", d_model=width)
        shutil.move(tmp_path / commit / "model", hub / commit)
    monkeypatch.setattr(sources, "download", lambda repository, revision, files: hub / (revision or main[0]))
    keys = {**OF_THE_MODEL, "init_from": "ann/speech", "output_folder": "run"}
    train("finetune", **keys)
    main[0] = "b" * 40
    folder = train("finetune", **{**keys, "number_of_epochs": 2}).folders["pretrained"]
    assert f"init_from: ann/speech@{'a' * 40}" in (folder / "hyperparams.yaml").read_text()
    assert weights(folder)["ctc_lin.w.weight"].shape[1] == 16


# ------------------------------------------------------------------ refusals


class Code:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return print, ("executed",)


def nemo(path, **members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("_ckpt", ".ckpt"))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def broken_sources(folder):
    """Broken files by name, with the message for each."""
    (folder / "empty").mkdir()
    (folder / "cut.safetensors").write_bytes(b"no")
    (folder / "code.ckpt").write_bytes(saved({"weight": Code()}))
    (folder / "list.pt").write_bytes(saved([1, 2]))
    (folder / "none.nemo").write_bytes(b"no archive")
    nemo(folder / "bare.nemo", model_config=b"")
    nemo(folder / "code.nemo", model_weights_ckpt=saved(Code()))
    nemo(folder / "other.nemo", model_weights_ckpt=saved({"encoder.layers.0.self_attn.linear_q.weight": torch.ones(1)}))
    nemo(folder / "list.nemo", model_weights_ckpt=saved([1]))
    norm = {"encoder.pre_ln.weight": torch.ones(1), "encoder.layers.0.norm_conv.weight": torch.ones(1)}
    nemo(folder / "odd.nemo", model_weights_ckpt=saved(norm | {"encoder.layers.x.y": torch.ones(1)}))
    nemo(folder / "flat.nemo", model_weights_ckpt=saved(norm | {"encoder.pre_encode.out.weight": torch.ones(())}))
    for name, config in {"empty": b"", "null": b"encoder:", "text": b"encoder: {time_reduce_idx: x}", "latin": b"\xff"}.items():
        nemo(folder / f"{name}.nemo", **{"model_weights_ckpt": saved(norm), "model_config.yaml": config})
    torch.save({1: torch.ones(1)}, folder / "numbers.pt")
    make_model(folder, 0, "fusionformer")
    names = ("fused", "tagged", "strange", "coded", "plain", "torn", "harm")
    fused, tagged, strange, coded, plain, torn, harm = (folder / name for name in names)
    for other in (fused, tagged, strange, coded, plain, torn, harm):
        shutil.copytree(folder / "model", other)
    text = (folder / "model" / "hyperparams.yaml").read_text()
    (fused / "hyperparams.yaml").write_text(text.replace("momentum: 0.01\nTransf", "momentum: 0.01\n  fused: true\nTransf"))
    (tagged / "hyperparams.yaml").write_text(text + "more: !apply:os.system [ls]\n")
    (strange / "hyperparams.yaml").write_text("sample_rate: 1\n")
    (torn / "tokenizer.ckpt").write_bytes(b"x")
    with open(harm / "tokenizer.ckpt", "ab") as file:  # a further piece of 100,000 letters
        piece = b"\x0a\xa0\x8d\x06" + 100_000 * b"a"
        file.write(b"\x0a\xa4\x8d\x06" + piece)
    (coded / "hyperparams.yaml").write_bytes(f"# \xfc\n{text}".encode("latin-1"))
    (plain / "hyperparams.yaml").write_text(text.replace("\nTransformer: !new", "\nTransformer: 3\nbefore: !new"))
    (folder / "statistics").mkdir()
    keys = {"encoder_module": "conformer", "attention_type": "RoPEMHA", "normalize_before": True}
    theirs = TransformerASR(9, 8, 8, 2, 1, 1, 8, **keys)
    torch.save(torch.nn.ModuleList([torch.nn.Linear(1, 1), theirs]).state_dict(), folder / "statistics" / "model.ckpt")
    torch.save({"mean": 1}, folder / "statistics" / "normalizer.ckpt")
    shutil.copytree(folder / "statistics", folder / "heads")
    (folder / "heads" / "hyperparams.yaml").write_text("root: !PLACEHOLDER\nnhead: 4\n")
    theirs = TransformerASR(9, 8, 8, 4, 1, 0, 8, **keys | {"attention_type": "RelPosMHAXL"})
    torch.save(theirs.state_dict(), folder / "bias.ckpt")
    torch.save({name: value.flatten() for name, value in theirs.state_dict().items()}, folder / "flat.ckpt")
    return {
        "empty": "empty is not the folder of a model: it has neither asr.safetensors with hyperparams.yaml, nor asr.ckpt or",
        "cut.safetensors": "is damaged, or not a file of weights",
        "code.ckpt": "is damaged, or holds more than tensors, which could run code .*; give a file that holds only weights",
        "list.pt": "holds no weights by name; give the state of a model",
        "none.nemo": "is damaged, or not an archive of NeMo",
        "bare.nemo": "is not an archive of NeMo: it holds no model_weights.ckpt; give another one",
        "code.nemo": "is damaged, or holds more than tensors",
        "other.nemo": "These weights hold no Squeezeformer of NeMo",
        "list.nemo": "list.nemo holds no weights by name; give the state of a model",
        "odd.nemo": "odd.nemo has weights with unknown names or wrong shapes .*; give another file",
        "flat.nemo": "flat.nemo has weights with unknown names or wrong shapes .*; give another file",
        "flat.ckpt": "flat.ckpt has weights with unknown names or wrong shapes .*; give another file",
        "empty.nemo": "The model_config.yaml of empty.nemo states no encoder of NeMo",
        "null.nemo": "The model_config.yaml of null.nemo states no encoder of NeMo",
        "latin.nemo": "The model_config.yaml of latin.nemo states no encoder of NeMo",
        "text.nemo": "The model_config.yaml of text.nemo states no encoder of NeMo .'x' is not the number of a block.",
        "torn": "The tokenizer of torn is damaged, or not a SentencePiece model; give another one",
        "harm": "The tokenizer of harm has a piece of 100000 bytes, more than the allowed 1000; give another one",
        "numbers.pt": "numbers.pt holds no weights by name",
        "coded": "hyperparams.yaml of coded describes no model of this package .*utf-8",
        "plain": "hyperparams.yaml of plain describes no model of this package .its Transformer has no encoder_module.",
        "fused": "is fused: .*; give the folder 'pretrained_unfused' beside it",
        "tagged": "hyperparams.yaml of .* describes no model of this package .!apply:os.system.",
        "strange": "hyperparams.yaml of .* describes no model of this package .it has no Transformer.",
        "heads": "heads has 4 attention heads, but nhead is 2; give --nhead 4",
        "bias.ckpt": "bias.ckpt cannot be loaded: nhead is 2, but these weights have 4 heads; give 4",
        "statistics": "normalizer.ckpt of .* holds no statistics of features; remove it from the folder",
    }


def test_what_is_no_model_is_refused(tmp_path, capfd):
    for name, message in broken_sources(tmp_path).items():
        with pytest.raises(UserError, match=message):
            read_source(name, tmp_path / name, nhead=2)
    with pytest.raises(UserError, match="model has 2 attention heads, but nhead is 4; give --nhead 2"):
        read_source("model", tmp_path / "model", nhead=4)
    with pytest.raises(FileNotFoundError, match="There is no model gone.nemo; give a folder or file, or user/model of"):
        sources.locate("gone.nemo")
    assert "executed" not in capfd.readouterr().out


def test_what_does_not_fit_is_refused(tmp_path):
    hparams, parts = small(tmp_path)
    state, tokens = parts.state_dict(), make_tokenizer()
    source = Source("old", "a model folder", state, "")
    for changed, keys, message in (
        ({}, {"include": ["ctc_linn"]}, "init_include has 'ctc_linn', which no weight begins with; did you mean 'ctc_lin'?"),
        ({}, {"exclude": ["x"]}, "init_exclude has 'x', which no weight begins with; names begin with"),
        ({"weights": {"a.b": torch.ones(1)}}, {}, "Nothing of old would be loaded: it has a, and this model has"),
        ({}, {"include": ["ctc_lin"], "exclude": ["ctc_lin"]}, "Nothing of old would be loaded"),
        ({"weights": state | {"ctc_lin.w.weight": torch.ones(5, 4)}}, {}, "1 weights of another shape, such as ctc_lin.w.weight"),
        ({"weights": state | {"ctc_lin.w.weight": torch.ones(5, 4)}, "tokenizer": tokens}, {}, "5 x 4, here 30 x 16"),
        (
            {"weights": state | {"ctc_lin.w.weight": torch.full_like(state["ctc_lin.w.weight"], torch.nan)}},
            {},
            "old has 1 weights with NaN or infinite values, such as ctc_lin.w.weight; give another model",
        ),
        ({"kind": "a folder of SpeechBrain"}, {}, "attention scales its scores differently; also give"),
    ):
        with pytest.raises(UserError, match=message):
            warm_start(parts, source._replace(**changed), tokens, SPECIAL, same_tokens=True, **keys)
    assert_same(parts.state_dict(), state)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"init_from": ""}, "--init_from has no value; give a model or file, or leave it out"),
        ({"init_from": "/no/such"}, "There is no model /no/such"),
        ({"init_from": "model", "tokenizer_from": "/no/such"}, "There is no tokenizer /no/such; give the file of a SentenceP"),
        ({"init_from": "model", "tokenizer_from": "corpus.csv"}, "The tokenizer corpus.csv is damaged, or not a SentencePiece"),
        ({"init_from": "state.ckpt"}, "state.ckpt has no tokenizer; give the one that it was trained with"),
        ({"mix": "{manifest: x, share: 1}"}, "The share of --mix is 1; give a number above 0 and below 1"),
        ({"mix": "{manifest: my/old.csv}"}, "The manifest of --mix is 'my/old.csv', but LibriSpeech has splits; give the name"),
        ({"mix": "{manifset: x}"}, "--mix has the keys manifest, share, manifset; it takes manifest and share"),
        ({"freeze": "null"}, "--freeze is None; give a list of prefixes"),
        ({"init_exclude": ["ctc_lin"]}, "--init_exclude is .'ctc_lin'., but there is no initial model; give --init_from"),
        ({"lr_scales": "null"}, "--lr_scales is None; give a mapping of prefixes to factors"),
        ({"freeze_steps": -1}, "--freeze_steps is -1; give a whole number, 0 or more"),
        ({"file": "finetune"}, "states no architecture, and there is no initial model; give --init_from MODEL"),
        ({"file": "finetune", "init_from": "state.ckpt"}, "state.ckpt is not a model folder of this package, so its arch"),
        ({"file": "finetune", "init_from": "nameless"}, "The model nameless does not state its hparams file"),
        ({"init_from": "model", "output_folder": "torn"}, "torn/hyperparams.yaml is damaged .*; give another --output_folder"),
        ({"file": "finetune", "init_from": "plain"}, "The model plain does not state its hparams file"),
        ({"file": "finetune", "init_from": "mine"}, "mine was trained with mine.yaml, which is not beside"),
    ],
)
def test_what_cannot_begin_is_refused_before_training(keys, message, train, tmp_path):
    make_model(tmp_path, 0)
    text = (tmp_path / "model" / "hyperparams.yaml").read_text()
    names = {name: text.replace("hyperconformer.yaml", file) for name, file in (("mine", "mine.yaml"), ("nameless", "''"))}
    (tmp_path / "torn" / "save" / "CKPT").mkdir(parents=True)
    (tmp_path / "torn" / "hyperparams.yaml").write_text("a: [1")
    for name, changed in {"plain": text.partition("provenance")[0], **names}.items():
        shutil.copytree(tmp_path / "model", tmp_path / name)
        (tmp_path / name / "hyperparams.yaml").write_text(changed)
    (tmp_path / "corpus.csv").write_text("ID\n")
    torch.save(small(tmp_path)[0]["model"].state_dict(), tmp_path / "state.ckpt")
    keys = {"num_decoder_layers": 0, **keys}
    with pytest.raises(UsageError, match=message):
        train(keys.pop("file", "conformer"), **keys)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"freeze": ["encoder"]}, "freeze has 'encoder', which no weight begins with; names begin with normalize, subsampling"),
        ({"freeze": ["subsampling", "transformer", "ctc_lin", "seq_lin"]}, "freeze leaves nothing to train; name fewer parts"),
        ({"freeze_steps": 5}, "freeze_steps is 5, and freeze names no part; name some, or give 0"),
        ({"lr_scales": {"head": 1}}, "lr_scales has 'head', which no weight begins with"),
        ({"lr_scales": {"ctc_lin": 0}}, "lr_scales has 0 for ctc_lin; give a number above 0, or name the part in freeze"),
    ],
)
def test_what_cannot_be_frozen_or_scaled_is_refused(keys, message, tmp_path):
    hparams, _ = small(tmp_path, **keys)
    with pytest.raises(UserError, match=message):
        AsrBrain(hparams["modules"], hparams["opt_class"], hparams, {"device": "cpu"})


def test_a_model_without_statistics_of_features_is_refused(train, tmp_path):
    make_model(tmp_path, 0)
    state = {name: value for name, value in weights(tmp_path / "model").items() if not name.startswith("normalize")}
    save_file(state, tmp_path / "model" / "asr.safetensors")
    with pytest.raises(UserError, match="model has no statistics of features, and update_until_epoch is too small"):
        train("finetune", init_from="model", **OF_THE_MODEL)
