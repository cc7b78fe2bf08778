"""The encoder contract on a device: outputs and gradients of every registered encoder, compared with those of the CPU.

    python benchmarks/gpu_contract.py [--device cuda] [--output FILE.csv] [--first]

The encoders are those of the contract's tests, without dropout. A row is one encoder in one way: whole utterances in float32, in
evaluation and in training with gradients; the same in chunks; whole utterances in bfloat16 and float16 with gradients; and a
stream, chunk by chunk. All run on the CPU in float32, and on the device with TensorFloat-32 off. On the device, no operation may
make the host wait. A row has the largest difference of outputs, and that of gradients relative to the largest gradient. For half
precision, it has the mean difference of outputs relative to their standard deviation.
"""

import argparse
import contextlib
import copy
import sys
import traceback
import warnings
from pathlib import Path

import torch
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import CASES, case_name, make_encoder  # noqa: E402

from speechbrain_ext.training.results import append_rows  # noqa: E402
from speechbrain_ext.utils.errors import one_line  # noqa: E402
from speechbrain_ext.utils.machine import describe_machine  # noqa: E402

LENGTHS = (300, 137, 1)  # one with more queries than attention takes at once, and one with a single frame
CHUNK, LEFT = 8, 2
# Name of the way, whether in chunks, whether with gradients, type of autocast
WAYS = (
    ("whole", False, False, None),
    ("whole", False, True, None),
    ("chunked", True, False, None),
    ("chunked", True, True, None),
    ("whole", False, True, torch.bfloat16),
    ("whole", False, True, torch.float16),
)
OUTPUT, GRADIENT, HALF = 1e-4, 1e-3, 0.1
"""Largest accepted differences. On a CPU, float32 differs from float64 by 3e-6 and 4e-6, and from float16 and bfloat16 by less
than 0.01."""


@contextlib.contextmanager
def counted_waits(device):
    """A list that gets a warning for each operation that makes the host wait for a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        caught[:] = [warning for warning in caught if "called a synchronizing" in str(warning.message)]


def run_whole(encoder, x, mask, config, weights, half=None):
    """Output, and gradients by name if there are weights for a loss; on the device of the inputs."""
    encoder.train(weights is not None)
    with torch.set_grad_enabled(weights is not None), torch.autocast(x.device.type, half, enabled=half is not None):
        out, _ = encoder(x, src_key_padding_mask=mask, dynchunktrain_config=config)
    if weights is None:
        return out, {}
    encoder.zero_grad(set_to_none=True)
    (out.float() * weights).sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in encoder.named_parameters()}


@torch.no_grad()
def run_stream(encoder, x, config):
    """The output of all chunks of a stream."""
    context = encoder.eval().make_streaming_context(config)
    return torch.cat([encoder.forward_streaming(chunk, context)[0] for chunk in x.split(config.chunk_size, dim=1)], 1)


def difference(out, expected, half=None):
    """The difference of two outputs; NaN if an output has NaN."""
    gap = (out.cpu().float() - expected).abs()
    return (gap.max() if half is None else gap.mean() / expected.std()).item()


def gradient_difference(gradients, expected):
    """The difference of gradients, relative to the largest one."""
    for name, gradient in gradients.items():
        if gradient is None:
            raise RuntimeError(f"{name} has no gradient")
    largest = max(gradient.abs().max() for gradient in expected.values())
    gaps = [(gradients[name].cpu().float() - value).abs().max() for name, value in expected.items()]
    return (torch.stack(gaps).max() / largest).item()


def rows_of(name, keys, device):
    """The rows of one encoder."""
    on_cpu = make_encoder(name, keys, dropout=0.0)
    config = DynChunkTrainConfig(CHUNK * on_cpu.chunk_multiple, LEFT)
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, len(LENGTHS), max(LENGTHS), on_cpu.d_model, generator=generator)
    mask = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS).unsqueeze(1)
    moved = [tensor.to(device) for tensor in (x, mask, weights)]
    ways = [*WAYS, ("streaming", True, False, None)] if getattr(on_cpu, "streamable", False) else WAYS
    for way, in_chunks, learns, half in ways:
        row = {"encoder": case_name(name, keys), "way": way, "precision": str(half or torch.float32).removeprefix("torch.")}
        row["mode"] = "training" if learns else "evaluation"
        try:
            here, there = copy.deepcopy(on_cpu), copy.deepcopy(on_cpu).to(device)
            setting = config if in_chunks else None
            if way == "streaming":
                expected, gradients = run_whole(here, x, None, setting, None)
                with counted_waits(device) as waits:
                    out, found = run_stream(there, moved[0], setting), {}
            else:
                expected, gradients = run_whole(here, x, mask, setting, weights if learns else None)
                with counted_waits(device) as waits:
                    out, found = run_whole(there, *moved[:2], setting, moved[2] if learns else None, half)
            row["output_difference"] = difference(out, expected, half)
            within = row["output_difference"] <= (OUTPUT * max(1, expected.abs().max().item()) if half is None else HALF)
            if learns:
                row["gradient_difference"] = gradient_difference(found, gradients)
                limit = GRADIENT if half is None else float("inf")  # in half precision they must only be finite
                within = within and row["gradient_difference"] <= limit and row["gradient_difference"] < float("inf")
            row |= {"waits": len(waits), "passed": within and not waits}
            if waits:
                row["note"] = f"the host waits, first in {waits[0].filename}:{waits[0].lineno}"
        except Exception as error:  # any error of one encoder must not stop the others
            traceback.print_exc()
            row |= {"passed": False, "note": one_line(error)}
        yield {key: f"{value:.1e}" if isinstance(value, float) else value for key, value in row.items()}


def main(argv=None):
    """Run all encoders; the exit status is 0 if all pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("contract.csv"))
    parser.add_argument("--first", action="store_true", help="only the default setting of each encoder")
    arguments = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    machine = describe_machine(arguments.device)
    count = failed = 0
    for name, keys in CASES:
        if arguments.first and keys:
            continue
        for row in rows_of(name, keys, arguments.device):
            columns = (
                "encoder",
                "way",
                "mode",
                "precision",
                "output_difference",
                "gradient_difference",
                "waits",
                "passed",
                "note",
            )
            append_rows(arguments.output, [{key: row.get(key) for key in columns} | machine])
            count, failed = count + 1, failed + (not row["passed"])
            print(*(row.get(key, "") for key in columns), sep="\t", flush=True)
    print(f"{count - failed} of {count} ways of all encoders passed on {arguments.device}; {arguments.output}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
