"""Sizes of blocks and programs, by architecture and bytes per element.

Those of gram_matvec, rank_one and update are the best of some 30 that were timed on an H200
(bench/results/2026-11-27-h200); the others have not been timed. At most 128 registers leave room
for two programs of 256 threads on a multiprocessor (65,536 / 512), 168 for three of 128 threads:
one that runs makes up for another that exchanges sums.

* gram_matvec: blocks of BLOCK elements, whatever the width of the rows, in registers as float32
  beside as many sums for t and their columns of v. With STAGES, all but one of so many blocks are
  on their way to shared memory. Without, the next block is on its way to registers: this leaves
  room for rows of 8,192 columns. It was slower everywhere but in LARGE plans of 16-bit weights,
  whose tiles have many rows: such programs end with long sums over all threads.
* rank_one: R rows x BN columns of gradient, 16 kB, and the next one.
* update: a block is held with gradient and moments of it, so it is smaller.
* The compiler is told how many registers to make do with: it may aim for more, and leave fewer
  programs, or for fewer, and spill.
* LONG rows do not fit and are read twice; t is summed up in memory, R_LONG rows at a time.
* PLAIN rows are not aligned, and those in PIECES of a channels_last weight are not even that. They
  are rare, and their registers count for all: blocks are small.

With several vectors a program takes GROUP of them, each with BN numbers of v and of t in registers:
(R + 2 GROUP) BN / threads. Four is what rows of 4096 columns leave room for, and few enough for a
kernel that compiles in seconds; with 8 or 16 vectors each tile has two or four programs, which read
its rows from the second-level cache together. ritz holds VECTORS^2 BN products in float64.
transposed reads each block once, and holds (R + GROUP) BN / threads. waves takes BC channels of an
operator at a time.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Sizes(NamedTuple):
    """Constants of the kernels, warps per program, and registers that a thread may have."""

    gram_matvec: dict[str, int]
    gram_matvec_long: dict[str, int]
    rank_one: dict[str, int]
    update: dict[str, int]
    subspace_products: dict[str, int]
    subspace_grams: dict[str, int]
    ritz: dict[str, int]
    transposed: dict[str, int]
    collect: dict[str, int]
    collect_chunks: dict[str, int]
    waves: dict[str, int]
    gram_matvec_warps: int = 8
    gram_matvec_long_warps: int = 16
    rank_one_warps: int = 4
    update_warps: int = 4
    gram_matvec_registers: int = 128
    gram_matvec_long_registers: int = 128
    update_registers: int = 168
    subspace_products_warps: int = 8
    subspace_grams_warps: int = 4
    ritz_warps: int = 8
    transposed_warps: int = 8
    collect_warps: int = 2
    collect_chunks_warps: int = 8
    waves_warps: int = 4


LARGE = 2**28  # elements of a plan from which on gram_matvec has other sizes

_GRAM_MATVEC = {
    "R_LONG": 4, "BN_LONG": 1024, "R_PLAIN": 8, "BN_PLAIN": 256, "R_PIECES": 2, "BN_PIECES": 256,
}  # fmt: skip
_RANK_ONE = {
    "TILES": 32, "BN_SUM": 1024, "R": 16, "BN": 512, "R_NARROW": 32, "BN_NARROW": 128,
    "R_PLAIN": 4, "BN_PLAIN": 256, "R_PIECES": 4, "BN_PIECES": 256,
}  # fmt: skip
_UPDATE = {"R_LONG": 1, "R_PLAIN": 2, "BN_PLAIN": 256, "R_PIECES": 2, "BN_PIECES": 256}
_TRANSPOSED = {
    "R0": 32, "BN0": 128, "R1": 16, "BN1": 512, "R2": 4, "BN2": 2048, "R_ODD": 8, "BN_ODD": 512,
    "GROUP": 1, "BN_GRAM": 256,
}  # fmt: skip
_NARROW = Sizes(  # two bytes per element
    gram_matvec={**_GRAM_MATVEC, "BLOCK": 4096, "WIDTHS": 6, "STAGES": 4, "PIECE": 256},
    gram_matvec_long={"SHORTEST": 8192, "WIDTHS": 2, "AHEAD": 16384},
    rank_one=_RANK_ONE,
    update={**_UPDATE, "BLOCK": 2048, "WIDTHS": 6, "BN_LONG": 2048},
    subspace_products={},
    subspace_grams={},
    ritz={},
    transposed=_TRANSPOSED,
    collect={"BN": 256},
    collect_chunks={"TILES": _RANK_ONE["TILES"]},
    waves={"BN": 2048, "BC": 128},
    gram_matvec_warps=4,
)
_WIDE = _NARROW._replace(  # four bytes
    gram_matvec={**_GRAM_MATVEC, "BLOCK": 4096, "WIDTHS": 6, "STAGES": 4, "PIECE": 128},
    gram_matvec_long={"SHORTEST": 8192, "WIDTHS": 1, "AHEAD": 8192},
    update={**_UPDATE, "BLOCK": 1024, "WIDTHS": 5, "BN_LONG": 1024},
    gram_matvec_warps=8,
)

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
# The interpreter's time is the number of operations on blocks.
_INTERPRETED = {
    "R0": 64, "BN0": 64, "R1": 64, "BN1": 512, "R2": 32, "BN2": 2048,
    "R_LONG": 32, "BN_LONG": 4096, "R_ODD": 64, "BN_ODD": 2048, "BN_GRAM": 256,
}  # fmt: skip


@cache
def sizes(capability: int, itemsize: int, r: int = 1, large: bool = False) -> Sizes:
    """Return the sizes for a compute capability (90 for 9.0, 0 to interpret) and element size.

    With several vectors, ``r``, those of their kernels too; ``large`` is for plans of LARGE
    elements.
    """
    found = _NARROW if itemsize == 2 else _WIDE
    if large and itemsize == 2:
        ahead = {**found.gram_matvec, "BLOCK": 8192, "WIDTHS": 7, "STAGES": 0}
        found = found._replace(gram_matvec=ahead, gram_matvec_warps=8)
    long = found.gram_matvec_long
    bounds = {"SHORTEST": long["SHORTEST"], "LONGEST": long["SHORTEST"] * 2 ** long["WIDTHS"]}
    found = found._replace(gram_matvec={**found.gram_matvec, **bounds})
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
