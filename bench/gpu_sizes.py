"""Find the fastest sizes of blocks and tiles on this GPU: ``python -m bench.gpu_sizes FILE``.

Times each launch of Triton's kernels for CHOICES of blocks and CUTS into tiles, and those of CUDA
C++ for the cuts. Writes a JSON line per median, microseconds, at once. The sizes in use are in
backends/triton/sizes.py and tables/plan.py. Results are not checked here, but by ``python -m
bench.on_gpu``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from spectral_kernels import SpectralAdamW
from spectral_kernels.backends.choice import unavailable
from spectral_kernels.backends.triton import backend as triton_backend
from spectral_kernels.backends.triton import launch, precompile
from spectral_kernels.backends.triton.sizes import sizes
from spectral_kernels.tables import plan

from .gpu import inputs
from .gpu.measure import captured, synchronize

CASES = ("vit_b", "gpt2", "resnet18", "llama_1b")
KERNELS = ("gram_matvec", "rank_one", "update")
_LEAST, _ROUNDS = 4, 5  # launches in a graph, and replays of it


class Choice(NamedTuple):
    """Other sizes of one kernel, for elements of ``itemsize`` bytes; see sizes.Sizes."""

    kernel: str
    itemsize: int
    warps: int
    registers: int | None
    constants: dict[str, int]

    def sizes(self, capability: int, itemsize: int, r: int = 1, large: bool = False):
        """Return the result of ``sizes.sizes`` with this choice in it."""
        found = sizes(capability, itemsize, r, large)
        if itemsize != self.itemsize:
            return found
        own = {**getattr(found, self.kernel), **self.constants}
        others = {f"{self.kernel}_warps": self.warps}
        if self.registers is not None:
            others[f"{self.kernel}_registers"] = self.registers
        return found._replace(**{self.kernel: own}, **others)


CHOICES = [
    *(Choice("gram_matvec", 2, warps, 128, {"BLOCK": block, "STAGES": stages})
      for warps, block in ((4, 4096), (8, 8192)) for stages in (2, 3, 4)),
    Choice("gram_matvec", 2, 8, 128, {"BLOCK": 8192, "STAGES": 0, "WIDTHS": 7}),
    *(Choice("gram_matvec", 4, warps, 128, {"STAGES": stages})
      for warps in (4, 8) for stages in (0, 3, 4)),
    *(Choice("rank_one", itemsize, warps, None, {"R": r, "BN": bn}) for itemsize in (2, 4)
      for warps, r, bn in ((4, 16, 512), (8, 16, 512), (4, 16, 256), (8, 8, 512))),
    *(Choice("update", 2, warps, registers, {"BLOCK": 2048, "WIDTHS": widths})
      for warps, registers in ((4, 168), (8, 128)) for widths in (5, 6)),
    *(Choice("update", 4, warps, registers, {"BLOCK": 1024, "WIDTHS": widths})
      for warps, registers in ((4, 168), (8, 128)) for widths in (4, 5)),
]  # fmt: skip
CUTS = [
    {"PROGRAMS": 528, "MOST_ELEMENTS": 64 * 1024, "TILES": 1056, "MOST_ROWS": 256},
    {"PROGRAMS": 264, "MOST_ELEMENTS": 32 * 1024, "TILES": 2048, "MOST_ROWS": 128},
    {"PROGRAMS": 528, "MOST_ELEMENTS": 128 * 1024, "TILES": 528, "MOST_ROWS": 512},
]


@contextlib.contextmanager
def chosen(choice: Choice | None) -> Iterator[None]:
    """Launch kernels with the sizes of ``choice``, or with the usual ones for None."""
    own = sizes if choice is None else choice.sizes
    with mock.patch.object(launch, "sizes", own), mock.patch.object(triton_backend, "sizes", own):
        launch.variant.cache_clear()
        yield
    launch.variant.cache_clear()


def compiled(choice: Choice) -> tuple[Choice, float, str | None]:
    """Compile a choice's kernels into Triton's cache; return its seconds and the error, if any."""
    start = time.perf_counter()
    dtype = torch.bfloat16 if choice.itemsize == 2 else torch.float32
    try:
        with chosen(choice):
            for description in precompile.core(dtype):
                if description.kernel == choice.kernel:
                    description.variant(launch.capability_of(torch.device("cuda"))).compile()
    except Exception as error:  # some sizes do not compile
        return choice, time.perf_counter() - start, f"{type(error).__name__}: {error}"[:200]
    return choice, time.perf_counter() - start, None


def launches(sets, backend: str) -> dict[str, list[Callable[[], object]]]:
    """Return a launch of each kernel for every set of weights."""
    found = {name: [] for name in KERNELS}
    for weights in sets:
        reg = inputs.regularizer(weights, backend)
        reg.accumulate_grad_()
        named = [(f"{i}.weight", w) for i, w in enumerate(weights)]
        optimizer = SpectralAdamW(named, 1e-6, strength=inputs.STRENGTH, backend=backend)
        optimizer.step()
        for bucket in reg._buckets.buckets:
            own, grads = (bucket.plan, bucket.state), bucket.grads()
            ours = bucket.backend
            found["gram_matvec"].append(lambda own=own, ours=ours: ours.gram_matvec(*own))
            found["rank_one"].append(
                lambda own=own, ours=ours, grads=grads, kept=reg: ours.finish(*own, grads, True)
            )
        for update in optimizer._updates:
            found["update"].append(lambda x=update, kept=optimizer: x.backend.update(x.as_step()))
    return found


def microseconds(functions: Sequence[Callable[[], object]], device: str) -> float:
    """Return the median time of one of ``functions``, replayed as a graph on a GPU."""
    functions = list(functions) * -(-_LEAST // len(functions))
    for function in functions:
        function()
    synchronize(device)
    replay = captured(functions) if device == "cuda" else lambda: [f() for f in functions]
    times = []
    for _ in range(_ROUNDS if device == "cuda" else 1):
        start = time.perf_counter()
        replay()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / len(functions)


def run(put: Callable[..., object], cases: Sequence[str], until: float, dry_run: bool) -> None:
    """Time all cases, cut by cut, until the time is up."""
    device = "cpu" if dry_run else "cuda"
    for case, dtype in [(c, d) for d in (torch.bfloat16, torch.float32) for c in cases]:
        if dtype == torch.float32 and case == "llama_1b":
            continue
        sets = inputs.input_sets(inputs.shapes(case, dry_run), dtype, device)
        for cut in CUTS:
            with mock.patch.multiple(plan, **cut):
                for backend in ("triton", *(() if unavailable("cuda") else ("cuda",))):
                    found = launches(sets, backend)
                    for choice in [None, *(CHOICES if backend == "triton" else ())]:
                        if choice is not None and choice.itemsize != dtype.itemsize:
                            continue
                        for name in KERNELS if choice is None else [choice.kernel]:
                            if time.monotonic() > until:
                                put(left_out="the time is used up", case=case, dtype=str(dtype))
                                return
                            line = {"case": case, "dtype": str(dtype)[6:], "cut": cut,
                                    "backend": backend, "kernel": name,
                                    "choice": choice and choice._asdict()}  # fmt: skip
                            try:
                                with chosen(choice):
                                    put(**line, microseconds=microseconds(found[name], device))
                            except Exception as error:
                                put(**line, error=f"{type(error).__name__}: {error}"[:200])
                    del found
                    gc.collect()
        del sets
        gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sizes", description=__doc__)
    parser.add_argument("file", type=Path, help="gets the lines")
    parser.add_argument("--seconds", type=float, default=120, help="default: %(default)g")
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases, interpreted on a CPU")
    arguments = parser.parse_args(argv)
    until = time.monotonic() + arguments.seconds
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --dry-run rehearses on a CPU")
    with arguments.file.open("w") as file:

        def put(**line):
            file.write(json.dumps(line) + "\n")
            file.flush()

        if not arguments.dry_run:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
                for choice, seconds, error in pool.map(compiled, CHOICES):
                    put(compiled=choice._asdict(), seconds=seconds, error=error)
        run(put, arguments.cases.split(","), until, arguments.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
