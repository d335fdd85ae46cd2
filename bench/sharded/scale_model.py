"""``python -m bench.sharded.scale_model``: estimated cost for sharded weights at scale.

A decoder of L layers with widths d (model), f (hidden) and c (keys and values) has per layer the
matrices q, o [d, d], k, v [c, d], gate, up [f, d] and down [d, f], and a head [vocabulary, d].
With P weights in them, spread by rows over R ranks, n vectors per matrix, m matrices and b gains,
a rank moves per step

    memory        bytes_per_weight P / R           one read of W (SpectralRegularizer)
                  + 2 * bytes_per_weight P / R     one read and one write of the gradient
                  or nothing (SpectralAdamW, whose own pass over the weights does it)
    all-reduce 1  4 n * (sum of columns of all matrices)       t = W^T s, float32
    all-reduce 2  8 (n^2 m + 2 b)                              S S^T and the norms, float64

An all-reduce of S bytes takes 2 (R - 1) / R * S / bandwidth + 2 log2(R) * latency (a tree; Thakur,
Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005),
memory its bytes over its bandwidth, and a training step 6 P tokens / (R * flops), with 4, 8 and 16
million tokens per step for the three sizes. The estimate assumes no overlap; all-reduces that
overlap with other work cost less. Left out is the time of Python and of launching some small
operations, which does not grow with the weights.

``--check`` counts the collectives of a step of a small decoder on 64 ranks of torch's fake process
group and compares them with these formulas.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import NamedTuple

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from spectral_kernels import SpectralRegularizer
from tests.support.collectives import Collectives


class Decoder(NamedTuple):
    """Sizes of a decoder, and how many tokens a step trains on."""

    name: str
    layers: int
    width: int
    hidden: int
    key_width: int
    vocabulary: int
    tokens: int

    def matrices(self) -> list[tuple[int, int]]:
        """Return the shape [rows, columns] of every matrix."""
        d, f, c = self.width, self.hidden, self.key_width
        layer = [(d, d), (c, d), (c, d), (d, d), (f, d), (f, d), (d, f)]
        return self.layers * layer + [(self.vocabulary, d)]

    def gains(self) -> int:
        """Return the number of norms."""
        return 2 * self.layers + 1


DECODERS = (
    Decoder("7B", 32, 4096, 11008, 4096, 32000, 4 << 20),
    Decoder("70B", 80, 8192, 28672, 1024, 128256, 8 << 20),
    Decoder("400B", 126, 16384, 53248, 1024, 128256, 16 << 20),
)
SMALL = Decoder("small", 2, 96, 200, 32, 130, 1)  # of the check; 64 ranks do not divide its rows


class Machine(NamedTuple):
    """One rank; the defaults are round numbers for an H100 with a 400 Gbit/s link."""

    memory: float  # bytes per second
    link: float  # the same
    latency: float  # seconds per step of an all-reduce
    flops: float  # per second, at the utilization that is reached


class Cost(NamedTuple):
    """Bytes and seconds of one step on one rank."""

    memory: float
    products: int
    numbers: int
    seconds: float
    step: float


def collectives(decoder: Decoder, n_vectors: int) -> tuple[int, int]:
    """Return the bytes of the two all-reduces."""
    matrices = decoder.matrices()
    products = 4 * n_vectors * sum(columns for _, columns in matrices)
    return products, 8 * (n_vectors**2 * len(matrices) + 2 * decoder.gains())


def cost(decoder: Decoder, ranks: int, n_vectors: int, fused: bool, machine: Machine) -> Cost:
    """Return the formulas' estimate for float32 weights; ``fused``: SpectralAdamW."""
    weights = sum(rows * columns for rows, columns in decoder.matrices())
    memory = 0.0 if fused else 3 * 4 * weights / ranks
    sizes = collectives(decoder, n_vectors)
    seconds = memory / machine.memory
    for size in sizes if ranks > 1 else ():
        seconds += 2 * (ranks - 1) / ranks * size / machine.link
        seconds += 2 * math.ceil(math.log2(ranks)) * machine.latency
    step = 6 * weights * decoder.tokens / (ranks * machine.flops)
    return Cost(memory, *sizes, seconds, step)


def counted(decoder: Decoder, ranks: int, n_vectors: int) -> list[tuple[str, int]]:
    """Return name and bytes of the collectives of one step on one of ``ranks`` fake ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        layers = [nn.Linear(columns, rows, bias=False) for rows, columns in decoder.matrices()]
        norms = [nn.RMSNorm(decoder.width) for _ in range(decoder.gains())]
        model = nn.Sequential(*layers, *norms)
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        reg = SpectralRegularizer(model, n_vectors=n_vectors)
        reg.accumulate_grad_()
        with Collectives() as seen:
            reg.accumulate_grad_()
    finally:
        dist.destroy_process_group()
    return seen.found


def check(ranks: int = 64) -> list[tuple[int, list[tuple[str, int]], tuple[int, int]]]:
    """Return (n_vectors, collectives counted, bytes by the formulas) for one and four vectors."""
    return [(n, counted(SMALL, ranks, n), collectives(SMALL, n)) for n in (1, 4)]


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the check."""
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m bench.sharded.scale_model", None, __doc__, formatter_class=as_it_is
    )
    parser.add_argument("--ranks", default="8,64,512,4096")
    parser.add_argument("--n-vectors", default=1, type=int)
    parser.add_argument("--memory", default=3e12, type=float, help="bytes per second")
    parser.add_argument("--link", default=50e9, type=float, help="bytes per second and rank")
    parser.add_argument("--latency", default=10e-6, type=float, help="seconds per hop")
    parser.add_argument("--flops", default=400e12, type=float, help="reached in training")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    console = Console()
    if options.check:
        for n, found, predicted in check():
            agree = found == [("allreduce_", size) for size in predicted]
            console.print(f"{n} vectors, 64 fake ranks: counted {found}, predicted {predicted}: "
                          f"{'the same' if agree else 'DIFFERENT'}")  # fmt: skip
            if not agree:
                return 1
        return 0
    machine = Machine(options.memory, options.link, options.latency, options.flops)
    table = Table(
        title=f"One step of the penalty, {options.n_vectors} vector(s) per matrix, float32"
    )
    for head in ("weights", "ranks", "memory, MB", "t, MB", "numbers, kB", "attached, ms",
                 "in the optimizer, ms", "training step, ms", "attached, %",
                 "in the optimizer, %"):  # fmt: skip
        table.add_column(head, justify="right")
    for decoder in DECODERS:
        for ranks in map(int, options.ranks.split(",")):
            attached, fused = (
                cost(decoder, ranks, options.n_vectors, own, machine) for own in (False, True)
            )
            table.add_row(
                decoder.name, str(ranks), f"{attached.memory / 1e6:,.0f}",
                f"{attached.products / 1e6:.1f}", f"{attached.numbers / 1e3:.1f}",
                f"{1e3 * attached.seconds:.2f}", f"{1e3 * fused.seconds:.2f}",
                f"{1e3 * attached.step:,.0f}", f"{100 * attached.seconds / attached.step:.3f}",
                f"{100 * fused.seconds / fused.step:.3f}",
            )  # fmt: skip
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
