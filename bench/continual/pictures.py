"""Figures of the protocol: planes of lr and strength, and the course of every stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..support.figures import WIDTH, dress, log_scale, marked
from . import figures
from .arms import Arm, ended, finished, interval
from .train import CONTROL

ALWAYS = ("none", "l2", "spectral")  # have a curve, and the five best others
MOST_OTHERS = 5


def planes(found: Sequence, path: Path) -> None:
    """Write the picture of ``evidence.Plane`` objects, cells with their scores."""
    widths = [max(len(one.strengths), 1.4) for one in found]
    figure = Figure(figsize=(WIDTH, 3.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found), width_ratios=widths)
    values = np.concatenate([one.scores.ravel() for one in found])
    low, high = np.nanmin(values), np.nanmax(values)
    for ax, one in zip(np.atleast_1d(axes), found, strict=True):
        image = ax.imshow(one.scores, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(one.scores):
            if math.isfinite(value):
                dark = value < (low + high) / 2
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5,
                        color="white" if dark else "black")  # fmt: skip
        ax.set_title(one.method, fontsize=9.5)
        has_strength = any(one.strengths)
        ax.set_xticks(range(len(one.strengths)),
                      [_short(s) for s in one.strengths] if has_strength else [""])  # fmt: skip
        ax.set_yticks(range(len(one.lrs)), [_short(lr) for lr in one.lrs])
        ax.tick_params(labelsize=8.5, length=0)
        if has_strength:
            ax.set_xlabel("strength", fontsize=9)
        if ax is np.atleast_1d(axes)[0]:
            ax.set_ylabel("learning rate", fontsize=9)
        else:
            ax.tick_params(labelleft=False)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("accuracy at the end", fontsize=9)
    bar.ax.tick_params(labelsize=8.5)
    seeds = min(one.seeds for one in found)
    figure.suptitle(f"Random labels, 40 tasks, MLP; {seeds} seed{'s' * (seeds > 1)}", fontsize=10)
    figure.savefig(path, format="png")


def _short(number: float) -> str:
    """Return ``number`` in a few characters: 1e-4, 3e-3, 0.1, 10."""
    return f"{number:g}" if number >= 0.1 else f"{number:.0e}".replace("e-0", "e-")


def stream(name: str, setting, arms: dict[Arm, list[dict]], path: Path) -> None:
    """Write the picture of a protocol's stream: score, sigma and dormant units over its course.

    Args:
        name: of the stream.
        setting: a protocol.Stream.
        arms: the reported runs.
        path: of the PNG.
    """
    arms = {arm: done for arm, runs in arms.items() if (done := finished(runs))}
    order = sorted(arms, key=lambda arm: -np.mean([ended(r, setting.score) for r in arms[arm]]))
    others = [arm for arm in order if arm.method not in ALWAYS][:MOST_OTHERS]
    shown = [arm for arm in arms if arm.method in ALWAYS or arm in others]
    styles = figures.styles(arm.method for arm in arms)
    is_control = setting.problem in CONTROL
    score = "return" if is_control else "accuracy"
    kind = {"train": "at the end of each task", "test": "on held-out examples",
            "online": "while learning"}[setting.score]  # fmt: skip
    sigma = r"$\sigma_1$ (log scale)"
    panels = [
        ("returns" if is_control else setting.score, f"{score} {kind}", score, np.mean),
        ("sigma_max", r"largest $\sigma_1$ of all layers", sigma, np.max),
        ("dormant", "dormant units", "share of units", np.mean),
        ("gradient_diversity", "gradient diversity", "effective rank", np.mean),
    ]
    rows = math.ceil(len(shown) / 3)
    figure = Figure(figsize=(WIDTH, 5.2 + 0.22 * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (key, title, label, over) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        dress(ax, title[0].upper() + title[1:], "task", label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
        for number, arm in enumerate(shown):
            x, curves = _curves(arms[arm], key, over)
            halves = np.array([interval(column)[1] for column in curves.T])
            twin = sum(other.method == arm.method for other in shown[:number])
            style = styles[arm.method]
            if twin:  # the second strength of a method
                style = style._replace(line=(0, (2, 1)))
            marked(ax, x, curves.mean(0), halves, style, (number, len(shown)), str(arm))
        if key == "sigma_max":
            lines = [line.get_ydata() for line in ax.get_lines()]
            ends = [1.0, *(x for line in lines for x in line if np.isfinite(x))]
            ax.set_ylim(0.9 * min(ends), 1.1 * max(ends))
            log_scale(ax)
            ax.axhline(1, color="0.6", linewidth=1, linestyle=":")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    counts = [len(runs) for runs in arms.values()]
    seeds = "1 seed" if max(counts) == 1 else f"{max(counts)} seeds"
    if min(counts) < max(counts):
        seeds = f"{min(counts)} to {seeds}"
    bars = "; bars: 95 % confidence intervals" if max(counts) > 2 else ""
    figure.suptitle(f"{name}: {setting.problem}, {setting.model}, {seeds}{bars}\n"
                    "none, L2, spectral, and the best others, each as chosen",
                    fontsize=10)  # fmt: skip
    figure.savefig(path, format="png")


def _curves(runs: list[dict], name: str, over) -> tuple[np.ndarray, np.ndarray]:
    """Return places and curves [seeds, n] of a measurement; returns are in tenths of a task."""
    if name == "returns":
        curves = np.array([_filled([mean for task in run[name] for mean in task]) for run in runs])
        return (np.arange(curves.shape[1]) + 0.5) / len(runs[0][name][0]) + 0.5, curves
    return figures.curves_of(runs, name, over)


def _filled(returns: list[float | None]) -> list[float]:
    """Return the curve with the value before where no episode ended."""
    found: list[float] = []
    for value in returns:
        found.append(value if value is not None else found[-1] if found else math.nan)
    return found
