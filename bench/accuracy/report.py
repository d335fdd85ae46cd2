"""Table and figure of the results of ``bench.accuracy``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from ..support.figures import DASHED, DOTTED, SOLID, WIDTH, Style, dress, marked

# Okabe and Ito's colours, safe for colour-blind readers; markers and lines differ too.
STYLES = {
    "torch": Style("#000000", "X", DOTTED), "1": Style("#D55E00", "o", SOLID),
    "1, auto": Style("#D55E00", "o", DASHED), "2": Style("#E69F00", "v", SOLID),
    "4": Style("#0072B2", "s", SOLID), "4, auto": Style("#0072B2", "s", DASHED),
    "8": Style("#009E73", "^", SOLID),
}  # fmt: skip
LABELS = {"torch": "torch's spectral_norm iteration", "1": "1 vector"}
SCORES = {"demo": "accuracy, last 5 tasks", "transformer": "loss, last 3 tasks"}
LAST = {"demo": 5, "transformer": 3}
FLOOR = 1e-5  # of the figure: below it, errors are rounding


def label(estimator: str) -> str:
    """Return the label of an estimator."""
    number, _, auto = estimator.partition(", ")
    words = LABELS.get(number, f"{number} vectors")
    return f"{words}, {auto}" if auto else words


def groups(data: dict) -> dict[tuple[str, float], dict[str, list[dict]]]:
    """Return the runs by problem and strength, and in these by estimator."""
    found: dict = {}
    for run in data["runs"]:
        of = found.setdefault((run["problem"], run["strength"]), {})
        of.setdefault(run["estimator"], []).append(run)
    return found


def _late(run: dict, name: str) -> np.ndarray:
    """Return the errors after the first tenth of the steps, which is the transient."""
    values = np.array(run[name])
    return values[len(values) // 10 :]


def table(data: dict) -> str:
    """Return the Markdown: errors beside costs, by problem and strength."""
    lines = [
        "Errors of sigma_1 relative to the SVD, in percent, over all matrices and over steps after "
        f"the first tenth. {data['device']}, torch {data['torch']}, {data['date']}, "
        f"commit {', '.join(data['commits'])}; {data['threads']} threads for the cost.",
        "",
        "*reads*: of W per step, on average. *r-th*: mean error of the last of the r values, "
        "relative to sigma_1. *cost*: time of a step of the penalty, in units of one vector.",
    ]
    base = {shapes: of["1"] for shapes, of in data["costs"].items()}
    for (problem, strength), of in groups(data).items():
        seeds = max(len(runs) for runs in of.values())
        ratio = np.mean([_late(run, "ratio").mean() for runs in of.values() for run in runs])
        lines += [
            "", f"**{problem}, strength {strength:g}** ({seeds} seeds; sigma_2 / sigma_1 = "
            f"{ratio:.3f} on average)", "",
            "| estimator | mean | p99 | largest | r-th | reads "
            + "".join(f"| cost, {shapes} " for shapes in data["costs"])
            + f"| {SCORES[problem]} |",
            "|---" * (7 + len(data["costs"])) + "|",
        ]  # fmt: skip
        for estimator, runs in of.items():
            first = 100 * np.concatenate([_late(run, "first").ravel() for run in runs])
            least = 100 * np.concatenate([_late(run, "least").ravel() for run in runs])
            scores = np.array([np.mean(run["scores"][-LAST[problem] :]) for run in runs])
            spread = f" ± {scores.std(ddof=1) / len(scores) ** 0.5:.3f}" if len(scores) > 1 else ""
            cells = [
                label(estimator), f"{first.mean():.3f}", f"{np.percentile(first, 99):.3f}",
                f"{first.max():.2f}", f"{np.abs(least).mean():.2f}",
                f"{np.mean([run['reads'] for run in runs]):.2f}",
                *(f"{of[estimator] / base[shapes]:.2f}" for shapes, of in data["costs"].items()),
                f"{scores.mean():.3f}{spread}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(data: dict, path: Path) -> None:
    """Write the PNG: mean error over the matrices against steps, per problem and strength."""
    found = groups(data)
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH, 3 * rows + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    handles: dict = {}
    for ax, ((problem, strength), of) in zip(axes.flat, found.items(), strict=False):
        dress(ax, f"{problem}, strength {strength:g}", "training step", "")
        for number, (estimator, runs) in enumerate(of.items()):
            curve = np.mean([np.array(run["first"]).mean(axis=1) for run in runs], axis=0)
            width = max(1, len(curve) // 40)
            n = len(curve) // width * width
            smooth = np.maximum(curve[:n].reshape(-1, width).mean(axis=1), FLOOR)
            steps = (np.arange(len(smooth)) + 0.5) * width * runs[0]["every"]
            marked(ax, steps, smooth, np.full(len(steps), np.nan), STYLES[estimator],
                   (number, len(of)), label(estimator))  # fmt: skip
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=(1, 2, 5, 10)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for ax in axes.flat[len(found) :]:
        ax.set_axis_off()
    for row in axes:
        row[0].set_ylabel(r"estimate below $\sigma_1$, mean (log scale)", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", frameon=False,
                  ncols=min(4, len(handles)), fontsize=9)  # fmt: skip
    figure.savefig(path, format="png")
