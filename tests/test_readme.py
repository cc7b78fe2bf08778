"""What the README says: its code runs, its files exist, its tables are those of the result files."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from speechbrain_ext.hparams import load_hparams

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_tables_are_generated_from_the_results():
    specification = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tables)
    assert tables.fill(README) == README, "run python benchmarks/tables.py"
    recipe = tables.RECIPE.read_text(encoding="utf-8")
    assert tables.fill_recipe(recipe) == recipe, "run python benchmarks/tables.py"


def test_the_streaming_example_runs(capsys):
    single, cascade = (block for block in blocks("python") if "make_streaming_context" in block)
    names = {}
    exec(single, names)
    assert int(capsys.readouterr().out) > 0
    exec(cascade, names)
    assert names["second"].shape == (1, 500, 144)


def test_the_yaml_example_loads(tmp_path):
    (example,) = [block for block in blocks("yaml") if "TransformerASR" in block]
    (tmp_path / "example.yaml").write_text(example)
    assert load_hparams(tmp_path / "example.yaml")["Transformer"].encoder.d_model == 144


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_take_their_arguments(path, monkeypatch, capsys):
    """Measuring takes hours; that everything is still where they import it from shows at once."""
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    try:
        runpy.run_path(str(path), run_name="__main__" if "argparse" in path.read_text() else path.stem)
    except SystemExit as end:
        assert end.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:hparams|recipes|speechbrain_ext|benchmarks)/[\w./]+)`", README))))
def test_files_exist(path):
    if not path.endswith(("mine.py", "mine.yaml")):
        assert (ROOT / path).exists()


@pytest.mark.parametrize("file, count", re.findall(r"\| `(hparams/\w+\.yaml)` \| ([\d,]+) \|", README))
def test_parameters_are_as_stated(file, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the checkpointer makes its folder
    hparams = load_hparams(ROOT / file)
    assert sum(parameter.numel() for parameter in hparams["model"].parameters()) == int(count.replace(",", ""))
