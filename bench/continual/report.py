"""Tables with confidence intervals, and figures, of the runs in a folder."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from . import figures
from .arms import (
    Arms,
    Setting,
    ended,
    finished,
    have_operators,
    largest,
    last,
    named,
    scores,
    settings,
    with_interval,
)  # fmt: skip
from .runner import load


def table(setting: Setting, arms: Arms) -> str:
    """Return the Markdown of one setting."""
    words, _, digits = scores(setting, arms)
    has_test = all(run["test"][0] is not None for runs in arms.values() for run in runs)
    n = len(last(range(setting.tasks)))
    with_operators = have_operators(arms)
    head = ["method", "seeds", f"{words}, first task", f"{words}, last {n}",
            f"online, last {n}", *([f"held out, last {n}"] * has_test), "sigma_1, largest",
            *(["as operators", "log10 of the Lipschitz bound"] * with_operators),
            "stable rank", "gradient diversity", "dormant", "weight norm"]  # fmt: skip
    lines = [f"**{escaped(str(setting))}**", "", "| " + " | ".join(head) + " |",
             "|---" * len(head) + "|"]  # fmt: skip
    for arm, every in arms.items():
        runs, extra = finished(every), []
        seeds = str(len(every)) if runs == every else f"{len(runs)} of {len(every)}, others failed"
        if not runs:
            lines.append(f"| {escaped(str(arm))} | {seeds} |" + " |" * (len(head) - 2))
            continue
        if with_operators:
            bounds = [np.log10(last(run["lipschitz"])).mean() for run in runs]
            extra = [
                with_interval((largest(run, "operator_sigma") for run in runs), 2),
                with_interval(bounds, 1),
            ]
        cells = [
            escaped(str(arm)), seeds, with_interval((run["train"][0] for run in runs), digits),
            *(with_interval((ended(run, name) for run in runs), digits)
              for name in ("train", "online", *(["test"] * has_test))),
            with_interval((largest(run, "sigma_max") for run in runs), 2), *extra,
            with_interval((ended(run, "stable_rank") for run in runs), 1),
            with_interval((ended(run, "gradient_diversity") for run in runs), 1),
            with_interval((ended(run, "dormant") for run in runs), 2),
            with_interval((ended(run, "weight_norm") for run in runs), 1),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Return ``text`` so that Markdown shows every character of a label as it is."""
    return re.sub(r"([\\|*`<>\[\]$])", r"\\\1", text)


def write(folder: Path) -> list[Path]:
    """Write report.md and a figure per setting; return their paths.

    Raises:
        ValueError: a folder without runs.
    """
    runs = named(load(folder))
    found = settings(runs)
    if not found:
        raise ValueError(f"{folder}: expected finished runs, got none")
    lines, written = [], []
    total = 0.0
    styles = figures.styles(run["method"] for run in runs)
    for setting, arms in found.items():
        name = re.sub(r"[^\w.-]+", "_", "-".join(map(str, setting))) + ".png"
        if folder / name in written:  # labels that differ in other characters alone
            name = f"{len(written)}-{name}"
        figures.draw(setting, arms, styles, folder / name)
        total += sum(sum(run["seconds"]) for runs in arms.values() for run in runs)
        lines += [table(setting, arms), f"![{escaped(str(setting))}]({name})", ""]
        written.append(folder / name)
    places = [", ".join(sorted({run[name] for run in runs}))
              for name in ("processor", "torch", "commit", "date")]  # fmt: skip
    lines += ["± half of the 95 % confidence interval over seeds. Time of all runs on one core "
              f"each: {total / 3600:.1f} hours. {'; torch '.join(places[:2])}; commit {places[2]}; "
              f"{places[3]}.", ""]  # fmt: skip
    (folder / "report.md").write_text("\n".join(lines))
    return [folder / "report.md", *written]
