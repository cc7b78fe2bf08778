"""Time and memory of the transducer losses: torchaudio's kernel on all logits, the full loss in slices, and the pruned loss.

    python benchmarks/transducer_loss.py [--device cuda] [--threads N] [--vocab 500 1000] [--batch 4] [--seconds 10]
        [--labels 60] [--memory 64] [--rounds N] [--output benchmarks/results/transducer_loss.csv]

Predictor and joint network of the recipes (512 each, random weights) on random encoder frames of 40 ms, forward and backward.
Utterances have equal lengths. Memory is the peak of additional tensors; times are medians of alternating runs. ``full_sliced`` is
the full loss within ``--memory`` MiB. On a GPU the script also counts how often the host waits. The rows of other machines stay
in the output.
"""

import argparse
import statistics
import warnings
from pathlib import Path

import torch
from torchaudio.functional import rnnt_loss

from speechbrain_ext.lobes.transducer import Transducer
from speechbrain_ext.lobes.transducer_loss import TransducerLoss
from speechbrain_ext.utils.files import read_csv, write_csv
from speechbrain_ext.utils.machine import describe_machine
from speechbrain_ext.utils.measure import alternate, peak_memory

FIELDS = ("loss", "vocab", "batch", "frames", "labels", "machine", "ms", "mib", "times_as_fast", "share_of_memory")
D_MODEL, SIZE, FRAMES_PER_SECOND = 256, 512, 25


def make_losses(transducer, memory, device):
    """Losses by name, as functions of frames, lengths, targets and their lengths."""
    vocab = transducer.out.out_features

    def kernel(frames, lengths, targets, target_lengths):
        """The loss without this package."""
        outputs = transducer.project_outputs(transducer.predictor(targets)).unsqueeze(1)
        logits = transducer.join(transducer.project_frames(frames).unsqueeze(2), outputs)
        return rnnt_loss(logits, targets.int(), lengths.int(), target_lengths.int(), blank=0)

    losses = {"torchaudio": kernel}
    for name, keys in {"full": {}, "full_sliced": {"joint_memory": memory}, "pruned": {}}.items():
        module = TransducerLoss(D_MODEL, SIZE, vocab, kind=name.partition("_")[0], **keys).to(device)
        losses[name] = lambda *batch, module=module: module(transducer, *batch)
    return losses


def measure(vocab, arguments):
    """Rows of the table for one size of the vocabulary."""
    device, frames = arguments.device, FRAMES_PER_SECOND * arguments.seconds
    transducer = Transducer(D_MODEL, vocab, predictor_size=SIZE, joint_size=SIZE).to(device)
    batch = (
        torch.randn(arguments.batch, frames, D_MODEL, device=device, requires_grad=True),
        torch.full((arguments.batch,), frames, device=device),
        torch.randint(1, vocab, (arguments.batch, arguments.labels), device=device),
        torch.full((arguments.batch,), arguments.labels, device=device),
    )
    calls = {
        name: lambda loss=loss: loss(*batch).backward()
        for name, loss in make_losses(transducer, arguments.memory, device).items()
    }
    for call in calls.values():
        call()  # allocates gradients before the measurement
    mib = {name: peak_memory(call, device) for name, call in calls.items()}
    times = alternate(calls, arguments.rounds, warmup=1, device=device)
    for name in calls:
        yield {
            "loss": name,
            "vocab": vocab,
            "batch": arguments.batch,
            "frames": frames,
            "labels": arguments.labels,
            "machine": describe_machine(device)["hardware"],
            "ms": round(statistics.median(times[name]), 1),
            "mib": round(mib[name], 1),
            "times_as_fast": round(statistics.median(times["torchaudio"]) / statistics.median(times[name]), 1),
            "share_of_memory": round(mib[name] / mib["torchaudio"], 3),
        }


def count_waits(vocab, arguments):
    """How often the host waits for a GPU in the pruned loss, by seconds of audio."""
    waits = {}
    for seconds in (arguments.seconds, 2 * arguments.seconds):
        transducer = Transducer(D_MODEL, vocab).cuda()
        loss = make_losses(transducer, arguments.memory, "cuda")["pruned"]
        frames = torch.randn(arguments.batch, FRAMES_PER_SECOND * seconds, D_MODEL, device="cuda")
        lengths = torch.full((arguments.batch,), frames.shape[1], device="cuda")
        targets = torch.randint(1, vocab, (arguments.batch, arguments.labels), device="cuda")
        labels = torch.full((arguments.batch,), arguments.labels, device="cuda")
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss(frames, lengths, targets, labels).backward()
        torch.cuda.set_sync_debug_mode("default")
        waits[seconds] = len(caught)
    return waits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab", type=int, nargs="+", default=[500, 1000])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--labels", type=int, default=60)
    parser.add_argument("--memory", type=float, default=64, help="MiB for full_sliced")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "transducer_loss.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for vocab in arguments.vocab:
        for row in measure(vocab, arguments):
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    before = read_csv(arguments.output) if arguments.output.exists() else []
    rows = [row for row in before if row["machine"] != rows[0]["machine"]] + rows  # those of other machines stay
    write_csv(arguments.output, FIELDS, [row.values() for row in rows])
    if torch.device(arguments.device).type == "cuda":
        print(f"The host waits in the pruned loss, by seconds of audio: {count_waits(arguments.vocab[0], arguments)}")


if __name__ == "__main__":
    main()
