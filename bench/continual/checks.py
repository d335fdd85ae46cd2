"""What a run needs, checked before the first one begins."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

from spectral_kernels import diagnostics

from . import models, own, problems, train
from .methods import METHODS, Method

MLPS = ("mlp", "mlp_norm")  # the models for data that are no images
# Methods that need the layers, the inputs or the loss of a model of the bench.
FOR_OWN_MODELS = ("l2_er", "layer_norm", "muon", "nap", "redo", "spectral_norm")
FEW = 4  # examples that a model of one's own is tried on


def check(key: train.Key) -> None:
    """Raise ValueError for an unknown name, or a method that does not suit the model.

    Likewise for a class of one's own that is not what a run expects: problem, model and method are
    built once, and a model of one's own, or one for a problem of one's own, is tried.
    """
    accepted: list[tuple[str, Iterable[str]]] = [("problem", train.NAMES), ("method", METHODS)]
    if key.problem in train.OWN_DATA:
        accepted += [("data", ("none",)), ("model", train.OWN_DATA[key.problem])]
    else:
        data = ("none",) if own.known(key.problem) else problems.DATA
        of_rows = key.data in problems.DATA and len(problems.SHAPES[key.data]) == 1
        accepted += [("data", data), ("model", MLPS if of_rows else models.MODELS)]
    for name, names in accepted:
        got = getattr(key, name)
        is_allowed = own.known(got) and not (name == "model" and key.problem in train.CONTROL)
        if got not in names and not is_allowed:
            where = "" if name in ("problem", "method") else f" for {own.given(key.problem)!r}"
            more = "" if name == "data" or key.problem in train.CONTROL else ", or FILE.py:CLASS"
            raise ValueError(f"{name}: expected one of {', '.join(names)}{more}{where}, got "
                             f"{own.given(got)!r}")  # fmt: skip
    if key.problem in train.CONTROL:
        _check_learner(key)
        return
    problem, x, y = _tried_problem(key.problem, key.data, key.tasks)
    model = _tried_model(key, problem, x, y)
    _tried_method(key, model, x)


@functools.cache
def _tried_problem(
    name: str, data: str, tasks: int
) -> tuple[problems.Problem, torch.Tensor, torch.Tensor]:
    """Return a problem and the first examples of its first task."""
    generator = torch.Generator().manual_seed(0)
    if not own.known(name):
        problem = problems.build(name, data, tasks, generator)
        task = next(problem.tasks)
        return problem, task.x[:FEW], task.y[:FEW]
    given = own.given(name)
    own.check_takes(own.find({}, name), (generator, tasks),
                    "problem", f"{given} to be built with (generator, tasks)")  # fmt: skip
    try:
        problem = problems.build(name, data, tasks, generator)
        task = next(problem.tasks)
    except Exception as error:
        raise own.refuse(name, "problem", f"a first task of {given}", error) from None
    return problem, task.x[:FEW], task.y[:FEW]


def _tried_model(
    key: train.Key, problem: problems.Problem, x: torch.Tensor, y: torch.Tensor
) -> nn.Module:
    """Return a model that was tried on a few examples."""
    given = own.given(key.model)
    generator = torch.Generator().manual_seed(0)
    if own.known(key.model):
        own.check_takes(own.find({}, key.model), (problem.shape, problem.outputs),
                        "model", f"{given} to be built with (shape, outputs)")  # fmt: skip
    elif not own.known(key.problem):
        return models.build(key.model, problem.shape, problem.outputs, generator)
    who = key.model if own.known(key.model) else key.problem
    suits = f"{given} to suit inputs of shape {problem.shape}"
    try:
        model = models.build(key.model, problem.shape, problem.outputs, generator)
        if not isinstance(model, nn.Module):
            raise TypeError("it is no nn.Module")
        outputs = model(x)
    except Exception as error:
        raise own.refuse(who, "model", suits, error) from None
    expected = [len(x), problem.outputs]
    if list(outputs.shape) != expected:
        raise ValueError(f"model: expected {given} to return outputs of shape {expected} for "
                         f"{len(x)} examples, got {list(outputs.shape)}")  # fmt: skip
    try:
        diagnostics.dormant_units(model, x)
        diagnostics.gradient_diversity(model, x, y, problem.loss)
        train.operators(model)
    except Exception as error:
        raise own.refuse(who, "model", f"{given} to be measurable", error) from None
    return model


def _tried_method(key: train.Key, model: nn.Module, x: torch.Tensor) -> Method:
    """Return a method that was built; of one of one's own, check what it has."""
    strength = key.strength or 0.1
    if not own.known(key.method):
        return METHODS[key.method](model, strength, train.LR)
    given, found = own.given(key.method), own.find({}, key.method)
    arguments = (model, strength, train.LR)
    own.check_takes(found, arguments,
                    "method", f"{given} to be built with (model, strength, lr)")  # fmt: skip
    try:
        method = found(*arguments)
    except Exception as error:
        suits = f"{given} to suit {own.given(key.model)}"
        raise own.refuse(key.method, "method", suits, error) from None
    for name, kind in (("model", nn.Module), ("optimizer", torch.optim.Optimizer)):
        if not isinstance(got := getattr(method, name, None), kind):
            raise ValueError(f"method: expected {given} to have .{name}, of {kind.__name__}, got "
                             f"{type(got).__name__} ({_BASE})")  # fmt: skip
    for name, more, words in (("before_step", (), ""), ("after_step", (x,), "inputs")):
        wanted = f"{given} to have {name}({words})"
        if not callable(got := getattr(method, name, None)):
            raise ValueError(f"method: expected {wanted}, got none ({_BASE})")
        own.check_takes(got, more, "method", wanted)
    return method


_BASE = "a subclass of bench.continual.methods.Method has it"


def strengths(method: str) -> tuple[float, ...]:
    """Return the default strengths of a method, () of one that has no strength.

    Raises:
        ValueError: a class of one's own whose ``strengths`` are no tuple of positive numbers.
    """
    if method not in METHODS and not own.known(method):
        return ()  # check() tells which names are accepted
    found = getattr(own.find(METHODS, method), "strengths", ())
    try:
        numbers = tuple(map(float, found))
    except (TypeError, ValueError):
        numbers = (0.0,)
    if isinstance(found, str) or not all(number > 0 for number in numbers):
        raise ValueError(f"method: expected strengths of {own.given(method)} to be a tuple of "
                         f"positive numbers, got {found!r}")  # fmt: skip
    return numbers


def _check_learner(key: train.Key) -> None:
    """Check a method for PPO, which has a network of its own."""
    changes = key.method in FOR_OWN_MODELS
    if own.known(key.method):
        from . import control  # takes seconds to import

        environment = control.SUBJECTS[key.problem].environment()
        policy = control.build([environment], 0, problem=key.problem).policy
        inputs = torch.zeros(FEW, *environment.observation_space.shape)
        changes = _tried_method(key, policy, inputs).model is not policy
    if changes:
        expected = f"one that keeps the network of {key.problem!r}, which is PPO's own"
        raise ValueError(f"method: expected {expected}, got {own.given(key.method)!r}")
