"""Output of train.py: the list of files, the options, the learning curve, and further loggers."""

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
    logged = []
    run = SimpleNamespace(log=lambda values, **keys: logged.append((values, keys)))
    asked = {}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **keys: asked.update(keys) or run))
    logger = with_logger(FileTrainLogger(str(tmp_path / "log.txt")), "wandb", tmp_path, "mine")
    logger.log_stats({"epoch": 1}, {"loss": 2.0}, {"loss": 3.0})
    assert asked["name"] == "mine" and asked["dir"] == str(tmp_path)
    assert "valid loss: 3.00" in (tmp_path / "log.txt").read_text() and "3.0" in str(logged)


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
