"""Inputs of the stages, made on the device; tiny ones for a dry run."""

from __future__ import annotations

import torch
from torch import nn

from spectral_kernels import SpectralRegularizer
from tests.support import cases

from ..support import devices, gate

MOST_SETS = 8
STRENGTH = 1e-6  # gradients that no backward() resets must not grow

# Most important first.
CASES = ("vit_b", "llama_1b", "gpt2", "resnet18", "one_huge", "mlp")
KERNELS = (*((case, "bfloat16") for case in CASES), ("vit_b", "float32"), ("resnet18", "float32"))
OPTIMIZERS = (("vit_b", "bfloat16"), ("llama_1b", "bfloat16"), ("resnet18", "float32"))
LOOPS = (("vit_b", "bfloat16"), ("resnet18", "bfloat16"), ("llama_1b", "bfloat16"))
SEVERAL = ("vit_b", "bfloat16")  # with four vectors, and with "auto" iterations

# For Triton's interpreter, where a block takes milliseconds.
_TINY = {
    "vit_b": [(24, 32), (33, 24)], "llama_1b": [(40, 32), (16, 40)], "gpt2": [(24, 40)],
    "resnet18": [(16, 27), (40, 16)], "one_huge": [(48, 64)], "mlp": [(10, 12), (3, 10)],
}  # fmt: skip
# For the comparison with float64: rows aligned for wide loads or not, or longer than a program
# holds, a single row or column, many tiles.
_RAGGED = [(3001, 768), (1000, 3072), (513, 4097), (129, 20000), (20011, 33), (4096, 4096),
           (50, 50257), (70001, 1), (1, 70001), (2050, 1023)]  # fmt: skip
_TINY_RAGGED = [(65, 32), (20, 33), (3, 600), (70, 1), (1, 70)]


def shapes(case: str, dry_run: bool) -> list[tuple[int, int]]:
    """Return the (M, N) of a case's matrices."""
    return _TINY[case] if dry_run else cases.CASES[case]()


def ragged_shapes(dry_run: bool) -> list[tuple[int, int]]:
    """Return the (M, N) for the comparison with float64."""
    return _TINY_RAGGED if dry_run else _RAGGED


def input_sets(shapes, dtype: torch.dtype, device: str) -> list[list[torch.Tensor]]:
    """Return sets of weights with gradients, enough to exceed the L2 cache, at most MOST_SETS."""
    n_bytes = 2 * sum(m * n for m, n in shapes) * dtype.itemsize
    n_sets = min(devices.input_sets(device, n_bytes), MOST_SETS)
    return [gate.leaves(shapes, dtype, device, seed) for seed in range(n_sets)]


def are_cold(shapes, dtype: torch.dtype, device: str) -> bool:
    """Return whether the sets together exceed the L2 cache of a GPU."""
    n_bytes = 2 * sum(m * n for m, n in shapes) * dtype.itemsize
    return device == "cuda" and devices.input_sets(device, n_bytes) <= MOST_SETS


def regularizer(weights, backend: str, n_vectors: int = 1, iterations: int | str = 1):
    """Return a regularizer of ``weights``, which have gradients."""
    named = [(f"{i}.weight", w) for i, w in enumerate(weights)]
    return SpectralRegularizer(
        named, STRENGTH, n_power_iterations=iterations, n_vectors=n_vectors, backend=backend,
        warmup=1,
    )  # fmt: skip


def layers(case: str, dry_run: bool, device: str, dtype: torch.dtype):
    """Return a function that builds layers with a case's matrices and biases, on the device."""

    def build() -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(n, m, device=device, dtype=dtype) for m, n in shapes(case, dry_run))
        )

    return build
