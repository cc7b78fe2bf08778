"""Whole training runs at a tiny size, started as by a user."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ruamel.yaml
import speechbrain as sb
import torch
from safetensors.torch import load_file
from tiny import ARCHITECTURES, CTC, SMALL, SMALL_TRANSDUCER, arguments, rows, train, train_here

from speechbrain_ext.brains.asr import AsrBrain, check_heads
from speechbrain_ext.hparams import merge_hparams
from speechbrain_ext.inference import load_model
from speechbrain_ext.inference.models import CtcModel
from speechbrain_ext.lobes.fusible import MaskedBatchNorm
from speechbrain_ext.model_folder import WEIGHTS
from speechbrain_ext.model_folder.write import model_parts
from speechbrain_ext.training.settings import checked_options, choose_setting, take_paths
from speechbrain_ext.utils.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
CONFORMER = ROOT / "hparams" / "conformer.yaml"
CHUNKS = "speechbrain.utils.dynamic_chunk_training.DynChunkTrainConfig"


def test_null_clears_the_keys_of_an_encoder(run):
    """Also of one that is written fused at the end."""
    result = run(hparams=ROOT / "hparams" / "fusionformer.yaml", encoder_kwargs="null")
    assert load_model(result.folders["pretrained"], "cpu").mods.encoder


def test_a_decoder_without_a_search_only_helps_the_training(run):
    result = run(num_decoder_layers=1, test_search="null")
    assert [row.search for row in result.rows] == ["ctc_greedy"]
    model = load_model(result.folders["pretrained"], "cpu")
    assert isinstance(model, CtcModel) and "seq_lin" in model.hparams.asr_model


def test_half_precision_is_tested_as_it_is_written(run, monkeypatch):
    tested, evaluate = {}, AsrBrain.evaluate

    def evaluate_and_copy(brain, *arguments, **keys):
        tested.update((name, value.clone()) for name, value in model_parts(vars(brain.hparams)).state_dict().items())
        return evaluate(brain, *arguments, **keys)

    monkeypatch.setattr(AsrBrain, "evaluate", evaluate_and_copy)
    result = run(hparams=ROOT / "hparams" / "fusionformer.yaml", weights_precision="fp16")
    written = load_file(result.folders["pretrained"] / WEIGHTS)
    assert {value.dtype for value in written.values()} >= {torch.float16} and written.keys() == tested.keys()
    assert all(torch.equal(tested[name], value.to(tested[name].dtype)) for name, value in written.items())


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_every_shipped_file_trains_and_tests(path, corpus, tmp_path):
    plain = ruamel.yaml.YAML().load(merge_hparams([path], {}))
    searches = ["ctc_greedy", *["ctc_beam"] * bool(plain["ctc_search"]), *["joint_beam"] * bool(plain["num_decoder_layers"])]
    searches += ["transducer_greedy", "transducer_beam"] * bool(plain["transducer"])
    if plain["encoder"] == "cascade":
        searches = [f"{answer}_pass_{search}" for answer in ("first", "second") for search in searches]
    keys = {**SMALL, "num_decoder_layers": min(1, plain["num_decoder_layers"])}
    run = train(tmp_path, path, "--data_folder", corpus, "--device", "cpu", *arguments(**keys))
    assert run.returncode == 0, run.stdout + run.stderr
    assert [row["search"] for row in rows(tmp_path)] == searches
    for row in rows(tmp_path):
        assert row["hparams"] == path.name and row["test_set"] == "test-tiny" and row["epochs"] == "1"
        assert int(row["steps"]) >= 1 and float(row["audio_seconds_per_second"]) > 0 and int(row["peak_memory_mib"]) > 100
        errors = sum(int(row[kind]) for kind in ("insertions", "deletions", "substitutions"))
        assert float(row["WER"]) == pytest.approx(100 * errors / int(row["words"]), abs=0.01)
    (output,) = (tmp_path / "results").glob("*/7775")
    alignments = (output / f"wer_test-tiny_{row['search']}.txt").read_text()
    assert alignments.startswith(f"%WER {float(row['WER']):.2f} [") and "3-1-0001" in alignments
    assert (output / "pretrained" / "README.md").is_file()


@pytest.fixture(scope="module")
def ctc_run(corpus, tmp_path_factory):
    """A CTC-only run in bfloat16; its transcripts give fewer tokens than vocab_size."""
    folder = tmp_path_factory.mktemp("ctc")
    keys = {**SMALL, "num_decoder_layers": 0, "vocab_size": 1000, "precision": "bf16"}
    run = train(folder, CONFORMER, "--data_folder", corpus, "--device=cpu", *arguments(**keys))
    return folder, run


def test_ctc_only(ctc_run):
    folder, run = ctc_run
    assert run.returncode == 0, run.stdout + run.stderr
    (row,) = rows(folder)
    assert row["search"] == "ctc_greedy" and row["precision"] == "bf16"
    assert "train padding %: " in (folder / "results" / "conformer" / "7775" / "train_log.txt").read_text()
    (config,) = folder.glob("results/*/7775/pretrained/config.json")
    assert json.loads(config.read_text())["speechbrain_interface"] == "EncoderASR"


def test_a_small_corpus_reduces_the_vocabulary_with_a_warning(ctc_run):
    assert "instead of 1000; the model uses the smaller number" in ctc_run[1].stdout


@pytest.mark.parametrize(
    "changed", [{"d_model": 32}, {"vocab_size": 20}, {"train_splits": "[dev-tiny]"}, {"normalize": "{norm_type: sentence}"}]
)
def test_a_folder_of_another_run_is_refused(changed, ctc_run, corpus):
    keys = {**SMALL, "num_decoder_layers": 0, "vocab_size": 1000, "precision": "bf16", **changed}
    run = train(ctc_run[0], CONFORMER, "--data_folder", corpus, "--device=cpu", *arguments(**keys))
    (key,) = changed
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert f"holds a run with {key} " in run.stderr


def test_a_mistyped_data_folder_leaves_no_run_behind(corpus, tmp_path):
    keys = {**SMALL, "num_decoder_layers": 0}
    for folder, status in (("/no/such", 1), (corpus, 0)):
        run = train(tmp_path, CONFORMER, "--data_folder", folder, "--device=cpu", *arguments(**keys))
        assert run.returncode == status, run.stdout + run.stderr


def test_the_last_lines_say_where_all_is(ctc_run):
    folder, run = ctc_run
    *_, rate, speed, files, _, _, command, stream, export = run.stdout.strip().splitlines()
    assert "WER %  reference" in run.stdout and rate.startswith("test-tiny ctc_greedy: WER ") and "per second" in speed
    assert "curve.png" in files and next((folder / "results").glob("*/*/curve.png")).read_bytes().startswith(b"\x89PNG")
    assert command.endswith("pretrained FILE...") and (folder / command.split()[-2]).is_dir()
    assert " stream " in stream and " export " in export


def test_without_a_data_folder_it_says_first_that_it_runs_on_the_mini_corpus(tmp_path):
    run = train(tmp_path, CONFORMER, "--test_only", "--device", "cpu")
    assert run.stdout.startswith("No data_folder: this runs on the embedded mini corpus")
    assert run.returncode == 1 and "train first" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("data", [[], ["--data_folder", "x"]])
def test_the_output_folder_follows_what_its_name_is_made_of(data):
    argv, paths = take_paths([str(CONFORMER), "--seed", "2", "--experiment", "mine", *data])
    file, run_opts, overrides = sb.parse_arguments(argv)
    setting = choose_setting(file, run_opts, overrides, paths, None, ROOT / "recipes" / "Synthetic" / "corpus.yaml")
    assert setting.plain()["output_folder"] == ("results/mine/2" if data else "results/mini/mine/2")


def test_dynamic_chunks_have_a_size_that_the_encoder_takes(corpus, tmp_path):
    (tmp_path / "chunks.yaml").write_text(
        f"extends: {ROOT}/hparams/squeezeformer.yaml\n"
        "chunk_sampler: !new:speechbrain.utils.dynamic_chunk_training.DynChunkTrainConfigRandomSampler\n"
        "    {chunkwise_prob: 1.0, chunk_size_min: 3, chunk_size_max: 3, limited_left_context_prob: 0.5,\n"
        "     left_context_chunks_min: 1, left_context_chunks_max: 2}\n"
    )
    keys = {**SMALL, "num_decoder_layers": 0}
    run = train(tmp_path, "chunks.yaml", "--data_folder", corpus, "--device", "cpu", *arguments(**keys))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("decoder_layers, chunk", [(0, "null"), (1, f"!new:{CHUNKS} {{chunk_size: 2, left_context_size: 1}}")])
def test_a_fusionformer_is_tested_and_kept_fused(decoder_layers, chunk, corpus, tmp_path):
    keys = {**SMALL, "num_decoder_layers": decoder_layers, "number_of_epochs": 3, "average_checkpoints": 2}
    options = [*arguments(**keys), "--chunk_sampler", f"{{test_config: {chunk}}}"]
    run = train(tmp_path, ROOT / "hparams" / "fusionformer.yaml", "--data_folder", corpus, "--device", "cpu", *options)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Greedy search, fused and unfused: WER" in run.stdout
    assert float(re.search(r"no probability differs by more than (\S+)", run.stdout)[1]) < 1e-5  # 2e-4 with other chunks
    folder = tmp_path / "results" / "fusionformer" / "7775"
    fused, unfused = (load_model(folder / name, "cpu") for name in ("pretrained", "pretrained_unfused"))
    wavs, lens = torch.randn(2, 16000), torch.tensor([1.0, 0.7])
    for model, norms in ((fused, 0), (unfused, 2 * 9 + 3)):  # 9 in each of 2 blocks, 2 in the front end, 1 at the end
        assert sum(isinstance(part, MaskedBatchNorm) for part in model.modules()) == norms
    with torch.no_grad():
        outputs = [model.mods.encoder.encode(wavs, lens)[0] for model in (fused, unfused)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("encoder_kwargs", "{fused: True}", "leave it out"),
        ("encoder_kwargs", "{variant: [layer_norm]}", "Unknown variant"),
        (
            "subsampling",
            "!new:speechbrain_ext.lobes.subsampling.ConvolutionSubsampling",
            "ConvolutionSubsampling, which",
        ),
        ("statistics_batches", "-1", "--statistics_batches is -1; give a whole number above 0"),
        ("norm_momentum", "5", "momentum 5"),
    ],
)
def test_a_fusionformer_that_could_not_be_fused_is_refused_before_training(key, value, message, corpus, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: {ROOT}/hparams/fusionformer.yaml\n" + (f"{key}: {value}\n" if key == "subsampling" else ""))
    keys = SMALL | ({} if key == "subsampling" else {key: value})
    run = train(tmp_path, own, "--data_folder", corpus, "--device", "cpu", *arguments(**keys))
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert re.search(message, run.stderr), run.stderr


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"transducer": None}, "transducer is null, and a transducer needs transducer, transducer_cost, transducer_search"),
        ({"transducer_search": None}, "transducer_search is null"),
        ({"num_decoder_layers": 2}, "There is a transducer, and num_decoder_layers is 2; give 0, as it takes no decoder."),
        ({"ctc_weight": 0}, "ctc_weight is 0; give more than 0"),
        ({"ctc_weight": 1}, "ctc_weight is 1; give more than 0"),
    ],
)
def test_heads_that_do_not_go_together_are_refused(keys, message):
    heads = dict.fromkeys(("transducer", "transducer_cost", "transducer_search"), "a part")
    check_heads({**heads, "num_decoder_layers": 0, "ctc_weight": 0.3})
    check_heads({**dict.fromkeys(heads), "num_decoder_layers": 2, "ctc_weight": 0})
    with pytest.raises(ValueError, match=message):
        check_heads({**heads, "num_decoder_layers": 0, "ctc_weight": 0.3, **keys})


def test_testing_again_gives_the_same_model(corpus, tmp_path):
    keys = {**SMALL, "num_decoder_layers": 0, "number_of_epochs": 2, "statistics_batches": 1}
    keys["train_batch_sampler"] = "{max_batch_length: 3, num_buckets: 4}"
    command = [ROOT / "hparams" / "fusionformer.yaml", "--data_folder", corpus, "--device", "cpu", *arguments(**keys)]
    weights = []
    for again in ([], ["--test_only"]):
        run = train(tmp_path, *command, *again)
        assert run.returncode == 0, run.stdout + run.stderr
        folder = tmp_path / "results" / "fusionformer" / "7775" / "pretrained_unfused"
        weights.append(load_file(folder / "asr.safetensors"))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("name, tested", [("hyperconformer_transducer", 3), ("fusionformer", 2)])
def test_two_processes(name, tested, corpus, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    keys = {**SMALL, "train_batch_sampler": "{max_batch_length: 4}", "number_of_epochs": 2}
    if tested == 3:
        keys |= {**SMALL_TRANSDUCER, "num_decoder_layers": 0}
    run = train(
        tmp_path, ROOT / "hparams" / f"{name}.yaml", "--data_folder", corpus, "--device", "cpu", *arguments(**keys),
        launcher=launcher,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found = rows(tmp_path)
    assert len(found) == tested and all(row["hardware"].startswith("2 x ") for row in found)
    log = (tmp_path / "results" / name / "7775" / "train_log.txt").read_text()
    assert re.search("epoch: 2, .*train padding %: [1-9]", log)  # of both processes: one of them has no padding


def test_two_processes_in_debug_mode(corpus, tmp_path):
    """They share the folder of checkpoints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [CONFORMER, "--data_folder", corpus, "--device", "cpu", "--debug", *arguments(**CTC)]
    run = train(tmp_path, *command, launcher=launcher)
    assert run.returncode == 0, run.stdout + run.stderr
    assert list((tmp_path / "results").glob("*/7775_debug/pretrained"))


def test_options_of_the_brain_are_on_record():
    """In the row of the results, and in hyperparams.yaml if the file has the key."""
    given = "--grad_accumulation_factor 4 --max_grad_norm 1.0 --optimizer_step_limit 77 --eval_precision bf16"
    file, run_opts, overrides = sb.parse_arguments([str(CONFORMER), *given.split(), "--ckpt_interval_steps", "50"])
    setting = choose_setting(file, checked_options(run_opts), overrides, {}, None, None)
    assert sorted(setting.asked.split(" --")) == sorted(given.split(" --"))
    plain = setting.plain()
    assert (plain["grad_accumulation_factor"], plain["max_grad_norm"], plain["ckpt_interval_minutes"]) == (4, 1.0, 0)


@pytest.mark.parametrize("given, minutes, steps", [([], 0, 7), (["--ckpt_interval_minutes", "5"], 5, 0)])
def test_the_steps_between_checkpoints_may_be_in_a_file(given, minutes, steps, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"extends: {CONFORMER}\nckpt_interval_steps: 7\n")
    argv = [str(tmp_path / "mine.yaml"), "--data_folder", "x", *given]
    plain = choose_setting(*sb.parse_arguments(argv), {}, None, None).plain()
    assert (plain["ckpt_interval_minutes"], plain["ckpt_interval_steps"]) == (minutes, steps)


@pytest.mark.parametrize(
    "in_file, given, message",
    [
        ("jit: True", [], "--jit is not supported: TorchScript supports none of these encoders"),
        ("", ["--jit"], "--jit is not supported: TorchScript supports none of these encoders"),
        ("", ["--normalize", "{update_until_epoch: 1}"], "the features would have no statistics; give at least 2"),
        ("", ["--freeze", "[normalize]"], "the features would have no statistics; give at least 2, and do not freeze normalize"),
        ("", ["--ckpt_interval_steps", "5", "--ckpt_interval_minutes", "5"], "exclude each other; give one"),
    ],
)
def test_settings_that_would_fail_later(in_file, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"extends: {CONFORMER}\n{in_file}\n")
    with pytest.raises(UsageError, match=message):
        train_here("mine.yaml", "--data_folder", "x", "--device", "cpu", *given)


def test_debug_mode_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"extends: {CONFORMER}\ndebug: True\n")
    setting = choose_setting(*sb.parse_arguments(["mine.yaml"]), {}, None, None)
    assert setting.plain()["output_folder"] == "results/conformer/7775_debug"


def test_the_padding_of_the_authors_weights_trains(corpus, tmp_path):
    """As when they are fine-tuned; the number of frames then depends on the batch."""
    keys = {**CTC, "subsampling": "{padding: right}", "encoder_kwargs": "{padding: right}"}
    command = [ROOT / "hparams" / "squeezeformer.yaml", "--data_folder", corpus, "--device", "cpu", *arguments(**keys)]
    run = train(tmp_path, *command)
    assert run.returncode == 0, run.stdout + run.stderr


def test_help_may_be_cut_short():
    """As by "| head"."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert b"Pipe" not in process.stderr.read() and process.wait() == 0


@pytest.mark.parametrize(
    "argv, status, message",
    [
        (["gone.yaml"], 2, "There is no hparams file"),
        ([CONFORMER, "--data_folder", "/no/such"], 1, "The data folder '/no/such' is not a folder"),
        ([CONFORMER, "--data_folder", "/no/such", "--numer_of_epochs", "3"], 2, "did you mean 'number_of_epochs'?"),
        ([CONFORMER, "--data_folder", "/no/such", "--encoder", "conformator"], 2, "Unknown encoder 'conformator'"),
        ([CONFORMER, "--data_folder", "/no/such", "--nhead", "7"], 2, "7"),
        ([ROOT / "speechbrain_ext/training/hparams/ctc_attention.yaml", "--data_folder", "x"], 2, "PLACEHOLDER"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(argv, status, message, tmp_path):
    run = train(tmp_path, *argv)
    assert run.returncode == status
    assert message in run.stderr and "Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize("argv, message", [(["--precision", "fp16"], "not yet supported on CPU"), (["--device", "cuda:9"], "")])
def test_what_the_machine_cannot_do_ends_in_one_sentence(argv, message, corpus, tmp_path):
    keys = {"device": "cpu", **SMALL, **{argv[0][2:]: argv[1]}}
    run = train(tmp_path, CONFORMER, "--data_folder", corpus, *arguments(**keys))
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stdout + run.stderr


def test_a_loss_that_is_not_finite_names_the_utterances(corpus, tmp_path):
    hparams = tmp_path / "spoiled.yaml"  # all weights are NaN after the first step
    hparams.write_text(f"extends: {CONFORMER}\nmax_grad_norm: .nan\nskip_nonfinite_grads: False\n")
    keys = {**SMALL, "nonfinite_patience": 0, "number_of_epochs": 2}
    run = train(tmp_path, hparams, "--data_folder", corpus, "--device", "cpu", *arguments(**keys))
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "The loss is nan" in run.stderr and "1-1-0003" in run.stderr


def test_debug_mode_leaves_results_alone(corpus, tmp_path):
    run = train(tmp_path, CONFORMER, "--data_folder", corpus, "--device", "cpu", "--debug", *arguments(**SMALL))
    assert run.returncode == 0, run.stdout + run.stderr
    assert not (tmp_path / "results" / "results.csv").exists()
    assert list((tmp_path / "results").glob("*/7775_debug/pretrained"))
