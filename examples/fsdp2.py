"""FSDP2: a sharded model, its checkpoint by torch.distributed.checkpoint, on CPUs or GPUs.

Shows: SpectralAdamW on sharded weights, whose sigma are those of the whole matrices; vectors,
moments and weights are saved together, and loaded by any number of ranks. Run it again, with
another number, and it goes on:

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --checkpoint /tmp/fsdp2
    torchrun --standalone --nproc-per-node 1 examples/fsdp2.py --checkpoint /tmp/fsdp2
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from spectral_kernels import SpectralAdamW


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=51)
    parser.add_argument("--strength", type=float, default=1e-2)
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, and to save in")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(options.seed)  # the same weights on every rank
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3), nn.Linear(64, 10)).to(device)
    for block in model[0].layers:
        fully_shard(block)
    fully_shard(model)
    optimizer = SpectralAdamW(model, lr=1e-3, strength=options.strength)  # after fully_shard

    if options.checkpoint is not None and (options.checkpoint / ".metadata").exists():
        weights, states = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": states}
        dcp.load(saved, checkpoint_id=options.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=saved["model"],
                       optim_state_dict=saved["optimizer"])  # fmt: skip
        if rank == 0:
            largest = f"{float(optimizer.sigma.max()):.6f}"
            print(f"loaded by {world} ranks, largest sigma_1 {largest}", flush=True)

    x, y = torch.randn(32, 16, 64, device=device), torch.randint(10, (32, 16), device=device)
    x, y = x.chunk(world)[rank], y.chunk(world)[rank]  # each rank has its part of the batch
    for step in range(options.steps):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                sigma = optimizer.sigma
                print(f"step {step:3}  loss {float(mean) / world:.5f}  "
                      f"sigma_1 of {len(sigma)} whole matrices: "
                      f"median {float(sigma.median()):.5f}, "
                      f"largest {float(sigma.max()):.5f}", flush=True)  # fmt: skip
    optimizer.regularizer.check_ranks()

    if options.checkpoint is not None:
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=options.checkpoint)
        if rank == 0:
            largest = f"{float(optimizer.sigma.max()):.6f}"
            print(f"saved by {world} ranks, largest sigma_1 {largest}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if device == "cpu":
        # A gloo thread that frees a tensor of the last collective during Python's shutdown aborts
        # the process (torch 2.13): exit without that shutdown.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
