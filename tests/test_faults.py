"""Faults that are common in other toolkits: empty success, values with two meanings, and races."""

import csv
import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from conftest import ROOT
from sentencepiece import SentencePieceProcessor
from speechbrain.inference.ASR import EncoderASR
from tiny import CTC, SENTENCES, arguments, make_corpus
from torch._utils import ExceptionWrapper

from speechbrain_ext import cli
from speechbrain_ext.brains.asr import AsrBrain
from speechbrain_ext.dataio.datasets import drop_unfit
from speechbrain_ext.dataio.text import normal_form
from speechbrain_ext.dataio.tokenizer import train_tokenizer
from speechbrain_ext.export import onnx_model
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference import transcribe as files_to_text
from speechbrain_ext.inference.streaming import StreamingRecognizer
from speechbrain_ext.lobes.transducer_loss import TransducerLoss
from speechbrain_ext.training import run as training
from speechbrain_ext.training.results import append_rows
from speechbrain_ext.training.settings import OF_DECODER, check_own_keys, choose_setting
from speechbrain_ext.utils.errors import UserError, one_line
from speechbrain_ext.utils.files import locked, replacing_folder
from train import take_paths

CONFORMER = ROOT / "hparams" / "conformer.yaml"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_to_a_folder_stays_a_link(is_there, tmp_path):
    (tmp_path / "link").symlink_to("real")
    if is_there:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "old").touch()
    with replacing_folder(tmp_path / "link") as partial:
        (partial / "new").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"] and (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]


def test_the_current_folder_can_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").touch()
    with replacing_folder(".") as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_is_never_lost(tmp_path, monkeypatch):
    """Also if the program is stopped after the old folder has left and before the new one has come."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    replace = os.replace

    def stop_at_the_second(source, target):
        if Path(source).suffix == ".partial":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "folder") as partial:
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]
    (tmp_path / "folder").rename(tmp_path / ".folder.replaced")  # as after a kill
    with pytest.raises(ValueError), replacing_folder(tmp_path / "folder"):
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    """The second does not disturb the first; what a killed one left is removed."""
    left = tmp_path / ".folder.partial" / "part"
    left.mkdir(parents=True)
    with replacing_folder(tmp_path / "folder") as partial:
        (partial / "new").touch()
        with (
            pytest.raises(UserError, match="Another process is writing .*folder; wait for it"),
            replacing_folder(tmp_path / "folder"),
        ):
            raise AssertionError
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


# -------------------- no empty success


def test_what_is_left_over_takes_a_step(run):
    """Also if an epoch has fewer batches than the factor; the gradient is then the mean over these batches."""
    batches, steps = "{max_batch_length: 2.5, num_buckets: 10}", {}
    for factor in (1, 4, 1000):
        result = run(grad_accumulation_factor=factor, train_batch_sampler=batches, output_folder=factor)
        steps[factor] = result.rows[0].steps
    assert steps[1] > 4 and steps[4] == -(-steps[1] // 4) and steps[1000] == 1


def test_the_step_of_a_rest_is_that_of_the_rest_alone():
    """Three batches with factor 2: the second step has the whole gradient of the third batch, not half of it."""
    steps = []

    class Brain(AsrBrain):
        training_ctx = nullcontext()

        def __init__(self):
            self.weight = torch.zeros(1, requires_grad=True)
            self.debug, self.grad_accumulation_factor, self.train_sampler = False, 2, [1, 2, 3]
            self.scaler, self.unread = SimpleNamespace(scale=lambda loss: loss), []

        def no_sync(self, use=True):
            return nullcontext()

        def on_fit_batch_start(self, *_):
            pass

        on_fit_batch_end = on_fit_batch_start

        def compute_forward(self, batch, stage):
            return self.weight * batch.value

        def compute_objectives(self, outputs, batch, stage):
            return outputs.sum()

        def optimizers_step(self):
            steps.append(self.weight.grad.item())
            self.weight.grad = None

    brain = Brain()
    for brain.step, value in enumerate([1.0, 3.0, 7.0], 1):
        brain.fit_batch(SimpleNamespace(id=["a"], value=value))
    assert steps == [2.0, 7.0]


def test_transcripts_longer_than_their_frames_are_left_out_by_name(run, tmp_path):
    long = make_corpus(tmp_path / "corpus")
    transcripts = long / "train-tiny" / "1" / "1" / "1-1.trans.txt"
    lines = transcripts.read_text().splitlines()
    lines[3] = lines[3] + " " + " ".join(SENTENCES * 3)
    transcripts.write_text("\n".join(lines) + "\n")
    result = run(data=long, max_skipped=0.2)
    (row,) = csv.DictReader((result.output / "unfit_train.csv").open())
    assert row["ID"] == "1-1-0003" and int(row["tokens"]) > int(row["frames"])
    transcripts.write_text("\n".join(f"{line} {' '.join(SENTENCES * 3)}" for line in lines) + "\n")
    with pytest.raises(UserError, match="12 of 12 utterances have more tokens than frames, .*raise max_skipped"):
        run(data=long, output_folder="other")


@pytest.mark.parametrize("kind, kept", [(None, "a"), ("full", "abc"), ("pruned", "ab")])
def test_a_transducer_trains_on_more_tokens_than_frames(kind, kept, tmp_path):
    """The pruned loss has up to four tokens per frame."""
    hparams = {
        "speech_encoder": SimpleNamespace(count_frames=lambda samples: 4),
        "tokenizer": SimpleNamespace(encode_as_ids=lambda text: list(range(int(text)))),
        "transducer_cost": kind and TransducerLoss(8, 8, 9, kind),
        "wav_augment": None,
        "sample_rate": 16000,
        "max_skipped": 1.0,
    }
    data = {key: {"wrd": tokens, "duration": "1"} for key, tokens in {"a": "4", "b": "16", "c": "17"}.items()}
    dataset = SimpleNamespace(data=data)
    drop_unfit(dataset, hparams, tmp_path / "unfit.csv", "train")
    assert "".join(dataset.data) == kept and (tmp_path / "unfit.csv").exists() == (kind != "full")
    drop_unfit(dataset, hparams, tmp_path / "unfit.csv", "train")
    assert not (tmp_path / "unfit.csv").exists()  # nothing is left out any more


@pytest.mark.parametrize("name", ["hyperconformer_streaming", "squeezeformer"])
def test_telephone_speech_works_end_to_end(name, run, tmp_path, capsys):
    """8 kHz: training, model folder, files, streams, both ONNX graphs, and SpeechBrain's own class."""
    corpus = make_corpus(tmp_path / "corpus", rate=8000)
    folder = run(hparams=ROOT / "hparams" / f"{name}.yaml", data=corpus, sample_rate=8000).folders["pretrained"]
    model = load_model(folder, "cpu")
    assert model.sample_rate == 8000
    file = next((corpus / "test-tiny").rglob("*.flac"))
    samples, _ = soundfile.read(file, dtype="float32")
    assert len(model.load_audio(file)) == len(samples)
    assert model.transcribe_batch(torch.from_numpy(samples)[None], torch.ones(1))[0][0] == model.transcribe_file(file)
    theirs = EncoderASR.from_hparams(source=str(folder), run_opts={"device": "cpu"})
    torch.testing.assert_close(theirs.load_audio(str(file)), torch.from_numpy(samples))
    assert theirs.transcribe_file(str(file)).split() == model.transcribe_file(file).split()
    capsys.readouterr()
    assert cli.main(["stream", "--model", str(folder), str(file), "--device", "cpu"]) == 0
    more = ["--streaming"] if "streaming" in name else []  # each graph only once, because exporting is slow
    assert cli.main(["export", "--model", str(folder), str(tmp_path / "model.onnx"), "--audio", str(file), *more]) == 0


KALDI, SCHEDULES = "speechbrain_ext.lobes.features.KaldiFbank", "speechbrain.nnet.schedulers"
DYNAMIC = "speechbrain.dataio.sampler.DynamicBatchSampler"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"ctc_search": "{beam_size: 3}"}, "--ctc_search is {beam_size: 3}, but the hparams file has null there"),
        ({"chunk_sampler": "{chunk_size_min: 3}"}, "give it: --chunk_sampler '!new:package.Class"),
        ({"number_of_epochs": "many"}, "--number_of_epochs is 'many'; give a whole number"),
        ({"number_of_epochs": "0"}, "--number_of_epochs is 0; give a whole number above 0"),
        ({"lr": "fast"}, "--lr is 'fast'; give a number"),
        ({"cache_features": "3"}, "--cache_features is 3; give True or False"),
        ({"subsampling": "3"}, "--subsampling is 3; give a mapping"),
        ({"train_splits": "{a: 1}"}, "give a list"),
        ({"train_batch_sampler": "{max_batch_lenght: 3}"}, "max_batch_lenght"),
        ({"results_file": "."}, "is a folder"),
        ({"lr": ".nan"}, "--lr is nan; give a number above 0"),
        ({"lr": "-0.1"}, "--lr is -0.1"),
        ({"warmup_steps": "0"}, "--warmup_steps is 0; give a whole number above 0"),
        ({"num_workers": "-1"}, "--num_workers is -1"),
        ({"dropout": "2.0"}, "--dropout is 2.0"),
        ({"grad_accumulation_factor": "0"}, "--grad_accumulation_factor is 0"),
        ({"train_batch_sampler": "{max_batch_length: 0}"}, "max_batch_length is 0; give seconds above 0"),
        ({"train_splits": "[]"}, "--train_splits is empty"),
        ({"bos_index": "2"}, "give four different ones"),
        ({"token_type": "foo"}, "--token_type is 'foo'; give unigram, bpe, char"),
        ({"weights_precision": "int4"}, "--weights_precision is 'int4'; give fp32 or fp16"),
        ({"output_folder": ""}, "--output_folder has no value"),
        ({"results_file": ""}, "--results_file has no value"),
        ({"output_folder": "/proc/nowhere"}, "/proc/nowhere cannot be read or written: No such file or directory; give another"),
        ({"ctc_search": "foo"}, "ctc_search is 'foo', which is not a search"),
        ({"output_folder": "x<seed>y"}, "would be read as a reference"),
        ({"results_file": "/proc/nowhere/results.csv"}, "/proc"),
        ({"train_batch_sampler": "{num_buckets: 0}"}, "num_buckets is 0; give a whole number of 1 or more"),
        ({"train_batch_sampler": "{max_batch_ex: -1}"}, "max_batch_ex is -1"),
        ({"train_batch_sampler": "{batch_ordering: foo}"}, "batch_ordering is 'foo'; give random, ascending"),
        ({"train_batch_sampler": "{max_batch_length: x}"}, "--train_batch_sampler: max_batch_length is 'x'; give a number"),
        ({"fea_augment": "{time_masks: -1}"}, "time_masks is -1; give a whole number, 0 = off"),
        ({"fea_augment": "{time_mask_ratio: 5}"}, "time_mask_ratio is 5; give a share"),
        ({"wav_augment": "{speeds: [0]}"}, "speeds is [0]; give a list of whole numbers"),
        ({"wav_augment": "{speeds: []}"}, "speeds is []; give a list"),
        (
            {"wav_augment": "!new:speechbrain.augment.time_domain.DropFreq"},
            "--wav_augment is DropFreq, but an augmentation must take a batch",
        ),
        ({"fea_augment": "!new:speechbrain.augment.freq_domain.Warping"}, "--fea_augment is Warping, but an augmentation must"),
        ({"fea_augment": "{frequency_mask_width: [80, 100]}"}, "which hides all 80 bins; give less"),
        ({"normalize": "{update_until_epoch: x}"}, "update_until_epoch is 'x'; give a number"),
        ({"compute_features": "{n_fft: 100}"}, "--compute_features cannot be used"),
        (
            {
                "subsampling": "!new:speechbrain.lobes.models.convolution.ConvolutionFrontEnd {input_shape: [8, 10, 80]}",
                "Transformer": "{input_size: 640}",
            },
            "--subsampling is ConvolutionFrontEnd, which has no factor",
        ),
        ({"sample_rate": "44100"}, "its windows have 1102 samples, more than n_fft 400; give --compute_features '{n_fft: 2048}'"),
        ({"opt_class": "{weight_decay: -1}"}, "--opt_class cannot be used: Invalid weight_decay"),
        ({"opt_class": "!name:torch.optim.LBFGS {}"}, "--opt_class cannot be used: its step needs a closure"),
        (
            {"compute_features": f"!new:{KALDI} {{n_mels: 40}}"},
            "gives 40 bins, but subsampling takes 80; give --subsampling '{input_size: 40}'",
        ),
        *(
            ({"lr_annealing": f"!new:{SCHEDULES}.{settings}"}, f"{settings.split()[0]}, which does not follow")
            for settings in (
                "NewBobScheduler {initial_value: 1.0}",
                "LinearScheduler {initial_value: 1.0, final_value: 0.1, epoch_count: 3}",
                "StepScheduler {initial_value: 1.0}",
                "ReduceLROnPlateau {}",
                "CyclicLRScheduler {}",
            )
        ),
        (
            {"lr_annealing": f"!new:{SCHEDULES}.CyclicLRScheduler {{}}"},
            "is called with (optimizer) or (optimizer, num_updates), and has SpeechBrain's register_checkpoint_hooks",
        ),
        ({"eval_batch_sampler": "{num_buckets: 0}"}, "num_buckets is 0; give a whole number of 1 or more"),
        ({"eval_batch_sampler": "{max_batch_ex: 0}"}, "max_batch_ex is 0; give a whole number of 1 or more"),
        (
            {"eval_batch_sampler": f"!name:{DYNAMIC} {{max_batch_length: 9, num_buckets: 0}}"},
            "The batch sampler refuses its settings",
        ),
        *(
            ({key: "null"}, f"--{key} is null, but it needs a value")
            for key in ("test_splits", "ctc_weight", "brain", "seed", "lr", "warmup_steps", "experiment")
        ),
        *(({key: "null", "num_decoder_layers": 1}, f"{key} is null, but a decoder needs it") for key in OF_DECODER),
        ({"freeze": "[[]]"}, "--freeze has the item []; give texts"),
        ({"freeze": "[1]"}, "freeze has '1', which no weight begins with"),
        ({"test_splits": "[test-tiny, test-tiny]"}, "The test set test-tiny is named twice; name it once"),
        ({"test_splits": "[train-tiny]"}, "train-tiny is a test set and a training set too; remove it from one of the two"),
        ({"log_config": "log.yaml"}, "--log_config is not supported: the messages of a run are in log.txt"),
        ({"consistency": "-1"}, "--consistency is -1; give a weight"),
        ({"augment_warmup": "-1"}, "--augment_warmup is -1; give a number of steps"),
        ({"encoder_kwargs": "{kernel: 3}"}, "kernel"),
        ({"results_file": "notes.txt"}, "notes.txt is not a results table, because it has no column WER; give another file"),
        ({"results_file": "pipe"}, "pipe is a pipe or device, not a file; give the name of a file"),
    ],
)
def test_an_override_of_the_wrong_kind_is_refused_before_training(keys, message, run, monkeypatch):
    monkeypatch.setattr(AsrBrain, "fit", lambda *_, **__: pytest.fail("the training began"))
    os.mkfifo("pipe")
    Path("notes.txt").write_text("One line, two parts\n\nand another\n")
    with pytest.raises((UserError, OSError)) as refused:
        run(**keys)
    assert message in str(refused.value) and "('" not in str(refused.value)
    assert Path("notes.txt").read_text() == "One line, two parts\n\nand another\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("droput: 0.9", "has the key droput, which nothing uses; did you mean dropout?"),
        ("number_of_epoch: 7", "did you mean number_of_epochs?"),
        ("dropout: high", "dropout is 'high'; give a number"),
        ("num_encoder_layers: 2.5", "num_encoder_layers is 2.5; give a whole number"),
        ("fea_augment: {time_masks: many}", "fea_augment: time_masks is 'many'; give a number"),
        ("lr: !ref <lr>", "a reference leads to itself, such as lr: !ref <lr>"),
        ("dropout: !ref <beacon>\nbeacon: !ref <lr>", "or to a reference below it; give a value in its place"),
        ("lr: null", "mine.yaml: lr is null, but it needs a value"),
        ("test_splits: test-tiny", "mine.yaml: test_splits is 'test-tiny'; give ['test-tiny']"),
        ("train_splits: [2024]", "mine.yaml: train_splits is [2024]; give ['2024']"),
        ("precison: bf16", "has the key precison, which nothing uses; did you mean precision?"),
        ("ckpt_interval_steps: many", "ckpt_interval_steps is 'many'; give a whole number"),
        ("lr: !foo 3", "foo"),
        ("seed: 1 # \xe9", "mine.yaml is not text in UTF-8; save it in UTF-8"),
    ],
)
@pytest.mark.parametrize("is_corpus", [False, True])
def test_a_file_of_ones_own_is_checked_like_the_command_line(text, message, is_corpus, run, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes((f"data_folder: null\n{text}\n" if is_corpus else f"extends: {CONFORMER}\n{text}\n").encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        if is_corpus:
            file, run_opts, overrides = sb.parse_arguments([str(CONFORMER), "--device", "cpu"])
            training.run(file, run_opts, overrides, {}, str(tmp_path / "mine.yaml"))
        else:
            run(hparams=file)
    assert isinstance(refused.value, training.UsageError)


def test_a_validation_set_that_is_trained_on_is_warned_about(run):
    result = run(dev_split="train-tiny")
    assert "train-tiny chooses the checkpoints and is a training set too" in (result.output / "log.txt").read_text()


def test_keys_of_ones_own_are_kept(run, tmp_path):
    """A key that others refer to may have any name; the others are for a Brain of the user."""
    (tmp_path / "mine.yaml").write_text(f"extends: {CONFORMER}\ndropouts: 0.2\ndropout: !ref <dropouts>\nbeacon: 3\n")
    check_own_keys(str(tmp_path / "mine.yaml"), [])
    for wrong in ("", " 3", " []"):
        (tmp_path / "wrong.yaml").write_text(f"extends:{wrong}\n")
        with pytest.raises(UserError, match="the key 'extends' is .*; give a file, or a list of files"):
            run(hparams=tmp_path / "wrong.yaml")


def test_the_budget_of_small_corpora_is_in_steps_and_the_rate_ends_with_it(run, tmp_path):
    """Over several epochs, also past an interruption; a training beyond the end of its schedule is refused."""
    (tmp_path / "small.yaml").write_text(f"extends: [{CONFORMER}, {ROOT}/recipes/MiniLibriSpeech/corpus.yaml]\n")
    keys = {"number_of_epochs": 9, "training_steps": 7, "warmup_steps": 2, "output_folder": "run", "d_model": 16}
    keys |= {"train_batch_sampler": "{max_batch_length: 4}", "normalize": "{update_until_epoch: 1}"}
    run("--optimizer_step_limit", 3, hparams=tmp_path / "small.yaml", **keys)
    result = run(hparams=tmp_path / "small.yaml", **keys)
    assert result.rows[0].steps == 7 and result.rows[0].epochs > 1
    rates = [
        line.split("lr: ")[1].split()[0]
        for line in (tmp_path / "run" / "train_log.txt").read_text().splitlines()
        if "lr: " in line
    ]
    assert float(rates[0]) == 0.002 and float(rates[-1]) == 0
    with pytest.raises(
        UserError, match="schedule ended before step 8; end the training there too: give --optimizer_step_limit 7"
    ):
        run("--optimizer_step_limit", 8, hparams=tmp_path / "small.yaml", **keys)


@pytest.mark.parametrize("value", ["0", "many", "1.5", "-3"])
def test_a_limit_that_is_no_number_of_steps_is_refused(value, run):
    with pytest.raises(training.UsageError, match=f"--optimizer_step_limit is '{value}'; give a whole number above 0"):
        run(f"--optimizer_step_limit={value}")


@pytest.mark.parametrize("option", ["--jit", "--data_parallel_backend"])
def test_options_that_are_not_supported_are_refused(option, run):
    with pytest.raises(training.UsageError, match=f"{option} is not supported"):
        run(option)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"activation_checkpointing": "True"}, "leave out activation_checkpointing"),
        (
            {"chunk_sampler": "!new:speechbrain.utils.dynamic_chunk_training.DynChunkTrainConfigRandomSampler {}"},
            "leave it out, or the chunk_sampler",
        ),
    ],
)
def test_what_compilation_excludes_is_refused_at_once(keys, message, run, tmp_path):
    with pytest.raises(training.UsageError, match=message):
        run("--compile", output_folder=tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


# -------------------- one meaning

TEXTS = [
    "ทำไมน้ำ ขึ้น",
    "ຄຳ ນ້ຳ",
    "ＦＵＬＬ　ｗｉｄｔｈ",
    "½ ¼ cups",
    "\u202bשלום עולם\u202c\u200f",
    "\ufeffBOM",
    "ﬁne ﬂow",
    "नमस्ते दुनिया",
]
TEXTS += ["می\u200cخواهم", "İstanbul ŉ", "a▁b", "e\u0301"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("token_type", ["char", "bpe", "unigram"])
def test_a_perfect_model_makes_no_error_in_any_script(text, token_type, tmp_path):
    (tmp_path / "train.csv").write_text(f"ID,wrd\na,{text}\nb,{text} {text}\n", encoding="utf-8")
    train_tokenizer(tmp_path / "train.csv", tmp_path / "t.model", 60, token_type, 0, 1, 2, 3)
    tokenizer = SentencePieceProcessor(str(tmp_path / "t.model"))
    reference = normal_form(text)
    ids = tokenizer.encode_as_ids(reference)
    assert tokenizer.unk_id() not in ids and tokenizer.decode_ids(ids).split() == reference.split()
    assert normal_form(reference) == reference  # normalising again changes nothing


NAMES = ["corpus #2", "a: b", "&corpus", "2024", "2024-01-31", "~", "a=b", "(1)", "- x", "[x]", "null", "*a", "!x", "007", "1e3"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_literal(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spaced, joined = ["--data_folder", name, "--output_folder", f"{name}.out"], [f"--data_folder={name}"]
    for form in (spaced, [*joined, f"--output_folder={name}.out"]):
        argv, paths = take_paths([str(CONFORMER), *form, "--device", "cpu"])
        file, run_opts, overrides = sb.parse_arguments(argv)
        hparams = choose_setting(file, run_opts, overrides, paths, None, None).load()
        assert Path(hparams["data_folder"]) == Path(name) and Path(hparams["output_folder"]) == Path(f"{name}.out")
        assert Path(hparams["checkpointer"].checkpoints_dir) == Path(f"{name}.out") / "save"


def test_a_corpus_with_a_name_that_yaml_would_read(run, corpus, tmp_path):
    (tmp_path / "corpus #2").symlink_to(corpus)
    (tmp_path / "corpus").symlink_to("/nowhere")  # the name without the part after #, as YAML would read it
    assert run(data="corpus #2", output_folder="2024").output == Path("2024")


def test_paths_in_a_file_are_names_too(run, corpus, tmp_path):
    (tmp_path / "2024").symlink_to(corpus)
    (tmp_path / "own.yaml").write_text(f"extends: {CONFORMER}\ndata_folder: 2024\noutput_folder: 2024-01-31\n")
    result = run(hparams="own.yaml", data=None, test_splits="[]")
    assert result.folders["pretrained"].is_dir() and result.output == Path("2024-01-31")


# -------------------- platforms


def test_spawned_workers_read_audio(corpus, tmp_path):
    """Spawned workers get pickled objects, as on macOS."""
    script = tmp_path / "spawn.py"
    script.write_text(
        f"import multiprocessing, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    import train\n"
        "    sys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, script, CONFORMER, "--data_folder", corpus, "--device", "cpu"]
    command += arguments(**{**CTC, "num_workers": 1, "test_splits": "[]"})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr


# -------------------- two at once


def test_a_second_run_in_one_folder_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / ".lock"), pytest.raises(UserError, match="Another run writes to .*--output_folder"):
        run(output_folder=tmp_path / "run")
    run(output_folder=tmp_path / "run")


def test_a_lock_waits_or_says_so(tmp_path):
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, 2); print(1, flush=True); time.sleep(2)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(UserError, match="taken"), locked(tmp_path / "x", "taken"):
        pass
    began = time.perf_counter()
    with locked(tmp_path / "x"):
        assert time.perf_counter() - began > 0.5
    holder.wait()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_disk_without_locks_is_told(number, tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "x", "taken"):
        assert f"The disk of {tmp_path / 'x'} has no locks" in caplog.text


def test_the_error_of_a_process_that_loads_data_is_its_sentence():
    try:
        raise UserError("a/1.flac is cut: 3 s of 4 s; get it again.")
    except UserError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError) as caught:
        wrapped.reraise()
    assert one_line(caught.value) == "a/1.flac is cut: 3 s of 4 s; get it again."
    assert one_line("Caught a cold: stay in bed") == "Caught a cold: stay in bed"


# -------------------- samples of any kind


@pytest.fixture(scope="module")
def model():
    return load_model(ROOT / "tests" / "data" / "model_folders" / "ctc-v1", "cpu")


def stream(model, wav):
    recognizer = StreamingRecognizer(model)
    pieces = [wav[i : i + 3001] for i in range(0, len(wav), 3001)]
    return [segment for piece in pieces for segment in recognizer.accept(piece)] + recognizer.finish()


def test_samples_are_scaled_by_their_type(model):
    samples = (3000 * np.sin(np.arange(40_000) ** 1.3 / 50)).astype(np.int16)  # exact in every type
    kinds = [samples, samples.astype(">i2"), samples.astype(np.int32) << 16, samples / 2.0**15, np.float32(samples / 2.0**15)]
    kinds += [torch.from_numpy(kind.astype(kind.dtype.newbyteorder("="))) for kind in kinds]
    expected = model.frames(kinds[-1][None], torch.ones(1))[0][0]
    segments = stream(model, kinds[-1])
    for kind in kinds:
        torch.testing.assert_close(model.frames(kind[None], torch.ones(1))[0][0], expected)
        assert stream(model, kind) == segments
    for method in (lambda wav: model.transcribe_batch(wav[None], torch.ones(1)), lambda wav: stream(model, wav)):
        for kind in (samples.astype(np.uint8), torch.zeros(100, dtype=torch.int64), np.zeros(100, dtype=complex)):
            with pytest.raises(TypeError, match="give a tensor or an array of floats of full scale 1, or of int16 or int32"):
                method(kind)


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.5, 3.0])
def test_a_finished_stream_says_so_and_starts_anew(model, seconds):
    wav = 0.1 * torch.randn(round(16_000 * seconds), generator=torch.Generator().manual_seed(0))
    recognizer = StreamingRecognizer(model)
    first = recognizer.accept(wav) + recognizer.finish()
    assert recognizer.finished and recognizer.finish() == []
    with pytest.raises(UserError, match=r"This stream has ended; call reset\(\) to start the next one"):
        recognizer.accept(wav)
    recognizer.reset()
    assert not recognizer.finished and recognizer.accept(wav) + recognizer.finish() == first
    recognizer.reset(start=4.0)
    assert [round(segment.start - 4.0, 3) for segment in recognizer.accept(wav) + recognizer.finish()] == [
        segment.start for segment in first
    ]


# -------------------- before the training, and full disks

ARPA = """\\data\\
ngram 1=6
ngram 2=1

\\1-grams:
-1\t<unk>\t0
0\t<s>\t-0.3
-1\t</s>
-1\tTHE\t-0.3
-1\tCAT\t-0.3
-1\tSAT\t-0.3

\\2-grams:
-0.1\tTHE CAT

\\end\\
"""


@pytest.mark.parametrize(
    "damage, message",
    [
        (str.lower, "give one in the case, upper or lower, of the transcripts"),
        (lambda text: text.replace("ngram 2=1\n", "").replace("\\2-grams:\n-0.1\tTHE CAT\n\n", ""), "only single words"),
        (lambda text: text[:90], "cannot be read; write it again"),
        (lambda text: text.replace("\n\\end\\\n", ""), "has no end"),
        (lambda text: "\ufeff" + text, "begins with a byte order mark"),
        (lambda text: text.replace("-1\tCAT\t-0.3", "-1"), "Line 10 .* has 1 field in place of 2 or 3"),
        (lambda text: text.replace("-1\tCAT\t-0.3\n", ""), "cannot be read; write it again"),
        (lambda text: "words\n", "is not in ARPA format"),
        (lambda text: "", "is not in ARPA format"),
    ],
    ids=["lower case", "one word", "cut", "no end", "mark", "one field", "a line less", "no ARPA", "empty"],
)
@pytest.mark.skipif(find_spec("flashlight") is None, reason="pip install flashlight-text to run this test")
def test_a_faulty_language_model_is_refused_before_training(damage, message, run, tmp_path, monkeypatch):
    monkeypatch.setattr(AsrBrain, "fit", lambda *_, **__: pytest.fail("the training began"))
    (tmp_path / "words.arpa").write_text(damage(ARPA), encoding="utf-8")
    with pytest.raises(UserError, match=message) as refused:
        run(hparams=ROOT / "hparams" / "squeezeformer.yaml", ctc_search="{lm_file: words.arpa}")
    assert "words.arpa" in str(refused.value)


@pytest.mark.parametrize("setting", ["lm_weight: .nan", "lm_weight: '0.5'", "beam_size: 0", "word_score: true"])
def test_a_faulty_search_is_refused_before_training(setting, run, monkeypatch):
    monkeypatch.setattr(AsrBrain, "fit", lambda *_, **__: pytest.fail("the training began"))
    with pytest.raises(UserError, match=setting.split(":")[0]):
        run(hparams=ROOT / "hparams" / "squeezeformer.yaml", ctc_search=f"{{{setting}}}")


@contextmanager
def largest_file(size):
    """Limit the size of written files, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("long_seconds", [60, 2], ids=["whole", "in pieces"])
def test_a_full_disk_names_the_file_and_the_others_go_on(long_seconds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files_to_text, "LONG_SECONDS", long_seconds)
    generator = np.random.default_rng(0)
    files = [tmp_path / f"{name}.wav" for name in ("a", "b", "c")]
    for file, seconds in zip(files, (1, 30, 1), strict=True):
        soundfile.write(file, 0.1 * generator.standard_normal(16_000 * seconds), 16_000)
    folder = ROOT / "tests" / "data" / "model_folders" / "ctc-v1"

    def transcribe(output):
        status = cli.main(["transcribe", "--model", str(folder), "--device", "cpu", *map(str, files), "--output", str(output)])
        out, err = capsys.readouterr()
        return status, out, [line for line in err.replace("\r", "\n").split("\n") if line.startswith("speechbrain_ext: ")]

    assert transcribe(tmp_path / "usual")[0] == 0
    sizes = {name: (tmp_path / "usual" / f"{name}.jsonl").stat().st_size for name in "abc"}
    limit = 2000
    assert max(sizes["a"], sizes["c"]) < limit < sizes["b"]
    with largest_file(limit):
        status, out, said = transcribe(tmp_path / "full")
    assert status == 1 and [line.split("\t")[0] for line in out.splitlines()] == [str(files[0]), str(files[2])]
    assert len(said) == 1 and re.search(r"full/b\.[a-z.]+ cannot be written: .*; fix this and run again to continue\.", said[0])
    assert not list((tmp_path / "full").glob(".*.tmp"))
    assert transcribe(tmp_path / "full")[0] == 0  # continues when there is space again
    for name in ("a.jsonl", "b.jsonl", "c.jsonl", "b.srt", "b.vtt"):
        assert (tmp_path / "full" / name).read_text() == (tmp_path / "usual" / name).read_text()


def test_two_that_write_one_transcript(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files_to_text, "LONG_SECONDS", 1)
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(32_000), 16_000)
    arguments = ["transcribe", "--device", "cpu", "--model", str(ROOT / "tests" / "data" / "model_folders" / "ctc-v1")]
    arguments += [str(tmp_path / "a.wav"), "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / "a.jsonl.partial"):
        assert cli.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Another process is writing" in err and "a.jsonl.partial; wait for it, or give another folder" in err
    assert cli.main(arguments) == 0


def test_a_full_disk_during_training(run, tmp_path):
    """The message names the checkpoint that cannot be written; training continues from the previous one."""
    keys = {"number_of_epochs": 2, "output_folder": "run"}
    run(**{**keys, "number_of_epochs": 1})
    with largest_file(60_000), pytest.raises(UserError, match="No checkpoint can be written to run/save .*; free some space"):
        run(**keys)
    assert run(**keys).folders["pretrained"].is_dir()


def test_a_stopped_export_leaves_nothing(tmp_path, monkeypatch):
    def stopped(graph, path, *_):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(onnx_model, "write_onnx", stopped)
    folder = ROOT / "tests" / "data" / "model_folders" / "ctc-v1"
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "--model", str(folder), str(tmp_path / "model.onnx")])
    assert stop.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


def test_an_export_onto_a_full_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_model, "write_onnx", lambda graph, path, *_: path.write_bytes(bytes(10_000)))
    folder = ROOT / "tests" / "data" / "model_folders" / "ctc-v1"
    with largest_file(1000):
        assert cli.main(["export", "--model", str(folder), str(tmp_path / "model.onnx")]) == 1
    assert "model.onnx cannot be written: File too large" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_transcript_is_tied_to_the_search(tmp_path, capsys):
    """A transcript with another beam is not taken for one of this model."""
    folder = shutil.copytree(ROOT / "tests" / "data" / "model_folders" / "joint-v1", tmp_path / "model")
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    arguments = [
        "transcribe",
        "--device",
        "cpu",
        "--model",
        str(folder),
        str(tmp_path / "a.wav"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert [cli.main(arguments), cli.main(arguments)] == [0, 0]
    hyperparams = folder / "hyperparams.yaml"
    text = hyperparams.read_text()
    hyperparams.write_text(re.sub(r"beam_size: \d+", "beam_size: 1", text))
    assert hyperparams.read_text() != text and cli.main(arguments) == 2
    assert "a.jsonl is of another model; move it away, or give another folder" in capsys.readouterr().err


def test_a_results_file_of_something_else(run, tmp_path):
    (tmp_path / "rows.csv").write_bytes(bytes(range(256)))
    with pytest.raises(training.UsageError, match="rows.csv cannot be used"):
        run(results_file="rows.csv")
    (tmp_path / "rows.csv").write_text("WER,b\n1,2,3\n")
    with pytest.raises(training.UsageError, match="rows.csv has lines with different numbers of columns"):
        run(results_file="rows.csv")


def test_a_link_to_a_results_file_stays_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "rows.csv").symlink_to("data/rows.csv")
    for model in "ab":
        append_rows(tmp_path / "rows.csv", [{"model": model}])
    assert (tmp_path / "rows.csv").is_symlink() and (tmp_path / "data" / "rows.csv").read_text() == "model\na\nb\n"


def test_emulated_precisions_are_warned_about(monkeypatch, caplog):
    if torch.backends.mkldnn.is_available():
        assert hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported")
    brain = SimpleNamespace(device_type="cpu", precision="bf16")
    hparams = dict.fromkeys(("modules", "opt_class", "checkpointer")) | {"brain": lambda *_: brain}
    for emulated in (True, False):
        monkeypatch.setattr(training, "emulates", lambda precision, emulated=emulated: emulated)
        caplog.clear()
        assert training.make_brain(hparams, SimpleNamespace(device="cpu")) is brain
        assert ("--precision bf16: this processor" in caplog.text) == emulated


def test_a_damaged_tokenizer_is_made_again(tmp_path):
    (tmp_path / "train.csv").write_text("ID,wrd\n" + "".join(f"{i},{text}\n" for i, text in enumerate(SENTENCES)))
    arguments = [tmp_path / "train.csv", tmp_path / "t.model", 30, "unigram", 0, 1, 2, 3]
    train_tokenizer(*arguments)
    model = (tmp_path / "t.model").read_bytes()
    (tmp_path / "t.model").write_bytes(model[: len(model) // 2])
    train_tokenizer(*arguments)
    assert (tmp_path / "t.model").read_bytes() == model


def test_a_callers_buffer_is_its_own(model):
    """Microphones reuse their buffer."""
    wav = 0.1 * np.random.default_rng(0).standard_normal(40_000).astype(np.float32)
    recognizer, buffer, segments = StreamingRecognizer(model), np.zeros(80, np.float32), []
    for start in range(0, len(wav), 80):
        buffer[:] = wav[start : start + 80]
        segments += recognizer.accept(buffer)
    buffer[:] = 0
    assert segments + recognizer.finish() == stream(model, wav)


@pytest.mark.parametrize("name", ["ctc", "joint"])
def test_nothing_is_said_in_no_samples(name):
    model = load_model(ROOT / "tests" / "data" / "model_folders" / f"{name}-v1", "cpu")
    wav = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    assert model.transcribe_batch(wav, torch.tensor([0.0, 1.0]))[0][0] == ""
    assert model.transcribe_segments(wav, torch.tensor([0.0, 1.0]))[0] is None
    assert model.transcribe_batch(torch.zeros(1, 0), torch.ones(1))[0] == [""]
    integers = (wav * 2**15).round().to(torch.int16)
    torch.testing.assert_close(model.encode_batch(integers, torch.ones(2)), model.encode_batch(integers / 2**15, torch.ones(2)))


def test_files_of_one_name_in_one_folder(model, tmp_path):
    """Also if neither file exists when the calls begin."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "x.wav", 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    calls = [files_to_text.transcribe_files(model, [tmp_path / folder / "x.wav"], tmp_path / "out") for folder in ("a", "b")]
    assert [list(call)[0].error is None for call in calls] == [True, False]


def test_subtitles_of_others_are_not_written_over(model, tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    (tmp_path / "a.srt").write_text("made by hand")
    with pytest.raises(UserError, match="a.srt exists, but this command did not write it; move it away, or give another folder"):
        files_to_text.transcribe_files(model, [tmp_path / "a.wav"], tmp_path)
    assert (tmp_path / "a.srt").read_text() == "made by hand" and len(list(tmp_path.iterdir())) == 2
    (tmp_path / "a.srt").unlink()
    for _ in range(2):  # also after the user deletes the file that the message names
        assert [transcript.error for transcript in files_to_text.transcribe_files(model, [tmp_path / "a.wav"], tmp_path)] == [
            None
        ]
        (tmp_path / "a.jsonl").unlink()


@pytest.mark.parametrize("samples", [16_100, 24_000, 31_999])
def test_no_time_is_past_the_end_of_the_audio(model, samples, tmp_path):
    """The last frame of 40 ms may be incomplete: 24,000 samples are 37.5 frames."""
    wav = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    segments = [*stream(model, wav), *model.transcribe_segments(wav[None], torch.ones(1))]
    ends = [segment.end for segment in segments] + [word.end for segment in segments for word in segment.words]
    ends += [word.end for word in model.align(wav, "THE CAT")]
    assert max(ends) <= samples / 16_000 < max(ends) + 0.5
    recognizer = StreamingRecognizer(model)
    recognizer.reset(start=4.0)
    assert (recognizer.accept(wav) + recognizer.finish())[-1].end == pytest.approx(4 + stream(model, wav)[-1].end, abs=1e-3)


@pytest.mark.parametrize("tolerance", ["nan", "-1"])
def test_a_tolerance_that_is_none_is_refused_before_the_work(tolerance, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_model, "load_model", lambda *_, **__: pytest.fail("the work began"))
    folder = ROOT / "tests" / "data" / "model_folders" / "ctc-v1"
    assert cli.main(["export", "--model", str(folder), str(tmp_path / "model.onnx"), "--tolerance", tolerance]) == 2
    assert f"The tolerance is {float(tolerance)}; give a number, 0 or more" in capsys.readouterr().err


def test_the_form_of_a_text_is_final():
    for text in ("\u1abb\u061c\u035c\u0c55", "e\u200e\u0301", "A\u061c\u030a"):
        assert normal_form(normal_form(text)) == normal_form(text)


def test_a_corpus_of_its_own_says_nothing_of_another(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare = "prepare: !name:recipes.LibriSpeech.prepare.prepare_librispeech\n"
    for name, card in (("german", "card: {language: de, train_sets: [train-tiny]}\n"), ("bare", "")):
        (tmp_path / f"{name}.yaml").write_text(f"corpus: {name}\n{prepare}train_splits: [train-tiny]\n{card}")
        argv, paths = take_paths([str(CONFORMER), *arguments(**CTC), "--data_folder", str(corpus)])
        file, run_opts, overrides = sb.parse_arguments([*argv, "--device", "cpu"])
        result = training.run(file, run_opts, overrides, paths | {"output_folder": f"run-{name}"}, tmp_path / f"{name}.yaml")
        text = (result.folders["pretrained"] / "README.md").read_text()
        assert "librispeech" not in text.lower() and "books" not in text and ("language: de" in text) == bool(card)


@pytest.mark.parametrize(
    "prepare, message",
    [
        ("pass", "There is no manifest .*train-tiny.csv; the corpus's prepare function writes it"),
        (None, "has no column .*wrd; the corpus's prepare"),
    ],
)
def test_a_corpus_that_prepares_nothing(prepare, message, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"prepare_{'nothing' if prepare else 'half'}"
    writes = (
        "    for split in 'train-tiny', 'dev-tiny', 'test-tiny':\n        open(f'{save_folder}/{split}.csv', 'w').write('ID\\na')"
    )
    (tmp_path / f"{name}.py").write_text(f"def prepare(save_folder, **_):\n    {prepare or ''}\n{'' if prepare else writes}\n")
    (tmp_path / "mine.yaml").write_text(f"corpus: mine\nprepare: !name:{name}.prepare\n")
    argv, paths = take_paths([str(CONFORMER), *arguments(**CTC), "--data_folder", str(corpus)])
    file, run_opts, overrides = sb.parse_arguments([*argv, "--device", "cpu"])
    with pytest.raises(UserError, match=message):
        training.run(file, run_opts, overrides, paths, tmp_path / "mine.yaml")
    with pytest.raises(training.UsageError, match="--corpus has no value"):
        training.run(file, run_opts, overrides, paths, "")
    paths.pop("data_folder")
    with pytest.raises(training.UsageError, match="There is no data_folder for .*mine.yaml"):
        training.run(file, run_opts, overrides, paths, tmp_path / "mine.yaml")
