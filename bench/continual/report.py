"""Tables with confidence intervals, and figures, of the runs in a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from ..support.figures import log_scale
from .methods import METHODS
from .runner import load

LAST = 5  # tasks that count as "at the end"
COLORS = {
    "none": "#000000", "l2": "#E69F00", "l2_init": "#56B4E9", "shrink_perturb": "#CC79A7",
    "spectral_norm": "#999999", "layer_norm": "#8B6914", "redo": "#F0E442", "spectral": "#0072B2",
    "spectral_k1": "#882255", "spectral_k4": "#332288", "spectral_k8": "#117733",
    "spectral_sharp": "#D55E00", "spectral_operator": "#44AA99", "spectral_adamw": "#009E73",
}  # fmt: skip


class Setting(NamedTuple):
    """Subject of one table and one figure."""

    problem: str
    data: str
    model: str
    tasks: int
    epochs: int

    def __str__(self) -> str:
        where = "" if self.data == "none" else f" of {self.data}"
        return f"{self.problem}{where}, {self.model}, {self.tasks} tasks of {self.epochs} epochs"


class Arm(NamedTuple):
    """A method at a strength."""

    method: str
    strength: float

    def __str__(self) -> str:
        return f"{self.method} {self.strength:g}" if self.strength else self.method


Arms = dict[Arm, list[dict]]


def settings(runs: Iterable[dict]) -> dict[Setting, Arms]:
    """Return the runs by setting and arm, in the order of METHODS and of strengths."""
    found: dict[Setting, Arms] = {}
    order = list(METHODS)
    for run in sorted(runs, key=lambda r: (order.index(r["method"]), r["strength"], r["seed"])):
        setting = Setting(*(run[name] for name in Setting._fields))
        arm = Arm(run["method"], run["strength"])
        found.setdefault(setting, {}).setdefault(arm, []).append(run)
    return dict(sorted(found.items()))


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % confidence interval.

    That is nan for fewer than three values: of two it is thirteen times the standard error.
    """
    x = np.array(list(values), dtype=float)
    if len(x) < 3:
        return float(x.mean()), math.nan
    t = stats.t.ppf(0.975, len(x) - 1)
    return float(x.mean()), float(t * x.std(ddof=1) / math.sqrt(len(x)))


def ended(run: dict, name: str) -> float:
    """Return the mean of a measurement over the last tasks (and over matrices)."""
    return float(np.mean([np.mean(value) for value in run[name][-LAST:]]))


def scores(setting: Setting) -> tuple[str, bool]:
    """Return the name of a setting's score, and whether lower is better."""
    known = {"bit_flipping": ("mean squared error", True), "cartpole": ("return", False)}
    return known.get(setting.problem, ("accuracy", False))


def best(arms: Arms, lower: bool) -> dict[str, Arm]:
    """Return the arm of each method that is best at the end."""
    found: dict[str, tuple[float, Arm]] = {}
    for arm, runs in arms.items():
        score = np.mean([ended(run, "train") for run in runs])
        score = -score if lower else score
        if arm.method not in found or score > found[arm.method][0]:
            found[arm.method] = (score, arm)
    return {method: arm for method, (_, arm) in found.items()}


def table(setting: Setting, arms: Arms) -> str:
    """Return the Markdown of one setting."""
    words, _ = scores(setting)
    digits = {"bit_flipping": 6, "cartpole": 0}.get(setting.problem, 3)
    has_test = all(run["test"][0] is not None for runs in arms.values() for run in runs)
    with_operators = have_operators(arms)
    head = ["method", "seeds", f"{words}, first task", f"{words}, last {LAST}",
            f"online, last {LAST}", *([f"held out, last {LAST}"] * has_test), "sigma_1, largest",
            *(["as operators", "log10 of the Lipschitz bound"] * with_operators),
            "stable rank", "gradient diversity", "dormant", "weight norm"]  # fmt: skip
    lines = [f"**{setting}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for arm, runs in arms.items():
        extra = []
        if with_operators:
            bounds = [np.log10(run["lipschitz"][-LAST:]).mean() for run in runs]
            extra = [_cell(_largest(runs, "operator_sigma"), 2), _cell(bounds, 1)]
        cells = [
            str(arm), str(len(runs)), _cell((run["train"][0] for run in runs), digits),
            *(_cell((ended(run, name) for run in runs), digits)
              for name in ("train", "online", *(["test"] * has_test))),
            _cell(_largest(runs, "sigma_max"), 2), *extra,
            _cell((ended(run, "stable_rank") for run in runs), 1),
            _cell((ended(run, "gradient_diversity") for run in runs), 1),
            _cell((ended(run, "dormant") for run in runs), 2),
            _cell((ended(run, "weight_norm") for run in runs), 1),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _largest(runs: list[dict], name: str) -> list[float]:
    """Return the mean over the last tasks of the largest of all matrices, for every run."""
    return [float(np.mean([max(s) for s in run[name][-LAST:]])) for run in runs]


def have_operators(arms: Arms) -> bool:
    """Return whether all runs have norms of operators and a Lipschitz bound."""
    every = [run for runs in arms.values() for run in runs]
    return all(np.isfinite(run.get("lipschitz", [math.nan])).all() for run in every)


def _cell(values: Iterable[float], digits: int = 3) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def draw(setting: Setting, arms: Arms, path: Path) -> None:
    """Write the PNG of one setting: each method at its best over tasks, and by strength."""
    score, lower = scores(setting)
    with_operators = have_operators(arms)
    columns = 5 if with_operators else 4
    figure = Figure(figsize=(4.25 * columns, 7.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, columns)
    chosen = best(arms, lower).values()
    held_out = all(run["test"][0] is not None for runs in arms.values() for run in runs)
    third = ("test", f"{score} on held-out data") if held_out else ("weight_norm", "weight norm")
    panels = [
        (axes[0, 0], "train", f"{score} at the end of each task", np.mean),
        (axes[0, 1], "online", f"{score} while learning (online)", np.mean),
        (axes[0, 2], *third, np.mean),
        (axes[1, 0], "sigma_max", "largest sigma_1 of all layers", np.max),
        (axes[1, 1], "gradient_diversity", "effective rank of per-example gradients", np.mean),
        (axes[1, 2], "dormant", "share of dormant units", np.mean),
    ]
    if with_operators:
        panels += [
            (axes[0, 4], "operator_sigma", "largest sigma_1 of all layers as operators", np.max),
            (axes[1, 4], "lipschitz", "log10 of the Lipschitz bound of the network", np.log10),
        ]
    for ax, name, title, over in panels:
        means: list[np.ndarray] = []
        for arm in chosen:
            curves = np.array([[over(v) for v in run[name]] for run in arms[arm]])
            _band(ax, curves, arm)
            means.append(curves.mean(0))
        _show_means(ax, means)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("task")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in [axes[1, 0], *axes[0, 4:]]:
        log_scale(ax)
        ax.axhline(1, color="0.6", linewidth=1, linestyle=":")
    last, first = f"{score} of the last {LAST} tasks", f"{score} after the first task"
    _sensitivity(axes[0, 3], arms, f"{last} by strength", lambda run: ended(run, "train"))
    _sensitivity(axes[1, 3], arms, f"{first} by strength", lambda run: run["train"][0])
    for ax in axes.flat:
        ax.grid(color="0.92")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7),
                  frameon=False)  # fmt: skip
    figure.suptitle(f"{setting}: each method at its best strength", fontsize=12)
    figure.savefig(path, format="png")


def _show_means(ax: Axes, means: list) -> None:
    """Fit the axis to the means; the wide intervals of few seeds may be cut off."""
    low, high = np.min(means), np.max(means)
    margin = 0.06 * (high - low) or 0.05
    ax.set_ylim(low - margin if low > margin else low * 0.9, high + margin)


def _band(ax: Axes, curves: np.ndarray, arm: Arm) -> None:
    tasks = np.arange(1, curves.shape[1] + 1)
    mean = curves.mean(0)
    color = COLORS[arm.method]
    ax.plot(tasks, mean, color=color, linewidth=1.6, label=str(arm))
    half = np.array([interval(column)[1] for column in curves.T])
    ax.fill_between(tasks, mean - half, mean + half, color=color, alpha=0.1, linewidth=0)


def _sensitivity(ax: Axes, arms: Arms, title: str, score: Callable[[dict], float]) -> None:
    """Draw a score against strength; methods without one as horizontal lines."""
    shown: list[float] = []
    for method in dict.fromkeys(arm.method for arm in arms):
        own = {arm.strength: [score(run) for run in runs]
               for arm, runs in arms.items() if arm.method == method}  # fmt: skip
        means, halves = zip(*(interval(values) for values in own.values()), strict=True)
        shown += means
        if list(own) == [0.0]:
            ax.axhline(means[0], color=COLORS[method], linewidth=1.2, linestyle="--")
        else:
            ax.errorbar(list(own), means, halves, color=COLORS[method], marker="o", markersize=4,
                        capsize=2, linewidth=1.6)  # fmt: skip
    _show_means(ax, shown)
    if any(arm.strength for arm in arms):
        ax.set_xscale("log")
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("strength (dashed: methods without one)")


def write(folder: Path) -> list[Path]:
    """Write report.md and a figure per setting; return their paths.

    Raises:
        ValueError: a folder without runs.
    """
    runs = load(folder)
    found = settings(runs)
    if not found:
        raise ValueError(f"{folder}: expected finished runs, got none")
    lines, written = [], []
    total = 0.0
    for setting, arms in found.items():
        name = "-".join(map(str, setting)).replace(" ", "_") + ".png"
        draw(setting, arms, folder / name)
        total += sum(sum(run["seconds"]) for runs in arms.values() for run in runs)
        lines += [table(setting, arms), f"![{setting}]({name})", ""]
        written.append(folder / name)
    places = [", ".join(sorted({run[name] for run in runs}))
              for name in ("processor", "torch", "commit", "date")]  # fmt: skip
    lines += ["± half of the 95 % confidence interval over seeds. Time of all runs on one core "
              f"each: {total / 3600:.1f} hours. {'; torch '.join(places[:2])}; commit {places[2]}; "
              f"{places[3]}.", ""]  # fmt: skip
    (folder / "report.md").write_text("\n".join(lines))
    return [folder / "report.md", *written]
