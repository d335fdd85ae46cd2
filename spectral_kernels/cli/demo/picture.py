"""The plot of the demo."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..style import save, set_log_scale

if TYPE_CHECKING:
    from .experiment import Results


# Okabe and Ito's colours, distinct for colour-blind readers too; markers differ as well.
_STYLES = {
    "none": {"color": "#D55E00", "marker": "o"},
    "L2": {"color": "#0072B2", "marker": "s"},
    "spectral": {"color": "#009E73", "marker": "^"},
    # Its curve is that of "spectral" up to rounding: dashed, to leave that one visible.
    "SpectralAdamW": {"color": "#000000", "marker": "None", "linestyle": (0, (3, 3))},
}
_CHANCE = 0.1
_BARS = 7  # of the range of the layers, per arm; bands of one colour over another would mix


def draw(results: Results, path: str | PathLike[str]) -> None:
    """Write the picture: accuracy and largest singular values over the tasks, for every arm.

    Args:
        results: with at least one finished task in one arm.
        path: of the PNG (1400 x 600 pixels), PDF or SVG.
    """
    figure = Figure(figsize=(1400 / 150, 600 / 150), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    arms = [(arm, done) for arm, done in results.arms.items() if done]
    for number, (arm, done) in enumerate(arms):
        tasks = range(1, len(done) + 1)
        style = {"label": arm, "linewidth": 1.5, "markersize": 3, **_STYLES[arm]}
        left.plot(tasks, [r.accuracy for r in done], **style)
        means = [sum(r.sigmas) / len(r.sigmas) for r in done]
        below = [mean - min(r.sigmas) for mean, r in zip(means, done, strict=True)]
        above = [max(r.sigmas) - mean for mean, r in zip(means, done, strict=True)]
        every = math.ceil(len(done) / _BARS)
        bars = {"errorevery": (number * every // len(arms), every), "elinewidth": 1, "capsize": 2}
        if "linestyle" in style:  # its range would cover that of "spectral"
            right.plot(tasks, means, zorder=3, **style)  # errorbar() draws above plot()
        else:
            right.errorbar(tasks, means, (below, above), **bars, **style)

    left.axhline(_CHANCE, color="0.35", linewidth=1, linestyle="--", zorder=1)
    left.annotate(
        "chance (0.1)", (0, _CHANCE), xycoords=("axes fraction", "data"), xytext=(4, -3),
        textcoords="offset points", va="top", fontsize="small", color="0.35",
    )  # fmt: skip
    left.set(
        title="Memorizing random labels, task after task",
        ylabel="accuracy at the end of the task",
        ylim=(0, 1.03),
    )
    right.set(
        title="Largest singular value: mean of the layers, bars: range",
        ylabel=r"$\sigma_1$ at the end of the task (log scale)",
    )
    sigmas = [sigma for done in results.arms.values() for r in done for sigma in r.sigmas]
    set_log_scale(right, np.array(sigmas))
    last = max(len(done) for done in results.arms.values())
    for axes in (left, right):
        axes.title.set_fontsize("medium")
        axes.set_xlim(0.5, last + 0.5)
        axes.set_xlabel(f"task (each {results.epochs} epochs)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, path)
