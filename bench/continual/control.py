"""Reinforcement learning: PPO of Stable-Baselines3 in environments of Gymnasium that change.

``cartpole``: CartPole-v1; every task changes the pole's length and mass, the cart's mass, the
force, gravity, and the order and signs of the four observations. ``slippery``: MuJoCo's Hopper-v5;
every task changes the friction of all surfaces, after the slippery ant of Dohare et al., "Loss of
plasticity in deep continual learning", Nature 2024, with that paper's network. The learner is told
of no change.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from spectral_kernels import diagnostics

from . import own
from .methods import METHODS
from .train import LR, plasticity, rounded, why_failed

ENVIRONMENTS = 8
PHYSICS = "gravity", "masscart", "masspole", "length", "force_mag"
LAST_EPISODES = 20
BLOCKS = 10  # of a task: means of the returns in each are recorded


class ChangingPole(gymnasium.Wrapper):
    """CartPole-v1 whose task is set by ``change``."""

    def __init__(self):
        super().__init__(gymnasium.make("CartPole-v1"))
        self._usual = {name: getattr(self.unwrapped, name) for name in PHYSICS}
        self.order, self.signs = np.arange(4), np.ones(4, np.float32)

    def change(self, factors: dict[str, float], order: np.ndarray, signs: np.ndarray) -> None:
        """Scale physical quantities; reorder the observations and multiply them by ``signs``."""
        pole = self.unwrapped
        for name, usual in self._usual.items():
            setattr(pole, name, usual * factors[name])
        pole.total_mass = pole.masspole + pole.masscart
        pole.polemass_length = pole.masspole * pole.length
        self.order, self.signs = order, signs

    def reset(self, **options):
        """Return the first observation, in this task's order and signs."""
        seen, info = self.env.reset(**options)
        return seen[self.order] * self.signs, info

    def step(self, action):
        """Return CartPole's step with the observation in this task's order and signs."""
        seen, *rest = self.env.step(action)
        return seen[self.order] * self.signs, *rest

    @staticmethod
    def changes(rng: np.random.Generator) -> Iterator[tuple]:
        """Yield the arguments of ``change``: factors from 1/2 to 2, orders and signs."""
        while True:
            factors = {name: float(2 ** rng.uniform(-1, 1)) for name in PHYSICS}
            yield factors, rng.permutation(4), rng.choice([-1, 1], 4).astype(np.float32)


class SlipperyHopper(gymnasium.Wrapper):
    """Hopper-v5 whose friction is set by ``change``."""

    def __init__(self):
        super().__init__(gymnasium.make("Hopper-v5"))
        self._usual = self.unwrapped.model.geom_friction[:, 0].copy()

    def change(self, factor: float) -> None:
        """Scale the sliding friction of all surfaces."""
        self.unwrapped.model.geom_friction[:, 0] = factor * self._usual

    @staticmethod
    def changes(rng: np.random.Generator) -> Iterator[tuple]:
        """Yield the arguments of ``change``: factors from 1/10 to 2, their logarithms uniform."""
        while True:
            yield (float(np.exp(rng.uniform(np.log(0.1), np.log(2)))),)


class Subject(NamedTuple):
    """An environment, and how PPO learns there."""

    environment: type[ChangingPole] | type[SlipperyHopper]
    rollout: int  # steps of each environment per update; those of all of them are one epoch
    batch: int
    widths: tuple[int, ...]  # of the hidden layers of policy and value network


SUBJECTS = {
    "cartpole": Subject(ChangingPole, 128, 128, (64, 64)),
    "slippery": Subject(SlipperyHopper, 250, 125, (256, 256)),
}


class _Episodes(BaseCallback):
    """Records the return of every finished episode."""

    def __init__(self):
        super().__init__()
        self.returns: list[float] = []
        self.running = np.zeros(ENVIRONMENTS)

    def _on_step(self) -> bool:
        self.running += self.locals["rewards"]
        for i in np.flatnonzero(self.locals["dones"]):
            self.returns.append(float(self.running[i]))
            self.running[i] = 0
        return True


class _Actor(nn.Module):
    """The policy's network, from observations to the logits of actions."""

    def __init__(self, policy):
        super().__init__()
        self.hidden, self.last = policy.mlp_extractor.policy_net, policy.action_net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, actions]."""
        return self.last(self.hidden(x))


def build(
    environments: list[gymnasium.Env], seed: int, lr: float = LR, problem: str = "cartpole"
) -> PPO:
    """Return a learner."""
    subject = SUBJECTS[problem]
    learner = PPO(
        "MlpPolicy", DummyVecEnv([lambda one=one: one for one in environments]),
        n_steps=subject.rollout, batch_size=subject.batch, learning_rate=lr, device="cpu",
        seed=seed, policy_kwargs={"activation_fn": nn.ReLU, "net_arch": [*subject.widths]},
    )  # fmt: skip
    learner.set_logger(Logger(folder=None, output_formats=[]))  # or it leaves an empty folder
    return learner


def _in_blocks(returns: list[float], counts: list[int]) -> list[float | None]:
    """Return the mean return in each tenth of a task, None where no episode ended.

    Args:
        returns: of the episodes of the task.
        counts: how many had ended after each epoch.
    """
    ends = [0, *(counts[math.ceil(len(counts) * i / BLOCKS) - 1] for i in range(1, BLOCKS + 1))]
    return [float(np.mean(returns[a:b])) if b > a else None for a, b in itertools.pairwise(ends)]


def give(learner: PPO, method: Callable, strength: float, lr: float) -> None:
    """Let a method take the steps of a learner."""
    built = method(learner.policy, strength, lr)
    learner.policy.optimizer = built.optimizer
    built.optimizer.register_step_pre_hook(lambda *_: built.before_step())
    built.optimizer.register_step_post_hook(lambda *_: built.after_step(None))


def run(key, progress: Callable[[int], Any] = lambda epochs: None, limit: float = math.inf) -> dict:
    """Do what ``train.run`` does; scores are episode returns.

    train: mean over the last 20 episodes of a task; online: over all of them; returns: in each
    tenth of a task. An epoch is a rollout, 1,024 steps of the environments (2,000 of the hopper),
    and PPO's update on it. Spectra are of policy and value network together; gradient diversity and
    dormant units are of the policy. An episode that is not over at the end of a task is cut off.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng(key.seed)
    subject = SUBJECTS[key.problem]
    environments = [subject.environment() for _ in range(ENVIRONMENTS)]
    learner = build(environments, key.seed, key.lr, key.problem)
    size, began = environments[0].observation_space.shape[0], time.perf_counter()
    is_discrete = isinstance(environments[0].action_space, gymnasium.spaces.Discrete)
    give(learner, own.find(METHODS, key.method), key.strength, key.lr)
    found: dict[str, list] = {}
    for task, change in enumerate(itertools.islice(subject.environment.changes(rng), key.tasks)):
        for environment in environments:
            environment.change(*change)
        learner._last_obs = None  # episodes start over
        episodes, start = _Episodes(), time.perf_counter()
        counts = []
        for epoch in range(key.epochs):
            learner.learn(subject.rollout * ENVIRONMENTS, callback=episodes,
                          reset_num_timesteps=False)  # fmt: skip
            counts.append(len(episodes.returns))
            progress(task * key.epochs + epoch + 1)
        seconds = time.perf_counter() - start
        buffer = learner.rollout_buffer
        x = torch.from_numpy(buffer.observations.reshape(-1, size)).float()
        actions = torch.from_numpy(buffer.actions.reshape(len(x), -1))
        measured = {
            "train": float(np.mean(episodes.returns[-LAST_EPISODES:])),
            "online": float(np.mean(episodes.returns)), "test": None, "measured": task + 1,
            "weight_norm": diagnostics.weight_norm(learner.policy), "seconds": seconds,
            "returns": _in_blocks(episodes.returns, counts),
        }  # fmt: skip
        measured |= plasticity(
            _Actor(learner.policy), learner.policy, x,
            actions.flatten().long() if is_discrete else actions,
            nn.functional.cross_entropy if is_discrete else nn.functional.mse_loss,
        )  # fmt: skip
        for name, value in measured.items():
            found.setdefault(name, []).append(value)
        if (why := why_failed(learner.policy, key, task + 1, began, limit)) is not None:
            found["failed"] = why
            break
    return {**key._asdict(), **{name: rounded(value) for name, value in found.items()}}
