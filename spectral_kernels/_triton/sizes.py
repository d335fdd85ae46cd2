"""Sizes of blocks and programs, by architecture and bytes per element.

How they were chosen: a block of R rows x BN columns is held in registers as float32 between the two
products, beside BN numbers of v and BN of t, so (R + 2) BN / threads registers of the 255 that a
thread may have; tests/test_triton_compiled.py shows that none of them spills. Within that, R is as
large as it can be, since each block costs two reductions over the program, and a block has about
32 kB, so that a few programs per multiprocessor keep enough bytes in flight. An
optimizer's step holds gradient and moments of a block too, so its blocks are smaller; told the
registers that leave room for 12 or 16 warps, the compiler does without spills where it would aim
for more warps with some.

With several vectors a program takes GROUP of them, each with BN numbers of v and of t in registers:
(R + 2 GROUP) BN / threads. Four is what rows of 4096 columns leave room for, and few enough for a
kernel that compiles in seconds; with 8 or 16 vectors each tile has two or four programs, which read
its rows from the second-level cache together. ritz holds VECTORS^2 BN products in float64.
transposed reads each block once, and holds (R + GROUP) BN / threads.
None of the sizes has been timed yet.
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
    subspace_products: dict[str, int]
    subspace_grams: dict[str, int]
    ritz: dict[str, int]
    subspace_products_warps: int
    subspace_grams_warps: int
    ritz_warps: int
    transposed: dict[str, int]
    collect: dict[str, int]
    transposed_warps: int
    collect_warps: int


_GRAM_MATVEC = {
    "R0": 32, "BN0": 128, "R1": 16, "BN1": 512, "R2": 4, "BN2": 2048, "R3": 2, "BN3": 4096,
    "R_LONG": 2, "BN_LONG": 2048, "R_ODD": 8, "BN_ODD": 512,
}  # fmt: skip
_RANK_ONE = {"BN_SUM": 1024, "R": 4, "BN": 1024, "R_NARROW": 32, "BN_NARROW": 128}
_UPDATE = {
    "R0": 8, "BN0": 128, "R1": 2, "BN1": 512, "R2": 1, "BN2": 1024,
    "R_LONG": 1, "BN_LONG": 1024, "R_ODD": 4, "BN_ODD": 256,
}  # fmt: skip
_TRANSPOSED = {
    "R0": 32, "BN0": 128, "R1": 16, "BN1": 512, "R2": 4, "BN2": 2048, "R_ODD": 8, "BN_ODD": 512,
    "GROUP": 1, "BN_GRAM": 256,
}  # fmt: skip
_DEFAULT = Sizes(_GRAM_MATVEC, _RANK_ONE, _UPDATE, 8, 8, 4, 168, {}, {}, {}, 8, 4, 8,
                 _TRANSPOSED, {"BN": 256}, 8, 2)  # fmt: skip
_WIDE = _DEFAULT._replace(
    update={**_UPDATE, "BN2": 2048, "BN_ODD": 128}, update_warps=8, update_registers=128
)
# (compute capability, bytes per element): sizes; for any capability those of (0, bytes), if any.
_SIZES = {
    (0, 4): _WIDE,
    (100, 4): _WIDE._replace(gram_matvec={**_GRAM_MATVEC, "R_LONG": 4}),
}


# r: blocks of subspace_products; columns at a time of ritz, and for its products.
_PRODUCTS = {
    "GROUP": 4, "R0": 16, "BN0": 256, "R1": 4, "BN1": 1024, "R2": 2, "BN2": 4096,
    "R_LONG": 2, "BN_LONG": 2048, "R_ODD": 8, "BN_ODD": 256,
}  # fmt: skip
_SEVERAL = {
    2: ({**_PRODUCTS, "GROUP": 2, "BN_GRAM": 256}, 512, 512),
    4: ({**_PRODUCTS, "BN_GRAM": 64}, 256, 128),
    8: ({**_PRODUCTS, "BN_GRAM": 64}, 64, 64),
    16: ({**_PRODUCTS, "BN_GRAM": 16}, 16, 16),
}
# Where Triton interprets, what counts is the number of operations on blocks.
_INTERPRETED = {
    "R0": 64, "BN0": 64, "R1": 64, "BN1": 512, "R2": 32, "BN2": 2048,
    "R_LONG": 32, "BN_LONG": 4096, "R_ODD": 64, "BN_ODD": 2048, "BN_GRAM": 256,
}  # fmt: skip


def sizes(capability: int, itemsize: int, r: int = 1) -> Sizes:
    """Return the sizes for a compute capability (90 for 9.0) and an element size in bytes.

    With several vectors, ``r``, those of their kernels too.
    """
    found = _SIZES.get((capability, itemsize), _SIZES.get((0, itemsize), _DEFAULT))
    if r > 1:
        products, columns, gram = _SEVERAL[r]
        if not capability:
            products, columns, gram = {**products, **_INTERPRETED}, 4096, 1024
        found = found._replace(
            subspace_products={**products, "BN_VECTOR": 1024},
            subspace_grams={"BN_GRAM": products["BN_GRAM"]},
            ritz={"BN_SUM": 4096, "BN": columns, "BN_GRAM": gram},
            transposed={**_TRANSPOSED, **{name: products[name] for name in ("GROUP", "BN_GRAM")}},
        )
    return found
