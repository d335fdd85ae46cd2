"""The plot of a log: sigma over steps, as curves and as a map of the layers, and residuals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from os import PathLike

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...diagnostics.log import History
from ..style import (
    COLORS,
    apart,
    in_layers,
    layers_of,
    log_limits,
    log_ticks,
    save,
    set_log_scale,
    shortened,
)

_MOST_CURVES = 12  # of more matrices, median and range are drawn
_LARGEST, _SMALLEST = 4, 2  # of which these still have a curve
_MOST_NAMES = 40  # beside the map; of more matrices, only the first of each layer is labelled
_MOST_CELLS = 800  # of the map, from left to right
_MOST_POINTS = 200  # of a curve of residuals, which fluctuate
_BROKEN = "#D55E00"
_BELOW = 4.5  # the legend's distance from the axes, in sizes of its font: ticks are in between


@matplotlib.rc_context({"text.usetex": False})  # LaTeX takes names for commands
def draw(history: History, title: str, path: str | PathLike[str]) -> None:
    """Write the picture: sigma_1 over the steps, a map of it, and residual / sigma_1.

    Args:
        history: of at least one matrix and one step.
        title: of the picture.
        path: of the PNG, PDF or SVG.
    """
    n, steps = len(history.names), history.steps
    map_height = max(0.16 * n, 1.2) if n <= _MOST_NAMES else 5.2
    heights = (2.6, map_height, 2.2)
    figure = Figure(figsize=(8.5, sum(heights) + 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, height_ratios=heights)
    figure.suptitle(f"{shortened(title, 80)}: {n} {'matrix' if n == 1 else 'matrices'}")

    ratio = _ratio(history.residual, history.sigma)
    shown = [_shown(values, least) for values, least in ((history.sigma, _SMALLEST), (ratio, 0))]
    # A matrix has the same line in both panels, and if all have one, in every plot of the run.
    listed = range(n) if n <= _MOST_CURVES else dict.fromkeys((*shown[0], *shown[1]))
    line_of = {i: k for k, i in enumerate(listed)}
    lines = [(i, line_of[i]) for i in shown[0]], [(i, line_of[i]) for i in shown[1]]
    _curves(panels[0], history, history.sigma, lines[0], every=1)
    _curves(panels[2], history, ratio, lines[1], every=math.ceil(len(steps) / _MOST_POINTS))
    end = steps[-1] + (float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0)
    end = max(end, steps[0] * (1 + 1e-12))  # of huge steps, floats do not tell neighbours apart
    _map(figure, panels[1], history, end)

    for axes, text in zip(panels, (
        r"Largest singular value of each matrix, $\sigma_1$",
        r"$\sigma_1$ of every matrix as a colour",
        r"Residual: a singular value lies within this fraction of $\sigma_1$",
    ), strict=True):  # fmt: skip
        text += " (orange: not finite)" if axes is panels[1] and _is_broken(history) else ""
        axes.set_title(text, fontsize="medium", loc="left")
        axes.set(xlabel="step", xlim=(steps[0], end))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    panels[0].set_ylabel(r"$\sigma_1$ (log scale)")
    panels[2].set_ylabel(r"residual / $\sigma_1$ (log scale)")
    _fit_legends(figure, (panels[0], panels[2]))
    save(figure, path)


def _is_broken(history: History) -> bool:
    return not np.isfinite(history.sigma).all()


def _ratio(residual: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return residual / sigma, 0 where the residual is; what is in no float becomes the nearest."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        ratio = np.where(residual == 0, 0, residual / sigma)
    has_ratio = np.isfinite(residual) & (residual > 0) & np.isfinite(sigma) & (sigma > 0)
    limits = np.finfo(float).smallest_subnormal, np.finfo(float).max
    return np.where(has_ratio, np.clip(ratio, *limits), ratio)


# ---------------------------------------------------------------------------------------- curves


def _shown(values: np.ndarray, smallest: int) -> list[int]:
    """Return the matrices that get a curve and a name, the largest at the last step first."""
    last = np.where(np.isfinite(values[-1]), values[-1], np.inf)  # NaN and inf come first
    order = np.argsort(-last, kind="stable").tolist()
    if len(order) <= _MOST_CURVES:
        return order
    return order[:_LARGEST] + order[len(order) - smallest :]


def _curves(
    axes, history: History, values: np.ndarray, lines: Sequence[tuple[int, int]], every: int
) -> None:
    """Draw ``values`` [T, n_matrices] over the steps, with the names beside the axes.

    Args:
        axes: the panel.
        history: has names and steps.
        values: sigma or residual / sigma.
        lines: (matrix, number of its line style), in the order of the legend.
        every: number of rows per point, which is their median.
    """
    steps, n = history.steps, len(history.names)
    good = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    starts = np.arange(0, len(steps), every)
    few, names = len(lines) == n, apart(history.names)
    set_log_scale(axes, values)
    if not few:
        _range(axes, steps, good, starts)
    for i, number in lines:
        points = _medians(good[:, i], starts)
        axes.plot(
            steps[starts], points, label=_label(names[history.names[i]], values[:, i], steps),
            color=COLORS[number % len(COLORS)], marker="." if len(starts) <= 30 else None,
            linestyle="-" if number < len(COLORS) else (0, (4, 2)), linewidth=1.3,
            clip_on=False,  # the axis ends where the floats do
        )  # fmt: skip
    smallest = len(lines) - _LARGEST
    extremes = f"{_LARGEST} largest" + (f", {smallest} smallest" if smallest else "")
    title = f"{'largest first' if few else extremes}, at the last step"
    title += f"\nmedians of {every} rows" if every > 1 else ""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes, title, n_columns=2)


def _legend(axes, title: str, n_columns: int) -> None:
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), frameon=False, fontsize="small", ncols=n_columns,
        borderaxespad=_BELOW, title=title, title_fontsize="small", alignment="left",
    )  # fmt: skip


def _fit_legends(figure: Figure, panels: Sequence) -> None:
    """Write names that would go beyond the picture one below the other, in a higher picture."""
    figure.draw_without_rendering()
    for axes in panels:
        legend = axes.get_legend()
        before = legend.get_window_extent()
        if before.x1 > figure.bbox.x1:
            _legend(axes, legend.get_title().get_text(), n_columns=1)
            figure.draw_without_rendering()
            added = axes.get_legend().get_window_extent().height - before.height
            figure.set_figheight(figure.get_figheight() + added / figure.dpi)


def _label(name: str, column: np.ndarray, steps: np.ndarray) -> str:
    broken = ~np.isfinite(column)
    if broken.any():
        return f"{name}\n(not finite at step {steps[broken.argmax()]})"
    return name + ("" if column[-1] else " (zero)")


def _range(axes, steps: np.ndarray, good: np.ndarray, starts: np.ndarray) -> None:
    """Draw the median, the middle half and the range of the matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step at which nothing is finite
        bounds = np.nanquantile(good, (0, 0.25, 0.5, 0.75, 1), axis=1)
    low, high = np.fmin.reduceat(bounds[0], starts), np.fmax.reduceat(bounds[4], starts)
    lower, median, upper = (_medians(row, starts) for row in bounds[1:4])
    at = steps[starts]
    axes.fill_between(at, low, high, color="0.4", alpha=0.13, linewidth=0, label="range of all")
    axes.fill_between(at, lower, upper, color="0.4", alpha=0.3, linewidth=0, label="middle half")
    axes.plot(at, median, color="0.25", linewidth=2.2, label="median")


def _medians(column: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the median of each piece of ``column`` that begins at one of ``starts``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a piece in which nothing is finite
        # Unlike np.nanmedian, this adds no two numbers, whose sum may be inf.
        return np.array([np.nanquantile(piece, 0.5) for piece in np.split(column, starts[1:])])


# ------------------------------------------------------------------------------------------- map


def _map(figure: Figure, axes, history: History, end: float) -> None:
    """Draw sigma_1 as a colour: matrices from top to bottom, steps from left to right."""
    steps, order = history.steps, in_layers(history.names)
    names = [history.names[i] for i in order]
    starts = np.arange(0, len(steps), math.ceil(len(steps) / _MOST_CELLS))
    cells = np.maximum.reduceat(history.sigma, starts, axis=0).T[order]  # keeps spikes and NaN
    edges = np.append(steps[starts], end).astype(float)
    low, high = log_limits(cells, margin=0) or (0.5, 2.0)
    shown = np.ma.masked_invalid(np.log10(np.where(cells == 0, low, cells)))  # zero: the darkest
    rows = np.arange(len(names) + 1) - 0.5
    colours = axes.pcolormesh(
        edges, rows, shown, vmin=math.log10(low), vmax=math.log10(high), cmap="viridis"
    )
    axes.set_facecolor(_BROKEN)
    axes.invert_yaxis()
    _label_matrices(axes, names)
    beside = axes.inset_axes((1.01, 0, 0.016, 1))
    bar = figure.colorbar(colours, cax=beside, label=r"$\sigma_1$ (log scale)")
    ticks, texts, between = log_ticks(low, high, most=5 if len(names) < 20 else 9)
    bar.set_ticks(np.log10(ticks), labels=texts)
    bar.set_ticks(np.log10(between), minor=True)


def _label_matrices(axes, names: Sequence[str]) -> None:
    """Write all names beside the map, or where layers begin, or some of the names."""
    labels = dict(enumerate(names))
    if len(names) > _MOST_NAMES:
        layers = layers_of(names)
        begins = [i for i, layer in enumerate(layers)
                  if layer is not None and (i == 0 or layers[i - 1] != layer)]  # fmt: skip
        labels = {i: layers[i] for i in begins} if len(begins) > 1 else labels
    places = list(labels)[:: math.ceil(len(labels) / _MOST_NAMES)]
    short = apart(list(labels.values()))
    axes.set_yticks(places, [short[labels[i]] for i in places])
    axes.tick_params(axis="y", labelsize=7, length=2)
