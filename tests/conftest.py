"""Fixtures of all tests: the registered encoders at a small size, and real speech if there is some."""

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import CTC, arguments, make_corpus, train_here

from speechbrain_ext.lobes.fusible import reestimate_statistics
from speechbrain_ext.registry import build_encoder, get_encoder, list_encoders

ROOT = Path(__file__).resolve().parents[1]

# Its device must exist before any test's backward pass: autograd counts the kinds of devices at the first one
with contextlib.suppress(pytest.skip.Exception):
    import pretend_gpu  # noqa: F401


FOLDER = tempfile.TemporaryDirectory(prefix="page-encoders-")  # exists while the tests run


def import_page_encoders():
    """The encoders of the page "Add an encoder", each from a separate file, as users write them."""
    names = []
    folder = FOLDER.name
    page = (ROOT / "docs" / "extend-encoder.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python.*?\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        if name := re.search(r'@register_encoder\("(\w+)"\)', block):
            path = Path(folder, f"page_{name[1]}.py")
            path.write_text(block)
            specification = importlib.util.spec_from_file_location(path.stem, path)
            sys.modules[path.stem] = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(sys.modules[path.stem])
            names.append(name[1])
    return names


PAGE_ENCODERS = import_page_encoders()
SMALL = {"d_model": 32, "nhead": 4, "num_layers": 4, "d_ffn": 64, "dropout": 0.1}
# Keys that change what an encoder computes; an encoder that is not listed is tested with its defaults.
VARIANTS = {
    "conformer": [{"attention_type": "RoPEMHA"}],
    "hyperconformer": [{"tied": True}],
    "fusionformer": [
        {"attention_type": "RelPosMHAXL"},
        {"variant": "batch_norm_behind_each"},
        {"variant": "layer_norm"},
        {"fused": True},
    ],
    "practical_conformer": [{"causal": False, "kernel": "softmax"}, {"attention_type": "RoPEMHA", "causal": False}],
    "cascade": [{"first": "hyperconformer", "second": {"encoder": "squeezeformer", "d_model": 16, "num_layers": 2}}],
    "squeezeformer": [{"reduce_before": [0, 1], "recover_before": [2, 2]}],
}
CASES = [(name, keys) for name in list_encoders() for keys in ({}, *VARIANTS.get(name, []))]


def case_name(name, keys):
    """Name of an encoder with its keys."""
    return "-".join([name, *map(str, keys.values())])


def pytest_generate_tests(metafunc):
    if "encoder_case" in metafunc.fixturenames:
        metafunc.parametrize("encoder_case", CASES, ids=[case_name(*case) for case in CASES])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The tiny corpus, to read only."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path, monkeypatch, corpus):
    """Trains in this process and a separate folder."""
    monkeypatch.chdir(tmp_path)

    def run(*more, hparams=ROOT / "hparams" / "conformer.yaml", data=corpus, **keys):
        data = [] if data is None else ["--data_folder", data]
        return train_here(hparams, "--device", "cpu", *more, *arguments(**{**CTC, **keys}), *data)

    return run


def make_encoder(name, keys, **sizes):
    """A registered encoder, small, in evaluation mode, with random weights."""
    torch.manual_seed(0)
    encoder = build_encoder(name, **SMALL | sizes, **keys).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reestimate_statistics(encoder, [torch.randn(4, 60, encoder.d_model)], encoder)
    return encoder


@pytest.fixture
def encoder(encoder_case):
    """Every registered encoder in turn."""
    return make_encoder(*encoder_case)


@pytest.fixture
def streaming_encoder(encoder_case, encoder):
    if not get_encoder(encoder_case[0]).streamable:
        pytest.skip(f"{encoder_case[0]} says that it does not stream")
    return encoder


@pytest.fixture(scope="session")
def real_english() -> Path:
    """Real speech in LibriSpeech layout; its tests skip where it is absent."""
    folder = os.environ.get("REAL_ENGLISH", "")
    if not os.path.isdir(folder):
        pytest.skip("there is no real speech; set REAL_ENGLISH to a folder in LibriSpeech layout")
    return Path(folder)


@pytest.fixture(name="pretend_gpu")
def pretended_gpu():
    """The module ``pretend_gpu``; the test is skipped where PyTorch cannot pretend, or has a GPU."""
    return importlib.import_module("pretend_gpu")
