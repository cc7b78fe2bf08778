"""Output of train.py: the list of files, the options, the learning curve, and further loggers."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from speechbrain.utils.train_logger import FileTrainLogger

from speechbrain_ext.training.report import check_logger, draw_curve, list_hparams, with_logger
from speechbrain_ext.utils.errors import UsageError, UserError
from train import main

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in (ROOT / "hparams").glob("*.yaml"))


def test_without_arguments_the_files_are_listed(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for name in FILES:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{name} ")]
        assert len(line.removeprefix(name).split()) >= 4, "the first comment of the file says what it is"


def test_the_help_has_ours_first(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    places = [
        shown.index(text) for text in ("--data_folder", "Files in hparams/", "Options of SpeechBrain", "--distributed_backend")
    ]
    assert places == sorted(places)
    assert "--jit" not in shown and "--precision" in shown


def test_a_file_without_a_comment_is_listed_too(tmp_path):
    (tmp_path / "bare.yaml").write_text("lr: 1\n")
    assert list_hparams(tmp_path).split() == ["bare.yaml"] and list_hparams(tmp_path / "none") == ""


def test_losses_go_to_wandb_too(tmp_path, monkeypatch):
    logged, asked = [], []
    run = SimpleNamespace(log=lambda values, **keys: logged.append((values, keys)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **keys: asked.append(keys) or run))
    for epoch in (1, 2):  # stopped between them
        logger = with_logger(FileTrainLogger(str(tmp_path / "log.txt")), "wandb", tmp_path, "mine")
        logger.log_stats({"epoch": epoch}, {"loss": 2.0}, {"loss": 3.0})
    assert asked[0]["name"] == "mine" and asked[0]["dir"] == str(tmp_path)
    assert asked[0] == asked[1] and asked[1]["id"] and asked[1]["resume"] == "allow"
    assert "valid loss: 3.00" in (tmp_path / "log.txt").read_text() and "3.0" in str(logged)
    assert [keys for _, keys in logged] == [{"step": 1}, {"step": 2}]


def test_wandb_that_does_not_start_is_an_error_of_the_user(tmp_path, monkeypatch):
    def init(**keys):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"W&B does not start \(api_key not configured \(no-tty\)\); log in with: wandb login"):
        with_logger(FileTrainLogger(str(tmp_path / "log.txt")), "wandb", tmp_path, "mine")


def test_a_list_of_files_is_all_that_is_printed_without_arguments():
    run = subprocess.run([sys.executable, ROOT / "train.py"], capture_output=True, text=True, check=True)
    assert run.stdout and not run.stderr


def test_a_continued_run_goes_on_in_tensorboard(tmp_path, monkeypatch):
    logged = []
    writer = SimpleNamespace(add_scalar=lambda *values: logged.append(values))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    for epochs in ((1, 2), (3,)):  # stopped after the second epoch
        logger = with_logger(FileTrainLogger(str(tmp_path / "log.txt")), "tensorboard", tmp_path, "mine")
        for epoch in epochs:
            logger.log_stats({"epoch": epoch, "lr": 0.1}, {"loss": 2.0}, {"loss": 3.0, "WER": 4.0})
    logger.log_stats({"epoch": 3}, test_stats={"WER": 5.0})
    for tag in ("lr", "loss/train", "loss/valid", "WER/valid"):
        assert [step for name, _, step in logged if name == tag] == [1, 2, 3], tag
    assert ("WER/test", 5.0, 1) in logged and logged.count(("epoch", 3, 3)) == 2


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_logger_that_is_not_installed_is_named(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"install it with: pip install {name}"):
        with_logger(FileTrainLogger(str(tmp_path / "log.txt")), name, tmp_path, "mine")


def test_an_unknown_logger_is_refused():
    check_logger(None)
    with pytest.raises(UsageError, match="--logger is 'mlflow'; give tensorboard or wandb"):
        check_logger("mlflow")


def test_the_curve_is_drawn_where_there_is_an_epoch(tmp_path):
    log = tmp_path / "train_log.txt"
    assert not draw_curve(log, tmp_path / "curve.png")
    log.write_text(
        "epoch: 1, lr: 1e-3 - train loss: 9.0 - valid loss: nan, valid WER ctc_greedy: 90.0\nepoch: 1 - test loss: 1\n"
    )
    assert draw_curve(log, tmp_path / "curve.png") and (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
