"""The runs of a folder, by setting and arm, with confidence intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from . import train
from .methods import METHODS
from .models import MODELS

LAST = 5  # tasks at least that count as "at the end"


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
    """A method at a strength and a learning rate."""

    method: str
    strength: float
    lr: float = train.LR

    def __str__(self) -> str:
        words = f"{self.method} {self.strength:g}" if self.strength else self.method
        return words if self.lr == train.LR else f"{words}, lr {self.lr:g}"


Arms = dict[Arm, list[dict]]


def arm_of(run: dict) -> Arm:
    """Return the arm of a run; the first runs had no lr."""
    return Arm(run["method"], run["strength"], run.get("lr", train.LR))


def named(runs: Iterable[dict]) -> list[dict]:
    """Return the runs with the labels of one's own classes in place of their names.

    Where several classes have the same label, or the bench has that name, the label gets the file
    and the hash of its source.
    """
    runs = list(runs)
    bench = {"problem": train.NAMES, "model": MODELS, "method": METHODS}
    found = []
    for kind, known in bench.items():
        labels = {run[kind]: run["labels"][kind] for run in runs if kind in run.get("labels", {})}
        counts = Counter([*labels.values(), *known])
        for name, label in labels.items():
            if counts[label] > 1:
                labels[name] = f"{label} ({name})"
        found.append((kind, labels))
    return [run | {kind: labels.get(run[kind], run[kind]) for kind, labels in found}
            for run in runs]  # fmt: skip


def settings(runs: Iterable[dict]) -> dict[Setting, Arms]:
    """Return the runs by setting and arm, in the order of METHODS and of strengths.

    Methods of one's own come last, in alphabetical order.
    """
    found: dict[Setting, Arms] = {}
    order = {name: place for place, name in enumerate(METHODS)}

    def place(run: dict) -> tuple:
        arm = arm_of(run)
        return order.get(arm.method, len(order)), *arm, run["seed"]

    for run in sorted(runs, key=place):
        setting = Setting(*(run[name] for name in Setting._fields))
        found.setdefault(setting, {}).setdefault(arm_of(run), []).append(run)
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


def with_interval(values: Iterable[float], digits: int = 3) -> str:
    """Return the mean, and ± half the width of its interval if it has one."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def last(values: Sequence) -> Sequence:
    """Return the last values: a twentieth of them, at least five."""
    return values[-max(LAST, len(values) // 20) :]


def ended(run: dict, name: str) -> float:
    """Return the mean of a measurement over the last tasks (and over matrices)."""
    return float(np.mean([np.mean(value) for value in last(run[name])]))


def largest(run: dict, name: str) -> float:
    """Return the mean over the last tasks of the largest of all matrices."""
    return float(np.mean([max(s) for s in last(run[name])]))


def finished(runs: Iterable[dict]) -> list[dict]:
    """Return the runs that did not fail."""
    return [run for run in runs if "failed" not in run]


def measured(run: dict, name: str) -> list[int]:
    """Return the tasks, from 1 on, after which a measurement was made."""
    every = list(range(1, len(run[name]) + 1))
    return every if len(every) == len(run["train"]) else run["measured"]


def scores(setting: Setting, arms: Arms) -> tuple[str, bool, int]:
    """Return the name of a setting's score, whether lower is better, and decimals of its table."""
    if setting.problem in train.CONTROL:
        return "return", False, 0
    kinds = {run.get("score") for runs in arms.values() for run in runs}
    if setting.problem == "bit_flipping" or "mse" in kinds:
        return "mean squared error", True, 6
    return "accuracy", False, 3


def best(arms: Arms, lower: bool) -> dict[str, Arm]:
    """Return the arm of each method that is best at the end, of those without a failed run."""
    found: dict[str, tuple[float, Arm]] = {}
    for arm, runs in arms.items():
        if finished(runs) != runs:
            continue
        score = np.mean([ended(run, "train") for run in runs])
        score = -score if lower else score
        if arm.method not in found or score > found[arm.method][0]:
            found[arm.method] = (score, arm)
    return {method: arm for method, (_, arm) in found.items()}


def have_operators(arms: Arms) -> bool:
    """Return whether all runs have norms of operators and a Lipschitz bound."""
    every = [run for runs in arms.values() for run in finished(runs)]
    return all(np.isfinite(run.get("lipschitz", [math.nan])).all() for run in every)
