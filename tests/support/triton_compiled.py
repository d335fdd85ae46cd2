"""Compiles the Triton kernels for GPUs that are not there, and reads what came out.

``python -m tests.support.triton_compiled`` prints a line per kernel, variant and architecture.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from spectral_kernels.backends.triton.precompile import Description, compile_for, core, describe
from spectral_kernels.backends.triton.sizes import sizes
from spectral_kernels.backends.triton.tables import TYPES
from spectral_kernels.engine.bucket import TOLERANCE
from spectral_kernels.tables.schema import N_VECTORS

CAPABILITIES = (80, 90, 100)
# Bytes of shared memory of a multiprocessor, of which a program takes RESERVED more than it asks.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED = 1024
REGISTERS, THREADS = 65_536, 2048  # of a multiprocessor


class Compiled(NamedTuple):
    """What the compiler made: registers and bytes of stack per thread, shared bytes, code."""

    registers: int
    stack: int
    shared: int
    warps: int
    ptx: str
    sass: str

    def loads(self, bits: int) -> int:
        """Count loads from global memory of ``bits`` at once, to registers or shared memory."""
        found = self.sass.count(f"LDGSTS.E.BYPASS.{bits}") + self.sass.count(f"LDGSTS.E.{bits}")
        for vector, size in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", self.ptx):
            found += int(vector or 1) * int(size) == bits
        return found

    def programs(self, capability: int) -> int:
        """Return how many programs run on a multiprocessor at once."""
        threads = 32 * self.warps
        per_thread = -(-self.registers // 8) * 8
        return min(
            REGISTERS // (per_thread * threads),
            SHARED[capability] // (self.shared + RESERVED),
            THREADS // threads,
        )


def usual(dtype: torch.dtype) -> list[Description]:
    """Return what usual steps of both optimizers and of the regularizer start, with one vector.

    With float16 only the core: it differs from bfloat16 in conversions alone.
    """
    adamw = {"rule": 0, "with_moment": True, "decoupled": False, "products": True}
    changes = {
        torch.float32: [
            {"decoupled": True},
            {"decoupled": 2},
            {"rule": 1},
            {"rule": 1, "with_moment": False},
        ],
        torch.bfloat16: [
            {"decoupled": True},
            {"decoupled": 3},
            {"rule": 1},
            {"moment_type": torch.float32},
        ],
        torch.float16: [],
    }
    return [
        *core(dtype),
        *(describe("update", dtype, **{"moment_type": dtype, **adamw, **c})
          for c in changes[dtype]),
    ]  # fmt: skip


def rare(dtype: torch.dtype) -> Iterator[Description]:
    """Yield what else is started with one vector: evaluation, other gradients, a tolerance.

    None with float16, as in ``usual``.
    """
    if dtype == torch.float16:
        return
    plain = {"grad_type": dtype, "finish": True, "with_t": True, "gradient": True,
             "accumulate": True, "tolerance": 0.0}  # fmt: skip
    finish = {**plain, "gradient": False, "accumulate": False}
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    yield describe("gram_matvec", dtype, with_t=False, tolerance=0.0)
    yield describe("gram_matvec_long", dtype, with_t=True, tolerance=0.0)
    yield describe("rank_one", dtype, **{**plain, "grad_type": other})
    if dtype == torch.float32:  # finishing reads no weight
        yield describe("rank_one", dtype, **{**finish, "with_t": False})
        yield describe("rank_one", dtype, **{**finish, "tolerance": TOLERANCE})
        yield describe("gram_matvec", dtype, with_t=True, tolerance=TOLERANCE)


def several_vectors(dtype: torch.dtype) -> Iterator[Description]:
    """Yield the main ones with several vectors, and with a tolerance; few, for the time they take.

    Numbers of vectors above four differ little in the products, and dtypes not at all in the rest.
    """
    plain = {"with_t": True, "tolerance": 0.0}
    several = {
        torch.float32: [(4, {}), (16, {})],
        torch.bfloat16: [(2, {"with_t": False}), (8, {"tolerance": TOLERANCE})],
        torch.float16: [],
    }
    cap = {"moment_type": dtype, "rule": 0, "with_moment": True, "products": False, "decoupled": 2}
    if dtype != torch.float16:
        yield describe("update", dtype, **cap, terms=4, each=True)
    for r, changes in several[dtype]:
        yield describe("subspace_products", dtype, r, **{**plain, **changes})
    if dtype == torch.float32:
        yield next(d for d in core(dtype, 4) if d.kernel == "update")
        for r in N_VECTORS[1:]:
            yield describe("ritz", None, r, with_t=True, tolerance=TOLERANCE if r == 8 else 0.0)
        yield describe("subspace_grams", dtype, 16, tolerance=0.0)


def operators(dtype: torch.dtype) -> list[Description]:
    """Return what steps start with convolutions as operators; none with float16."""
    if dtype == torch.float16:
        return []
    gradient = {"grad_type": dtype, "finish": False, "with_t": False, "gradient": True,
                "accumulate": True, "tolerance": 0.0, "terms": 2}  # fmt: skip
    step = {"moment_type": dtype, "rule": 0, "with_moment": True, "products": False, "terms": 2}
    found = [
        describe("rank_one", dtype, **gradient),
        *(describe("update", dtype, **step, decoupled=x) for x in (False, True)),
    ]
    if dtype == torch.float32:
        found += [describe("waves", None, with_t=True, tolerance=x) for x in (0.0, TOLERANCE)]
    return found


def partials(dtype: torch.dtype) -> Iterator[Description]:
    """Yield the kernels of partial results, for all numbers of vectors; with bfloat16 for four."""
    numbers = {torch.float32: N_VECTORS, torch.bfloat16: (4,), torch.float16: ()}
    for r in numbers[dtype]:
        tolerance = TOLERANCE if r == 8 else 0.0
        yield describe("transposed", dtype, r, with_t=True, tolerance=tolerance)
        if dtype == torch.float32 and r == 1:
            yield describe("collect_chunks", None, with_t=True)
        elif dtype == torch.float32:
            yield describe("collect", None, r, with_t=r != 2)


def largest() -> Iterator[Description]:
    """Yield the kernels with the most vectors, which need the most registers."""
    most, plain = N_VECTORS[-1], {"with_t": True, "tolerance": 0.0}
    yield describe("subspace_products", torch.float32, most, **plain)
    yield describe("ritz", None, most, **plain)
    yield describe("transposed", torch.float32, most, **plain)


@cache
def compiled(configuration: Description, capability: int) -> Compiled:
    """Compile for a compute capability (90 for 9.0)."""
    made = compile_for(capability, configuration)
    own = sizes(capability, 4, configuration.r)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage = dict(re.findall(r"\b(REG|STACK):(\d+)", _dump("-res-usage", file.name)))
        sass = _dump("-sass", file.name)
    warps = getattr(own, f"{configuration.kernel}_warps")
    return Compiled(int(usage["REG"]), int(usage["STACK"]), made.metadata.shared, warps,
                    made.asm["ptx"], sass)  # fmt: skip


def _dump(option: str, file: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(f"{'kernel':90} {'sm':>4} {'registers':>9} {'stack':>5} {'shared':>6} {'programs':>8} "
          f"{'128-bit loads':>13}")  # fmt: skip
    for dtype in TYPES:
        for sm in CAPABILITIES:
            for chosen in (*usual(dtype), *rare(dtype), *several_vectors(dtype),
                           *partials(dtype)):  # fmt: skip
                c = compiled(chosen, sm)
                print(f"{chosen!s:90} {sm:4} {c.registers:9} {c.stack:5} {c.shared:6} "
                      f"{c.programs(sm):8} {c.loads(128):13}", flush=True)  # fmt: skip
