"""Runs the blocks of a page in order, in one folder, with a tiny corpus and a tiny model at the paths that the page names.

A comment above a block changes how it runs, and is not shown to readers:

``<!-- test: small -->``        add keys with which a training takes seconds
``<!-- test: mini -->``         the same, for the embedded corpus
``<!-- test: tuning -->``       the same, if a model states the sizes
``<!-- test: A => B -->``       replace A with B
``<!-- test: slow -->``         run only by make slow
``<!-- test: skip REASON -->``  do not run, for example without a GPU
``<!-- test: output -->``       the expected output of the block before, with ... for variable parts

Several options are separated by semicolons. Python commands start in processes in which all packages are already imported.
"""

import contextlib
import doctest
import glob
import io
import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path
from typing import NamedTuple

from tiny import SMALL

from speechbrain_ext.dataio import preparation
from speechbrain_ext.hparams import load_hparams

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TINY = {key: value for key, value in SMALL.items() if "split" not in key} | {"device": "cpu"}
"""Keys that ``small`` adds to a training; the corpus has the splits that the files name."""
MINI = {"train_splits": "[dev-mini]", "number_of_epochs": "1", "device": "cpu"} | {
    key: SMALL[key] for key in ("d_model", "nhead", "num_encoder_layers", "d_ffn", "test_search")
}
TUNING = {key: TINY[key] for key in ("number_of_epochs", "num_workers", "device")}
PRELOADED = ["speechbrain_ext.cli", "speechbrain_ext.training.run", "speechbrain_ext.inference", "speechbrain.inference.ASR"]
SIMPLE = re.compile(r"python (-m speechbrain_ext|train\.py|examples/|benchmarks/)[^|<>;&$]*")


class Block(NamedTuple):
    """A block of a page."""

    line: int
    language: str
    title: str
    text: str
    asked: list


def blocks(page):
    """The blocks of a page, with the options in the comments above them."""
    text = page.read_text(encoding="utf-8")
    pattern = r"(?:<!-- test: (.*?) -->\n)?^( *)```(\w+)(?: title=\"(.*?)\")?\n(.*?)^ *```$"
    for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        asked, _, language, title, body = found.groups()
        asked = [part.strip() for part in (asked or "").split("; ")] if asked else []
        yield Block(text[: found.start(3)].count("\n") + 1, language, title or "", body, asked)


def skipped(block):
    """The reason why a block is not run, or None."""
    return next((part.removeprefix("skip").strip() for part in block.asked if part.startswith("skip")), None)


def replaced(text, block):
    """A text of the block with the replacements that its options ask for."""
    for part in block.asked:
        old, arrow, new = part.partition(" => ")
        text = text.replace(old, new) if arrow else text
    return text


class Reader:
    """Runs the blocks of one page in a folder."""

    def __init__(self, folder):
        self.folder, self.names, self.printed = folder, {}, ""
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        # Started in a page's folder, the server would take that folder's speechbrain_ext/ for the package
        with contextlib.chdir(ROOT):
            multiprocessing.forkserver.ensure_running()

    def run(self, block):
        """Run a block; raises AssertionError with its output if it fails."""
        if block.language == "python":
            self._python(block)
        elif block.language == "bash":
            self._bash(block)
        elif block.language in ("yaml", "toml") and block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            if block.language == "toml":
                tomllib.loads(block.text)
            elif "extends:" in block.text or "!new:" in block.text:
                load_hparams(path)
        elif "output" in block.asked:
            same = doctest.OutputChecker().check_output(block.text, self.printed, doctest.ELLIPSIS)
            assert same, f"the page has:\n{block.text}\nbut the output is:\n{self.printed}"

    def _python(self, block):
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            return
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(replaced(block.text, block), f"line {block.line}", "exec"), self.names)
        self.printed = out.getvalue()

    def _bash(self, block):
        self.printed = ""
        for command in re.sub(r"\\\n\s*", "", block.text).splitlines():
            command = re.sub(r"\s+# .*", "", command).strip()
            command = replaced(command, block)
            if not command:
                continue
            for kind, keys in (("small", TINY), ("mini", MINI), ("tuning", TUNING)):
                if kind in block.asked:
                    given = set(re.findall(r"--(\w+)", command))
                    command += "".join(f" --{key} {shlex.quote(value)}" for key, value in keys.items() if key not in given)
            command = command.replace("/path/to/", f"{self.folder}/")
            quick = SIMPLE.fullmatch(command) and "slow" not in block.asked
            status, printed = (self._in_process if quick else self._in_shell)(command)
            assert status == 0, f"line {block.line}: {command}\nends with {status}:\n{printed[-3000:]}"
            self.printed += printed

    def _in_process(self, command):
        words = [name for word in shlex.split(command)[1:] for name in (sorted(glob.glob(word)) or [word])]
        log = self.folder / ".printed"
        process = self.context.Process(target=_main, args=(words, str(self.folder), str(log)))
        process.start()
        process.join()
        return process.exitcode, log.read_text(encoding="utf-8")

    def _in_shell(self, command):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return run.returncode, run.stdout


def _main(words, folder, log):
    """Run ``python WORDS`` in a folder, in a process in which all packages are already imported."""
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    preparation.parallel_map = lambda check, paths, **_: map(
        check, paths
    )  # without worker processes, as there are only two files
    status = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=False)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
