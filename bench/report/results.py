"""Results written by pytest-benchmark, grouped into tables and figures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from ..support.baselines import CONTENDERS, FLOORS, SEVERAL

# The first that was measured is "ours".
OURS = ("spectral_adamw", "triton", "cuda", "cpu", "attach")
LABELS = {
    **{name: contender.label for name, contender in (CONTENDERS | SEVERAL).items()},
    **FLOORS,
    "without": "without the regularizer",
    "attach": "ours, attached",
    "attach_alone": "what attach() adds, alone",  # in results up to 2026-11-27
    "penalty_in_graph": "penalty() in the graph",
    "penalty_beside": "penalty() beside it",
    "loop_in_graph": "autograd loop in the graph",
    "torch_adamw": "torch's fused AdamW alone",
    "torch_adamw_one_thread": "torch's fused AdamW alone, one thread",
    "spectral_adamw": "ours, SpectralAdamW",
    "torch_sgd": "torch's fused SGD alone",
    "spectral_sgd": "ours, SpectralSGD",
    "loop": "per-layer autograd loop, then torch's",
}


class Result(NamedTuple):
    """One benchmark: its suite and case, its median in seconds, and details of the case."""

    suite: str
    case: str
    dtype: str
    device_name: str
    threads: int
    contender: str
    median: float
    info: dict


class Run(NamedTuple):
    """The results of one or more files from one machine."""

    machine: str
    versions: str
    commit: str
    date: str
    results: list[Result]
    cpp_kernels: str = ""  # not in results up to 2026-11-29


def commit_name(info: dict) -> str:
    """Return the name of a commit, from pytest-benchmark's description of it."""
    return info["id"][:9] + (" with changes" if info["dirty"] else "")


def load(paths: Iterable[str | Path]) -> Run:
    """Read result files.

    Raises:
        ValueError: files from different machines, commits or builds of the C++ kernels, several
            GPUs or numbers of threads, or a file without results.
    """
    runs = []
    for path in paths:
        data = json.loads(Path(path).read_text())
        machine, commit = data["machine_info"], data["commit_info"]
        results = []
        for b in data["benchmarks"]:
            info = b["extra_info"]
            known = {field: info[field] for field in Result._fields if field in info}
            results.append(Result(**known, median=b["stats"]["median"], info=info))
        if not results:
            raise ValueError(f"{path}: expected benchmarks, got none")
        runs.append(
            Run(machine["device"], machine["versions"], commit_name(commit),
                data["datetime"][:10], results, machine.get("cpp_kernels", ""))
        )  # fmt: skip
    kinds = sorted({(run.machine, run.versions, run.commit, run.cpp_kernels) for run in runs})
    if len(kinds) > 1:
        raise ValueError(f"runs: expected one machine, commit and module per table, got {kinds}")
    results = [result for run in runs for result in run.results]
    conditions = {
        (r.info["device"], r.device_name, r.threads) for r in results if r.suite != "scaling"
    }
    if len(conditions) > len({device for device, _, _ in conditions}):
        raise ValueError(
            f"runs: expected one device and number of threads per table, got {sorted(conditions)}"
        )
    return runs[0]._replace(results=results)


def ours(found: dict[str, Result]) -> Result | None:
    """Return the result that counts as ours, from those of one case by contender, or None."""
    return next((found[name] for name in OURS if name in found), None)


def sections(run: Run) -> dict[tuple[str, str, str], list[Result]]:
    """Return the results by suite, dtype and device: one table each."""
    found: dict[tuple[str, str, str], list[Result]] = {}
    for r in run.results:
        found.setdefault((r.suite, r.dtype, r.device_name), []).append(r)
    return found


def by_case(results: list[Result]) -> dict[tuple[str, int], dict[str, Result]]:
    """Return the results by case and threads, and in these by contender."""
    cases: dict[tuple[str, int], dict[str, Result]] = {}
    for result in results:
        cases.setdefault((result.case, result.threads), {})[result.contender] = result
    return cases


def bandwidth(result: Result) -> float:
    """Return the bytes per second of a step that reads W once and reads and writes .grad once."""
    passes = {"floor_read": 1, "floor_add": 2, "floor_copy": 2}.get(result.contender, 3)
    size = getattr(torch, result.dtype).itemsize
    return passes * result.info["weights"] * size / result.median
