"""Tables from pytest-benchmark's JSON: ``python -m bench.report RESULT.json...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .baselines import CONTENDERS, FLOORS

OURS = ("triton", "cuda", "cpu", "attach")  # the first that was measured is "ours"
LABELS = {
    **{name: contender.label for name, contender in CONTENDERS.items()},
    **FLOORS,
    "without": "without the regularizer",
    "attach": "ours, attached",
    "attach_alone": "what attach() adds, alone",
}


class Result(NamedTuple):
    """One benchmark: where it belongs, its median in seconds, and what is known of the case."""

    suite: str
    case: str
    dtype: str
    contender: str
    median: float
    info: dict


class Run(NamedTuple):
    """The results of one or more files from one device."""

    device: str
    versions: str
    commit: str
    date: str
    results: list[Result]


def load(paths: Sequence[str | Path]) -> Run:
    """Read result files.

    Raises:
        ValueError: files from different devices, or a file without results.
    """
    runs = []
    for path in paths:
        data = json.loads(Path(path).read_text())
        machine, commit = data["machine_info"], data["commit_info"]
        results = [
            Result(*(b["extra_info"][k] for k in ("suite", "case", "dtype", "contender")),
                   b["stats"]["median"], b["extra_info"])
            for b in data["benchmarks"]
        ]  # fmt: skip
        if not results:
            raise ValueError(f"{path}: no benchmark in it")
        versions = f"{machine['threads']} threads, torch {machine['torch']}"
        dirty = " with changes" if commit["dirty"] else ""
        runs.append(
            Run(machine["device"], versions, commit["id"][:9] + dirty, data["datetime"][:10],
                results)
        )  # fmt: skip
    devices = sorted({(run.device, run.versions) for run in runs})
    if len(devices) > 1:
        raise ValueError(f"different machines do not go into one table: {devices}")
    return runs[0]._replace(results=[result for run in runs for result in run.results])


def milliseconds(seconds: float) -> str:
    """Format a duration with three significant digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def tables(run: Run) -> str:
    """Return the whole report in Markdown: one table per suite and dtype, a row per contender."""
    out = [f"{run.device}, {run.versions}, {run.date}, commit {run.commit}. Medians."]
    for suite, dtype in dict.fromkeys((r.suite, r.dtype) for r in run.results):
        out += ["", f"### {suite}, {dtype}", ""]
        chosen = [r for r in run.results if (r.suite, r.dtype) == (suite, dtype)]
        out += _step_table(chosen) if suite != "training_step" else _training_table(chosen)
    return "\n".join(out) + "\n"


def _by_case(results: list[Result]) -> dict[str, dict[str, Result]]:
    cases: dict[str, dict[str, Result]] = {}
    for result in results:
        cases.setdefault(result.case, {})[result.contender] = result
    return cases


def _step_table(results: list[Result]) -> list[str]:
    lines = [
        "| case | weights | contender | ms | time / ours | time / floor | GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    itemsize = {"float32": 4, "bfloat16": 2}
    for case, found in _by_case(results).items():
        ours = next((found[name].median for name in OURS if name in found), None)
        floor = found["floor"].median if "floor" in found else None
        for name, result in found.items():
            # W is read once, .grad read and written once.
            passes = {"floor_read": 1, "floor_add": 2}.get(name, 3)
            bandwidth = passes * result.info["weights"] * itemsize[result.dtype] / result.median
            lines.append(
                f"| {case} | {result.info['weights'] / 1e6:.1f} M | {LABELS.get(name, name)} "
                f"| {milliseconds(result.median)} "
                f"| {'' if ours is None else f'{result.median / ours:.2f}'} "
                f"| {'' if floor is None or name in FLOORS else f'{result.median / floor:.2f}'} "
                f"| {bandwidth / 1e9:.1f} |"
            )
    return lines


def _training_table(results: list[Result]) -> list[str]:
    lines = ["| model | contender | ms per step | overhead |", "|---|---|---|---|"]
    for case, found in _by_case(results).items():
        base = found["without"].median if "without" in found else None
        for name, result in found.items():
            share = 0.0 if base is None else result.median / base - (name != "attach_alone")
            more = "" if base is None or name == "without" else f"{100 * share:+.2f} %"
            lines.append(
                f"| {case} | {LABELS.get(name, name)} | {milliseconds(result.median)} | {more} |"
            )
    return lines


def summary(run: Run, dtype: str = "float32") -> str:
    """Return one row per case of the penalty step: milliseconds and ratios, in Markdown."""
    lines = [
        "| model | weights | autograd loop | compiled loop | ours | loop / ours "
        "| compiled / ours | ours / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chosen = [r for r in run.results if (r.suite, r.dtype) == ("penalty_step", dtype)]
    for case, found in _by_case(chosen).items():
        if not {"cpu", "floor", "autograd_loop", "compiled_loop"} <= set(found):
            continue
        ours, floor = found["cpu"].median, found["floor"].median
        loop, compiled = found["autograd_loop"].median, found["compiled_loop"].median
        lines.append(
            f"| {case} | {found['cpu'].info['weights'] / 1e6:.1f} M | {milliseconds(loop)} ms "
            f"| {milliseconds(compiled)} ms | **{milliseconds(ours)} ms** | {loop / ours:.1f} "
            f"| {compiled / ours:.1f} | {ours / floor:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of the files named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", help="files that --benchmark-json wrote")
    parser.add_argument("--summary", action="store_true", help="the README's table only")
    arguments = parser.parse_args(argv)
    try:
        run = load(arguments.files)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    print(summary(run) if arguments.summary else tables(run), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
