"""Continual learning on small images: one network, task after task of random labels.

Every task gives the same images fresh random labels, which can only be memorized.
A network that keeps its ability to learn memorizes the last task as well as the first."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import nn

from ...optim import SpectralAdamW
from ...regularizer import SpectralRegularizer
from ...selection.arguments import expected, one_of

ARMS = ("none", "L2", "spectral", "SpectralAdamW")
CLASSES = 10
N_IMAGES = 1280
BATCH = 64
WIDTHS = (64, 128, 128, 128, CLASSES)
STRENGTH = 1e-3


class TaskResult(NamedTuple):
    """Result of one arm at the end of one task."""

    accuracy: float
    sigmas: tuple[float, ...]
    ms_per_step: float


class Epoch(NamedTuple):
    """Message of a worker after every epoch; ``result`` comes with the last one of a task."""

    arm: str
    task: int
    epoch: int
    accuracy: float
    result: TaskResult | None


Display = Callable[[Epoch], None]


@dataclass
class Results:
    """The tasks that every arm has finished; fewer than ``tasks`` if the run was interrupted."""

    tasks: int
    epochs: int
    seed: int
    arms: dict[str, list[TaskResult]]
    interrupted: bool = False


class WorkerError(RuntimeError):
    """An arm's process raised or died."""


def digits(generator: torch.Generator) -> torch.Tensor:
    """Return 1,280 digits of 8 x 8 pixels, standardized per pixel, [1280, 64]."""
    pixels = torch.from_numpy(load_digits().data)
    return standardized(pixels[torch.randperm(len(pixels), generator=generator)[:N_IMAGES]])


def standardized(pixels: torch.Tensor) -> torch.Tensor:
    """Return images [n, pixels] with mean 0 and deviation 1 per pixel, float32.

    A pixel that is the same in all images becomes 0.
    """
    std = pixels.std(dim=0)
    return torch.where(std > 0, (pixels - pixels.mean(dim=0)) / std, 0.0).float()


def build_model(generator: torch.Generator) -> nn.Sequential:
    """Return the MLP 64-128-128-128-10 with torch's default initial weights."""
    seed = int(torch.randint(2**62, (), generator=generator))
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for fan_in, fan_out in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def build_optimizer(arm: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam for the model, with the arm's penalty.

    Args:
        arm: "none"; "L2", which adds 1e-3 times the sum of squares of all parameters to the loss
            (its gradient is 2e-3 times the parameter, so ``weight_decay`` is 2e-3); "spectral", a
            regularizer attached to Adam; or "SpectralAdamW", the same in the optimizer's own pass
            (without weight decay AdamW is Adam).
        model: what to train.

    Raises:
        ValueError: an unknown arm.
    """
    if arm not in ARMS:
        raise ValueError(expected("arm", one_of(map(repr, ARMS)), arm))
    if arm == "SpectralAdamW":
        return SpectralAdamW(model, lr=1e-3, weight_decay=0.0, strength=STRENGTH)
    decay = 2 * STRENGTH if arm == "L2" else 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=decay)
    if arm == "spectral":
        SpectralRegularizer(model, strength=STRENGTH).attach(optimizer)
    return optimizer


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    order: torch.Tensor,
) -> float:
    """Take one step per batch of ``order`` and return the milliseconds per step."""
    batches = order.split(BATCH)
    start = time.perf_counter()
    for batch in batches:
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(batches) * 1e3


def run_arm(
    arm: str,
    tasks: int,
    epochs: int,
    seed: int,
    report: Display = lambda _: None,
) -> list[TaskResult]:
    """Train one network on task after task, with nothing reset between them.

    Args:
        arm: one of ``ARMS``.
        tasks: how many times all images get new labels.
        epochs: per task.
        seed: of images, initial weights, labels and batches; arms of one seed share them all.
        report: called after every epoch.

    Returns:
        One result per task; its time per step is the median over the task's epochs.
    """
    generator = torch.Generator().manual_seed(seed)
    images = digits(generator)
    model = build_model(generator)
    optimizer = build_optimizer(arm, model)
    results = []
    for task in range(1, tasks + 1):
        labels = torch.randint(CLASSES, (len(images),), generator=generator)
        times = []
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(images), generator=generator)
            times.append(train_epoch(model, optimizer, images, labels, order))
            with torch.no_grad():
                accuracy = float((model(images).argmax(dim=1) == labels).double().mean())
            result = None
            if epoch == epochs:
                result = TaskResult(accuracy, _sigmas(model), statistics.median(times))
                results.append(result)
            report(Epoch(arm, task, epoch, accuracy, result))
    return results


def _sigmas(model: nn.Module) -> tuple[float, ...]:
    weights = (p.detach() for p in model.parameters() if p.dim() == 2)
    return tuple(float(torch.linalg.svdvals(w)[0]) for w in weights)


def run(
    tasks: int,
    epochs: int,
    seed: int,
    display: Display = lambda _: None,
    arms: Sequence[str] = ARMS,
) -> Results:
    """Run the arms in parallel, in as many processes as there are cores.

    Ctrl-C ends the run and keeps the tasks that are finished. Call it from the main thread.

    Args:
        tasks, epochs, seed: as for :func:`run_arm`.
        display: called in this process after every epoch of every arm.
        arms: which of ``ARMS``.

    Raises:
        WorkerError: an arm failed; the others are ended.
    """
    results = Results(tasks, epochs, seed, {arm: [] for arm in arms})
    # The slowest arms come last in ARMS and are started first.
    waiting = list(arms)
    workers: dict[Pipe, BaseProcess] = {}
    busy: dict[Pipe, str] = {}
    with _interrupt_flag() as interrupted:
        try:
            while waiting and len(workers) < _cores():
                pipe, process = _start(tasks, epochs, seed)
                workers[pipe] = process
                _hand_over(waiting, pipe, busy)
            while busy and not interrupted.is_set():
                for pipe in wait(list(busy), timeout=0.2):
                    arm = busy[pipe]
                    epoch = _receive(arm, pipe, workers[pipe])
                    if epoch.result is not None:
                        results.arms[arm].append(epoch.result)
                    display(epoch)
                    if len(results.arms[arm]) == tasks:
                        del busy[pipe]
                        _hand_over(waiting, pipe, busy)
        finally:
            _end(workers)
    results.interrupted = interrupted.is_set()
    return results


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Turn Ctrl-C into a flag: an exception could interrupt the reading of a message or a bar."""
    flag = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def _start(tasks: int, epochs: int, seed: int) -> tuple[Pipe, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(tasks, epochs, seed, theirs), daemon=True)
    # A new process inherits ignored signals: Ctrl-C never reaches a worker, not even while it
    # imports.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    # The worker now has the only copy of its end, so that its death closes the pipe.
    theirs.close()
    return ours, process


def _work(tasks: int, epochs: int, seed: int, pipe: Pipe) -> None:
    """Run the arms whose names come through the pipe; send every epoch, or one traceback."""
    torch.set_num_threads(1)
    # The parent ends idle workers; if the parent dies, the pipe closes.
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            arm = pipe.recv()
            try:
                run_arm(arm, tasks, epochs, seed, pipe.send)
            except ConnectionError:
                raise
            except Exception:
                pipe.send(traceback.format_exc())


def _hand_over(waiting: list[str], pipe: Pipe, busy: dict[Pipe, str]) -> None:
    """Give the last of the waiting arms, if any, to a worker."""
    if waiting:
        busy[pipe] = waiting.pop()
        # A worker that has died is noticed when its pipe is read.
        with contextlib.suppress(ConnectionError):
            pipe.send(busy[pipe])


def _receive(arm: str, pipe: Pipe, process: BaseProcess) -> Epoch:
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        process.join()
        raise WorkerError(f"the {arm!r} arm died, exit code {process.exitcode}") from None
    if isinstance(message, str):
        raise WorkerError(f"the {arm!r} arm failed:\n{message.rstrip()}")
    return message


def _end(workers: dict[Pipe, BaseProcess]) -> None:
    for pipe, process in workers.items():
        process.kill()  # a worker has nothing to clean up
        process.join()
        pipe.close()
