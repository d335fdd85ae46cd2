"""The plot of inspect: sigma_1 over the layers of a checkpoint."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..style import (
    COLORS,
    apart,
    in_layers,
    layers_of,
    save,
    set_log_scale,
    shortened,
    stack_of,
    write,
)

if TYPE_CHECKING:
    from .rows import MatrixRow

    Pairs = Sequence[tuple[MatrixRow, MatrixRow | None]]


_MARKERS = "os^Dv<>PX"
_MOST_KINDS = 36
_SAME = 1.05  # up to this ratio, the usual values of all matrices are one number


def draw_layers(
    pairs: Pairs,
    checkpoints: Sequence[str],
    path: str | PathLike[str],
    limit: float | None = None,
) -> None:
    """Write the picture: sigma_1 of every matrix over depth, colour and marker per kind of layer.

    Args:
        pairs: matrices in any order, each with that of a second checkpoint (drawn hollow) or None.
        checkpoints: names of the one or two checkpoints.
        path: of the PNG, PDF or SVG.
        limit: of --fail-above, a line; None: no line.
    """
    save(_figure(pairs, checkpoints, limit), path)


def as_svg(
    pairs: Pairs, checkpoints: Sequence[str], limit: float | None = None, is_narrow: bool = False
) -> str:
    """Return the same picture as an SVG element that can stand inside HTML, beside others.

    Args:
        pairs, checkpoints, limit: as for :func:`draw_layers`.
        is_narrow: for a telephone, with the legend below.
    """
    file = io.BytesIO()
    write(_figure(pairs, checkpoints, limit, is_narrow), file, "svg")
    text = file.getvalue().decode()
    text = text[text.index("<svg ") :]  # without the XML declaration and the document type
    # A style element would be one of the whole page, and names of groups are those of any figure.
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{'narrow' if is_narrow else 'wide'}-", text)


@matplotlib.rc_context({"text.usetex": False})  # LaTeX takes names for commands
def _figure(
    pairs: Pairs, checkpoints: Sequence[str], limit: float | None, is_narrow: bool = False
) -> Figure:
    pairs = [pairs[i] for i in in_layers([row.name for row, _ in pairs])]
    places: dict[str, list[int]] = {}
    for i, (row, _) in enumerate(pairs):
        places.setdefault(row.kind, []).append(i)
    shown = sorted(places, key=lambda kind: -len(places[kind]))[:_MOST_KINDS]
    kinds = [kind for kind in places if kind in shown]
    lines = 3 + len(kinds) + (len(places) > len(kinds)) + 3 * (len(checkpoints) > 1)
    size = (4.4, 3.4 + 0.21 * lines) if is_narrow else (8.5, max(4.2, 0.21 * lines + 1.2))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    marker_size = 5 if len(pairs) <= 200 else 3.5 if len(pairs) <= 1000 else 2
    layers = layers_of([row.name for row, _ in pairs])

    def curve(which: int, indices: Sequence[int], **style) -> None:
        points = [(i, pairs[i][which].sigma) for i in indices if pairs[i][which] is not None]
        points = [(i, s) for i, s in points if s > 0]
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=0.8, markersize=marker_size, **style)

    labels = apart(kinds)
    for number, kind in enumerate(kinds):
        color, marker = COLORS[number % len(COLORS)], _MARKERS[number % len(_MARKERS)]
        style = {"color": color, "marker": marker}
        if len({layers[i] for i in places[kind]}) < len(places[kind]):
            style["linestyle"] = "none"  # several per layer, such as experts, form no curve
        curve(0, places[kind], label=labels[kind], **style)
        hollow = {"markerfacecolor": "white", "linestyle": (0, (2, 2))}
        curve(1, places[kind], **{**hollow, **style})
    if rest := [i for kind, indices in places.items() if kind not in shown for i in indices]:
        style = {"color": "0.6", "marker": ".", "linestyle": "none"}
        curve(0, rest, label=f"{len(places) - len(shown)} other kinds", **style)
        curve(1, rest, markerfacecolor="white", **style)
    found = [[row.sigma for row in pair if row is not None] for pair in pairs]
    for says, color, values in (
        ("not finite", "#D55E00", [any(map(math.isnan, sigmas)) for sigmas in found]),
        ("zero", "0.6", [0 in sigmas for sigmas in found]),
    ):
        if any(values):
            axes.vlines(
                np.flatnonzero(values), 0, 1, transform=axes.get_xaxis_transform(), label=says,
                color=color, linewidth=1, linestyle=":", zorder=0,
            )  # fmt: skip
    if len(checkpoints) > 1:
        for name, face in zip(checkpoints, ("0.3", "white"), strict=True):
            axes.plot([], [], "o", color="0.3", markerfacecolor=face, label=shortened(name))

    sigmas = [sigma for sigmas in found for sigma in sigmas]
    usual = _draw_usual(axes, [row.usual for row, _ in pairs])
    if limit:
        axes.axhline(limit, color="#D55E00", linewidth=1, linestyle="--", label=f"limit {limit:g}")
    set_log_scale(axes, np.array([*sigmas, *usual, *([limit] if limit else [])]))
    margin = 0.5 + 0.01 * len(pairs)  # so that markers at both ends are not clipped
    axes.set(ylabel=r"$\sigma_1$ (log scale)", xlim=(-margin, max(len(pairs), 1) - 1 + margin))
    _label_layers(axes, layers, most=8 if is_narrow else 24)
    title = "Largest singular values"
    if len(checkpoints) == 1 and not is_narrow:
        title += f" of {shortened(checkpoints[0], 70)}"
    axes.set_title(title, fontsize="medium")
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        where = "outside lower left" if is_narrow else "outside right upper"
        figure.legend(loc=where, frameon=False, fontsize="small")
    return figure


def _draw_usual(axes, usual: Sequence[float]) -> list[float]:
    """Draw the values of a fresh layer: a line if they are one number, else a mark per matrix.

    Returns:
        Those that are drawn.
    """
    style = {"color": "0.5", "linewidth": 0.8, "zorder": 1}
    good = [value for value in usual if value > 0]
    if good and max(good) <= _SAME * min(good):
        mean = math.exp(sum(map(math.log, good)) / len(good))
        axes.axhline(mean, linestyle="-.", label=f"usual (of a fresh layer): {mean:.2f}", **style)
        return [mean]
    if good:
        # One mark for neighbours with the same value.
        begins = [i for i, value in enumerate(usual) if i == 0 or value != usual[i - 1]]
        ends = [*begins[1:], len(usual)]
        runs = [(usual[b], b - 0.45, e - 0.55) for b, e in zip(begins, ends, strict=True)
                if usual[b] > 0]  # fmt: skip
        axes.hlines(*zip(*runs, strict=True), label="usual (of a fresh layer)", **style)
    return good


def _label_layers(axes, layers: Sequence[str | None], most: int) -> None:
    """Mark where layers begin, with ``most`` labels or fewer."""
    starts = [i for i, layer in enumerate(layers)
              if layer is not None and (i == 0 or layers[i - 1] != layer)]  # fmt: skip
    if not starts:
        axes.set_xlabel("matrix, in the order of the file")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    every = math.ceil(len(starts) / most)
    stacks = {stack_of(layers[i])[0] for i in starts}
    labels = [layers[i] for i in starts[::every]]
    if len(stacks) == 1:
        (stack,) = stacks
        labels = [stack_of(label)[1] for label in labels]
        axes.set_xlabel(f"layer ({shortened(f'{stack}*')})" if stack else "layer")
    else:
        axes.set_xlabel("layer")
    labels = [*map(shortened, labels)]
    axes.set_xticks(starts[::every], labels, rotation=0 if max(map(len, labels)) < 4 else 60,
                    ha="center" if max(map(len, labels)) < 4 else "right",
                    rotation_mode="anchor", fontsize="small")  # fmt: skip
    for i in starts if len(starts) <= 60 else ():
        axes.axvline(i - 0.5, color="0.85", linewidth=0.6, zorder=0)
