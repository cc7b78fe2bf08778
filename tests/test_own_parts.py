"""Parts of a user: an encoder and a corpus, as in the documentation, in files outside of the package."""

import random
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import speechbrain as sb
import torch
from conftest import PAGE_ENCODERS, ROOT
from tiny import SENTENCES, SMALL, SMALL_TRANSDUCER, arguments, make_corpus, rows, train

from speechbrain_ext import registry
from speechbrain_ext.dataio.datasets import drop_unfit
from speechbrain_ext.encoders import StreamingContext
from speechbrain_ext.hparams import load_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.lobes.augment import repeated
from speechbrain_ext.lobes.fusible import MaskedBatchNorm
from speechbrain_ext.registry import register_encoder
from speechbrain_ext.training import run as training
from speechbrain_ext.training.settings import check_parts
from speechbrain_ext.utils.errors import UserError

PAGES = "\n".join((ROOT / "docs" / f"extend-{name}.md").read_text(encoding="utf-8") for name in ("encoder", "corpus"))


def block(language, mark):
    (found,) = [text for text in re.findall(rf"```{language}.*?\n(.*?)```", PAGES, re.DOTALL) if mark in text]
    return found


def train_here(hparams, corpus, **keys):
    """A training run in this process, where the user's encoder has been imported."""
    asked = arguments(**{**SMALL, "num_decoder_layers": 0, **keys})
    path, run_opts, overrides = sb.parse_arguments([str(hparams), "--data_folder", str(corpus), "--device", "cpu", *asked])
    return training.run(path, run_opts, overrides)


def test_the_page_has_an_encoder_of_one_s_own():
    assert "mine" in PAGE_ENCODERS  # conftest registers it: the contract tests include it


def test_an_encoder_of_one_s_own_trains_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        block("yaml", "encoder: mine").replace("conformer.yaml", f"{ROOT}/hparams/conformer.yaml")
    )
    result = train_here("mine.yaml", make_corpus(tmp_path / "corpus"))
    assert [(row.architecture, row.experiment) for row in result.rows] == [("mine", "mine")]
    model = load_model(result.folders["pretrained"], "cpu")
    assert type(model.mods.encoder.transformer.encoder).__name__ == "MineEncoder"


def test_a_streaming_state_of_one_s_own_may_be_a_dict():
    state = {"left": torch.zeros(2), "more": [torch.zeros(3), {"count": 1}]}
    assert StreamingContext(None, [state, None]).state_bytes() == 20


def test_a_bug_in_an_encoder_of_one_s_own_shows_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ENCODERS", dict(registry._ENCODERS))

    @register_encoder("buggy")
    class Buggy(registry.get_encoder("mine")):
        def after_layers(self, x, mask=None):
            return x + None

    corpus = make_corpus(tmp_path / "corpus")
    for keys in ({"encoder": "buggy", "encoder_kwargs": "null"},):
        with pytest.raises(TypeError) as caught:
            train_here(ROOT / "hparams" / "conformer.yaml", corpus, **keys)
        assert Path(caught.traceback[-1].path).name == Path(__file__).name


def test_a_brain_of_one_s_own_lies_beside_its_file(corpus, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "soundfile.py").write_text("raise ImportError('this hides an installed package')")
    (tmp_path / "own" / "mine.yaml").write_text(f"extends: {ROOT}/hparams/conformer.yaml\nbrain: !name:my_brain.MyBrain\n")
    keys = {**SMALL, "num_decoder_layers": 0}
    command = [tmp_path / "own" / "mine.yaml", "--data_folder", corpus, "--device", "cpu", *arguments(**keys)]
    finished = train(tmp_path, *command)
    assert finished.returncode == 2 and "my_brain.MyBrain; check the name; a module of your own is found" in finished.stderr
    brain = "from speechbrain_ext.brains.asr import AsrBrain\n\n\nclass MyBrain(AsrBrain):\n    pass\n"
    (tmp_path / "own" / "my_brain.py").write_text(brain)
    with (tmp_path / "own" / "mine.yaml").open("a") as file:
        file.write("my_weight: 0.5  # for the Brain\n")
    finished = train(tmp_path, *command)
    assert finished.returncode == 0 and len(rows(tmp_path)) == 1, finished.stderr
    assert "the key my_weight, which only your own Brain can use; did you mean lm_weight?" in finished.stdout + finished.stderr


class Head(torch.nn.Linear):
    """A head of a user, which is not marked."""


def test_a_training_warns_first_if_its_model_will_need_trust(run, tmp_path, capsys, monkeypatch):
    file = tmp_path / "mine.yaml"
    for head, refused in (("torch.nn.Linear", ""), (f"{__name__}.Head", f"!new:{__name__}.Head")):
        lines = f"ctc_lin: !new:{head}\n    in_features: !ref <d_model>\n    out_features: !ref <vocab_size>\n"
        lines += "Transformer:\n    conformer_activation: !name:speechbrain.nnet.activations.Swish\n"
        file.write_text(f"extends: {ROOT}/hparams/conformer.yaml\n{lines}")
        result = run(hparams=file, output_folder=refused[:4] or "x")
        log, printed = (result.output / "log.txt").read_text(), capsys.readouterr().out
        assert (f"The model folder will have {refused}, which loads only with trust=True" in log) == bool(refused)
        assert printed.count(f"{result.folders['pretrained']} --trust") == 3 * bool(refused)
        if refused:
            with pytest.raises(UserError, match=f"has {refused}, which no shipped recipe writes"):
                load_model(result.folders["pretrained"], "cpu")
        model = load_model(result.folders["pretrained"], "cpu", trust=bool(refused))
        assert type(model.hparams.ctc_lin).__name__ == head.rpartition(".")[2]
    monkeypatch.setitem(registry._LOADABLE, f"{__name__}.Head", Head)  # as the decorator does, but undone after the test
    result = run(hparams=file, output_folder="marked")
    assert "trust" not in (result.output / "log.txt").read_text() + capsys.readouterr().out


class Several(torch.nn.Module):
    """Augmentations of a user in a list; returns copies of the batch."""

    def __init__(self, copies=1, speeds=(110,)):
        super().__init__()
        self.copies, self.device = copies, "cpu"
        self.augmentations = [SimpleNamespace(speeds=speeds)]

    def forward(self, wavs, lens):
        if self.device != wavs.device.type:
            raise RuntimeError("other device")
        return repeated(wavs + torch.rand(()) + random.random(), self.copies), repeated(lens, self.copies)


class Alone(Several):
    def forward(self, wavs, lens):
        return super().forward(wavs, lens)[0]


class Longer(Several):
    def forward(self, wavs, lens):
        return torch.cat((wavs, wavs[:1])), torch.cat((lens, lens[:1]))


def test_an_augmentation_of_one_s_own_is_tried_before_the_training():
    path, keys = ROOT / "hparams" / "conformer.yaml", {"d_model": 16, "nhead": 2, "num_encoder_layers": 1}
    hparams = load_hparams(path, keys)
    elsewhere = Several()
    elsewhere.device = "cuda"  # what a class of the user raises shows in the first step
    for augment, wrong in (
        (Several(), None),
        (Several(3), None),
        (elsewhere, None),
        (lambda wavs, lens: [wavs, lens], None),
        (Alone(), "--wav_augment is Alone, .*: it returns only a tensor"),
        (lambda wavs, lens: (wavs.mean(), lens), r"it makes the shapes \(\) and \(3,\)"),
        (Longer(), r"it makes the shapes \(4, 16000\) and \(4,\) of \(3, 16000\) and \(3,\)"),
    ):
        states = torch.get_rng_state(), random.getstate()
        with pytest.raises(UserError, match=wrong) if wrong else nullcontext():
            check_parts({**hparams, "wav_augment": augment})
        assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()


@pytest.mark.parametrize("name", ["conformer", "conformer_transducer"])
def test_an_augmentation_that_adds_copies_of_the_batch_trains(name, run, tmp_path):
    keys = SMALL_TRANSDUCER if "transducer" in name else {"num_decoder_layers": 1}
    result = run(hparams=ROOT / "hparams" / f"{name}.yaml", wav_augment=f"!new:{__name__}.Several {{copies: 2}}", **keys)
    assert result.rows[0].steps


def test_the_speeds_of_augmentations_of_one_s_own_reduce_the_frames(tmp_path):
    hparams = {
        "speech_encoder": SimpleNamespace(count_frames=lambda samples: samples // 1000),
        "tokenizer": SimpleNamespace(encode_as_ids=lambda text: list(range(int(text)))),
        "transducer_cost": None,
        "wav_augment": Several(speeds=(200,)),
        "sample_rate": 16000,
        "max_skipped": 1.0,
    }
    dataset = SimpleNamespace(data={key: {"wrd": tokens, "duration": "1"} for key, tokens in {"a": "8", "b": "9"}.items()})
    drop_unfit(dataset, hparams, tmp_path / "unfit.csv", "train")
    assert list(dataset.data) == ["a"]


def test_a_corpus_of_one_s_own_trains_with_one_command(tmp_path):
    """Outside of the repository, with its own prepare function and layout, without copying files."""
    mine, data = tmp_path / "mine", tmp_path / "data"
    mine.mkdir()
    (mine / "corpus.yaml").write_text(block("yaml", "prepare_mine.prepare"))
    (mine / "prepare_mine.py").write_text(block("python", "def prepare("))
    generator = torch.Generator().manual_seed(0)
    for split, count in {"train": 12, "dev": 2, "test": 2}.items():
        (data / split).mkdir(parents=True)
        for index in range(count):
            wav = 0.1 * torch.randn(16_000, generator=generator)
            soundfile.write(data / split / f"{index}.wav", wav.numpy(), 16000)
            (data / split / f"{index}.txt").write_text(SENTENCES[index % len(SENTENCES)].lower())
    (tmp_path / "work").mkdir()
    keys = {key: value for key, value in SMALL.items() if not key.endswith(("splits", "dev_split"))} | {"num_decoder_layers": 0}
    command = [ROOT / "hparams" / "conformer.yaml", "--corpus", mine / "corpus.yaml", "--data_folder", data, "--device", "cpu"]
    finished = train(tmp_path / "work", *command, *arguments(**keys))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (row,) = rows(tmp_path / "work")
    assert (row["corpus"], row["train_set"], row["test_set"]) == ("Mine", "train", "test")
    (card,) = (tmp_path / "work").glob("results/conformer/*/pretrained/README.md")
    assert "Its accuracy on speech other than that" in card.read_text() and "LibriSpeech" not in card.read_text()
    (text,) = (tmp_path / "work").glob("results/conformer/*/wer_test_ctc_greedy.txt")
    assert re.search(r"the\s+;\s+cat\s+;\s+sat", text.read_text())  # in the corpus's lower case


@pytest.mark.parametrize(
    "text, message",
    [
        ("corpus: Mine\nprepare: !name:no_such_module.prepare\n", "no_such_module.prepare"),
        ("corpus: [", "no valid YAML"),
        ("", "should hold 'key: value' lines"),
    ],
)
def test_a_bad_corpus_file_is_refused_in_one_sentence(text, message, tmp_path):
    (tmp_path / "corpus.yaml").write_text(text)
    command = [ROOT / "hparams" / "conformer.yaml", "--corpus", tmp_path / "corpus.yaml", "--data_folder", tmp_path]
    finished = train(tmp_path, *command, "--device", "cpu")
    assert finished.returncode == 2 and "Traceback" not in finished.stderr and message in finished.stderr


def test_without_tests_the_average_is_kept_and_fused(tmp_path, monkeypatch):
    """--test_splits '[]': the final model does not depend on a test."""
    corpus, states = make_corpus(tmp_path / "corpus"), []
    for splits in ("[]", "[test-tiny]"):
        folder = tmp_path / f"with {splits}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        keys = {"number_of_epochs": 2, "average_checkpoints": 2, "test_splits": splits}
        result = train_here(ROOT / "hparams" / "fusionformer.yaml", corpus, **keys)
        model = load_model(result.folders["pretrained"], "cpu")
        assert not [module for module in model.modules() if isinstance(module, MaskedBatchNorm)]
        states.append(model.hparams.asr_model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)
