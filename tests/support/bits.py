"""Hashes of the results of 20 steps, to detect changes: ``python -m tests.support.bits``.

Prints a line for every way to use the package, backend, instruction-set level, dtype and number of
vectors: a hash of weights, gradients, sigmas, residuals and vectors. A change that keeps behaviour
keeps every line. With TRITON_INTERPRET=1 only the kernels of Triton.
"""

import hashlib
import importlib
import os

import torch
from torch import nn

from spectral_kernels import SpectralAdamW, SpectralRegularizer, SpectralSGD

STEPS = 20
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Net(nn.Module):
    """Layers of every layout that kernels tell apart, with ragged shapes."""

    def __init__(self, dtype):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)
        self.last = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        self.norm = nn.LayerNorm(21)
        self.attention = nn.MultiheadAttention(12, 2)
        self.linear = nn.Linear(33, 70)
        self.aligned = nn.Linear(64, 130)
        self.transposed = nn.Linear(19, 24)
        self.column, self.row = nn.Linear(1, 9), nn.Linear(9, 1)
        self.table = nn.Embedding(7, 5)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
        self.to(dtype)
        self.transposed.weight = nn.Parameter(self.transposed.weight.detach().t().contiguous().t())


def hashed(model, penalty):
    """Return a hash of the bits of ``model`` and of the regularizer or optimizer ``penalty``."""
    digest = hashlib.sha256()
    state = penalty.state_dict()
    vectors = state.get("vectors") or {
        f"{i} {name}": x for i, own in state["state"].items() for name, x in own.items()
        if isinstance(x, torch.Tensor)
    }  # fmt: skip
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    found = [*model.parameters(), *grads, penalty.singular_values, penalty.residuals,
             *(vectors[name] for name in sorted(vectors))]  # fmt: skip
    for tensor in found:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def trained(way, backend, dtype, r, steps=STEPS):
    """Return the hash after ``steps`` steps on random gradients."""
    torch.manual_seed(0)
    model = Net(dtype)
    options = {"strength": 0.05, "n_vectors": r, "backend": backend}
    if way in ("adamw", "sgd", "decoupled", "auto"):
        kind = SpectralSGD if way == "sgd" else SpectralAdamW
        own = {"momentum": 0.9} if way == "sgd" else {"decoupled": way == "decoupled"}
        iterations = "auto" if way == "auto" else 1
        optimizer = penalty = kind(model, 1e-2, n_power_iterations=iterations, **own, **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        iterations = "auto" if way == "attach" else 2
        penalty = SpectralRegularizer(model, n_power_iterations=iterations, **options)
        if way == "attach":
            penalty.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        if way == "penalty":
            penalty.penalty().backward()
        for p in model.parameters():
            g = torch.randn(p.shape).to(dtype)
            p.grad = g.as_strided(p.shape, p.stride()) if p.grad is None else p.grad + g
        if way == "accumulate":
            penalty.accumulate_grad_()
        optimizer.step()
    return hashed(model, penalty)


def main():
    """Print the hashes."""
    torch.set_num_threads(2)
    native = importlib.import_module("spectral_kernels._native").cpu
    if os.environ.get("TRITON_INTERPRET"):
        runs = [("triton", None, 2)]
    else:
        runs = [("reference", None, STEPS), *(("cpu", level, STEPS) for level in native.levels())]
    for backend, level, steps in runs:
        if level is not None:
            native.set_level(level)
        for way in ("penalty", "accumulate", "attach", "adamw", "sgd", "decoupled", "auto"):
            for dtype in DTYPES:
                if backend == "triton" and dtype == torch.float64:
                    continue
                for r in (1, 4):
                    found = trained(way, backend, dtype, r, steps)
                    name = str(dtype).removeprefix("torch.")
                    print(f"{backend} {level or ''} {way} {name} r={r}: {found}", flush=True)


if __name__ == "__main__":
    main()
