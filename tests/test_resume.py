"""A run that is interrupted and started again ends with exactly the weights of an uninterrupted run (on CPU)."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import SMALL, arguments, make_corpus

from speechbrain_ext.training.checkpoints import AtomicCheckpointer, DamagedCheckpoint
from speechbrain_ext.training.run import UsageError, check_folder

ROOT = Path(__file__).resolve().parents[1]

# Runs train.py and kills itself at the given moment. With an empty moment it runs to its end.
DRIVER = """
import os, shutil, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
import train
from speechbrain_ext.brains.asr import AsrBrain
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def run(folder, corpus, keys, hparams="hyperconformer_streaming", moment="", count=0, sent="SIGKILL"):
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
    straight = run(tmp_path / "straight", corpus, EVERYTHING)
    assert straight.returncode == 0, straight.stdout + straight.stderr
    for moment, count, sent in INTERRUPTIONS:
        stopped = run(tmp_path / "interrupted", corpus, EVERYTHING, moment=moment, count=count, sent=sent)
        expected = 130 if sent == "SIGINT" else -getattr(signal, sent)
        assert stopped.returncode == expected, (moment, stopped.stdout + stopped.stderr)
    assert "run the same command again" in stopped.stderr  # after SIGINT; a killed run prints nothing
    finished = run(tmp_path / "interrupted", corpus, EVERYTHING)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert_same_runs(tmp_path / "straight", tmp_path / "interrupted")
    again = run(tmp_path / "interrupted", corpus, EVERYTHING)  # the training is complete; it only tests again
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same_runs(tmp_path / "straight", tmp_path / "interrupted")


def test_resumed_training_is_exact_with_cached_features(corpus, tmp_path):
    keys = {**EVERYTHING, "num_workers": 0, "grad_accumulation_factor": 1, "wav_augment": "null", "cache_features": "True"}
    keys |= {"number_of_epochs": 2, "num_decoder_layers": 0}
    assert run(tmp_path / "straight", corpus, keys, "conformer").returncode == 0
    assert run(tmp_path / "interrupted", corpus, keys, "conformer", "step", 4).returncode == -signal.SIGKILL
    assert run(tmp_path / "interrupted", corpus, keys, "conformer").returncode == 0
    assert_same_runs(tmp_path / "straight", tmp_path / "interrupted")


def test_a_continued_training_follows_its_new_schedule(corpus, tmp_path):
    """A training of 100 steps that stopped after 4, and is to end after 8."""
    name, keys = "speechbrain.nnet.schedulers.WarmCoolDecayLRSchedule", {**SMALL, "number_of_epochs": 9, "num_decoder_layers": 0}
    for total, limit, expected in ((100, 4, 0.01), (8, 8, 0.0)):
        schedule = f"!new:{name} {{lr: 0.01, warmup: 1, cooldown: {total // 2}, total_steps: {total}, decay_factor: 1}}"
        done = run(tmp_path, corpus, {**keys, "lr_annealing": schedule, "optimizer_step_limit": limit}, "conformer")
        assert done.returncode == 0, done.stdout + done.stderr
        (group,) = torch.load(last_checkpoint(tmp_path) / "optimizer.ckpt")["param_groups"]
        assert group["lr"] == pytest.approx(expected)


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
    assert run(tmp_path / "run", corpus, keys).returncode == 0
    meta = yaml.safe_load((last_checkpoint(tmp_path / "run") / "CKPT.yaml").read_text())
    assert {key: type(value) for key, value in meta.items()} == {
        "WER": float, "epoch": int, "end-of-epoch": bool, "unixtime": float, "processes": int
    }  # fmt: skip
