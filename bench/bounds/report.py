"""Tables and figures of the runs in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..support.figures import log_scale
from ..support.runs import load
from .train import FINE_TUNING, Key

PANELS = {
    "loss": "loss of text that was not seen, nats per token", "sigma": "largest sigma_1",
    "activation": "largest activation", "logit": "largest attention logit",
}  # fmt: skip
NAMES = {"adamw": "AdamW", "muon": "Muon"}
GREYS = {"free": "#000000", "decay": "#999999"}
COLORS = ["#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#882255",
          "#999933", "#44AA99"]  # fmt: skip


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


def draw(title: str, ways: dict[str, list[dict]], path: Path) -> None:
    """Write the PNG of one setting: the means over seeds against the steps."""
    figure = Figure(figsize=(15, 4.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    colors = iter(COLORS)
    chosen = {held: GREYS.get(held) or next(colors) for held in ways}
    for ax, (name, words) in zip(figure.subplots(1, 4), PANELS.items(), strict=True):
        for held, runs in ways.items():
            mean = np.mean([r[name] for r in runs], axis=0)
            style = "--" if held.startswith(("sphere", "both")) else "-"
            ax.plot(runs[0]["step"], mean, style, color=chosen[held], label=held, linewidth=1.5)
        if name != "loss":
            log_scale(ax)
        else:
            tail = np.concatenate([r["loss"][1:] for runs in ways.values() for r in runs])
            ax.set_ylim(tail.min() - 0.05, np.percentile(tail, 97))
        ax.set_title(words, fontsize=10)
        ax.set_xlabel("step")
        ax.grid(color="0.92")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=12)
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
