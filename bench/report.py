"""Tables and plots from pytest-benchmark's JSON: ``python -m bench.report RESULT.json...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .baselines import CONTENDERS, FLOORS, SEVERAL

# The first that was measured is "ours".
OURS = ("spectral_adamw", "triton", "cuda", "cpu", "attach")
LABELS = {
    **{name: contender.label for name, contender in (CONTENDERS | SEVERAL).items()},
    **FLOORS,
    "without": "without the regularizer",
    "attach": "ours, attached",
    "attach_alone": "what attach() adds, alone",
    "penalty_in_graph": "penalty() in the graph",
    "penalty_beside": "penalty() beside it",
    "loop_in_graph": "autograd loop in the graph",
    "torch_adamw": "torch's fused AdamW alone",
    "spectral_adamw": "ours, SpectralAdamW",
    "loop": "per-layer autograd loop, then torch's",
}


class Result(NamedTuple):
    """One benchmark: where it belongs, its median in seconds, and what is known of the case."""

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


def commit_name(info: dict) -> str:
    """Return what a result says of a commit that pytest-benchmark describes."""
    return info["id"][:9] + (" with changes" if info["dirty"] else "")


def load(paths: Iterable[str | Path]) -> Run:
    """Read result files.

    Raises:
        ValueError: files from different machines or commits, several GPUs or numbers of threads,
            or a file without results.
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
            raise ValueError(f"{path}: no benchmark in it")
        runs.append(
            Run(machine["device"], machine["versions"], commit_name(commit),
                data["datetime"][:10], results)
        )  # fmt: skip
    kinds = sorted({(run.machine, run.versions, run.commit) for run in runs})
    if len(kinds) > 1:
        raise ValueError(f"different machines or commits do not go into one table: {kinds}")
    results = [result for run in runs for result in run.results]
    conditions = {
        (r.info["device"], r.device_name, r.threads) for r in results if r.suite != "scaling"
    }
    if len(conditions) > len({device for device, _, _ in conditions}):
        raise ValueError(f"one table has one device and number of threads: {sorted(conditions)}")
    return runs[0]._replace(results=results)


def milliseconds(seconds: float) -> str:
    """Format a duration with three significant digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def ours(found: dict[str, Result]) -> Result | None:
    """Return the result that counts as ours among those of one case, by contender."""
    return next((found[name] for name in OURS if name in found), None)


def sections(run: Run) -> dict[tuple[str, str, str], list[Result]]:
    """Return the results by suite, dtype and device: what goes into one table."""
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


def tables(run: Run) -> str:
    """Return the whole report in Markdown: one table per suite, dtype and device."""
    out = [f"{run.machine}, {run.versions}, {run.date}, commit {run.commit}. Medians."]
    for (suite, dtype, device_name), results in sections(run).items():
        threads = "" if suite == "scaling" else f", {results[0].threads} threads"
        where = device_name + (threads if results[0].info["device"] == "cpu" else "")
        out += ["", f"### {suite}, {dtype}, {where}", ""]
        out += _TABLES.get(suite, _step_table)(results)
    return "\n".join(out) + "\n"


def _step_table(results: list[Result]) -> list[str]:
    lines = [
        "| case | weights | contender | ms | time / ours | time / floor | GB/s | first step, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (case, _), found in by_case(results).items():
        own, floor = ours(found), found.get("floor")
        for name, result in found.items():
            first = result.info.get("first_step_seconds")
            lines.append(
                f"| {case} | {result.info['weights'] / 1e6:.1f} M | {LABELS.get(name, name)} "
                f"| {milliseconds(result.median)} | {_ratio(result, own)} "
                f"| {'' if name in FLOORS else _ratio(result, floor)} "
                f"| {bandwidth(result) / 1e9:.1f} "
                f"| {'' if first is None else milliseconds(first)} |"
            )
    return lines


def _ratio(result: Result, base: Result | None) -> str:
    return "" if base is None else f"{result.median / base.median:.2f}"


def _training_table(results: list[Result]) -> list[str]:
    lines = ["| model | batch | contender | ms per step | overhead |", "|---|---|---|---|---|"]
    for (case, _), found in by_case(results).items():
        base = found.get("without")
        for name, result in found.items():
            more = ""
            if base is not None and name != "without":
                share = result.median / base.median - (name != "attach_alone")
                more = f"{100 * share:+.2f} %"
            lines.append(
                f"| {case} | {result.info['batch']} | {LABELS.get(name, name)} "
                f"| {milliseconds(result.median)} | {more} |"
            )
    return lines


def _optimizer_table(results: list[Result]) -> list[str]:
    lines = [
        "| model | parameters | torch's fused AdamW alone, ms | ours, ms | ours / torch "
        "| attached / torch | loop / torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for (case, _), found in by_case(results).items():
        base, own = found.get("torch_adamw"), found.get("spectral_adamw")
        times = ["" if r is None else milliseconds(r.median) for r in (base, own)]
        ratios = [
            _ratio(found[name], base) if name in found else ""
            for name in ("spectral_adamw", "attach", "loop")
        ]
        size = f"{next(iter(found.values())).info['weights'] / 1e6:.1f} M"
        lines.append(f"| {' | '.join((case, size, *times, *ratios))} |")
    return lines


def _memory_table(results: list[Result]) -> list[str]:
    lines = [
        "| case | weights | contender | extra MB | of the weights | bytes per row and column |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        size = getattr(torch, r.dtype).itemsize * r.info["weights"]
        lines.append(
            f"| {r.case} | {size / 1e6:.1f} MB | {LABELS.get(r.contender, r.contender)} "
            f"| {r.info['peak_bytes'] / 1e6:.2f} | {100 * r.info['peak_bytes'] / size:.1f} % "
            f"| {r.info['peak_bytes'] / r.info['sides']:.0f} |"
        )
    return lines


def _scaling_table(results: list[Result]) -> list[str]:
    names = list(dict.fromkeys(r.contender for r in results))
    lines = [
        "| weights | matrices | threads | "
        + " | ".join(f"{LABELS.get(name, name)}, ms" for name in names)
        + " | ours / floor | ours, GB/s |",
        "|---" * (len(names) + 5) + "|",
    ]
    for (_, threads), found in by_case(results).items():
        some, own = next(iter(found.values())), ours(found)
        times = [milliseconds(found[n].median) if n in found else "" for n in names]
        last = ["", ""]
        if own is not None:
            floor = found.get("floor")
            last = ["" if floor is None else _ratio(own, floor), f"{bandwidth(own) / 1e9:.1f}"]
        row = (f"{some.info['weights']:.3g}", some.info["matrices"], threads, *times, *last)
        lines.append(f"| {' | '.join(map(str, row))} |")
    return lines


_TABLES = {
    "training_step": _training_table,
    "compiled_step": _training_table,
    "optimizer_step": _optimizer_table,
    "memory": _memory_table,
    "scaling": _scaling_table,
}


def summary(run: Run, dtype: str = "float32") -> str:
    """Return one row per case of the penalty step: milliseconds and ratios, in Markdown.

    Raises:
        ValueError: results of several devices.
    """
    lines = [
        "| model | weights | autograd loop | compiled loop | ours | loop / ours "
        "| compiled / ours | ours / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chosen = [r for r in run.results if (r.suite, r.dtype) == ("penalty_step", dtype)]
    if len(names := {r.device_name for r in chosen}) > 1:
        raise ValueError(f"different devices do not go into one table: {sorted(names)}")
    for (case, _), found in by_case(chosen).items():
        own = ours(found)
        if own is None or not {"floor", "autograd_loop", "compiled_loop"} <= set(found):
            continue
        floor = found["floor"].median
        loop, compiled = found["autograd_loop"].median, found["compiled_loop"].median
        lines.append(
            f"| {case} | {own.info['weights'] / 1e6:.1f} M | {milliseconds(loop)} ms "
            f"| {milliseconds(compiled)} ms | **{milliseconds(own.median)} ms** "
            f"| {loop / own.median:.1f} | {compiled / own.median:.1f} | {own.median / floor:.2f} |"
        )
    return "\n".join(lines) + "\n"


def write(run: Run, folder: Path) -> None:
    """Write report.md and its plots into ``folder``."""
    from . import plots

    folder.mkdir(parents=True, exist_ok=True)
    names = plots.draw(run, folder)
    pictures = "".join(f"\n![{name}]({name})\n" for name in names)
    (folder / "report.md").write_text(tables(run) + pictures)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the report of the files named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="+", help="files that --benchmark-json wrote")
    parser.add_argument("--summary", action="store_true", help="print the README's table only")
    parser.add_argument("--dtype", default="float32", help="of the README's table")
    parser.add_argument("--out", type=Path, help="write report.md and plots into this folder")
    arguments = parser.parse_args(argv)
    try:
        run = load(arguments.files)
        text = summary(run, arguments.dtype) if arguments.summary else tables(run)
        if arguments.out is not None:
            write(run, arguments.out)
    except (OSError, ValueError, KeyError) as error:
        print(f"bench.report: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if arguments.out is None:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
