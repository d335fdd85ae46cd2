"""Predicts the kernels' times on an H100 from shapes: ``python -m bench.gpu_model``.

A fluid model: the programs of a launch start in order, as many at once as fit, and share the
memory's bandwidth; each can use no more of it than its blocks and the latency allow. What a figure
of it is worth, a measurement tells: none has been taken yet. It is for choosing how matrices are
cut into tiles, and for seeing where a measured time differs from what was expected.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch

from spectral_kernels._triton.sizes import sizes
from spectral_kernels.plan import CHUNK_COLUMNS, rows_of_tiles
from tests import cases

BANDWIDTH = 3.0e6  # bytes per microsecond that a copy reaches
LATENCY = 0.65  # microseconds from a load to its result
START = 1.5  # microseconds until a program has read the tables
MULTIPROCESSORS, CAPABILITY = 132, 90
# Programs per multiprocessor, see tests/test_triton_compiled.py.
PROGRAMS = {"gram_matvec": 2, "rank_one": 3, "update": 2}
WORK, EXCHANGE = 0.35, 0.1  # microseconds to multiply a block, and to add up over a program
CASES = ("mlp", "resnet18", "vit_b", "gpt2", "one_huge", "llama_1b", "llama_7b")


class Program(NamedTuple):
    """Bytes that a program moves, and how many per microsecond it can have at most."""

    bytes: float
    most: float
    start: float = START


class Prediction(NamedTuple):
    """Microseconds of the three launches, and what bandwidth alone would take for each."""

    programs: int
    largest: float  # bytes of the largest tile over the mean
    gram_matvec: float
    rank_one: float
    update: float
    floors: tuple[float, float, float]


def simulate(programs: Sequence[Program], slots: int) -> float:
    """Return the microseconds until the last program is done."""
    now, following = 0.0, 0
    starting: list[tuple[float, int]] = []
    moving: dict[int, float] = {}  # bytes that are left
    while following < min(slots, len(programs)):
        heapq.heappush(starting, (programs[following].start, following))
        following += 1
    while starting or moving:
        wanted = sum(programs[i].most for i in moving)
        share = min(1.0, BANDWIDTH / wanted) if wanted else 1.0
        times = [left / (programs[i].most * share) for i, left in moving.items()]
        step = min(times, default=float("inf"))
        if starting:
            step = min(step, starting[0][0] - now)
        for i in moving:
            moving[i] -= programs[i].most * share * step
        now += step
        for i in [i for i, left in moving.items() if left <= 1e-6]:
            del moving[i]
            if following < len(programs):
                heapq.heappush(starting, (now + programs[following].start, following))
                following += 1
        while starting and starting[0][0] <= now + 1e-9:
            _, i = heapq.heappop(starting)
            moving[i] = max(programs[i].bytes, 1.0)
    return now


def tiles_of(shapes) -> list[tuple[int, int]]:
    """Return rows and columns of every tile."""
    steps = rows_of_tiles(shapes, "cuda")
    return [
        (min(step, m - start), n)
        for (m, n), step in zip(shapes, steps, strict=True)
        for start in range(0, m, step)
    ]


def _width(own: dict[str, int], n: int, item: int) -> int | None:
    """Return the columns of a block that holds whole rows; 0: they are long, None: not aligned."""
    if n * item % 16:
        return None
    widths = (128 * 2**i for i in range(own["WIDTHS"]))
    return next((width for width in widths if n <= width), 0)


def gram_matvec(tiles, item: int) -> list[Program]:
    """Return the programs of the first launch."""
    own, found = sizes(CAPABILITY, item).gram_matvec, []
    for m, n in tiles:
        width = _width(own, n, item)
        if width:
            rows, time = own["BLOCK"] // width, max(LATENCY, WORK) + EXCHANGE
        elif width == 0:
            rows, pieces = own["R_LONG"], -(-n // own["BN_LONG"])
            time = (LATENCY + 0.3 + 0.3 + 0.2) * pieces
        else:
            rows, pieces = own["R_PLAIN"], -(-n // own["BN_PLAIN"])
            time = (LATENCY + WORK) * pieces * (1 if pieces == 1 else 1.6)
        found.append(Program(m * n * item + 4 * n, min(rows, m) * n * item / time))
    return found


def chunks(shapes) -> list[Program]:
    """Return the programs that finish matrices."""
    own, steps, found = sizes(CAPABILITY, 2).rank_one, rows_of_tiles(shapes, "cuda"), []
    at_once = own["TILES"] * CHUNK_COLUMNS * 4 / (LATENCY + EXCHANGE)
    for (m, n), step in zip(shapes, steps, strict=True):
        n_tiles = -(-m // step)
        found += [Program(4 * CHUNK_COLUMNS * n_tiles, at_once)] * -(-n // CHUNK_COLUMNS)
        last = START + 2 * LATENCY * -(-n // own["BN_SUM"])  # normalizes
        found[-1] = found[-1]._replace(start=last)
    return found


def rank_one(shapes, tiles, item: int) -> list[Program]:
    """Return the programs of the second launch."""
    own, found = sizes(CAPABILITY, item).rank_one, chunks(shapes)
    for m, n in tiles:
        name = "_PLAIN" if n * item % 16 else "_NARROW" if n <= own["BN_NARROW"] else ""
        pieces = -(-n // own[f"BN{name}"])
        block = 2 * min(own[f"R{name}"], m) * n / pieces * item
        found.append(Program(2 * m * n * item, block / (LATENCY + 0.15)))
    return found


def update(tiles, item: int) -> list[Program]:
    """Return the programs of SpectralAdamW's step with moments of the weights' dtype."""
    own, found = sizes(CAPABILITY, item).update, []
    for m, n in tiles:
        width = _width(own, n, item)
        if width:
            rows, pieces = own["BLOCK"] // width, 1
        else:
            name = "PLAIN" if width is None else "LONG"
            rows, pieces = own[f"R_{name}"], -(-n // own[f"BN_{name}"])
        block = 7 * min(rows, m) * n * item
        # Weights, gradient and moments are on their way at once; long rows are read once more.
        time = (LATENCY + WORK + 0.15) * pieces + (0 if width else 0.4 * pieces)
        found.append(Program(7 * m * n * item + 4 * n, block / time))
    return found


def predict(shapes, dtype: torch.dtype) -> Prediction:
    """Return what the model says of some matrices."""
    item, tiles = dtype.itemsize, tiles_of(shapes)
    size = sum(m * n for m, n in shapes) * item
    areas = [m * n for m, n in tiles]
    launches = {
        "gram_matvec": gram_matvec(tiles, item),
        "rank_one": rank_one(shapes, tiles, item),
        "update": update(tiles, item),
    }
    times = [simulate(p, MULTIPROCESSORS * PROGRAMS[name]) for name, p in launches.items()]
    # An optimizer's step ends with a launch that finishes the matrices.
    times[2] += simulate(chunks(shapes), MULTIPROCESSORS * PROGRAMS["rank_one"])
    floors = tuple(size * factor / BANDWIDTH for factor in (1, 2, 7))
    return Prediction(len(tiles), max(areas) * len(areas) / sum(areas), *times, floors)


def table() -> str:
    """Return the predictions for the cases, as Markdown; microseconds."""
    lines = [
        "| case | dtype | tiles | largest / mean | gram_matvec | of the copy rate "
        "| rank_one | of the copy rate | SpectralAdamW | of the bytes' time |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            if name in cases.LARGE and dtype == torch.float32:
                continue
            p = predict(cases.CASES[name](), dtype)
            read, add, step = p.floors
            lines.append(
                f"| {name} | {str(dtype)[6:]} | {p.programs} | {p.largest:.2f} "
                f"| {p.gram_matvec:.0f} | {100 * read / p.gram_matvec:.0f} % "
                f"| {p.rank_one:.0f} | {100 * add / p.rank_one:.0f} % "
                f"| {p.update:.0f} | {p.update / step:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
