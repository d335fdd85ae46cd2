"""Compiles the Triton kernels for GPUs that are not there, and reads what came out.

``python -m tests.triton_compiled`` prints a line per kernel, configuration and architecture.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectral_kernels._triton.backend import FUSED, TYPES
from spectral_kernels._triton.gram_matvec import gram_matvec
from spectral_kernels._triton.partials import collect, transposed
from spectral_kernels._triton.rank_one import rank_one
from spectral_kernels._triton.ritz import ritz
from spectral_kernels._triton.sizes import sizes
from spectral_kernels._triton.subspace_products import subspace_grams, subspace_products
from spectral_kernels._triton.update import update
from spectral_kernels.bucket import TOLERANCE
from spectral_kernels.plan import MAX_TILES, R

KERNELS = {"gram_matvec": gram_matvec, "rank_one": rank_one, "update": update}
SEVERAL = {"subspace_products": subspace_products, "subspace_grams": subspace_grams, "ritz": ritz}
PARTIALS = {"transposed": transposed, "collect": collect}
RULES = ("adamw", "sgd")  # by their number
CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
_POINTERS = {
    "matrices": "*i64", "tiles": "*i64", "vectors": "*i64", "t_partial": "*fp32",
    "gram_partial": "*fp64", "v": "*fp32", "v_next": "*fp32", "s": "*fp32", "scalars": "*fp32",
    "scale": "*fp32", "k": "fp32", "others": "*i64", "matrix_moments": "*i64",
    "vector_moments": "*i64", "other_moments": "*i64", "groups": "*fp64", "steps": "*fp32",
    "grad_scale": "*fp32", "found_inf": "*fp32", "t": "*fp32", "gram": "*fp64",
}  # fmt: skip


class Configuration(NamedTuple):
    """A kernel with its constants."""

    kernel: str
    dtype: torch.dtype
    constants: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        chosen = [n.lower() for n, value in self.constants if value is True]
        constants = dict(self.constants)
        chosen += [f"r={constants['VECTORS']}"] if "VECTORS" in constants else []
        chosen += ["tolerance"] if constants.get("TOLERANCE") else []
        grad, moment = constants.get("GRAD_TYPE"), constants.get("MOMENT_TYPE")
        rule = [RULES[constants["RULE"]]] if "RULE" in constants else []
        return " ".join([self.kernel, *rule, str(self.dtype)[6:], *([f"to {grad}"] if grad else []),
                         *([f"moments {moment}"] if moment else []), *chosen])  # fmt: skip


class Compiled(NamedTuple):
    """What the compiler made: registers and bytes of stack per thread, shared bytes, PTX."""

    registers: int
    stack: int
    shared: int
    ptx: str

    def loads(self, bits: int) -> int:
        """Count loads from global memory of ``bits`` at once."""
        found = 0
        for vector, size in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", self.ptx):
            found += int(vector or 1) * int(size) == bits
        return found


def configurations(dtype: torch.dtype) -> Iterator[Configuration]:
    """Yield what the backend can choose for weights of ``dtype``, at k = 2."""
    own = TYPES[dtype]
    for with_t in (True, False):
        yield Configuration("gram_matvec", dtype, (("K", 2), ("WITH_T", with_t)))
    plain = {"K": 2, "WITH_T": True, "GRAD_TYPE": own, "FINISH": True, "GRADIENT": True,
             "ACCUMULATE": True, "WITH_SCALE": False}  # fmt: skip
    for changes in (
        {},
        {"WITH_SCALE": True},
        {"FINISH": False, "ACCUMULATE": False, "WITH_SCALE": True},
        {"GRADIENT": False, "ACCUMULATE": False},
        {"GRADIENT": False, "ACCUMULATE": False, "WITH_T": False},
        *({"GRAD_TYPE": other} for other in TYPES.values() if other is not own),
    ):
        yield Configuration("rank_one", dtype, tuple((plain | changes).items()))
    plain = {"K": 2, "WITH_T": True, "RULE": 0, "MOMENT_TYPE": own, "WITH_MOMENT": True,
             "DECOUPLED": False, "WITH_SCALE": False, "WITH_GRAD_SCALE": False,
             "WITH_FOUND_INF": False}  # fmt: skip
    scaled = {"WITH_GRAD_SCALE": True, "WITH_FOUND_INF": True}
    for changes in (
        {},
        scaled,
        {"DECOUPLED": True, "WITH_SCALE": True},
        {"RULE": 1},
        {"RULE": 1, "WITH_MOMENT": False},
        *([] if dtype == torch.float32 else [{"MOMENT_TYPE": tl.float32}]),
    ):
        yield Configuration("update", dtype, tuple((plain | changes).items()))


def several_vectors(dtype: torch.dtype, capability: int) -> Iterator[Configuration]:
    """Yield the main ones with several vectors, and with a tolerance; few, for the time they take.

    Numbers of vectors above four differ little in the products, and dtypes not at all in the rest.
    """
    plain = {"K": 2, "WITH_T": True, "TOLERANCE": 0.0}
    several = {
        torch.float32: [{"VECTORS": 4}, {"VECTORS": 16}],
        torch.bfloat16: [{"VECTORS": 2}, {"VECTORS": 8, "TOLERANCE": TOLERANCE}],
        torch.float16: [{"VECTORS": 4, "WITH_T": False}] if capability == 90 else [],
    }
    for changes in several[dtype]:
        yield Configuration("subspace_products", dtype, tuple((plain | changes).items()))
    if dtype == torch.float32:
        main = next(c for c in configurations(dtype) if c.kernel == "update")
        yield main._replace(constants=(*main.constants, ("VECTORS", 4)))
        yield Configuration("gram_matvec", dtype, tuple((plain | {"TOLERANCE": TOLERANCE}).items()))
        finish = next(c for c in configurations(dtype) if ("GRADIENT", False) in c.constants)
        yield finish._replace(constants=(*finish.constants, ("TOLERANCE", TOLERANCE)))
        for r in R[1:]:
            changes = {"VECTORS": r, "TOLERANCE": TOLERANCE if r == 8 else 0.0}
            yield Configuration("ritz", dtype, tuple((plain | changes).items()))
        yield Configuration("subspace_grams", dtype, (("VECTORS", 16), ("TOLERANCE", 0.0)))


def partials(dtype: torch.dtype) -> Iterator[Configuration]:
    """Yield the kernels of partial results: for all numbers of vectors with float32, else four."""
    for r in R if dtype == torch.float32 else (4,):
        constants = {"VECTORS": r, "WITH_T": True, "TOLERANCE": TOLERANCE if r == 8 else 0.0}
        yield Configuration("transposed", dtype, tuple(constants.items()))
        if dtype == torch.float32:
            yield Configuration("collect", dtype, (("VECTORS", r), ("WITH_T", r != 2)))


def any_exponent(dtype: torch.dtype) -> list[Configuration]:
    """Return the main configurations at an exponent that is no integer."""
    found = [c for c in configurations(dtype) if dict(c.constants)["WITH_T"]]
    firsts = [next(c for c in found if c.kernel == name) for name in KERNELS]
    return [c._replace(constants=(("K", 0), *c.constants[1:])) for c in firsts]


@lru_cache
def compiled(configuration: Configuration, capability: int) -> Compiled:
    """Compile for a compute capability (90 for 9.0)."""
    given = {"VECTORS": 1, "TOLERANCE": 0.0, **dict(configuration.constants)}
    own = sizes(capability, configuration.dtype.itemsize, given["VECTORS"])
    name, kernel = configuration.kernel, (KERNELS | SEVERAL | PARTIALS)[configuration.kernel]
    blocks, warps = getattr(own, name), getattr(own, f"{name}_warps")
    constants = {"DTYPE": TYPES[configuration.dtype], "MAX_TILES": MAX_TILES,
                 **given, **blocks}  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else _POINTERS.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": warps, **FUSED}
    if name == "update":
        options["maxnreg"] = own.update_registers
    made = triton.compile(source, target=target, options=options)
    usage = _resource_usage(made.asm["cubin"])
    return Compiled(usage["REG"], usage["STACK"], made.metadata.shared, made.asm["ptx"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK):(\d+)", text)}


if __name__ == "__main__":
    print(
        f"{'kernel':58} {'sm':>4} {'registers':>9} {'stack':>5} {'shared':>6} {'128-bit loads':>13}"
    )
    for dtype in TYPES:
        for sm in CAPABILITIES:
            for chosen in (*configurations(dtype), *any_exponent(dtype),
                           *several_vectors(dtype, sm), *partials(dtype)):  # fmt: skip
                c = compiled(chosen, sm)
                print(f"{chosen!s:58} {sm:4} {c.registers:9} {c.stack:5} {c.shared:6} "
                      f"{c.loads(128):13}", flush=True)  # fmt: skip
