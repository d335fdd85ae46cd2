"""``python -m bench.continual.protocol``: the runs of PROTOCOL.md, in pieces of any length."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from . import checks
from .arms import Arm, arm_of, ended, finished
from .runner import key_of, load, run_all, say, words
from .train import Key

TUNED = 100  # the seed of the runs that choose; reported seeds are 0, 1, ...
FEW_LRS, LRS = (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PLANE = ("none", "l2", "l2_init", "spectral")  # tried at all of LRS
PLANES = (*PLANE, "spectral_decoupled")  # shown at all of LRS, the last without a say in the choice
OURS = ("spectral", "spectral_four", "spectral_auto", "spectral_sharp", "spectral_above",
        "spectral_decoupled", "spectral_cap")  # fmt: skip
OTHERS = ("none", "l2", "l2_init", "l2_er", "parseval", "isometry", "shrink_perturb", "redo",
          "continual_backprop", "snr", "layer_norm", "weight_projection", "nap",
          "muon")  # fmt: skip
SHORT = ("none", "l2", "l2_init", "parseval", "isometry", "continual_backprop", "spectral",
         "spectral_four", "spectral_sharp", "spectral_decoupled")  # fmt: skip
ANY_MODEL = ("none", "l2", "l2_init", "parseval", "isometry", "shrink_perturb", "spectral",
             "spectral_sharp", "spectral_decoupled", "spectral_operator")  # fmt: skip
PPO = ("none", "l2", "continual_backprop_10k", "spectral", "spectral_decoupled")


class Stream(NamedTuple):
    """A stream of tasks: what is run on it, and what chooses lr and strength."""

    problem: str
    data: str
    model: str
    tasks: int
    epochs: int
    tuned_tasks: int  # of the runs that choose
    methods: tuple[str, ...]
    lrs: tuple[float, ...]  # of these
    seeds: int = 5
    score: str = "train"  # or "test", or "online"
    twice: tuple[str, ...] = ()  # methods that are reported at their two best settings
    has_plane: bool = False


STREAMS = {
    "labels": Stream("random_labels", "digits", "mlp", 400, 20, 40, OTHERS + OURS, LRS,
                     has_plane=True),
    "permuted": Stream("permuted_pixels", "mnist1d", "mlp", 800, 5, 80, OTHERS + OURS, FEW_LRS,
                       score="test"),
    "labels_1d": Stream("random_labels", "mnist1d", "mlp", 800, 10, 80, SHORT, FEW_LRS, 3),
    "noise": Stream("label_noise", "digits", "mlp", 20, 10, 20, OTHERS + OURS, (1e-3,),
                    score="test"),
    "classes_resnet": Stream("class_incremental", "textures", "resnet", 40, 5, 40, ANY_MODEL,
                             (1e-3,), score="test"),
    "classes_plain": Stream("class_incremental", "textures", "resnet_plain", 40, 5, 40, ANY_MODEL,
                            (1e-3,), score="test"),
    "classes_vit": Stream("class_incremental", "textures", "vit", 40, 5, 40, ANY_MODEL, (1e-3,),
                          score="test"),
    "slippery": Stream("slippery", "none", "ppo", 10, 100, 3, PPO, (3e-4,), 3, "online",
                       twice=("spectral",)),
}  # fmt: skip


def tuning(stream: Stream) -> list[Key]:
    """Return the runs that choose lr and strength of every method."""
    found = []
    for method in stream.methods:
        lrs = stream.lrs if method in PLANE else [lr for lr in stream.lrs if lr in FEW_LRS]
        found += [_key(stream, method, strength, lr, TUNED, stream.tuned_tasks)
                  for lr in lrs for strength in checks.strengths(method) or (0.0,)]  # fmt: skip
    return found


def extension(stream: Stream, runs: Iterable[dict]) -> list[Key]:
    """Return the runs of one more strength, for each method whose best is at an end of its own.

    It is as far from the end as that from the strength beside it. Of methods whose runs that choose
    are not all there, nothing is returned.
    """
    found = []
    for method, own in _tuned(stream, runs, tuning(stream)).items():
        tried = sorted(checks.strengths(method))
        if len(tried) < 2 or (best := own[0]["strength"]) not in (tried[0], tried[-1]):
            continue
        beside = tried[1] if best == tried[0] else tried[-2]
        strength = float(f"{best * best / beside:.3g}")
        lrs = dict.fromkeys(key.lr for key in tuning(stream) if key.method == method)
        found += [_key(stream, method, strength, lr, TUNED, stream.tuned_tasks) for lr in lrs]
    return found


def plane(stream: Stream) -> list[Key]:
    """Return the runs of two seeds for the planes of lr and strength, if the stream has them."""
    if not stream.has_plane:
        return []
    return [_key(stream, method, strength, lr, seed, stream.tuned_tasks)
            for seed in (TUNED, TUNED + 1) for method in PLANES if method in stream.methods
            for lr in LRS for strength in checks.strengths(method) or (0.0,)]  # fmt: skip


def chosen(stream: Stream, runs: Iterable[dict]) -> dict[str, list[Arm]]:
    """Return the arm of each method whose runs that choose are all there; two of ``twice``.

    It is the one of the best score at the end, rounded to 0.01, and of these the one that is best
    while learning. Runs that failed are not chosen.
    """
    return {method: [arm_of(run) for run in own[: 2 if method in stream.twice else 1]]
            for method, own in tuned(stream, runs).items()}  # fmt: skip


def tuned(stream: Stream, runs: Iterable[dict]) -> dict[str, list[dict]]:
    """Return the runs that choose, of methods for which they are all there; the best first."""
    runs = list(runs)
    return _tuned(stream, runs, tuning(stream) + extension(stream, runs))


def _tuned(stream: Stream, runs: Iterable[dict], keys: list[Key]) -> dict[str, list[dict]]:
    """Return the runs of ``keys`` that did not fail, the best first, of complete methods."""
    done = {key_of(run): run for run in runs}
    wanted: dict[str, list[Key]] = {}
    for key in keys:
        wanted.setdefault(key.method, []).append(key)
    found = {}
    for method, own in wanted.items():
        if all(key in done for key in own):
            left = finished(done[key] for key in own)
            found[method] = sorted(left, key=lambda run: _order(stream, run), reverse=True)
    return {method: best for method, best in found.items() if best}


def reported(stream: Stream, runs: Iterable[dict]) -> list[Key]:
    """Return the runs that are reported, of the methods that are chosen for already."""
    arms = [arm for arms in chosen(stream, runs).values() for arm in arms]
    return [_key(stream, arm.method, arm.strength, arm.lr, seed, stream.tasks)
            for seed in range(stream.seeds) for arm in arms]  # fmt: skip


def _key(
    stream: Stream, method: str, strength: float, lr: float, seed: int, tasks: int
) -> Key:  # fmt: skip
    return Key(stream.problem, stream.data, stream.model, method, strength, seed, tasks,
               stream.epochs, lr)  # fmt: skip


def _order(stream: Stream, run: dict) -> tuple[float, float]:
    return round(ended(run, stream.score), 2), ended(run, "online")


def main(argv: list[str] | None = None) -> int:
    """Go on with the runs of the streams; return 1 if runs raised an exception."""
    parser = argparse.ArgumentParser(prog="python -m bench.continual.protocol", description=__doc__)
    parser.add_argument("folder", type=Path, help="what is there is not run again")
    parser.add_argument("--streams", default=",".join(STREAMS), help="%(default)s")
    parser.add_argument("--stages", default="tune,extend,report,plane", help="%(default)s")
    parser.add_argument("--budget", default=math.inf, type=float,
                        help="seconds after which no run begins; call again to go on")  # fmt: skip
    parser.add_argument("--limit", default=1800, type=float,
                        help="seconds of a run; longer ones are recorded as failed")  # fmt: skip
    parser.add_argument("--workers", default=len(os.sched_getaffinity(0)), type=int)
    options = parser.parse_args(argv)
    streams, stages = options.streams.split(","), options.stages.split(",")
    for given, known, kind in ((streams, STREAMS, "streams"), (stages, _STAGES, "stages")):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{kind}: expected some of {', '.join(known)}, got {unknown[0]!r}")
    console, end, failures = Console(), time.monotonic() + options.budget, []
    for name in streams:
        for stage in stages:
            wanted = _STAGES[stage](STREAMS[name], load(options.folder))
            left = end - time.monotonic()
            failures += run_all(wanted, options.folder, options.workers, console, options.limit,
                                left)  # fmt: skip
    for failure in failures:
        say(console, f"failed: {words(failure.key)}")
    return int(bool(failures))


_STAGES = {
    "tune": lambda stream, runs: tuning(stream), "extend": extension, "report": reported,
    "plane": lambda stream, runs: plane(stream),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
