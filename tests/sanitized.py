"""A small step of a GPU backend, for compute-sanitizer: ``python -m tests.sanitized BACKEND``."""

import sys

import torch

from .buckets import bucket_of, gradients

# Every kind of row: short, long, too long for registers, not aligned, in several tiles, empty.
SHAPES = [(70, 64), (20, 1000), (5, 2048), (9, 4096), (3, 20000), (130, 31), (33, 7), (2, 9001),
          (0, 8), (1, 1)]  # fmt: skip


def main(backend: str) -> None:
    """Take two steps in every dtype: both launches, and the two halves of the second one alone."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = [torch.randn(s, device="cuda").to(dtype) for s in SHAPES]
        bucket = bucket_of([*weights, torch.randn(70, device="cuda").to(dtype)], backend)
        bucket.iterate(1)
        grads = gradients(bucket)
        bucket.iterate_and_add_gradient(1, grads)
        torch.cuda.synchronize()
        assert all(torch.isfinite(g).all() for g in grads)


if __name__ == "__main__":
    main(sys.argv[1])
