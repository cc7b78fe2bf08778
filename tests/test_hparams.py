"""Hparams files: the ``extends`` key, and checks of every shipped file."""

import re
from pathlib import Path

import pytest
import speechbrain as sb
from ruamel.yaml import YAML
from speechbrain.utils.run_opts import RunOptions
from tiny import ARCHITECTURES

from speechbrain_ext.hparams import load_hparams, merge_hparams
from speechbrain_ext.training.settings import choose_setting, take_paths
from speechbrain_ext.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "recipes" / "Synthetic" / "corpus.yaml"
CONFORMER = ROOT / "hparams" / "conformer.yaml"


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_variant_states_only_what_differs(write):
    write("base.yaml", "a: 1\nb: !ref <a> + 1\nc: !new:collections.Counter\n    x: 1\n    y: !ref <a>\n")
    write("middle.yaml", "extends: base.yaml\na: 10\nc:\n    x: 5\n")
    top = write("top.yaml", "extends: middle.yaml\nd: !ref <b>\n")
    assert load_hparams(top) == {"a": 10, "b": 11, "c": {"x": 5, "y": 10}, "d": 11}
    assert load_hparams(top, "a: 2") == {"a": 2, "b": 3, "c": {"x": 5, "y": 2}, "d": 3}


def test_a_tagged_mapping_replaces_and_a_plain_one_merges(write):
    write("base.yaml", "a: !new:collections.Counter {x: 1}\nb: !new:collections.Counter {x: 1}\n")
    top = write("top.yaml", "extends: base.yaml\na: !new:collections.OrderedDict {y: 2}\nb: {y: 2}\n")
    assert load_hparams(top) == {"a": {"y": 2}, "b": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    "value, built",
    [
        ("[NEW {a: 1}, NEW {a: 2, b: 3}, 4]", "[Counter({'a': 1}), Counter({'b': 3, 'a': 2}), 4]"),
        ("{b: [[NEW {a: 1}], 2]}", "{'b': [[Counter({'a': 1})], 2]}"),
        ("NEW {b: [NEW {}, NEW {a: [NEW {a: 1}]}]}", "Counter({'b': [Counter(), Counter({'a': [Counter({'a': 1})]})]})"),
    ],
)
def test_objects_in_lists_keep_their_keys(value, built, write):
    """HyperPyYAML loses the braces of these."""
    value = value.replace("NEW", "!new:collections.Counter")
    assert repr(load_hparams(write("a.yaml", f"x: {value}\n"))["x"]) == built
    assert repr(load_hparams(write("b.yaml", "x: null\n"), f"x: {value}")["x"]) == built


def test_several_files_override_one_another(write):
    base, more = write("base.yaml", "a: 1\nb: null\n"), write("more.yaml", "b: {c: !ref <a>}\n")
    assert load_hparams([base, more]) == {"a": 1, "b": {"c": 1}}
    assert load_hparams(write("both.yaml", "extends: [base.yaml, more.yaml]\na: 2\n")) == {"a": 2, "b": {"c": 2}}


@pytest.mark.parametrize(
    "text, message",
    [
        ("extends: gone.yaml\n", r"no hparams file .*gone\.yaml, which .*bad\.yaml extends"),
        ("extends: bad.yaml\n", "extends itself"),
        ("a: 1\nextends: base.yaml\n", "must be the first"),
        ("a: [1\n", r"bad\.yaml is no valid YAML: .* in line \d+"),
        ("a: 1\na: 2\n", "no valid YAML: found duplicate key"),
        ("only words\n", "should hold 'key: value' lines"),
        ("", "should hold 'key: value' lines"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(write, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge_hparams(write("bad.yaml", text))


def test_an_unknown_override_is_refused_with_the_nearest_key():
    with pytest.raises(ValueError, match="Unknown key 'number_of_epoch' for .*; did you mean 'number_of_epochs'?"):
        merge_hparams(CONFORMER, "number_of_epoch: 3")
    with pytest.raises(ValueError, match="Unknown key 'zzzz' .*; docs/hparams.md lists the keys"):
        merge_hparams(CONFORMER, {"zzzz": 1})


@pytest.mark.parametrize(
    "given, hint",
    [
        ("--precison bf16", "did you mean 'precision'?"),
        ("--devise cpu", "did you mean 'device'?"),
        ("--noprogresbar", "did you mean 'noprogressbar'?"),
        ("--optimiser_step_limit 3", "did you mean 'optimizer_step_limit'?"),
        ("--train_manifst x y", "did you mean 'train_manifest'?"),
        ("--max_batch_length 100", "did you mean 'train_batch_sampler: {max_batch_length: 100}'?"),
        ("--resume", "docs/hparams.md lists the keys."),
        ("--batch_size 8", "docs/hparams.md lists the keys."),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_option_of_any_kind(given, hint):
    argv, paths = take_paths([str(CONFORMER), "--data_folder", "x", *given.split()])
    with pytest.raises(UserError, match=re.escape(hint)):
        choose_setting(*sb.parse_arguments(argv), paths, None, None)


PARAMETERS = {
    "hyperconformer": 7_924_832,  # as published by SpeechBrain for hyperconformer_8M
    "hyperconformer_streaming": 7_924_832,
    "hyperconformer_22m": 21_702_064,  # hyperconformer_22M
    "conformer": 8_689_472,  # the sum of SpeechBrain's own modules of these sizes
    "conformer_small": 13_327_296,  # conformer_small
}


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_the_model_has_the_published_size(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hparams = load_hparams(path)
    count = sum(parameter.numel() for parameter in hparams["model"].parameters())
    assert count == sum(parameter.numel() for module in hparams["modules"].values() for parameter in module.parameters())
    if path.stem in PARAMETERS:
        assert count == PARAMETERS[path.stem]
    stated = re.search(rf"{path.name} .* ([\d,]+)$", path.read_text(), re.MULTILINE)
    if stated:
        assert count == int(stated[1].replace(",", ""))


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_every_key_is_read(path):
    mini = merge_hparams([path, MINI])
    text = merge_hparams(path) + mini
    places = [ROOT / "train.py"]
    for room in ("brains", "training", "dataio", "model_folder"):
        places += (ROOT / "speechbrain_ext" / room).glob("*.py")
    code = "\n".join(place.read_text() for place in places)
    for key in YAML().load(mini):
        patterns = (rf"!ref <{key}\b", rf"!ref .*<{key}\b")
        is_read = any(re.search(pattern, text + code) for pattern in patterns)
        is_read |= re.search(rf"""["']{key}["']|hparams\.{key}\b|modules\.{key}\b""", code) is not None
        assert is_read or key in RunOptions().as_dict() or key.startswith("__"), f"nothing reads the key '{key}'"


def test_the_mini_overrides_name_keys_that_exist():
    known = YAML().load(merge_hparams(CONFORMER))
    for key, value in YAML().load(MINI.read_text()).items():
        assert key in known
        if isinstance(value, dict) and isinstance(known[key], dict) and known[key].tag.value is None:
            assert value.keys() <= known[key].keys()
