"""Commands and code of README and documentation run, files exist, and tables agree with the result files."""

import gzip
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from documentation import PAGES, ROOT, Reader, blocks, skipped
from tiny import SENTENCES, make_corpus, make_model, needs_flashlight

from speechbrain_ext.hparams import load_hparams

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
SPLITS = {
    **{"train-clean-100": 12, "train-clean-360": 2, "train-other-500": 2, "train-clean-5": 12},
    **{"dev-clean": 2, "dev-clean-2": 2, "test-clean": 2, "test-other": 2},
}
KALDI = "!new:speechbrain_ext.lobes.features.KaldiFbank {sample_rate: 16000, n_mels: 80}"
MOST_SKIPPED = 17
"""Number of blocks that need another machine or take minutes; a new one needs an equally good reason."""


def name_of(page):
    return str(page.relative_to(ROOT).with_suffix(""))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The files that the pages name: a corpus, manifests, audio, and a trained model."""
    folder = tmp_path_factory.mktemp("pages")
    make_corpus(folder / "LibriSpeech", utterances=SPLITS)
    make_model(folder, decoder_layers=0)
    shutil.copytree(folder / "model", folder / "results" / "demo" / "pretrained")
    (folder / "practical").mkdir()
    make_model(
        folder / "practical", decoder_layers=0, name="practical_conformer", size="xs", encoder_kwargs="{second: conformer}"
    )
    shutil.copytree(folder / "practical" / "model", folder / "results" / "practical" / "pretrained")
    for head in ("joint", "transducer"):
        shutil.copytree(ROOT / "tests" / "data" / "model_folders" / f"{head}-v1", folder / "results" / head / "pretrained")
    (folder / "kaldi").mkdir()
    make_model(folder / "kaldi", 0, compute_features=KALDI)
    shutil.copytree(folder / "kaldi" / "model", folder / "results" / "few-hours" / "pretrained")
    samples, rate = soundfile.read(folder / "long.flac", dtype="float32")
    (folder / "examples").mkdir()
    for path in (ROOT / "examples").iterdir():
        (folder / "examples" / path.name).symlink_to(path)
    own = folder / "my"
    own.mkdir()
    for name, split in (("train", "train-clean-100"), ("dev", "dev-clean"), ("test", "test-clean"), ("old", "train-clean-5")):
        lines = []
        for texts in (folder / "LibriSpeech" / split).glob("*/*/*.trans.txt"):
            for line in texts.read_text().splitlines():
                key, _, text = line.partition(" ")
                path = texts.with_name(f"{key}.flac")
                duration = soundfile.info(path).duration
                lines.append(json.dumps({"audio_filepath": str(path), "duration": duration, "text": text}))
        (own / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        if name == "test":
            rows = [json.loads(line) for line in lines]
            table = [f"{number},{row['audio_filepath']},{row['duration']},x,{row['text']}" for number, row in enumerate(rows)]
            (folder / "results" / "demo" / "test-mini.csv").write_text("ID,wav,duration,spk_id,wrd\n" + "\n".join(table) + "\n")
    with np.load(ROOT / "tests" / "data" / "squeezeformer_golden.npz") as golden:  # a small model of NeMo
        weights = {name: torch.from_numpy(golden[name]) for name in golden.files if name.startswith("common/w/")}
    torch.save({name.replace("common/w/", "encoder."): tensor for name, tensor in weights.items()}, folder / "model_weights.ckpt")
    with gzip.open(folder / "books.txt.gz", "wt") as file:
        file.write("\n".join(SENTENCES) + "\n")
    for split in ("train", "dev", "test"):
        (folder / "mine" / split).mkdir(parents=True)
        for number, text in enumerate(SENTENCES):
            soundfile.write(folder / "mine" / split / f"{number}.wav", samples, rate)
            (folder / "mine" / split / f"{number}.txt").write_text(text)
    return folder


def pages_with(slow):
    return [page for page in PAGES if any(("slow" in block.asked) == slow for block in blocks(page))]


@pytest.mark.parametrize("page", pages_with(slow=False), ids=name_of)
def test_blocks_run_in_order(page, place, tmp_path, monkeypatch, slow=False):
    written = ("results", "mine")  # folders that pages write to
    for path in place.iterdir():
        shutil.copytree(path, tmp_path / path.name) if path.name in written else (tmp_path / path.name).symlink_to(path)
    (tmp_path / "speechbrain_ext").mkdir()
    (tmp_path / "hparams").mkdir()
    shipped = [*(ROOT / "hparams").iterdir(), *(ROOT / name for name in ("train.py", "recipes", "benchmarks"))]
    for path in (*shipped, ROOT / "speechbrain_ext" / "training"):
        (tmp_path / path.relative_to(ROOT)).symlink_to(path)
    if "--lm lm.arpa" in TEXTS[page]:
        needs_flashlight()
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path)
    for block in blocks(page):
        if skipped(block) is None and ("slow" in block.asked) == slow:
            reader.run(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(slow=True), ids=name_of)
def test_long_blocks_run(page, place, tmp_path, monkeypatch):
    test_blocks_run_in_order(page, place, tmp_path, monkeypatch, slow=True)


def test_few_blocks_are_skipped_and_each_says_why():
    reasons = [skipped(block) for page in PAGES for block in blocks(page) if skipped(block) is not None]
    assert len(reasons) <= MOST_SKIPPED and all(len(reason.split()) > 1 for reason in reasons), reasons


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_starts_from_any_folder(script, tmp_path):
    subprocess.run([sys.executable, script, "--help"], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_tables_are_generated_from_the_results():
    specification = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tables)
    for page, text in TEXTS.items():
        assert tables.fill(text) == text, f"{name_of(page)}: run python benchmarks/tables.py"


def test_a_key_without_an_explanation_is_no_reference(tmp_path):
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"), run_name="tables")
    path = tmp_path / "file.yaml"
    path.write_text("# above\na: 1\nb: 2\n\nc: '#no'   # behind\nd:\n    e: 1  # inner\n")
    assert tables["keys_of"](path) == [("", "a", "1", "above"), ("", "b", "2", "above"), ("", "c", "'#no'", "behind")] + [
        ("", "d", "e: 1", "")
    ]
    path.write_text("d: !new:x.Y\n    e: 1  # inner\n    f: !ref <a>\n    g:\n        h: 1\ncard:\n    i: 1\n")
    assert tables["arguments_of"](path) == {"d": [("e", "1", "inner")]}
    with pytest.raises(ValueError, match="the key d has no explanation"):
        tables["_explained"](ROOT / "file.yaml", "d", "")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_take_their_arguments(path, monkeypatch, capsys):
    """Measuring takes hours; this only checks imports and arguments."""
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    try:
        runpy.run_path(str(path), run_name="__main__" if "argparse" in path.read_text() else path.stem)
    except SystemExit as end:
        assert end.code == 0 and "usage:" in capsys.readouterr().out


def test_files_exist():
    pattern = r"`((?:hparams|recipes|speechbrain_ext|benchmarks|examples|docs)/[\w./-]+)`"
    for page, text in TEXTS.items():
        for path in re.findall(pattern, text):
            assert (ROOT / path).exists(), f"{name_of(page)} names {path}"


def test_the_api_reference_has_every_module_with_public_names():
    modules = {path for path in (ROOT / "speechbrain_ext").rglob("*.py") if not path.stem.startswith("_")}
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules if path.parent.name != "cli"}
    assert not names - set(re.findall(r"^::: (\S+)$", "\n".join(TEXTS.values()), re.MULTILINE))


def test_links_of_the_readme_lead_somewhere():
    """Links of the pages are checked when the site is built."""
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "LibriSpeech" / "README.md"):
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", file.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = file.parent / path if path else file
            assert target.exists(), f"{file.name} links to {link}"
            heads = (
                [
                    re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-")
                    for head in re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                ]
                if anchor
                else []
            )
            assert not anchor or anchor in heads, f"{file.name} links to {link}"


def test_the_readme_fits_on_a_few_screens():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) <= 150


FILES = re.findall(r"\| `(hparams/\w+\.yaml)` \| ([\d,]+) \|", TEXTS[ROOT / "docs" / "train.md"])


@pytest.mark.parametrize("file, count", FILES)
def test_parameters_are_as_stated(file, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the checkpointer creates its folder here
    hparams = load_hparams(ROOT / file)
    assert sum(parameter.numel() for parameter in hparams["model"].parameters()) == int(count.replace(",", ""))


def test_every_architecture_has_a_row_and_a_page():
    shipped = {path.stem for path in (ROOT / "hparams").glob("*.yaml")} - {"finetune"}
    assert {Path(file).stem for file, _ in FILES} == shipped
