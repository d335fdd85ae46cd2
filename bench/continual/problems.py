"""Streams of tasks: what changes from one task to the next."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from . import own
from .data import CLASSES, DATA, SHAPES


class Task(NamedTuple):
    """Training examples, and held-out ones if the problem has any."""

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor | None = None
    y_test: torch.Tensor | None = None


class Problem(NamedTuple):
    """A stream of tasks; ``score`` is "accuracy", or "mse" for regression."""

    shape: tuple[int, ...]  # of an input
    outputs: int
    score: str
    tasks: Iterator[Task]

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss that is minimized."""
        if self.score == "mse":
            return nn.functional.mse_loss(outputs, targets)
        return nn.functional.cross_entropy(outputs, targets)


Changes = Callable[[torch.Generator, int, str], Iterator[Task]]


def random_labels(generator: torch.Generator, tasks: int, data: str) -> Iterator[Task]:
    """Fresh random labels for the same images: they can only be memorized."""
    images = DATA[data](generator)
    for _ in range(tasks):
        yield Task(images.x, torch.randint(CLASSES, (len(images.x),), generator=generator))


def permuted_pixels(generator: torch.Generator, tasks: int, data: str) -> Iterator[Task]:
    """The pixels of all images in a new order."""
    images = DATA[data](generator)
    for _ in range(tasks):
        order = torch.randperm(images.x[0].numel(), generator=generator)
        x, x_test = (i.flatten(1)[:, order].view_as(i) for i in (images.x, images.x_test))
        yield Task(x, images.y, x_test, images.y_test)


def label_flips(generator: torch.Generator, tasks: int, data: str) -> Iterator[Task]:
    """The labels of the classes permuted."""
    images = DATA[data](generator)
    for _ in range(tasks):
        labels = torch.randperm(CLASSES, generator=generator)
        yield Task(images.x, labels[images.y], images.x_test, labels[images.y_test])


def class_incremental(generator: torch.Generator, tasks: int, data: str) -> Iterator[Task]:
    """Two more classes in every task; after all of them, again from two, reordered."""
    images = DATA[data](generator)
    for task in range(tasks):
        place = task % (CLASSES // 2)
        if place == 0:
            order = torch.randperm(CLASSES, generator=generator)
        shown = order[: 2 * (place + 1)]
        train, test = (torch.isin(y, shown) for y in (images.y, images.y_test))
        yield Task(images.x[train], images.y[train], images.x_test[test], images.y_test[test])


def label_noise(generator: torch.Generator, tasks: int, data: str) -> Iterator[Task]:
    """Random labels: three of four in the first task, decreasing to none in the last.

    Having learnt noise must not keep a network from learning the true labels.
    """
    images = DATA[data](generator)
    for task in range(tasks):
        share = 0.75 * (1 - task / max(tasks - 1, 1))
        noisy = torch.rand(len(images.y), generator=generator) < share
        drawn = torch.randint(CLASSES, (len(images.y),), generator=generator)
        yield Task(images.x, torch.where(noisy, drawn, images.y), images.x_test, images.y_test)


def bit_flipping(generator: torch.Generator, tasks: int, data: str) -> Iterator[Task]:
    """Regression on 20 bits; of the 15 slow ones, one flips per task.

    The slowly-changing regression of Dohare et al., "Loss of plasticity in deep continual
    learning", Nature 2024: the other bits are random in every example; the target is a random
    network with weights of +-1 and 100 hidden units that fire above 0.7 of their largest input.
    """
    bits, slow, hidden, examples = 20, 15, 100, 1280

    def signs(*shape: int) -> torch.Tensor:
        return 2 * torch.randint(2, shape, generator=generator).float() - 1

    weights, outputs = signs(hidden, bits + 1), signs(hidden) / hidden**0.5
    threshold = 0.7 * (bits + 1) - (weights < 0).sum(1)
    state = torch.randint(2, (slow,), generator=generator).float()
    for _ in range(tasks):
        flipped = int(torch.randint(slow, (), generator=generator))
        state[flipped] = 1 - state[flipped]
        fast = torch.randint(2, (2 * examples, bits - slow), generator=generator).float()
        ones = torch.ones(len(fast), 1)
        x = torch.cat((state.expand(len(fast), -1), fast, ones), dim=1)
        y = ((x @ weights.mT > threshold).float() @ outputs)[:, None]
        yield Task(x[:examples], y[:examples], x[examples:], y[examples:])


PROBLEMS: dict[str, Changes] = {
    f.__name__: f
    for f in (random_labels, permuted_pixels, label_flips, class_incremental, label_noise,
              bit_flipping)
}  # fmt: skip


def build(name: str, data: str, tasks: int, generator: torch.Generator) -> Problem:
    """Return a problem by its name, on a data set by its name (bit_flipping has its own).

    A class of one's own is built with (generator, tasks). Its objects have ``shape``, ``outputs``
    and, if it is not "accuracy", ``score``, and iterate over tasks: (x, y), or with held-out
    examples (x, y, x_test, y_test).

    Raises:
        ValueError: a class of one's own whose object is not like that.
    """
    if name not in PROBLEMS:
        return _own_problem(own.find({}, name)(generator, tasks), tasks)
    stream = PROBLEMS[name](generator, tasks, data)
    if name == "bit_flipping":
        return Problem((21,), 1, "mse", stream)
    return Problem(SHAPES[data], CLASSES, "accuracy", stream)


def _own_problem(stream: Iterable[tuple], tasks: int) -> Problem:
    """Return a problem of an object of one's own; its tasks are checked when they are drawn."""
    shape, outputs = getattr(stream, "shape", None), getattr(stream, "outputs", None)
    score = getattr(stream, "score", "accuracy")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"shape: expected a tuple of numbers from 1 on, got {shape!r}")
    if not isinstance(outputs, int) or outputs < 1:
        raise ValueError(f"outputs: expected a number from 1 on, got {outputs!r}")
    if score not in ("accuracy", "mse"):
        raise ValueError(f"score: expected 'accuracy' or 'mse', got {score!r}")

    def checked() -> Iterator[Task]:
        found = 0
        for task in itertools.islice(stream, tasks):
            yield _checked(task, shape, outputs, score)
            found += 1
        if found < tasks:
            raise ValueError(f"problem: expected {tasks} tasks or more, got {found}")

    return Problem(shape, outputs, score, checked())


def _checked(task: tuple, shape: tuple[int, ...], outputs: int, score: str) -> Task:
    if not isinstance(task, tuple) or len(task) not in (2, 4):
        raise ValueError("task: expected (x, y) or (x, y, x_test, y_test), got "
                         f"{type(task).__name__}")  # fmt: skip
    task = Task(*task)
    parts = [("x", "y", task.x, task.y)]
    if task.x_test is not None or task.y_test is not None:
        parts.append(("x_test", "y_test", task.x_test, task.y_test))
    for x_name, y_name, x, y in parts:
        n = len(x) if isinstance(x, torch.Tensor) and x.dim() else 0
        _check_tensor(x_name, x, torch.float32, (max(n, 1), *shape))
        if score == "mse":
            _check_tensor(y_name, y, torch.float32, (n, outputs))
        else:
            _check_tensor(y_name, y, torch.int64, (n,))
            if not 0 <= int(y.min()) <= int(y.max()) < outputs:
                raise ValueError(f"{y_name}: expected classes from 0 to {outputs - 1}, got "
                                 f"{int(y.min())} to {int(y.max())}")  # fmt: skip
    return task


def _check_tensor(name: str, found: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(found).__name__}")
    if found.dtype != dtype or tuple(found.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} of shape {shape}, got {found.dtype} of shape "
                         f"{tuple(found.shape)}")  # fmt: skip
