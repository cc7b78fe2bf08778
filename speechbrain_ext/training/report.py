"""Reports of a run: the list of hparams files, loggers, the learning curve, and examples."""

import re
import textwrap
import uuid
from pathlib import Path

from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.run_opts import HELP_TEXTS

from speechbrain_ext.utils.errors import UsageError, UserImportError, UserRuntimeError, forget_output, one_line
from speechbrain_ext.utils.files import write_text

LOGGERS = ("tensorboard", "wandb")
"""Values of ``logger``, besides null."""
GRAY = "0.5"


def list_hparams(folder):
    """List the hparams files of a folder: on each line the name, and the first sentence of the file's first comment.

    Arguments
    ---------
    folder : str or os.PathLike
        The folder.

    Returns
    -------
    str

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "small.yaml").write_text("# ####\\n# A small model. See\\n# the paper.\\n# ####\\nd_model: 16\\n")
    >>> print(list_hparams(folder))
    small.yaml  A small model
    """
    files = sorted(Path(folder).glob("*.yaml"))
    width = max((len(path.name) for path in files), default=0)
    return "\n".join(f"{path.name:{width}}  {first_sentence(path)}" for path in files)


def list_options(without=()):
    """List SpeechBrain's options of a run: on each line the option, and what it does.

    Arguments
    ---------
    without : collection of str
        Options to leave out.

    Returns
    -------
    str

    Example
    -------
    >>> "--device" in list_options(), "--device" in list_options(without=["device"])
    (True, False)
    """
    lines = []
    for option in sorted(HELP_TEXTS.keys() - set(without)):
        text = textwrap.wrap(HELP_TEXTS[option], 90)
        lines.append(f"--{option:36} {text[0]}")
        lines += [f"{'':39}{line}" for line in text[1:]]
    return "\n".join(lines)


def first_sentence(path):
    """The first sentence of the comment at the top of an hparams file, without the full stop."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.strip("# "))
    text = re.sub(r", https?:[^)\s]*", "", " ".join(filter(None, lines)))
    return re.split(r"(?<!et al)[.:;](?: |$)", text)[0]


class Loggers:
    """Several of SpeechBrain's loggers as one.

    Arguments
    ---------
    loggers : list of speechbrain.utils.train_logger.TrainLogger
        Each logs all statistics.
    """

    def __init__(self, loggers):
        self.loggers = loggers

    def log_stats(self, *args, **keys):
        """Pass statistics to all loggers."""
        for logger in self.loggers:
            logger.log_stats(*args, **keys)


class EpochLogger:
    """SpeechBrain's logger for TensorBoard, with epochs as steps; SpeechBrain's steps begin at 1 again in a continued run.

    Arguments
    ---------
    logger : speechbrain.utils.train_logger.TensorboardLogger
        The logger.
    """

    def __init__(self, logger):
        self.logger = logger

    def log_stats(self, stats_meta, train_stats=None, valid_stats=None, test_stats=None, verbose=False):
        """Log the statistics of the epoch in ``stats_meta``."""
        steps = self.logger.global_step
        before = stats_meta.get("epoch", steps["meta"] + 1) - 1
        steps["meta"] = before
        for dataset, stats in (("train", train_stats), ("valid", valid_stats)):
            steps[dataset] |= dict.fromkeys(stats or (), before)
        self.logger.log_stats(stats_meta, train_stats, valid_stats, test_stats, verbose)


def check_logger(name):
    """Refuse unknown loggers.

    Arguments
    ---------
    name : str or None
        The value of ``logger``.

    Raises
    ------
    UsageError
        If there is no such logger.
    """
    if name is not None and name not in LOGGERS:
        raise UsageError(f"--logger is {name!r}; give {' or '.join(LOGGERS)}, or leave it out.")


def with_logger(file_logger, name, folder, experiment):
    """The logger of a run: the file, and the one that ``logger`` names.

    Arguments
    ---------
    file_logger : speechbrain.utils.train_logger.TrainLogger
        The logger that writes the file.
    name : str or None
        One of :data:`LOGGERS`.
    folder : str or os.PathLike
        The output folder of the run.
    experiment : str
        The name of the run.

    Returns
    -------
    speechbrain.utils.train_logger.TrainLogger or Loggers

    Raises
    ------
    UserImportError
        If its package is not installed.
    UserRuntimeError
        If W&B does not start.
    """
    check_logger(name)
    if name is None:
        return file_logger
    from speechbrain.utils.train_logger import TensorboardLogger, WandBLogger  # here, because it logs a line when it is imported

    try:
        if name == "tensorboard":
            return Loggers([file_logger, EpochLogger(TensorboardLogger(str(Path(folder) / "tensorboard")))])
        import wandb
    except ImportError as error:
        raise UserImportError(f"--logger {name} needs the package {name}; install it with: pip install {name}") from error

    begun = None
    if if_main_process():
        known = Path(folder) / "wandb_id"  # a restarted training continues the W&B run that its folder names
        if not known.exists():
            write_text(known, uuid.uuid4().hex)
        keys = {"dir": str(folder), "id": known.read_text(encoding="utf-8"), "project": "speechbrain_ext", "name": experiment}
        try:
            begun = wandb.init(resume="allow", **keys)
        except Exception as error:  # here, because SpeechBrain's logger would fail at its own message
            raise UserRuntimeError(
                f"--logger wandb: W&B does not start ({one_line(error)}); log in with: wandb login, or set WANDB_MODE=offline."
            ) from error

    return Loggers([file_logger, WandBLogger(lambda: begun)])


def read_log(path, by="epoch"):
    """Read losses and error rates by epoch from ``train_log.txt``.

    Arguments
    ---------
    path : str or os.PathLike
        The file.
    by : str
        ``"epoch"``, or ``"steps"`` for the number of optimizer steps.

    Returns
    -------
    dict
        (epoch or steps, value) pairs by name, such as "train loss" and "valid WER ctc_greedy".

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "train_log.txt"
    >>> _ = path.write_text("epoch: 1, lr: 1e-3 - train loss: 9.0 - valid loss: 8.5, valid WER ctc_greedy: 90.0\\n")
    >>> read_log(path)["valid WER ctc_greedy"]
    [(1, 90.0)]
    """
    curves = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        done = re.search(rf"\b{by}: (\d+)", line)
        for name, value in re.findall(r"((?:train|valid) [^:,]+): ([-+.\deinfa]+)", line):
            points = dict(curves.get(name, [])) | ({int(done[1]): float(value)} if done else {})
            curves[name] = sorted(points.items())  # the last value of a repeated epoch
    return curves


def draw_curve(log, path):
    """Draw losses and error rates by epoch.

    Arguments
    ---------
    log : str or os.PathLike
        ``train_log.txt`` of a run.
    path : str or os.PathLike
        The picture to write.

    Returns
    -------
    bool
        Whether the picture was drawn. Drawing needs matplotlib and at least one epoch.
    """
    curves = read_log(log) if Path(log).exists() else {}
    rates = {name: points for name, points in curves.items() if "WER" in name}
    losses = {name: points for name, points in curves.items() if name.endswith(" loss")}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not losses:
        return False
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, drawn, label in zip(figure.subplots(1, 2), (losses, rates), ("loss", "WER, %"), strict=True):
        for name, points in drawn.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=GRAY, alpha=0.25)
        if drawn:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return True


def examples(scores, count=3):
    """References and transcripts of some utterances, from the best to the worst.

    Arguments
    ---------
    scores : list of dict
        ``scores`` of SpeechBrain's ErrorRateStats.
    count : int
        Number of utterances.

    Returns
    -------
    str

    Example
    -------
    >>> print(examples([{"key": "a", "WER": 50.0, "ref_tokens": ["A", "CAT"], "hyp_tokens": ["CAT"]}]))
      WER %  reference and transcript
       50.0  A CAT
             CAT
    """
    scores = sorted((score for score in scores if score.get("ref_tokens")), key=lambda score: (score["WER"], score["key"]))
    chosen = [scores[index * (len(scores) - 1) // max(1, count - 1)] for index in range(min(count, len(scores)))]
    lines = [f"{'WER %':>7}  reference and transcript"]
    for score in chosen:
        lines.append(f"{score['WER']:7.1f}  {' '.join(score['ref_tokens'])}")
        lines.append(f"{'':7}  {' '.join(score['hyp_tokens'] or ())}")
    return "\n".join(line.rstrip() for line in lines)


def print_help(text):
    """Print a text whose reader may stop early, as "| head" does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        forget_output()
