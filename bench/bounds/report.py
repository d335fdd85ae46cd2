"""Tables and figures of the runs in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..support.figures import DASHED, SOLID, WIDTH, Style, dress, log_scale, marked
from ..support.runs import load
from .train import FINE_TUNING, Key

PANELS = {
    "loss": ("Loss of text that was not seen", "nats per token"),
    "sigma": (r"Largest $\sigma_1$", r"$\sigma_1$ (log scale)"),
    "activation": ("Largest activation", "absolute value (log scale)"),
    "logit": ("Largest attention logit", "absolute value (log scale)"),
}
NAMES = {"adamw": "AdamW", "muon": "Muon"}
STYLES = {"free": Style("#000000", "o", SOLID), "decay": Style("#767676", "s", SOLID)}
COLORS = ["#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#882255",
          "#7A7A00", "#332288"]  # fmt: skip
MARKERS = "^vDPX<>*d"


def key_of(found: dict) -> Key:
    """Return the key of a run."""
    return Key(**{name: found[name] for name in Key._fields})


def settings(runs: Iterable[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """Return the runs by (optimizer, lr, steps) and by what holds the weights."""
    found: dict[tuple, dict[str, list[dict]]] = {}
    for one in sorted(runs, key=lambda x: x["seed"]):
        setting = one["optimizer"], one["lr"], one["steps"]
        found.setdefault(setting, {}).setdefault(one["held"], []).append(one)
    return found


def table(ways: dict[str, list[dict]], fine: bool) -> list[str]:
    """Return the Markdown of one setting: means over seeds at the last step."""
    names = ["held", "seeds", "loss at the end", "lowest loss", "largest sigma_1", "activation",
             "logit"]  # fmt: skip
    if fine:
        names.append("loss of the first language before, after")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for held, runs in ways.items():
        loss = _mean(r["loss"][-1] for r in runs)
        lowest = _mean(min(r["loss"]) for r in runs)
        cells = [held, str(len(runs)), f"{loss:.3f}", f"{lowest:.3f}",
                 *(f"{_mean(r[name][-1] for r in runs):.2f}"
                   for name in ("sigma", "activation", "logit"))]  # fmt: skip
        if fine:
            cells.append(", ".join(f"{_mean(r['before'][i] for r in runs):.3f}" for i in (0, 1)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def styles_of(ways: Iterable[str]) -> dict[str, Style]:
    """Return the style of each way to hold the weights; spheres and pulls are dashed.

    In the order in which the bench runs them, so that AdamW's and Muon's have the same; what only
    one of them has comes last.
    """
    rest = sorted((held for held in ways if held not in STYLES), key=lambda h: h.endswith("of 16"))
    return STYLES | {
        held: Style(color, marker, DASHED if held.startswith(("sphere", "both")) else SOLID)
        for held, color, marker in zip(rest, COLORS, MARKERS, strict=False)
    }


def draw(title: str, ways: dict[str, list[dict]], path: Path) -> None:
    """Write the PNG of one setting: the means over seeds against the steps."""
    figure = Figure(figsize=(WIDTH, 6.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    styles = styles_of(ways)
    panels = zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True)
    for ax, (name, (words, unit)) in panels:
        dress(ax, words, "step", unit)
        for number, (held, runs) in enumerate(ways.items()):
            mean = np.mean([r[name] for r in runs], axis=0)
            marked(ax, np.array(runs[0]["step"]), mean, np.full(len(mean), np.nan), styles[held],
                   (number, len(ways)), held)  # fmt: skip
        if name != "loss":
            log_scale(ax)
        else:
            tail = np.concatenate([r["loss"][1:] for runs in ways.values() for r in runs])
            ax.set_ylim(tail.min() - 0.05, np.percentile(tail, 97))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format="png")


def write(folder: Path) -> list[Path]:
    """Write report.md and the figures; return their paths.

    Raises:
        ValueError: a folder without runs.
    """
    runs = load(folder)
    if not runs:
        raise ValueError(f"{folder}: expected finished runs, got none")
    lines, written = [], []
    for (optimizer, lr, steps), ways in settings(runs).items():
        by = NAMES.get(optimizer, optimizer)
        title = f"GPT-2 of two million weights, {by}, lr {lr:g}, {steps} steps"
        path = folder / f"{optimizer}-{lr:g}.png"
        draw(title, ways, path)
        written.append(path)
        lines += [f"**{title}**", "", *table(ways, optimizer == FINE_TUNING), "",
                  f"![{title}]({path.name})", ""]  # fmt: skip
    where = "; ".join(
        ", ".join(sorted({one[name] for one in runs}))
        for name in ("processor", "torch", "commit", "date")
    )
    (folder / "report.md").write_text("\n".join([*lines, where, ""]))
    return [folder / "report.md", *written]
