"""A figure per setting: measurements over the tasks, and scores by strength."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from ..support.figures import DASH_DOT, DASHED, SOLID, WIDTH, Style, dress, log_scale, marked
from .arms import (
    Arm,
    Arms,
    Setting,
    best,
    ended,
    finished,
    have_operators,
    interval,
    last,
    measured,
    scores,
)  # fmt: skip

# none, L2, spectral and SpectralAdamW look as in the demo's picture; kinds of spectral are dashed.
STYLES = {
    "none": Style("#D55E00", "o", SOLID), "l2": Style("#0072B2", "s", SOLID),
    "l2_init": Style("#56B4E9", "D", SOLID), "shrink_perturb": Style("#CC79A7", "v", SOLID),
    "spectral_norm": Style("#767676", "X", SOLID), "layer_norm": Style("#8B6914", "P", SOLID),
    "redo": Style("#E69F00", "<", SOLID), "spectral": Style("#009E73", "^", SOLID),
    "spectral_k1": Style("#882255", ">", DASHED), "spectral_k4": Style("#AA4499", "*", DASHED),
    "spectral_k8": Style("#117733", "h", DASHED), "spectral_sharp": Style("#000000", "d", DASHED),
    "spectral_operator": Style("#332288", "p", DASHED),
    "spectral_adamw": Style("#000000", "8", DASH_DOT),
    "l2_er": Style("#2E6F40", "H", SOLID), "parseval": Style("#8C6D00", "<", SOLID),
    "isometry": Style("#5E3C99", "s", SOLID), "continual_backprop": Style("#A50F15", "D", SOLID),
    "continual_backprop_10k": Style("#A50F15", "d", SOLID), "snr": Style("#DD1C77", "v", SOLID),
    "weight_projection": Style("#636363", "P", SOLID), "nap": Style("#6B3E07", "X", SOLID),
    "muon": Style("#252525", "*", SOLID), "spectral_four": Style("#238B45", "s", DASHED),
    "spectral_auto": Style("#00695C", "o", DASHED), "spectral_above": Style("#9C5700", "v", DASHED),
    "spectral_decoupled": Style("#D01C8B", "D", DASHED),
    "spectral_cap": Style("#54278F", "P", DASHED),
}  # fmt: skip
# Of methods of one's own: other colours than above, all dark enough for lines on white.
SPARE_COLORS = ("#C51B7D", "#01665E", "#7A7A00", "#6A51A3", "#B2182B", "#4D4D4D", "#543005")
SPARE_MARKERS = "phd8*"
MOST_CURVES = 9
LEAST_BOUND = -3  # log10 of a Lipschitz bound; below, a network is as good as constant


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Return the styles of methods by name or label.

    One's own have a colour that the name decides, or the next free one where two names want the
    same: each combination of colour and marker once.
    """
    found = dict(STYLES)
    spare = [Style(color, marker, DASH_DOT) for marker in SPARE_MARKERS for color in SPARE_COLORS]
    for name in sorted({*methods} - {*STYLES}):
        first = int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(SPARE_COLORS)
        for i in range(len(spare)):
            style = spare[(first + i) % len(spare)]
            if style not in found.values():
                break
        found[name] = style
    return found


def draw(setting: Setting, arms: Arms, styles: Mapping[str, Style], path: Path) -> None:
    """Write the PNG of one setting."""
    picture(setting, arms, styles).savefig(path, format="png")


def picture(setting: Setting, arms: Arms, styles: Mapping[str, Style]) -> Figure:
    """Return the figure of one setting: each method at its best over tasks, and by strength."""
    score, lower, _ = scores(setting, arms)
    chosen = shown_arms(arms, best(arms, lower), lower)
    methods = {arm.method for arm in chosen}
    arms = {arm: done for arm, runs in arms.items()
            if arm.method in methods and (done := finished(runs))}  # fmt: skip
    held_out = all(run["test"][0] is not None for runs in arms.values() for run in runs)
    unit = {"return": "return (reward per episode)",
            "mean squared error": "mean squared error (log scale)"}.get(score, score)  # fmt: skip
    score = "error" if lower else score
    most = 1.0 if score == "accuracy" else None
    sigma, n = r"$\sigma_1$ (log scale)", len(last(range(setting.tasks)))
    panels: list = [
        ("train", f"{score} at the end of each task", unit, np.mean),
        ("online", f"{score} while learning (online)", unit, np.mean),
        ("test", f"{score} on held-out data", unit, np.mean) if held_out else
        ("weight_norm", "norm of all weights", "Euclidean norm", np.mean),
        (f"{score} of the last {n} tasks, by strength", lambda run: ended(run, "train")),
        ("sigma_max", r"largest $\sigma_1$ of all layers", sigma, np.max),
        (f"{score} after the first task, by strength", lambda run: run["train"][0]),
        ("gradient_diversity", "effective rank of per-example gradients", "directions", np.mean),
        ("dormant", "dormant units", "share of all units", np.mean),
    ]  # fmt: skip
    if have_operators(arms):
        panels += [
            ("operator_sigma", r"largest $\sigma_1$ of all layers as operators", sigma, np.max),
            ("lipschitz", "Lipschitz bound of the network", r"$\log_{10}$ of the bound",
             lambda bound: max(np.log10(bound), LEAST_BOUND)),
        ]  # fmt: skip
    rows = len(panels) // 2
    legend_rows = -(-len(chosen) // 4)
    height = 2.35 * rows + 0.5 + 0.22 * legend_rows
    figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for ax, panel in zip(figure.subplots(rows, 2).flat, panels, strict=True):
        if len(panel) == 2:
            dress(ax, panel[0].capitalize(), "strength (log scale)", unit)
            _sensitivity(ax, arms, styles, panel[1], most, min if lower else max)
            if lower:
                log_scale(ax)
            continue
        name, title, label, over = panel
        dress(ax, title[0].upper() + title[1:], f"task (each {setting.epochs} epochs)", label)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
        means, bars = [], []
        for number, (arm, runs) in enumerate(chosen.items()):
            places, curves = curves_of(runs, name, over)
            mean = curves.mean(0)
            halves = np.array([interval(column)[1] for column in curves.T])
            marked(ax, places, mean, halves, styles[arm.method],
                   (number, len(chosen)), str(arm))  # fmt: skip
            means.append(mean)
            bars += [mean - halves, mean + halves]
        _fit(ax, means, bars, most if label == unit else None)
        if lower and label == unit:
            log_scale(ax)
        if name in ("sigma_max", "operator_sigma"):
            log_scale(ax)
            ax.axhline(1, color="0.6", linewidth=1, linestyle=":")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = [label.replace("$", r"\$") for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4),
                  frameon=False, fontsize=9)  # fmt: skip
    has_intervals = any(len(runs) > 2 for runs in chosen.values())
    about = ("bars: 95 % confidence intervals over seeds" if has_intervals else
             "no intervals, fewer than three seeds")  # fmt: skip
    title = str(setting).replace("$", r"\$")
    figure.suptitle(f"{title}\nEach method at its best strength; {about}", fontsize=10)
    return figure


def shown_arms(arms: Arms, bests: Mapping[str, Arm], lower: bool) -> Arms:
    """Return the arms that have a curve: the best of each method, of the best nine and "none"."""
    sign = -1 if lower else 1
    order = sorted(bests.values(), key=lambda arm: -sign * np.mean(
        [ended(run, "train") for run in arms[arm]]))  # fmt: skip
    kept = {*order[:MOST_CURVES], bests.get("none")}
    return {arm: arms[arm] for arm in bests.values() if arm in kept}


def curves_of(runs: list[dict], name: str, over: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Return the places [n] and curves [seeds, n] of a measurement, ``over`` all matrices."""
    curves = np.array([[over(value) for value in run[name]] for run in runs])
    return in_blocks(measured(runs[0], name), curves)


def in_blocks(places: list[int], curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return long curves as means over blocks of tasks, and where these are; 40 to 80 blocks.

    Args:
        places: the tasks, [n].
        curves: [seeds, n]; what is too much for whole blocks is left out at the start.
    """
    size = max(1, len(places) // 40)
    skipped = len(places) % size
    x = np.array(places[skipped:], float).reshape(-1, size).mean(1)
    return x, curves[:, skipped:].reshape(len(curves), -1, size).mean(2)


def _fit(ax: Axes, means: list, bars: list, most: float | None) -> None:
    """Fit the axis to means and bars; the wide ones of few seeds are cut, and those above ``most``.

    An axis of numbers that are not negative begins above 0, so that it can be logarithmic.
    """
    shown, ends = (np.concatenate([np.ravel(x) for x in xs]) for xs in (means, bars))
    shown, ends = shown[np.isfinite(shown)], ends[np.isfinite(ends)]
    if not len(shown):
        return
    low, high = shown.min(), shown.max()
    margin = 0.06 * (high - low) or 0.05
    bottom = max(min([low, *ends]), low - 0.35 * (high - low)) - margin
    top = min(max([high, *ends]), high + 0.35 * (high - low), most or math.inf)
    ax.set_ylim(0.9 * low if low >= 0 > bottom else bottom, top + margin)


def _sensitivity(
    ax: Axes, arms: Arms, styles: Mapping[str, Style], score: Callable[[dict], float],
    most: float | None, better: Callable = max,
) -> None:  # fmt: skip
    """Draw a score against strength, of several learning rates the one with the ``better`` mean.

    Methods without a strength are horizontal lines.
    """
    shown: list[float] = []
    bars: list[float] = []
    methods = list(dict.fromkeys(arm.method for arm in arms))
    for number, method in enumerate(methods):
        own: dict[float, list[float]] = {}
        for arm, runs in arms.items():
            if arm.method == method:
                values = [score(run) for run in runs]
                own[arm.strength] = better(values, own.get(arm.strength, values), key=np.mean)
        means, halves = zip(*(interval(values) for values in own.values()), strict=True)
        shown += means
        bars += [mean + sign * half for mean, half in zip(means, halves, strict=True)
                 for sign in (-1, 1)]  # fmt: skip
        style = styles[method]
        if list(own) == [0.0]:
            places = np.linspace(0.02, 0.98, 5)
            ax.plot(places, means * len(places), transform=ax.get_yaxis_transform(),
                    **style.options() | {"linestyle": (0, (1, 1.5))})  # fmt: skip
        else:
            aside = 10 ** (0.025 * (number - (len(methods) - 1) / 2))  # so that bars are apart
            ax.errorbar([strength * aside for strength in own], means, halves, capsize=2,
                        elinewidth=0.9, **style.options())  # fmt: skip
    _fit(ax, [shown], [bars], most)
    if strengths := [arm.strength for arm in arms if arm.strength]:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())  # they would overlap
        if min(strengths) == max(strengths):
            ax.set_xlim(strengths[0] / 4, strengths[0] * 4)
    if any(not arm.strength for arm in arms):
        ax.set_xlabel("strength (log scale; dotted: methods without one)")
