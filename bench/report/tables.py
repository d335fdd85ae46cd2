"""Tables of results in Markdown."""

from __future__ import annotations

import torch

from ..support.baselines import FLOORS
from .results import LABELS, Result, Run, bandwidth, by_case, ours, sections


def milliseconds(seconds: float) -> str:
    """Format a duration with three significant digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def tables(run: Run) -> str:
    """Return the whole report in Markdown: one table per suite, dtype and device."""
    out = [f"{run.machine}, {run.versions}, {run.date}, commit {run.commit}. Medians."]
    if run.cpp_kernels:
        out += ["", f"{run.cpp_kernels[0].upper()}{run.cpp_kernels[1:]}."]
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
    has_sgd = any(r.contender == "spectral_sgd" for r in results)
    lines = [
        "| model | parameters | torch's fused AdamW alone, ms | ours, ms | ours / torch "
        "| attached / torch | loop / torch |" + has_sgd * " SpectralSGD / torch's fused SGD |",
        "|---|---|---|---|---|---|---|" + has_sgd * "---|",
    ]
    for (case, _), found in by_case(results).items():
        base, own = found.get("torch_adamw"), found.get("spectral_adamw")
        times = ["" if r is None else milliseconds(r.median) for r in (base, own)]
        ratios = [
            _ratio(found[name], base) if name in found else ""
            for name in ("spectral_adamw", "attach", "loop")
        ]
        if has_sgd:
            sgd = found.get("spectral_sgd")
            ratios.append("" if sgd is None else _ratio(sgd, found.get("torch_sgd")))
        size = f"{next(iter(found.values())).info['weights'] / 1e6:.1f} M"
        lines.append(f"| {' | '.join((case, size, *times, *ratios))} |")
    return lines


def _busy_table(results: list[Result]) -> list[str]:
    lines = [
        "| model | busy processes | contender | median, ms | 99th percentile, ms |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.case} | {r.info['processes']} | {LABELS.get(r.contender, r.contender)} "
        f"| {milliseconds(r.median)} | {milliseconds(r.info['p99_seconds'])} |"
        for r in results
    ]
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
    "busy_step": _busy_table,
    "memory": _memory_table,
    "scaling": _scaling_table,
}


# What others would write instead; shorter names than in LABELS.
RIVALS = {
    "autograd_loop": "with autograd",
    "inplace_loop": "in place",
    "compiled_loop": "compiled",
    "stacked_bmm": "stacked",
}


def summary(run: Run, dtype: str = "float32") -> str:
    """Return one row per case of the penalty step: milliseconds and ratios, in Markdown.

    Raises:
        ValueError: results of several devices.
    """
    lines = [
        "| model | weights | autograd loop | best rival | ours | loop / ours | rival / ours "
        "| ours / floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chosen = [r for r in run.results if (r.suite, r.dtype) == ("penalty_step", dtype)]
    if len(names := {r.device_name for r in chosen}) > 1:
        raise ValueError(f"runs: expected one device per table, got {sorted(names)}")
    for (case, _), found in by_case(chosen).items():
        own = ours(found)
        if own is None or not {"floor", "autograd_loop", "compiled_loop"} <= set(found):
            continue
        loop, floor = found["autograd_loop"].median, found["floor"].median
        name = min(RIVALS.keys() & found.keys(), key=lambda name: found[name].median)
        rival = found[name].median
        lines.append(
            f"| {case} | {own.info['weights'] / 1e6:.1f} M | {milliseconds(loop)} ms "
            f"| {RIVALS[name]}, {milliseconds(rival)} ms | **{milliseconds(own.median)} ms** "
            f"| {loop / own.median:.1f} | {rival / own.median:.1f} | {own.median / floor:.2f} |"
        )
    return "\n".join(lines) + "\n"
