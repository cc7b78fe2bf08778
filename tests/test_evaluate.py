"""Error rates of trained models: figures, intervals, and the command."""

import csv
import math
import os
import shutil
import time

import numpy as np
import pytest
import soundfile
from speechbrain.utils.edit_distance import accumulatable_wer_stats
from speechbrain.utils.metric_stats import ErrorRateStats
from tiny import SENTENCES, SMALL_TRANSDUCER, make_corpus, make_model, needs_flashlight

from speechbrain_ext import cli
from speechbrain_ext.dataio.manifests import read_entries, select
from speechbrain_ext.dataio.preparation import check_utterances
from speechbrain_ext.decoders.ngram import write_arpa
from speechbrain_ext.inference import evaluate as evaluation
from speechbrain_ext.inference import load_model
from speechbrain_ext.training.results import FIELDS
from speechbrain_ext.utils.error_rates import bootstrap_interval, error_figures
from speechbrain_ext.utils.errors import UserError


def test_a_set_without_words_has_no_error_rate():
    error_rate = ErrorRateStats()
    with pytest.raises(UserError, match="There are no utterances to compare"):
        error_figures(error_rate)
    error_rate.append(["a"], [["X"]], [[]])
    figures = error_figures(error_rate)
    assert math.isnan(figures["WER"]) and (figures["insertions"], figures["words"]) == (1, 0)


def test_the_interval_is_that_of_the_normal_approximation():
    """For many utterances, a ratio of means has the standard error of the linearised ratio."""
    generator = np.random.default_rng(0)
    words = generator.integers(1, 40, 2620)
    errors = generator.binomial(words, generator.uniform(0, 0.2, 2620))
    began = time.perf_counter()
    low, high = bootstrap_interval(errors, words)
    assert time.perf_counter() - began < 20
    rate = errors.sum() / words.sum()
    deviation = np.std(errors - rate * words) / words.mean() / math.sqrt(len(words))
    assert low == pytest.approx(100 * (rate - 1.96 * deviation), abs=0.03)
    assert high == pytest.approx(100 * (rate + 1.96 * deviation), abs=0.03)
    assert (low, high) == bootstrap_interval(list(errors), list(words)) != bootstrap_interval(errors, words, seed=1)
    wider = bootstrap_interval(errors, words, level=0.99)
    assert wider[0] < low and high < wider[1]


def test_intervals_of_few_utterances():
    assert bootstrap_interval([2], [10]) == (20, 20) and bootstrap_interval([0, 0], [5, 3]) == (0, 0)
    assert all(map(math.isnan, bootstrap_interval([1], [0]))) and all(map(math.isnan, bootstrap_interval([], [])))
    for given in (([1, 2], [4]), ([1], [4], 95), ([1], [4], 0.95, 0)):
        with pytest.raises(UserError, match="; give"):
            bootstrap_interval(*given)
    low, high = bootstrap_interval([1, 0, 3], [0, 0, 4])  # samples of only empty references have no rate
    assert 0 <= low < high


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make_corpus(folder / "corpus")
    for decoder_layers, name, hparams in ((0, "ctc", {}), (1, "joint", {}), (0, "transducer", SMALL_TRANSDUCER)):
        (folder / name).mkdir()
        make_model(folder / name, decoder_layers, "hyperconformer" + "_transducer" * bool(hparams), **hparams)
    write_arpa([text.split() for text in SENTENCES[:4]], folder / "lm.arpa", order=2)
    return folder


def rows_of(path):
    return check_utterances("test", select("test", read_entries(path)[0], "none")[0])[0]


@pytest.mark.parametrize(
    "name, searches", [("ctc", ["ctc_greedy"]), ("joint", ["joint_beam"]), ("transducer", ["transducer_beam"])]
)
@pytest.mark.parametrize("batch_seconds", [120, 0.1])
def test_the_texts_are_those_of_transcribe(folder, monkeypatch, name, searches, batch_seconds):
    monkeypatch.setattr(evaluation, "BATCH_SECONDS", batch_seconds)
    model, rows = load_model(folder / name / "model", "cpu"), rows_of(folder / "corpus" / "train-tiny")
    assert len(rows) == 12
    error_rates, seconds = evaluation.evaluate(model, rows, evaluation.make_searches(model))
    assert list(error_rates) == list(seconds) == searches and all(value > 0 for value in seconds.values())
    texts = model.transcribe_files([row.wav for row in rows])
    expected = accumulatable_wer_stats([row.wrd.split() for row in rows], [text.split() for text in texts])
    found = error_rates[searches[0]].summarize()
    assert {key: found[key] for key in ("insertions", "deletions", "substitutions")} == {
        key: expected[key] for key in ("insertions", "deletions", "substitutions")
    }
    assert found["num_scored_tokens"] == sum(len(row.wrd.split()) for row in rows)


def test_segments_and_long_utterances(folder, tmp_path, monkeypatch):
    """Segments of a recording are read separately; long utterances are processed in windows, as in transcribe."""
    source = rows_of(folder / "corpus" / "test-tiny")
    pieces = [soundfile.read(row.wav)[0] for row in source]
    soundfile.write(tmp_path / "all.wav", np.concatenate(pieces), 16000, subtype="DOUBLE")
    middle, end = len(pieces[0]), sum(map(len, pieces))
    (tmp_path / "cut.csv").write_text(
        f"ID,wav,start,stop,wrd\na,all.wav,0,{middle},{source[0].wrd}\nb,all.wav,{middle},{end},{source[1].wrd}\n"
    )
    model = load_model(folder / "joint" / "model", "cpu")
    searches = evaluation.make_searches(model, ["ctc_greedy", "ctc_beam", "joint_beam"], beam_size=5)
    whole, cut = (evaluation.evaluate(model, rows, searches)[0] for rows in (source, rows_of(tmp_path / "cut.csv")))
    monkeypatch.setattr(evaluation, "LONG_SECONDS", 0.5)
    monkeypatch.setattr(evaluation, "BATCH_SECONDS", 0.5)
    long, _ = evaluation.evaluate(model, source, searches)
    for name in searches:
        assert [score["num_edits"] for score in cut[name].scores] == [score["num_edits"] for score in whole[name].scores]
        assert long[name].summarize() == whole[name].summarize()


@pytest.mark.parametrize(
    "name, names, beam, message",
    [
        ("ctc", ["joint_beam"], {}, "no search joint_beam; it has ctc_greedy, ctc_beam"),
        ("ctc", [["ctc_beam"]], {}, r"no search \['ctc_beam'\]; it has ctc_greedy"),
        ("joint", ["greedy"], {}, "no search greedy; it has ctc_greedy, ctc_beam, joint_beam"),
        ("ctc", ["ctc_beam"], {"beam_size": 0}, "The beam size is 0"),
        ("ctc", ["ctc_greedy"], {"beam_size": 4}, "The beam size is 4, but the model uses ctc_greedy"),
    ],
)
def test_searches_that_a_model_does_not_have(folder, name, names, beam, message):
    with pytest.raises(UserError, match=message):
        evaluation.make_searches(load_model(folder / name / "model", "cpu"), names, **beam)


def run(capsys, folder, *arguments, model="ctc"):
    try:
        status = cli.main(["evaluate", "--model", str(folder / model / "model"), "--device", "cpu", *map(str, arguments)])
    except SystemExit as end:  # argparse
        status = end.code
    return status, *capsys.readouterr()


def test_the_command_prints_figures_and_adds_rows(folder, tmp_path, capsys):
    needs_flashlight()
    table, corpus = tmp_path / "rows.csv", folder / "corpus"
    sets = corpus / "test-tiny", f"other={corpus / 'dev-tiny'}"
    given = "--lm", folder / "lm.arpa", "--lm-weight", 0.7, "--output", table, "--threads", 1
    status, out, err = run(capsys, folder, *sets, *given)
    assert status == 0 and "Traceback" not in err
    lines = out.splitlines()
    ends = ["test-tiny ctc_greedy", "test-tiny ctc_beam", "other ctc_greedy", "other ctc_beam"]
    assert [line.split(":")[0] for line in lines] == ends
    assert "95 % interval" in lines[0] and "real-time factor" in lines[0] and "unknown" not in lines[0]
    assert f"% of the words unknown to {folder}/lm.arpa" in lines[1]
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0])[: len(FIELDS)] == FIELDS
    assert (
        rows[0]["architecture"] == "hyperconformer"
        and rows[0]["hardware"].endswith(", 1 thread")
        and rows[0]["utterances"] == "2"
    )
    assert float(rows[0]["WER_low"]) <= float(rows[0]["WER"]) <= float(rows[0]["WER_high"]) and rows[0]["lm"] == ""
    assert rows[1]["lm"] == str(folder / "lm.arpa") and rows[1]["lm_weight"] == "0.7"
    assert float(rows[1]["lm_unknown"]) == 0 and float(rows[1]["real_time_factor"]) > 0
    run(capsys, folder, corpus / "test-tiny", "--output", table, model="joint")
    assert table.read_text().count("joint_beam") == 1


def test_a_few_transcripts_with_punctuation_are_told(folder, tmp_path, capsys):
    rows = rows_of(folder / "corpus" / "test-tiny") + rows_of(folder / "corpus" / "dev-tiny")
    plain, marked = tmp_path / "plain.csv", tmp_path / "marked.csv"
    for path, mark in ((plain, ""), (marked, ".")):
        lines = [f"{row.ID},{row.wav},{row.wrd}{mark if row is rows[0] else ''}\n" for row in rows]
        path.write_text("ID,wav,wrd\n" + "".join(lines))
    (_, expected, silent), (_, _, told), (_, without, quiet) = (
        run(capsys, folder, *given) for given in ((plain,), (marked,), (f"plain={marked}", "--words-only"))
    )
    assert without.split(", real-time")[0] == expected.split(", real-time")[0]
    assert "1 or more transcripts" in told and "(.), which count as errors; leave out punctuation with --words-only" in told
    assert "does not write" not in silent + quiet


def test_what_cannot_be_read_is_named_and_left_out(folder, tmp_path, capsys):
    shutil.copytree(folder / "corpus" / "train-tiny", tmp_path / "broken")
    first, second, *_ = sorted(tmp_path.rglob("*.flac"))
    first.write_text("no audio")
    second.unlink()
    status, out, err = run(capsys, folder, tmp_path / "broken")
    assert status == 1 and out.startswith("broken ctc_greedy: WER") and "Traceback" not in err
    assert f"{first.stem} is left out: " in err and f"{second.stem} is left out: transcript without audio" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gone.csv"], "There is no manifest"),
        (["lower.csv"], "that the model does not write (a c e h t); give the case of its training transcripts as"),
        (
            ["both.csv"],
            "give the case of its training transcripts as --text-normalization upper or lower, and leave out punctuation",
        ),
        (["marks.csv"], "that the model does not write (,); leave out punctuation with --words-only"),
        (["digits.csv"], "that the model does not write (7); write numbers as words"),
        (["bad.csv"], "no utterance that can be used (missing"),
        (["a=lower.csv", "a=bad.csv"], "has no name, or the name of another one"),
        (["lower.csv", "--text-normalization", "title"], "text_normalization is 'title'"),
        (["lower.csv", "--lm", "gone.arpa"], "There is no language model gone.arpa"),
        (["lower.csv", "--search", "joint_beam"], "no search joint_beam"),
        (["lower.csv", "--beam-size", "4"], "uses ctc_greedy, which has no beam; choose ctc_beam"),
        (["lower.csv", "--threads", "0"], "--threads is 0"),
        (["lower.csv", "--output", "lower.csv/rows.csv"], "lower.csv/rows.csv cannot be used"),
        (["lower.csv", "--output", "notes.txt"], "notes.txt is not a results table, because it has no column WER"),
        (["lower.csv", "--output", ""], "The results table has no name"),
        (["lower.csv", "--output", "pipe"], "pipe is a pipe or device, not a file"),
        (["gone.csv", "--output", "new.csv"], "There is no manifest"),
        ([], "MANIFEST"),
    ],
)
def test_wrong_usage(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    wav = rows_of(folder / "corpus" / "test-tiny")[0].wav
    (tmp_path / "lower.csv").write_text(f"ID,wav,wrd\na,{wav},the cat\n")
    (tmp_path / "both.csv").write_text(f"ID,wav,wrd\na,{wav},the cat.\n")
    (tmp_path / "marks.csv").write_text(f'ID,wav,wrd\na,{wav},"THE, CAT"\n')
    (tmp_path / "digits.csv").write_text(f"ID,wav,wrd\na,{wav},7 CATS\n")
    (tmp_path / "bad.csv").write_text("ID,wav,wrd\na,gone.wav,THE CAT\n")
    (tmp_path / "notes.txt").write_text("One line, two parts\nand another\n")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, folder, *arguments)
    assert status == 2 and out == "" and message in err and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "notes.txt").read_text().count("\n") == 2
