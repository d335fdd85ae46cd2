"""``python -m bench.bounds.cost``: steps of SpectralAdamW that hold weights beside those that pull.

Medians of steps taken in turn, over that of the decoupled penalty with as many vectors; the targets
are such that a cap acts in every step.
"""

from __future__ import annotations

import argparse
import copy
import sys
from datetime import date
from statistics import median

import torch
from torch import nn

from spectral_kernels import SpectralAdamW
from spectral_kernels.cli.env import processor

from ..support import interleave, models

WAYS = {
    "penalty": {}, "cap": {"constraint": "cap"}, "sphere": {"constraint": "sphere"},
    "penalty, 4 vectors": {"n_vectors": 4}, "cap, 4 vectors": {"n_vectors": 4, "constraint": "cap"},
}  # fmt: skip


def step(model: nn.Module, **options):
    """Return a function that takes a step of a copy of ``model``."""
    own = copy.deepcopy(model)
    # Every step adds less than the target, and so much that a cap acts in the next one.
    optimizer = SpectralAdamW(own, lr=1e-4, decoupled=True, target=0.5, **options)
    for p in own.parameters():
        p.grad = torch.randn_like(p)
    return optimizer.step


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.bounds.cost", description=__doc__)
    parser.add_argument("--models", default="policy,mlp,resnet18")
    parser.add_argument("--rounds", default=15, type=int)
    parser.add_argument("--threads", default=1, type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| model | " + " | ".join(WAYS) + " |")
    print("|---" * (1 + len(WAYS)) + "|")
    for name in options.models.split(","):
        torch.manual_seed(0)
        model = getattr(models, name)()
        steps = {way: step(model, **chosen) for way, chosen in WAYS.items()}
        found = {way: median(x) for way, x in
                 interleave.measure_steps(steps, options.rounds, 0.1).items()}  # fmt: skip
        cells = [name]
        for way, seconds in found.items():
            base = found["penalty, 4 vectors" if "4" in way else "penalty"]
            cells.append(f"{seconds * 1e6:.0f} us ({seconds / base:.2f})")
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{processor()}, threads {options.threads}, torch {torch.__version__}, {date.today()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
