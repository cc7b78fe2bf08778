"""Whole training runs on a device, with a budget for each optimizer step. The device is pretended: see
tests/pretend_gpu.py."""

import functools
from pathlib import Path

import pytest
import tiny
import torch
from pretend_gpu import PretendGpu, load_there
from speechbrain.utils.run_opts import RunOptions
from torch._dynamo.testing import CompileCounter

import train
from speechbrain_ext.brains.asr import AsrBrain, AsrModel
from speechbrain_ext.hparams import load_hparams
from speechbrain_ext.registry import build_encoder

# A transducer works the same for all encoders
NAMES = [path.stem for path in tiny.ARCHITECTURES]
HPARAMS = [name for name in NAMES if not name.endswith("_transducer") or name == "practical_conformer_transducer"]
SYNCS = 1
"""Waits of the host for the device in an optimizer step, for any number of batches, utterances and parameters."""
UPLOADS = 3
"""Copies from the host per batch."""


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    """Trains on the device, and returns a Recorder of each batch, in lists by optimizer step."""
    load_there(monkeypatch)
    monkeypatch.chdir(tiny.ROOT)
    mode, steps = PretendGpu(), [[]]
    fit_batch = AsrBrain.fit_batch

    @functools.wraps(fit_batch)
    def recorded(brain, batch):
        before = brain.optimizer_step
        with mode.recorded() as recorder:
            read = fit_batch(brain, batch)
        steps[-1].append((recorder, len(batch)))
        if brain.optimizer_step > before:
            steps.append([])
        return read

    monkeypatch.setattr(AsrBrain, "fit_batch", recorded)

    def start(name, **keys):
        files = {"data_folder": corpus, "output_folder": tmp_path / "run", "results_file": tmp_path / "results.csv"}
        heads = {"num_decoder_layers": 0, **tiny.SMALL_TRANSDUCER} if name.endswith("transducer") else {}
        keys = {**tiny.SMALL, **heads, **files, "device": "pretend:0", **keys}
        with mode:
            assert train.main([f"hparams/{name}.yaml", *tiny.arguments(**keys)]) == 0
        assert not steps.pop()
        return steps

    return start


@pytest.mark.parametrize("name", HPARAMS)
def test_a_step_waits_once_and_computes_nothing_on_the_host(run, name):
    *_, step = run(name, number_of_epochs=2, test_splits="[]", train_batch_sampler="{max_batch_length: 9}")
    for recorder, utterances in step:
        assert recorder.syncs.total() <= SYNCS, dict(recorder.syncs)
        assert recorder.uploads.total() <= UPLOADS, dict(recorder.uploads)
        assert max(recorder.host_elements.values()) <= utterances, dict(recorder.host_elements)
        assert not recorder.double_products


def test_accumulation_waits_once_for_all_its_batches(run):
    keys = {"grad_accumulation_factor": 3, "number_of_epochs": 2, "test_splits": "[]"}
    *_, step = run("hyperconformer", train_batch_sampler="{max_batch_length: 4}", **keys)
    assert len(step) > 1
    assert sum(recorder.syncs.total() for recorder, _ in step) <= SYNCS
    assert all(recorder.uploads.total() <= UPLOADS for recorder, _ in step)


@pytest.mark.parametrize("name", ["hyperconformer", "cascade_hyperconformer_squeezeformer"])
def test_two_views_stay_in_the_budget(run, name):
    """CR-CTC, with a decoder and in a cascade."""
    *_, step = run(name, number_of_epochs=2, test_splits="[]", consistency=0.2, augment_warmup=0)
    assert sum(recorder.syncs.total() for recorder, _ in step) <= SYNCS
    assert all(recorder.uploads.total() <= UPLOADS for recorder, _ in step)


def test_norms_take_few_launches(run):
    """The FusionFormer of published depth. Its step once had 10,405 launches."""
    layers = {"num_encoder_layers": 12, "num_decoder_layers": 4}
    *_, step = run("fusionformer", number_of_epochs=2, test_splits="[]", chunk_sampler="{chunkwise_prob: 1.0}", **layers)
    ((recorder, _),) = step
    assert recorder.launches.total() <= 3500


def small_hparams(name, **keys):
    keys = {**tiny.SMALL, "data_folder": "unused", "num_decoder_layers": 0, **keys}
    return load_hparams(tiny.ROOT / "hparams" / f"{name}.yaml", "\n".join(f"{key}: {value}" for key, value in keys.items()))


def test_compiling_is_done_once_for_all_lengths(monkeypatch, tmp_path):
    """Compilations of --compile, counted over 20 batches of different lengths."""
    counter = CompileCounter()
    compile_in_place = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **keys: compile_in_place(self, backend=counter, dynamic=True))
    hparams, options = small_hparams("hyperconformer", output_folder=tmp_path), {"device": "cpu", "compile": True}
    brain = AsrBrain(hparams["modules"], hparams["opt_class"], hparams, RunOptions(**options, overridden_args=set(options)))
    brain._compile()
    encoder, compiled = brain.modules.model.speech_encoder.train(), set()
    for step in range(20):
        frames, _ = encoder.encode_features(torch.randn(2 + step % 3, 60 + 7 * step, 80), torch.linspace(0.5, 1, 2 + step % 3))
        frames.square().mean().backward()
        compiled.add(counter.frame_count)
    assert len(compiled) == 1 and compiled.pop() > 0
    assert not any("_orig_mod" in name for name in brain.modules.model.state_dict())  # checkpoints are those of eager training


@pytest.mark.parametrize("in_training, sampler", [(True, "train_batch_sampler"), (False, "eval_batch_sampler")])
def test_too_little_memory_is_said_with_what_to_do(in_training, sampler, corpus, tmp_path, monkeypatch, capsys):
    computed = AsrModel.forward

    def forward(self, *arguments, **keys):
        if self.training == in_training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return computed(self, *arguments, **keys)

    monkeypatch.setattr(AsrModel, "forward", forward)
    monkeypatch.chdir(tiny.ROOT)
    files = {"data_folder": corpus, "output_folder": tmp_path / "run", "results_file": tmp_path / "results.csv"}
    keys = {**tiny.SMALL, **files, "device": "cpu", "train_batch_sampler": "{max_batch_length: 9, shuffle: False}"}
    assert train.main(["hparams/hyperconformer.yaml", *tiny.arguments(**keys)]) == 1
    said = capsys.readouterr().err
    assert (
        "too little memory on cpu for a batch of" in said and "2 GiB" in said and f"lower max_batch_length of {sampler}" in said
    )


@pytest.mark.parametrize(
    ("optimizer", "keys", "fused"),
    [
        ("AdamW", {}, True),
        ("SGD", {}, True),
        ("AdamW", {"fused": False}, False),
        ("AdamW", {"foreach": True}, None),  # PyTorch refuses the two together
        ("Adadelta", {}, None),
    ],
)
def test_the_fused_optimizer_is_taken_where_there_is_one(optimizer, keys, fused, tmp_path):
    hparams = small_hparams("hyperconformer", output_folder=tmp_path)
    opt_class = functools.partial(getattr(torch.optim, optimizer), lr=0.1, **keys)
    brain = AsrBrain(hparams["modules"], opt_class, hparams, RunOptions(device="cpu"))
    brain.device_type = "cuda"
    brain.init_optimizers()
    assert brain.optimizer.defaults.get("fused") is fused and brain.opt_class is opt_class


@pytest.mark.parametrize("name", ["hyperconformer", "conformer", "squeezeformer", "practical_conformer", "fusionformer"])
def test_float16_training_overflows_nowhere(name, tmp_path):
    """With losses scaled as on a GPU, no gradient is infinite."""
    hparams = small_hparams(name, output_folder=tmp_path)
    model, optimizer = hparams["model"].train(), None
    optimizer = hparams["opt_class"](model.parameters())
    scaler, losses = torch.GradScaler("cpu", init_scale=2.0**10), []
    torch.manual_seed(0)
    feats, lens = 10 * torch.randn(3, 120, 80), torch.tensor([1.0, 0.7, 0.4])
    targets = torch.randint(4, 30, (3, 5))
    for _ in range(4):
        with torch.autocast("cpu", torch.float16):
            (prediction,) = model(feats, lens, is_features=True, epoch=1)
        log_probs = prediction.ctc_logits.float().log_softmax(-1)
        loss = hparams["ctc_cost"](log_probs, targets, prediction.lengths, torch.ones(3))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert scaler.get_scale() == 2.0**10  # an infinite gradient would lower it
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_residual_stream_without_layer_norms_is_float32(dtype):
    encoder, types = build_encoder("fusionformer", d_model=32, nhead=4, num_layers=2, d_ffn=64), []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda _, inputs, output: types.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype):
        encoder(torch.randn(2, 20, 32).to(dtype))
    assert set(types) == {torch.float32}


def test_a_run_on_a_device_ends_with_a_model_for_any(run, tmp_path):
    """It is averaged, fused, searched and tested there; its folder loads on the CPU."""
    from speechbrain_ext.inference import load_model

    run("fusionformer")
    model = load_model(tmp_path / "run" / "pretrained")
    text, _ = model.transcribe_batch(torch.randn(1, 16000), torch.ones(1))
    assert len(text) == 1 and Path(tmp_path / "results.csv").stat().st_size
