"""Reinforcement learning: PPO on a CartPole whose physics and sensors change.

The environment is Gymnasium's CartPole-v1, the learner Stable-Baselines3's PPO. Every task changes
the pole's length and mass, the cart's mass, the force, gravity, and the order and signs of the four
observations; the learner is not told.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

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
from .train import LR, plasticity, rounded

ENVIRONMENTS = 8
ROLLOUT = 128  # steps of each environment per update of PPO; those of all of them are one epoch
PHYSICS = "gravity", "masscart", "masspole", "length", "force_mag"
LAST_EPISODES = 20


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


def changes(rng: np.random.Generator) -> Iterator[tuple[dict[str, float], np.ndarray, np.ndarray]]:
    """Yield the arguments of ChangingPole.change: factors from 1/2 to 2, orders and signs."""
    while True:
        factors = {name: float(2 ** rng.uniform(-1, 1)) for name in PHYSICS}
        yield factors, rng.permutation(4), rng.choice([-1, 1], 4).astype(np.float32)


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


def build(poles: list[ChangingPole], seed: int, lr: float = LR) -> PPO:
    """Return a learner with two hidden layers of 64 units."""
    environments = DummyVecEnv([lambda pole=pole: pole for pole in poles])
    learner = PPO(
        "MlpPolicy", environments, n_steps=ROLLOUT, batch_size=128, learning_rate=lr,
        device="cpu", seed=seed,
        policy_kwargs={"activation_fn": nn.ReLU, "net_arch": [64, 64]},
    )  # fmt: skip
    learner.set_logger(Logger(folder=None, output_formats=[]))  # or it leaves an empty folder
    return learner


def run(key, progress: Callable[[int], Any] = lambda epochs: None, limit: float = math.inf) -> dict:
    """Do what ``train.run`` does; scores are episode returns, at most 500.

    train: mean over the last 20 episodes of a task; online: over all of them. An epoch is 1,024
    steps of the environments and PPO's update on them. Spectra are of policy and value network
    together; gradient diversity and dormant units are of the policy.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(key.seed)
    poles = [ChangingPole() for _ in range(ENVIRONMENTS)]
    learner = build(poles, key.seed, key.lr)
    method = own.find(METHODS, key.method)(learner.policy, key.strength, key.lr)
    learner.policy.optimizer = method.optimizer
    method.optimizer.register_step_pre_hook(lambda *_: method.before_step())
    method.optimizer.register_step_post_hook(lambda *_: method.after_step(None))
    found: dict[str, list] = {}
    for task, change in enumerate(itertools.islice(changes(rng), key.tasks)):
        for pole in poles:
            pole.change(*change)
        learner._last_obs = None  # episodes start over
        episodes, start = _Episodes(), time.perf_counter()
        for epoch in range(key.epochs):
            learner.learn(ROLLOUT * ENVIRONMENTS, callback=episodes, reset_num_timesteps=False)
            progress(task * key.epochs + epoch + 1)
        seconds = time.perf_counter() - start
        x = torch.from_numpy(learner.rollout_buffer.observations.reshape(-1, 4))
        actions = torch.from_numpy(learner.rollout_buffer.actions.reshape(-1)).long()
        measured = {
            "train": float(np.mean(episodes.returns[-LAST_EPISODES:])),
            "online": float(np.mean(episodes.returns)), "test": None,
            "weight_norm": diagnostics.weight_norm(learner.policy), "seconds": seconds,
        }  # fmt: skip
        measured |= plasticity(
            _Actor(learner.policy), learner.policy, x, actions, nn.functional.cross_entropy
        )
        for name, value in measured.items():
            found.setdefault(name, []).append(value)
    return {**key._asdict(), **{name: rounded(value) for name, value in found.items()}}
