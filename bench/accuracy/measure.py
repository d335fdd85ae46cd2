"""Error of sigma during training, and its cost: ``python -m bench.accuracy``.

Each estimator trains its own network with the penalty that it estimates, on task after task: the
demo's network on random labels, and a small transformer on sequences of random Markov chains. At
regular intervals the estimates are compared with the SVD of the current weights. Writes
accuracy.json, accuracy.md and accuracy.png into a folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from pytest_benchmark.utils import get_commit_info
from torch import nn

from spectral_kernels import SpectralRegularizer
from spectral_kernels.cli.demo import experiment
from spectral_kernels.cli.env import processor
from tests.support import cases

from ..report.results import commit_name
from ..support import gate, interleave
from ..support.workers import end_with_parent
from .report import draw, label, table


class TorchIteration:
    """The penalty with sigma from the iteration of torch's spectral_norm, one per step."""

    def __init__(self, model: nn.Module, strength: float):
        selection = SpectralRegularizer(model, strength, norms=False)._selection
        self.strength, self.reads = strength, 3
        self.weights = [matrix.ref.get() for matrix in selection.matrices]
        self.biases = [vector.ref.get() for vector in selection.elementwise]
        self.vectors = []
        for w in self.weights:
            v = nn.functional.normalize(torch.randn(w.shape[1]), dim=0)
            self.vectors.append(v)
        self.singular_values = torch.zeros(len(self.weights), 1)
        for _ in range(15):  # as torch does at the start
            self._iterate()

    @torch.no_grad()
    def _iterate(self) -> list[torch.Tensor]:
        found = []
        for i, w in enumerate(self.weights):
            u = nn.functional.normalize(w @ self.vectors[i], dim=0)
            v = nn.functional.normalize(w.mT @ u, dim=0)
            self.vectors[i], self.singular_values[i, 0] = v, torch.dot(u, w @ v)
            found.append(u)
        return found

    @torch.no_grad()
    def add_gradient(self, *_) -> None:
        """Iterate and add the gradient to ``.grad``."""
        us = self._iterate()
        for i, w in enumerate(self.weights):
            sigma = float(self.singular_values[i, 0])
            w.grad.addr_(us[i], self.vectors[i], alpha=self.strength * 4 * (sigma**2 - 1) * sigma)
        for b in self.biases:
            b.grad.add_(b, alpha=self.strength * 4 * float(b.square().sum()))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient at the start of every step."""
        optimizer.register_step_pre_hook(self.add_gradient)


def ours(**options) -> Callable[[nn.Module, float], SpectralRegularizer]:
    """Return a function that builds a regularizer."""
    return lambda model, strength: SpectralRegularizer(model, strength, norms=False, **options)


ESTIMATORS = {
    "torch": TorchIteration,
    "1": ours(),
    "2": ours(n_vectors=2),
    "4": ours(n_vectors=4),
    "8": ours(n_vectors=8),
    "1, auto": ours(n_power_iterations="auto"),
    "4, auto": ours(n_vectors=4, n_power_iterations="auto"),
}


class Batch(NamedTuple):
    """Input and target of a step; ``last``: it is the last one of its task."""

    x: torch.Tensor
    y: torch.Tensor
    last: bool


class Demo:
    """The demo: 1,280 digits with fresh random labels in every task."""

    every, lr = 40, 1e-3

    def __init__(self, seed: int, tasks: int = 30, epochs: int = 40):
        self.generator = torch.Generator().manual_seed(seed)
        self.images = experiment.digits(self.generator)
        self.model = experiment.build_model(self.generator)
        self.tasks, self.epochs = tasks, epochs

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of all tasks."""
        for _ in range(self.tasks):
            n = len(self.images)
            self.labels = torch.randint(experiment.CLASSES, (n,), generator=self.generator)
            for epoch in range(self.epochs):
                order = torch.randperm(n, generator=self.generator).split(experiment.BATCH)
                for i, chosen in enumerate(order):
                    last = (epoch, i) == (self.epochs - 1, len(order) - 1)
                    yield Batch(self.images[chosen], self.labels[chosen], last)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the loss to be minimized."""
        return nn.functional.cross_entropy(self.model(batch.x), batch.y)

    @torch.no_grad()
    def score(self) -> float:
        """Return the accuracy on the task's labels."""
        return float((self.model(self.images).argmax(1) == self.labels).double().mean())


class Transformer:
    """A GPT-2 of 0.8 M weights; each task is another Markov chain over 64 tokens."""

    every, lr = 10, 1e-3
    vocabulary, length, batch = 64, 48, 16

    def __init__(self, seed: int, tasks: int = 6, steps: int = 200):
        self.generator = torch.Generator().manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=self.vocabulary, n_positions=self.length, n_embd=128, n_layer=4, n_head=4,
            use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = transformers.GPT2LMHeadModel(config)
        self.tasks, self.steps, self._losses = tasks, steps, []

    def batches(self) -> Iterator[Batch]:
        """Yield sequences and their next tokens."""
        for _ in range(self.tasks):
            logits = torch.randn(self.vocabulary, self.vocabulary, generator=self.generator)
            chain = (3 * logits).softmax(1)
            self._losses = []
            for step in range(self.steps):
                tokens = [torch.randint(self.vocabulary, (self.batch,), generator=self.generator)]
                while len(tokens) < self.length:
                    following = chain[tokens[-1]].multinomial(1, generator=self.generator)
                    tokens.append(following[:, 0])
                x = torch.stack(tokens, dim=1)
                yield Batch(x[:, :-1], x[:, 1:], step == self.steps - 1)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the loss to be minimized."""
        logits = self.model(batch.x).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.y.flatten())
        self._losses.append(loss.detach())
        return loss

    def score(self) -> float:
        """Return the loss over the last 20 steps of the task."""
        return float(torch.stack(self._losses[-20:]).mean())


PROBLEMS = {"demo": Demo, "transformer": Transformer}


def run(problem: str, estimator: str, strength: float, seed: int, sizes: dict[str, int]) -> dict:
    """Train, and return the errors of the estimates against the SVD.

    Errors are relative to sigma_1 and positive where the estimate is too small: "first" of sigma_1
    and "least" of the r-th singular value, [measurements, matrices]; "ratio" of sigma_2 to sigma_1,
    mean over the matrices.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    made = PROBLEMS[problem](seed, **sizes)
    optimizer = torch.optim.Adam(made.model.parameters(), lr=made.lr)
    own = ESTIMATORS[estimator](made.model, strength)
    own.attach(optimizer)
    matrices = SpectralRegularizer(made.model, norms=False)._selection.matrices
    reads = _count_reads(own)
    found = defaultdict(list)
    step = 0
    for step, batch in enumerate(made.batches()):
        loss = made.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        before = None
        if step % made.every == 0:
            before = [m.of(m.ref.get().detach()).double().flatten(1) for m in matrices]
        optimizer.step()
        if before is not None:
            values = own.singular_values.double()
            for name, errors in _errors(before, values).items():
                found[name].append([round(e, 5) for e in errors])
        if batch.last:
            found["scores"].append(made.score())
    return {
        "problem": problem, "estimator": estimator, "strength": strength, "seed": seed,
        "every": made.every, "steps": step + 1, "reads": reads[0] / (step + 1), **found,
    }  # fmt: skip


def _errors(weights, values: torch.Tensor) -> dict[str, list[float]]:
    r = values.shape[1]
    truth = [torch.linalg.svdvals(w) for w in weights]
    first = [float(1 - values[i, 0] / t[0]) for i, t in enumerate(truth)]
    least = [float((t[r - 1] - values[i, r - 1]) / t[0]) for i, t in enumerate(truth)]
    ratio = [float(t[1] / t[0]) for t in truth]
    return {"first": first, "least": least, "ratio": [sum(ratio) / len(ratio)]}


def _count_reads(estimator) -> list[float]:
    """Return a list with one number: reads of the weights, in units of one read of all."""
    if isinstance(estimator, TorchIteration):
        counted, iterate = [0.0], estimator._iterate

        def counting():
            counted[0] += estimator.reads
            return iterate()

        estimator._iterate = counting
        return counted
    counted, (bucket,) = [0.0], estimator._buckets.bound()
    backend, sizes = bucket.backend, np.array([x.rows * x.cols for x in bucket.plan.layouts])

    class Counting(type(backend)):
        def __init__(self):
            self.__dict__.update(backend.__dict__)

        def gram_matvec(self, plan, state):
            stale = state.residual > state.tolerance * state.sigma
            part = 1.0 if state.tolerance == 0 else sizes[stale.numpy()].sum() / sizes.sum()
            counted[0] += float(part)
            super().gram_matvec(plan, state)

    bucket.backend = Counting()
    return counted


def costs(rounds: int, shapes: dict[str, list[tuple[int, int]]]) -> dict[str, dict[str, float]]:
    """Return seconds per step of every estimator at settled weights, by the name of the shapes."""
    found = {}
    for name, of in shapes.items():
        weights = gate.leaves(of, torch.float32)
        functions = {}
        for estimator, make in ESTIMATORS.items():
            own = make(_Weights(weights), 1e-6)
            torch_own = isinstance(own, TorchIteration)
            functions[estimator] = own.add_gradient if torch_own else own.accumulate_grad_
            for _ in range(0 if torch_own else 40):  # until "auto" has nothing more to do
                functions[estimator]()
        durations = interleave.measure(functions, rounds, 0.05)
        found[name] = {e: float(np.median(d)) for e, d in durations.items()}
    return found


class _Weights(nn.Module):
    def __init__(self, weights):
        super().__init__()
        for i, w in enumerate(weights):
            layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(w.detach())
            layer.weight.grad = w.grad
            self.add_module(str(i), layer)


def _key(run: dict) -> tuple:
    return run["problem"], run["estimator"], run["strength"], run["seed"]


def _save(folder: Path, data: dict) -> None:
    whole = folder / "accuracy.json"
    part = whole.with_suffix(".part")
    part.write_text(json.dumps(data, separators=(",", ":")) + "\n")
    part.replace(whole)


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for, except what the folder already has."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--out", default="accuracy", help="folder; what is there is not run again")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strengths", default="1e-3,1e-2", help="separated by commas")
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--estimators", default="/".join(ESTIMATORS), help="separated by slashes")
    parser.add_argument("--rounds", type=int, default=11, help="of the timing; 0: do not time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(argv)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "accuracy.json"
    data = json.loads(known.read_text()) if known.exists() else {"runs": [], "costs": {}}
    data.update({
        "device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commits": sorted({*data.get("commits", ()), commit_name(get_commit_info())}),
    })  # fmt: skip
    sizes = {"demo": {"tasks": 2, "epochs": 2}, "transformer": {"tasks": 1, "steps": 12}}
    wanted = itertools.product(
        options.problems.split(","), options.estimators.split("/"),
        map(float, options.strengths.split(",")), range(1 if options.smoke else options.seeds),
    )  # fmt: skip
    done = {_key(run) for run in data["runs"]}
    runs = [key for key in wanted if key not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, end_with_parent) as pool:
        pending = [pool.submit(run, *key, sizes[key[0]] if options.smoke else {}) for key in runs]
        for i, finished in enumerate(as_completed(pending), 1):
            last = finished.result()
            data["runs"].append(last)
            data["runs"].sort(key=_order)
            _save(folder, data)
            print(f"{i}/{len(runs)}  {last['problem']}, {label(last['estimator'])}, "
                  f"strength {last['strength']:g}, seed {last['seed']}: "
                  f"score {last['scores'][-1]:.3f}", flush=True)  # fmt: skip
    if options.rounds > 0:
        shapes = {name: cases.CASES[name]() for name in ("mlp", "vit_b")}
        if options.smoke:
            del shapes["vit_b"]
        data["costs"] = costs(2 if options.smoke else options.rounds, shapes)
        _save(folder, data)
    text = table(data)
    (folder / "accuracy.md").write_text(text)
    draw(data, folder / "accuracy.png")
    print(text)
    return 0


def _order(run: dict) -> tuple:
    problem, estimator, strength, seed = _key(run)
    return list(PROBLEMS).index(problem), strength, list(ESTIMATORS).index(estimator), seed
