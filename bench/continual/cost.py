"""``python -m bench.continual.cost``: what the methods add to a training step, and to PPO.

All methods take turns: ten steps of the MLP, or a rollout of PPO with its update. Medians, over
"none" of the same round; the loop over layers that everybody writes is beside them. The learning
rate is so low that all policies stay the same: the environment has the same work for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import date
from statistics import median

import torch
from torch import nn

from spectral_kernels.cli.env import processor

from ..support import interleave
from ..support.baselines import loop_penalty, start_vectors
from . import checks, models, problems, train
from .methods import METHODS, Method

LR = 1e-9


class Loop(Method):
    """The penalty of the matrices by a loop in the loss, with one vector per matrix."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Find the matrices."""
        self.matrices = [p for p in model.parameters() if p.dim() == 2]
        self.vectors = start_vectors(self.matrices)
        return model

    def before_step(self) -> None:
        """Add the gradient of the penalty."""
        (self.strength * loop_penalty(self.matrices, self.vectors)).backward()


def of_mlp(method: type[Method], strength: float, lr: float) -> Callable[[], object]:
    """Return a function that takes ten steps on batches of digits."""
    generator = torch.Generator().manual_seed(0)
    problem = problems.build("random_labels", "digits", 1, generator)
    model = models.build("mlp", problem.shape, problem.outputs, generator)
    x = torch.randn(10 * train.BATCH, *problem.shape, generator=generator)
    task = problems.Task(x, torch.randint(problem.outputs, (len(x),), generator=generator))
    built = method(model, strength, lr)
    return lambda: train.epoch(built, problem, task, generator)


def of_ppo(method: type[Method], strength: float, lr: float) -> Callable[[], object]:
    """Return a function that does a rollout of the slippery hopper and PPO's update."""
    from . import control

    subject = control.SUBJECTS["slippery"]
    environments = [subject.environment() for _ in range(control.ENVIRONMENTS)]
    learner = control.build(environments, 0, lr, "slippery")
    control.give(learner, method, strength, lr)
    steps = subject.rollout * control.ENVIRONMENTS
    return lambda: learner.learn(steps, reset_num_timesteps=False)


def main(argv: list[str] | None = None) -> int:
    """Print a table per case."""
    parser = argparse.ArgumentParser(prog="python -m bench.continual.cost", description=__doc__)
    parser.add_argument("--cases", default="mlp,ppo", help="%(default)s")
    parser.add_argument("--methods", default="all", help="names; %(default)s")
    parser.add_argument("--rounds", default=15, type=int)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for case in options.cases.split(","):
        make, amount = (of_mlp, 10) if case == "mlp" else (of_ppo, 2000)
        wanted = [*METHODS] if options.methods == "all" else options.methods.split(",")
        wanted = list(dict.fromkeys(["none", *wanted]))
        if case == "ppo":
            wanted = [name for name in wanted if name not in checks.FOR_OWN_MODELS]
        functions = {}
        for name in wanted:
            strength = (checks.strengths(name) or (0.0,))[-1]
            functions[name] = make(METHODS[name], strength, LR)
        functions["loop over layers"] = make(Loop, 1e-3, LR)
        found = interleave.measure(functions, options.rounds, min_time=0.02, warmup=1)
        what = "a training step" if case == "mlp" else "a step of the environment, PPO's with it"
        print(f"| {case} | {what} | over none |\n|---|---|---|")
        for name, seconds in found.items():
            over = median(a / b for a, b in zip(seconds, found["none"], strict=True))
            print(f"| {name} | {median(seconds) / amount * 1e6:.0f} us | {over:.3f} |")
        print(f"\nOne thread; {processor()}, torch {torch.__version__}, {date.today()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
