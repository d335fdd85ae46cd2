"""PPO in one file: actor and critic on a shared trunk, each with a regularizer of its own.

Shows: strengths and metrics per part, and the penalty once per optimizer step, outside of gradient
clipping. Policy gradients are small, so the actor's strength is far below 1e-3.

    pip install gymnasium
    python examples/ppo.py --steps 30
"""

from __future__ import annotations

import argparse

import gymnasium
import torch
from torch import nn
from torch.distributions import Categorical

from spectral_kernels import SpectralRegularizer

ENVIRONMENTS, ROLLOUT, EPOCHS, BATCH = 8, 64, 4, 128
GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2


class ActorCritic(nn.Module):
    """Logits of actions and the value of a state."""

    def __init__(self, observations: int, actions: int):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(observations, 64), nn.ReLU())
        self.actor = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, actions))
        self.critic = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.trunk(x)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30, help="rollouts, each with an update")
    parser.add_argument("--actor-strength", type=float, default=1e-5)
    parser.add_argument("--critic-strength", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)

    env = gymnasium.make_vec("CartPole-v1", ENVIRONMENTS)
    model = ActorCritic(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-5)

    # The trunk belongs to one of the two: a parameter whose penalty counted twice is an error.
    actor = SpectralRegularizer(
        model, strength=options.actor_strength, include=["trunk.*", "actor.*"]
    )
    critic = SpectralRegularizer(model, strength=options.critic_strength, include="critic.*")
    actor.attach(optimizer)  # every optimizer.step() has the penalty, once
    critic.attach(optimizer)

    seen = torch.from_numpy(env.reset(seed=options.seed)[0])
    running, finished = torch.zeros(ENVIRONMENTS), [0.0]
    for step in range(options.steps):
        # ---- a rollout: [time, environment]
        rows = []
        for _ in range(ROLLOUT):
            with torch.no_grad():
                logits, value = model(seen)
            chosen = Categorical(logits=logits)
            action = chosen.sample()
            new, reward, ended, cut, _ = env.step(action.numpy())
            done = torch.from_numpy(ended | cut).float()
            reward = torch.from_numpy(reward).float()
            rows.append((seen, action, chosen.log_prob(action), value, reward, done))
            running += reward
            finished += running[done > 0].tolist()
            running[done > 0] = 0
            seen = torch.from_numpy(new)
        x, action, old, value, reward, done = map(torch.stack, zip(*rows, strict=True))

        # ---- generalized advantage estimation
        with torch.no_grad():
            following = model(seen)[1]
        advantage, later = torch.zeros_like(reward), torch.zeros(ENVIRONMENTS)
        for t in reversed(range(ROLLOUT)):
            delta = reward[t] + GAMMA * following * (1 - done[t]) - value[t]
            advantage[t] = later = delta + GAMMA * LAMBDA * (1 - done[t]) * later
            following = value[t]
        target = advantage + value
        x, action, old, advantage, target = (
            v.flatten(0, 1) for v in (x, action, old, advantage, target)
        )

        # ---- the update
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(x)).split(BATCH):
                logits, value = model(x[batch])
                chosen = Categorical(logits=logits)
                a = advantage[batch]
                a = (a - a.mean()) / (a.std() + 1e-8)
                ratio = (chosen.log_prob(action[batch]) - old[batch]).exp()
                policy_loss = -torch.min(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean()
                value_loss = nn.functional.mse_loss(value, target[batch])
                optimizer.zero_grad()
                (policy_loss + 0.5 * value_loss - 0.01 * chosen.entropy().mean()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # of the task alone
                optimizer.step()

        metrics = {"return": sum(finished[-20:]) / len(finished[-20:])}
        metrics |= actor.metrics(prefix="actor") | critic.metrics(prefix="critic")
        if step % 5 == 0 or step == options.steps - 1:
            print(f"rollout {step:3}  return {metrics['return']:6.1f}  largest sigma: "
                  f"actor and trunk {metrics['actor/sigma_max']:.3f}, "
                  f"critic {metrics['critic/sigma_max']:.3f}")  # fmt: skip
    env.close()
    return metrics


if __name__ == "__main__":
    main()
