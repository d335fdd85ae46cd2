"""One run: a method trains a model on task after task, with measurements at the end of each."""

from __future__ import annotations

import copy
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
NAMES = (*problems.PROBLEMS, "cartpole")
# Problems with their own data, and the models that they are for.
OWN_DATA = {"bit_flipping": ("mlp", "mlp_norm"), "cartpole": ("ppo",)}


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


def run(key: Key, progress: Callable[[int], Any] = lambda epochs: None) -> dict:
    """Train; return the key and the measurements, lists with one entry per task.

    online: mean score of a task's batches, each before its step; train, test: score on the task's
    examples and on held-out ones at its end (None if there are none). Also at its end: sigma_max,
    sigma_min and stable_rank per matrix, operator_sigma likewise (of a convolution as an operator),
    lipschitz (see models.lipschitz), gradient_diversity, dormant (a share of all units) and
    weight_norm. seconds: of the training alone. score: of a problem of one's own.

    Images, initial weights, tasks and batches of one seed are the same for every method.
    ``progress`` gets the number of finished epochs.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # subnormal weights, which L2 leads to, would make steps slow
    torch.manual_seed(key.seed)
    generator = torch.Generator().manual_seed(key.seed)
    problem = problems.build(key.problem, key.data, key.tasks, generator)
    model = models.build(key.model, problem.shape, problem.outputs, generator)
    method = own.find(METHODS, key.method)(model, key.strength, LR)
    found: dict[str, Any] = {}
    done = 0
    for task in problem.tasks:
        online, start = 0.0, time.perf_counter()
        for _ in range(key.epochs):
            online += epoch(method, problem, task, generator)
            done += 1
            progress(done)
        seconds = time.perf_counter() - start
        measured = {"online": online / key.epochs, "seconds": seconds}
        measured |= measure(method.model, problem, task)
        for name, value in measured.items():
            found.setdefault(name, []).append(value)
    if own.known(key.problem):
        found["score"] = problem.score
    return {**key._asdict(), **found}


def epoch(
    method, problem: problems.Problem, task: problems.Task, generator: torch.Generator
) -> float:
    """Take a step per batch; return the mean score of the batches before their steps."""
    order = torch.randperm(len(task.x), generator=generator)
    total = 0.0
    method.model.train()
    for chosen in order.split(BATCH):
        x, y = task.x[chosen], task.y[chosen]
        outputs = method.model(x)
        loss = problem.loss(outputs, y)
        method.optimizer.zero_grad()
        loss.backward()
        method.before_step()
        method.optimizer.step()
        method.after_step(x)
        with torch.no_grad():
            total += len(x) * float(
                loss if problem.score == "mse" else (outputs.argmax(1) == y).double().mean()
            )
    return total / len(task.x)


def measure(model: nn.Module, problem: problems.Problem, task: problems.Task) -> dict:
    """Return what is measured at the end of a task."""
    scores = {
        "train": _score(model, problem, task.x, task.y),
        "test": None if task.x_test is None else _score(model, problem, task.x_test, task.y_test),
        "weight_norm": diagnostics.weight_norm(model),
    }
    scores |= operators(model)
    return scores | plasticity(model, _weights(model), task.x, task.y, problem.loss)


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
