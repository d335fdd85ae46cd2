"""FSDP2 in ten lines, on CPUs or GPUs.

``torchrun --standalone --nproc-per-node 2 -m bench.sharded.fsdp_example``
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from spectral_kernels import SpectralAdamW


def main() -> None:
    """Train a small transformer whose weights are sharded over the ranks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0, batch_first=True)
    head = nn.Sequential(nn.Linear(64, 10), nn.LogSoftmax(-1))
    model = nn.Sequential(nn.TransformerEncoder(layer, 3), head).to(device)

    for block in model[0].layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = SpectralAdamW(model, lr=1e-3, strength=1e-2)  # built after fully_shard

    torch.manual_seed(dist.get_rank())  # each rank has different data
    x, y = torch.randn(32, 16, 64, device=device), torch.randint(10, (32, 16), device=device)
    for step in range(51):
        loss = nn.functional.nll_loss(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and dist.get_rank() == 0:
            sigma = optimizer.sigma
            print(f"step {step:3}  loss {float(loss.detach()):.3f}  "
                  f"sigma_1 of {len(sigma)} whole matrices: median {float(sigma.median()):.3f}, "
                  f"largest {float(sigma.max()):.3f}")  # fmt: skip
    optimizer.regularizer.check_ranks()
    dist.destroy_process_group()
    if device == "cpu":
        # A gloo thread that frees a tensor of the last collective during Python's shutdown aborts
        # the process (torch 2.13): exit without that shutdown.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
