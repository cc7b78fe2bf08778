"""Seconds of audio per training step that fit on GPUs of several sizes, for each hparams file; computed on a CPU.

    nice python benchmarks/memory.py [--files hyperconformer conformer ...] [--output benchmarks/results/memory.csv]

A step needs memory for weights, gradients and the optimizer's states; for the tensors that autograd saves for the backward pass,
over features, encoder, decoder and both losses, and for the predictions; a tenth of that for temporary tensors of the backward
pass; and a GiB for CUDA and unusable memory of its allocator.

Hooks count the saved tensors on the CPU, each storage once, in float32, at a few lengths. Per utterance their size is a linear
plus a quadratic function of the length. Two operations save more on a CPU than on a GPU, and are counted as on a GPU: fused
attention saves queries, keys, values, bias and output, and dropout saves a byte per number. Utterances have 17 s, close to the
longest of LibriSpeech, at the slowest speed of speed perturbation. Models that train with dynamic chunks have the setting that
takes the most memory. In bfloat16 and float16 more seconds fit. With ``activation_checkpointing``, a step saves the inputs of the
front end and of each block, and in addition all saved tensors of the largest of them.
"""

import argparse
import functools
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from speechbrain import Stage
from speechbrain.utils.dynamic_chunk_training import DynChunkTrainConfig
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from speechbrain_ext.hparams import load_hparams
from speechbrain_ext.utils.files import write_csv

sys.path.insert(0, str(Path(__file__).parent))
from training import ROOT, make_batch, make_brain  # noqa: E402

LENGTHS = (5, 10, 20)
UTTERANCE = 17
SIZES = (8, 12, 24, 40, 80)
BACKWARD, CUDA = 1.1, 1024
# By vocabulary size of a unigram tokenizer, counted in 13 h of LibriSpeech
TOKENS_PER_SECOND = {128: 8.1, 500: 5.5, 1000: 4.6, 5000: 3.4}
FIELDS = ("hparams", "activation_checkpointing", "parameters", "state_mib", "mib_per_s", "mib_per_s2")
FIELDS += tuple(f"seconds_{size}" for size in SIZES)


class FusedAttention(torch.autograd.Function):
    """Attention that saves the same tensors as a fused kernel of a GPU; its gradients are zeros of the right shapes."""

    @staticmethod
    def forward(ctx, query, key, value, bias, dropout, scale):
        """Compute ``scaled_dot_product_attention``."""
        out = _attention(query, key, value, bias, 0.0, scale=scale)
        ctx.save_for_backward(query, key, value, bias, out, query.new_empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, gradient):
        """Return zeros."""
        query, key, value, bias, *_ = ctx.saved_tensors
        learned = bias is not None and bias.is_floating_point()
        return (
            *(torch.zeros_like(tensor) for tensor in (query, key, value)),
            torch.zeros_like(bias) if learned else None,
            None,
            None,
        )


_attention = F.scaled_dot_product_attention


def fused_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Replacement of ``scaled_dot_product_attention``."""
    return FusedAttention.apply(query, key, value, attn_mask, dropout_p, scale)


def dropout(x, p=0.5, training=True, inplace=False):
    """Replacement of ``torch.nn.functional.dropout``."""
    return torch.native_dropout(x, p, training)[0] if training and p else x


class Kept:
    """Bytes of saved storages, without those of weights.

    Arguments
    ---------
    weights : list of torch.Tensor
        Tensors that do not count.
    """

    def __init__(self, weights):
        self.weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self.storages = {}

    def add(self, tree):
        """Count all tensors of a tree."""
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tree

    @property
    def mib(self):
        """The total in MiB."""
        return sum(self.storages.values()) / 2**20

    def of_autograd(self):
        """A context that counts the tensors that autograd saves."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


def kept_mib(brain, batch):
    """MiB that a step saves until its backward pass, without the weights, plus those of the largest recomputed block."""
    weights, again = list(brain.modules.parameters()), [0]
    kept = Kept(weights)

    def recomputed(module, *inputs, **keys):
        kept.add(inputs)
        inside = Kept(weights)
        with torch.random.fork_rng(), inside.of_autograd():
            module(*inputs)
        again.append(inside.mib)
        return checkpoint(module, *inputs, **keys)

    with ExitStack() as as_on_a_gpu:
        as_on_a_gpu.enter_context(mock.patch.multiple(F, scaled_dot_product_attention=fused_attention, dropout=dropout))
        for lobe in ("attention", "dropout"):
            as_on_a_gpu.enter_context(mock.patch(f"speechbrain_ext.lobes.{lobe}.shares_draws", lambda x: False))
        as_on_a_gpu.enter_context(mock.patch("speechbrain_ext.lobes.stack.checkpoint", recomputed))
        as_on_a_gpu.enter_context(kept.of_autograd())
        predictions = brain.compute_forward(batch, Stage.TRAIN)
        loss = brain.compute_objectives(predictions, batch, Stage.TRAIN)
        kept.add([batch.sig, *predictions.values()])
        loss.backward()  # frees the saved tensors
    return kept.mib + max(again)


def state_mib(brain):
    """MiB of weights, gradients and the optimizer's states, after a step."""
    brain.optimizers_step()
    states = [tensor for state in brain.optimizer.state.values() for tensor in state.values() if isinstance(tensor, torch.Tensor)]
    weights = list(brain.modules.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in [*weights, *weights, *states]) / 2**20


def chunk_settings(sampler):
    """Full context and, for a model that trains with dynamic chunks, the smallest setting."""
    return [None, DynChunkTrainConfig(sampler.chunk_size_min, sampler.left_context_chunks_min)] if sampler else [None]


def needs(file, overrides, lengths=LENGTHS):
    """Number of parameters, state in MiB, and saved MiB of an utterance per second and per second squared."""
    with tempfile.TemporaryDirectory() as folder:
        brain = make_brain(None, folder, overrides, file)
        hparams = brain.hparams
        brain.passes_of = lambda stage: brain.passes[-1:]  # the last pass, which runs the whole encoder
        rate = TOKENS_PER_SECOND.get(hparams.vocab_size, max(TOKENS_PER_SECOND.values()))
        kept = []
        for length in lengths:
            found = []
            for config in chunk_settings(hparams.chunk_sampler):
                brain.draw_chunks = lambda stage, config=config: config
                found.append(kept_mib(brain, make_batch(2, length, rate, hparams.vocab_size)) / 2)
            kept.append(max(found))
        # The fit minimises relative errors
        terms = np.array([[1, length] for length in lengths])
        (linear, square), *_ = np.linalg.lstsq(terms, np.array(kept) / np.array(lengths), rcond=None)
        parameters = sum(parameter.numel() for parameter in brain.modules.parameters())
        return parameters, state_mib(brain), linear, max(0.0, square)


def seconds_that_fit(gib, state, linear, square, utterance=UTTERANCE, slowest=1.0):
    """Seconds of audio of a batch that fits, rounded down to tens."""
    room = 1024 * gib - CUDA - state
    return max(0, int(room / BACKWARD / (linear + square * utterance / slowest) * slowest // 10 * 10))


@functools.cache
def slowest_speed(file):
    """The slowest speed of speed perturbation; 1 without."""
    with tempfile.TemporaryDirectory() as folder:
        augment = load_hparams(ROOT / "hparams" / file, {"output_folder": folder})["wav_augment"]
    return min([100, *getattr(augment, "speeds", ())]) / 100


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", metavar="NAME", help="names of files in hparams/, without .yaml; by default all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.csv")
    arguments = parser.parse_args()
    # finetune.yaml takes its sizes from a model
    names = arguments.files or sorted(path.stem for path in (ROOT / "hparams").glob("*.yaml") if path.stem != "finetune")
    rows = []
    for name, checkpointing in ((name, checkpointing) for name in names for checkpointing in (False, True)):
        file = f"{name}.yaml"
        parameters, state, linear, square = needs(file, {"activation_checkpointing": checkpointing})
        fitting = [seconds_that_fit(size, state, linear, square, slowest=slowest_speed(file)) for size in SIZES]
        rows.append((file, checkpointing, parameters, round(state), round(linear, 3), round(square, 4), *fitting))
        print(*rows[-1], sep="\t", flush=True)
    write_csv(arguments.output, FIELDS, rows)


if __name__ == "__main__":
    main()
