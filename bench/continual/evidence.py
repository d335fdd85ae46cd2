"""``python -m bench.continual.evidence FOLDER``: tables and figures of the protocol's runs."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import pictures
from .arms import Arm, ended, finished, largest, last, with_interval
from .protocol import LRS, PLANES, STREAMS, TUNED, Stream, extension, plane, reported, tuned, tuning
from .runner import key_of, load
from .train import CONTROL, LR

CHANCE = 0.1  # accuracy of a run that failed; a return is 0
NEAR = 0.95  # of the best: what counts to the area of a plane
CANDIDATES = ("spectral", "spectral_four", "spectral_auto", "spectral_sharp", "spectral_above",
              "spectral_decoupled")  # fmt: skip


class Row(NamedTuple):
    """The reported runs of a method at its setting, in the order of seeds."""

    arm: Arm
    runs: list[dict]
    scores: list[float]  # at the end


def rows(stream: Stream, runs: Iterable[dict]) -> dict[Arm, Row]:
    """Return what is reported of a stream, so far as it is there."""
    done = {key_of(run): run for run in runs}
    found: dict[Arm, list[dict]] = {}
    for key in reported(stream, done.values()):
        arm = Arm(key.method, key.strength, key.lr)
        found.setdefault(arm, []).extend([done[key]] if key in done else [])
    return {arm: Row(arm, own, [score(stream, run) for run in own])
            for arm, own in found.items() if own}  # fmt: skip


def score(stream: Stream, run: dict) -> float:
    """Return a run's score at the end; that of chance if it failed."""
    if "failed" in run:
        return 0.0 if stream.problem in CONTROL else CHANCE
    return ended(run, stream.score)


def main_table(runs: list[dict]) -> str:
    """Return the Markdown of scores of all methods on all streams: mean, worst and best seed."""
    columns = {name: rows(stream, runs) for name, stream in STREAMS.items()}
    columns = {name: found for name, found in columns.items() if found}
    best = {name: max(np.mean(row.scores) for row in found.values())
            for name, found in columns.items()}  # fmt: skip
    methods = list(dict.fromkeys(m for name in columns for m in STREAMS[name].methods))
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for method in methods:
        cells = []
        for name, found in columns.items():
            own = [row for arm, row in found.items() if arm.method == method]
            digits = 0 if STREAMS[name].problem in CONTROL else 3
            cells.append("; ".join(_cell(row, digits, best[name]) for row in own))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, digits: int, best: float) -> str:
    mean = f"{np.mean(row.scores):.{digits}f}"
    if np.mean(row.scores) == best:
        mean = f"**{mean}**"
    failed = len(row.runs) - len(finished(row.runs))
    more = f", {failed} failed" if failed else ""
    return f"{mean} ({min(row.scores):.{digits}f} to {max(row.scores):.{digits}f}{more})"


def choice_table(runs: list[dict]) -> str:
    """Return the Markdown of what was chosen on every stream, and its score on that one seed."""
    columns = {name: tuned(stream, runs) for name, stream in STREAMS.items()}
    columns = {name: found for name, found in columns.items() if found}
    methods = list(dict.fromkeys(m for name in columns for m in STREAMS[name].methods))
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for method in methods:
        cells = []
        for name, found in columns.items():
            if method not in found:
                cells.append("")
                continue
            best, stream = found[method][0], STREAMS[name]
            digits = 0 if stream.problem in CONTROL else 3
            online = ended(best, "online")
            cells.append(
                f"{score(stream, best):.{digits}f}; online {online:.{digits}f}; lr "
                f"{best['lr']:g}" + f", {best['strength']:g}" * bool(best["strength"])
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def stream_table(name: str, runs: list[dict]) -> str:
    """Return the Markdown of one stream: what was chosen, and what else was measured."""
    stream, found = STREAMS[name], rows(STREAMS[name], runs)
    digits = 0 if stream.problem in CONTROL else 3
    n = len(last(range(stream.tasks)))
    lines = [f"**{name}**: {stream.problem}, {stream.model}, {stream.tasks} tasks of "
             f"{stream.epochs} epochs; score: {stream.score}, of the last {n} tasks", "",
             "| method | lr | strength | seeds | score | worst | best | first task | online | "
             "largest sigma_1 | gradient diversity | dormant |", "|---" * 12 + "|"]  # fmt: skip
    for arm, row in found.items():
        runs_of = finished(row.runs)
        cells = [arm.method, f"{arm.lr:g}", f"{arm.strength:g}" if arm.strength else "",
                 str(len(row.runs)), with_interval(row.scores, digits),
                 f"{min(row.scores):.{digits}f}", f"{max(row.scores):.{digits}f}"]  # fmt: skip
        if runs_of:
            cells += [
                with_interval([run[stream.score][0] for run in runs_of], digits),
                with_interval([ended(run, "online") for run in runs_of], digits),
                with_interval([largest(run, "sigma_max") for run in runs_of], 2),
                with_interval([ended(run, "gradient_diversity") for run in runs_of], 1),
                with_interval([ended(run, "dormant") for run in runs_of], 2),
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class Plane(NamedTuple):
    """Scores of a method over learning rates and strengths, [lrs, strengths]; nan: no run yet."""

    method: str
    lrs: tuple[float, ...]
    strengths: tuple[float, ...]
    scores: np.ndarray
    seeds: int


def planes(stream: Stream, runs: list[dict]) -> list[Plane]:
    """Return the planes of the methods that are shown at all learning rates."""
    done = {key_of(run): run for run in runs}
    found = []
    for method in PLANES:
        every = [key for key in plane(stream) if key.method == method]
        keys = [key for key in every if key.seed == TUNED]
        strengths = tuple(dict.fromkeys(key.strength for key in keys))
        scores = np.full((len(LRS), len(strengths)), math.nan)
        seeds = 2 if all(key in done for key in every) else 1
        for key in keys:
            wanted = [key._replace(seed=TUNED + i) for i in range(seeds)]
            if all(one in done for one in wanted):
                mean = np.mean([score(stream, done[one]) for one in wanted])
                scores[LRS.index(key.lr), strengths.index(key.strength)] = mean
        if np.isfinite(scores).any():
            found.append(Plane(method, LRS, strengths, scores, seeds))
    return found


def areas(found: list[Plane]) -> str:
    """Return the Markdown of the best cells and of the shares of cells that are near them."""
    best = max(float(np.nanmax(one.scores)) for one in found)
    lines = ["| method | best | at lr | strength | cells near the best of all | near its own |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for one in found:
        own = float(np.nanmax(one.scores))
        i, j = np.unravel_index(np.nanargmax(one.scores), one.scores.shape)
        near, size = [int((one.scores >= NEAR * x).sum()) for x in (best, own)], one.scores.size
        strength = f"{one.strengths[j]:g}" if one.strengths[j] else ""
        lines.append(f"| {one.method} | {own:.3f} | {one.lrs[i]:g} | {strength} | "
                     f"{near[0]} of {size} | {near[1]} of {size} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def decision(runs: list[dict]) -> str:
    """Return the Markdown of the rule for the estimate and the form."""
    streams = {name: rows(stream, runs) for name, stream in STREAMS.items()
               if stream.problem not in CONTROL}  # fmt: skip
    worst: dict[str, dict[str, float]] = {name: {} for name in CANDIDATES}
    for name, found in streams.items():
        for arm, row in found.items():
            if arm.method in worst and len(row.runs) == STREAMS[name].seeds:
                worst[arm.method][name] = min(row.scores)
    common = [name for name in streams if name in worst["spectral"]]
    lines = ["| candidate | " + " | ".join(common) + " | mean | minus today's |",
             "|---" * (3 + len(common)) + "|"]  # fmt: skip
    for candidate, own in worst.items():
        shared = [name for name in common if name in own]
        cells = [f"{own[name]:.3f}" if name in own else "" for name in common]
        difference = [own[name] - worst["spectral"][name] for name in shared]
        mean = f"{np.mean([own[name] for name in shared]):.3f}" if shared else ""
        cells += [mean, f"{np.mean(difference):+.3f}" if shared else ""]
        lines.append(f"| {candidate} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def strengths(runs: list[dict]) -> str:
    """Return the Markdown of the rule for the strength: score over the best of any strength."""
    done = {key_of(run): run for run in runs}
    shares: dict[float, dict[str, float]] = {}
    for name, stream in STREAMS.items():
        keys = [key for key in tuning(stream) if key.method == "spectral" and key.lr == LR]
        if stream.problem in CONTROL or not keys or not all(key in done for key in keys):
            continue
        best = max(score(stream, done[key]) for key in keys)
        for key in keys:
            shares.setdefault(key.strength, {})[name] = score(stream, done[key]) / best
    names = list(dict.fromkeys(name for own in shares.values() for name in own))
    lines = ["| strength | " + " | ".join(names) + " | mean |", "|---" * (2 + len(names)) + "|"]
    for strength, own in sorted(shares.items()):
        cells = [f"{own[name]:.3f}" for name in names]
        cells.append(f"{np.mean([*own.values()]):.3f}")
        lines.append(f"| {strength:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def progress(runs: list[dict]) -> str:
    """Return the Markdown of how much of the protocol is done, and its time."""
    done = {key_of(run): run for run in runs}
    lines = ["| stream | runs that choose | reported | hours of one core |", "|---|---|---|---|"]
    total = 0.0
    for name, stream in STREAMS.items():
        choosing = tuning(stream) + extension(stream, runs) + plane(stream)
        wanted = [list(dict.fromkeys(choosing)), reported(stream, runs)]
        of = stream.seeds * (len(stream.methods) + len(stream.twice))
        counts = [sum(key in done for key in keys) for keys in wanted]
        hours = sum(_hours(done[key]) for keys in wanted for key in keys if key in done)
        total += hours
        lines.append(f"| {name} | {counts[0]} of {len(wanted[0])} | {counts[1]} of {of} | "
                     f"{hours:.1f} |")  # fmt: skip
    places = sorted({f"{run['processor']}, torch {run['torch']}" for run in runs})
    dates = sorted({run["date"] for run in runs})
    failed = sum("failed" in run for run in runs)
    lines += ["", f"{len(runs)} runs, {failed} failed; {total:.1f} hours of training on one core "
              f"each; {'; '.join(places)}; {dates[0]} to {dates[-1]}; commits "
              f"{', '.join(sorted({run['commit'] for run in runs}))}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _hours(run: dict) -> float:
    return sum(run["seconds"]) / 3600


def write(folder: Path) -> list[Path]:
    """Write evidence.md and its figures; return their paths.

    Raises:
        ValueError: a folder without runs.
    """
    runs = load(folder)
    if not runs:
        raise ValueError(f"{folder}: expected finished runs, got none")
    parts = ["# What the runs of the protocol say\n", progress(runs),
             "Score at the end, mean (worst to best seed):\n", main_table(runs)]  # fmt: skip
    parts += ["What was chosen, and its score on that one seed, of fewer tasks where there are "
              "many (at the end; online; lr, strength):\n", choice_table(runs)]  # fmt: skip
    written = []
    found = planes(STREAMS["labels"], runs)
    if found:
        pictures.planes(found, folder / "planes.png")
        written.append(folder / "planes.png")
        parts += ["## lr and strength, `labels`\n", areas(found), "![Planes](planes.png)\n"]
    for name, stream in STREAMS.items():
        if own := rows(stream, runs):
            path = folder / f"{name}.png"
            pictures.stream(name, stream, {arm: row.runs for arm, row in own.items()}, path)
            written.append(path)
            parts += [f"## `{name}`\n", stream_table(name, runs), f"![{name}]({path.name})\n"]
    parts += ["## The rules for the defaults\n", "Worst seed:\n", decision(runs),
              "Score over the best of any strength, lr 1e-3, the seed that chooses:\n",
              strengths(runs)]  # fmt: skip
    (folder / "evidence.md").write_text("\n".join(parts))
    return [folder / "evidence.md", *written]


def main(argv: list[str] | None = None) -> int:
    """Write, and print what was written; return 1 for a folder without runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.continual.evidence", description=__doc__)
    parser.add_argument("folder", type=Path)
    try:
        for path in write(parser.parse_args(argv).folder):
            print(f"wrote {path}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
