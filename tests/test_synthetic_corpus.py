"""The embedded mini corpus: layout, disjoint splits, determinism, caching and errors."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
import soundfile

from recipes.Synthetic import prepare as mini_corpus
from recipes.Synthetic.prepare import TIMBRES, UTTERANCES, build_mini_corpus, draw_speakers, generate_sentences

SMALL = {"train-mini": 4, "dev-mini": 2, "test-mini": 2}
ROOT = Path(mini_corpus.__file__).parents[2]


def contents(corpus):
    """Maps every file of a corpus to its bytes."""
    return {str(path.relative_to(corpus)): path.read_bytes() for path in corpus.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache):
    return build_mini_corpus(cache, utterances=SMALL)


def test_librispeech_layout(corpus):
    audio = sorted(corpus.rglob("*.flac"))
    transcripts = {}
    for path in corpus.rglob("*.trans.txt"):
        for line in path.read_text().splitlines():
            key, text = line.split(" ", 1)
            transcripts[key] = text
            assert re.fullmatch(r"[A-Z]+( [A-Z]+){2,7}", text)
    assert {path.stem for path in audio} == set(transcripts)
    for path in audio:
        split, speaker, chapter = path.relative_to(corpus).parts[:3]
        assert split in SMALL and path.name.startswith(f"{speaker}-{chapter}-")
    assert {split: len(list((corpus / split).rglob("*.flac"))) for split in SMALL} == SMALL
    assert sorted(path.name for path in corpus.iterdir()) == [".completed", *sorted(SMALL)]


def test_audio(corpus):
    for path in corpus.rglob("*.flac"):
        samples, rate = soundfile.read(path)
        assert rate == 16000 and samples.ndim == 1
        assert 0.5 < len(samples) / rate < 8
        assert -45 < 20 * np.log10(samples.std()) < -15 and np.abs(samples).max() < 1


def test_the_task_stays_a_real_one():
    speakers = draw_speakers(seed=1986, utterances=UTTERANCES)
    texts = {split: [t for s in speakers if s.split == split for t in s.sentences] for split in TIMBRES}
    everything = [text for split in texts.values() for text in split]
    assert {split: len(t) for split, t in texts.items()} == UTTERANCES
    assert len(set(everything)) == len(everything), "a sentence is used twice"
    vocabulary = {split: {word for text in t for word in text.split()} for split, t in texts.items()}
    assert len(vocabulary["train-mini"]) >= 60
    assert vocabulary["dev-mini"] | vocabulary["test-mini"] <= vocabulary["train-mini"]
    timbres = {s.timbre for s in speakers}
    assert len({(s.split, s.timbre) for s in speakers}) == len(timbres) >= 20, "a timbre in two splits"
    assert len({speaker.id for speaker in speakers}) == len(speakers)
    assert {len(text.split()) for text in everything} == set(range(3, 9))


def test_sentences_differ_and_repeat_by_seed():
    def first(seed):
        generator = generate_sentences(np.random.default_rng(seed))
        return [next(generator) for _ in range(200)]

    assert first(1) == first(1) != first(2)
    assert len(set(first(1))) == 200


def test_same_bytes_in_another_process(corpus, tmp_path):
    code = f"from recipes.Synthetic.prepare import build_mini_corpus; build_mini_corpus(utterances={SMALL})"
    # One worker here, several in the fixture: a voice must not depend on earlier voices of its process.
    environment = os.environ | {"SPEECHBRAIN_EXT_CACHE": str(tmp_path), "SB_NUM_PROC": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert contents(tmp_path / corpus.name) == contents(corpus)


def test_finished_corpus_is_reused(cache, corpus, monkeypatch):
    monkeypatch.setattr(mini_corpus, "parallel_map", lambda *args, **kwargs: pytest.fail("built again"))
    assert build_mini_corpus(cache, utterances=SMALL) == corpus


def test_interrupted_build_is_rebuilt(tmp_path, corpus, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mini_corpus, "parallel_map", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_mini_corpus(tmp_path, utterances=SMALL)
    assert list(tmp_path.iterdir()) == []

    (tmp_path / corpus.name / "train-mini").mkdir(parents=True)  # half a corpus, without the marker
    assert contents(build_mini_corpus(tmp_path, utterances=SMALL)) == contents(corpus)


def test_settings_have_folders_of_their_own(cache, corpus, monkeypatch):
    tiny = {"test-mini": 1}
    other = [build_mini_corpus(cache, utterances=tiny), build_mini_corpus(cache, seed=7, utterances=tiny)]
    assert len({corpus, *other}) == 3
    assert contents(other[0]) != contents(other[1])


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SPEECHBRAIN_EXT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert mini_corpus.default_cache_folder() == tmp_path / "speechbrain_ext"
    monkeypatch.setenv("SPEECHBRAIN_EXT_CACHE", str(tmp_path / "own"))
    assert mini_corpus.default_cache_folder() == tmp_path / "own"


def test_missing_package_is_named(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(mini_corpus.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[recipes\]'"):
        build_mini_corpus(tmp_path)


@pytest.mark.parametrize("utterances", [{"train-clean-100": 3}, {"dev-mini": -1}])
def test_wrong_counts_are_refused(utterances, tmp_path):
    with pytest.raises(ValueError, match="train-mini, dev-mini, test-mini"):
        build_mini_corpus(tmp_path, utterances=utterances)


def test_unknown_language_is_refused():
    with pytest.raises(RuntimeError, match="no voice 'xx[+]m3'"):
        mini_corpus.Synthesiser("xx+m3", rate=160, pitch=50, pitch_range=50, seed=1)


def test_timbres_exist():
    # eSpeak ignores an unknown variant; a misspelt one would repeat another voice.
    variants = {path.name for path in Path(espeakng_loader.get_data_path(), "voices", "!v").iterdir()}
    assert {timbre for timbres in TIMBRES.values() for timbre in timbres} <= variants
