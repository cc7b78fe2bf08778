"""The benchmark has every registered encoder, keeps its rows, and compares equal models."""

import csv
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

from speechbrain_ext import cli
from speechbrain_ext.bench import models, report
from speechbrain_ext.bench.graphs import StaticStream
from speechbrain_ext.bench.models import PEERS, Dimensions, EqualityError, Model
from speechbrain_ext.bench.run import FIELDS, INPUTS, PRECISIONS, QUICK, Cell, Settings, cells, run
from speechbrain_ext.registry import build_encoder, encoder_sizes, list_encoders
from speechbrain_ext.utils import measure
from speechbrain_ext.utils.files import read_csv, write_csv

TINY = {"d_model": 16, "nhead": 2, "num_layers": 1, "d_ffn": 32, "kernel_size": 3}
SHORT = QUICK | TINY | {"counted": (2,), "seconds": (2,), "train_seconds": 2, "stream_seconds": (2,), "rounds": 2}


@pytest.fixture(autouse=True)
def fast_gemm(monkeypatch):
    monkeypatch.setattr(measure, "gemm_rate", lambda *keys: 10.0)


def arguments(path, *more):
    keys = [text for key, value in TINY.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    return ["bench", "--quick", "--output", str(path), "--equal-only", *keys, *more]


def test_every_registered_encoder_and_size_is_there(tmp_path, monkeypatch):
    for name in list_encoders():  # the published sizes take a second each
        if encoder_sizes(name):
            smallest = {
                key: value for key, value in models.get_encoder(name).sizes.items() if key == next(iter(encoder_sizes(name)))
            }
            monkeypatch.setattr(models.get_encoder(name), "sizes", smallest)
    table = run(Settings(**SHORT | {"parts": ("size",), "inputs": ("encoder",), "peers": ()}), tmp_path / "a.csv")
    found = {(row["encoder"], row["size"]) for row in table.rows}
    expected = {(name, "equal") for name in list_encoders()}
    assert found == expected | {(name, size) for name in list_encoders() for size in encoder_sizes(name)}
    assert all(int(row["parameters"]) > 0 and float(row["gmacs"]) > 0 for row in table.rows)


def test_all_parts_for_two_encoders_and_a_peer(tmp_path):
    chosen = {"encoders": ("hyperconformer", "fusionformer"), "peers": ("speechbrain_hyperconformer",), "own_sizes": False}
    chosen |= {"forms": ("plain", "fused", "int8"), "inputs": ("front end",)}
    table = run(Settings(**SHORT | chosen), tmp_path / "a.csv")
    rows = [row for row in table.rows if row["size"] == "equal"]
    assert not [row["note"] for row in rows if row["note"].startswith(("failed", "cannot", "left out"))]
    names = {"conformer", "hyperconformer", "fusionformer", "speechbrain_hyperconformer"}
    for task in ("size", "inference", "training", "streaming"):
        assert {row["encoder"] for row in rows if row["task"] == task} == names
    timed = [row for row in rows if row["ms"]]
    assert all(float(row["ms_lower"]) <= float(row["ms"]) <= float(row["ms_upper"]) for row in timed)
    assert all(float(row["speedup"]) > 0 and float(row["peak_mib"]) > 0 for row in timed)
    assert {row["speedup"] for row in timed if (row["encoder"], row["form"]) == ("conformer", "plain")} == {"1.0"}
    assert {row["encoder"] for row in rows if row["form"] == "fused"} == {"fusionformer"}
    assert {row["encoder"] for row in rows if row["form"] == "int8"} == names
    assert all("% of the parameters (torch.ao" in row["note"] for row in rows if row["form"] == "int8")
    (peer,) = {row["note"] for row in rows if (row["task"], row["encoder"]) == ("streaming", "speechbrain_hyperconformer")}
    assert peer == "SpeechBrain does not stream it"
    assert all("largest difference" in row["note"] for row in timed if row["encoder"] == "speechbrain_hyperconformer")
    states = {row["encoder"]: int(row["state_bytes"]) for row in rows if row["task"] == "streaming" and row["state_bytes"]}
    assert states["hyperconformer"] > 0
    text = report.write(tmp_path / "a.csv")
    assert text.count("| hyperconformer |") == 5 and (tmp_path / "a.md").read_text() == text + "\n"


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(tmp_path, monkeypatch, capsys):
    command = arguments(tmp_path / "a.csv", "--parts", "inference", "--inputs", "encoder", "--seconds", "1", "2", "--encoders")
    real, done = measure.alternate, []

    def stops(calls, rounds, **keys):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(sorted(pair[0].name for pair in calls))
        return real(calls, rounds, **keys)

    monkeypatch.setattr(measure, "alternate", stops)
    assert cli.main([*command, "hyperconformer", "--peers"]) == 130
    first = read_csv(tmp_path / "a.csv")
    assert {(row["encoder"], row["seconds"]) for row in first} == {("conformer", "1"), ("hyperconformer", "1")}
    done.append("went on")
    assert cli.main([*command, "hyperconformer", "--peers"]) == 0
    second = read_csv(tmp_path / "a.csv")
    assert second[:2] == first and len(second) == 4
    before = len(done)
    assert cli.main([*command, "hyperconformer", "--peers"]) == 0
    assert len(done) == before and read_csv(tmp_path / "a.csv") == second
    assert cli.main([*command, "practical_conformer", "--peers"]) == 0  # with the baseline, whose rows stay
    assert done[before:] == [["conformer", "practical_conformer"]] * 2
    third = read_csv(tmp_path / "a.csv")
    assert third[:4] == second and len(third) == 6
    capsys.readouterr()
    assert cli.main([*command, "hyperconformer", "--peers", "--report"]) == 0
    out = capsys.readouterr().out
    assert "| practical_conformer |" in out and "16 x 1, 2 heads, ffn 32, kernel 3" in out
    assert (tmp_path / "a_cost.png").stat().st_size > 1000


@torch.no_grad()
def test_different_outputs_stop_the_run(tmp_path, monkeypatch, capsys):
    ours, theirs = (Model(build_encoder("conformer", **TINY)) for _ in range(2))
    with pytest.raises(EqualityError, match="differ by"):
        models.assert_equal(ours, theirs, 16)
    assert models.assert_equal(ours, ours, 16) == 0
    real = models.convert_speechbrain
    monkeypatch.setattr(models, "convert_speechbrain", lambda *keys: {k: 1.5 * v for k, v in real(*keys).items()})
    assert cli.main(arguments(tmp_path / "a.csv", "--peers", "speechbrain_conformer_rope", "--encoders", "conformer")) == 1
    assert "outputs differ by" in capsys.readouterr().err and not (tmp_path / "a.csv").exists()


def test_a_model_that_fails_leaves_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models.TorchaudioModel, "forward", lambda self, x, mask=None: x @ x)
    settings = Settings(
        **SHORT | {"encoders": ("conformer",), "peers": ("torchaudio_conformer",), "parts": ("size", "inference")}
    )
    rows = run(settings, tmp_path / "a.csv").rows
    notes = {row["note"] for row in rows if row["encoder"] == "torchaudio_conformer"}
    assert len(notes) == 1 and notes.pop().startswith("failed: ")
    assert all(row["ms"] or row["gmacs"] for row in rows if row["encoder"] == "conformer")
    text = report.write(tmp_path / "a.csv")
    assert re.search(r"Without figures:\n\n\* torchaudio_conformer \(size, .*; batch 1, 2 s\): failed: ", text)
    command = arguments(tmp_path / "b.csv", "--parts", "size", "--encoders", "conformer", "--peers", "torchaudio_conformer")
    capsys.readouterr()
    assert cli.main(command) == 1 and "1 rows of" in capsys.readouterr().err
    assert cli.main(command) == 0  # nothing is left to measure
    monkeypatch.undo()
    monkeypatch.setattr(measure, "gemm_rate", lambda *keys: 10.0)
    assert run(settings, tmp_path / "a.csv").rows == rows  # failed rows are not measured again
    again = run(replace(settings, retry=True, parts=("size",)), tmp_path / "a.csv").rows  # except with retry
    assert len(again) == len(rows)
    assert {(row["task"], bool(row["ms"] or row["gmacs"])) for row in again if "torchaudio" in row["encoder"]} == {
        ("size", True),
        ("inference", False),
    }


def test_a_peer_that_cannot_be_compared_leaves_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(models.SpeechBrainModel, "forward", lambda self, x, mask=None: x @ x)
    chosen = {"encoders": ("hyperconformer",), "peers": ("speechbrain_hyperconformer",), "parts": ("inference",)}
    rows = run(Settings(**SHORT | chosen), tmp_path / "a.csv").rows
    assert {(row["encoder"], bool(row["ms"])) for row in rows} == {
        ("conformer", True),
        ("hyperconformer", True),
        ("speechbrain_hyperconformer", False),
    }


def test_what_cannot_be_counted_has_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "count_macs", lambda net, x: 1 / 0)
    chosen = {"encoders": ("conformer",), "peers": (), "parts": ("inference",)}
    rows = run(Settings(**SHORT | chosen), tmp_path / "a.csv").rows
    assert rows and all(row["ms"] and not row["gemm_share"] for row in rows)
    assert "| conformer | 0.0" in report.write(tmp_path / "a.csv")


def test_calls_that_fail_later_are_left_out():
    failed, count = {}, iter(range(10))
    times = measure.alternate({"a": lambda: None, "b": lambda: 1 / (2 - next(count))}, rounds=3, failed=failed)
    assert list(times) == ["a"] and len(times["a"]) == 3 and isinstance(failed["b"], ZeroDivisionError)


@pytest.mark.parametrize("name", list_encoders())
@torch.no_grad()
def test_int8_rounds_all_our_linear_layers_and_little_else(name):
    torch.manual_seed(0)
    model = Model(build_encoder(name, d_model=32, nhead=4, num_layers=4, d_ffn=64)).eval()
    rounded = models.in_int8(models.folded(model) or model)
    assert not [part for part in rounded.modules() if isinstance(part, torch.nn.Linear)]
    x = torch.randn(2, 40, 32)
    expected = model(x)
    assert 0 < (rounded(x) - expected).norm() / expected.norm() < 0.1


def test_what_cannot_be_built_leaves_a_note(tmp_path, monkeypatch):
    chosen = {
        "encoders": ("conformer", "fusionformer"),
        "peers": ("speechbrain_conformer_rope",),
        "parts": ("inference",),
        "d_model": 18,
        "nhead": 6,
    }
    for _ in range(2):
        rows = run(Settings(**SHORT | chosen), tmp_path / "a.csv").rows
        assert {(row["encoder"], row["form"], bool(row["ms"])) for row in rows} == {
            ("conformer", "plain", True),
            ("conformer, RoPEMHA", "plain", False),
            ("speechbrain_conformer_rope", "plain", False),
            ("fusionformer", "plain", False),
            ("fusionformer", "fused", False),
        }
        assert all("even head size" in row["note"] for row in rows if row["encoder"] == "fusionformer")
        monkeypatch.setattr("speechbrain_ext.bench.run.build", None)  # nothing is missing


@pytest.mark.parametrize("budget, free, message", [(1e-6, 1e9, "one call would take"), (100.0, 1e-3, "MiB are free")])
def test_what_would_take_too_much_is_left_out(tmp_path, monkeypatch, budget, free, message):
    monkeypatch.setattr(measure, "available_memory", lambda device: free)
    chosen = {"encoders": ("conformer",), "peers": (), "parts": ("inference",), "seconds": (100,), "budget": budget}
    rows = run(Settings(**SHORT | chosen), tmp_path / "a.csv").rows
    assert rows and all(message in row["note"] and not row["ms"] for row in rows)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--encoders", "hyperconfomer"], "--encoders is 'hyperconfomer'; the known ones are: "),
        (["--peers", "wenet"], "--peers is 'wenet'; the known ones are: speechbrain_conformer"),
        (["--parts", "speed"], "--parts is 'speed'"),
        (["--precision", "int4"], "--precision is 'int4'"),
        (["--d-model", "17"], "--d-model is 17, not a multiple of --nhead 2"),
        (["--d-model", "9", "--nhead", "3"], "an even d_model"),
        (["--kernel-size", "4"], "--kernel-size is 4; give an odd number"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--seconds", "10", "-1"], "--seconds is -1"),
        (["--threads", "-1"], "--threads is -1"),
        (["--budget", "0"], "--budget is 0"),
        (["--left-context", "-2"], "--left-context is -2"),
        (["--padding", "100"], "--padding is 100; give a percentage"),
        (["--graphs"], "--graphs needs a GPU; leave it out, or give --device cuda."),
        (["--precision", "float32", "tf32"], "--precision 'tf32' needs a GPU"),
        (["--device", "abacus"], "--device is 'abacus'; give cpu, cuda"),
        (["--device", "cuda:99"], "--device is 'cuda:99', but PyTorch sees"),
        (["--report"], "There are no results at"),
    ],
)
def test_wrong_usage(capsys, tmp_path, argv, message):
    assert cli.main(arguments(tmp_path / "a.csv", *argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "a,b\n", "no table\n", ""])
def test_a_file_of_something_else_is_refused(capsys, tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    for more in ([], ["--report"]):
        assert cli.main(arguments(tmp_path / "a.csv", *more)) == 2
        assert "has the columns of another kind of file" in capsys.readouterr().err
    assert (tmp_path / "a.csv").read_text() == text


def test_figures_of_another_machine_are_not_mixed_with_these(capsys, tmp_path, monkeypatch):
    command = arguments(tmp_path / "a.csv", "--encoders", "conformer", "--peers", "--parts", "size")
    assert cli.main(command) == 0
    before = (tmp_path / "a.csv").read_text()
    capsys.readouterr()
    assert cli.main([*command, "--threads", "7"]) == 2
    assert "figures with threads '" in capsys.readouterr().err
    monkeypatch.setattr("speechbrain_ext.bench.run._device_name", lambda settings: "Abacus")
    capsys.readouterr()
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert "these have 'Abacus'; give another --output" in err and len(err.splitlines()) == 1
    assert (tmp_path / "a.csv").read_text() == before


def test_peers_have_our_parameters():
    """Equal work: counterparts have equal numbers of parameters, and so have the front ends."""
    group = models.groups(list_encoders(), list(PEERS), Dimensions(**TINY), own_sizes=False)[0]
    built, errors, found = models.build(group, Dimensions(**TINY), 5000)
    assert not errors and len(found) == 3
    sizes = {candidate.name: sum(parameter.numel() for parameter in model.parameters()) for candidate, model in built.items()}
    for candidate in group:
        if candidate.twin:
            assert sizes[candidate.name] == sizes[candidate.twin]
    fronts = (models.our_front_end(), models.speechbrain_front_end())
    assert len({sum(parameter.numel() for parameter in front.parameters()) for front in fronts}) == 1
    x = torch.rand(1, 4000, 16)  # more than SpeechBrain's 3,000 positions
    assert {model(x).shape for candidate, model in built.items() if "hyper" in candidate.name} == {x.shape}


@pytest.mark.parametrize("times", [[5.01, 5.02], [5.0], [0.3, 70.0]])
def test_plot_of_cost(tmp_path, times):
    row = {"task": "inference", "encoder": "conformer", "size": "equal", "dims": "some", "form": "plain", "source": "here"}
    row |= {"batch": "1", "input": "encoder", "precision": "float32", "mode": "eager"}
    rows = [row | {"ms": str(1000 * ms), "seconds": str(5 * 2**i)} for i, ms in enumerate(times)]
    assert report.plot_cost(rows, tmp_path / "a.png") and (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler (g++)")
def test_compiled(tmp_path):
    chosen = {"encoders": ("conformer",), "peers": (), "parts": ("inference",), "compiled": True, "forms": ("plain",)}
    rows = run(Settings(**SHORT | chosen), tmp_path / "a.csv").rows
    assert {(row["mode"], bool(row["ms"])) for row in rows} == {("eager", True), ("compiled", True)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    chosen = {"encoders": ("hyperconformer",), "peers": ("speechbrain_hyperconformer",), "device": "cuda", "seconds": (2, 60)}
    chosen |= {"precision": PRECISIONS, "inputs": INPUTS, "batch": (1, 2), "graphs": True}
    rows = run(Settings(**SHORT | chosen), tmp_path / "a.csv").rows
    assert {row["device"] for row in rows} == {"cuda"} and not any(row["note"].startswith("failed") for row in rows)
    assert {row["precision"] for row in rows if row["task"] == "training" and row["ms"]} == set(PRECISIONS)
    assert any(row["ms"] for row in rows if row["mode"] == "graph") and all(", host " in row["machine"] for row in rows)


def test_plot_of_error_rates_against_cost(tmp_path):
    dims = Dimensions(**TINY)
    row = {"task": "inference", "encoder": "conformer", "dims": str(dims), "form": "plain", "ms": "5", "seconds": "10"}
    row |= {"batch": "1", "input": "encoder", "precision": "float32", "mode": "eager"}
    with open(tmp_path / "wer.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["architecture", "train_set", "test_set", "search", "WER"])
        writer.writerow(["conformer", "mini", "test-mini", "ctc_greedy", "2.9"])
    wers = report.read_wers(tmp_path / "wer.csv", dims)
    assert report.plot_wer([row], wers, tmp_path / "a.png") and (tmp_path / "a.png").exists()
    assert not report.plot_wer([row | {"dims": "other"}], wers, tmp_path / "b.png")


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch, capsys):
    command = arguments(tmp_path / "a.csv", "--encoders", "conformer", "--peers", "--parts", "inference", "--seconds", "1")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "Plots need the package matplotlib" in err and "| conformer |" in out and "Traceback" not in err


def test_cells_of_the_full_run():
    everything = list(cells(Settings(compiled=True)))
    assert len(everything) == len(set(everything))
    assert Cell("inference", "front end", "bfloat16", "compiled", 8, 160, padding=10) in everything
    assert Cell("training", "audio", "bfloat16", "eager", 8, 10, padding=10) in everything
    assert {cell.padding for cell in everything if cell.batch == 1} == {0}
    assert {cell.seconds for cell in everything if cell.task == "streaming"} == {60, 600}


def test_half_precision_batches_and_unlimited_streams(tmp_path):
    chosen = {"encoders": ("conformer",), "peers": (), "precision": ("bfloat16", "float16"), "batch": (2,), "left_context": (-1,)}
    rows = run(Settings(**SHORT | chosen | {"parts": ("inference", "training", "streaming")}), tmp_path / "a.csv").rows
    assert len(rows) == 5 and all(row["ms"] and not row["note"] for row in rows)


def test_from_audio_on(tmp_path):
    chosen = {"encoders": ("fusionformer",), "peers": ("speechbrain_conformer",), "inputs": ("audio",), "batch": (1, 3)}
    chosen |= {"seconds": (1,), "train_seconds": 1, "own_sizes": False}
    rows = run(Settings(**SHORT | chosen), tmp_path / "a.csv").rows
    assert {row["task"] for row in rows} == {"inference", "training", "streaming"}  # there are no sizes from audio
    assert all(row["ms"] and not row["note"].startswith("failed") for row in rows if row["input"] == "audio")
    (row,) = (row for row in rows if (row["encoder"], row["form"], row["batch"]) == ("fusionformer", "fused", "3"))
    assert float(row["real_time_factor"]) == pytest.approx(float(row["ms"]) / 1e3 / (1 + 0.95 + 0.9), rel=0.01)
    text = report.write(tmp_path / "a.csv")
    assert "to tokens there (greedy CTC), float32, eager, batch 3 padded by up to 10 %" in text
    assert "from audio files, which 4 processes read" in text


def test_streams_as_graphs_have_a_table_of_their_own(tmp_path):
    chosen = {"encoders": ("conformer",), "peers": (), "parts": ("streaming",)}
    (row,) = run(Settings(**SHORT | chosen), tmp_path / "a.csv").rows
    write_csv(tmp_path / "a.csv", FIELDS, [row.values(), (row | {"mode": "graph"}).values()])
    text = report.write(tmp_path / "a.csv")
    assert "10 chunks of left context: ms" in text and "10 chunks of left context, as CUDA graphs: ms" in text


@pytest.mark.parametrize("part", ["encoder", "front end"])
def test_batches_are_padded_and_a_single_utterance_is_not(part, tmp_path, monkeypatch):
    masks = {}
    for kind in (Model, models.SpeechBrainModel, models.TorchaudioModel):

        def forward(self, x, mask=None, real=kind.forward):
            masks.setdefault(type(self).__name__, {})[len(x)] = mask
            return real(self, x, mask)

        monkeypatch.setattr(kind, "forward", forward)
    chosen = {"peers": ("speechbrain_conformer", "torchaudio_conformer"), "inputs": (part,), "batch": (1, 3), "padding": 50}
    run(Settings(**SHORT | chosen | {"encoders": ("conformer",), "parts": ("inference", "training")}), tmp_path / "a.csv")
    assert masks.keys() == {"Model", "SpeechBrainModel", "TorchaudioModel"}
    for by_batch in masks.values():
        assert by_batch[1] is None
        assert [row.sum().item() for row in by_batch[3]] == [0, 12, 25] and by_batch[3].shape == (3, 50)
        assert [row.sum().item() for row in by_batch[2]] == [0, 25]  # of the training step


@pytest.mark.parametrize("left", [None, 2])
@torch.no_grad()
def test_a_stream_in_fixed_memory_gives_the_same(left):
    """A CUDA graph replays such a stream."""
    built, _, _ = models.build(
        models.groups(list_encoders(), list(PEERS), Dimensions(**TINY), own_sizes=False)[0], Dimensions(**TINY), 50
    )
    config, constant = DynChunkTrainConfig(4, left), set()
    for candidate, model in built.items():
        try:
            usual, static = (model.make_context(config) for _ in range(2))
        except models.Unsupported:
            continue
        for chunk in torch.randn(4, 1, 4, 16):
            model.stream(chunk, usual)
            model.stream(chunk, static)
        stream = StaticStream(model, static, chunk)
        places = [tensor.data_ptr() for tensor in stream.state]
        try:
            for chunk in torch.randn(6, 1, 4, 16):
                stream.chunk.copy_(chunk)
                torch.testing.assert_close(stream.step(), model.stream(chunk, usual), atol=1e-6, rtol=0)
                assert model.state_bytes(static) >= model.state_bytes(usual)
            assert [tensor.data_ptr() for tensor in stream.state] == places
            constant.add(candidate.name)
        except models.Unsupported as error:
            assert "its state grows" in str(error)
    streams = {"conformer", "squeezeformer", "fusionformer", "cascade", "speechbrain_conformer"}
    assert {"hyperconformer", "practical_conformer"} | (streams if left else set()) <= constant
    assert left or not streams & constant


def test_readme_block(tmp_path):
    run(Settings(**SHORT | {"encoders": ("conformer",), "peers": (), "parts": ("size",)}), tmp_path / "results" / "box.csv")
    (tmp_path / "results" / "box_cost.png").write_bytes(b"")
    (tmp_path / "README.md").write_text("Before\n<!-- bench:begin -->\nearlier text\n<!-- bench:end -->\nafter\n")
    report.write_readme(tmp_path / "README.md", tmp_path / "results")
    text = (tmp_path / "README.md").read_text()
    assert "earlier text" not in text and "### box" in text and "](results/box_cost.png)" in text and text.endswith("after\n")


@pytest.mark.parametrize("text, message", [(None, "There is no file"), ("# Mine\n", "has no place for the tables")])
def test_a_readme_without_a_place_is_refused_before_the_measurement(text, message, tmp_path, capsys):
    if text:
        (tmp_path / "README.md").write_text(text)
    assert cli.main(["bench", "--readme", str(tmp_path / "README.md"), "--output", str(tmp_path / "rows.csv")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "rows.csv").exists()
