"""The structs of the tables that Python writes and kernels read.

csrc/table.h has the same structs and documents each field. The compiled module exports its names,
offsets and sizes, which are compared with these when it is loaded; Triton's constants are derived
from these.
"""

from __future__ import annotations

import numpy as np
import torch

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {"shift": 0, "gain": 1, "rows": 2}  # of elementwise parameters
RULES = {"adamw": 0, "sgd": 1}
CONSTRAINTS = {None: 0, "cap": 1, "sphere": 2}
N_VECTORS = (1, 2, 4, 8, 16)  # singular vectors per matrix that the kernels support
CHUNK_COLUMNS = 128  # of one matrix, summed over its tiles by one GPU program


def _struct(fields: str, floats: str = "") -> np.dtype:
    """Return the dtype of a struct of int64 ``fields``; those in ``floats`` are float64."""
    wide = floats.split()
    return np.dtype([(name, "f8" if name in wide else "i8") for name in fields.split()])


MATRIX = _struct(
    "weight grad grad_dtype rows outer inner row_stride outer_stride grad_row_stride "
    "grad_outer_stride v_offset s_offset first_tile n_tiles reach"
)
TILE = _struct("matrix row_begin row_end t_offset")
CHUNK = _struct("matrix begin")
OPERATOR = _struct("channels channel_stride first_tap n_taps count_0 count_1 count_2")
TAP = _struct("column is_last number_0 number_1 number_2 next_0 next_1 next_2")
ELEMENTWISE = _struct("weight grad grad_dtype size kind length targets")
MOMENT = _struct("first second parameter group")
_OPTIONS = "lr weight_decay option_1 option_2 eps nesterov"
GROUP = _struct(_OPTIONS, floats=_OPTIONS)
UPDATE = _struct(
    "rule moment_dtype matrix_moments elementwise_moments others n_others other_moments groups "
    "steps decoupled grad_scale found_inf constraint"
)
HEADER = _struct(
    "weight_dtype matrices n_matrices tiles n_tiles elementwise n_elementwise t_partial "
    "gram_partial v v_next s sigmas residuals norm raw_penalty strength target scale exponent "
    "scratch_size n_bytes r tolerance chunks n_chunks chunk_squares arrivals "
    "operators taps most_taps above",
    floats="exponent tolerance",
)
STRUCTS = {
    "Matrix": MATRIX, "Tile": TILE, "Chunk": CHUNK, "Operator": OPERATOR, "Tap": TAP,
    "Elementwise": ELEMENTWISE, "Moment": MOMENT, "Group": GROUP, "Update": UPDATE,
    "Header": HEADER,
}  # fmt: skip

# Index of each field of a header; every field has eight bytes.
SLOT = {name: i for i, name in enumerate(HEADER.names)}
UPDATE_SLOT = {name: i for i, name in enumerate(UPDATE.names)}

# Parts of a state's array of scalars, in this order; see scalar_sizes.
SCALARS = ("sigmas", "residuals", "norm", "raw_penalty", "strength", "target")


def scalar_sizes(n_matrices: int, n_elementwise: int, r: int) -> tuple[int, ...]:
    """Return the number of elements of each of SCALARS for ``r`` vectors per matrix.

    Of operators, whose vectors have two parts, the second half of sigmas and residuals is unused.
    """
    n_sigmas, n_entries = r * n_matrices, n_matrices + n_elementwise
    return n_sigmas, n_sigmas, n_elementwise, n_entries, n_entries, n_matrices


def offsets() -> dict[str, dict[str, int]]:
    """Return the byte offset of each field of each struct, and the struct's size as "sizeof"."""
    return {
        name: {**{field: struct.fields[field][1] for field in struct.names},
               "sizeof": struct.itemsize}
        for name, struct in STRUCTS.items()
    }  # fmt: skip


def address(array: np.ndarray) -> int:
    """Return the address of a numpy array's first element."""
    return array.view(np.int64).__array_interface__["data"][0]
