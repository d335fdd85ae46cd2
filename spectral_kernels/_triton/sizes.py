"""Sizes of blocks and programs, by architecture and bytes per element.

How they were chosen: a block of R rows x BN columns is held in registers as float32 between the two
products, beside BN numbers of v and BN of t, so (R + 2) BN / threads registers of the 255 that a
thread may have; tests/test_triton_compiled.py shows that none of them spills. Within that, R is as
large as it can be, since each block costs two reductions over the program, and a block has about
32 kB, so that a few programs per multiprocessor keep enough bytes in flight. An
optimizer's step holds gradient and moments of a block too, so its blocks are smaller; told the
registers that leave room for 12 or 16 warps, the compiler does without spills where it would aim
for more warps with some. None of the sizes has been timed yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Constants of the kernels, warps per program, and registers that a thread may have."""

    gram_matvec: dict[str, int]
    rank_one: dict[str, int]
    update: dict[str, int]
    gram_matvec_warps: int
    rank_one_warps: int
    update_warps: int
    update_registers: int
    subspace_products: dict[str, int] = {}
    ritz: dict[str, int] = {}
    subspace_products_warps: int = 8
    ritz_warps: int = 8


_GRAM_MATVEC = {
    "R0": 32, "BN0": 128, "R1": 16, "BN1": 512, "R2": 4, "BN2": 2048, "R3": 2, "BN3": 4096,
    "R_LONG": 2, "BN_LONG": 2048, "R_ODD": 8, "BN_ODD": 512,
}  # fmt: skip
_RANK_ONE = {"BN_SUM": 1024, "R": 4, "BN": 1024, "R_NARROW": 32, "BN_NARROW": 128}
_UPDATE = {
    "R0": 8, "BN0": 128, "R1": 2, "BN1": 512, "R2": 1, "BN2": 1024,
    "R_LONG": 1, "BN_LONG": 1024, "R_ODD": 4, "BN_ODD": 256,
}  # fmt: skip
_DEFAULT = Sizes(_GRAM_MATVEC, _RANK_ONE, _UPDATE, 8, 8, 4, 168)
_WIDE = _DEFAULT._replace(
    update={**_UPDATE, "BN2": 2048, "BN_ODD": 128}, update_warps=8, update_registers=128
)
# (compute capability, bytes per element): sizes; for any capability those of (0, bytes), if any.
_SIZES = {
    (0, 4): _WIDE,
    (100, 4): _WIDE._replace(gram_matvec={**_GRAM_MATVEC, "R_LONG": 4}),
}


# r: those of subspace_products and of ritz.
_SEVERAL = {
    2: ({"R0": 16, "BN0": 256, "R1": 4, "BN1": 1024, "R2": 2, "BN2": 4096,
         "R_LONG": 2, "BN_LONG": 2048, "R_ODD": 8, "BN_ODD": 256, "BN_GRAM": 128}, 512, 512),
    4: ({"R0": 16, "BN0": 256, "R1": 4, "BN1": 1024, "R2": 2, "BN2": 4096,
         "R_LONG": 2, "BN_LONG": 2048, "R_ODD": 8, "BN_ODD": 256, "BN_GRAM": 64}, 256, 128),
    8: ({"R0": 16, "BN0": 256, "R1": 4, "BN1": 1024, "R2": 2, "BN2": 2048,
         "R_LONG": 2, "BN_LONG": 2048, "R_ODD": 8, "BN_ODD": 256, "BN_GRAM": 64}, 64, 64),
    16: ({"R0": 16, "BN0": 128, "R1": 8, "BN1": 512, "R2": 4, "BN2": 1024,
          "R_LONG": 4, "BN_LONG": 1024, "R_ODD": 8, "BN_ODD": 256, "BN_GRAM": 16}, 16, 16),
}  # fmt: skip
# Where Triton interprets, what counts is the number of operations on blocks.
_INTERPRETED = (
    {"R0": 64, "BN0": 64, "R1": 64, "BN1": 512, "R2": 32, "BN2": 2048,
     "R_LONG": 32, "BN_LONG": 4096, "R_ODD": 64, "BN_ODD": 2048, "BN_GRAM": 256}, 4096, 1024
)  # fmt: skip


def sizes(capability: int, itemsize: int, r: int = 1) -> Sizes:
    """Return the sizes for a compute capability (90 for 9.0) and an element size in bytes.

    With several vectors, ``r``, those of their kernels too.
    """
    found = _SIZES.get((capability, itemsize), _SIZES.get((0, itemsize), _DEFAULT))
    if r > 1:
        products, columns, gram = _SEVERAL[r] if capability else _INTERPRETED
        found = found._replace(
            subspace_products={**products, "BN_VECTOR": 1024},
            ritz={"BN_SUM": 1024, "BN": columns, "BN_GRAM": gram},
        )
    return found
