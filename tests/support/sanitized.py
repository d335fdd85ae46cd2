"""Small steps of a GPU backend for compute-sanitizer: ``python -m tests.support.sanitized NAME``.

Needs PYTORCH_NO_CUDA_MEMORY_CACHING=1 in the environment: each tensor is then an allocation.
"""

import os
import sys

import torch
from torch import nn

from bench.gpu.outside import NOT_AVAILABLE
from spectral_kernels import SpectralAdamW, SpectralSGD
from spectral_kernels.backends import choice

from .buckets import bucket_of, gradients

# Every kind of row: short, long, too long for registers, not aligned, in several tiles, empty.
SHAPES = [(70, 64), (20, 1000), (5, 2048), (9, 4096), (3, 20000), (130, 31), (33, 7), (2, 9001),
          (0, 8), (1, 1), (70,)]  # fmt: skip


def main(backend: str, device: str) -> None:
    """Take two steps in every dtype: both launches, and the two halves of the second one alone.

    Between them compute the partial results of a given s and their sums. Then take two steps of
    both optimizers; the second is skipped as by a GradScaler. With several vectors, stale matrices
    get two extra iterations.
    """
    for dtype, r in ((torch.float32, 1), (torch.bfloat16, 1), (torch.float16, 1),
                     (torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 16)):  # fmt: skip
        weights = [(torch.randn(s, device=device) / s[-1] ** 0.5).to(dtype) for s in SHAPES]
        bucket = bucket_of(weights, backend, r=r, extra_iterations=2 if r > 1 else 0)
        bucket.iterate(1)
        bucket.backend.transposed(bucket.plan, bucket.state)
        t = torch.empty_like(bucket.state.v)
        gram = torch.empty(len(bucket.plan.matrices) * r * r, dtype=torch.float64, device=device)
        bucket.backend.collect(bucket.plan, bucket.state, t, gram)
        grads = gradients(bucket)
        bucket.begin(1)
        bucket.finish(1, grads)
        assert all(torch.isfinite(g).all() for g in grads)
        for kind in (SpectralAdamW, SpectralSGD):
            named = [(f"{i}.weight" if w.dim() > 1 else f"{i}.bias", nn.Parameter(w.clone()))
                     for i, w in enumerate(weights)]  # fmt: skip
            optimizer = kind([*named, ("other", nn.Parameter(weights[-1].clone()))], 1e-3,
                             n_vectors=r, backend=backend)  # fmt: skip
            parameters = optimizer.param_groups[0]["params"]
            for found_inf in (0, 1):
                for p in parameters:
                    p.grad = torch.randn_like(p)
                optimizer.grad_scale = torch.tensor(2.0, device=device)
                optimizer.found_inf = torch.tensor(float(found_inf), device=device)
                optimizer.step()
            assert all(torch.isfinite(p).all() for p in parameters)
        print(f"done: {dtype}, vectors: {r}", flush=True)


if __name__ == "__main__":
    if not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        sys.exit("set PYTORCH_NO_CUDA_MEMORY_CACHING=1: in memory that torch has cut up, accesses "
                 "beyond a tensor are not seen")  # fmt: skip
    if (reason := choice.unavailable(sys.argv[1])) is not None:
        sys.exit(NOT_AVAILABLE + reason)
    main(sys.argv[1], "cuda")
