"""Muon for the matrices, AdamW for the rest, one regularizer for both.

Shows: ``attach([muon, adamw], decoupled=True)``. Muon orthogonalizes the gradient, and a penalty
in it would be lost; decoupled, it acts on the weights, on one singular value of a matrix per step.
``--constraint cap`` holds 16 of them at the target instead, since Muon moves all. ``--compile``
compiles the model; the optimizers' steps run between its graphs.

    python examples/muon_adamw.py --steps 200
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from spectral_kernels import SpectralRegularizer, spectral_norms


class Model(nn.Module):
    """The next of some tokens, from an embedding and two hidden layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.hidden = nn.Sequential(nn.Linear(8 * 32, 128), nn.GELU(), nn.LayerNorm(128),
                                    nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128))  # fmt: skip
        self.head = nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embedding(x).flatten(1)))


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--strength", type=float, default=10.0)
    parser.add_argument("--target", type=float, default=2.0)
    parser.add_argument("--constraint", choices=["cap", "sphere"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    model = Model()
    matrices = [m.weight for m in model.hidden if isinstance(m, nn.Linear)]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0)
    adamw = torch.optim.AdamW(rest, lr=2e-3)

    reg = SpectralRegularizer(
        model, strength=options.strength, target=options.target, side="above",
        n_vectors=16 if options.constraint == "cap" else 1,
    )  # fmt: skip
    reg.attach([muon, adamw], decoupled=True, constraint=options.constraint)
    before = max(spectral_norms(model).values())
    forward = torch.compile(model) if options.compile else model

    tokens = torch.randint(64, (512, 9))
    for step in range(options.steps):
        batch = tokens[torch.randint(512, (64,))]
        loss = nn.functional.cross_entropy(forward(batch[:, :8]), batch[:, 8])
        loss.backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}  "
                  f"largest sigma {float(reg.sigma.max()):.3f}")  # fmt: skip
    after = max(spectral_norms(model).values())
    print(f"largest sigma {before:.3f} -> {after:.3f}")
    return {"loss": loss.item(), "sigma_max": after}


if __name__ == "__main__":
    main()
