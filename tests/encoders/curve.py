"""A short training with CTC on made-up data, in one process or in several: torchrun --nproc_per_node N curve.py ENCODER OUTPUT

The batch of each step is the same for any number of processes: each process takes its share of the utterances.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.nn  # before the process group: its default arguments would keep it until exit, where gloo may abort
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from speechbrain_ext.lobes.masks import padding_mask
from speechbrain_ext.registry import build_encoder

STEPS, UTTERANCES, FRAMES, BINS, TOKENS = 12, 4, 40, 12, 6


class Net(torch.nn.Module):
    """Linear, encoder, linear."""

    def __init__(self, name):
        super().__init__()
        self.input = torch.nn.Linear(BINS, 16)
        self.encoder = build_encoder(name, d_model=16, nhead=2, num_layers=4, d_ffn=32, dropout=0.0, kernel_size=5)
        self.output = torch.nn.Linear(16, TOKENS)

    def forward(self, x, mask):
        return self.output(self.encoder(self.input(x), src_key_padding_mask=mask)[0]).log_softmax(-1)


def main(name, output):
    """Train, and write losses and statistics from the first process."""
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    net = DistributedDataParallel(Net(name))
    # Not Adam: it makes full steps of the rounding errors of biases before a BatchNorm
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(UTTERANCES, FRAMES, BINS, generator=data)
        lengths = torch.randint(20, FRAMES + 1, (UTTERANCES,), generator=data)
        targets = torch.randint(1, TOKENS, (UTTERANCES, 5), generator=data)
        mine = slice(rank * UTTERANCES // world, (rank + 1) * UTTERANCES // world)
        log_probs = net(x[mine], padding_mask(lengths[mine], FRAMES))
        loss = torch.nn.functional.ctc_loss(
            log_probs.transpose(0, 1), targets[mine], lengths[mine], torch.full_like(lengths[mine], 5), reduction="none"
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        losses.append(total.item() / world)
    if rank == 0:
        statistics = [buffer.tolist() for buffer in net.buffers()]
        with open(output, "w") as file:
            json.dump({"losses": losses, "statistics": statistics}, file)
    distributed.barrier()  # the first process still answers the others
    del net  # its threads must end before the process group
    distributed.destroy_process_group()
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], f"The process group is still alive: {threads}"


if __name__ == "__main__":
    main(*sys.argv[1:])
