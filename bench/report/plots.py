"""Figures of a run: bars per case, cost against size, and memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..support.baselines import FLOORS
from .results import LABELS, Result, Run, by_case, ours, sections

# Okabe and Ito's colours, safe for colour-blind readers; marker shapes differ too.
_OURS = "#D55E00"
_OTHERS = [("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
           ("#56B4E9", "P"), ("#000000", "X"), ("#999999", "*")]  # fmt: skip
_BAR = "#A9BCCF"
_DOT = "#5B7C99"
_GREY = "0.35"
_HEADINGS = {
    "penalty_step": "power iteration and gradient of every matrix",
    "autograd": "penalty() forward and backward",
    "subspace": "power iteration and gradient with one vector per matrix and with several",
    "optimizer_step": "AdamW's step with the penalty and without",
}
_COLUMNS = 3
_WIDEST = 8  # bars are cut off at this multiple of ours
_LEAST_BYTES = 1e6  # memory of smaller cases is mostly pages of the operating system
_LEAST_PERCENT = 0.01  # smaller values, and zero, are drawn here on a log scale
# For numbers over lines of the grid and of the floor.
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def draw(run: Run, folder: Path) -> list[str]:
    """Write PNGs into ``folder``, which exists; return their names."""
    names = []
    for name, figure in pictures(run):
        figure.savefig(folder / name, format="png")
        names.append(name)
    return names


def pictures(run: Run) -> Iterator[tuple[str, Figure]]:
    """Yield file names and figures."""
    for wanted in _HEADINGS:
        for (suite, dtype, _), results in sections(run).items():
            if suite == wanted and (names := _contenders(results)):
                device = results[0].info["device"]
                yield f"bars_{suite}_{dtype}_{device}.png", _bars(results, names)
    for device, results in _by_device(run, "scaling").items():
        for kind, (chosen, x, label) in _scalings(results).items():
            yield f"scaling_{kind}_{device}.png", _lines(chosen, x, label)
    for device, results in _by_device(run, "memory").items():
        if large := [r for r in results if _weight_bytes(r) >= _LEAST_BYTES]:
            yield f"memory_{device}.png", _memory(large)


def _by_device(run: Run, suite: str) -> dict[str, list[Result]]:
    found = defaultdict(list)
    for result in run.results:
        if result.suite == suite:
            found[result.info["device"]].append(result)
    return found


def _contenders(results: list[Result]) -> list[str]:
    """Return the contenders without floors: ours, then the others in order."""
    names = dict.fromkeys(r.contender for r in results if r.contender not in FLOORS)
    own = _own(results)
    return sorted(names, key=lambda name: name != own)


def _own(results: list[Result]) -> str | None:
    own = ours({r.contender: r for r in results})
    return None if own is None else own.contender


def _weight_bytes(result: Result) -> int:
    return result.info["weights"] * getattr(torch, result.dtype).itemsize


def _number(x: float) -> str:
    """Format with three significant digits, but never an exponent."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _count(x: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{_number(x / size)} {unit}"
    return _number(x)


def _and_threads(text: str, result: Result) -> str:
    if result.info["device"] != "cpu":
        return text
    return f"{text}, {result.threads} thread{'s' if result.threads > 1 else ''}"


def _figure(width: float, height: float, heading: str) -> Figure:
    # At least as wide as most headings.
    figure = Figure(figsize=(max(width, 6.5), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading, fontsize="large")
    return figure


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_log(axis: Axis, digits: tuple[int, ...], text: Callable[[float], str]) -> None:
    """Label a log axis at ``digits`` of every decade, without exponents."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda x, _: text(x)))
    axis.set_minor_formatter(NullFormatter())


def _panels(titles: list[str], names: list[str], own: str | None, heading: str) -> list[Axes]:
    """Return a panel per title, with a row for each of ``names`` and a free one above them."""
    columns = min(_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    height = 0.7 + rows * (0.85 + 0.23 * len(names))
    figure = _figure(2.3 + 2.6 * columns, height, heading)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    grid[0, 0].set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
    grid[0, 0].set_ylim(len(names) - 0.4, -1.5)
    if own is not None:
        for left in grid[:, 0]:
            left.get_yticklabels()[0].set_fontweight("bold")
    panels = list(grid.flat[: len(titles)])
    for axes, title in zip(panels, titles, strict=True):
        _dress(axes, title)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize="small")
    for axes in grid.flat[len(titles) :]:
        axes.set_visible(False)
    return panels


def _bars(results: list[Result], names: list[str]) -> Figure:
    some, own = results[0], _own(results)
    device = _and_threads(some.device_name, some)
    heading = f"{some.suite}, {some.dtype}: {_HEADINGS[some.suite]}\n{device}"
    cases = {key: found for key, found in by_case(results).items() if found.keys() & {*names}}
    firsts = [next(iter(found.values())) for found in cases.values()]
    titles = [f"{r.case}, {_count(r.info['weights'])} weights" for r in firsts]
    panels = _panels(titles, names, own, heading)
    for axes, found in zip(panels, cases.values(), strict=True):
        _bar_panel(axes, names, found, own)
    return panels[0].figure


def _bar_panel(axes: Axes, names: list[str], found: dict[str, Result], own: str | None) -> None:
    own_result = found.get(own)
    base = own_result or min((found[n] for n in names if n in found), key=lambda r: r.median)
    limit = _WIDEST * base.median
    unit, scale = ("µs", 1e6) if limit < 1e-3 else ("ms", 1e3)
    limit *= scale
    floor = found["floor"].median * scale if "floor" in found else 0
    for y, name in enumerate(names):
        if name not in found:
            axes.text(0.02 * limit, y, "not measured", va="center", fontsize="x-small",
                      color=_GREY, style="italic", bbox=_ON_WHITE)  # fmt: skip
            continue
        time = found[name].median * scale
        text = f"{_number(time)} {unit}"
        if own_result is not None and name != own:
            ratio = found[name].median / own_result.median
            text += f"   {ratio:.1f}x" if ratio < 10 else f"   {ratio:.0f}x"
        color = _OURS if name == own else _BAR
        axes.barh(y, min(time, limit), height=0.72, color=color)
        end = 0.98 * time
        if time > limit:
            axes.plot(limit, y, marker=">", markersize=9.5, color=color, markeredgewidth=0,
                      clip_on=False)  # fmt: skip
            for x in (0.93, 0.955):
                axes.plot([x * limit, (x + 0.02) * limit], [y + 0.42, y - 0.42],
                          color="white", linewidth=1.4)  # fmt: skip
            end = 0.91 * limit
        if time > 0.62 * limit:
            axes.text(end, y, text, va="center", ha="right", fontsize="small")
        else:
            axes.text(max(time, floor) + 0.02 * limit, y, text, va="center", fontsize="small",
                      fontweight="bold" if name == own else None, bbox=_ON_WHITE)  # fmt: skip
    if floor:
        axes.axvline(floor, ymax=0.95, color=_GREY, linewidth=1.2, linestyle="--")
        axes.text(floor + 0.02 * limit, -0.9, f"floor {_number(floor)} {unit}", va="center",
                  fontsize="small", color=_GREY, bbox=_ON_WHITE)  # fmt: skip
    axes.set(xlim=(0, limit), xlabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10)))


def _scalings(results: list[Result]) -> dict[str, tuple[list[Result], str, str]]:
    """Return results, x and its label for "weights" and "layers", where two sizes were measured."""
    by_matrices, by_weights = defaultdict(list), defaultdict(list)
    for r in results:
        by_matrices[r.info["matrices"]].append(r)
        by_weights[r.case.split(" in ")[0]].append(r)

    def sizes(chosen: list[Result], x: str) -> int:
        return len({r.info[x] for r in chosen})

    matrices = max(by_matrices, key=lambda n: sizes(by_matrices[n], "weights"))
    weights = max(by_weights, key=lambda w: sizes(by_weights[w], "matrices"))
    found = {
        "weights": (by_matrices[matrices], "weights", f"weights, in {matrices} matrices"),
        "layers": (
            by_weights[weights], "matrices", f"matrices that share {_count(float(weights))} weights"
        ),
    }  # fmt: skip
    return {kind: f for kind, f in found.items() if sizes(f[0], f[1]) > 1}


def _lines(results: list[Result], x: str, label: str) -> Figure:
    panels = defaultdict(list)
    for r in results:
        panels[_and_threads(r.dtype, r)].append(r)
    heading = f"Time of a step against the number of {x}\n{results[0].device_name}"
    figure = _figure(1 + 3.7 * len(panels), 4.6, heading)
    own, handles, reference = _own(results), {}, {}
    names = [n for n in _contenders(results) if n != own]
    styles = {n: _OTHERS[i % len(_OTHERS)] for i, n in enumerate(names)}
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, chosen) in zip(grid, panels.items(), strict=True):
        axes.set(xscale="log", yscale="log", xlabel=f"{label} (log scale)")
        _dress(axes, title)
        for name in (own, *styles, "floor"):
            points = sorted((r.info[x], 1e3 * r.median) for r in chosen if r.contender == name)
            if not points:
                continue
            color, marker = styles.get(name, (_OURS, "o"))
            style = {"color": color, "marker": marker, "linewidth": 1.4, "markersize": 4.5}
            if name == "floor":
                style = {"color": _GREY, "linestyle": "--", "linewidth": 1.2, "zorder": 5}
            elif name == own:
                style |= {"linewidth": 2.2, "markersize": 5.5, "zorder": 4}
            handles[LABELS.get(name, name)] = axes.plot(*zip(*points, strict=True), **style)[0]
            if name == own and x == "weights":
                (last, time), first = points[-1], points[0][0]
                line = axes.plot([first, last], [time * first / last, time],
                                 color="0.1", linewidth=0.8, linestyle=":", zorder=5)  # fmt: skip
                reference = {"proportional to the weights": line[0]}
    grid[0].set_ylabel("ms per step (log scale)")
    for axis, values, text in (
        (grid[0].xaxis, [r.info[x] for r in results], _count),
        (grid[0].yaxis, [1e3 * r.median for r in results], _number),
    ):
        _plain_log(axis, (1, 2, 5) if max(values) < 1000 * min(values) else (1,), text)
    handles |= reference
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False,
                  ncols=1 + len(panels))  # fmt: skip
    return figure


def _memory(results: list[Result]) -> Figure:
    names, own = _contenders(results), _own(results)
    cases = defaultdict(dict)
    for r in results:
        cases[r.case, r.dtype][r.contender] = r
    percent = [max(100 * r.info["peak_bytes"] / _weight_bytes(r), _LEAST_PERCENT) for r in results]
    sizes = [_weight_bytes(next(iter(found.values()))) for found in cases.values()]
    titles = [
        f"{case}, {dtype} ({_number(size / 1e6)} MB)"
        for (case, dtype), size in zip(cases, sizes, strict=True)
    ]
    heading = f"Extra memory at the peak (in brackets: the weights)\n{results[0].device_name}"
    panels = _panels(titles, names, own, heading)
    left, right = 0.5 * min(percent), 30 * max(*percent, 100)
    for axes, size, found in zip(panels, sizes, cases.values(), strict=True):
        axes.set(xscale="log", xlim=(left, right), xlabel="% of the weights (log scale)")
        for y, name in enumerate(names):
            if name not in found:
                continue
            extra = found[name].info["peak_bytes"]
            x = max(100 * extra / size, _LEAST_PERCENT)
            strong = name == own
            line, dot = (_OURS, _OURS) if strong else (_BAR, _DOT)
            axes.plot([left, x], [y, y], color=line, linewidth=1.6 + strong)
            axes.plot(x, y, "o", color=dot, markersize=6 + strong)
            axes.text(1.5 * x, y, f"{_number(extra / 1e6)} MB", va="center", fontsize="small",
                      fontweight="bold" if strong else None, bbox=_ON_WHITE)  # fmt: skip
        axes.axvline(100, ymax=0.95, color=_GREY, linewidth=1.2, linestyle="--", zorder=1)
        axes.text(90, -0.9, "one copy of W", va="center", ha="right", fontsize="small",
                  color=_GREY, bbox=_ON_WHITE)  # fmt: skip
        _plain_log(axes.xaxis, (1,), _number)
    return panels[0].figure
