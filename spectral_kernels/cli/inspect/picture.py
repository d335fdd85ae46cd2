"""The plot of inspect: sigma_1 over the layers of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..style import COLORS, apart, layers_of, set_log_scale, shortened

if TYPE_CHECKING:
    from .rows import MatrixRow


_MARKERS = "os^Dv<>PX"
_MOST_KINDS = 36
_MOST_LABELS = 24


@matplotlib.rc_context({"text.usetex": False})  # LaTeX takes names for commands
def draw_layers(
    pairs: Sequence[tuple[MatrixRow, MatrixRow | None]],
    checkpoints: Sequence[str],
    path: str | PathLike[str],
) -> None:
    """Write the PNG: sigma_1 of every matrix over depth, a colour and a marker per kind of layer.

    Args:
        pairs: matrices in the order of layers, each with that of a second checkpoint (drawn
            hollow) or None.
        checkpoints: names of the one or two checkpoints.
        path: of the PNG.
    """
    places: dict[str, list[int]] = {}
    for i, (row, _) in enumerate(pairs):
        places.setdefault(row.kind, []).append(i)
    shown = sorted(places, key=lambda kind: -len(places[kind]))[:_MOST_KINDS]
    kinds = [kind for kind in places if kind in shown]
    lines = 1 + len(kinds) + (len(places) > len(kinds)) + 3 * (len(checkpoints) > 1)
    figure = Figure(figsize=(11, max(4.2, 0.21 * lines + 1.2)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    size = 5 if len(pairs) <= 200 else 3.5
    layers = layers_of([row.name for row, _ in pairs])

    def curve(which: int, indices: Sequence[int], **style) -> None:
        points = [(i, pairs[i][which].sigma) for i in indices if pairs[i][which] is not None]
        points = [(i, s) for i, s in points if s > 0]
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=0.8, markersize=size, **style)

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

    set_log_scale(axes, np.array([sigma for sigmas in found for sigma in sigmas]))
    margin = 0.5 + 0.01 * len(pairs)  # so that markers at both ends are not clipped
    axes.set(ylabel=r"$\sigma_1$ (log scale)", xlim=(-margin, max(len(pairs), 1) - 1 + margin))
    _label_layers(axes, layers)
    axes.set_title("Largest singular values" + (
        f" of {shortened(checkpoints[0], 70)}" if len(checkpoints) == 1 else ""
    ), fontsize="medium")  # fmt: skip
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, format="png")


def _label_layers(axes, layers: Sequence[str | None]) -> None:
    """Mark where layers begin."""
    starts = [i for i, layer in enumerate(layers)
              if layer is not None and (i == 0 or layers[i - 1] != layer)]  # fmt: skip
    if not starts:
        axes.set_xlabel("matrix, in the order of the file")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    every = math.ceil(len(starts) / _MOST_LABELS)
    prefixes = {layers[i].rpartition(".")[0] for i in starts}
    labels = [layers[i] for i in starts[::every]]
    if len(prefixes) == 1:
        (prefix,) = prefixes
        labels = [label.rpartition(".")[2] for label in labels]
        axes.set_xlabel(f"layer ({shortened(prefix)}.*)" if prefix else "layer")
    else:
        axes.set_xlabel("layer")
    labels = [*map(shortened, labels)]
    axes.set_xticks(starts[::every], labels, rotation=0 if max(map(len, labels)) < 4 else 60,
                    ha="center" if max(map(len, labels)) < 4 else "right",
                    rotation_mode="anchor", fontsize="small")  # fmt: skip
    for i in starts if len(starts) <= 60 else ():
        axes.axvline(i - 0.5, color="0.85", linewidth=0.6, zorder=0)
