"""Continual learning with a head that grows, as Avalanche's IncrementalClassifier does.

Shows: the head is replaced by a wider one for every task, and the regularizer follows by itself;
the optimizer has to be given the new parameters. ``--heads`` has a head per task instead: those of
other tasks get strength 0, and are left alone. docs/continual.md has more.

    python examples/growing_heads.py --tasks 5
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from spectral_kernels import SpectralAdamW

CLASSES = 2  # that a task adds


class GrowingHead(nn.Module):
    """A linear layer that gets a row for every new class; old rows stay."""

    def __init__(self, features: int):
        super().__init__()
        self.classifier = nn.Linear(features, CLASSES)

    @torch.no_grad()
    def grow(self, classes: int) -> None:
        old = self.classifier
        self.classifier = nn.Linear(old.in_features, classes)
        self.classifier.weight[: old.out_features] = old.weight
        self.classifier.bias[: old.out_features] = old.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x)


class Heads(nn.ModuleList):
    """A head per task, of which one is in use."""

    task = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[self.task](x)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="per task")
    parser.add_argument("--strength", type=float, default=1e-2)
    parser.add_argument("--heads", action="store_true", help="a head per task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    head = Heads([nn.Linear(64, CLASSES)]) if options.heads else GrowingHead(64)
    model = nn.Sequential(body, head)
    optimizer = SpectralAdamW(model, lr=3e-3, strength=options.strength)
    found = []
    for task in range(options.tasks):
        if task and options.heads:
            head.append(nn.Linear(64, CLASSES))
            optimizer.add_param_group({"params": list(head[task].parameters())})
            optimizer.reselect()  # takes in a module that was added; replaced ones are followed
        elif task:
            head.grow(CLASSES * (task + 1))
            optimizer.add_param_group({"params": list(head.parameters())})
        if options.heads:
            head.task, own = task, options.strength
            optimizer.strength = {f"1.{task}.*": own, "1.*": 0, "*": own}

        labels = torch.randint(CLASSES, (64,)) + (0 if options.heads else CLASSES * task)
        x = torch.randn(64, 16)  # points of random classes, to be memorized
        for _ in range(options.steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
        right = float((model(x).argmax(1) == labels).float().mean())
        found.append({"accuracy": right, "sigma_max": float(optimizer.sigma.max())})
        *_, last = optimizer.report()
        print(f"task {task}: accuracy {right:.2f}, largest sigma {found[-1]['sigma_max']:.3f}; "
              f"{last.name} is {last.shape[0]} x {last.shape[1]}")  # fmt: skip
    return {"tasks": found, "shapes": {row.name: row.shape for row in optimizer.report()}}


if __name__ == "__main__":
    main()
