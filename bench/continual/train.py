"""One run: a method trains a model on task after task, with measurements at the end of each."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from spectral_kernels import diagnostics

from . import models, own, problems
from .methods import METHODS

LR = 1e-3
BATCH = 64
MEASURED = 128  # examples for gradient diversity and dormant units
MEASUREMENTS = 40  # tasks at most after which plasticity is measured: it costs as much as an epoch
CONTROL = ("cartpole", "slippery")  # by control.py
NAMES = (*problems.PROBLEMS, *CONTROL)
# Problems with their own data, and the models that they are for.
OWN_DATA = {"bit_flipping": ("mlp", "mlp_norm")} | dict.fromkeys(CONTROL, ("ppo",))


class Key(NamedTuple):
    """Identifies a run; two runs with the same key give the same figures."""

    problem: str
    data: str
    model: str
    method: str
    strength: float  # 0 where a method has none
    seed: int
    tasks: int
    epochs: int
    lr: float = LR


def run(
    key: Key, progress: Callable[[int], Any] = lambda epochs: None, limit: float = math.inf
) -> dict:
    """Train; return the key and the measurements, lists with one entry per task.

    online: mean score of a task's batches, each before its step; train, test: score on the task's
    examples and on held-out ones at its end (None if there are none). seconds: of the training
    alone. score: of a problem of one's own.

    Also at the end of tasks, of which ``measured`` has the numbers, from 1 on: sigma_max, sigma_min
    and stable_rank per matrix, operator_sigma likewise (of a convolution as an operator), lipschitz
    (see models.lipschitz), gradient_diversity, dormant (a share of all units) and weight_norm. That
    is all tasks, or about 40 of a longer stream with the last one.

    A run whose parameters are no longer finite, or that has taken ``limit`` seconds, ends after the
    task in hand; ``failed`` says so.

    Images, initial weights, tasks and batches of one seed are the same for every method.
    ``progress`` gets the number of finished epochs.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # subnormal weights, which L2 leads to, would make steps slow
    torch.manual_seed(key.seed)
    generator = torch.Generator().manual_seed(key.seed)
    problem = problems.build(key.problem, key.data, key.tasks, generator)
    model = models.build(key.model, problem.shape, problem.outputs, generator)
    method = own.find(METHODS, key.method)(model, key.strength, key.lr)
    found: dict[str, Any] = {}
    done = 0
    every = math.ceil(key.tasks / MEASUREMENTS)
    began = time.perf_counter()
    for number, task in enumerate(problem.tasks, 1):
        online, start = 0.0, time.perf_counter()
        for _ in range(key.epochs):
            online += epoch(method, problem, task, generator)
            done += 1
            progress(done)
        seconds = time.perf_counter() - start
        measured = {"online": online / key.epochs, "seconds": seconds}
        measured |= scores(method.model, problem, task)
        why = why_failed(method.model, key, number, began, limit)
        if why is None and (key.tasks - number) % every == 0:
            measured |= {"measured": number} | measure(method.model, problem, task)
        for name, value in measured.items():
            found.setdefault(name, []).append(value)
        if why is not None:
            found["failed"] = why
            break
    if own.known(key.problem):
        found["score"] = problem.score
    return {**key._asdict(), **{name: rounded(value) for name, value in found.items()}}


def why_failed(
    model: nn.Module, key: Key, number: int, began: float, limit: float
) -> str | None:  # fmt: skip
    """Return why a run that ``began`` has failed with its task ``number``, None if it has not."""
    after = f"after {number} of {key.tasks} tasks"
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        return f"parameters that are not finite, {after}"
    is_late = time.perf_counter() - began > limit and number < key.tasks
    return f"more than {limit:g} seconds, {after}" if is_late else None


def rounded(found: Any) -> Any:
    """Return numbers, in lists too, with six digits: a long stream has thousands of them."""
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.6g}") if isinstance(found, float) else found


def epoch(
    method, problem: problems.Problem, task: problems.Task, generator: torch.Generator
) -> float:
    """Take a step per batch; return the mean score of the batches before their steps."""
    order = torch.randperm(len(task.x), generator=generator)
    total = 0.0
    penalty = getattr(method, "penalty", lambda: None)
    method.model.train()
    for chosen in order.split(BATCH):
        x, y = task.x[chosen], task.y[chosen]
        outputs = method.model(x)
        loss = problem.loss(outputs, y)
        method.optimizer.zero_grad()
        more = penalty()
        (loss if more is None else loss + more).backward()
        method.before_step()
        method.optimizer.step()
        method.after_step(x)
        with torch.no_grad():
            total += len(x) * float(
                loss if problem.score == "mse" else (outputs.argmax(1) == y).double().mean()
            )
    return total / len(task.x)


def scores(model: nn.Module, problem: problems.Problem, task: problems.Task) -> dict:
    """Return the scores at the end of a task."""
    return {
        "train": _score(model, problem, task.x, task.y),
        "test": None if task.x_test is None else _score(model, problem, task.x_test, task.y_test),
    }


def measure(model: nn.Module, problem: problems.Problem, task: problems.Task) -> dict:
    """Return what else is measured at the end of a task."""
    found = {"weight_norm": diagnostics.weight_norm(model)} | operators(model)
    return found | plasticity(model, _weights(model), task.x, task.y, problem.loss)


def operators(model: nn.Module) -> dict:
    """Return operator_sigma and lipschitz; that is nan where a model has no such bound."""
    plain = copy.deepcopy(model)
    for module in [m for m in plain.modules() if parametrize.is_parametrized(m)]:
        weights = {name: getattr(module, name).detach() for name in module.parametrizations}
        # remove_parametrizations() would change the class, which the model has too.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, weight in weights.items():
            setattr(module, name, nn.Parameter(weight))
    sigmas = diagnostics.spectral_norms(plain, rtol=1e-3, convolutions="operator")
    return {"operator_sigma": list(sigmas.values()), "lipschitz": models.lipschitz(plain, sigmas)}


def plasticity(model: nn.Module, matrices, x: torch.Tensor, y: torch.Tensor, loss) -> dict:
    """Return measures of plasticity, from ``matrices`` and the first examples."""
    x, y = x[:MEASURED], y[:MEASURED]
    spectra = diagnostics.spectra(matrices).values()
    dormant = diagnostics.dormant_units(model, x).values()
    return {
        "sigma_max": [s.sigma_max for s in spectra],
        "sigma_min": [s.sigma_min for s in spectra],
        "stable_rank": [s.stable_rank for s in spectra],
        "gradient_diversity": diagnostics.gradient_diversity(model, x, y, loss),
        "dormant": sum(d.dormant for d in dormant) / sum(d.units for d in dormant),
    }


def _weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the matrices that the layers multiply by, after any parametrization."""
    found = []
    for module_name, module in model.named_modules():
        for name in ("weight", "in_proj_weight"):
            weight = getattr(module, name, None)
            if isinstance(weight, torch.Tensor) and weight.dim() > 1:
                found.append((f"{module_name}.{name}", weight.detach()))
    return found


@torch.no_grad()
def _score(model: nn.Module, problem: problems.Problem, x, y) -> float:
    if problem.score == "accuracy":
        return diagnostics.accuracy(model, x, y)
    model.eval()
    return float(problem.loss(model(x), y))
