"""Sizes of blocks and programs, by architecture and bytes per element.

How they were chosen: a block of R rows x BN columns is held in registers as float32 between the two
products, beside BN numbers of v and BN of t, so (R + 2) BN / threads registers of the 255 that a
thread may have; tests/test_triton_compiled.py shows that none of them spills. Within that, R is as
large as it can be, since each block costs two reductions over the program, and a block has about
32 kB, so that a few programs per multiprocessor keep enough bytes in flight. None of the sizes has
been timed yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Constants of the kernels, and warps per program."""

    gram_matvec: dict[str, int]
    rank_one: dict[str, int]
    gram_matvec_warps: int
    rank_one_warps: int


_GRAM_MATVEC = {
    "R0": 32, "BN0": 128, "R1": 16, "BN1": 512, "R2": 4, "BN2": 2048, "R3": 2, "BN3": 4096,
    "R_LONG": 2, "BN_LONG": 2048, "R_ODD": 8, "BN_ODD": 512,
}  # fmt: skip
_RANK_ONE = {"BN_SUM": 1024, "R": 4, "BN": 1024, "R_NARROW": 32, "BN_NARROW": 128}
_DEFAULT = Sizes(_GRAM_MATVEC, _RANK_ONE, 8, 8)
# (compute capability, bytes per element): sizes; the default where there is no entry.
_SIZES = {(100, 4): _DEFAULT._replace(gram_matvec={**_GRAM_MATVEC, "R_LONG": 4})}


def sizes(capability: int, itemsize: int) -> Sizes:
    """Return the sizes for a compute capability (90 for 9.0) and an element size in bytes."""
    return _SIZES.get((capability, itemsize), _DEFAULT)
