"""A run that is interrupted and started again ends with exactly the weights of an uninterrupted run (on CPU)."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from tiny import CTC, SMALL, arguments, make_corpus, rows, train

from speechbrain_ext.dataio.datasets import BatchesOfProcess
from speechbrain_ext.hparams import merge_hparams
from speechbrain_ext.training import checkpoints
from speechbrain_ext.training import run as training
from speechbrain_ext.training.checkpoints import AtomicCheckpointer, DamagedCheckpoint, RandomStates
from speechbrain_ext.training.settings import UsageError, check_folder
from speechbrain_ext.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# Runs train.py and kills itself at the given moment. With an empty moment it runs to its end.
DRIVER = """
import os, shutil, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
import train
from speechbrain_ext.brains.asr import AsrBrain
from speechbrain_ext.dataio.datasets import BatchesOfProcess
from speechbrain_ext.training import run as training
from speechbrain_ext.training.checkpoints import RandomStates
moment, count, sent, *argv = sys.argv[1:]
seen = 0
def bomb():
    global seen
    seen += 1
    if seen == int(count):
        os.kill(os.getpid(), getattr(signal, sent))
def before(owner, name):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        bomb()
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)
if moment == "step":
    before(AsrBrain, "fit_batch")
elif moment == "validation":
    before(AsrBrain, "evaluate_batch")
elif moment == "saving":  # when only some files of a checkpoint are written
    from speechbrain.utils import checkpoints
    original = checkpoints.DEFAULT_SAVE_HOOKS[RandomStates]
    def save(*args):
        bomb()
        return original(*args)
    checkpoints.DEFAULT_SAVE_HOOKS[RandomStates] = save
elif moment == "deleting":
    def rmtree(path, *args, **kwargs):
        os.remove(sorted(os.scandir(path), key=lambda entry: entry.name)[0].path)
        bomb()
        return original(path, *args, **kwargs)
    original, shutil.rmtree = shutil.rmtree, rmtree
sys.exit(train.main(argv))
"""

# Everything that draws numbers or counts: dropout, speed perturbation, SpecAugment, random chunks, workers, accumulation
EVERYTHING = {
    **SMALL,
    "train_batch_sampler": "{max_batch_length: 2.5, num_buckets: 10, sorted_epochs: 1}",
    "number_of_epochs": 3,
    "average_checkpoints": 2,
    "augment_warmup": 1,
    "num_workers": 1,
    "grad_accumulation_factor": 2,
    "ckpt_interval_minutes": 0,
    "ckpt_interval_steps": 2,
}
INTERRUPTIONS = [
    ("step", 2, "SIGKILL"),  # before the first checkpoint
    ("step", 6, "SIGKILL"),  # between two checkpoints of the first epoch
    ("saving", 1, "SIGKILL"),
    ("validation", 1, "SIGTERM"),
    ("deleting", 1, "SIGKILL"),
    ("step", 4, "SIGINT"),
]


def run_with_bomb(folder, corpus, keys, hparams="hyperconformer_streaming", moment="", count=0, sent="SIGKILL"):
    folder.mkdir(exist_ok=True)
    argv = [moment, str(count), sent, str(ROOT / "hparams" / f"{hparams}.yaml"), "--data_folder", str(corpus), "--device", "cpu"]
    return subprocess.run(
        [sys.executable, "-c", DRIVER.format(root=str(ROOT)), *argv, *arguments(**keys)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def last_checkpoint(folder):
    (save,) = folder.glob("results/*/7775/save")
    return max(save.glob("CKPT*"), key=lambda path: yaml.safe_load((path / "CKPT.yaml").read_text())["unixtime"])


def tensors(value, name=""):
    """All tensors and numbers of a nested structure, by place."""
    if isinstance(value, dict):
        return {place: item for key in value for place, item in tensors(value[key], f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {place: item for key, child in enumerate(value) for place, item in tensors(child, f"{name}.{key}").items()}
    return {name: value}


def assert_same(left, right):
    left, right = tensors(left), tensors(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if torch.is_tensor(value) else value == right[name], name


def assert_same_runs(straight, interrupted):
    here, there = last_checkpoint(straight), last_checkpoint(interrupted)
    for name in ("model", "optimizer", "lr_annealing", "random_states"):
        assert_same(torch.load(here / f"{name}.ckpt"), torch.load(there / f"{name}.ckpt"))
    for name in ("counter", "dataloader-TRAIN"):
        assert (here / f"{name}.ckpt").read_text() == (there / f"{name}.ckpt").read_text()
    progress = [yaml.safe_load((path / "brain.ckpt").read_text()) for path in (here, there)]
    for name in ("step", "optimizer_step", "audio_seconds"):
        assert progress[0][name] == progress[1][name], name
    # The averages are equal, so the same checkpoints were selected
    averages = [next(folder.glob("results/*/7775/pretrained/asr.safetensors")) for folder in (straight, interrupted)]
    assert_same(*map(load_file, averages))


def test_resumed_training_is_exact(corpus, tmp_path):
    straight = run_with_bomb(tmp_path / "straight", corpus, EVERYTHING)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    for moment, count, sent in INTERRUPTIONS:
        stopped = run_with_bomb(tmp_path / "interrupted", corpus, EVERYTHING, moment=moment, count=count, sent=sent)
        expected = 130 if sent == "SIGINT" else -getattr(signal, sent)
        assert stopped.returncode == expected, (moment, stopped.stdout + stopped.stderr)
    assert "run the same command again" in stopped.stderr  # after SIGINT; a killed run prints nothing
    finished = run_with_bomb(tmp_path / "interrupted", corpus, EVERYTHING)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_same_runs(tmp_path / "straight", tmp_path / "interrupted")
    again = run_with_bomb(tmp_path / "interrupted", corpus, EVERYTHING)  # the training is complete; it only tests again
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same_runs(tmp_path / "straight", tmp_path / "interrupted")


def test_resumed_training_is_exact_with_cached_features(corpus, tmp_path):
    keys = {**EVERYTHING, "num_workers": 0, "grad_accumulation_factor": 1, "wav_augment": "null", "cache_features": "True"}
    keys |= {"number_of_epochs": 2, "num_decoder_layers": 0}
    assert run_with_bomb(tmp_path / "straight", corpus, keys, "conformer").returncode == 0
    assert run_with_bomb(tmp_path / "interrupted", corpus, keys, "conformer", "step", 4).returncode == -signal.SIGKILL
    assert run_with_bomb(tmp_path / "interrupted", corpus, keys, "conformer").returncode == 0
    assert_same_runs(tmp_path / "straight", tmp_path / "interrupted")


def test_a_half_written_or_half_deleted_checkpoint_is_none(tmp_path, monkeypatch):
    model = torch.nn.Linear(1, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"model": model})
    first = checkpointer.save_checkpoint(meta={"WER": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save_checkpoint(meta={"WER": 2.0})
    assert [checkpoint.path for checkpoint in checkpointer.list_checkpoints()] == [first.path]
    second = checkpointer.save_checkpoint(meta={"WER": 3.0})  # also removes the incomplete one
    assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path])
    checkpointer.delete_checkpoints(min_keys=["WER"], importance_keys=[], num_to_keep=1)
    assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path])  # the best one and the latest one
    third = checkpointer.save_checkpoint(meta={"WER": 4.0})
    checkpointer.delete_checkpoints(min_keys=["WER"], importance_keys=[], num_to_keep=1)
    assert sorted(tmp_path.iterdir()) == sorted([first.path, third.path])


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
    saved = checkpointer.save_checkpoint()
    for content in (b"", b"no such thing"):
        (saved.path / "model.ckpt").write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=str(saved.path).replace("+", ".")):
            checkpointer.recover_if_possible()


@pytest.mark.parametrize(
    "content", ["", "a: [b", "- 1", "WER: 1.0", "unixtime: x", "\0", "a: !!python/object/apply:os.getcwd []"]
)
def test_a_checkpoint_without_its_meta_data_is_named(content, tmp_path):
    """For example an empty file, as after a power failure."""
    checkpointer = AtomicCheckpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
    checkpointer.save_checkpoint(meta={"WER": 1.0})
    path = checkpointer.save_checkpoint(meta={"WER": 2.0}).path / "CKPT.yaml"
    path.write_text(content)
    for call in (checkpointer.recover_if_possible, checkpointer.list_checkpoints):
        with pytest.raises(DamagedCheckpoint, match=f"{re.escape(str(path.parent))} is damaged: its CKPT.yaml cannot be read"):
            call()


class Trap:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_that_holds_code_runs_nothing(tmp_path, capfd):
    checkpointer = AtomicCheckpointer(tmp_path, {"model": torch.nn.Linear(1, 1)})
    torch.save(Trap(), checkpointer.save_checkpoint().path / "model.ckpt")
    with pytest.raises(DamagedCheckpoint, match=r"\(one of its files is not a checkpoint, or holds code\)"):
        checkpointer.recover_if_possible()
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("content", [b"", b"a: [b", b"- 1", b"3", b"\xe9", b"a: 1\na: 2"])
def test_a_run_whose_settings_are_damaged_is_named(content, tmp_path):
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "hyperparams.yaml").write_bytes(content)
    with pytest.raises(UsageError, match="hyperparams.yaml is damaged .*; give another --output_folder"):
        check_folder(tmp_path, "data_folder: a\nspeech_encoder: 1\n", False)


def test_meta_values_are_plain(corpus, tmp_path):
    keys = {**SMALL, "number_of_epochs": 1}
    assert run_with_bomb(tmp_path / "run", corpus, keys).returncode == 0
    meta = yaml.safe_load((last_checkpoint(tmp_path / "run") / "CKPT.yaml").read_text())
    assert {key: type(value) for key, value in meta.items()} == {
        "WER": float, "epoch": int, "end-of-epoch": bool, "unixtime": float, "processes": int
    }  # fmt: skip


def test_changed_transcripts_are_followed_or_refused(run, tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    output = run(data=corpus).output
    transcripts = corpus / "train-tiny" / "1" / "1" / "1-1.trans.txt"
    transcripts.write_text(transcripts.read_text().replace("CAT", "KÄT"))
    with pytest.raises(UserError, match="began with other utterances; give another --output_folder"):
        run(data=corpus, number_of_epochs=2)
    (output / "save").rename(output / "elsewhere")  # as if the run was interrupted before its first checkpoint
    run(data=corpus)
    (model,) = output.glob("*.model")
    tokenizer = SentencePieceProcessor(str(model))
    assert tokenizer.unk_id() not in tokenizer.encode_as_ids("KÄT")


def last_group(output):
    """The parameter group of the optimizer in the latest checkpoint of a run."""
    last = max((output / "save").glob("CKPT*"), key=lambda path: path.stat().st_mtime)
    (group,) = torch.load(last / "optimizer.ckpt")["param_groups"]
    return group


def test_a_continued_run_follows_its_new_settings(run):
    """A training of 100 steps that stopped after 2, and is to end after 4, with another weight decay."""
    name, keys = "speechbrain.nnet.schedulers.WarmCoolDecayLRSchedule", {"number_of_epochs": 9}
    for total, limit, rate, decay in ((100, 2, 0.01, 0.0), (4, 4, 0.0, 0.25)):
        schedule = f"!new:{name} {{lr: 0.01, warmup: 1, cooldown: {total // 2}, total_steps: {total}, decay_factor: 1}}"
        keys |= {"lr_annealing": schedule, "opt_class": f"!name:torch.optim.AdamW {{lr: 0.01, weight_decay: {decay}}}"}
        result = run("--optimizer_step_limit", limit, **keys)
        group = last_group(result.output)
        assert group["lr"] == pytest.approx(rate) and group["weight_decay"] == decay
    assert "continues with other settings than it began with: opt_class, lr_annealing" in (result.output / "log.txt").read_text()
    assert f"--opt_class !name:torch.optim.AdamW {{'lr': 0.01, 'weight_decay': {decay}}}" in result.rows[0].overrides
    assert run("--test_only", **keys).rows[0].WER == result.rows[0].WER
    for other in ({"opt_class": "!name:torch.optim.SGD {lr: 0.01}"}, {"blank_index": 3, "unk_index": 0}):
        with pytest.raises(UsageError, match=f"holds a run with {next(iter(other))} "):
            run(**keys | other)
    recorded = (result.output / "hyperparams.yaml").read_text()
    with pytest.raises(UserError, match="began with other validation utterances"):
        run("--optimizer_step_limit", 6, **keys, dev_split="test-tiny")
    assert (result.output / "hyperparams.yaml").read_text() == recorded  # what was refused is not recorded


def test_counters_of_a_schedule_survive_a_stop_and_settings_follow_the_hparams(run):
    linear = "LinearWarmupScheduler {{initial_value: 1.0, num_warmup_steps: 3, num_training_steps: {}}}"
    root = "InverseSquareRootScheduler {{warmup_steps: {}}}"
    for schedule, limit, setting, rate in (
        (linear, 2, 5, 2 / 3),
        (linear, 5, 9, 4 / 6),
        (root, 2, 3, 3**-0.5),
        (root, 5, 4, 5**-0.5),  # more than the warm-up's, because the steps before the stop count
    ):
        keys = {"number_of_epochs": 9, "output_folder": schedule[:6]}
        keys["lr_annealing"] = f"!new:speechbrain.nnet.schedulers.{schedule.format(setting)}"
        assert last_group(run("--optimizer_step_limit", limit, **keys).output)["lr"] == pytest.approx(rate)


@register_checkpoint_hooks
class CountingSchedule:
    """A schedule of a user: it is told the step, and also counts its calls."""

    def __init__(self, lr):
        self.lr, self.calls = lr, 0

    def __call__(self, opt, num_updates):
        self.calls += 1
        for group in opt.param_groups:
            group["lr"] = self.lr / self.calls

    @mark_as_saver
    def save(self, path):
        path.write_text(f"{self.lr} {self.calls}")

    @mark_as_loader
    def load(self, path, end_of_epoch=False):
        lr, calls = path.read_text().split()
        self.lr, self.calls = float(lr), int(calls)


def test_the_state_of_a_schedule_of_ones_own_survives_a_stop(run):
    for limit, lr in ((2, 0.01), (5, 0.02)):
        keys = {"number_of_epochs": 9, "lr_annealing": f"!new:{__name__}.CountingSchedule {{lr: {lr}}}"}
        assert last_group(run("--optimizer_step_limit", limit, **keys).output)["lr"] == pytest.approx(lr / limit)


def test_a_part_without_a_loader_is_no_reason_to_delete_checkpoints(tmp_path):
    checkpointer = AtomicCheckpointer(tmp_path, {"part": object()}, custom_save_hooks={"part": lambda _, path: path.touch()})
    checkpointer.save_checkpoint()
    with pytest.raises(RuntimeError, match="Don't know how to load") as raised:
        checkpointer.recover_if_possible()
    assert not isinstance(raised.value, UserError)


def test_gradients_without_a_limit_are_not_clipped(run):
    """As in SpeechBrain, 0 and less do not clip."""
    logs = {
        (run("--max_grad_norm", limit, output_folder=f"x{limit}").output / "train_log.txt").read_text() for limit in (-1, 0, 1e9)
    }
    assert len(logs) == 1


def test_a_run_that_stopped_before_it_had_learned_anything_binds_nobody(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "prepare_tokenizer", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            run(output_folder="x")
    assert run(output_folder="x", d_model=8).folders["pretrained"].is_dir()
    with pytest.raises(UsageError, match="x holds a run with d_model 8, but this run has 16"):
        run(output_folder="x")


def test_sizes_of_heads_are_those_of_the_run(tmp_path):
    file = ROOT / "hparams" / "conformer_transducer.yaml"
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "hyperparams.yaml").write_text(merge_hparams([file], {"data_folder": "x", "predictor_size": 16}))
    with pytest.raises(UsageError, match="holds a run with predictor_size 16, but this run has 24"):
        check_folder(tmp_path, merge_hparams([file], {"data_folder": "x", "predictor_size": 24}), False)


def test_moved_data_goes_on_with_one_option(run, tmp_path):
    corpus = make_corpus(tmp_path / "corpus")
    run(data=corpus)
    corpus.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="--data_moved True"):
        run(data=tmp_path / "moved", number_of_epochs=2)
    assert run(data=tmp_path / "moved", number_of_epochs=2, data_moved=True).rows[0].epochs == 2


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_processes_together_visit_each_utterance_once(world):
    generator = np.random.default_rng(world)
    for utterances in (5, 17, 40):
        order = generator.permutation(utterances).tolist()
        batches, start = [], 0
        while start < utterances:
            size = int(generator.integers(1, 7))
            batches.append(order[start : start + size])
            start += size
        shares = [list(BatchesOfProcess(batches, rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1 and len(shares[0]) == len(BatchesOfProcess(batches, 0, world))
        assert sorted(index for share in shares for batch in share for index in batch) == list(range(utterances))


def test_more_processes_than_utterances_are_refused():
    with pytest.raises(UserError, match="2 utterances are too few for 3 processes"):
        len(BatchesOfProcess([[1], [2]], 0, 3))


def test_an_epoch_that_another_number_of_processes_has_begun_begins_again(tmp_path):
    model = torch.nn.Linear(1, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"model": model})
    first = checkpointer.save_checkpoint(meta={"WER": 1.0})
    within = checkpointer.save_checkpoint(end_of_epoch=False)
    assert checkpointer.recover_if_possible().path == within.path
    text = (within.path / "CKPT.yaml").read_text()
    (within.path / "CKPT.yaml").write_text(text.replace("processes: 1", "processes: 2"))
    assert checkpointer.recover_if_possible().path == first.path


def test_a_process_that_the_run_did_not_have_draws_other_numbers(tmp_path, monkeypatch):
    RandomStates().save(tmp_path / "states.ckpt")
    drawn = []
    for rank in (0, 1, 2, 1):
        monkeypatch.setattr(checkpoints, "process_number", lambda rank=rank: rank)
        RandomStates().load(tmp_path / "states.ckpt", end_of_epoch=True)
        drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[1] == drawn[3] and all(len(set(column)) == 3 for column in zip(*drawn, strict=True))


@pytest.mark.parametrize("name", ["SLURM_PROCID", "JSM_NAMESPACE_RANK", "RANK"])
def test_the_number_of_a_job_is_not_that_of_a_process(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "1")
    RandomStates().save(tmp_path / "states.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["states.ckpt"]
    RandomStates().load(tmp_path / "states.ckpt", end_of_epoch=True)


def test_two_processes_with_one_batch_and_then_one_process(corpus, tmp_path):
    """Two processes share a single batch; after a finished epoch a run may continue with any number of processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    keys = {**CTC, "train_splits": "[dev-tiny]", "train_batch_sampler": "{max_batch_length: 100, num_buckets: 1}"}
    command = [ROOT / "hparams" / "conformer.yaml", "--data_folder", corpus, "--device", "cpu"]
    finished = train(tmp_path, *command, *arguments(**keys), launcher=launcher)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert rows(tmp_path)[-1]["steps"] == "1"
    finished = train(tmp_path, *command, *arguments(**{**keys, "number_of_epochs": 2}))
    assert finished.returncode == 0 and rows(tmp_path)[-1]["epochs"] == "2", finished.stdout + finished.stderr
