"""Time and memory of a training step of the 8M HyperConformer recipe, with our modules and with SpeechBrain's.

    python benchmarks/training.py [--threads N] [--rounds N] [--utterances 5 50] [--output benchmarks/results/training.csv]

A step is that of the Brain of ``hparams/hyperconformer.yaml``: features, normalisation, front end, encoder, decoder, both losses,
backward, clipping and optimiser. Waveforms are 12 s of noise with four tokens per second, without augmentation; 50 of them are
the 600 s of the published recipe. Only the front end and the TransformerASR differ; SpeechBrain's are those of its recipe. Both
TransformerASRs have the same weights, and their outputs must agree to 1e-4 before the timing. Times are medians of alternating
steps; memory is the peak of tensors during a step, without weights and optimiser states.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from speechbrain import Stage

from speechbrain_ext.brains.asr import AsrBrain, Predictions
from speechbrain_ext.convert import convert_speechbrain
from speechbrain_ext.dataio.datasets import Batch
from speechbrain_ext.hparams import load_hparams, parse_overrides
from speechbrain_ext.utils.files import write_csv
from speechbrain_ext.utils.measure import alternate, peak_memory, quartiles

FIELDS = ("modules", "utterances", "seconds", "threads", "ms", "ms_lower", "ms_upper", "rounds", "peak_mib", "times_speechbrain")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # corpus files name functions in recipes/
SECONDS, TOKENS_PER_SECOND = 12, 4
EQUAL = {"wav_augment": None, "fea_augment": None}
SPEECHBRAIN = """
subsampling: !new:speechbrain.lobes.models.convolution.ConvolutionFrontEnd
    input_shape: (8, 10, 80)
    num_blocks: 2
    num_layers_per_block: 1
    out_channels: (64, 32)
    kernel_sizes: (3, 3)
    strides: (2, 2)
    residuals: (False, False)
Transformer: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
    input_size: 640
    tgt_vocab: !ref <vocab_size>
    d_model: !ref <d_model>
    nhead: !ref <nhead>
    num_encoder_layers: !ref <num_encoder_layers>
    num_decoder_layers: !ref <num_decoder_layers>
    d_ffn: !ref <d_ffn>
    dropout: !ref <dropout>
    activation: !name:torch.nn.GELU
    encoder_module: conformer
    attention_type: hypermixing
    normalize_before: True
    causal: False
test_search: null
"""


class SpeechBrainModules(AsrBrain):
    """The same Brain, with a front end without lengths."""

    def compute_forward(self, batch, stage):
        """Compute the forward pass as in SpeechBrain's recipe."""
        batch, hparams = batch.to(self.device), self.hparams
        self.frames = None  # this front end does not return lengths
        feats, lens = hparams.speech_encoder.features(*batch.sig)
        feats = hparams.speech_encoder.normalized(feats, lens, epoch=hparams.epoch_counter.current)
        enc, dec = hparams.Transformer(hparams.subsampling(feats), batch.tokens_bos.data, lens, pad_idx=hparams.blank_index)
        return {None: Predictions(enc, lens, hparams.ctc_lin(enc), hparams.seq_lin(dec))}


def make_brain(kind, folder, overrides, file="hyperconformer.yaml"):
    """A Brain before its first batch; for ``kind`` None, the Brain of the hparams file."""
    hparams = load_hparams(ROOT / "hparams" / file, EQUAL | overrides | {"output_folder": str(folder)})
    kind = kind or hparams["brain"]
    brain = kind(hparams["modules"], hparams["opt_class"], hparams, {"device": "cpu"}, hparams["checkpointer"])
    brain.on_fit_start()
    brain.train_sampler = [None]  # an epoch of one batch
    brain.on_stage_start(Stage.TRAIN, epoch=1)
    brain.modules.train()
    return brain


def make_batch(utterances, seconds=SECONDS, tokens_per_second=TOKENS_PER_SECOND, vocab=5000):
    """Noise with tokens, all of the same length, without padding."""
    tokens = torch.randint(4, vocab, (utterances, round(seconds * tokens_per_second)))
    edge = torch.ones(1, dtype=torch.long)
    items = [
        {
            "id": str(number),
            "duration": float(seconds),
            "sig": torch.randn(16000 * seconds),
            "tokens": ids,
            "tokens_bos": torch.cat((edge, ids)),
            "tokens_eos": torch.cat((ids, 2 * edge)),
        }
        for number, ids in enumerate(tokens)
    ]
    return Batch(items)


@torch.no_grad()
def assert_equal(ours, theirs):
    """Load SpeechBrain's weights into our TransformerASR, and compare the outputs."""
    hparams = ours.hparams
    ours.hparams.Transformer.load_state_dict(convert_speechbrain(theirs.hparams.Transformer.state_dict(), hparams.nhead))
    inputs = (torch.randn(2, 100, 640), torch.randint(4, hparams.vocab_size, (2, 20)), torch.ones(2))
    answers = [brain.hparams.Transformer.eval()(*inputs, pad_idx=hparams.blank_index) for brain in (ours, theirs)]
    difference = max((a - b).abs().max().item() for a, b in zip(*answers, strict=True))
    if not difference <= 1e-4:
        raise RuntimeError(f"The outputs of the same weights differ by {difference:.3g}, more than 1e-4.")
    for brain in (ours, theirs):
        brain.hparams.Transformer.train()
    return difference


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--utterances", type=int, nargs="+", default=[5, 50])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "training.csv")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    rows = []
    print(("{:>18}" * len(FIELDS)).format(*FIELDS))
    with tempfile.TemporaryDirectory() as folder:
        brains = {
            "speechbrain": make_brain(SpeechBrainModules, Path(folder) / "theirs", parse_overrides(SPEECHBRAIN)),
            "speechbrain_ext": make_brain(AsrBrain, Path(folder) / "ours", {}),
        }
        print(f"Largest difference of the outputs: {assert_equal(brains['speechbrain_ext'], brains['speechbrain']):.1e}")
        for utterances in arguments.utterances:
            batch = make_batch(utterances)
            calls = {name: lambda brain=brain, batch=batch: brain.fit_batch(batch) for name, brain in brains.items()}
            for call in calls.values():
                call()  # allocates the optimiser's states
            memory = {name: peak_memory(call) for name, call in calls.items()}
            times = {name: quartiles(values) for name, values in alternate(calls, arguments.rounds).items()}
            for name, (middle, lower, upper) in times.items():
                figures = [round(value, 1) for value in (middle, lower, upper)]
                ratio = round(times["speechbrain"][0] / middle, 2)
                sizes = (utterances, utterances * SECONDS, arguments.threads)
                rows.append((name, *sizes, *figures, arguments.rounds, round(memory[name]), ratio))
                print(("{:>18}" * len(FIELDS)).format(*map(str, rows[-1])), flush=True)
    write_csv(arguments.output, FIELDS, rows)


if __name__ == "__main__":
    main()
