"""Compiles the kernels of a usual step ahead of the first one, in several processes.

``python -m spectral_kernels.backends.triton.precompile 90 bfloat16 float32`` fills Triton's cache
(TRITON_CACHE_DIR) for compute capability 9.0. No GPU is needed: Triton is told what it compiles
for, and a process on the GPU finds the results under the same keys if its Triton and Python are of
the same versions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from .launch import Variant, capability_of, variant


class Description(NamedTuple):
    """Arguments of ``launch.variant``, in a form that can be sent to another process."""

    kernel: str
    dtype: torch.dtype | None
    r: int
    constants: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        chosen = [n if x is True else f"{n}={x}" for n, x in self.constants if x is not False]
        dtype = [] if self.dtype is None else [str(self.dtype)[6:]]
        return " ".join([self.kernel, *dtype, *([f"r={self.r}"] if self.r > 1 else []), *chosen])

    def variant(self, capability: int) -> Variant:
        """Return the variant for a compute capability (90 for 9.0)."""
        return variant(self.kernel, capability, self.dtype, self.r, **dict(self.constants))


def describe(kernel: str, dtype: torch.dtype | None, r: int = 1, **constants) -> Description:
    """Return a description; ``constants`` as for ``launch.variant``."""
    return Description(kernel, dtype, r, tuple(constants.items()))


def core(dtype: torch.dtype, r: int = 1) -> list[Description]:
    """Return what SpectralRegularizer and SpectralAdamW start for weights of ``dtype``.

    Rows of more than 8,192 columns have one more kernel.
    """
    usual = {"with_t": True, "tolerance": 0.0}
    gradient = {"grad_type": dtype, "finish": False, "with_t": False, "gradient": True,
                "tolerance": 0.0}  # fmt: skip
    finish = {"grad_type": dtype, "finish": True, "with_t": True, "tolerance": 0.0}
    step = {"rule": 0, "with_moment": True, "decoupled": 0, "products": r == 1}
    found = [
        describe("update", dtype, moment_type=dtype, **step),
        describe("rank_one", dtype, **gradient, accumulate=False),
    ]
    if r == 1:
        return [
            *found,
            describe("gram_matvec", dtype, **usual),
            *([describe("gram_matvec", dtype, **usual, large=True)] if dtype.itemsize == 2 else []),
            describe("rank_one", dtype, **finish, gradient=True, accumulate=True),
            describe("rank_one", dtype, **finish, gradient=False, accumulate=False),
        ]
    return [
        *found,
        describe("rank_one", dtype, **gradient, accumulate=True),
        describe("subspace_products", dtype, r, **usual),
        describe("ritz", None, r, **usual),
        *([describe("subspace_grams", dtype, r, tolerance=0.0)] if r > 4 else []),
    ]


class _Target:
    """Stands for Triton's driver where kernels are compiled for a GPU that need not be there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Return a number under which Triton keeps what it has compiled, one per target."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Return a stream, which is not used."""
        return 0


def compile_for(capability: int, description: Description):
    """Return Triton's compiled kernel, which cannot be launched in this process."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Target(capability))
    try:
        return description.variant(capability).compile()
    finally:
        driver._active = before


def _timed(capability: int, description: Description) -> tuple[float, str | None]:
    start = time.perf_counter()
    try:
        compile_for(capability, description)
    except Exception as error:  # whatever a compiler has to say
        return time.perf_counter() - start, f"{type(error).__name__}: {error}"
    return time.perf_counter() - start, None


def compile_core(
    device: torch.device | int,
    dtypes: Sequence[torch.dtype],
    n_vectors: Sequence[int] = (1,),
    processes: int | None = None,
) -> Iterator[tuple[str, float, str | None]]:
    """Compile what usual steps need; yield (what, seconds, error or None) as each is done.

    Args:
        device: a CUDA device, or a compute capability (90 for 9.0).
        dtypes: of the weights, of float32, bfloat16 and float16.
        n_vectors: numbers of vectors per matrix.
        processes: how many at once; None: one per processor.

    Raises:
        RuntimeError: Triton interprets, or the device is a CPU.
    """
    capability = device if isinstance(device, int) else capability_of(device)
    if not capability or triton.knobs.runtime.interpret:
        raise RuntimeError("there is nothing to compile: the kernels are interpreted")
    every = {d: None for r in n_vectors for dtype in dtypes for d in core(dtype, r)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {pool.submit(_timed, capability, d): d for d in every}
        for future in as_completed(running):
            yield str(running[future]), *future.result()


def main(arguments: Sequence[str]) -> int:
    """Compile for a capability and dtypes given by name; the exit code is 1 where one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m spectral_kernels.backends.triton.precompile",
        description="Compile the kernels of usual steps into Triton's cache; needs no GPU.",
    )
    parser.add_argument("capability", type=int, help="compute capability: 90 for 9.0")
    names = ["float32", "bfloat16", "float16"]
    parser.add_argument("dtype", nargs="+", choices=names, help="of the weights")
    given = parser.parse_args(arguments)
    failed, dtypes = 0, [getattr(torch, name) for name in given.dtype]
    for what, seconds, error in compile_core(given.capability, dtypes):
        print(f"{seconds:6.1f} s  {what}{'' if error is None else f': {error}'}", flush=True)
        failed |= error is not None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
