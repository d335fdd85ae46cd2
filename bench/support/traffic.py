"""Bytes and launches of a step on a GPU, counted from shapes: the floor for any model.

``python -m bench.support.traffic BANDWIDTH`` prints them for every case, with their time at a
bandwidth in GB/s (4800 for an H200 on paper; better the copy bandwidth of a run's own floors).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from spectral_kernels.tables.plan import rows_of_tiles
from spectral_kernels.tables.schema import CHUNK, CHUNK_COLUMNS, MATRIX, TILE
from tests.support import cases

LAUNCHES = 2  # gram_matvec and rank_one, whatever the number of layers


class Traffic(NamedTuple):
    """Bytes of a step: those proportional to the number of weights, and all others."""

    weights: int
    vectors: int

    @property
    def total(self) -> int:
        """Return all bytes."""
        return self.weights + self.vectors

    def seconds(self, bandwidth: float) -> float:
        """Return the time at ``bandwidth`` bytes per second."""
        return self.total / bandwidth


def step(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: str = "cuda") -> Traffic:
    """Count the bytes of one power iteration of every matrix and the gradient added to ``.grad``.

    Of (M, N) weights of b bytes in T tiles: W is read (M N b), .grad read and written (2 M N b). In
    float32, the first launch reads v once per tile (T N), writes s (M) and a partial t per tile
    (T N); the second reads the partial t (T N), v again per tile and once more to keep it where
    the next is not finite ((T + 1) N), writes, reads and writes the next v (3 N) and reads s (M).
    Tables, sums per tile and chunk, and reads from a cache count too. T depends on the type of
    ``device``.
    """
    weights = vectors = 0
    for (m, n), rows in zip(shapes, rows_of_tiles(shapes, device), strict=True):
        tiles, chunks = -(-m // rows), -(-n // CHUNK_COLUMNS)
        weights += 3 * m * n * dtype.itemsize
        vectors += 4 * (4 * tiles * n + 4 * n + 2 * m)
        vectors += 2 * (MATRIX.itemsize + tiles * (TILE.itemsize + 8))
        vectors += chunks * (CHUNK.itemsize + 2 * 8) + 2 * 4
    return Traffic(weights, vectors)


def main(bandwidth: float) -> None:
    """Print a line per case and dtype."""
    print(f"{'case':12}{'dtype':>10}{'GB':>9}{'beside W and .grad':>20}{'microseconds':>14}")
    for name, shapes in cases.CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            t = step(shapes(), dtype)
            share = 100 * t.vectors / t.weights
            print(f"{name:12}{str(dtype)[6:]:>10}{t.total / 1e9:9.3f}{share:18.1f} %"
                  f"{1e6 * t.seconds(1e9 * bandwidth):14.1f}")  # fmt: skip


if __name__ == "__main__":
    main(float(sys.argv[1]))
