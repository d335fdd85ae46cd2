"""What figures share: they are made for a page that shows them 800 pixels wide."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

WIDTH = 8.0  # inches: text of 9 points is as large as that of the page
SOLID, DASHED, DOTTED, DASH_DOT = "-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5))
MARKS = 6  # markers of a curve, about


class Style(NamedTuple):
    """How a curve is told apart: by colour, and without it."""

    color: str
    marker: str
    line: str | tuple

    def options(self) -> dict:
        """Return the arguments of ``Axes.plot``."""
        return {
            "color": self.color, "marker": self.marker, "linestyle": self.line, "linewidth": 1.4,
            "markersize": 7 if self.marker == "*" else 4.5, "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }  # fmt: skip


def marked(
    ax: Axes, x: np.ndarray, y: np.ndarray, halves: np.ndarray, style: Style,
    turn: tuple[int, int], label: str,
) -> None:  # fmt: skip
    """Draw a curve with some markers, each with a bar of half height ``halves`` (nan: none).

    Args:
        ax: gets the curve.
        x, y, halves: [n].
        style: of the curve.
        turn: number of the curve and of all curves, whose markers are at different places.
        label: for the legend.
    """
    every = math.ceil(len(x) / MARKS)
    number, of = turn
    first = number * every // of
    bars = halves if np.isfinite(halves).any() else None
    ax.errorbar(x, y, bars, label=label, markevery=(first, every), errorevery=(first, every),
                elinewidth=0.9, capsize=1.5, capthick=0.9, **style.options())  # fmt: skip


def dress(ax: Axes, title: str, x: str, y: str) -> None:
    """Label a panel, with a light grid and without a frame."""
    ax.set_title(title, fontsize=9.5, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8.5)
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def log_scale(ax: Axes) -> None:
    """Make the y axis of ``ax`` logarithmic, with plain numbers; its limits are set already."""
    low, high = ax.get_ylim()
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
