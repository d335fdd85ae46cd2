"""``python -m bench.bounds``: train a small GPT-2 under bounds on sigma, and fine-tune it.

Runs go to ``runs.jsonl`` of the folder, a line each; the same command resumes. At the end, and with
``--report`` alone, ``report.md`` and a figure per setting are written. What is compared is in
``train.options``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from ..support.runs import FILE, cut_off, load, where
from ..support.workers import end_with_parent
from . import report
from .train import FINE_RATE, FINE_TUNING, RATES, Key, run

HELD = ("free", "decay", "cap 1", "cap 2", "cap 4", "cap mup", "sphere 2", "sphere mup")
MORE = {"muon": ("cap 2 of 16",)}  # vectors per matrix
# At the first lr alone: of matrices of attention and MLPs.
HIDDEN = {
    "adamw": ("cap mup, hidden", "sphere mup, hidden"),
    "muon": ("cap mup of 16, hidden", "sphere mup, hidden"),
}
FINE = ("free", "decay", "above 0.1", "both 0.1", "above 1", "both 1", "cap initial",
        "sphere initial")  # fmt: skip


def keys(seeds: int, steps: int) -> list[Key]:
    """Return all runs, those of the first seed first."""
    found = []
    for seed in range(seeds):
        for place in range(2):
            for optimizer, rates in RATES.items():
                ways = *HELD, *MORE.get(optimizer, ()), *(HIDDEN[optimizer] if place == 0 else ())
                found += [Key(optimizer, rates[place], held, seed, steps) for held in ways]
            if place == 0:
                found += [Key(FINE_TUNING, FINE_RATE, held, seed, steps) for held in FINE]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run what the folder lacks, then write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.bounds", description=__doc__)
    parser.add_argument("--out", default="bounds", type=Path)
    parser.add_argument("--seeds", default=1, type=int)
    parser.add_argument("--steps", default=300, type=int)
    parser.add_argument("--workers", default=len(os.sched_getaffinity(0)), type=int)
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / FILE
    done = {report.key_of(x) for x in load(options.out)}
    wanted = [] if options.report else keys(options.seeds, options.steps)
    todo = [key for key in wanted if key not in done]
    place = where()
    cut_off(path)
    context = multiprocessing.get_context("spawn")
    with (
        path.open("a") as file,
        ProcessPoolExecutor(options.workers, context, end_with_parent) as pool,
    ):
        futures = {pool.submit(run, key, options.out): key for key in todo}
        for n, future in enumerate(as_completed(futures), 1):
            file.write(json.dumps(future.result() | place) + "\n")
            file.flush()
            print(f"{n} of {len(todo)}: {futures[future]}", flush=True)
    for written in report.write(options.out):
        print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
