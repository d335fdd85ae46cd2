""""""

from __future__ import annotations

import numpy as np
import torch

# The structs of csrc/table.h, byte for byte.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


KINDS = {"shift": 0, "gain": 1}


def _struct(fields: str) -> np.dtype:
    return np.dtype([(name, "i8") for name in fields.split()])


MATRIX = _struct(
    "weight grad grad_dtype rows outer inner row_stride outer_stride grad_row_stride "
    "grad_outer_stride v_offset s_offset first_tile n_tiles"
)


TILE = _struct("matrix row_begin row_end t_offset")


CHUNK = _struct("matrix begin")


VECTOR = _struct("weight grad grad_dtype size kind")


MOMENT = _struct("first second owner group")


_OPTIONS = ("lr", "weight_decay", "option_1", "option_2", "eps", "nesterov")


GROUP = np.dtype([(name, "f8") for name in _OPTIONS])


UPDATE = (
    "rule", "moment_dtype", "matrix_moments", "vector_moments", "others", "n_others",
    "other_moments", "groups", "steps", "decoupled", "grad_scale", "found_inf",
)  # fmt: skip


HEADER = (
    "weight_dtype", "matrices", "n_matrices", "tiles", "n_tiles", "vectors", "n_vectors",
    "t_partial", "gram_partial", "v", "v_next", "s", "sigma", "residual", "norm", "penalty",
    "strength", "target", "scale", "exponent", "scratch_size", "n_bytes", "r", "tolerance",
    "chunks", "n_chunks", "chunk_squares", "arrivals",
)  # fmt: skip


# All of eight bytes, exponent and tolerance float64.
SLOT = {name: i for i, name in enumerate(HEADER)}


SCALARS = ("sigmas", "residuals", "norm", "penalty", "strength", "target")


R = (1, 2, 4, 8, 16)  # vectors per matrix that the kernels are made for


CHUNK_COLUMNS = 128  # of one matrix, that one program of a GPU sums over the tiles


def address(array: np.ndarray) -> int:
    """Return the address of a numpy array's first element."""
    return array.view(np.int64).__array_interface__["data"][0]
